"""The cells of `overfitting` as stored trials have them: each at the rate and strength its pilot seeds chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from evenorm.lab.experiment import Scale
from evenorm.lab.language import Text
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial

NORMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
}
NOTHING = "nothing"
WORDS = {
    NOTHING: Text("nothing else", "다른 것 없음"),
    "dropout": Text("dropout", "드롭아웃"),
    "L1": Text("L1", "L1"),
    "L2": Text("L2", "L2"),
}
NOISY_SIZES = (8, 16, 32, 64, 128)
LOST = 10.0  # the test loss of a net that diverged: the right class gets 1 chance in 22 000


@dataclass(frozen=True)
class Cell:
    """A norm with a regulariser at the rate and strength that the pilot seeds chose."""

    norm: str
    regulariser: str
    strength: float
    rate: float
    merit: float  # minus the pilot seeds' summed log loss on samples left over
    records: tuple[Record, ...]  # of the paired seeds

    def values(self, measure: Callable[[Record], float]) -> list[float]:
        """Return the measure of every paired seed."""
        return [measure(record) for record in self.records]


Cells: TypeAlias = "Mapping[tuple[str, str], Cell]"  # by norm and regulariser


def chosen(records: Mapping[Trial, Record], scale: Scale) -> dict[tuple[str, str], Cell]:
    """Return every norm with every regulariser at the rate and strength that its pilot seeds chose."""
    found: dict[tuple[str, str, float, float], dict[int, Record]] = {}
    for trial, record in records.items():
        key = (trial.arm, trial["regulariser"], trial["strength"], trial.rate)
        found.setdefault(key, {})[trial.seed] = record
    cells: dict[tuple[str, str], Cell] = {}
    for (norm, regulariser, strength, rate), seeds in sorted(found.items()):
        merit = -sum(_log(seeds[seed]["unused_loss"]) for seed in PILOT_SEEDS)
        paired = tuple(seeds[seed] for seed in scale.paired)
        cell = Cell(norm, regulariser, strength, rate, merit, paired)
        if (norm, regulariser) not in cells or merit > cells[norm, regulariser].merit:
            cells[norm, regulariser] = cell
    return {(norm, regulariser): cells[norm, regulariser] for norm in NORMS for regulariser in WORDS}


def _log(loss: float | None) -> float:
    return math.log(LOST if loss is None else min(loss, LOST))


def log_test_loss(record: Record) -> float:
    """Return the log of the final test loss."""
    return _log(record["test_loss"][-1])


def gap(record: Record) -> float:
    """Return the final test loss minus the final training loss."""
    test, training = (math.exp(_log(record[name][-1])) for name in ("test_loss", "train_loss"))
    return test - training


def slope(name: str) -> Callable[[Record], float]:
    """Return the slope of log(added loss) on log(size of the batch)."""

    def measure(record: Record) -> float:
        added = [1e-6 if loss is None else max(loss, 1e-6) for loss in record[name]]
        return float(np.polyfit(np.log(NOISY_SIZES), np.log(added), 1)[0])

    return measure


def best(cells: Cells, norm: str) -> str:
    """Return the regulariser that the pilot seeds like best."""
    return max((name for name in WORDS if name != NOTHING), key=lambda name: cells[norm, name].merit)


def gains(cells: Cells, norm: str, regulariser: str) -> list[float]:
    """Return by how much a regulariser lowers each seed's log test loss."""
    alone, regularised = (cells[norm, name].values(log_test_loss) for name in (NOTHING, regulariser))
    return [a - b for a, b in zip(alone, regularised, strict=True)]


def minus(more: Sequence[float], less: Sequence[float]) -> tuple[float, ...]:
    """Return the difference of every paired seed."""
    return tuple(a - b for a, b in zip(more, less, strict=True))
