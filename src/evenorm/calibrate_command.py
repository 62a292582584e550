"""The command `evenorm calibrate`: a network, its weights and data by name; a table, and a file of new weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

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
Sequential = Annotated[bool, typer.Option("--sequential", help="Exact for every layer, at one pass a layer.")]
Prior = Annotated[float, typer.Option(help="By how many samples the old statistics weigh.")]
Tolerance = Annotated[float | None, typer.Option(help="Stop at this standard error of all means.")]
Out = Annotated[Path | None, typer.Option(help="Write all weights here: .safetensors, .pt or .pth.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def calibrate(
    model: Model,
    data: Data,
    weights: Weights = None,
    target: Target = None,
    batch_size: BatchSize = 100,
    forward: Forward = None,
    max_batches: MaxBatches = None,
    sequential: Sequential = False,
    prior: Prior = 0,
    tolerance: Tolerance = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compute the running statistics of a network's batch norm layers from data, and write the new weights."""
    from evenorm import inputs, outputs
    from evenorm.models.calibrate import calibrate as compute

    if out is not None:
        outputs.check_out(out, force)
    network = inputs.load_model(model, weights)
    batches = inputs.load_data(data, target, batch_size)
    call = None if forward is None else inputs.load_object(forward, "--forward")
    readable: Iterable[Any] = Shown(batches, f"--data {data}", "calibrating")
    if isinstance(batches, Iterator):
        readable = iter(readable)  # which says that it can be read once only
    try:
        calibration = compute(
            network,
            readable,
            forward=call,
            max_batches=max_batches,
            sequential=sequential,
            prior=prior,
            tolerance=tolerance,
        )
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"--model {model} failed: {type(error).__name__}: {error}") from error
    if out is not None:
        outputs.save_weights(out, network.state_dict(), force)
    if as_json:
        content = calibration.to_dict() | {"out": None if out is None else str(out)}
        print(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))
        return
    print(calibration)
    print(f"written: {out}" if out is not None else "nothing was written; --out FILE keeps the new statistics")


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
            total = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            total = None
        console = Console(stderr=True)
        yield from track(self.batches, self.task, total=total, console=console, transient=True)
