"""`evenorm bench --device cuda`: timed by the device, past its cache, beside all that torch offers.

Every contender runs on inputs in rotation, more of them together than the device's cache holds, and device events
time whole rounds. The unit is the device's own copy speed. The table is Markdown, to be pasted.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evenorm.bench.contenders import Inputs, Run, compiled, floor_in_clones, make_inputs, ours, runner, theirs
from evenorm.bench.measure import DTYPES, require_rounds
from evenorm.bench.rows import BLOCKS, Block, Row

# ResNet-50's at batch 256, and two of rows; the first of each size in both layouts.
_IMAGES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
ROWS = (
    *(Row((256, channels, side, side), last) for channels, side in _IMAGES for last in (False, True)),
    Row((8192, 1024)),
    Row((65536, 256)),
)
LARGE = 64 * 2**20  # bytes: from here on memory alone should count
MOST_SETS = 16  # of inputs in rotation
COPIED = 2**30  # bytes of the copy that is timed
NEAR_ZERO = 1e-5  # of z, which is about 1: where float32's rounding may choose the other side of ReLU

Timer = Callable[[Sequence[Run], int], float]  # seconds a call, of so many calls of the runs in rotation


@dataclass(frozen=True)
class Result:
    """One row and block: seconds a call by contender, medians over the rounds, and ours against the copy."""

    row: str
    block: str
    size: int  # of x, in bytes
    seconds: dict[str, float]
    share: float  # of the copy's speed, at the traffic of the floor
    error: float  # largest distance from float64, in units of each result's largest value
    right: bool

    @property
    def ratio(self) -> float:
        """How much longer the best of the others takes."""
        return min(time for name, time in self.seconds.items() if name != "ours") / self.seconds["ours"]


def require_gpu() -> None:
    """Raise unless torch can use a GPU."""
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "sees none"
        raise ValueError(f"--device cuda needs a GPU; torch {torch.__version__} {built}")


def run(
    blocks: Sequence[str],
    rows: str,
    dtype: str,
    training: bool,
    rounds: int,
    print_json: Callable[[Any], None] | None,
) -> int:
    """Measure and print; return 0, or 1 where a result of ours is wrong.

    Raises:
        ValueError: no GPU, an unknown block or dtype, no row that matches, fewer than 3 rounds.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown:
        raise ValueError(f"BLOCK must be one of {', '.join(BLOCKS)} with --device cuda, got {unknown[0]!r}")
    chosen = [row for row in ROWS if rows.replace("x", "×") in row.name]
    if not chosen:
        raise ValueError(f"--rows {rows!r} is in none of the shapes: {', '.join(row.name for row in ROWS)}")
    require_rounds(rounds)
    require_gpu()
    cache, name = (getattr(torch.cuda.get_device_properties(0), key) for key in ("L2_cache_size", "name"))
    speed = copy_speed(device_seconds)
    named = [BLOCKS[block] for block in blocks or ("bn", "bn-relu", "bn-add-relu")]
    results = []
    for block, row in itertools.product(named, chosen):
        results.append(measure(row, block, dtype, training, rounds, cache, speed, device_seconds))
    if print_json is not None:
        print_json({"device": name, "copy": speed, "results": [vars(result) for result in results]})
    else:
        print(f"{name}, torch {torch.__version__}, {dtype}, a copy moves {speed / 1e12:.2f} TB/s\n")
        print("\n".join(as_markdown(results)))
    return 0 if all(result.right for result in results) else 1


def measure(
    row: Row,
    block: Block,
    dtype: str,
    training: bool,
    rounds: int,
    cache: int,
    speed: float,
    timer: Timer,
    device: str = "cuda",
) -> Result:
    """Check ours against float64, then time all contenders in turn, `rounds` times."""
    size = row.elements * DTYPES[dtype].itemsize
    sets = [_on_device(make_inputs(row, block, DTYPES[dtype], seed), device) for seed in range(_sets(size, cache))]
    error = _error(row, block, training, sets[0])
    running = list(contenders(row, block, training, sets, device))  # once: one of them is compiled
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, context, runs in running:
            with context():
                times.setdefault(name, []).append(timer(runs, _repeats(size)))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    share = 2 * size * floor_in_clones(block, training) / seconds["ours"] / speed
    limit = 4 * torch.finfo(DTYPES[dtype]).eps
    return Result(row.name, block.name, size, seconds, share, error, error <= limit)


def contenders(
    row: Row, block: Block, training: bool, sets: Sequence[Inputs], device: str
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]], list[Run]]]:
    """Yield each contender's name, what it runs under, and its call on each set of inputs."""
    eager = theirs(row, block).to(device)
    with_cudnn, without = (partial(torch.backends.cudnn.flags, enabled=enabled) for enabled in (True, False))
    yield "ours", nullcontext, [runner(ours(row, block).to(device), one, training) for one in sets]
    yield "eager", with_cudnn, [runner(eager, one, training) for one in sets]
    yield "eager, no cuDNN", without, [runner(eager, one, training) for one in sets]
    of_torch = compiled(eager)
    yield "compiled", nullcontext, [runner(of_torch, one, training) for one in sets]


def device_seconds(runs: Sequence[Run], repeats: int) -> float:
    """Time calls in rotation between two events of the device; the first rotation warms up."""
    for run in runs:
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for run in itertools.islice(itertools.cycle(runs), repeats):
        run()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3 / repeats


def copy_speed(timer: Timer, size: int = COPIED, device: str = "cuda") -> float:
    """Return how many bytes a second a copy within the device moves, those read and those written."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timer([lambda: (target.copy_(source),)], 20)


def as_markdown(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of a table, and below it what the bars speak of."""
    names = list(results[0].seconds)
    yield f"| block | shape | {' | '.join(names)} | best of the others / ours | of the copy |"
    yield "|" + "---|" * (len(names) + 4)
    for result in results:
        times = " | ".join(f"{result.seconds[name] * 1e6:.0f} µs" for name in names)
        share = f"{result.share:.0%}" if result.size >= LARGE else ""
        wrong = "" if result.right else f" WRONG by {result.error:.2g}"
        yield f"| {result.block} | {result.row} | {times} | {result.ratio:.2f} | {share}{wrong} |"
    mean = statistics.geometric_mean(result.ratio for result in results)
    yield f"\nbest of the others / ours: geometric mean {mean:.2f}, least {min(r.ratio for r in results):.2f}"


def _sets(size: int, cache: int) -> int:
    """Return how many inputs hold more than twice the cache together."""
    return min(MOST_SETS, 1 + 2 * cache // size) if size else 1


def _repeats(size: int) -> int:
    return max(10, min(200, 2**30 // max(size, 1)))


def _on_device(inputs: Inputs, device: str) -> Inputs:
    x, residual = (
        None if t is None else t.detach().to(device).requires_grad_() for t in (inputs.x, inputs.residual)
    )
    assert x is not None
    return Inputs(x, residual, inputs.cotangent.to(device))


def _error(row: Row, block: Block, training: bool, inputs: Inputs) -> float:
    """Return the largest distance from float64, a parameter's gradient in units of its terms' sum.

    Gradients are not compared where z is next to 0 and ReLU's slope is 0 or 1 by rounding.
    """
    device, exact_inputs = inputs.x.device, inputs.double()
    found = runner(ours(row, block).to(device), inputs, training)()
    exact = runner(theirs(row, block, torch.float64).to(device), exact_inputs, training)()
    terms = float(inputs.cotangent.double().abs().sum()) / row.shape[1]
    unsure = _next_to_zero(row, block, training, exact_inputs) if block.activation == "relu" else None
    errors = []
    for place, (tensor, truth) in enumerate(zip(found, exact, strict=True)):
        scale = truth.abs().max() if truth.dim() > 1 else truth.abs().max() + terms
        distance = (tensor.detach().double() - truth.detach()).abs()
        if unsure is not None and place > 0 and truth.dim() > 1:
            distance[unsure] = 0
        errors.append(float(distance.max() / scale.detach()))
    return max(errors)


def _next_to_zero(row: Row, block: Block, training: bool, inputs: Inputs) -> Tensor:
    """Tell where the activation's argument is so small that its sign is a matter of rounding."""
    linear = theirs(row, replace(block, activation=None), torch.float64).to(inputs.x.device).train(training)
    with torch.no_grad():
        z: Tensor = linear(inputs.x, inputs.residual)
    return z.abs() < NEAR_ZERO
