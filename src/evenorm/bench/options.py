"""What each option of the layer costs: a step with it against a step of the plain layer, interleaved in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import evenorm
from evenorm.bench.contenders import Run, make_inputs
from evenorm.bench.measure import DTYPES, Plan, interleave
from evenorm.bench.rows import BLOCKS, Row

ROWS = Row((60, 100)), Row((32, 64, 56, 56))  # one where a call is dispatch, one where it is arithmetic
PLAIN = "plain"


@dataclass(frozen=True)
class Option:
    """A layer with one thing that differs from the plain one, or with none."""

    name: str
    given: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[nn.Module], AbstractContextManager[None]] | None = None  # entered for each step
    valid: float | None = None  # the share of positions that the mask leaves
    prepare: Callable[[nn.Module], object] | None = None


@dataclass(frozen=True)
class Price:
    """What one option costs. The price is its time over the plain layer's, the median of the rounds' own ratios."""

    row: str
    option: str
    seconds: float
    price: float
    spread: float  # half the distance between the quartiles of those ratios, over their median


def _used_and_left(layer: nn.Module) -> None:
    """Enter and leave whatever can be left again."""
    with evenorm.no_update(layer), evenorm.one_update(layer):
        pass
    evenorm.unfreeze(evenorm.freeze(layer))


_UNUSED = {
    "activation": None,
    "average": None,
    "virtual_batch_size": None,
    "renorm": None,
    "on_nonfinite": "skip",
    "on_single": "raise",
    "process_group": None,
}
OPTIONS = (
    Option(PLAIN),
    Option("all given, none used", _UNUSED, prepare=_used_and_left),
    Option("mask, all valid", valid=1.0),
    Option("mask, 3/4 valid", valid=0.75),
    Option("virtual_batch_size=8", {"virtual_batch_size": 8}),
    Option("renorm", {"renorm": evenorm.Renorm(start=0, r_steps=0, d_steps=0)}),
    Option("average=Exponential(debias)", {"average": evenorm.Exponential(0.1, debias=True)}),
    Option("average=Cumulative", {"average": evenorm.Cumulative()}),
    Option("average=Window(8)", {"average": evenorm.Window(8)}),
    Option("on_nonfinite=propagate", {"on_nonfinite": "propagate"}),
    Option("on_nonfinite=raise", {"on_nonfinite": "raise"}),
    Option("on_single=population", {"on_single": "population"}),
    Option("in one_update", around=evenorm.one_update),
    Option("in no_update", around=evenorm.no_update),
    Option("freeze", prepare=evenorm.freeze),
)


def prices(plan: Plan) -> Iterator[Price]:
    """Yield what each option costs in each of the plan's rows."""
    for row in plan.rows:
        runs = {option.name: step(option, row, DTYPES[plan.dtype]) for option in OPTIONS}
        times = interleave(runs, plan.rounds, plan.seconds)
        for name, found in times.items():
            ratios = [own / plain for own, plain in zip(found, times[PLAIN], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            yield Price(row.name, name, statistics.median(found), middle, (high - low) / 2 / middle)


def step(option: Option, row: Row, dtype: torch.dtype) -> Run:
    """Return a call that runs a training step, forward and backward, of a layer with the option."""
    inputs = make_inputs(row, BLOCKS["bn"], dtype)
    layer = evenorm.BatchNorm(row.shape[1], **option.given)
    if option.prepare is not None:
        option.prepare(layer)
    around = option.around or (lambda _: nullcontext())
    wanted = [inputs.x, *layer.parameters()]
    extra = {}
    if option.valid is not None:
        positions = torch.Size((row.shape[0], *row.shape[2:]))
        valid = torch.rand(positions, generator=torch.Generator().manual_seed(0)) < option.valid
        extra = {"mask": valid}

    def run() -> tuple[Tensor, ...]:
        with around(layer):
            y = layer(inputs.x, **extra)
            return y, *torch.autograd.grad(y, wanted, inputs.cotangent)

    return run
