"""A trial: one training run, named by the hash of its configuration. A leaf: no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

# Stands in every configuration: a change of the machinery that changes numbers makes all stored trials stale.
PROTOCOL = 1

# Seeds that choose rates and margins; they never enter a verdict.
PILOT_SEEDS = (1000, 1001, 1002)

Record: TypeAlias = "dict[str, Any]"  # what a trial measured: numbers and lists of numbers, as JSON has them


@dataclass(frozen=True)
class Trial:
    """All that decides the numbers of one training run.

    Two trials with the same seed share their split, initial weights and batch order, whatever their arm.
    """

    experiment: str
    version: int  # the experiment's own: raised when its training changes
    arm: str
    seed: int
    rate: float
    settings: tuple[tuple[str, int | float | str], ...] = ()  # whatever else the experiment needs, sorted by name

    def __getitem__(self, name: str) -> Any:
        """Return one of the settings."""
        return dict(self.settings)[name]

    def configuration(self) -> dict[str, Any]:
        """Return the trial as a plain dictionary, the form that is hashed and stored."""
        return {
            "protocol": PROTOCOL,
            "experiment": self.experiment,
            "version": self.version,
            "arm": self.arm,
            "seed": self.seed,
            "rate": self.rate,
            "settings": dict(self.settings),
        }

    def digest(self) -> str:
        """Return the SHA-256 of the canonical configuration: the trial's name on disk."""
        return hashlib.sha256(canonical(self.configuration()).encode()).hexdigest()


def settings(**values: int | float | str) -> tuple[tuple[str, int | float | str], ...]:
    """Return keyword arguments in the one order that `Trial.settings` has."""
    return tuple(sorted(values.items()))


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def random_seed(seed: int, stream: str) -> int:
    """Return the seed of one named stream of random numbers of a trial.

    A stream for each use (initial weights, batch order, ...) keeps an arm that draws more from one of
    them from shifting the draws of the others.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "big") >> 1


def stacks(trials: Iterable[Trial], size: int) -> Iterator[list[Trial]]:
    """Group trials that differ only in seed and rate into stacks of at most `size` members.

    The order within and between stacks depends on the set of trials alone.
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        key = (trial.experiment, trial.version, trial.arm, trial.settings)
        groups.setdefault(key, []).append(trial)
    for key in sorted(groups):
        members = sorted(groups[key], key=lambda trial: (trial.rate, trial.seed))
        count = -(-len(members) // size)
        for part in range(count):  # even parts: a stack of one left over would cost as much as a full one
            yield members[part * len(members) // count : (part + 1) * len(members) // count]
