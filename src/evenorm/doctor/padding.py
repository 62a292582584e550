"""Find padding in a network's input: tails of one constant, of another length in each sample, along any axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PADDED = 0.05  # the share of positions from which on padding is worth a word


@dataclass(frozen=True)
class Padding:
    """What of the input is padding, as sums over samples.

    Args:
        axes: of positions, that samples have: 1 for sequences, 2 for images.
        positions: how many positions were looked at.
        padded: how many of them are padding.
        shares: of padded positions, one a batch.
        lengths: whether samples differ in how much of them is padding.
        looked: samples of the batches with padding, which the variances are of.
        variance: of all values, and of those that are no padding.
    """

    axes: int
    positions: int
    padded: int
    shares: tuple[float, ...]
    lengths: bool
    looked: int
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

    @property
    def matters(self) -> bool:
        """Whether it can be what is wrong.

        The dark rim of a picture is a constant tail as well. It differs from picture to picture and not from batch
        to batch, unlike pictures that were padded to the largest of their batch.
        """
        return self.share >= PADDED and self.lengths and (self.axes == 1 or self.spread >= PADDED)


def padding(x: Tensor | None, before: Padding | None) -> Padding | None:
    """Return what is padding in x, added to what was before.

    Args:
        x: (N, C, *positions), of which the ends of each position axis are looked at; or (N, L) of integers. None
            adds nothing.
        before: of the batches before.
    """
    if x is None or not x.numel() or x.dim() < (3 if x.is_floating_point() else 2):
        return before
    values = x.unsqueeze(1) if x.dim() == 2 else x
    sizes = values.shape[2:]
    may = _may_be_padded(values)
    tails = torch.stack([_tails(values, axis, may[axis - 2]) for axis in range(2, values.dim())])  # (axes, N)
    total, padded, looked, variance = len(x) * math.prod(sizes), 0, 0, (0.0, 0.0)
    if any(may):
        valid = torch.tensor(sizes, device=x.device).unsqueeze(1) - tails
        padded = total - int(valid.prod(0).sum())
    if padded:
        looked, kept = len(x), values.movedim(1, -1)[_inside(valid, sizes)].double()
        variance = float(values.double().var(correction=0)), float(kept.var(correction=0)) if kept.numel() else 0.0
    differ = padded > 0 and bool((tails != tails[:, :1]).any())
    now = Padding(len(sizes), total, padded, (padded / total,), differ, looked, variance)
    return now if before is None else _together(before, now)


def _may_be_padded(values: Tensor) -> list[bool]:
    """Tell for each position axis whether a sample's last two values along it are alike: seldom without padding."""
    flat = values.flatten(2)
    strides = [math.prod(values.shape[axis + 1 :]) for axis in range(2, values.dim())]
    near = flat[
        :, :, [-1 - stride if size > 1 else 0 for stride, size in zip(strides, values.shape[2:], strict=True)]
    ]
    found: list[bool] = (near == flat[:, :, -1:]).all(1).any(0).tolist()
    return [one and size > 1 for one, size in zip(found, values.shape[2:], strict=True)]


def _tails(values: Tensor, axis: int, may: bool) -> Tensor:
    """Return how many of the last slices along an axis are one constant, the sample's last value; (N,)."""
    if not may:
        return torch.zeros(len(values), dtype=torch.long, device=values.device)
    corner = values.flatten(2)[..., -1].reshape(*values.shape[:2], *[1] * (values.dim() - 2))
    constant = (values == corner).movedim(axis, 1).flatten(2).all(2)  # (N, slices)
    lengths = constant.flip(1).long().cumprod(1).sum(1)
    return torch.where(lengths > 1, lengths, 0)  # one value equals itself


def _inside(valid: Tensor, sizes: torch.Size) -> Tensor:
    """Return which positions are no padding, (N, *positions), from how many of each axis are none, (axes, N)."""
    inside = torch.ones(valid.shape[1], *[1] * len(sizes), dtype=torch.bool, device=valid.device)
    for axis, size in enumerate(sizes):
        along = torch.arange(size, device=valid.device) < valid[axis].unsqueeze(1)
        shape = [len(along), *[size if other == axis else 1 for other in range(len(sizes))]]
        inside = inside & along.reshape(shape)
    return inside


def _together(before: Padding, now: Padding) -> Padding:
    looked = before.looked + now.looked
    whole, inner = (
        old + now.looked / max(looked, 1) * (new - old)
        for old, new in zip(before.variance, now.variance, strict=True)
    )
    return Padding(
        max(before.axes, now.axes),
        before.positions + now.positions,
        before.padded + now.padded,
        before.shares + now.shares,
        before.lengths or now.lengths or before.shares[0] != now.shares[0],
        looked,
        (whole, inner),
    )
