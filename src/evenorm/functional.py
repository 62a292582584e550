"""Batch norm as functions: argument checks, choice of engine, autograd.

`train` and `infer` are what layers call; `batch_norm` and `moments` are the public faces. First derivatives run
in the engine's own backward, which keeps nothing but x and C-sized statistics. Higher derivatives, torch.func
transforms and export run in the formulas, which torch differentiates by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from evenorm import engines, formulas, updates
from evenorm.activations import IDENTITY, TABLE, Activation, resolve
from evenorm.averages import Exponential
from evenorm.formulas import Setting, valid_only
from evenorm.moments import Moments

Maybe = Tensor | None


def batch_norm(
    x: Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | nn.Module | None = None,
    residual: Maybe = None,
    mask: Maybe = None,
) -> Tensor:
    r"""Normalise each channel of x by the batch's statistics (training) or the running ones (inference).

    .. math:: y = \mathrm{activation}\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}\,\gamma + \beta
              + \mathrm{residual}\right)

    As `torch.nn.functional.batch_norm`, and more: the residual, the activation and the mask are applied in the
    same pass.

    Args:
        x: (N, C, *positions); float32, float64, bfloat16 or float16.
        running_mean: (C,), updated in place when training; may be None when training.
        running_var: (C,), likewise; holds the unbiased variance, as in torch.
        weight: γ, (C,); None means 1.
        bias: β, (C,); None means 0.
        training: normalise by the batch's own statistics and update the running ones.
        momentum: the weight of the NEW batch in the running statistics (Keras and flax mean its complement).
        eps: added to the variance; above 0 when training.
        activation: a name (relu, leaky_relu, silu, gelu, elu, hardswish, sigmoid, tanh), a module, or None.
        residual: added before the activation; x's shape.
        mask: bool, True where a position is VALID; (N,) for x (N, C), else (N, *positions). The others enter
            no statistics, come out as 0 and send back a gradient of 0, whatever they hold.

    Returns:
        y, of x's shape, dtype and memory format.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: shapes that do not fit; one value per channel when training; statistics missing at inference.

    Note:
        Statistics and arithmetic are float32 or wider whatever x's dtype; x is centred before it is scaled, so a
        large offset costs no digits, and a constant channel gives exactly bias.

    >>> import torch, evenorm
    >>> x = torch.randn(8, 3, 5)
    >>> y = evenorm.batch_norm(x, None, None, training=True, activation="relu")
    >>> torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True).relu())

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2 (docs/math.md, eq. 1 to 11).
    """
    if x.dim() < 2 and x.numel() == 0:
        return x.clone()  # torch lets an empty vector through
    check(x, running_mean, running_var, weight, bias, residual, mask)
    check_eps(eps, training)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("Expected running_mean and running_var to be defined when training=False")
        return infer(x, running_mean, running_var, weight, bias, residual, mask, eps, activation)
    check_count(x)
    y, batch = train(x, weight, bias, residual, mask, None, eps, activation)
    if running_mean is not None and running_var is not None and not updates.recomputing():
        updates.commit_(updates.Running(running_mean, running_var), batch, Exponential(momentum))
    return y


def moments(x: Tensor, *, mask: Maybe = None, channel_dim: int = 1) -> Moments:
    r"""Return the count, mean and summed squared deviation of each channel of x.

    .. math:: n, \qquad \mu = \frac1n \sum_i x_i, \qquad m_2 = \sum_i (x_i - \mu)^2

    Args:
        x: a floating-point tensor of at least two dimensions.
        mask: bool, True where a position is VALID; x's shape without the channel dimension.
        channel_dim: the dimension that is not averaged over.

    Returns:
        Moments with count (), mean (C,) and m2 (C,), in float64 where the device has it; ``a + b`` merges two.

    Raises:
        TypeError: x is not a floating-point tensor, or mask is not bool.
        ValueError: a mask of another shape, or a channel_dim that x does not have.

    >>> import torch, evenorm
    >>> images = torch.rand(8, 28, 28, 3)
    >>> evenorm.moments(images, channel_dim=-1).mean.shape
    torch.Size([3])

    Source: Chan, Golub & LeVeque 1983; docs/math.md, eq. 2 to 5.
    """
    if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"channel_dim must be a dimension of x, 2D or more; got {channel_dim} for {x.dim()}D")
    channels_second = x.movedim(channel_dim, 1)
    check(channels_second, mask=mask)
    plain = _transformed() or (torch.is_grad_enabled() and x.requires_grad)
    engine = formulas if plain else engines.choose(x)
    found: Moments = engine.moments(channels_second, mask)
    return found.pooled()


def train(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    splits: list[int] | None,
    eps: float,
    activation: str | nn.Module | None,
) -> tuple[Tensor, Moments]:
    """Normalise checked arguments by the batch's own statistics; return y and the moments of each group."""
    inside, fused, behind = _fuse(x, residual, activation)
    setting = Setting(mask, splits, eps, *fused)
    given = (x, weight, bias, inside, setting)
    if _transformed():
        y, *batch = formulas.train_forward(*given)
    elif _wants_gradient(x, weight, bias, inside):
        y, *batch = _Train.apply(*given)
    else:
        y, *batch = engines.choose(x).train_forward(*given)
    if behind is not None:
        y = behind(y, residual, mask)
    return y, Moments(*batch)


def infer(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    eps: float,
    activation: str | nn.Module | None,
) -> Tensor:
    """Normalise checked arguments by given statistics, which are constants."""
    inside, fused, behind = _fuse(x, residual, activation)
    setting = Setting(mask, None, eps, *fused)
    given = (x, mean, var, weight, bias, inside, setting)
    if _transformed():
        y = formulas.normalize(*given)
    elif _wants_gradient(x, weight, bias, inside):
        y = _Infer.apply(*given)
    else:
        y = engines.choose(x).normalize(*given)
    return y if behind is None else behind(y, residual, mask)


def check(
    x: Tensor,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    residual: Maybe = None,
    mask: Maybe = None,
) -> None:
    """Raise the errors of `batch_norm` that concern tensors, before any work."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor, got {found}; convert it first, e.g. x.float()")
    if x.dim() < 2:
        raise ValueError(f"expected 2D or higher input (got {x.dim()}D input): (N, C, *positions)")
    channels = x.shape[1]
    named = ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)
    for name, vector in named:
        if vector is not None and vector.numel() != channels:
            raise ValueError(f"{name} should contain {channels} elements not {vector.numel()}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if mask is not None:
        check_mask(x, mask)


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Raise unless the mask says for each position of x, on x's device, whether it is valid."""
    positions = (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a position is valid; got {mask.dtype}")
    if mask.shape != positions:
        raise ValueError(f"mask must have shape {positions} for x {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on x's device, {x.device}; it is on {mask.device}")


def check_eps(eps: float, training: bool) -> None:
    """Raise torch's error for an eps that could divide by zero."""
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_count(x: Tensor) -> None:
    """Raise torch's error where a channel has one value only, which has no variance."""
    if x.numel() == x.shape[1] and x.numel() > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def _fuse(
    x: Tensor, residual: Maybe, activation: str | nn.Module | None
) -> tuple[Maybe, Activation, Callable[[Tensor, Maybe, Maybe], Tensor] | None]:
    """Split residual and activation into what the engine's pass takes and what has to come behind it."""
    known = resolve(activation)
    inside = residual is None or residual.dtype == x.dtype  # else torch's promotion decides the output's dtype
    if known is not None and inside:
        return residual, known, None

    def behind(y: Tensor, outside: Maybe, mask: Maybe) -> Tensor:
        if not inside and outside is not None:
            y = y + outside
        if isinstance(activation, nn.Module):
            y = activation(y)
        elif known is not None:
            y = TABLE[known.code].value(y, known.parameter)
        return valid_only(y, mask)

    return residual if inside else None, IDENTITY, behind


def _wants_gradient(*tensors: Maybe) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _transformed() -> bool:
    """Tell whether torch.func, forward-mode differentiation or an export is looking at what we do."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class _Train(torch.autograd.Function):
    """`train_forward` of an engine, with that engine's backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, count, mean, m2 = engines.choose(x).train_forward(x, weight, bias, residual, setting)
        ctx.setting = setting
        ctx.save_for_backward(x, weight, bias, _to_rebuild(y, residual, setting), count, mean, m2)
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.set_materialize_grads(False)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        if dy is None:
            return (None,) * 5
        x, weight, bias, saved, count, mean, m2 = ctx.saved_tensors
        engine = engines.choose(x)
        if torch.is_grad_enabled() or _transformed():
            engine = formulas
            batch = formulas.moments(x, ctx.setting.mask, ctx.setting.splits)
            count, mean, m2 = batch.count, batch.mean, batch.m2  # as functions of x, to differentiate again
        dx, dweight, dbias, dresidual = engine.train_backward(
            dy, x, count, mean, m2, weight, bias, saved, ctx.setting, ctx.needs_input_grad[3]
        )
        return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual, None


class _Infer(torch.autograd.Function):
    """`normalize` of an engine by constant statistics, with that engine's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Maybe,
        bias: Maybe,
        residual: Maybe,
        setting: Setting,
    ) -> Tensor:
        y: Tensor = engines.choose(x).normalize(x, mean, var, weight, bias, residual, setting)
        ctx.setting = setting
        saved = _to_rebuild(y, residual, setting)
        # Copies: a training forward may move the running statistics before this one's backward.
        ctx.save_for_backward(x, mean.clone(), var.clone(), weight, bias, saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Maybe) -> tuple[Maybe, ...]:
        if dy is None:
            return (None,) * 7
        x, mean, var, weight, bias, saved = ctx.saved_tensors
        engine = formulas if torch.is_grad_enabled() or _transformed() else engines.choose(x)
        needs_sums = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dx, dweight, dbias, dresidual = engine.eval_backward(
            dy, x, mean, var, weight, bias, saved, ctx.setting, needs_sums, ctx.needs_input_grad[5]
        )
        dweight = dweight if ctx.needs_input_grad[3] else None
        return dx, None, None, dweight, dbias if ctx.needs_input_grad[4] else None, dresidual, None


def _to_rebuild(y: Tensor, residual: Maybe, setting: Setting) -> Maybe:
    """Return what backward needs, besides x, to know the activation's slope; see `formulas._gradient_by_z`."""
    if residual is None or setting.activation == IDENTITY.code:
        return None
    return y if TABLE[setting.activation].sign_suffices else residual
