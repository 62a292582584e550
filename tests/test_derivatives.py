"""Derivatives of batch norm: any order, both directions, under torch.func, against the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import evenorm
from cases import CASES
from truth import ACTIVATIONS, MODES, MODULES, ours, plain


def doubles(seed: int = 6, shape: tuple[int, ...] = (4, 2, 3)) -> list[Tensor]:
    """Return x, weight, bias and residual in float64, to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (shape, shape[1:2], shape[1:2], shape)
    draw = [torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes]
    return [tensor.requires_grad_() for tensor in draw]


def some_valid(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    mask[0, 1:] = mask[2, :1] = False
    return mask


def statistics(x: Tensor, training: bool) -> tuple[Tensor | None, Tensor | None]:
    if training:
        return None, None
    return torch.linspace(-0.5, 0.5, x.shape[1]).double(), torch.linspace(0.5, 2, x.shape[1]).double()


def both(mode: str, activation: Any, mask: Tensor | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return ours and the book's as functions of x, weight, bias and residual."""
    training = MODES[mode]

    def from_us(x: Tensor, weight: Any = None, bias: Any = None, residual: Any = None) -> Tensor:
        more = {"activation": activation, "residual": residual, "mask": mask}
        return evenorm.batch_norm(x, *statistics(x, training), weight, bias, training, eps=0.1, **more)

    def by_the_book(x: Tensor, weight: Any = None, bias: Any = None, residual: Any = None) -> Tensor:
        fixed: Any = None if training else statistics(x, training)
        more = {"activation": activation, "residual": residual, "mask": mask, "eps": 0.1}
        return plain(x, weight, bias, fixed=fixed, **more)

    return from_us, by_the_book


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *MODULES])
def test_first_and_second_derivatives(activation: str | None, mode: str) -> None:
    chosen, given = MODULES.get(activation or "", activation), doubles()
    for mask in (None, some_valid(given[0])):
        from_us, _ = both(mode, chosen, mask)
        assert gradcheck(from_us, given)
        assert gradgradcheck(from_us, given, fast_mode=True)
        without_residual = given[:3]
        assert gradcheck(from_us, without_residual, fast_mode=True)
        assert gradgradcheck(from_us, without_residual, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["relu", "silu", "elu"])
@pytest.mark.parametrize("masked", [False, True])
def test_create_graph_gives_the_derivatives_of_the_plain_formula(activation: str, mode: str, masked: bool) -> None:
    given = doubles()
    directions = [tensor.detach() for tensor in doubles(7)]
    mask = None
    if masked:
        mask = some_valid(given[0])
        with torch.no_grad():
            for tensor in (given[0], given[3]):
                tensor.masked_fill_(~mask.unsqueeze(1), torch.nan)
    orders = []
    for function in both(mode, activation, mask):
        y = function(*given)
        found, orders_here = y, []
        for _ in range(3):
            cotangent = next(d for d in directions if d.shape == found.shape)
            gradients = torch.autograd.grad(found, given, cotangent, create_graph=True, materialize_grads=True)
            orders_here.append(gradients)
            found = sum((g * d).sum() * torch.ones_like(y) for g, d in zip(gradients, directions, strict=True))
        orders.append(orders_here)
    torch.testing.assert_close(orders[0], orders[1])


def test_a_graph_created_without_need_costs_no_digits() -> None:
    """The formulas' backward and the engine's agree."""
    case = CASES["4-D, offset 1e4"]
    x, state = case.make().requires_grad_(), case.state()
    y = ours(x, state, True, "relu", None, None)
    (thin,) = torch.autograd.grad(y, x, case.noise(2), retain_graph=True)
    (thick,) = torch.autograd.grad(y, x, case.noise(2), create_graph=True)
    torch.testing.assert_close(thin, thick)


@pytest.mark.parametrize("mode", MODES)
def test_inference_keeps_the_statistics_it_was_computed_with(mode: str) -> None:
    """A training forward in between, or a broadcast of buffers, neither spoils nor forbids the backward."""
    case = CASES["2-D"]
    plain_call, disturbed_call = [], []
    for found, disturb in ((plain_call, False), (disturbed_call, True)):
        x, state = case.make().requires_grad_(), case.state()
        y = ours(x, state, MODES[mode], "silu", None, None)
        if disturb:
            state.running_mean.add_(3)
            state.running_var.mul_(5)
        found.append(torch.autograd.grad(y, x, case.noise(2))[0])
    assert torch.equal(plain_call[0], disturbed_call[0])


# Torch itself scripts some derivatives when forward mode first needs them.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@scripts
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_transforms_of_torch_func(activation: str | None, mode: str) -> None:
    given = [tensor.detach() for tensor in doubles()]
    tangents = [tensor.detach() for tensor in doubles(8)]
    stacked = torch.stack([given[0], 2 * given[0] + 1])
    results = []
    for function in both(mode, activation, None):

        def loss(*arguments: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return (function(*arguments) * tangents[0]).sum()

        results.append(
            [
                torch.func.grad(loss, argnums=(0, 1, 2, 3))(*given),
                torch.func.jvp(function, tuple(given), tuple(tangents)),
                torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None, None))(stacked, *given[1:]),
                torch.func.jacrev(function, argnums=1)(*given),
                torch.func.jacfwd(function, argnums=2)(*given),
                torch.func.hessian(loss)(*given),
            ]
        )
    torch.testing.assert_close(results[0], results[1])


@scripts
def test_forward_mode_without_torch_func() -> None:
    x, *_ = doubles()
    tangent = doubles(8)[0].detach()
    results = []
    for function in both("train", "gelu", None):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
            results.append(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent)
    torch.testing.assert_close(results[0], results[1])


def test_only_wanted_gradients_are_returned() -> None:
    for wanted in range(4):
        given = [tensor.detach().requires_grad_(at == wanted) for at, tensor in enumerate(doubles())]
        for mode in MODES:
            from_us, by_the_book = both(mode, "elu", None)
            cotangent = doubles(7)[0].detach()
            found = torch.autograd.grad(from_us(*given), given[wanted], cotangent)
            torch.testing.assert_close(found, torch.autograd.grad(by_the_book(*given), given[wanted], cotangent))
    with torch.no_grad():
        assert not both("train", "elu", None)[0](*doubles()).requires_grad
