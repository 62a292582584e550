"""What is installed here and which engines run: the answer to `evenorm info`."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from evenorm.engines import cpu, triton


@dataclass(frozen=True)
class Info:
    """Versions, and for each engine None where it runs, else the reason why it does not.

    >>> import evenorm
    >>> evenorm.info().engines["formulas"] is None
    True
    """

    evenorm: str
    torch: str
    python: str
    threads: int
    engines: dict[str, str | None]

    def __str__(self) -> str:
        """Return a line an item."""
        lines = [
            f"evenorm  {self.evenorm}",
            f"torch    {self.torch}",
            f"python   {self.python}",
            f"threads  {self.threads}",
        ]
        lines += [f"{name:<8} {'runs' if reason is None else reason}" for name, reason in self.engines.items()]
        return "\n".join(lines)


def info() -> Info:
    """Return the versions at work and the engines found, with the reason where one is missing.

    >>> import evenorm
    >>> evenorm.info().torch.split(".")[0]
    '2'
    """
    from evenorm import __version__

    return Info(
        evenorm=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        engines={"cpu": cpu.available(), "triton": triton.available(), "formulas": None},
    )


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
