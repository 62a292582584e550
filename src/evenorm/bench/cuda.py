"""`evenorm bench --device cuda`: timed by the device, past its cache, beside all that torch offers.

Every contender runs on inputs in rotation, more of them together than the device's cache holds, and device events
time whole rounds. The unit is the device's own copy speed. The table is Markdown, to be pasted.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from evenorm.bench import network, peers
from evenorm.bench.contenders import Inputs, Run, compiled, floor_in_clones, make_inputs, ours, runner, theirs
from evenorm.bench.measure import DTYPES, require_rounds
from evenorm.bench.rows import BLOCKS, Block, Row
from evenorm.printing import show_progress

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
MOST_WAITING = 20  # calls: the device takes about a thousand launches before it lets the host wait
NEAR_ZERO = 1e-5  # of z, which is about 1: where float32's rounding may choose the other side of ReLU

SMALL_ROWS = Row((60, 100)), Row((128, 256)), Row((8, 64, 14, 14))  # where the host is the cost
DEFAULT = "bn", "bn-relu", "bn-add-relu"
NETWORK = "network"  # the name of the block that trains a whole one

Call = Callable[[], object]
Timer = Callable[[Sequence[Call], int], float]  # seconds a call, of so many calls of the runs in rotation


@dataclass(frozen=True)
class Machine:
    """The device, its clock, the host's, and what it can do."""

    device: str
    cache: int  # bytes
    by_device: Timer
    by_host: Timer

    @cached_property
    def copied(self) -> float:
        """How many bytes a second a copy within the device moves, those read and those written."""
        source, target = (torch.empty(COPIED, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * COPIED / self.by_device([lambda: target.copy_(source)], 20)


@dataclass(frozen=True)
class Result:
    """One row and block: seconds a call by contender, medians over the rounds, and ours against the copy."""

    row: str
    block: str
    size: int  # of x, in bytes
    host: bool  # whether the seconds are the host's, until a call has come back
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
    known = (*ROWS, *SMALL_ROWS)
    unknown = [block for block in blocks if block not in (*BLOCKS, NETWORK)]
    if unknown:
        named = ", ".join((*BLOCKS, NETWORK))
        raise ValueError(f"BLOCK must be one of {named} with --device cuda, got {unknown[0]!r}")
    if NETWORK in blocks and not training:
        raise ValueError(f"{NETWORK} is a step of training: leave --eval out")
    chosen = [row for row in known if rows.replace("x", "×") in row.name]
    if not chosen:
        raise ValueError(f"--rows {rows!r} is in none of the shapes: {', '.join(row.name for row in known)}")
    require_rounds(rounds)
    require_gpu()
    cache, name = (getattr(torch.cuda.get_device_properties(0), key) for key in ("L2_cache_size", "name"))
    machine = Machine("cuda", cache, device_seconds, host_seconds)
    chosen_blocks = [BLOCKS[block] for block in blocks or DEFAULT if block != NETWORK]
    cases = list(itertools.product(chosen_blocks, chosen))
    measured = (measure(row, block, dtype, training, rounds, machine) for block, row in cases)
    results = show_progress(measured, len(cases), lambda result: result.row)
    steps = network_seconds(network.Size(), DTYPES[dtype], rounds, machine) if NETWORK in blocks else {}
    if print_json is not None:
        found = [vars(result) for result in results]
        print_json({"device": name, "copy": machine.copied, "results": found, "network": steps})
    else:
        print(f"{name}, torch {torch.__version__}, {dtype}, a copy moves {machine.copied / 1e12:.2f} TB/s")
        for lines in (as_markdown(results), network_as_markdown(steps)):
            print("\n".join(lines))
    return 0 if all(result.right for result in results) else 1


def measure(row: Row, block: Block, dtype: str, training: bool, rounds: int, machine: Machine) -> Result:
    """Check ours against float64, then time all contenders in turn, `rounds` times."""
    size, device = row.elements * DTYPES[dtype].itemsize, machine.device
    sets = [make_inputs(row, block, DTYPES[dtype], seed, device) for seed in range(_sets(size, machine.cache))]
    error = _error(row, block, training, sets[0])
    running = list(contenders(row, block, training, sets, device))  # once: one of them is compiled
    host = row in SMALL_ROWS
    timer = machine.by_host if host else machine.by_device
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, context, runs in running:
            with context():
                times.setdefault(name, []).append(timer(runs, _repeats(size)))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    share = 2 * size * floor_in_clones(block, training) / seconds["ours"] / machine.copied
    limit = 4 * torch.finfo(DTYPES[dtype]).eps
    return Result(row.name, block.name, size, host, seconds, share, error, error <= limit)


def network_seconds(size: network.Size, dtype: torch.dtype, rounds: int, machine: Machine) -> dict[str, float]:
    """Time a step of training of each contender, in turn, by the device; seconds, medians over the rounds."""
    steps = network.make_steps(size, dtype, machine.device)
    timed = ((name, machine.by_device([step], 3)) for _ in range(rounds) for name, step in steps.items())
    found = show_progress(timed, rounds * len(steps), lambda one: one[0])
    return {
        name: statistics.median(seconds for timed_name, seconds in found if timed_name == name) for name in steps
    }


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
    for name, peer in peers.installed(row, block, sets[0].x.dtype):
        yield name, nullcontext, [runner(peer.to(device), one, training) for one in sets]


def device_seconds(runs: Sequence[Call], repeats: int) -> float:
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


def host_seconds(runs: Sequence[Call], repeats: int) -> float:
    """Time calls in rotation until the last has come back; few enough for the device to take them all at once."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    repeats = min(repeats, MOST_WAITING)
    start = time.perf_counter()
    for run in itertools.islice(itertools.cycle(runs), repeats):
        run()
    found = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return found


def as_markdown(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of a table of what the device takes, and of one of what the host takes."""
    for host in (False, True):
        chosen = [result for result in results if result.host == host]
        if not chosen:
            continue
        names = list(dict.fromkeys(name for result in chosen for name in result.seconds))
        yield f"\nTime of the {'host' if host else 'device'}, a call:\n"
        yield f"| block | shape | {' | '.join(names)} | best of the others / ours | of the copy |"
        yield "|" + "---|" * (len(names) + 4)
        for result in chosen:
            times = " | ".join(
                f"{result.seconds[name] * 1e6:.0f} µs" if name in result.seconds else "" for name in names
            )
            share = f"{result.share:.0%}" if result.size >= LARGE else ""
            wrong = "" if result.right else f" WRONG by {result.error:.2g}"
            yield f"| {result.block} | {result.row} | {times} | {result.ratio:.2f} | {share}{wrong} |"
        mean = statistics.geometric_mean(result.ratio for result in chosen)
        least = min(result.ratio for result in chosen)
        yield f"\nbest of the others / ours: geometric mean {mean:.2f}, least {least:.2f}"


def network_as_markdown(seconds: dict[str, float]) -> Iterator[str]:
    """Yield the lines of a table of the network's steps, none where none were timed."""
    if seconds:
        yield f"\nA step of training, ResNet-50 at batch {network.Size().batch}:\n"
        yield f"| {' | '.join(seconds)} |"
        yield "|" + "---|" * len(seconds)
        yield f"| {' | '.join(f'{one * 1e3:.1f} ms' for one in seconds.values())} |"


def _sets(size: int, cache: int) -> int:
    """Return how many inputs hold more than twice the cache together."""
    return min(MOST_SETS, 1 + 2 * cache // size) if size else 1


def _repeats(size: int) -> int:
    return max(10, min(200, 2**30 // max(size, 1)))


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
