"""Gradients whose sums float32 cannot hold: the CPU engine sums them again, and nothing else may change by it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import evenorm
from evenorm.engines import cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"no C++ engine: {cpu.available()}")


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that puts the value into sample 1 of channels 0 and 1."""

    def put(dy: Tensor) -> Tensor:
        dy = dy.clone()
        dy[1, :2].view(2, -1)[:, 0] = value
        return dy

    return put


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tiny": lambda dy: dy * 1e-24,
    "huge": lambda dy: dy * 1e32,
    "NaN": with_one(math.nan),
    "inf": with_one(math.inf),
}
SHAPES = {"planes": (4, 20, 23, 29), "short planes": (16, 96, 7, 7), "rows": (700, 64)}


def gradients(
    dtype: torch.dtype,
    given: tuple[Tensor, Tensor, Tensor | None],
    activation: str | None,
    training: bool,
) -> list[Tensor]:
    """Return the gradients by x, the residual, weight and bias in a dtype."""
    x, dy, residual = (None if t is None else t.to(dtype) for t in given)
    assert x is not None
    layer = evenorm.BatchNorm(x.shape[1], activation=activation, dtype=dtype).train(training)
    with torch.no_grad():
        layer.running_var.fill_(9.0)
        layer.weight.copy_(torch.linspace(0.5, 2, x.shape[1]))
        layer.bias.copy_(torch.linspace(-1, 1, x.shape[1]))
    leaves = [t.requires_grad_() for t in (x, residual) if t is not None]
    y = layer(leaves[0], residual=None if residual is None else leaves[1])
    return list(torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], dy))


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_out_of_range_are_right(
    shape: tuple[int, ...], kind: str, last: bool, activation: str | None, training: bool, with_residual: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(shape, generator=generator) for _ in range(3))
    dy = GRADIENTS[kind](dy)
    if last and len(shape) == 4:
        x, dy, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual))
    given = (x, dy, residual if with_residual else None)
    found = gradients(torch.float32, given, activation, training)
    true = gradients(torch.float64, given, activation, training)
    for ours, theirs in zip(found, true, strict=True):
        kept = theirs.isfinite()
        assert torch.equal(ours.isfinite(), kept)
        scale = theirs[kept].abs().max() if ours.dim() > 1 else dy[dy.isfinite()].abs().sum() / shape[1]
        assert (ours.double() - theirs)[kept].abs().max() <= 2e-6 * scale
