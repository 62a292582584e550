"""Find padding in a network's input: tails of one constant, of another length in each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """What of the input is padding, as sums over samples.

    Args:
        samples: how many were looked at.
        positions: how many positions these have.
        padded: how many of the positions are padding.
        shares: of padded positions, one a batch.
        lengths: whether samples differ in how much of them is padding.
        variance: of all values, and of those that are no padding.
    """

    samples: int
    positions: int
    padded: int
    shares: tuple[float, ...]
    lengths: bool
    variance: tuple[float, float]

    @property
    def share(self) -> float:
        """The share of positions that are padding."""
        return self.padded / max(self.positions, 1)

    @property
    def spread(self) -> float:
        """The difference between the batches with the largest and the smallest share."""
        return max(self.shares) - min(self.shares)

    @property
    def made(self) -> float:
        """The share of the input's variance that is there through padding alone; below 0 if padding lowers it."""
        whole, valid = self.variance
        return 1 - valid / whole if whole else 0.0


def padding(x: Tensor | None, before: Padding | None) -> Padding | None:
    """Return what is padding in x, added to what was before.

    Args:
        x: (N, C, L, ...), of which the last of the L are looked at; or (N, L) of integers. None adds nothing.
        before: of the batches before.
    """
    if x is None or not x.numel() or x.dim() < (3 if x.is_floating_point() else 2):
        return before
    values = x.unsqueeze(1) if x.dim() == 2 else x
    values = values.reshape(*values.shape[:3], -1)  # (N, C, L, the rest)
    constant = values[0, :, -1, -1].view(1, -1, 1, 1)
    tail = (values == constant).all(3).all(1)
    lengths = tail.flip(1).long().cumprod(1).sum(1)
    lengths = torch.where(lengths > 1, lengths, 0)  # one value equals itself
    total, padded = tail.numel(), int(lengths.sum())
    whole = inner = float(values.double().var(correction=0))
    if padded:
        valid = torch.arange(tail.shape[1], device=x.device) < tail.shape[1] - lengths.unsqueeze(1)
        kept = values.transpose(1, 2)[valid].double()
        inner = float(kept.var(correction=0)) if kept.numel() else 0.0
    now = Padding(len(x), total, padded, (padded / total,), bool((lengths != lengths[0]).any()), (whole, inner))
    return now if before is None else _together(before, now)


def _together(before: Padding, now: Padding) -> Padding:
    samples = before.samples + now.samples
    whole, inner = (
        old + now.samples / samples * (new - old) for old, new in zip(before.variance, now.variance, strict=True)
    )
    return Padding(
        samples,
        before.positions + now.positions,
        before.padded + now.padded,
        before.shares + now.shares,
        before.lengths or now.lengths or before.shares[0] != now.shares[0],
        (whole, inner),
    )
