"""The command `evenorm fold`: a network, its weights and an example by name; a certificate, and new weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option(help="package.module:factory, called without arguments.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="Its weights: .safetensors, or .pt; no code in it is run.")]
Data = Annotated[
    str,
    typer.Option(
        help="Where the example comes from, its first batch: package.module:loader, a folder of .npy files, or a "
        "CSV or Parquet file.",
        show_default=False,
    ),
]
Target = Annotated[str | None, typer.Option(help="The column of a table that is no input.")]
BatchSize = Annotated[int, typer.Option(help="Samples in the example, of files.")]
Tolerance = Annotated[float | None, typer.Option(help="The largest relative difference allowed.")]
Out = Annotated[Path | None, typer.Option(help="Write the folded weights here: .safetensors, .pt or .pth.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def fold(
    model: Model,
    data: Data,
    weights: Weights = None,
    target: Target = None,
    batch_size: BatchSize = 16,
    tolerance: Tolerance = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold batch norm into the layers next to it, print the certificate, and write the folded weights."""
    from evenorm import inputs, outputs
    from evenorm.models.batches import arguments
    from evenorm.models.fold import fold as compute

    if out is not None:
        outputs.check_out(out, force)
    network = inputs.load_model(model, weights).eval()
    batch = _first(inputs.load_data(data, target, batch_size), f"--data {data}")
    positional, named = arguments(network, batch)
    folded = compute(network, named or tuple(positional), tolerance=tolerance)
    if out is not None:
        outputs.save_weights(out, folded.model.state_dict(), force)
    if as_json:
        content = dataclasses.asdict(folded.certificate) | {"out": None if out is None else str(out)}
        print(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False))
        return
    print(folded.certificate)
    print(f"written: {out}" if out is not None else "nothing was written; --out FILE keeps the folded weights")


def _first(batches: Iterable[Any], named: str) -> Any:
    try:
        for batch in batches:
            return batch
    except Exception as error:
        raise ValueError(f"{named} failed at batch 0: {type(error).__name__}: {error}") from error
    raise ValueError(f"{named} holds no batch, and fold needs one as an example")
