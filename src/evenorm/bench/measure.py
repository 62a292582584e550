"""Check each comparison against float64, then time the contenders in turn, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenorm.bench.contenders import Inputs, Run, compiled, floor_in_clones, make_inputs, ours, runner, theirs
from evenorm.bench.rows import SMALL, Block, Row

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Plan:
    """What to run: rows, blocks, one dtype, one mode, and how patiently."""

    rows: Sequence[Row]
    blocks: Sequence[Block]
    dtype: str = "float32"
    training: bool = True
    compiled: bool = False  # torch.compile of theirs as a third contender
    rounds: int = 15
    seconds: float = 0.02  # how long one contender runs in one round, at least


@dataclass(frozen=True)
class Result:
    """One comparison. Times are seconds a call, medians over the rounds."""

    row: str
    elements: int
    block: str
    ours: float
    theirs: float
    compiled: float | None
    ratio: float  # theirs / ours, the median of the rounds' own ratios
    spread: float  # half the distance between the quartiles of those ratios, over their median
    clones: float  # our time in units of `x.clone()`
    share: float  # of the machine's copy speed, at the traffic of the floor
    error_ours: float  # largest distance from float64, over outputs and gradients, in units of the largest value
    error_theirs: float
    right: bool  # whether ours is as near to float64 as theirs, or within the rounding of the result

    @property
    def large(self) -> bool:
        """Whether the row has enough elements for arithmetic to count."""
        return self.elements >= SMALL


def require_rounds(rounds: int) -> None:
    """Raise unless there are as many rounds as quartiles need."""
    if rounds < 3:
        raise ValueError(f"--rounds must be at least 3 for a median with quartiles, got {rounds}")


def measure(plan: Plan) -> Iterator[Result]:
    """Yield the result of each row and block."""
    for block in plan.blocks:
        for row in plan.rows:
            yield compare(row, block, plan)


def compare(row: Row, block: Block, plan: Plan) -> Result:
    """Check one row and block, then time it."""
    inputs = make_inputs(row, block, DTYPES[plan.dtype])
    runs = {
        "ours": runner(ours(row, block), inputs, plan.training),
        "theirs": runner(theirs(row, block), inputs, plan.training),
    }
    exact = runner(theirs(row, block, torch.float64), inputs.double(), plan.training)()
    errors = {name: _error(run(), exact) for name, run in runs.items()}
    del exact
    if plan.compiled:
        runs["compiled"] = runner(compiled(theirs(row, block)), inputs, plan.training)
    runs["clone"] = _clone(inputs)
    times = interleave(runs, plan.rounds, plan.seconds)
    ratios = [slow / fast for slow, fast in zip(times["theirs"], times["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    clones = statistics.median(fast / clone for clone, fast in zip(times["clone"], times["ours"], strict=True))
    rounding = 2 * torch.finfo(DTYPES[plan.dtype]).eps
    return Result(
        row=row.name,
        elements=row.elements,
        block=block.name,
        ours=statistics.median(times["ours"]),
        theirs=statistics.median(times["theirs"]),
        compiled=statistics.median(times["compiled"]) if plan.compiled else None,
        ratio=middle,
        spread=(high - low) / 2 / middle,
        clones=clones,
        share=floor_in_clones(block, plan.training) / clones,
        error_ours=errors["ours"],
        error_theirs=errors["theirs"],
        right=errors["ours"] <= max(errors["theirs"], rounding),
    )


def interleave(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time each run once a round, in turn, so that a machine that drifts drifts for all; seconds a call."""
    repeats = {name: _repeats(run, seconds) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, repeats[name]))
    return times


def _repeats(run: Run, seconds: float) -> int:
    _seconds(run, 2)  # caches, the allocator, a compilation
    return max(int(seconds / max(_seconds(run, 2), 1e-9)), 1)


def _seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _clone(inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    x = inputs.x.detach()
    return lambda: (x.clone(),)


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest distance from the truth, each tensor in units of its own largest value."""
    return max(
        float(
            (tensor.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max().clamp(min=1e-300)
        )
        for tensor, truth in zip(found, exact, strict=True)
    )
