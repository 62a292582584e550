"""What was read of a user's data, before any of it is fitted. A leaf: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from evenorm.lab.language import Text

MOST_BYTES = 4 * 2**30  # of a file, and of what a compressed one becomes
MOST_ROWS = 20_000  # of which training and test set are made; more would not change an answer of this size
MOST_NUMBERS = 30_000_000  # rows times columns: 120 MB, of which each worker holds a few copies

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Raw:
    """One row a sample, as it stood in the file."""

    name: str
    numbers: Array  # (rows, columns) float32, NaN where there is no value
    categories: Array  # (rows, columns) of str, "" where there is no value
    target: Array  # (rows,) of str, "" where there is no value, or of float64, NaN where there is none
    columns: tuple[str, ...]  # their names, numbers first
    pictures: bool = False
    notes: tuple[Text, ...] = ()  # what a reader must know of how it was read


def single(values: Array) -> Array:
    """Return numbers as float32, NaN where they are not finite or too large for it."""
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def drawn(rows: int, columns: int) -> Array | None:
    """Return which rows are read of more than can be used, always the same ones; None: all."""
    most = min(MOST_ROWS, MOST_NUMBERS // max(1, columns))
    return None if rows <= most else np.sort(np.random.default_rng(0).choice(rows, most, replace=False))


def drawn_note(rows: int, kept: int) -> Text:
    """Return what a reader must know where rows were drawn."""
    return Text(
        f"Of the {rows:,} samples {kept:,} were drawn at random.",
        f"표본 {rows:,}개 가운데 {kept:,}개를 무작위로 뽑았다.",
    )
