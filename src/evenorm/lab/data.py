"""Data by name: what ships inside scikit-learn, split into training and test sets.

A trial names its data in its settings, so that its numbers can be told from those of the same trial on others; a
trial that names none is on its experiment's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeAlias

import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor

from evenorm.lab.trials import Trial


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
        return replace(self, x_train=(self.x_train - mean) / scale, x_test=(self.x_test - mean) / scale)


@cache
def digits() -> Split:
    """Return 1797 images of 8×8 digits, x/16 in [0, 1], in one fixed stratified split 1437/360."""
    x, y = load_digits(return_X_y=True)
    return _split(x / 16.0, y, test_size=360, seed=0)


@cache
def badly_scaled_digits() -> Split:
    """Return digits with each pixel multiplied by a power of ten from -2 to 2, drawn once for all."""
    split = digits()
    power = torch.rand(split.features, generator=torch.Generator().manual_seed(0)) * 4 - 2
    return replace(split, x_train=split.x_train * 10**power, x_test=split.x_test * 10**power)


@cache
def wine(seed: int) -> Split:
    """Return 178 wines with 13 columns, in a stratified split 142/36 that the seed draws."""
    x, y = load_wine(return_X_y=True)
    return _split(x, y, test_size=36, seed=seed)


Draw: TypeAlias = "Callable[[int], Split]"  # the split of a seed; the same object for the same seed

_DRAWS: dict[str, Draw] = {
    "digits": lambda seed: digits(),
    "badly scaled digits": lambda seed: badly_scaled_digits(),
    "wine": wine,
}


def dataset(name: str, seed: int = 0) -> Split:
    """Return the named data, as split for the seed where splits are drawn by seeds.

    Raises:
        ValueError: no data of this name.
    """
    if name not in _DRAWS:
        raise ValueError(f"there is no data named {name!r}; choose from {', '.join(_DRAWS)}")
    return _DRAWS[name](seed)


def split_of(trial: Trial, default: str) -> Split:
    """Return the data that a trial names by the setting `data`, or the default where it names none."""
    return dataset(dict(trial.settings).get("data", default), trial.seed)  # type: ignore[arg-type]  # a name is a str


@cache
def fold(split: Split, seed: int, index: int, folds: int = 5) -> Split:
    """Return all samples of a split anew: one of the stratified folds that the seed deals is the test set.

    Folds of one index have the same size whatever the seed.
    """
    x, y = torch.cat([split.x_train, split.x_test]), torch.cat([split.y_train, split.y_test])
    dealt = StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y)
    train, test = (torch.from_numpy(part) for part in list(dealt)[index])
    return replace(split, x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])


def _split(x: object, y: object, *, test_size: int, seed: int) -> Split:
    parts = train_test_split(x, y, test_size=test_size, stratify=y, random_state=seed)
    x_train, x_test, y_train, y_test = parts
    return Split(
        torch.as_tensor(x_train, dtype=torch.float32),
        torch.as_tensor(y_train, dtype=torch.int64),
        torch.as_tensor(x_test, dtype=torch.float32),
        torch.as_tensor(y_test, dtype=torch.int64),
    )
