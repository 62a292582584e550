"""The command `evenorm fold`: a network, its weights and an example by name; a certificate, and new weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from evenorm.command_line import Force, Json, Model, Out, Target, Weights, begin, end

Data = Annotated[
    str,
    typer.Option(
        help="Where the example comes from, its first batch: package.module:loader, a folder of .npy files, or a "
        "CSV or Parquet file.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Samples in the example, of files.")]
Tolerance = Annotated[float | None, typer.Option(help="The largest relative difference allowed.")]


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
    from evenorm import outputs
    from evenorm.models.batches import arguments
    from evenorm.models.fold import fold as compute

    network, batches = begin(model, weights, data, target, batch_size, out, force)
    network.eval()
    batch = _first(batches, f"--data {data}")
    positional, named = arguments(network, batch)
    folded = compute(network, named or tuple(positional), tolerance=tolerance)
    if out is not None:
        outputs.save_weights(out, folded.model.state_dict(), force)
    end(dataclasses.asdict(folded.certificate), folded.certificate, out, "folded weights", as_json)


def _first(batches: Iterable[Any], named: str) -> Any:
    try:
        for batch in batches:
            return batch
    except Exception as error:
        raise ValueError(f"{named} failed at batch 0: {type(error).__name__}: {error}") from error
    raise ValueError(f"{named} holds no batch, and fold needs one as an example")
