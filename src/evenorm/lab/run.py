"""Running experiments: train what is missing, then analyse what is stored.

Workers train; this process alone writes. So a worker needs nothing but the code, and a trial is stored the
moment its stack is finished, whatever happens to the rest.
"""

from __future__ import annotations

import platform
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import joblib
import torch
from joblib.externals.loky import get_reusable_executor

import evenorm
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import EXPERIMENTS, inference
from evenorm.lab.language import Text
from evenorm.lab.progress import Advance, progress
from evenorm.lab.results import Analysis
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial, stacks


class MissingTrialsError(ValueError):
    """A report was asked for whose trials are not all stored."""


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


def train(trials: Sequence[Trial], store: Store, jobs: int, advance: Advance | None = None) -> None:
    """Train the trials in stacks, `jobs` at a time, and store each as soon as its stack is finished.

    The numbers depend neither on `jobs` nor on the order in which stacks finish.
    """
    waiting = [
        stack
        for name, experiment in EXPERIMENTS.items()
        for stack in stacks((trial for trial in trials if trial.experiment == name), experiment.stack_size)
    ]
    waiting.sort(key=_work, reverse=True)  # the longest first, so that no worker is left with it at the end
    tasks = (joblib.delayed(train_stack)(stack) for stack in waiting)
    parallel = joblib.Parallel(
        n_jobs=min(jobs, max(1, len(waiting))), batch_size=1, return_as="generator_unordered"
    )
    with _ignoring_interrupts():  # workers inherit this: Ctrl-C is for this process to answer
        finished: Generator[list[tuple[Trial, Record]], None, None] = parallel(tasks)
    try:
        for members in finished:
            for trial, record in members:
                store.save(trial, record)
            if advance is not None:
                stack = [trial for trial, _ in members]
                advance(f"{stack[0].experiment}, {stack[0].arm}: {len(stack)} trials", _work(stack))
    except BaseException:
        if parallel.n_jobs != 1:
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib counts the stacks that were under way; they are trained again
            finished.close()
        raise


def train_stack(trials: Sequence[Trial]) -> list[tuple[Trial, Record]]:
    """Train one stack on one thread: a second one would cost more than it brings, and might round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(zip(trials, EXPERIMENTS[trials[0].experiment].train(trials), strict=True))
    finally:
        torch.set_num_threads(threads)


def run(experiments: Sequence[Experiment], scale: Scale, store: Store, jobs: int) -> list[Analysis]:
    """Train every planned trial that is not stored, then analyse all from the store.

    Raises:
        OSError: the store cannot be written; trials stored before stay.
    """
    store.prepare([experiment.name for experiment in experiments])
    records = load(experiments, scale, store)
    pending = [trial for found in records.values() for trial, record in found.items() if record is None]
    if pending:
        with progress(_work(pending)) as advance:
            train(pending, store, jobs, advance)
        for trial in pending:
            records[trial.experiment][trial] = store.load(trial)
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
        Text("machine", "컴퓨터"): f"{platform.system()} {platform.machine()}",
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


def _work(trials: Sequence[Trial]) -> float:
    """Return how much work the trials are: their steps, where they have any, at their experiment's cost."""
    return sum(EXPERIMENTS[trial.experiment].cost * float(dict(trial.settings).get("steps", 1)) for trial in trials)


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
