"""What an experiment is: a claim, the trials that test it, and how stored trials answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evenorm.lab.language import Text
from evenorm.lab.results import Analysis, Claim
from evenorm.lab.trials import Record, Trial


@dataclass(frozen=True)
class Scale:
    """How large a run is: `seeds` paired seeds 0, 1, ...; `quick` shortens what the experiment allows."""

    seeds: int = 10
    quick: bool = False

    @property
    def paired(self) -> range:
        """Return the seeds that enter the verdict."""
        return range(self.seeds)

    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know about a run too small to judge by."""
        floor = 2 / 2**self.seeds
        return (
            (
                Text(
                    f"{self.seeds} seeds are a look: the exact test cannot go below p = {floor:g}.",
                    f"시드 {self.seeds}개는 훑어보는 정도다. 정확 검정의 p는 {floor:g}보다 작아질 수 없다.",
                ),
            )
            if floor > 0.05
            else ()
        )

    def command(self, experiment: str) -> str:
        """Return the command that repeats the run."""
        return " ".join(
            ["evenorm lab run", experiment, *(["--quick"] if self.quick else []), f"--seeds {self.seeds}"]
        )


@dataclass(frozen=True)
class Experiment:
    """One claim, put to the test: plan → train (stack by stack, elsewhere, in any order) → analyse."""

    name: str
    title: str
    claim: Claim
    plan: Callable[[Scale], list[Trial]]  # every trial the analysis reads
    train: Callable[[Sequence[Trial]], list[Record]]  # one stack: trials that differ in seed and rate alone
    analyse: Callable[[Mapping[Trial, Record], Scale], Analysis]
    cost: float = 1.0  # of one step of one member, in units of `speed`'s: for the order of stacks and the time left
    stack_size: int = 16  # members of a stack: below some 13 overhead rules, above some 30 the caches do
