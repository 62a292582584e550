"""The command `evenorm doctor`: weights, or a network with data, by name; findings as a table, JSON or a page."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evenorm.command_line import BatchSize, Force, Forward, Json, MaxBatches, Shown, Target, Weights

if TYPE_CHECKING:
    from torch import nn

    from evenorm.doctor.diagnosis import Diagnosis


class Threshold(str, Enum):
    """The severities, as the command line has them."""

    note = "note"
    warning = "warning"
    error = "error"


Checkpoint = Annotated[
    Path | None,
    typer.Argument(metavar="[WEIGHTS]", help="Weights alone: .safetensors, .pt or .pth; no code in it is run."),
]
Model = Annotated[str | None, typer.Option(help="package.module:factory, called without arguments.")]
Data = Annotated[
    str | None,
    typer.Option(help="package.module:loader, a folder of .npy files, or a CSV or Parquet file."),
]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots here: .html or .htm.")]
FailOn = Annotated[Threshold, typer.Option(help="Exit with 1 from findings of this severity on.")]
Fix = Annotated[bool, typer.Option("--fix", help="Write a copy with exact statistics to --out; needs data.")]
Out = Annotated[Path | None, typer.Option(help="Where --fix writes: .safetensors, .pt or .pth.")]

Call = Callable[["nn.Module", Any], Any]


def doctor(
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    target: Target = None,
    batch_size: BatchSize = 100,
    forward: Forward = None,
    max_batches: MaxBatches = None,
    fail_on: FailOn = Threshold.warning,
    fix: Fix = False,
    out: Out = None,
    html: Html = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say why a network is good in train() and bad in eval(), and what to do; exit with 1 if something is wrong."""
    from evenorm import inputs, outputs
    from evenorm.doctor.diagnose import diagnose

    _check(checkpoint, model, weights, data, fix, out)
    if out is not None:
        outputs.check_out(out, force)
    if html is not None:
        outputs.check_page(html, force, (checkpoint, weights, out))
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"--max-batches must be at least 1, got {max_batches}")
    if checkpoint is not None:
        _refuse_unread({"--target": target, "--forward": forward, "--max-batches": max_batches})
        _show(diagnose(inputs.load_weights(checkpoint)), None, None, html, as_json, fail_on)
        return
    assert model is not None
    network = inputs.load_model(model, weights)
    call = None if forward is None else inputs.load_object(forward, "--forward")

    readings = _readings(data, target, batch_size, times=3 if fix else 1)

    def shown(task: str) -> Shown | None:
        return None if data is None else Shown(next(readings), f"--data {data}", task)

    def examine(network: nn.Module, task: str) -> Diagnosis:
        batches = shown(task)
        found: Diagnosis = _named(model, lambda: diagnose(network, batches, forward=call, max_batches=max_batches))
        return found

    before, after = examine(network, "examining"), None
    if fix and out is not None:
        from evenorm.models.calibrate import calibrate

        cured, batches = copy.deepcopy(network), shown("calibrating")
        assert batches is not None
        _named(model, lambda: calibrate(cured, batches, forward=call, max_batches=max_batches))
        after = examine(cured, "examining again")
        outputs.save_weights(out, cured.state_dict(), force)
    _show(before, after, out, html, as_json, fail_on)


def _check(
    checkpoint: Path | None, model: str | None, weights: Path | None, data: str | None, fix: bool, out: Path | None
) -> None:
    if (checkpoint is None) == (model is None):
        raise ValueError(
            "give a file of weights, or --model package.module:factory with --weights, not both or none"
        )
    if checkpoint is not None and (weights is not None or data is not None):
        raise ValueError(
            "--weights and --data need --model: weights alone cannot run; drop the other file of weights"
        )
    if fix and (data is None or out is None):
        raise ValueError(
            "--fix computes new statistics from --data and writes them to --out; give --model and both"
        )
    if out is not None and not fix:
        raise ValueError("--out is where --fix writes; give --fix too")
    if fix and out is not None and weights is not None and out.resolve() == weights.resolve():
        raise ValueError(f"--out {out} is the file of --weights, which is never overwritten; give another name")


def _refuse_unread(options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(
                f"{option} is for a network with data: weights alone cannot run; give --model and --data"
            )


def _readings(data: str | None, target: str | None, batch_size: int, times: int) -> Iterator[Iterable[Any]]:
    """Return what is read, so many times: the data themselves, or where they are an iterator, a new one each time.

    Raises:
        ValueError: an iterator that is no new one.
    """
    from evenorm import inputs

    if data is None:
        return iter(())
    first = inputs.load_data(data, target, batch_size)
    if not isinstance(first, Iterator):
        return repeat(first, times)
    found = [first, *(inputs.load_data(data, target, batch_size) for _ in range(times - 1))]
    if times > 1 and found[1] is first:
        raise ValueError(
            f"--fix reads the data {times} times, and --data {data} is an iterator, which can be read once only; "
            "give a list, a loader, or a function that returns a new iterator"
        )
    return iter(found)


def _named(model: str, work: Callable[[], Any]) -> Any:
    """Run work, and say whose error it is if it is none of ours."""
    try:
        return work()
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"--model {model} failed: {type(error).__name__}: {error}") from error


def _show(
    before: Diagnosis,
    after: Diagnosis | None,
    out: Path | None,
    html: Path | None,
    as_json: bool,
    fail_on: Threshold,
) -> None:
    """Print what was found, and exit with 1 if some of what is left is grave enough."""
    from evenorm.doctor.findings import Severity

    if as_json:
        fixed = {} if after is None else {"after": after.to_dict(), "out": str(out)}
        text = json.dumps(before.to_dict() | fixed, ensure_ascii=True, indent=2, allow_nan=False)
        print(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
    else:
        from evenorm.doctor.table import show

        show(before)
        if after is not None:
            print(f"\nafter the cure: {after.summary}")
            show(after, findings=False)
            print(f"written: {out}")
    if html is not None:  # last: a full disk does not take what was found with it
        from evenorm.lab.report import write_page

        write_page(html, before.to_html())
        if not as_json:
            print(f"page: {html}")
    left = after or before
    if any(finding.severity >= Severity[fail_on.name.upper()] for finding in left.findings):
        raise typer.Exit(1)
