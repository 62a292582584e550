"""How far a run is, on stderr: a bar with the time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Advance: TypeAlias = "Callable[[str, float], None]"  # what has just finished, and how much work it was


@contextmanager
def progress(total: float) -> Iterator[Advance]:
    """Yield a function to call after each piece of work; `total` is the sum of all pieces."""
    if sys.stderr.isatty():
        with _bar(total) as advance:
            yield advance
    else:
        yield _lines(total)


@contextmanager
def _bar(total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=total)
        yield lambda what, work: bar.update(task, advance=work, description=what)


def _lines(total: float) -> Advance:
    start, done = time.monotonic(), 0.0

    def advance(what: str, work: float) -> None:
        nonlocal done
        done += work
        left = (time.monotonic() - start) * (total / done - 1)
        print(f"evenorm lab: {100 * done / total:3.0f} %, {left:.0f} s left: {what}", file=sys.stderr, flush=True)

    return advance
