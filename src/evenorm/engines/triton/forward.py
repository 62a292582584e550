"""Forward: pool, merge, normalise; and both in one where a program holds all of a channel. Legend: tiles.py."""

from __future__ import annotations

import triton
import triton.language as tl

from evenorm.engines.triton.tiles import (
    SIZES,
    affine,
    assign,
    coefficients,
    count_held,
    extents,
    find_centre,
    finish_moments,
    finite,
    locate,
    skip_empty,
    span,
    write_output,
)


@triton.jit
def add_scaled(total, squares, x, scale, lift):
    """Add the centred and scaled values of a tile, and their squares."""
    away = tl.fma(x.to(tl.float32), scale[:, None], lift[:, None])
    return total + away, squares + away * away


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    x,
    mask,
    counts,
    means,
    m2s,
    channels: tl.int64,
    positions: tl.int64,
    base: tl.int64,
    extra: tl.int64,
    unit: tl.int64,
    tiles: tl.int32,
    per_chunk: tl.int32,
    chunks: tl.int32,
    align: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Write count, mean and m2 of each chunk: counts (P,), means and m2s (P, C), P chunks of all groups.

    A tile is loaded while the one before it is added. The centre has the dtype of x, so that a lane without a value
    loads the centre and adds 0; the scale is a power of two, so that the fused operation rounds as a subtraction.
    """
    channels, positions = extents(channels, positions, align, rows)
    program = tl.program_id(0)
    chunk, _, first_c, start, stop = assign(program, channels, chunks, base, extra, unit, block_c)
    first, last = span(chunk, chunks, per_chunk, tiles)
    if mask is not None:  # the centre comes from the first tile that has a valid value
        first = skip_empty(
            first, last, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
        )
    corner, offsets, inside, valid = locate(
        first, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
    )
    values = tl.load(x + corner + offsets, mask=inside & valid, other=0).to(tl.float32)
    centre, scale, power = find_centre(values, inside & valid)
    other = centre.to(x.dtype.element_ty)
    centre = other.to(tl.float32)
    lift = -centre * scale
    current = tl.where(inside & valid, values, centre[:, None]).to(x.dtype.element_ty)
    seen = count_held(first, start, stop, positions, valid, mask, rows, block_n, block_l)
    total = tl.zeros([block_c, block_n * block_l], tl.float32)
    squares = total
    for i in range(1, last - first):
        corner, offsets, inside, valid = locate(
            first + i, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
        )
        following = tl.load(x + corner + offsets, mask=inside & valid, other=other[:, None])
        total, squares = add_scaled(total, squares, current, scale, lift)
        seen += count_held(first + i, start, stop, positions, valid, mask, rows, block_n, block_l)
        current = following
    total, squares = add_scaled(total, squares, current, scale, lift)
    count = tl.sum(seen, axis=1) if mask is not None else seen
    mean, m2 = finish_moments(centre, power, count, tl.sum(total, axis=1), tl.sum(squares, axis=1))
    c = first_c + tl.arange(0, block_c)
    at = chunk * channels + c
    tl.store(means + at, mean, mask=c < channels)
    tl.store(m2s + at, m2, mask=c < channels)
    tl.store(counts + chunk + tl.arange(0, 1), tl.zeros([1], tl.float64) + count.to(tl.float64), mask=first_c == 0)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    counts,
    means,
    m2s,
    count,
    mean,
    m2,
    channels: tl.int64,
    chunks: tl.int32,
    block_c: tl.constexpr,
    block_p: tl.constexpr,
):
    """Merge each group's chunks, block_p of them to one, from the largest of their means: as `pool_kernel` writes.

    Chan's rule, all at once (math.md, eq. 5); equal means merge to themselves, and empty chunks change nothing. The
    statistics of those are loaded too: a mask made of counts would have to wait for them.
    """
    blocks = tl.cdiv(channels, block_c).to(tl.int32)
    merged = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    c = block.to(tl.int64) * block_c + tl.arange(0, block_c)
    times = tl.cdiv(chunks, block_p)
    group, begin = merged // times, merged % times * block_p
    p = begin + tl.arange(0, block_p)[None, :]
    first = group.to(tl.int64) * chunks
    at = (first + p) * channels + c[:, None]
    there = (c < channels)[:, None] & (p < chunks)
    share = tl.load(counts + first + p, mask=p < chunks, other=0)
    part = tl.load(means + at, mask=there, other=0)
    spread = tl.load(m2s + at, mask=there, other=0)
    n = tl.sum(share, axis=1)
    top = tl.max(tl.where(share > 0, part, -float("inf")), axis=1)
    top = tl.where(finite(top), top, 0.0)
    away = tl.where(share > 0, part - top[:, None], 0.0)
    step = tl.sum(share * away, axis=1) / tl.maximum(n, 1.0)
    pooled = top + step
    away = tl.where(share > 0, part - pooled[:, None], 0.0)
    spread = tl.sum(spread + share * away * away, axis=1)
    at = merged.to(tl.int64) * channels + c
    tl.store(mean + at, pooled, mask=c < channels)
    tl.store(m2 + at, spread, mask=c < channels)
    tl.store(count + merged + tl.arange(0, 1), n, mask=block == 0)


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    x,
    mask,
    mean,
    var,
    count,
    weight,
    bias,
    residual,
    y,
    channels: tl.int64,
    positions: tl.int64,
    base: tl.int64,
    extra: tl.int64,
    unit: tl.int64,
    tiles: tl.int32,
    per_chunk: tl.int32,
    chunks: tl.int32,
    stride: tl.int64,
    eps: tl.float64,
    parameter: tl.float32,
    code: tl.constexpr,
    align: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Write y of one chunk, the last chunks first: what was pooled last is still in the cache."""
    channels, positions = extents(channels, positions, align, rows)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, group, first_c, start, stop = assign(program, channels, chunks, base, extra, unit, block_c)
    c = first_c + tl.arange(0, block_c)
    centre, scale, lift, _, _ = affine(mean, var, count, weight, bias, eps, group, stride, c, channels)
    first, last = span(chunk, chunks, per_chunk, tiles)
    for i in range(last - first):
        corner, offsets, inside, valid = locate(
            first + i, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
        )
        values = tl.load(x + corner + offsets, mask=inside & valid, other=0).to(tl.float32)
        write_output(values, corner, offsets, inside, valid, centre, scale, lift, residual, y, code, parameter)


@triton.jit(do_not_specialize=SIZES)
def train_kernel(
    x,
    mask,
    weight,
    bias,
    residual,
    y,
    counts,
    means,
    m2s,
    channels: tl.int64,
    positions: tl.int64,
    base: tl.int64,
    extra: tl.int64,
    unit: tl.int64,
    eps: tl.float64,
    parameter: tl.float32,
    code: tl.constexpr,
    align: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    block_c: tl.constexpr,
    block_n: tl.constexpr,
    block_l: tl.constexpr,
):
    """Pool and apply where a group's channel is one tile, which stays in registers between the two."""
    channels, positions = extents(channels, positions, align, rows)
    program = tl.program_id(0)
    _, group, first_c, start, stop = assign(program, channels, 1, base, extra, unit, block_c)
    corner, offsets, inside, valid = locate(
        group * 0, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
    )
    values = tl.load(x + corner + offsets, mask=inside & valid, other=0).to(tl.float32)
    middle, scale, power = find_centre(values, inside & valid)
    away = tl.where(inside & valid, (values - middle[:, None]) * scale[:, None], 0.0)
    count = tl.sum(valid.to(tl.int32), axis=1)
    mean, m2 = finish_moments(middle, power, count, tl.sum(away, axis=1), tl.sum(away * away, axis=1))
    c = first_c + tl.arange(0, block_c)
    at = group * channels + c
    tl.store(means + at, mean, mask=c < channels)
    tl.store(m2s + at, m2, mask=c < channels)
    tl.store(counts + group + tl.arange(0, 1), count.to(tl.float64), mask=first_c == 0)
    var = m2 / tl.maximum(count.to(tl.float64), 1.0)
    centre, scale, lift, _, _ = coefficients(mean, var, weight, bias, eps, c, c < channels)
    write_output(values, corner, offsets, inside, valid, centre, scale, lift, residual, y, code, parameter)
