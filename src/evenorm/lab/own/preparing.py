"""A user's data made ready for a network: the task, the splits, and scikit-learn's preprocessing of the columns.

Whatever is fitted (medians, categories that are rare, scales) is fitted on the training part of a split alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor
from torch.nn import functional

from evenorm.lab.data import Split
from evenorm.lab.language import Text
from evenorm.lab.own.raw import Array, Raw

FEWEST_ROWS = 50  # with fewer a test set says nothing
FEWEST_OF_CLASS = 5  # below that a class is in no test set, or in no training set
CLASSES_OF_NUMBERS = 20  # whole numbers with at most so many values are classes
MOST_CLASSES = 1000
TEST_SHARE = 0.2
KINDS_OF_CATEGORY = 20  # of one column; rarer ones share a place
REDRAWN = 200_000  # numbers in a table up to which every seed draws a split of its own
FEWEST_INPUTS = 3
CLASSIFICATION, REGRESSION = "classification", "regression"
_VERSION = 2  # of this preparation: a change of it is other data


@dataclass(frozen=True, eq=False)
class OwnData:
    """Data that trials can be trained on: numpy arrays, which reach other processes and machines unharmed."""

    name: str  # of the file and of the content: trials of equal names have equal numbers
    task: str
    numbers: Array
    categories: Array
    target: Array  # class numbers, or float64
    classes: tuple[str, ...]
    redrawn: bool  # whether each seed draws a split of its own
    pictures: bool
    notes: tuple[Text, ...]

    def __eq__(self, other: object) -> bool:
        """Return whether the content is equal, by its hash."""
        return isinstance(other, OwnData) and self.name == other.name

    def __hash__(self) -> int:
        """Return the name's hash."""
        return hash(self.name)

    def split(self, seed: int) -> Split:
        """Return the training and test set of a seed, 80 to 20."""
        return _split(self, seed if self.redrawn else 0)

    @property
    def test_rows(self) -> int:
        """Return the size of the test set."""
        return round(TEST_SHARE * len(self.target))

    @property
    def train_rows(self) -> int:
        """Return the size of the training set."""
        return len(self.target) - self.test_rows

    @property
    def outputs(self) -> int:
        """Return how many numbers a network must answer with."""
        return len(self.classes) or 1

    @property
    def chance(self) -> float:
        """Return the score of an answer that looks at no input: the commonest class's share, or 0 of R²."""
        return float(np.bincount(self.target).max() / len(self.target)) if self.classes else 0.0


def prepare(raw: Raw, task: str | None = None) -> OwnData:
    """Decide the task, leave out what cannot be used, and name the content.

    The task, where none is given: a target of text is classified, and so are whole numbers with at most 20 values;
    all other numbers are regressed.

    Raises:
        ValueError: a target that cannot be predicted, or too few rows.
    """
    notes = list(raw.notes)
    task = task or _task(raw.target)
    present = _present(raw.target)
    if not present.all():
        lost = int((~present).sum())
        notes.append(Text(f"{lost} rows without a target were left out.", f"목표값이 없는 행 {lost}개는 뺐다."))
    if task == CLASSIFICATION:
        labels = _labels(raw.target)
        common = {label for label, count in Counter(labels[present].tolist()).items() if count >= FEWEST_OF_CLASS}
        rare = present & ~np.isin(labels, sorted(common))
        if rare.any():
            of = len(set(labels[rare]))
            notes.append(
                Text(
                    f"{int(rare.sum())} rows of {of} classes with fewer than 5 rows were left out.",
                    f"행이 5개가 안 되는 클래스 {of}개의 행 {int(rare.sum())}개는 뺐다.",
                )
            )
        present &= ~rare
        classes = tuple(sorted(common, key=_by_number))
        target = np.asarray([classes.index(label) for label in labels[present]], dtype=np.int64)
    else:
        classes, target = (), _measured(raw)[present]
    _refuse_too_little(raw, task, classes, target, notes)
    raw = replace(raw, numbers=raw.numbers[present], categories=raw.categories[present])
    redrawn = raw.numbers.size + raw.categories.size <= REDRAWN
    name = f"{raw.name} {_digest(raw, task, target, classes)}"
    return OwnData(name, task, raw.numbers, raw.categories, target, classes, redrawn, raw.pictures, tuple(notes))


def _task(target: Array) -> str:
    if target.dtype.kind == "U":
        return CLASSIFICATION
    values = np.unique(target[np.isfinite(target)])
    whole = bool((values == np.round(values)).all())
    return CLASSIFICATION if whole and len(values) <= CLASSES_OF_NUMBERS else REGRESSION


def _present(target: Array) -> Array:
    return target != "" if target.dtype.kind == "U" else np.isfinite(target)


def _labels(target: Array) -> Array:
    if target.dtype.kind == "U":
        return target
    return np.asarray([f"{value:g}" for value in target], dtype=np.str_)


def _by_number(label: str) -> tuple[float, str]:
    try:
        return float(label), ""
    except ValueError:
        return float("inf"), label


def _measured(raw: Raw) -> Array:
    if raw.target.dtype.kind == "U":
        raise ValueError(f"{raw.name}: the target holds text, which has classes and no values; leave out --task")
    return raw.target


def _refuse_too_little(raw: Raw, task: str, classes: tuple[str, ...], target: Array, notes: list[Text]) -> None:
    if len(target) < FEWEST_ROWS:
        raise ValueError(
            f"{raw.name}: {len(target)} rows can be used, and at least {FEWEST_ROWS} are required, of which every "
            f"fifth is kept for testing; with fewer no answer would mean anything"
            + "".join(f". {note.rstrip('.')}" for note in notes)
        )
    if task == CLASSIFICATION and len(classes) < 2:
        only = f", {classes[0]!r}" if classes else ""
        raise ValueError(
            f"{raw.name}: the target has one class only{only}; nothing is to be told apart. Is it the right column?"
        )
    if task == REGRESSION and np.ptp(target) == 0:
        raise ValueError(f"{raw.name}: the target is {target[0]:g} in every row; is it the right column?")
    if len(classes) > MOST_CLASSES:
        raise ValueError(
            f"{raw.name}: the target has {len(classes)} classes, more than {MOST_CLASSES}; is it an identifier?"
        )


def _digest(raw: Raw, task: str, target: Array, classes: tuple[str, ...]) -> str:
    content = hashlib.sha256(f"{_VERSION} {task} {raw.numbers.shape} {raw.categories.shape} {classes}".encode())
    content.update(np.ascontiguousarray(raw.numbers).tobytes())
    content.update("\0".join(raw.categories.ravel().tolist()).encode())
    content.update(np.ascontiguousarray(target).tobytes())
    return content.hexdigest()[:16]


@lru_cache(maxsize=32)
def _split(data: OwnData, seed: int) -> Split:
    labels = data.target if data.classes else None
    train, test = train_test_split(
        np.arange(len(data.target)), test_size=data.test_rows, stratify=labels, random_state=seed
    )
    x_train, x_test = _fitted(data, train, test)
    y = torch.as_tensor(data.target)
    if not data.classes:
        mean, deviation = data.target[train].mean(), data.target[train].std()
        y = ((y - mean) / (deviation or 1.0)).float()
    return Split(_inputs(x_train), y[train], _inputs(x_test), y[test])


def _inputs(x: Array) -> Tensor:
    """Return the inputs, with columns of zeros beside fewer than three.

    A product with a single column is computed otherwise, and rounds by who else is in the stack.
    """
    inputs = torch.as_tensor(np.asarray(x, np.float32))
    return functional.pad(inputs, (0, max(0, FEWEST_INPUTS - inputs.shape[1])))


def _fitted(data: OwnData, train: Array, test: Array) -> tuple[Array, Array]:
    """Return the inputs of both parts, preprocessed as the training part says."""
    if not data.categories.size and not np.isnan(data.numbers).any():
        return data.numbers[train], data.numbers[test]
    columns = _columns(data)
    mixed = np.concatenate([data.numbers.astype(object), data.categories.astype(object)], 1)
    return columns.fit_transform(mixed[train]), columns.transform(mixed[test])


def _columns(data: OwnData) -> ColumnTransformer:
    """Return numbers with the median in the gaps, a mark for each gap, and categories as ones and zeros.

    How many columns come out must not depend on the split: what has gaps, and which categories there are, is looked
    up in the whole table.
    """
    count = data.numbers.shape[1]
    gaps = [index for index in range(count) if np.isnan(data.numbers[:, index]).any()]
    kinds = [sorted(set(column.tolist())) for column in data.categories.T]
    encoder = OneHotEncoder(
        categories=kinds,
        handle_unknown="infrequent_if_exist",
        max_categories=KINDS_OF_CATEGORY,
        sparse_output=False,
    )
    parts = [
        ("numbers", SimpleImputer(strategy="median", keep_empty_features=True), list(range(count))),
        ("gaps", MissingIndicator(features="all"), gaps),
        ("categories", encoder, list(range(count, count + len(kinds)))),
    ]
    return ColumnTransformer([part for part in parts if part[2]])
