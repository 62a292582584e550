"""The command `evenorm calibrate`: a network, its weights and data by name; a table, and a file of new weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from evenorm.command_line import (
    BatchSize,
    Data,
    Force,
    Forward,
    Json,
    MaxBatches,
    Model,
    Out,
    Shown,
    Target,
    Weights,
    begin,
    end,
)

Sequential = Annotated[bool, typer.Option("--sequential", help="Exact for every layer, at one pass a layer.")]
Prior = Annotated[float, typer.Option(help="By how many samples the old statistics weigh.")]
Tolerance = Annotated[float | None, typer.Option(help="Stop at this standard error of all means.")]


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

    network, batches = begin(model, weights, data, target, batch_size, out, force)
    call = None if forward is None else inputs.load_object(forward, "--forward")
    shown = Shown(batches, f"--data {data}", "calibrating")
    readable = iter(shown) if isinstance(batches, Iterator) else shown  # an iterator says that it is read once only
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
    end(calibration.to_dict(), calibration, out, "new statistics", as_json)
