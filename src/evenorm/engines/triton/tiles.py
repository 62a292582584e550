"""What the kernels share: where a tile lies, its centre, its coefficients, its output and its gradient.

Legend: memory is (N, C, L) without gaps: N samples, C channels, L positions. Channels last is the same with the
positions counted as samples, (N * L, C, 1): `rows`. A channel of a group is a matrix of samples and positions, cut
into tiles of (block_n, block_l); a tile of `block_c` channels is (block_c, block_n * block_l) here. A chunk is
some tiles in a row, and one program's work; which values it holds depends on shapes alone. Partial results are
merged in order, with no atomics: the same bits each run. Offsets are 64 bits wide.

One value per channel and program is float64 (the coefficients, the partial results); all else is float32. What is
None when a kernel is launched is compiled out of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenorm.engines.triton.curves import activate, slope

# Sizes differ from layer to layer: to compile a kernel anew for each that 16 divides would gain nothing, since
# `align` says what a vector needs.
SIZES = ["channels", "positions", "base", "extra", "unit", "tiles", "per_chunk", "chunks", "groups", "stride"]


@triton.jit
def finite(value):
    """Tell whether a value is neither infinite nor NaN."""
    return value - value == 0


@triton.jit
def assign(program, channels, chunks, base, extra, unit, block_c: tl.constexpr):
    """Return a program's chunk, its group, its first channel, the group's first sample and that behind its last.

    Neighbouring programs take neighbouring channels. The first `extra` groups have `unit` samples more.
    """
    blocks = tl.cdiv(channels, block_c).to(tl.int32)
    chunk = program // blocks
    first_c = (program % blocks).to(tl.int64) * block_c
    group = chunk // chunks
    start = group * base + tl.minimum(group, extra) * unit
    stop = (group + 1) * base + tl.minimum(group + 1, extra) * unit
    return chunk, group, first_c, start, stop


@triton.jit
def span(chunk, chunks, per_chunk, tiles):
    """Return a chunk's first tile in its group, and the one behind its last."""
    first = chunk % chunks * per_chunk
    return first, tl.minimum(first + per_chunk, tiles)


@triton.jit
def extents(channels, positions, align: tl.constexpr, rows: tl.constexpr):
    """Return C and L, the innermost of them visibly divisible by `align`; it came divided."""
    if rows:
        channels = channels * align
    else:
        positions = positions * align
    return channels, positions


@triton.jit
def locate(
    tile,
    first_c,
    start,
    stop,
    channels,
    positions,
    mask,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Return a tile's corner, its offsets from there, which of them lie inside, and which of those are valid.

    The corner is 64 bits wide; offsets within a tile need that only where the tile spans so much (`wide`).
    """
    j = tl.arange(0, block_n * block_l)
    c = tl.arange(0, block_c)[:, None]
    if rows:
        n = start + tile.to(tl.int64) * block_n
        p = n * 0
    else:
        across = tl.cdiv(positions, block_l).to(tl.int32)
        n = start + (tile // across).to(tl.int64) * block_n
        p = (tile % across).to(tl.int64) * block_l
    down, along = (j // block_l)[None, :], (j % block_l)[None, :]
    real = (down < tl.minimum(stop - n, block_n).to(tl.int32)) & (
        along < tl.minimum(positions - p, block_l).to(tl.int32)
    )
    inside = real & (c < tl.minimum(channels - first_c, block_c).to(tl.int32))
    corner = (n * channels + first_c) * positions + p
    if wide:
        offsets = down * (channels * positions) + c * positions + along
    elif rows:
        offsets = down * channels.to(tl.int32) + c
    else:
        offsets = down * (channels * positions).to(tl.int32) + c * positions.to(tl.int32) + along
    valid = real
    if mask is not None:
        place = down * positions.to(tl.int32) + along
        valid = real & (tl.load(mask + n * positions + p + place, mask=real, other=0) != 0)
    return corner, offsets, inside, valid


@triton.jit
def count_valid(
    tile,
    start,
    stop,
    channels,
    positions,
    mask,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Return how many valid positions a tile has."""
    _corner, _offsets, _inside, valid = locate(
        tile, start * 0, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
    )
    return tl.sum(valid.to(tl.int32))


@triton.jit
def skip_empty(
    first,
    last,
    start,
    stop,
    channels,
    positions,
    mask,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Return the first tile of a chunk that has a valid position, or its last tile."""
    there = count_valid(first, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l)
    while (there == 0) & (first + 1 < last):
        first += 1
        there = count_valid(first, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l)
    return first


@triton.jit
def count_held(
    tile, start, stop, positions, valid, mask, rows: tl.constexpr, block_n: tl.constexpr, block_l: tl.constexpr
):
    """Return how many values of a channel a tile has: of each lane with a mask, else all of them, by its edges."""
    if mask is not None:
        held = valid.to(tl.int32)
    else:
        across = 1 if rows else tl.cdiv(positions, block_l).to(tl.int32)
        held = tl.maximum(tl.minimum(stop - start - (tile // across).to(tl.int64) * block_n, block_n), 0)
        if not rows:
            held = held * tl.minimum(positions - (tile % across).to(tl.int64) * block_l, block_l)
        held = held.to(tl.int32)
    return held


@triton.jit
def find_centre(x, valid):
    """Return a centre for each row's valid values, a power of two to scale them by, and that power.

    The centre is their mean in float32, computed from their largest value, so that a constant is its own centre.
    It keeps the sum of squares of k further tiles exact to k units whatever the values are (math.md, eq. 3). The
    scale brings the spread to 2 ** -30: squares of 1e30 stay finite, so do those of later values up to 1e28 times
    as far away. Where values are infinite the centre is 0, from which they have a distance.
    """
    top = tl.max(tl.where(valid, x, -float("inf")), axis=1)
    low = tl.min(tl.where(valid, x, float("inf")), axis=1)
    top = tl.where(top < low, 0.0, top)  # no valid value at all
    spread = tl.where(top < low, 0.0, top - low)
    exponent = ((spread.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    power = tl.where(spread > 0, tl.minimum(tl.maximum(-30 - exponent, -126), 40), 0)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    away = tl.sum(tl.where(valid, (x - top[:, None]) * scale[:, None], 0.0), axis=1)
    count = tl.maximum(tl.sum(valid.to(tl.int32), axis=1), 1)
    unscale = ((127 - power) << 23).to(tl.float32, bitcast=True)
    centre = top + away / count.to(tl.float32) * unscale
    return tl.where(finite(centre), centre, 0.0), scale, power


@triton.jit
def finish_moments(centre, power, count, total, squares):
    """Return mean and m2 in float64, from float32 sums of centred and scaled values."""
    n = tl.maximum(count.to(tl.float64), 1.0)
    unscale = ((1023 - power).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    step = total.to(tl.float64)
    m2 = squares.to(tl.float64) - step * step / n
    return centre.to(tl.float64) + step / n * unscale, tl.where(m2 < 0, 0.0, m2) * unscale * unscale


@triton.jit
def coefficients(mean, var, weight, bias, eps, c, inside):
    """Return centre, scale and lift, with z = (x - centre) * scale + lift; and the rest of the mean, 1 / deviation.

    The mean is split, so that x is centred before it is scaled and a large offset costs no digit.
    """
    inverse = 1.0 / tl.sqrt(var + eps)
    centre = mean.to(tl.float32)
    rest = mean - centre.to(tl.float64)
    scale = inverse
    if weight is not None:
        scale = scale * tl.load(weight + c, mask=inside, other=0).to(tl.float64)
    lift = -rest * scale
    if bias is not None:
        lift = lift + tl.load(bias + c, mask=inside, other=0).to(tl.float64)
    return centre, scale.to(tl.float32), lift.to(tl.float32), rest, inverse


@triton.jit
def statistics(mean, var, count, group, stride, c, inside):
    """Load the mean and the variance of some channels; with a count, `var` holds m2."""
    at = group * stride + c
    found = tl.load(mean + at, mask=inside, other=0).to(tl.float64)
    spread = tl.load(var + at, mask=inside, other=0).to(tl.float64)
    if count is not None:
        spread = spread / tl.maximum(tl.load(count + group), 1.0)
    return found, spread


@triton.jit
def affine(mean, var, count, weight, bias, eps, group, stride, c, channels):
    """Load what normalises some channels of a group: the `coefficients` of their `statistics`."""
    found, spread = statistics(mean, var, count, group, stride, c, c < channels)
    return coefficients(found, spread, weight, bias, eps, c, c < channels)


@triton.jit
def write_output(
    x, corner, offsets, inside, valid, centre, scale, lift, residual, y, code: tl.constexpr, parameter
):
    """Normalise, add, activate and store a tile; 0 where the mask is False."""
    z = (x - centre[:, None]) * scale[:, None] + lift[:, None]
    if residual is not None:
        z += tl.load(residual + corner + offsets, mask=inside & valid, other=0).to(tl.float32)
    out = tl.where(valid, activate(z, code, parameter), 0.0)
    tl.store(y + corner + offsets, out, mask=inside)


@triton.jit
def load_gradient(dy, x, saved, corner, offsets, real):
    """Load a tile of dy and x, and of what was saved; 0 where nothing valid is."""
    given = tl.load(dy + corner + offsets, mask=real, other=0)
    values = tl.load(x + corner + offsets, mask=real, other=0)
    kept = given
    if saved is not None:
        kept = tl.load(saved + corner + offsets, mask=real, other=0)
    return given, values, kept


@triton.jit
def gradient_by_z(given, values, kept, saved, real, centre, scale, lift, code: tl.constexpr, parameter):
    """Return g, the gradient by z, 0 where nothing valid is; and x centred.

    What was saved is the output where its sign tells the slope (codes 0 to 2), else the residual.
    """
    away = values.to(tl.float32) - centre[:, None]
    g = given.to(tl.float32)
    if code != 0:
        if saved is not None:
            z = kept.to(tl.float32)
            if code > 2:
                z += away * scale[:, None] + lift[:, None]
        else:
            z = away * scale[:, None] + lift[:, None]
        g = tl.where(real, g * slope(z, code, parameter), 0.0)
    return g, away
