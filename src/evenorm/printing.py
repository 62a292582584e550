"""How commands print: a table for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))


def wide_console() -> Console:
    """Return a console as wide as the terminal, or on a pipe, which has no width, 200 columns wide.

    80 columns would break words that a script looks for.
    """
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their heads, on a console as `wide_console` chooses it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table
    from rich.text import Text

    heads = (Column(name, overflow="fold") for name in columns)  # a word too long is broken, not cut off
    table = Table(*heads, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: square brackets in a cell are no markup
    wide_console().print(table)


def show_progress(results: Iterable[Result], total: int, name: Callable[[Result], str]) -> list[Result]:
    """Collect results, with a bar on stderr where a terminal watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = Console(file=sys.stderr)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("measuring", total=total)
        found = []
        for result in results:
            found.append(result)
            progress.update(task, advance=1, description=f"measured {name(result)}")
    return found
