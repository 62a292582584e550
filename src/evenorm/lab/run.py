"""Running experiments: train what is missing, then analyse what is stored.

Workers train; this process alone writes. So a worker needs nothing but the code, and a trial is stored the
moment its stack is finished, whatever happens to the rest.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeAlias

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

import evenorm
from evenorm.environment import processor
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import EXPERIMENTS, inference
from evenorm.lab.language import Text
from evenorm.lab.machines import Machines, abandon
from evenorm.lab.progress import Shown, progress
from evenorm.lab.pulse import pulse
from evenorm.lab.results import Analysis
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial, stacks

Keep: TypeAlias = "Callable[[Trial, Record], None]"
Train: TypeAlias = "Callable[[Sequence[Trial]], list[Record]]"
ATTEMPTS = 3  # at what a killed worker left undone; a worker that memory killed once may find room the next time


class MissingTrialsError(ValueError):
    """A report was asked for whose trials are not all stored."""


class LostWorkersError(ValueError):
    """Workers died again and again without finishing anything."""

    def __init__(self) -> None:
        """Say what it mostly is."""
        super().__init__(
            "the worker processes were killed again and again, as where memory runs out; finished trials are "
            "stored. Go on with the same command and fewer --jobs."
        )


class OutOfTimeError(ValueError):
    """The time was up before all stacks were trained."""

    def __init__(self, left: int, planned: int) -> None:
        """Take how many stacks are left, of how many."""
        super().__init__(
            f"the time is up with {left} of {planned} stacks not trained: the machine was slower than measured. "
            "Finished trials are stored: the same command goes on from there."
        )


@dataclass(frozen=True)
class Count:
    """How many of an experiment's trials are stored."""

    experiment: Experiment
    stored: int
    planned: int


def choose(names: Sequence[str]) -> list[Experiment]:
    """Return the named experiments in the registry's order, all of them where no name is given.

    Raises:
        ValueError: a name that is no experiment's.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        known = ", ".join(EXPERIMENTS)
        raise ValueError(f"there is no experiment named {unknown[0]!r}; choose from {known}, or name none for all")
    return [experiment for name, experiment in EXPERIMENTS.items() if not names or name in names]


def count(experiments: Iterable[Experiment], scale: Scale, store: Store) -> list[Count]:
    """Return how many trials of each experiment are stored, without reading them."""
    counts = []
    for experiment in experiments:
        trials = experiment.plan(scale)
        counts.append(Count(experiment, sum(store.path(trial).exists() for trial in trials), len(trials)))
    return counts


def load(experiments: Iterable[Experiment], scale: Scale, store: Store) -> dict[str, dict[Trial, Record | None]]:
    """Return the record of every planned trial of each experiment, None where it is not stored."""
    return {
        experiment.name: {trial: store.load(trial) for trial in experiment.plan(scale)}
        for experiment in experiments
    }


def train(
    pending: Mapping[Trial, Experiment],
    keep: Keep,
    machines: Machines,
    shown: Shown | None = None,
    deadline: float | None = None,
) -> None:
    """Train the trials in stacks, many at a time, and keep each as soon as its stack is finished.

    The numbers depend neither on the machines nor on the order in which stacks finish.

    Args:
        pending: each trial with the experiment that trains it.
        keep: called with each trial and its record, in this process.
        machines: where stacks are trained.
        shown: how to tell what goes on; of a cluster's workers only what they have finished.
        deadline: of `time.monotonic`, after which no more stacks are waited for.

    Raises:
        OutOfTimeError: the deadline has passed; what was finished is kept.
        LostWorkersError: workers died again and again without finishing a stack.
    """
    waiting, fruitless = _stacks(pending), 0
    planned = len(waiting)
    folder = None if shown is None or machines.backend != "processes" else shown.folder
    while waiting:
        before = len(waiting)
        try:
            with machines.parallel(before) as parallel, closing(_finished(parallel, waiting, folder)) as finished:
                for index, members in finished:
                    experiment, stack = waiting.pop(index)
                    for trial, record in zip(stack, members, strict=True):
                        keep(trial, record)
                    if shown is not None:
                        shown.advance(f"{_label(stack)}{_loss(members)}", _work(experiment, stack))
                    if waiting and deadline is not None and time.monotonic() > deadline:
                        raise OutOfTimeError(len(waiting), planned)
        except TerminatedWorkerError as error:
            fruitless = 0 if len(waiting) < before else fruitless + 1
            if fruitless == ATTEMPTS:
                raise LostWorkersError from error
            print("evenorm lab: warning: a worker was killed; what it had begun is trained again", file=sys.stderr)


def _finished(
    parallel: joblib.Parallel, waiting: Mapping[int, tuple[Experiment, list[Trial]]], folder: str | None
) -> Generator[tuple[int, list[Record]], None, None]:
    """Yield the number and the records of each stack as it is finished."""
    tasks = [
        joblib.delayed(train_stack)(index, owner.train, stack, folder) for index, (owner, stack) in waiting.items()
    ]
    with _ignoring_interrupts():  # workers inherit this: Ctrl-C is for this process to answer
        finished: Generator[tuple[int, list[Record]], None, None] = parallel(tasks)
    try:
        for result in finished:  # noqa: UP028  # `yield from` would close `finished` before what stands below
            yield result
    except BaseException:
        abandon(parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib counts the stacks that were under way; they are trained again
            finished.close()
        raise


def _stacks(pending: Mapping[Trial, Experiment]) -> dict[int, tuple[Experiment, list[Trial]]]:
    """Return numbered stacks, the longest first, so that no worker is left with it at the end."""
    owners = {trial.experiment: experiment for trial, experiment in pending.items()}
    found = [
        (owner, stack)
        for name, owner in owners.items()
        for stack in stacks((trial for trial in pending if trial.experiment == name), owner.stack_size)
    ]
    found.sort(key=lambda item: _work(*item), reverse=True)
    return dict(enumerate(found))


def train_stack(index: int, train: Train, trials: Sequence[Trial], folder: str | None) -> tuple[int, list[Record]]:
    """Train one stack on one thread: a second one would cost more than it brings, and might round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pulse(folder, _label(trials)):
            return index, train(trials)
    finally:
        torch.set_num_threads(threads)


def run(
    experiments: Sequence[Experiment],
    scale: Scale,
    store: Store,
    machines: Machines,
    *,
    deadline: float | None = None,
    watch: Keep | None = None,
) -> list[Analysis]:
    """Train every planned trial that is not stored, then analyse all from the store.

    Args:
        experiments: what to run; where two plan the same trial, it is trained once.
        scale: how much.
        store: where trials are kept.
        machines: where they are trained.
        deadline: of `time.monotonic`, after which training stops.
        watch: called with every trial and its record, stored before or now.

    Raises:
        OSError: the store cannot be written; trials stored before stay.
        OutOfTimeError, LostWorkersError: as in `train`.
    """
    store.prepare(sorted({trial.experiment for experiment in experiments for trial in experiment.plan(scale)}))
    records = load(experiments, scale, store)
    pending = {
        trial: experiment
        for experiment in experiments
        for trial, record in records[experiment.name].items()
        if record is None
    }
    if watch is not None:
        for found in records.values():
            for trial, record in found.items():
                if record is not None:
                    watch(trial, record)

    def keep(trial: Trial, record: Record) -> None:
        store.save(trial, record)
        if watch is not None:
            watch(trial, record)

    if pending:
        with progress(sum(_work(experiment, [trial]) for trial, experiment in pending.items())) as shown:
            train(pending, keep, machines, shown, deadline)
        trained = {trial: store.load(trial) for trial in pending}
        records = {
            name: {**found, **{t: trained[t] for t in found if t in trained}} for name, found in records.items()
        }
    return _analyse(experiments, scale, records, store)


def report(experiments: Sequence[Experiment], scale: Scale, store: Store) -> list[Analysis]:
    """Analyse stored trials without training any.

    Raises:
        MissingTrialsError: some are not stored, or damaged; the message names the command that makes them.
    """
    return _analyse(experiments, scale, load(experiments, scale, store), store)


def environment() -> dict[str, str]:
    """Return what a reader needs to know about the machine and the software behind the numbers."""
    return {
        "evenorm": evenorm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        Text("machine", "컴퓨터"): Text(
            f"{os.cpu_count()} cores, {processor()}, {platform.system()}",
            f"{processor()}의 코어 {os.cpu_count()}개, {platform.system()}",
        ),
        Text("report made", "보고서를 만든 때"): datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(analyses: Sequence[Analysis], scale: Scale, store: Store, folder: Path, language: str = "en") -> Path:
    """Write the report into the folder and return its path; the layer it takes apart is the store's, if any."""
    from evenorm.lab.report import write_report

    trial = inference.plan(scale)[0]
    record = store.load(trial) if store.path(trial).exists() else None
    layer = None if record is None else inference.layer_view(record)
    path = folder / "report.html"
    return write_report(analyses, path, environment=environment(), layer=layer, language=language)


def _analyse(
    experiments: Sequence[Experiment],
    scale: Scale,
    records: Mapping[str, Mapping[Trial, Record | None]],
    store: Store,
) -> list[Analysis]:
    analyses = []
    for experiment in experiments:
        found = {trial: record for trial, record in records[experiment.name].items() if record is not None}
        lacking = len(records[experiment.name]) - len(found)
        if lacking:
            raise MissingTrialsError(
                f"{lacking} of {len(found) + lacking} trials of {experiment.name} are not stored under "
                f"{store.folder}; "
                f"train them with: {scale.command(experiment.name)} --out {store.folder.parent}"
            )
        analyses.append(experiment.analyse(found, scale))
    return analyses


def _work(experiment: Experiment, trials: Sequence[Trial]) -> float:
    """Return how much work the trials are: their steps, where they have any, at their experiment's cost."""
    return sum(experiment.cost * float(dict(trial.settings).get("steps", 1)) for trial in trials)


def _label(stack: Sequence[Trial]) -> str:
    return f"{stack[0].experiment}, {stack[0].arm}: {len(stack)} trials"


def _loss(records: Sequence[Record]) -> str:
    """Return the middle training loss of a stack, where its records have one and no curve by that name."""
    losses = [record["train_loss"] for record in records if isinstance(record.get("train_loss"), float)]
    return f", loss {statistics.median(losses):.3g}" if losses else ""


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: Callable[..., object] | int | None = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
