"""How far a run is, on stderr: on a terminal a bar and a line a running stack, plain lines otherwise."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from evenorm.lab.pulse import lines

Advance: TypeAlias = "Callable[[str, float], None]"  # what has just finished, and how much work it was


@dataclass(frozen=True)
class Shown:
    """How to tell what goes on: `advance` after each piece of work, a folder for the pulse of those under way."""

    advance: Advance
    folder: str | None  # None: nobody looks


@contextmanager
def progress(total: float) -> Iterator[Shown]:
    """Yield how to show progress; `total` is the sum of all pieces of work."""
    if not sys.stderr.isatty():
        yield Shown(_lines(total), None)
        return
    with (
        tempfile.TemporaryDirectory(prefix="evenorm-", ignore_cleanup_errors=True) as folder,
        _bar(total, folder) as advance,
    ):
        yield Shown(advance, folder)


@contextmanager
def _bar(total: float, folder: str) -> Iterator[Advance]:
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Watched(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            for line in lines(folder):
                yield Text(f"  {line}", overflow="ellipsis", no_wrap=True)

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Watched(*columns, console=console, transient=True, refresh_per_second=4) as bar:
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
