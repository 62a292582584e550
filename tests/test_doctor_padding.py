"""Padding is found along any axis, and counted as a slow search counts it; the dark rim of pictures is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evenorm.doctor.padding import Padding, padding


def padded(*shape: int, seed: int = 0, batch: float = 1.0) -> Tensor:
    """Return noise, each sample of which ends in zeros, along each axis in another length."""
    draw = torch.Generator().manual_seed(seed)
    integers = len(shape) == 2
    x = torch.randint(1, 50, shape, generator=draw) if integers else torch.randn(shape, generator=draw)
    for sample in x:
        for axis in range(0 if integers else 1, sample.dim()):
            size = sample.shape[axis]
            length = int(batch * torch.randint(0, size - 1, (), generator=draw))
            sample.narrow(axis, size - length, length).fill_(0)
    return x


def searched(x: Tensor) -> tuple[int, float]:
    """Return the padded positions, and the variance of the rest, by going through every slice."""
    values = x.unsqueeze(1) if x.dim() == 2 else x
    kept = torch.ones(len(values), *values.shape[2:], dtype=torch.bool)
    for sample, inside in zip(values, kept, strict=True):
        corner = sample.flatten(1)[:, -1:]
        for axis, size in enumerate(sample.shape[1:]):
            alike = [
                bool((sample.select(axis + 1, at).reshape(len(corner), -1) == corner).all()) for at in range(size)
            ]
            length = next((tail for tail in range(size) if not alike[size - 1 - tail]), size)
            if length > 1:
                inside.narrow(axis, size - length, length).fill_(False)
    return int((~kept).sum()), float(values.movedim(1, -1)[kept].double().var(correction=0))


@pytest.mark.parametrize("shape", [(6, 9), (6, 2, 9), (5, 3, 7, 8), (4, 1, 5, 6, 3)])
def test_any_axis(shape: tuple[int, ...]) -> None:
    x = padded(*shape)
    found, (positions, variance) = padding(x, None), searched(x)
    assert isinstance(found, Padding)
    assert found.padded == positions > 0
    assert found.positions == x.numel() // (shape[1] if len(shape) > 2 else 1)
    assert found.lengths
    assert found.variance == pytest.approx((float(x.double().var(correction=0)), variance))
    assert found.matters == (len(shape) < 4)  # alike in every batch so far: for pictures, a rim


def test_batches_add_up() -> None:
    parts = [padded(4, 3, 8, 8, seed=seed, batch=share) for seed, share in enumerate((0.0, 0.6, 1.0))]
    found = None
    for part in parts:
        found = padding(part, found)
    assert isinstance(found, Padding)
    counts = [searched(part)[0] for part in parts]
    assert counts[0] == 0
    assert found.padded == sum(counts)
    assert found.shares == pytest.approx([count / 256 for count in counts])
    assert found.looked == 8
    assert found.spread > 0.3
    assert found.matters


def test_noise_and_constants_are_no_padding() -> None:
    for x in (torch.randn(4, 2, 9), torch.randn(4, 9), torch.ones(4, 2, 9), None, torch.ones(0, 2, 9)):
        found = padding(x, None)
        assert found is None or not found.matters


def test_a_sample_without_padding_may_come_first() -> None:
    x = torch.randn(3, 2, 10)
    x[1, :, 6:], x[2, :, 3:] = 0.0, 0.0
    found = padding(x, None)
    assert isinstance(found, Padding)
    assert found.padded == 4 + 7
