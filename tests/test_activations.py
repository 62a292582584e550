"""The table of activations: each row is torch's function, with its derivative."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from evenorm.activations import IDENTITY, NAMES, TABLE, Activation, Row, module_of, resolve
from evenorm.functional import batch_norm
from truth import ACTIVATIONS

# Where a definition changes, on both sides of it, and far out.
FAR = [1e-8, 2.9999, 3.0, 3.0001, 10.0, 90.0, 1000.0]
POINTS = [-0.0, 0.0, *FAR, *(-point for point in FAR)]
MODULES = (
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.LeakyReLU(), "leaky_relu"),
    (nn.LeakyReLU(0.3), "leaky_relu"),
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.ELU(), "elu"),
    (nn.ELU(0.3), "elu"),
    (nn.Hardswish(), "hardswish"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.Tanh(), "tanh"),
    (nn.Identity(), "identity"),
)


def points() -> Tensor:
    near = torch.linspace(-7, 7, 401, dtype=torch.float64)
    return torch.cat([near, torch.tensor(POINTS, dtype=torch.float64)]).requires_grad_()


def test_the_names_are_the_documented_ones() -> None:
    documented = ("relu", "leaky_relu", "silu", "gelu", "elu", "hardswish", "sigmoid", "tanh")
    assert NAMES[: len(documented)] == documented
    assert [row.name for row in TABLE[1:]] == list(NAMES)
    assert TABLE[IDENTITY.code].name == "identity"


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name])
def test_a_row_computes_torchs_function(name: str) -> None:
    found = resolve(name)
    assert found is not None
    z = points()
    torch.testing.assert_close(TABLE[found.code].value(z, found.parameter), ACTIVATIONS[name](z), rtol=0, atol=0)


@pytest.mark.parametrize(("module", "name"), MODULES, ids=lambda given: str(given))
def test_a_module_is_the_row_that_computes_it(module: nn.Module, name: str) -> None:
    found = resolve(module)
    assert found is not None
    row, z = TABLE[found.code], points()
    assert row.name == name
    expected = module(z.clone())
    torch.testing.assert_close(row.value(z, found.parameter), expected, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(expected, z, torch.ones_like(z))
    torch.testing.assert_close(row.derivative(z, found.parameter), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_derivative_can_be_differentiated(row: Row) -> None:
    z = points().detach()
    # Away from the kinks, where the second derivative is nobody's to define.
    z = z[(z.abs() > 1e-3) & ((z.abs() - 3).abs() > 1e-3)].requires_grad_()
    (first,) = torch.autograd.grad(row.value(z, row.parameter), z, torch.ones_like(z), create_graph=True)
    seconds = []
    for slope in (row.derivative(z, row.parameter), first):
        reached = slope + 0 * z  # where the slope is a constant, its derivative is 0
        seconds.append(torch.autograd.grad(reached, z, torch.ones_like(z))[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", [row for row in TABLE if row.sign_suffices], ids=lambda row: row.name)
def test_the_output_tells_the_slope_where_a_row_says_so(row: Row) -> None:
    z = points()
    slope = row.derivative(z, row.parameter)
    assert torch.equal(row.derivative(row.value(z, row.parameter), row.parameter), slope)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_gradient_at_nan_is_torchs(row: Row) -> None:
    """For a single value, that is: torch's vector loops answer NaN where its scalar ones let the gradient pass."""
    z = torch.full((1, 1), torch.nan, requires_grad=True)
    module = module_of(row.name) or nn.Identity()
    (torchs,) = torch.autograd.grad(module(z), z, torch.ones_like(z))
    slope = row.derivative(z.detach(), row.parameter)
    y = batch_norm(z, torch.zeros(1), torch.ones(1), eps=0.0, activation=module)
    (ours,) = torch.autograd.grad(y, z, torch.ones_like(z))
    for found in (slope, ours):
        torch.testing.assert_close(found, torchs, rtol=0, atol=0, equal_nan=True)


class _Softer(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return input / 2


@pytest.mark.parametrize("module", [_Softer(), nn.Softplus(), nn.LeakyReLU(-0.5)], ids=str)
def test_what_no_row_computes_is_left_to_the_module(module: nn.Module) -> None:
    assert resolve(module) is None
    assert module_of(module) is module


def test_no_activation_is_the_identity() -> None:
    assert resolve(None) == IDENTITY == Activation(0, 0.0)
    assert module_of(None) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_module_are_the_same(name: str) -> None:
    module = module_of(name)
    assert module is not None
    assert resolve(module) == resolve(name)


def test_unknown_activations() -> None:
    text = f"activation must be one of {', '.join(NAMES)} or an nn.Module, got 'Relu'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        resolve("Relu")
    with pytest.raises(TypeError, match=r"^activation must be a name, an nn\.Module or None, got type$"):
        resolve(nn.ReLU)  # type: ignore[arg-type]
