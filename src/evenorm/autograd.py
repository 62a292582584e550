"""First derivatives by an engine's own backward, keeping nothing but x and C-sized statistics.

Derivatives of higher order run in the formulas instead, which torch differentiates by itself: each backward
below turns to them when it is asked to be differentiable (docs/math.md, eq. 12 to 16).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evenorm import engines, formulas, workers
from evenorm.activations import IDENTITY, TABLE
from evenorm.engines import cpu
from evenorm.formulas import Setting
from evenorm.renorm import Anchor, Recalled, Tied, tie, untie
from evenorm.workers import Workers

Maybe = Tensor | None

_of_torch_func, _traced = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


def transformed() -> bool:
    """Tell whether torch.func, forward-mode differentiation or an export is looking at what we do."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else transformed_eagerly()


def transformed_eagerly() -> bool:
    """Tell it where torch.compile is not at work."""
    return _of_torch_func() or forward_ad._current_level >= 0 or _traced() is not None


def exporting() -> bool:
    """Tell whether the result is going to be a graph for other programs to run."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def wants_gradient(*tensors: Maybe) -> bool:
    """Tell whether autograd has to know of an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # any() would take a generator, which costs more than the look
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def again() -> bool:
    """Tell, within a backward, whether it will itself be differentiated."""
    return torch.is_grad_enabled() or transformed()


class Train(torch.autograd.Function):
    """An engine's `train_forward`: nothing stands between pool and apply."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep x, the parameters, and what tells the activation's slope."""
        engine = engines.choose(x)
        y, *batch = engine.train_forward(x, weight, bias, residual, setting)
        saved = _to_rebuild(y, residual, setting.activation)
        ctx.save_for_backward(x, weight, bias, saved, setting.mask, *batch)
        ctx.engine, ctx.setting = engine, _with_mask(setting, None)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*batch)
        return y, *batch

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        """Sum, then subtract from the gradient the directions in which the output cannot move [7, 8]."""
        if dy is None:
            return (None,) * 5
        x, weight, bias, saved, mask, count, mean, m2 = ctx.saved_tensors
        setting, needs_residual = _with_mask(ctx.setting, mask), ctx.needs_input_grad[3]
        if again():
            return *_derived(dy, x, weight, bias, saved, setting, needs_residual), None
        dx, dweight, dbias, dresidual = ctx.engine.train_backward(
            dy, x, count, mean, m2, weight, bias, saved, setting, needs_residual
        )
        return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual, None


class Step(torch.autograd.Function):
    """`Train` and the update of the running statistics in one call of the CPU engine, with y its only output.

    It is the way of ordinary layers. A small layer spends its time on calls like these, so there are few, and the
    batch's statistics are packed in one tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, given: tuple[Any, ...]) -> Tensor:
        """As `Train`'s, and make the update; given: the remaining arguments of `cpu.step_forward`, in its order."""
        mask, splits, eps, activation, parameter = given[:5]
        y: Tensor
        y, batch = cpu.direct["step_forward"](x, weight, bias, residual, *given)
        saved = None if residual is None else _to_rebuild(y, residual, activation)
        ctx.save_for_backward(x, weight, bias, saved, mask, batch)
        ctx.setting = splits, eps, activation, parameter
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Maybe) -> tuple[Maybe, ...]:
        """As `Train`'s."""
        if dy is None:
            return (None,) * 5
        x, weight, bias, saved, mask, batch = ctx.saved_tensors
        needs_residual = ctx.needs_input_grad[3]
        if torch.compiler.is_compiling():  # compiled autograd, which sees no further than `cpu.direct`
            given = (dy, x, batch, weight, bias, saved, Setting(mask, *ctx.setting))
            dx, dweight, dbias, dresidual = cpu.step_backward(*given, needs_residual)
            return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual, None
        if torch.is_grad_enabled() or transformed_eagerly():
            setting = Setting(mask, *ctx.setting)
            return *_derived(dy, x, weight, bias, saved, setting, needs_residual), None
        computed = needs_residual and not cpu.is_dy(Setting(mask, *ctx.setting))
        dx, dweight, dbias, dresidual = cpu.direct["step_backward"](
            dy, x, batch, weight, bias, saved, mask, *ctx.setting, computed, None, 0
        )
        dresidual = cpu.residual_gradient(dy, dresidual, needs_residual, computed)
        return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual, None


class StepPooled(torch.autograd.Function):
    """`Step` over workers: they exchange messages between pool and apply, and between sums and gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Maybe,
        bias: Maybe,
        residual: Maybe,
        given: tuple[Setting, cpu.Update, Workers],
    ) -> tuple[Tensor, Tensor]:
        """Keep what `Step` does, and the residual, from which higher derivatives start."""
        setting, update, among = given
        messages = workers.gather(cpu.forward_message(x, setting.mask), among)
        y, batch = cpu.step_forward(x, weight, bias, residual, setting, update, messages)
        ctx.setting, ctx.among = _with_mask(setting, None), among
        saved = _to_rebuild(y, residual, setting.activation)
        ctx.save_for_backward(x, weight, bias, residual, saved, setting.mask, batch)
        ctx.mark_non_differentiable(batch)
        ctx.set_materialize_grads(False)
        return y, batch

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        """As `Train`'s, with the sums over all workers in dx, and this one's own for the parameters [7, 8]."""
        if dy is None:
            return (None,) * 5
        x, weight, bias, residual, saved, mask, batch = ctx.saved_tensors
        setting = _with_mask(ctx.setting, mask)
        if again():
            return *_differentiable(dy, (x, weight, bias, residual), setting, None, ctx.among), None
        given = (dy, x, batch, weight, bias, saved, setting)
        needs_residual = ctx.needs_input_grad[3]
        messages = workers.gather(cpu.backward_message(*given), ctx.among)
        dx, dweight, dbias, dresidual = cpu.step_backward(*given, needs_residual, messages, ctx.among.rank())
        return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual, None


class Infer(torch.autograd.Function):
    """An engine's `normalize` by constant statistics."""

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
        """Keep x, the parameters and the statistics."""
        engine = engines.choose(x)
        y: Tensor = engine.normalize(x, mean, var, weight, bias, residual, setting)
        ctx.engine, ctx.setting = engine, _with_mask(setting, None)
        saved = _to_rebuild(y, residual, setting.activation)
        # Copies: a training forward may move the running statistics before this one's backward.
        ctx.save_for_backward(x, mean.clone(), var.clone(), weight, bias, saved, setting.mask)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Maybe) -> tuple[Maybe, ...]:
        """Scale the gradient; sum it only if weight or bias wants that [7, 9]."""
        if dy is None:
            return (None,) * 7
        x, mean, var, weight, bias, saved, mask = ctx.saved_tensors
        engine, setting = formulas if again() else ctx.engine, _with_mask(ctx.setting, mask)
        needs = ctx.needs_input_grad
        dx, dweight, dbias, dresidual = engine.eval_backward(
            dy, x, mean, var, weight, bias, saved, setting, needs[3] or needs[4], needs[5]
        )
        return dx, None, None, dweight if needs[3] else None, dbias if needs[4] else None, dresidual, None


class TrainPooled(torch.autograd.Function):
    """Pool, merge over workers, tie to the running statistics, apply: apart, since something stands between."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Maybe,
        bias: Maybe,
        residual: Maybe,
        setting: Setting,
        anchor: Anchor | Recalled | None,
        among: Workers | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep x, the parameters, the residual and the statistics that normalised."""
        engine = engines.choose(x)
        batch = engine.moments(x, setting.mask, setting.splits)
        if among is not None:
            batch = workers.pool(batch, among)
        if isinstance(anchor, Recalled):
            anchor = anchor.of(batch)
        tied = tie(batch, anchor, setting.eps)
        y = engine.normalize(x, tied.mean, tied.var, weight, bias, residual, setting._replace(eps=0.0))
        ctx.engine, ctx.setting, ctx.among = engine, _with_mask(setting, None), among
        ctx.anchor = None if anchor is None else Anchor(*(_copy(item) for item in anchor))
        saved = _to_rebuild(y, residual, setting.activation)
        ctx.save_for_backward(x, weight, bias, residual, saved, setting.mask, batch.count, *tied)
        ctx.mark_non_differentiable(batch.count, batch.mean, batch.m2)
        ctx.set_materialize_grads(False)
        return y, batch.count, batch.mean, batch.m2

    @staticmethod
    def backward(ctx: Any, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
        """As `Train`'s, with the sums over all workers, and the correction's factors as constants [7, 8, 21]."""
        if dy is None:
            return (None,) * 7
        x, weight, bias, residual, saved, mask, count, *tied = ctx.saved_tensors
        setting = _with_mask(ctx.setting, mask)
        if again():
            inputs = (x, weight, bias, residual)
            return *_differentiable(dy, inputs, setting, ctx.anchor, ctx.among), None, None, None
        setting = setting._replace(eps=0.0)
        engine, tied = ctx.engine, Tied(*tied)
        given = (dy, x, tied.mean, tied.var, weight, bias, saved, setting)
        own = engine.backward_sums(*given)
        dweight = None if weight is None else own[1].sum(0).to(weight.dtype)
        dbias = None if bias is None else own[0].sum(0).to(bias.dtype)
        per_group = count.clamp(min=1).unsqueeze(1)
        sums = torch.cat(own, dim=1) if ctx.among is None else workers.total(own, ctx.among)
        mean_g, mean_g_xhat = (sums / per_group).chunk(2, dim=1)
        offset, slope = untie(mean_g, mean_g_xhat, tied, count, ctx.anchor)
        dx, dresidual = engine.input_gradient(*given, offset, slope, ctx.needs_input_grad[3])
        return dx, dweight, dbias, dresidual, None, None, None


# torch's own `apply` looks for dead wrappers of torch.func among the arguments, 3 of a small layer's 18 us.
# There are none: what torch.func wraps goes through the formulas.
_past_the_look: dict[type, Any] = {
    function: super(torch.autograd.Function, function).apply  # type: ignore[misc]  # mypy wants a literal class
    for function in (Train, Step, StepPooled, Infer, TrainPooled)
}


step = _past_the_look[Step]  # not for torch.compile


def apply(function: type[torch.autograd.Function], *given: Any) -> Any:
    """Apply one of the functions above."""
    return (function.apply if torch.compiler.is_compiling() else _past_the_look[function])(*given)


def train_pooled(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    setting: Setting,
    anchor: Anchor | Recalled | None,
    among: Workers | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `TrainPooled` computes, in differentiable torch."""
    if among is not None and (_of_torch_func() or forward_ad._current_level >= 0):
        raise NotImplementedError(
            "pooling over workers (process_group) does not run under torch.func (grad, jvp, vmap) or forward-mode "
            "differentiation; use torch.autograd.grad, with create_graph=True for higher derivatives"
        )
    batch = formulas.moments(x, setting.mask, setting.splits)
    if among is not None:
        batch = workers.pool_differentiably(batch, among)
    if isinstance(anchor, Recalled):
        anchor = anchor.of(batch)
    tied = tie(batch, anchor, setting.eps)
    y = formulas.normalize(x, tied.mean, tied.var, weight, bias, residual, setting._replace(eps=0.0))
    return y, batch.count, batch.mean, batch.m2


def _derived(
    dy: Tensor, x: Tensor, weight: Maybe, bias: Maybe, saved: Maybe, setting: Setting, needs_residual: bool
) -> tuple[Maybe, ...]:
    """Return the gradients of a training forward in differentiable torch, the batch's moments as functions of x."""
    batch = formulas.moments(x, setting.mask, setting.splits)
    given = (batch.count, batch.mean, batch.m2, weight, bias, saved, setting)
    dx, dweight, dbias, dresidual = formulas.train_backward(dy, x, *given, needs_residual)
    return dx, None if weight is None else dweight, None if bias is None else dbias, dresidual


def _differentiable(
    dy: Tensor,
    given: tuple[Tensor, Maybe, Maybe, Maybe],
    setting: Setting,
    anchor: Anchor | None,
    among: Workers | None,
) -> tuple[Maybe, ...]:
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        y = train_pooled(*given, setting, anchor, among)[0]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in given)


def _with_mask(setting: Setting, mask: Maybe) -> Setting:
    """Return the setting with this mask; it travels with the saved tensors, which watch over changes in place."""
    return setting if setting.mask is mask else setting._replace(mask=mask)


def _to_rebuild(y: Tensor, residual: Maybe, activation: int) -> Maybe:
    """Return what backward needs, besides x, to know the activation's slope; see `formulas._gradient_by_z`."""
    if residual is None or activation == IDENTITY.code:
        return None
    return y if TABLE[activation].sign_suffices else residual


def _copy(item: Any) -> Any:
    return item.clone() if isinstance(item, Tensor) else item
