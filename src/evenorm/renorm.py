"""Batch renormalisation: tie the batch's statistics to the running ones, within limits that open slowly.

Batch norm normalises by the batch in training and by the running statistics at inference, and small batches
make the two differ. Renormalisation corrects the batch's outcome to what the running statistics would give, by
factors r and d that are clipped and take no gradient (docs/math.md, eq. 19 to 21).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evenorm.moments import Moments, widen

REMEMBERED = (
    64  # forwards of one layer before their backward: a layer in a loop, micro-batches; each costs 3 C floats
)
_remembered: WeakKeyDictionary[object, deque[tuple[Tensor, Anchor]]] = WeakKeyDictionary()  # in no copy, no pickle


@dataclass(frozen=True)
class Renorm:
    r"""Options of batch renormalisation: how far the batch may be corrected, and when that begins.

    .. math:: \hat{x} = \frac{x - \mu_B}{\sigma_B}\, r + d, \qquad
              r = \mathrm{clip}(\sigma_B / \sigma,\ 1/r_{max},\ r_{max}), \qquad
              d = \mathrm{clip}((\mu_B - \mu) / \sigma,\ -d_{max},\ d_{max})

    Up to batch ``start`` this is batch norm (r = 1, d = 0); from there the limits open linearly until r_max is
    reached at batch ``r_steps`` and d_max at batch ``d_steps``. The batches counted are those of the layer's
    ``num_batches_tracked``, so the schedule goes on where a checkpoint left it.

    Args:
        r_max: the largest correction of the scale, at least 1; ``math.inf`` for no limit.
        d_max: the largest correction of the mean, in standard deviations, at least 0; ``math.inf`` for no limit.
        start: for how many batches to do plain batch norm.
        r_steps: at which batch r_max is reached.
        d_steps: at which batch d_max is reached.

    Raises:
        ValueError: an r_max below 1, a d_max below 0, or steps out of order.

    Note:
        Here σ comes from the running variance, so that buffers and checkpoints stay torch's; the paper keeps an
        average of the standard deviation instead.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3, renorm=evenorm.Renorm(start=0, r_steps=0, d_steps=0))
    >>> layer(torch.randn(4, 3)).shape
    torch.Size([4, 3])

    Source: Ioffe 2017, section 3; the defaults are its ImageNet schedule.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5_000
    r_steps: int = 40_000
    d_steps: int = 25_000

    def __post_init__(self) -> None:
        """Refuse limits that correct the wrong way, and a schedule that ends before it begins."""
        if not self.r_max >= 1 or not self.d_max >= 0:
            raise ValueError(f"Renorm needs r_max of at least 1 and d_max of at least 0, got {self}")
        if not 0 <= self.start <= min(self.r_steps, self.d_steps):
            raise ValueError(f"Renorm needs 0 <= start <= r_steps and d_steps, got {self}")

    def limits(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max for the batch that comes after this many others."""
        r_max = _ramp(batches, self.start, self.r_steps, 1.0, self.r_max)
        return r_max, _ramp(batches, self.start, self.d_steps, 0.0, self.d_max)


class Anchor(NamedTuple):
    """What a batch's statistics are tied to: the running ones, and how far they may be moved to them."""

    mean: Tensor
    var: Tensor
    r_max: Tensor
    d_max: Tensor
    replaces_single: bool = False  # a group of one value is normalised by the running statistics altogether


@torch.library.custom_op("evenorm::keep", mutates_args=(), schema="(Tensor statistic) -> Tensor")
def keep(statistic: Tensor) -> Tensor:
    """Copy a running statistic out of the reach of torch.compile, which may recompute from it in the backward.

    By then the graph's own update has moved it, of which torch's partitioner takes no notice. What comes from an
    operator that it does not know, it saves.
    """
    return statistic.clone()


keep.register_fake(torch.empty_like)


class Recalled(NamedTuple):
    """What a batch may be tied to that checkpointing computes again, when the running statistics have moved on.

    Batches are told apart by their means, which come out with the same bits again.
    """

    now: Anchor
    then: tuple[tuple[Tensor, Anchor], ...]

    def of(self, batch: Moments) -> Anchor:
        """Return the anchor that the batch was tied to. Asks the host."""
        wanted = batch.mean.nan_to_num()
        return next((anchor for mean, anchor in self.then if mean.nan_to_num().equal(wanted)), self.now)


def remember(layer: object, batch: Moments, anchor: Anchor) -> None:
    """Keep what a batch is tied to, for as long as the layer lives, until REMEMBERED others have come."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # a compiler keeps what it needs by itself; and nothing may leave a transform
    kept = anchor._replace(mean=anchor.mean.clone(), var=anchor.var.clone())
    _remembered.setdefault(layer, deque(maxlen=REMEMBERED)).appendleft((batch.mean, kept))


def recall(layer: object, anchor: Anchor) -> Recalled:
    """Return what a layer's batches were tied to; `anchor` for those that nothing is known of."""
    return Recalled(anchor, tuple(_remembered.get(layer, ())))


class Tied(NamedTuple):
    """The statistics that normalise after the correction, to be used with eps = 0, and the correction."""

    mean: Tensor
    var: Tensor
    r: Tensor | None
    d: Tensor | None


def tie(batch: Moments, anchor: Anchor | None, eps: float) -> Tied:
    """Return statistics by which x is standardised to (x - mean_B) / sigma_B * r + d [20].

    To running statistics that are not finite nothing is tied: r = 1 and d = 0 there.
    """
    if anchor is None:
        return Tied(batch.mean, batch.variance() + eps, None, None)
    mean, sigma = widen(anchor.mean), (widen(anchor.var) + eps).sqrt()
    batch_sigma = (batch.variance() + eps).sqrt()
    known = mean.isfinite() & sigma.isfinite()
    r = (batch_sigma / sigma).detach().clamp(1 / anchor.r_max, anchor.r_max)
    d = ((batch.mean - mean) / sigma).detach().clamp(-anchor.d_max, anchor.d_max)
    r, d = torch.where(known, r, 1.0), torch.where(known, d, 0.0)
    tied_mean, tied_sigma = batch.mean - d * batch_sigma / r, batch_sigma / r
    if anchor.replaces_single:
        single = (batch.count <= 1).unsqueeze(-1)
        tied_mean, tied_sigma = torch.where(single, mean, tied_mean), torch.where(single, sigma, tied_sigma)
    return Tied(tied_mean, tied_sigma.square(), r, d)


def untie(
    mean_g: Tensor, mean_g_xhat: Tensor, tied: Tied, count: Tensor, anchor: Anchor | None
) -> tuple[Tensor, Tensor]:
    """Return offset and slope of `formulas.input_gradient` from the means of g and g * xhat [21]."""
    if anchor is None or tied.r is None or tied.d is None:
        return mean_g, mean_g_xhat
    slope = (mean_g_xhat - tied.d * mean_g) / tied.r.square()
    offset = mean_g - tied.d * slope
    if anchor.replaces_single:
        several = (count > 1).unsqueeze(-1)
        offset, slope = torch.where(several, offset, 0), torch.where(several, slope, 0)
    return offset, slope


def _ramp(batches: Tensor, start: int, end: int, low: float, high: float) -> Tensor:
    """Return `low` for the first `start` batches, `high` from number `end` on, in between the straight line."""
    share = ((batches.double() + 1 - start) / max(end - start, 1)).clamp(0, 1)
    return torch.where(share > 0, low + share * (high - low), low)
