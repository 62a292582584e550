"""The engine's operations as torch operators, with shapes for tensors that have no data.

Inputs are float32, bfloat16 or float16, not empty, their groups cut regularly; the rest has been handed over
before. Importing this file imports Triton. Opaque operators, not `triton_op`: see docs/decisions_gpu.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evenorm.engines import shapes
from evenorm.engines.triton.launch import (
    CUMULATIVE,
    DEBIASED,
    EXPONENTIAL,
    Affine,
    Curve,
    Input,
    arrange,
    gradient,
    merge_sums,
    on_device,
    pool,
    pool_and_normalize,
    sums,
    sums_and_gradient,
    update_,
)
from evenorm.engines.triton.launch import normalize as launch_normalize

Maybe = Tensor | None
Splits = Sequence[int] | None


def moments(x: Tensor, mask: Maybe, splits: Splits) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (G,), mean and m2 (G, C)."""
    with on_device(x):
        return pool(arrange(x, mask, splits))


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    splits: Splits,
    eps: float,
    activation: int,
    parameter: float,
) -> Tensor:
    """Return y, normalised by the given statistics."""
    given = arrange(x, mask, splits, mean, var, weight, bias, residual)
    with on_device(x):
        by = Affine(mean, var, None, weight, bias)
        return launch_normalize(given, by, residual, Curve(eps, parameter, activation))


def train_forward(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    splits: Splits,
    eps: float,
    activation: int,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, and the count, mean and m2 it was normalised by."""
    given = arrange(x, mask, splits, weight, bias, residual, twice=True)
    curve = Curve(eps, parameter, activation)
    with on_device(x):
        if given.plan.whole:
            return pool_and_normalize(given, weight, bias, residual, curve)
        count, mean, m2 = pool(given)
        return launch_normalize(given, Affine(mean, m2, count, weight, bias), residual, curve), count, mean, m2


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    splits: Splits,
    eps: float,
    activation: int,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    """Return sum g and sum g * xhat, (G, C)."""
    given = arrange(x, mask, splits, dy, mean, var, weight, bias, saved)
    with on_device(x):
        by = Affine(mean, var, None, weight, bias)
        parts = sums(given, dy, by, saved, Curve(eps, parameter, activation))
        sum_g, sum_g_xhat = _of_groups(given), _of_groups(given)
        merge_sums(given.plan, parts, sum_g, sum_g_xhat, None, None)
    return sum_g, sum_g_xhat


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    splits: Splits,
    eps: float,
    activation: int,
    parameter: float,
    offset: Maybe,
    slope: Maybe,
    needs_residual: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx, and the residual's gradient where it is needed."""
    given = arrange(x, mask, splits, dy, mean, var, weight, bias, saved, offset, slope)
    with on_device(x):
        by, curve = Affine(mean, var, None, weight, bias), Curve(eps, parameter, activation)
        dx, dresidual = gradient(given, dy, by, saved, curve, offset, slope, needs_residual)
    return dx, _or_empty(dresidual, x)


def train_backward(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    splits: Splits,
    eps: float,
    activation: int,
    parameter: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by x, weight, bias and residual."""
    given = arrange(x, mask, splits, dy, count, mean, m2, weight, bias, saved, twice=True)
    by, curve = Affine(mean, m2, count, weight, bias), Curve(eps, parameter, activation)
    dweight, dbias = shapes.for_parameter(x, weight), shapes.for_parameter(x, bias)
    with on_device(x):
        if given.plan.whole:
            dx, dresidual = sums_and_gradient(given, dy, by, saved, curve, dweight, dbias, needs_residual)
        else:
            parts = sums(given, dy, by, saved, curve)
            sum_g, sum_g_xhat = _of_groups(given), _of_groups(given)
            merge_sums(given.plan, parts, sum_g, sum_g_xhat, dweight, dbias)
            dx, dresidual = gradient(given, dy, by, saved, curve, sum_g, sum_g_xhat, needs_residual)
    return dx, dweight, dbias, _or_empty(dresidual, x)


def eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    eps: float,
    activation: int,
    parameter: float,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with fixed statistics by x, weight, bias and residual, in one pass."""
    given = arrange(x, mask, None, dy, mean, var, weight, bias, saved)
    by, curve = Affine(mean, var, None, weight, bias), Curve(eps, parameter, activation)
    with on_device(x):
        if not needs_sums:
            dx, dresidual = gradient(given, dy, by, saved, curve, None, None, needs_residual)
            return (
                dx,
                shapes.for_parameter(x, weight, needed=False),
                shapes.for_parameter(x, bias, needed=False),
                _or_empty(dresidual, x),
            )
        dx = torch.empty_like(given.x)
        dresidual = torch.empty_like(given.x) if needs_residual else None
        parts = sums(given, dy, by, saved, curve, dx, dresidual)
        dweight, dbias = shapes.for_parameter(x, weight), shapes.for_parameter(x, bias)
        merge_sums(given.plan, parts, None, None, dweight, dbias)
    return dx, dweight, dbias, _or_empty(dresidual, x)


def track_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Maybe,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float,
    debias: bool,
    skip_nonfinite: bool,
    skipped: Maybe,
) -> None:
    """Let one batch enter the running statistics, in place; a momentum of NaN is a cumulative average."""
    cumulative = math.isnan(momentum)
    average = CUMULATIVE if cumulative else DEBIASED if debias and momentum < 1 else EXPONENTIAL
    state = (running_mean, running_var, num_batches_tracked, skipped)
    with on_device(running_mean):
        update_(*state, (count, mean, m2), 0.0 if cumulative else momentum, average, skip_nonfinite)


def _of_groups(given: Input) -> Tensor:
    return given.x.new_empty((given.plan.groups, given.plan.channels), dtype=torch.float64)


def _or_empty(gradient: Maybe, x: Tensor) -> Tensor:
    return x.new_empty(0) if gradient is None else gradient


_SETTING = "Tensor? mask, int[]? splits, float eps, int activation, float parameter"
_BY = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias"
_SCHEMAS = {
    moments: "(Tensor x, Tensor? mask, int[]? splits) -> (Tensor, Tensor, Tensor)",
    normalize: f"(Tensor x, {_BY}, Tensor? residual, {_SETTING}) -> Tensor",
    train_forward: f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {_SETTING}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    backward_sums: f"(Tensor dy, Tensor x, {_BY}, Tensor? saved, {_SETTING}) -> (Tensor, Tensor)",
    input_gradient: f"(Tensor dy, Tensor x, {_BY}, Tensor? saved, {_SETTING}, Tensor? offset, Tensor? slope, "
    "bool needs_residual) -> (Tensor, Tensor)",
    train_backward: "(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, Tensor? weight, Tensor? bias, "
    f"Tensor? saved, {_SETTING}, bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    eval_backward: f"(Tensor dy, Tensor x, {_BY}, Tensor? saved, Tensor? mask, float eps, int activation, "
    "float parameter, bool needs_sums, bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)",
    track_: "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor count, "
    "Tensor mean, Tensor m2, float momentum, bool debias, bool skip_nonfinite, Tensor(d!)? skipped) -> ()",
}
_library = torch.library.Library("evenorm_triton", "DEF")


def register() -> None:
    """Make the functions above operators; they serve every device that the engine lets through."""
    for function, schema in _SCHEMAS.items():
        name = function.__name__
        _library.define(name + schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"evenorm_triton::{name}", shapes.SHAPES[name], lib=_library)
