"""The records of one experiment by arm, rate and seed: what an analysis reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from evenorm.lab.experiment import Scale
from evenorm.lab.language import Text, korean
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial

Measure: TypeAlias = "Callable[[Record], float]"
Cell: TypeAlias = "tuple[str, float]"  # an arm at a rate


class Grid:
    """Every arm at every rate, over the paired seeds (those that enter a verdict) and the pilot seeds."""

    def __init__(self, records: Mapping[Trial, Record], scale: Scale) -> None:
        """Take the records of trials that differ in arm, rate and seed alone."""
        self.scale = scale
        self.rates = tuple(sorted({trial.rate for trial in records}))
        self.steps = int(next(iter(records))["steps"])
        self._records = {(trial.arm, trial.rate, trial.seed): record for trial, record in records.items()}

    def records(self, cell: Cell, seeds: Sequence[int] | None = None) -> list[Record]:
        """Return a cell's record for each paired seed, or for the given ones."""
        arm, rate = cell
        return [self._records[arm, rate, seed] for seed in (self.scale.paired if seeds is None else seeds)]

    def values(self, cell: Cell, measure: Measure) -> list[float]:
        """Return a cell's measure for each paired seed."""
        return [measure(record) for record in self.records(cell)]

    def differences(self, more: Cell, less: Cell, measure: Measure) -> tuple[float, ...]:
        """Return the measure of `more` minus that of `less` for each paired seed."""
        return tuple(a - b for a, b in zip(self.values(more, measure), self.values(less, measure), strict=True))

    def best(self, arm: str, *measures: Measure) -> Cell:
        """Return the arm at the rate with the largest measure over the pilot seeds; the next one breaks ties."""

        def merit(rate: float) -> list[float]:
            pilots = self.records((arm, rate), PILOT_SEEDS)
            return [sum(map(measure, pilots)) for measure in measures]

        return arm, max(self.rates, key=merit)

    def curves(self, cell: Cell, name: str, factor: float = 1.0) -> list[list[float | None]]:
        """Return a measured curve of each paired seed, in units of 1/factor."""
        return [
            [None if value is None else factor * value for value in record[name]] for record in self.records(cell)
        ]

    def notes(self, best: Mapping[str, Cell], words: Mapping[str, str]) -> list[str]:
        """Return what limits the choice of rates: an edge of the grid, and trials that diverged."""
        notes = [
            Text(
                f"The best rate {words[arm]}, {rate:g}, is at the edge of the grid: a better one may lie beyond.",
                f"{korean(words[arm])}: 가장 좋은 학습률 {rate:g}은 격자의 끝이다. 더 나은 값이 더 있을 수 있다.",
            )
            for arm, (_, rate) in best.items()
            if rate in (self.rates[0], self.rates[-1])
        ]
        lost = sum(record["diverged"] for record in self._records.values())
        of = len(self._records)
        return [
            *notes,
            Text(f"{lost:.0f} of {of} trials diverged.", f"시행 {of}개 가운데 {lost:.0f}개가 발산했다."),
        ]
