"""Batch norm in plain torch: the truth that tests compare with, and the engine of last resort.

Every line is ordinary differentiable torch in float64, so derivatives of any order, torch.func transforms,
export and every device follow from these formulas with nothing added. A fast engine offers the same functions
under the same names and arguments (docs/math.md; the numbers in brackets are its equations).

Legend: x, residual, y and their gradients are (N, C, *positions); mean and var (C,) or (G, C), G groups of
samples that are normalised apart; weight and bias (C,). xhat = (x - mean) / sqrt(var + eps) is x standardised,
z = xhat * weight + bias + residual what the activation sees, and g the gradient of the loss by z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evenorm.activations import TABLE
from evenorm.moments import Moments, group_sum, pool, spread, spread_mask, widen


class Setting(NamedTuple):
    """What every operation of an engine is told besides its tensors."""

    mask: Tensor | None = None  # (N, *positions), True where a value is valid
    splits: Sequence[int] | None = None  # how many consecutive samples form each group; None: one group
    eps: float = 1e-5
    activation: int = 0  # a row of activations.TABLE
    parameter: float = 0.0  # that row's slope or alpha


def moments(x: Tensor, mask: Tensor | None = None, splits: Sequence[int] | None = None) -> Moments:
    """Pool: count, mean and m2 of each group and channel [2, 3]."""
    return pool(x, mask, splits)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    setting: Setting,
) -> Tensor:
    """Apply: y = activation(xhat * weight + bias + residual), in x's dtype; 0 where the mask is False [1]."""
    z = _before_activation(x, mean, var, weight, bias, residual, setting)
    y = TABLE[setting.activation].value(z, setting.parameter)
    return valid_only(y.to(x.dtype), setting.mask)


def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool and apply where nothing stands between them: y, and the count, mean and m2 it was normalised by."""
    batch = pool(x, setting.mask, setting.splits)
    y = normalize(x, batch.mean, batch.variance(), weight, bias, residual, setting)
    return y, batch.count, batch.mean, batch.m2


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """Return sum g and sum g * xhat of each group and channel, (G, C): what bias and weight receive [7]."""
    g = _gradient_by_z(dy, x, mean, var, weight, bias, saved, setting)
    xhat = standardize(x, mean, var, setting)
    return group_sum(g, setting.splits), group_sum(g * xhat, setting.splits)


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    setting: Setting,
    offset: Tensor | None,
    slope: Tensor | None,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx = weight / sqrt(var + eps) * (g - offset - slope * xhat) [8], and the residual's gradient g.

    In training offset and slope are the means of g and of g * xhat; with fixed statistics both are None.
    """
    g = _gradient_by_z(dy, x, mean, var, weight, bias, saved, setting)
    kept = g
    if offset is not None and slope is not None:
        xhat = standardize(x, mean, var, setting)
        kept = g - spread(offset, x, setting.splits) - spread(slope, x, setting.splits) * xhat
    if weight is not None:
        kept = kept * spread(widen(weight), x)
    dx = kept / _deviation(x, var, setting)
    dresidual = g.to(x.dtype) if needs_residual else None
    return valid_only(dx.to(x.dtype), setting.mask), dresidual


def train_backward(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    setting: Setting,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of `train_forward` by x, weight, bias and residual [7, 8]."""
    given = (dy, x, mean, Moments(count, mean, m2).variance(), weight, bias, saved, setting)
    sum_g, sum_g_xhat = backward_sums(*given)
    per_group = count.clamp(min=1).unsqueeze(1)
    dx, dresidual = input_gradient(*given, sum_g / per_group, sum_g_xhat / per_group, needs_residual)
    return dx, _for_parameter(sum_g_xhat, weight), _for_parameter(sum_g, bias), dresidual


def eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    setting: Setting,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `normalize` with fixed mean and var by x, weight, bias and residual [9]."""
    given = (dy, x, mean, var, weight, bias, saved, setting)
    dx, dresidual = input_gradient(*given, None, None, needs_residual)
    if not needs_sums:
        return dx, None, None, dresidual
    sum_g, sum_g_xhat = backward_sums(*given)
    return dx, _for_parameter(sum_g_xhat, weight), _for_parameter(sum_g, bias), dresidual


def standardize(x: Tensor, mean: Tensor, var: Tensor, setting: Setting) -> Tensor:
    """Return xhat = (x - mean) / sqrt(var + eps): centred before it is scaled, so that no digit is lost [1]."""
    values = valid_only(widen(x), setting.mask)  # a NaN among the padding would spoil derivatives
    return (values - spread(widen(mean), x, setting.splits)) / _deviation(x, var, setting)


def _deviation(x: Tensor, var: Tensor, setting: Setting) -> Tensor:
    return spread((widen(var) + setting.eps).sqrt(), x, setting.splits)


def _before_activation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    setting: Setting,
) -> Tensor:
    z = standardize(x, mean, var, setting)
    if weight is not None:
        z = z * spread(widen(weight), x)
    if bias is not None:
        z = z + spread(widen(bias), x)
    return z if residual is None else z + valid_only(widen(residual), setting.mask)


def _gradient_by_z(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    setting: Setting,
) -> Tensor:
    """Return g. `saved` is the output where its sign tells the slope, else the residual, to rebuild z with."""
    row = TABLE[setting.activation]
    if row.name == "identity":
        return valid_only(widen(dy), setting.mask)
    if saved is not None and row.sign_suffices:
        z = widen(saved)
    else:
        z = _before_activation(x, mean, var, weight, bias, saved, setting)
    return valid_only(widen(dy) * row.derivative(z, setting.parameter), setting.mask)


def valid_only(values: Tensor, mask: Tensor | None) -> Tensor:
    """Put 0 where the mask is False, whatever stands there, NaN too."""
    valid = spread_mask(mask, values)
    return values if valid is None else torch.where(valid, values, 0)


def _for_parameter(sums: Tensor, parameter: Tensor | None) -> Tensor:
    """Add up the groups' sums in the parameter's dtype; float32 where there is no parameter to ask."""
    return sums.sum(0).to(torch.float32 if parameter is None else parameter.dtype)
