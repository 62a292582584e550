"""What a worker is at, for whoever watches: one small file a running stack, written twice a second. A leaf.

Files, because they cost a worker nothing that could be measured (0.1 ms twice a second) and need no connection; a
worker on another machine is not watched.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

SECONDS = 0.5  # between two beats

_place: Path | None = None  # of this process's file; None: nobody watches
_label = ""
_next = 0.0


@contextlib.contextmanager
def pulse(folder: str | None, label: str) -> Iterator[None]:
    """Say in a file of the folder, while this lasts, what this process is at."""
    global _place, _label, _next
    if folder is None:
        yield
        return
    _place, _label, _next = Path(folder) / str(os.getpid()), label, 0.0
    try:
        _say(_label)
        yield
    finally:
        with contextlib.suppress(OSError):
            _place.unlink()
        _place = None


def beat(step: int, steps: int, losses: Tensor) -> None:
    """Tell the step and the middle loss of the members that are not lost, if it is time and somebody watches."""
    global _next
    if _place is None or time.monotonic() < _next:
        return
    _next = time.monotonic() + SECONDS
    finite = [loss for loss in losses.tolist() if math.isfinite(loss)]
    now = f"loss {statistics.median(finite):.3g}" if finite else "all diverged"
    _say(f"{_label}: step {step} of {steps}, {now}")


def lines(folder: str) -> list[str]:
    """Return what all watched processes are at."""
    found = []
    for path in sorted(Path(folder).iterdir()):
        with contextlib.suppress(OSError):  # finished while we looked
            found.append(path.read_text(encoding="utf-8"))
    return [line for line in found if line]


def _say(line: str) -> None:
    assert _place is not None
    with contextlib.suppress(OSError):  # a full disk is no reason to stop training
        _place.write_text(line, encoding="utf-8")
