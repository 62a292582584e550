"""What the commands that work on a network share: their options, how they begin, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenorm.printing import print_json

if TYPE_CHECKING:
    from torch import nn

Model = Annotated[str, typer.Option(help="package.module:factory, called without arguments.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="Its weights: .safetensors, or .pt; no code in it is run.")]
Data = Annotated[
    str,
    typer.Option(
        help="package.module:loader, a folder of .npy files, or a CSV or Parquet file.", show_default=False
    ),
]
Target = Annotated[str | None, typer.Option(help="The column of a table that is no input.")]
BatchSize = Annotated[int, typer.Option(help="Samples a batch, of files.")]
Forward = Annotated[str | None, typer.Option(help="package.module:function, called with the network and a batch.")]
MaxBatches = Annotated[int | None, typer.Option(help="Read no more than these.")]
Out = Annotated[Path | None, typer.Option(help="Write all weights here: .safetensors, .pt or .pth.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def begin(
    model: str, weights: Path | None, data: str, target: str | None, batch_size: int, out: Path | None, force: bool
) -> tuple[nn.Module, Iterable[Any]]:
    """Return the network and the batches that options name, once it is certain that the result can be written.

    Raises:
        ValueError, TypeError, OSError: as `inputs` and `outputs` raise them.
    """
    from evenorm import inputs, outputs

    if out is not None:
        outputs.check_out(out, force)
    return inputs.load_model(model, weights), inputs.load_data(data, target, batch_size)


def end(content: Mapping[str, Any], table: object, out: Path | None, what: str, as_json: bool) -> None:
    """Print a result, as JSON or as a table, and where it was written."""
    if as_json:
        print_json({**content, "out": None if out is None else str(out)})
        return
    print(table)
    print(f"written: {out}" if out is not None else f"nothing was written; --out FILE keeps the {what}")


class Shown:
    """Batches, with a bar on stderr where that is a terminal, and with errors that say whose they are."""

    def __init__(self, batches: Iterable[Any], named: str, task: str) -> None:
        """Take the batches, what to call them in an error, and what is done to them, for the bar."""
        self.batches, self.named, self.task = batches, named, task

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        number = 0
        try:
            for batch in self._with_bar() if sys.stderr.isatty() else self.batches:
                yield batch
                number += 1
        except Exception as error:
            raise ValueError(f"{self.named} failed at batch {number}: {type(error).__name__}: {error}") from error

    def _with_bar(self) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import track

        try:
            total = len(self.batches)  # type: ignore[arg-type]  # asked whether it has one
        except TypeError:
            total = None
        console = Console(stderr=True)
        yield from track(self.batches, self.task, total=total, console=console, transient=True)
