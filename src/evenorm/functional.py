"""Batch norm as functions: `batch_norm` and `moments` for everybody, `train` and `infer` for the layers.

Each call takes one of three ways: through an engine's own backward (`autograd`), straight to an engine where no
gradient is wanted, or through the formulas where torch transforms or exports what we do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from evenorm import autograd, engines, formulas, updates, workers
from evenorm.activations import IDENTITY, TABLE, Activation, resolve
from evenorm.autograd import exporting, transformed, transformed_eagerly, wants_gradient
from evenorm.averages import Exponential
from evenorm.checks import check, check_count, check_dense, check_eps, check_vectors
from evenorm.engines import cpu
from evenorm.formulas import Setting, valid_only
from evenorm.moments import Moments
from evenorm.renorm import Anchor, Recalled
from evenorm.workers import Workers, few

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
        ValueError: shapes that do not fit; a mask that is not bool; one value per channel, or a mask without any
            valid position, when training (on a device that would have to be asked, such a batch changes nothing);
            statistics missing at inference.

    Note:
        Statistics and arithmetic are float32 or wider whatever x's dtype; x is centred before it is scaled, so a
        large offset costs no digits, and a constant channel gives exactly bias.

    >>> import torch, evenorm
    >>> x = torch.randn(8, 3, 5)
    >>> y = evenorm.batch_norm(x, None, None, training=True, activation="relu")
    >>> torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True).relu())

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2 (docs/math.md, eq. 1 to 11).
    """
    if isinstance(x, Tensor) and x.dim() < 2 and x.numel() == 0:
        return x.clone()  # torch lets an empty vector through
    check_vectors(running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check(x, running_mean, running_var, weight, bias, residual, mask)
    check_eps(eps, training)
    if momentum is None:
        raise TypeError(
            "momentum must be a number, got None; for the mean of all batches use a layer, momentum=None"
        )
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("Expected running_mean and running_var to be defined when training=False")
        return infer(x, running_mean, running_var, weight, bias, residual, mask, eps, activation)
    if wants_gradient(running_mean, running_var) and not transformed():
        raise _not_constant()
    check_count(x, mask=mask, cure="training=False normalises such a batch by the running statistics")
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
        TypeError: x is not a floating-point tensor.
        ValueError: a mask of another shape or dtype, or a channel_dim that x does not have.

    >>> import torch, evenorm
    >>> images = torch.rand(8, 28, 28, 3)
    >>> evenorm.moments(images, channel_dim=-1).mean.shape
    torch.Size([3])

    Source: Chan, Golub & LeVeque 1983; docs/math.md, eq. 2 to 5.
    """
    check_dense(x)
    if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim():
        raise ValueError(f"channel_dim must be a dimension of x, 2D or more; got {channel_dim} for {x.dim()}D")
    channels_second = x.movedim(channel_dim, 1)
    check(channels_second, mask=mask)
    engine = formulas if transformed() or wants_gradient(x) else engines.choose(x)
    found: Moments = engine.moments(channels_second, mask)
    return found.pooled()


def mask_from_lengths(lengths: Tensor, size: int) -> Tensor:
    """Return the mask of padded sequences: True for the first ``lengths[n]`` of ``size`` positions of sample n.

    Args:
        lengths: how many positions of each sample are valid; (N,), integer, 0 to size.
        size: the number of positions, padding included.

    Returns:
        bool, (N, size), True where a position is VALID.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: lengths that are not one number a sample.

    >>> import torch, evenorm
    >>> evenorm.mask_from_lengths(torch.tensor([1, 3]), 3)
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor of integers, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have shape (N,), got {tuple(lengths.shape)}")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def train(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    splits: Sequence[int] | None,
    eps: float,
    activation: str | nn.Module | None,
    anchor: Anchor | Recalled | None = None,
    among: Workers | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise checked arguments by the batch's own statistics; return y and the moments of each group."""
    inside, fused, behind = _fuse(x, residual, activation)
    setting = Setting(mask, splits, eps, *fused)
    given = (x, weight, bias, inside, setting)
    if anchor is not None or among is not None:
        if transformed():
            y, *batch = autograd.train_pooled(*given, anchor, among)
        elif anchor is None and among is not None and few(among) and cpu.supports(x):
            y, packed = autograd.apply(autograd.StepPooled, *given[:-1], (setting, cpu.NO_UPDATE, among))
            count, mean, m2 = workers.split(packed)
            batch = [count[:, 0], mean, m2]
        else:
            y, *batch = autograd.apply(autograd.TrainPooled, *given, anchor, among)
    elif transformed():
        y, *batch = formulas.train_forward(*given)
    elif wants_gradient(x, weight, bias, inside):
        y, *batch = autograd.apply(autograd.Train, *given)
    else:
        y, *batch = engines.choose(x).train_forward(*given)
    if behind is not None:
        y = behind(y, mask)
    return y, Moments(*batch)


def train_step(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    eps: float,
    activation: str | nn.Module | None,
    update: cpu.Update,
    among: Workers | None = None,
) -> Tensor | None:
    """Do `train` and the update of the running statistics in one call of the CPU engine; None where it cannot.

    It is the way of an ordinary layer: a small one spends most of its time in Python.
    """
    known = resolve(activation)
    if known is None or (residual is not None and residual.dtype != x.dtype):
        return None
    plain = (update[0] is None or cpu.is_plain(update[0])) and updates.counts_in_long(update[2])
    if transformed_eagerly() or not cpu.supports(x) or not plain:
        return None
    y: Tensor
    if among is None:
        y = autograd.step(x, weight, bias, residual, (mask, None, eps, *known, *update, None))
    elif few(among):
        given = Setting(mask, None, eps, *known), update, among
        y = autograd.apply(autograd.StepPooled, x, weight, bias, residual, given)[0]
    else:
        return None
    return y


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
    """Normalise checked arguments by given statistics, which are constants; overridable as in torch."""
    if has_torch_function_variadic(x, mean, var):  # so that a TorchFunctionMode, calibration's say, sees it whole
        every = (x, mean, var, weight, bias, residual, mask, eps, activation)
        overridden: Tensor = handle_torch_function(infer, (x, mean, var), *every)
        return overridden
    if exporting() and mask is None:  # one aten operator, which ONNX and quantisers know
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return _behind(y, residual, None, activation)
    inside, fused, behind = _fuse(x, residual, activation)
    setting = Setting(mask, None, eps, *fused)
    given = (x, mean, var, weight, bias, inside, setting)
    if transformed():
        y = formulas.normalize(*given)
    elif wants_gradient(x, weight, bias, inside, mean, var):
        if mean.requires_grad or var.requires_grad:
            raise _not_constant()
        y = autograd.apply(autograd.Infer, *given)
    else:
        y = engines.choose(x).normalize(*given)
    return y if behind is None else behind(y, mask)


def _not_constant() -> ValueError:
    return ValueError(
        "running_mean and running_var are constants, to which no gradient flows, got one that requires grad; "
        "detach() it"
    )


def _fuse(
    x: Tensor, residual: Maybe, activation: str | nn.Module | None
) -> tuple[Maybe, Activation, Callable[[Tensor, Maybe], Tensor] | None]:
    """Split residual and activation into what the engine's pass takes and what has to come behind it."""
    known = resolve(activation)
    same_dtype = residual is None or residual.dtype == x.dtype  # else torch's promotion gives the output's dtype
    if known is not None and same_dtype:
        return residual, known, None
    outside = None if same_dtype else residual
    return residual if same_dtype else None, IDENTITY, lambda y, mask: _behind(y, outside, mask, activation)


def _behind(y: Tensor, residual: Maybe, mask: Maybe, activation: str | nn.Module | None) -> Tensor:
    """Add and activate in operations of their own."""
    if residual is not None:
        y = y + residual
    if isinstance(activation, nn.Module):
        y = activation(y)
    elif activation is not None:
        code, parameter = resolve(activation) or IDENTITY
        y = TABLE[code].value(y, parameter)
    return valid_only(y, mask)
