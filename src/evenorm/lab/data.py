"""Real data that ships inside scikit-learn, split into training and test sets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Training and test set: x is float32 (samples, features), y is int64 (samples,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def features(self) -> int:
        """Return the number of columns."""
        return self.x_train.shape[1]

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return int(self.y_train.max()) + 1

    def standardised(self) -> Split:
        """Return the split with every column at mean 0 and variance 1 over the training set."""
        mean = self.x_train.mean(0)
        deviation = self.x_train.std(0, correction=0)
        scale = torch.where(deviation > 0, deviation, 1.0)  # a constant column stays 0
        return Split((self.x_train - mean) / scale, self.y_train, (self.x_test - mean) / scale, self.y_test)


@cache
def digits() -> Split:
    """Return 1797 images of 8×8 digits, x/16 in [0, 1], in one fixed stratified split 1437/360."""
    x, y = load_digits(return_X_y=True)
    return _split(x / 16.0, y, test_size=360, seed=0)


@cache
def wine(seed: int) -> Split:
    """Return 178 wines with 13 columns, in a stratified split 142/36 that the seed draws."""
    x, y = load_wine(return_X_y=True)
    return _split(x, y, test_size=36, seed=seed)


def _split(x: object, y: object, *, test_size: int, seed: int) -> Split:
    parts = train_test_split(x, y, test_size=test_size, stratify=y, random_state=seed)
    x_train, x_test, y_train, y_test = parts
    return Split(
        torch.as_tensor(x_train, dtype=torch.float32),
        torch.as_tensor(y_train, dtype=torch.int64),
        torch.as_tensor(x_test, dtype=torch.float32),
        torch.as_tensor(y_test, dtype=torch.int64),
    )
