"""Moments: how many values, their mean, and their summed squared deviation from it.

The only currency between pool, track and apply. Batches, masked batches, virtual batches, micro-batches,
workers and calibration loaders all merge by the one rule written here (docs/math.md, eq. 4 and 5).

Legend: x is (N, C, *positions): N samples, C channels. Statistics are (G, C): G groups of consecutive samples
that are averaged apart from each other; a whole batch is one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Count, mean and sum of squared deviations of values, per channel; ``a + b`` merges two of them.

    .. math:: n, \qquad \mu = \frac1n \sum_i x_i, \qquad m_2 = \sum_i (x_i - \mu)^2

    Args:
        count: how many values each channel has seen; shape (), or (G,) with G groups of samples.
        mean: their mean; shape (C,) or (G, C), in the unit of x.
        m2: their summed squared deviation from the mean; shaped as mean, in the unit of x squared, never negative.

    ``a + b`` holds the moments of both together (Chan, Golub & LeVeque 1983), and an empty one changes nothing.
    Everything is float64 where the device has it.

    >>> import torch, evenorm
    >>> a, b = torch.randn(5, 3), torch.randn(7, 3)
    >>> both = evenorm.moments(a) + evenorm.moments(b)
    >>> torch.testing.assert_close(both.variance(), torch.cat([a, b]).double().var(0, correction=0))
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Merge with the moments of other values of the same channels (math.md, eq. 4)."""
        count = self.count + other.count
        share = (other.count / count.clamp(min=1)).unsqueeze(-1)
        step = other.mean - finite_start(self.mean)
        return Moments(
            count=count,
            mean=self.mean + step * share,
            m2=self.m2 + other.m2 + share * self.count.unsqueeze(-1) * step * step,  # 0 first, beside an empty one
        )

    def variance(self, correction: int = 0) -> Tensor:
        """Return m2 / (count - correction): 0 gives the biased variance that normalises, 1 the unbiased one."""
        return self.m2 / (self.count - correction).clamp(min=1).unsqueeze(-1)

    def pooled(self) -> Moments:
        """Merge the groups, (G, C), into one, (C,), all at once and in a fixed order (math.md, eq. 5)."""
        if self.mean.dim() == 1:
            return self
        if len(self.count) == 1:
            return Moments(self.count[0], self.mean[0], self.m2[0])
        groups, count = self.count.unsqueeze(1), self.count.sum()
        # The largest group's mean: an empty one's is of no values. Equal means merge to themselves.
        start = finite_start(self.mean.index_select(0, self.count.argmax(0, keepdim=True)))
        mean = start + (groups * (self.mean - start)).sum(0, keepdim=True) / count.clamp(min=1)
        away = self.mean - mean
        m2 = self.m2.sum(0) + (groups * away * away).sum(0)
        return Moments(count, mean[0], m2)


def pool(x: Tensor, mask: Tensor | None = None, splits: Sequence[int] | None = None) -> Moments:
    """Return the moments of each group of x: count (G,), mean and m2 (G, C) (math.md, eq. 2 and 3).

    The values are shifted by one of themselves before they are summed, so that a large offset costs no digits
    and a channel of one constant has that constant for its mean and exactly 0 for its m2.
    """
    valid = spread_mask(mask, x)
    count = _count(x, mask, splits)
    per_group = count.clamp(min=1).unsqueeze(1)
    values = _or_zero(widen(x), valid)
    shift = finite_start(_some_value(values, valid, splits))
    away = _or_zero(values - spread(shift, x, splits), valid)
    step = group_sum(away, splits) / per_group
    centred = _or_zero(away - spread(step, x, splits), valid)
    # Rounding leaves a rest in the sum of the centred values; it belongs to the mean, unless that is infinite.
    rest = group_sum(centred, splits) / per_group
    m2 = group_sum(centred.square(), splits) - rest.square() * per_group
    mean = shift + step
    return Moments(count, torch.where(mean.isinf(), mean, mean + rest), m2.clamp(min=0))


def finite_start(mean: Tensor) -> Tensor:
    """Return where a merge may start: any will do, but from an infinite one no other mean has a distance."""
    return mean.nan_to_num(0.0, 0.0, 0.0)


def virtual_batches(samples: int, size: int | None) -> list[int] | None:
    """Cut `samples` into samples // size runs (at least one) whose sizes differ by one at most."""
    runs = 1 if size is None else max(samples // size, 1)
    return None if runs == 1 else [samples // runs + (run < samples % runs) for run in range(runs)]


def widen(x: Tensor) -> Tensor:
    """Return x in float64, or in float32 on devices that have nothing wider."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def group_sum(values: Tensor, splits: Sequence[int] | None) -> Tensor:
    """Sum (N, C, *positions) over positions and over the samples of each group: (G, C)."""
    samples = values.flatten(2).sum(2) if values.dim() > 2 else values
    if splits is None:
        return samples.sum(0, keepdim=True)
    return samples.new_zeros(len(splits), samples.shape[1]).index_add(0, _group_of(splits, values), samples)


def spread(statistic: Tensor, x: Tensor, splits: Sequence[int] | None = None) -> Tensor:
    """Lay statistics, (C,) or (G, C), out so that they broadcast against x, (N, C, *positions)."""
    if splits is not None and statistic.dim() == 2:
        statistic = statistic.index_select(0, _group_of(splits, x))
    rows = 1 if statistic.dim() == 1 else statistic.shape[0]
    return statistic.reshape(rows, statistic.shape[-1], *[1] * (x.dim() - 2))


def spread_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Lay a mask, (N, *positions), out so that it broadcasts against x, (N, C, *positions)."""
    return None if mask is None else mask.reshape(mask.shape[0], 1, *mask.shape[1:])


def _group_of(splits: Sequence[int], x: Tensor) -> Tensor:
    sizes = torch.tensor(splits, device=x.device)
    return torch.repeat_interleave(torch.arange(len(splits), device=x.device), sizes, output_size=x.shape[0])


def _count(x: Tensor, mask: Tensor | None, splits: Sequence[int] | None) -> Tensor:
    if mask is not None:
        return group_sum(widen(mask.unsqueeze(1)), splits).squeeze(1)
    positions = math.prod(x.shape[2:])
    if splits is None:
        return widen(torch.full((1,), x.shape[0] * positions, device=x.device))
    return widen(torch.tensor([samples * positions for samples in splits], device=x.device))


def _some_value(values: Tensor, valid: Tensor | None, splits: Sequence[int] | None) -> Tensor:
    """Return a valid value of each group and channel, (G, C), as a constant; where there is none, 0 or -inf.

    Any will do. Each group has its own: a NaN, or another scale, is no business of its neighbours.
    """
    groups = 1 if splits is None else len(splits)
    if values.numel() == 0:
        return values.new_zeros(groups, values.shape[1])
    values = values.detach()
    if valid is None:
        first = values.reshape(*values.shape[:2], -1)[..., 0]
        if splits is None:
            return first[:1]
        # An empty group gets the 0 that is put behind the last sample.
        starts = [
            start if size else len(first)
            for start, size in zip(accumulate(splits, initial=0), splits, strict=False)
        ]
        return torch.cat([first, first.new_zeros(1, first.shape[1])])[starts]
    largest = torch.where(valid, values, -torch.inf).reshape(*values.shape[:2], -1).amax(2)
    if splits is None:
        largest = largest.amax(0, keepdim=True)
    else:
        group = _group_of(splits, values).unsqueeze(1).expand_as(largest)
        largest = largest.new_full((groups, values.shape[1]), -torch.inf).scatter_reduce(0, group, largest, "amax")
    return largest


def _or_zero(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else torch.where(valid, values, 0)
