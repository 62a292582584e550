"""How an operation is cut into tiles, chunks and programs: a pure function of shapes, with no look at a device.

The numbers aim at a large device, some hundred multiprocessors that hold 2,048 threads each; a small one takes more
rounds for the same programs. What was weighed is in docs/decisions_gpu.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

TILE = 2048  # elements a program holds at a time, when it walks over more
PER_WARP = 512  # 16 elements a thread: four loads of 16 bytes in flight, and some 100 registers
MOST_WARPS = 16
LARGEST_TILE = PER_WARP * MOST_WARPS  # of a channel that stays in registers; with 32 elements a thread it spills
ROW = 64  # channels of a tile of rows: whole sectors of memory, and few programs that share a channel
SHORT_RUN = 64  # elements: planes shorter than this are taken several channels at a time
SHORTEST_ROW = 64  # positions of a tile of planes: whole sectors of memory
# Lanes over the fewest possible, for which the longer run of memory is taken: of 56 * 56 2 or 23 % are idle.
FEW_IDLE = 1.04
PLANE_PROGRAMS = 4096  # two rounds of a large device, so that the end of the last one is short
ROW_PROGRAMS = 2048  # two rounds: each chunk of rows writes 16 bytes a channel, so that chunks should be long
FINE_PROGRAMS = 4096  # of kernels that write no partial results
FEWEST_ROWS = 128  # of a chunk: what it writes is then an eighth of what it reads, in half precision
MOST_PARTS = 2048  # that are merged at once: 16 elements a thread where 4 channels do
LONGEST_CHUNK = 256  # tiles; the spread's error grows with the chunk over its first tile where values drift


class Plan(NamedTuple):
    """The layout as the kernels see it (legend: tiles.py), and how it is cut.

    The sizes in memory's order, what the kernels are compiled for, and what is launched.
    """

    channels: int
    positions: int
    base: int  # samples of a group, the first `extra` groups have `unit` more
    extra: int
    unit: int
    groups: int
    align: int  # divides the innermost size
    wide: bool  # offsets within a tile need 64 bits
    rows: bool
    block_c: int
    block_n: int
    block_l: int
    tiles: int  # of the largest group
    per_chunk: int
    chunks: int  # of each group
    warps: int

    @property
    def whole(self) -> bool:
        """Whether a group's channel is one tile."""
        return self.tiles == 1

    @property
    def finely(self) -> Plan:
        """The same tiles in shorter chunks, for kernels that write no partial results."""
        return _finely(self)

    @property
    def blocks(self) -> int:
        """How many blocks of channels there are."""
        return divide_up(self.channels, self.block_c)

    @property
    def programs(self) -> int:
        """How many programs cover everything."""
        return self.blocks * self.groups * self.chunks

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What each kernel is told of the layout: C, L (the innermost divided by `align`), and the groups."""
        channels = self.channels // self.align if self.rows else self.channels
        positions = self.positions if self.rows else self.positions // self.align
        return channels, positions, self.base, self.extra, self.unit

    @property
    def cut(self) -> tuple[int, int, int]:
        """What a kernel is told that walks over chunks."""
        return self.tiles, self.per_chunk, self.chunks

    @property
    def blocking(self) -> tuple[int | bool, ...]:
        """What each kernel is compiled for, beside the number of warps."""
        return self.align, self.wide, self.rows, self.block_c, self.block_n, self.block_l


class Merge(NamedTuple):
    """How partial results, (P, C), are merged: channels of a program, parts it takes at a time, and its warps."""

    block_c: int
    block_p: int
    warps: int

    @property
    def blocking(self) -> tuple[int, int]:
        """What the kernels are compiled for, beside the number of warps."""
        return self.block_c, self.block_p


def regular(splits: Sequence[int], samples: int) -> bool:
    """Tell whether the groups are cut as `evenorm.moments.virtual_batches` cuts: the first ones have one more."""
    groups = len(splits)
    return all(size == samples // groups + (g < samples % groups) for g, size in enumerate(splits))


@lru_cache(maxsize=1024)
def make_plan(
    samples: int, channels: int, positions: int, rows: bool, groups: int, itemsize: int, twice: bool = False
) -> Plan:
    """Cut an input of N samples, none of the sizes 0; `rows` is channels last.

    Where the operation reads its input twice, a channel becomes one tile if it fits.
    """
    unit = 1
    if channels == 1 and groups == 1:  # all of it is one run
        samples, positions, rows = 1, samples * positions, False
    if rows:
        unit, positions = positions, 1
    base, extra = samples // groups * unit, samples % groups
    largest = base + unit * (extra > 0)
    inner = channels if rows else positions
    align = next(width for width in (16, 8, 4, 2, 1) if width * itemsize <= 16 and inner % width == 0)
    whole = _whole(largest, channels, positions, rows, itemsize) if twice else None
    block_c, block_n, block_l = whole or _tile(largest, channels, positions, rows)
    tiles = divide_up(largest, block_n) * divide_up(positions, block_l)
    per_chunk = _per_chunk(tiles * divide_up(channels, block_c) * groups, rows, block_n, tiles)
    elements = block_c * block_n * block_l
    return Plan(
        channels,
        positions,
        base,
        extra,
        unit,
        groups,
        align,
        (block_n * channels + block_c) * positions + block_l >= 2**31,
        rows,
        block_c,
        block_n,
        block_l,
        tiles,
        per_chunk,
        divide_up(tiles, per_chunk),
        max(1, min(elements // PER_WARP, MOST_WARPS)),
    )


@lru_cache(maxsize=1024)  # asked for at each launch
def _finely(plan: Plan) -> Plan:
    per_chunk = min(plan.per_chunk, divide_up(plan.tiles * plan.blocks * plan.groups, FINE_PROGRAMS))
    return plan._replace(per_chunk=per_chunk, chunks=divide_up(plan.tiles, per_chunk))


@lru_cache(maxsize=1024)
def make_merge(channels: int, parts: int, sums: bool = False) -> Merge:
    """Cut the merging: many parts at once, which wait for memory once, and of each a sector of memory at least.

    Sums are two, which are kept while more are loaded: there are registers for half as many.
    """
    block_p = min(power_above(parts), MOST_PARTS // 2 if sums else MOST_PARTS)
    block_c = min(power_above(channels), max(4, min(64, 1024 // block_p)))
    return Merge(block_c, block_p, max(4, min(block_c * block_p // PER_WARP, MOST_WARPS)))


def _whole(samples: int, channels: int, positions: int, rows: bool, itemsize: int) -> tuple[int, int, int] | None:
    """Return the tile that holds all samples of some channels, where there is one."""
    if rows:
        # In half precision a thread has 8 channels, and each channel's coefficients take registers too.
        largest = LARGEST_TILE * itemsize // 4
        # A sector of memory at least, or neighbouring programs would fetch each other's.
        for block_c in (32, 32 // itemsize):
            if min(power_above(channels), block_c) * power_above(samples) <= largest:
                return min(power_above(channels), block_c), power_above(samples), 1
        return None
    block_n, block_l = power_above(samples), power_above(positions)
    if block_n * block_l > LARGEST_TILE:
        return None
    block_c = _together(channels, positions)
    return (block_c if block_c * block_n * block_l <= LARGEST_TILE else 1), block_n, block_l


def _tile(samples: int, channels: int, positions: int, rows: bool) -> tuple[int, int, int]:
    if rows:
        block_c = min(power_above(channels), ROW)
        return block_c, min(power_above(samples), TILE // block_c), 1
    block_c = _together(channels, positions)
    widest = min(power_above(positions), TILE)
    # As full as the widest one.
    narrowest = min(widest, max(SHORTEST_ROW, TILE // (power_above(samples) * block_c)))
    tiles = []
    for shift in range((widest // narrowest).bit_length()):
        block_l = widest >> shift
        block_n = max(1, min(power_above(samples), TILE // (block_l * block_c)))
        lanes = divide_up(samples, block_n) * block_n * divide_up(positions, block_l) * block_l
        tiles.append((lanes, block_n, block_l))
    enough = min(tiles)[0] * FEW_IDLE
    _, block_n, block_l = next(tile for tile in tiles if tile[0] <= enough)
    return block_c, block_n, block_l


def _together(channels: int, positions: int) -> int:
    """Return how many short planes, which lie side by side, make a run of memory worth fetching."""
    return min(power_above(channels), max(1, SHORT_RUN // power_above(positions)))


def _per_chunk(total: int, rows: bool, block_n: int, tiles: int) -> int:
    chosen = divide_up(total, ROW_PROGRAMS if rows else PLANE_PROGRAMS)
    if rows:
        chosen = max(chosen, divide_up(FEWEST_ROWS, block_n))
    return max(1, min(chosen, LONGEST_CHUNK, tiles))


def divide_up(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_above(number: int) -> int:
    """Return the least power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()
