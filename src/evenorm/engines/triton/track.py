"""One batch enters the running statistics, in one small program. The definition is evenorm.updates.commit_."""

from __future__ import annotations

import triton
import triton.language as tl

from evenorm.engines.triton.tiles import finite


@triton.jit
def pool_groups(count, mean, m2, channels, groups, c, known, n):
    """Merge the groups of some channels from the first one's mean: mean and m2 (math.md, eq. 5)."""
    start = tl.load(mean + c, mask=known, other=0)
    start = tl.where(finite(start), start, 0.0)  # from an infinite one no other mean has a distance
    step = tl.zeros(c.shape, tl.float64)
    for group in range(groups):
        part = tl.load(mean + group * channels + c, mask=known, other=0)
        step += tl.load(count + group) * (part - start)
    pooled = start + step / n
    spread = tl.zeros(c.shape, tl.float64)
    for group in range(groups):
        away = tl.load(mean + group * channels + c, mask=known, other=0) - pooled
        part = tl.load(m2 + group * channels + c, mask=known, other=0)
        spread += part + tl.load(count + group) * away * away
    return pooled, spread


@triton.jit(do_not_specialize=["channels", "groups"])
def track_kernel(
    running_mean,
    running_var,
    batches,
    skipped,
    count,
    mean,
    m2,
    channels: tl.int64,
    groups: tl.int32,
    momentum: tl.float64,
    log_rest: tl.float64,
    average: tl.constexpr,
    skip_nonfinite: tl.constexpr,
    block_c: tl.constexpr,
):
    """Update running_mean, running_var (C,), the counter and that of batches that some channel left out, in place.

    average: 0 exponential, 1 debiased, with log_rest = log(1 - momentum) of a momentum below 1, 2 cumulative.
    """
    n = tl.load(count)
    for group in range(1, groups):
        n += tl.load(count + group)
    number = n * 0
    if batches is not None:
        number = (tl.load(batches) + 1).to(tl.float64)
    weight = momentum
    if average == 1:
        before = 1.0 - tl.exp((number - 1.0) * log_rest)  # what all batches before this one weigh
        weight = tl.where(number > 0, momentum / (momentum + (1.0 - momentum) * before), 0.0)
    elif average == 2:
        weight = tl.where(number > 0, 1.0 / number, 0.0)
    counts = n > 1  # one value has no unbiased variance
    bad = tl.zeros([block_c], tl.int32)
    for begin in range(0, channels, block_c):
        c = begin + tl.arange(0, block_c)
        known = c < channels
        pooled, spread = pool_groups(count, mean, m2, channels, groups, c, known, n)
        old_mean = tl.load(running_mean + c, mask=known, other=0).to(tl.float64)
        old_var = tl.load(running_var + c, mask=known, other=0).to(tl.float64)
        # By way of float32, from which every device converts; what counts is that the stored value is finite.
        new_mean = (1 - weight) * old_mean + weight * pooled
        new_var = (1 - weight) * old_var + weight * (spread / (n - 1))
        new_mean = new_mean.to(tl.float32).to(running_mean.dtype.element_ty)
        new_var = new_var.to(tl.float32).to(running_var.dtype.element_ty)
        moves = known & (n + tl.zeros([block_c], tl.float64) > 1)
        if skip_nonfinite:
            fine = finite(new_mean.to(tl.float32)) & finite(new_var.to(tl.float32))
            bad += (moves & (fine == 0)).to(tl.int32)
            moves = moves & fine
        tl.store(running_mean + c, new_mean, mask=moves)
        tl.store(running_var + c, new_var, mask=moves)
    left_out = tl.sum(bad, axis=0)
    if batches is not None:  # a batch that no channel took does not count
        tl.store(batches, tl.load(batches) + (counts & (left_out < channels)).to(tl.int64))
    if skipped is not None:
        tl.store(skipped, tl.load(skipped) + (counts & (left_out > 0)).to(tl.int64))
