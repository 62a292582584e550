"""Event files for TensorBoard: every curve that a trial measured, one folder a trial."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from evenorm.lab.trials import Record, Trial


@contextmanager
def event_files(folder: Path) -> Iterator[Callable[[Trial, Record], None]]:
    """Yield a function that writes a trial below the folder, as experiment/arm/rate/seed; twice is once.

    Raises:
        ValueError: the package that writes such files is missing.
        OSError: the folder cannot be written.
    """
    if find_spec("tensorboardX") is None:
        raise ValueError('--tensorboard needs a package that is not here: pip install "evenorm[tensorboard]"')
    folder.mkdir(parents=True, exist_ok=True)
    yield lambda trial, record: _write(folder, trial, record)


def _write(folder: Path, trial: Trial, record: Record) -> None:
    from tensorboardX import SummaryWriter

    place = folder / _plain(trial.experiment) / _plain(trial.arm) / f"rate {trial.rate:g}" / f"seed {trial.seed}"
    # The trial's own name at the end tells those apart that differ in a setting alone; none is written twice.
    place = place / trial.digest()[:8]
    if place.exists():
        return
    with SummaryWriter(str(place)) as writer:
        steps = int(dict(trial.settings).get("steps", 0))
        for name, values in record.items():
            if not _is_curve(values):
                continue
            every = steps / len(values) if steps else 1
            for index, value in enumerate(values):
                if value is not None:
                    writer.add_scalar(name, value, round((index + 1) * every))


def _is_curve(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 1
        and all(v is None or isinstance(v, (int, float)) for v in values)
    )


def _plain(name: str) -> str:
    """Return a name that every file system takes."""
    return re.sub(r"[^\w .,=+-]", "_", name)
