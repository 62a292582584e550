"""Backward: two sums, their merge, the input's gradient; and all in one for a channel that one program holds.

Legend: tiles.py. g is the gradient by z; sum g and sum g * xhat are what bias and weight receive (math.md, eq. 7).
"""

from __future__ import annotations

import triton
import triton.language as tl

from evenorm.engines.triton.tiles import SIZES, affine, assign, extents, gradient_by_z, load_gradient, locate, span


@triton.jit
def training_terms(offset, slope, rest, inverse):
    """Return the means of g and g * xhat as they act beside g and x - centre."""
    slope = slope * inverse
    return (offset - slope * rest).to(tl.float32), slope.to(tl.float32)


@triton.jit
def load_terms(offset, slope, count, group, channels, c, rest, inverse):
    """Load the means of g and g * xhat, (G, C), or with a count their sums, as `training_terms` does."""
    at = group * channels + c
    by_g = tl.load(offset + at, mask=c < channels, other=0)
    by_xhat = tl.load(slope + at, mask=c < channels, other=0)
    if count is not None:
        n = tl.maximum(tl.load(count + group), 1.0)
        by_g = by_g / n
        by_xhat = by_xhat / n
    return training_terms(by_g, by_xhat, rest, inverse)


@triton.jit
def finish_sums(g, g_away, rest, inverse):
    """Return sum g and sum g * xhat in float64, from tiles of g and of g * (x - centre)."""
    whole = tl.sum(g, axis=1).to(tl.float64)
    return whole, (tl.sum(g_away, axis=1).to(tl.float64) - rest * whole) * inverse


@triton.jit
def write_gradient(g, away, corner, offsets, inside, valid, scale, offset, slope, dx, dresidual):
    """Store dx = scale * (g - offset - slope * (x - centre)), 0 where the mask is False; and g [8]."""
    out = g
    if offset is not None:
        out = tl.where(valid, g - offset[:, None] - slope[:, None] * away, 0.0)
    tl.store(dx + corner + offsets, out * scale[:, None], mask=inside)
    if dresidual is not None:
        tl.store(dresidual + corner + offsets, g, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    dy,
    x,
    mask,
    mean,
    var,
    count,
    weight,
    bias,
    saved,
    sums_g,
    sums_g_xhat,
    dx,
    dresidual,
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
    """Write both sums of each chunk, (P, C); with dx, which then is that of fixed statistics, in the same pass.

    A tile is loaded while the one before it is added; behind the last one nothing is.
    """
    channels, positions = extents(channels, positions, align, rows)
    chunk, group, first_c, start, stop = assign(tl.program_id(0), channels, chunks, base, extra, unit, block_c)
    c = first_c + tl.arange(0, block_c)
    centre, scale, lift, rest, inverse = affine(mean, var, count, weight, bias, eps, group, stride, c, channels)
    sum_g = tl.zeros([block_c, block_n * block_l], tl.float32)
    sum_g_away = sum_g
    first, last = span(chunk, chunks, per_chunk, tiles)
    corner, offsets, inside, valid = locate(
        first, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
    )
    given, values, kept = load_gradient(dy, x, saved, corner, offsets, inside & valid)
    for i in range(last - first):
        next_corner, next_offsets, next_inside, next_valid = locate(
            first + i + 1, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
        )
        real = next_inside & next_valid & (first + i + 1 < last)
        next_given, next_values, next_kept = load_gradient(dy, x, saved, next_corner, next_offsets, real)
        g, away = gradient_by_z(given, values, kept, saved, inside & valid, centre, scale, lift, code, parameter)
        sum_g += g
        sum_g_away += g * away
        if dx is not None:
            write_gradient(g, away, corner, offsets, inside, valid, scale, None, None, dx, dresidual)
        corner, offsets, inside, valid = next_corner, next_offsets, next_inside, next_valid
        given, values, kept = next_given, next_values, next_kept
    whole, by_xhat = finish_sums(sum_g, sum_g_away, rest, inverse)
    tl.store(sums_g + chunk * channels + c, whole, mask=c < channels)
    tl.store(sums_g_xhat + chunk * channels + c, by_xhat, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def merge_sums_kernel(
    parts_g,
    parts_g_xhat,
    sum_g,
    sum_g_xhat,
    dweight,
    dbias,
    channels: tl.int64,
    chunks: tl.int32,
    groups: tl.int32,
    block_c: tl.constexpr,
    block_p: tl.constexpr,
):
    """Add up the chunks of each group in order, (G, C), and the groups: what weight and bias receive, (C,)."""
    c = tl.program_id(0).to(tl.int64) * block_c + tl.arange(0, block_c)
    known = c < channels
    bias_part = tl.zeros([block_c], tl.float64)
    weight_part = bias_part
    for group in range(groups):
        first = group * chunks
        parts = tl.zeros([block_c, block_p], tl.float64)
        by_xhat = parts
        for begin in range(0, chunks, block_p):
            p = begin + tl.arange(0, block_p)[None, :]
            at = (first + p) * channels + c[:, None]
            there = known[:, None] & (p < chunks)
            parts += tl.load(parts_g + at, mask=there, other=0)
            by_xhat += tl.load(parts_g_xhat + at, mask=there, other=0)
        of_g, of_g_xhat = tl.sum(parts, axis=1), tl.sum(by_xhat, axis=1)
        bias_part += of_g
        weight_part += of_g_xhat
        if sum_g is not None:
            at = group * channels + c
            tl.store(sum_g + at, of_g, mask=known)
            tl.store(sum_g_xhat + at, of_g_xhat, mask=known)
    if dweight is not None:
        tl.store(dweight + c, weight_part.to(tl.float32), mask=known)
    if dbias is not None:
        tl.store(dbias + c, bias_part.to(tl.float32), mask=known)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    dy,
    x,
    mask,
    mean,
    var,
    count,
    weight,
    bias,
    saved,
    offset,
    slope,
    dx,
    dresidual,
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
    """Write dx, and g for the residual, of one chunk, the last chunks first.

    With a count, var is m2, and offset and slope are sums.
    """
    channels, positions = extents(channels, positions, align, rows)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk, group, first_c, start, stop = assign(program, channels, chunks, base, extra, unit, block_c)
    c = first_c + tl.arange(0, block_c)
    centre, scale, lift, rest, inverse = affine(mean, var, count, weight, bias, eps, group, stride, c, channels)
    by_g, by_away = None, None
    if offset is not None:
        by_g, by_away = load_terms(offset, slope, count, group, channels, c, rest, inverse)
    first, last = span(chunk, chunks, per_chunk, tiles)
    for i in range(last - first):
        corner, offsets, inside, valid = locate(
            first + i, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
        )
        given, values, kept = load_gradient(dy, x, saved, corner, offsets, inside & valid)
        g, away = gradient_by_z(given, values, kept, saved, inside & valid, centre, scale, lift, code, parameter)
        write_gradient(g, away, corner, offsets, inside, valid, scale, by_g, by_away, dx, dresidual)


@triton.jit(do_not_specialize=SIZES)
def train_backward_kernel(
    dy,
    x,
    mask,
    mean,
    m2,
    count,
    weight,
    bias,
    saved,
    sums_g,
    sums_g_xhat,
    dweight,
    dbias,
    dx,
    dresidual,
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
    """Sum, and write dx, where a group's channel is one tile, which stays in registers between the two.

    The sums go to sums_g and sums_g_xhat, (G, C), or where there is one group to dweight and dbias, (C,), at once.
    """
    channels, positions = extents(channels, positions, align, rows)
    program = tl.program_id(0)
    _, group, first_c, start, stop = assign(program, channels, 1, base, extra, unit, block_c)
    c = first_c + tl.arange(0, block_c)
    centre, scale, lift, rest, inverse = affine(mean, m2, count, weight, bias, eps, group, channels, c, channels)
    corner, offsets, inside, valid = locate(
        group * 0, first_c, start, stop, channels, positions, mask, wide, rows, block_c, block_n, block_l
    )
    given, values, kept = load_gradient(dy, x, saved, corner, offsets, inside & valid)
    g, away = gradient_by_z(given, values, kept, saved, inside & valid, centre, scale, lift, code, parameter)
    whole, by_xhat = finish_sums(g, g * away, rest, inverse)
    if sums_g is not None:
        tl.store(sums_g + group * channels + c, whole, mask=c < channels)
        tl.store(sums_g_xhat + group * channels + c, by_xhat, mask=c < channels)
    else:
        tl.store(dweight + c, by_xhat.to(tl.float32), mask=c < channels)
        tl.store(dbias + c, whole.to(tl.float32), mask=c < channels)
    n = tl.maximum(tl.load(count + group), 1.0)
    by_g, by_away = training_terms(whole / n, by_xhat / n, rest, inverse)
    write_gradient(g, away, corner, offsets, inside, valid, scale, by_g, by_away, dx, dresidual)
