"""A run on a user's data, from the file to the page."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenorm.lab import run
from evenorm.lab.experiment import Scale
from evenorm.lab.language import Text
from evenorm.lab.machines import Machines
from evenorm.lab.own.asking import Plan, choose, experiments
from evenorm.lab.own.budget import SECONDS, choose_plan, finished_plan
from evenorm.lab.own.preparing import CLASSIFICATION, REGRESSION, OwnData, prepare
from evenorm.lab.own.reading import read
from evenorm.lab.own.words import advice
from evenorm.lab.report import Heading
from evenorm.lab.results import Analysis
from evenorm.lab.store import Store


@dataclass(frozen=True)
class Asked:
    """What was asked of which data.

    Args:
        path: of the file or folder.
        target: the column of a table to be predicted.
        task: "classification" or "regression"; None: read off the target.
        drop: columns that are no inputs.
        names: of the questions; all where there is none.

    Raises:
        ValueError: an unknown question or task.
    """

    path: Path
    target: str | None = None
    task: str | None = None
    drop: Sequence[str] = ()
    names: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        """Refuse what is not known, before a large file is read."""
        choose(self.names)
        if self.task not in (None, CLASSIFICATION, REGRESSION):
            raise ValueError(f"--task must be {CLASSIFICATION} or {REGRESSION}, got {self.task!r}")

    def read(self) -> OwnData:
        """Return the data, read and prepared."""
        return prepare(read(self.path, self.target, self.drop), self.task)

    def command(self) -> str:
        """Return the command that asks this."""
        parts = ["evenorm", "lab", "run", *self.names, "--data", str(self.path)]
        options = (("--target", self.target), ("--task", self.task), *(("--drop", column) for column in self.drop))
        return shlex.join([*parts, *(part for name, value in options if value for part in (name, value))])

    def heading(self, analyses: Sequence[Analysis]) -> Heading:
        """Return what stands over the report."""
        name = self.path.name
        return Heading(
            Text(f"Batch norm on {name}", f"{name}에서의 배치 정규화"),
            Text(
                "The laboratory's questions, put to your own data: small networks trained from scratch, with and "
                "without batch norm, each at its best rate, with paired seeds and intervals.",
                "실험실의 질문을 당신의 데이터에 던졌다. 작은 신경망을 처음부터, 배치 정규화가 있게 또 없게, 각각 "
                "가장 좋은 학습률에서 학습하고, 짝지은 시드와 구간으로 비교했다.",
            ),
            advice(analyses),
        )


def ask(
    asked: Asked, store: Store, machines: Machines, budget: float | None, watch: run.Keep | None = None
) -> list[Analysis]:
    """Train what fits into the budget and is not stored, and analyse it.

    Raises:
        ValueError: data that cannot be used, or a budget that is too small.
        OSError: a file that cannot be read, or a store that cannot be written.
    """
    seconds = SECONDS if budget is None else budget
    deadline = time.monotonic() + seconds
    data, questions = asked.read(), choose(asked.names)
    plan = choose_plan(questions, data, seconds, machines, store, deadline)
    command = asked.command() + ("" if budget is None else f" --budget {budget:g}")
    found = experiments(questions, data, plan, command)
    return run.run(found, _scale(plan), store, machines, deadline=deadline, watch=watch)


def answer(asked: Asked, store: Store) -> list[Analysis]:
    """Analyse the largest plan that is stored, without training.

    Raises:
        MissingTrialsError: none is.
    """
    data, questions = asked.read(), choose(asked.names)
    plan = finished_plan(questions, data, store)
    if plan is None:
        raise run.MissingTrialsError(
            f"the trials on {asked.path.name} are not all stored under {store.folder}; train them with: "
            f"{asked.command()} --out {shlex.quote(str(store.folder.parent))}"
        )
    return run.report(experiments(questions, data, plan, asked.command()), _scale(plan), store)


def _scale(plan: Plan) -> Scale:
    return Scale(seeds=plan.seeds)
