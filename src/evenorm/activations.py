"""Activations that batch norm can apply in its own pass: one table, read by every engine.

Each row is a function of z and of one parameter (a slope or alpha; unused by most) and its derivative by z.
Adding one means a row here and a case in each fast engine's table, under the same code; the C++ binding knows how
many there are, and both engines which of them need no more than the output's sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Activation(NamedTuple):
    """An activation as the engines take it: a row of the table, and the parameter it runs with."""

    code: int
    parameter: float


@dataclass(frozen=True)
class Row:
    """One activation: its value, its derivative, and the torch module that it stands for."""

    name: str
    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]
    module: type[nn.Module]
    parameter: float = 0.0
    parameter_name: str = ""  # the module's attribute that holds the parameter
    sign_suffices: bool = False  # the derivative needs only the sign of z, which the output shows


def _gelu_slope(z: Tensor, _: float) -> Tensor:
    normal_density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * normal_density


def _gelu_tanh_slope(z: Tensor, _: float) -> Tensor:
    root = math.sqrt(2 / math.pi)
    bend = torch.tanh(root * (z + 0.044715 * z**3))
    return 0.5 * (1 + bend) + 0.5 * z * (1 - bend.square()) * root * (1 + 3 * 0.044715 * z.square())


def _silu_slope(z: Tensor, _: float) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _hardswish_slope(z: Tensor, _: float) -> Tensor:
    middle = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z <= -3, torch.zeros_like(z), middle)


def _sigmoid_slope(z: Tensor, _: float) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 - gate)


TABLE = (
    Row("identity", lambda z, _: z, lambda z, _: torch.ones_like(z), nn.Identity, sign_suffices=True),
    # ~(z <= 0), as torch: the gradient passes where z is NaN.
    Row("relu", lambda z, _: z.relu(), lambda z, _: (~(z <= 0)).to(z.dtype), nn.ReLU, sign_suffices=True),
    Row(
        "leaky_relu",
        lambda z, slope: functional.leaky_relu(z, slope),
        lambda z, slope: torch.where(z > 0, torch.ones_like(z), slope),
        nn.LeakyReLU,
        parameter=0.01,
        parameter_name="negative_slope",
        sign_suffices=True,
    ),
    Row("silu", lambda z, _: functional.silu(z), _silu_slope, nn.SiLU),
    Row("gelu", lambda z, _: functional.gelu(z), _gelu_slope, nn.GELU),
    Row(
        "elu",
        lambda z, alpha: functional.elu(z, alpha),
        lambda z, alpha: torch.where(z <= 0, alpha * torch.exp(z.clamp(max=0)), torch.ones_like(z)),
        nn.ELU,
        parameter=1.0,
        parameter_name="alpha",
    ),
    Row("hardswish", lambda z, _: functional.hardswish(z), _hardswish_slope, nn.Hardswish),
    Row("sigmoid", lambda z, _: torch.sigmoid(z), _sigmoid_slope, nn.Sigmoid),
    Row("tanh", lambda z, _: torch.tanh(z), lambda z, _: 1 - torch.tanh(z).square(), nn.Tanh),
    Row("gelu_tanh", lambda z, _: functional.gelu(z, approximate="tanh"), _gelu_tanh_slope, nn.GELU),
)
NAMES = tuple(row.name for row in TABLE[1:])
IDENTITY = Activation(0, 0.0)

_BY_NAME = {row.name: Activation(code, row.parameter) for code, row in enumerate(TABLE)}
_BY_MODULE = {row.module: (Activation(code, row.parameter), row) for code, row in reversed(list(enumerate(TABLE)))}


def resolve(activation: str | nn.Module | None) -> Activation | None:
    """Return the table's activation for a name or a torch module; None for a module that no row computes.

    Raises:
        ValueError: a name that is in no row.
        TypeError: neither a name, a module nor None.
    """
    if activation is None:
        return IDENTITY
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(f"activation must be one of {', '.join(NAMES)} or an nn.Module, got {activation!r}")
        return _BY_NAME[activation]
    if not isinstance(activation, nn.Module):
        raise TypeError(f"activation must be a name, an nn.Module or None, got {type(activation).__name__}")
    known = _BY_MODULE.get(type(activation))
    if known is None:
        return None
    found, row = known
    if getattr(activation, "approximate", "none") == "tanh":
        return _BY_NAME["gelu_tanh"]
    if not row.parameter_name:
        return found
    parameter = float(getattr(activation, row.parameter_name))
    if row.sign_suffices and parameter < 0:  # LeakyReLU(-0.5): the output does not show the sign of z
        return None
    return found._replace(parameter=parameter)


def module_of(activation: str | nn.Module | None) -> nn.Module | None:
    """Return the torch module that computes the same activation, to put behind a plain batch norm."""
    if activation is None or isinstance(activation, nn.Module):
        return activation
    row = TABLE[_BY_NAME[activation].code]
    return nn.GELU(approximate="tanh") if row.name == "gelu_tanh" else row.module()
