"""When and how running statistics change: the only place that writes to them.

Besides the layers' own commits, `no_update` holds them back for a whole network and `one_update` gathers them. A
batch's moments enter the running statistics with the weight that the layer's average gives them, channel by
channel, and only where the outcome is finite. All is decided on the device, without asking the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from evenorm import engines, formulas
from evenorm.averages import Average, Cumulative, Window
from evenorm.moments import Moments

_CHECK_FINITE = "(Tensor(a!) nonfinite, Tensor mean, Tensor m2, str layer) -> ()"


class Running(NamedTuple):
    """The buffers that a layer keeps for its running statistics; those that it lacks are None."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None = None  # how many batches have been committed
    window_mean: Tensor | None = None
    window_var: Tensor | None = None
    nonfinite: Tensor | None = None  # how many batches some channel had to leave out


def recomputing() -> bool:
    """Tell whether this forward runs inside a backward, as activation checkpointing's recomputation does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def commit_(running: Running, batch: Moments, average: Average, *, skip_nonfinite: bool = True) -> None:
    """Let one batch enter the running statistics, in place (math.md, eq. 10 and 11).

    Nothing changes where the batch holds fewer than two values per channel, for which there is no unbiased
    variance, nor, if `skip_nonfinite`, in channels where the outcome would not be finite.
    """
    if _is(_vmapped, batch.mean) and not _is(_vmapped, running.mean):
        raise ValueError(
            "vmap cannot update running statistics that its samples share; hold them back with "
            "evenorm.no_update(model) or eval(), or give each its own by functional_call with stacked buffers"
        )
    if _is(_functionalized, batch.mean) and not _is(_functionalized, running.mean):
        raise ValueError(
            "functionalize cannot update running statistics that are not among its arguments; hand the buffers in "
            "by functional_call, or hold them back with evenorm.no_update(model) or eval()"
        )
    if running.nonfinite is not None and _is(_vmapped, running.mean) and not _is(_vmapped, running.nonfinite):
        running = running._replace(nonfinite=None)  # stacked state_dicts have no such counter: all would share it
    engine = engines.choose(running.mean)
    plainly = engine is formulas or isinstance(average, Window) or not counts_in_long(running.batches)
    if not plainly and not _rewritten():
        # One call in place of a dozen small operations, which would cost more than a small layer's kernels.
        mean, var, batches, _, _, nonfinite = running
        engine.track_(mean, var, batches, batch, *weight(average), skip_nonfinite, nonfinite)
    else:
        _commit_plainly_(running, batch.pooled(), average, skip_nonfinite)


def counts_in_long(batches: Tensor | None) -> bool:
    """Tell whether a layer's counter is as torch makes it, which is all that engines take."""
    return batches is None or batches.dtype is torch.long


def weight(average: Average) -> tuple[float, bool]:
    """Return momentum and debias as an engine takes them: NaN is what it calls cumulative."""
    assert not isinstance(average, Window)  # which has to remember, and so is no weight
    return (math.nan, False) if isinstance(average, Cumulative) else (average.momentum, average.debias)


@torch.no_grad()
def _commit_plainly_(running: Running, batch: Moments, average: Average, skip_nonfinite: bool) -> None:
    """Do what `commit_` does, in plain torch: its definition, and the way on other devices and for windows."""
    counts = batch.count > 1
    number = None if running.batches is None else running.batches + 1
    new = (batch.mean, batch.variance(correction=1))
    if isinstance(average, Window):
        moved, fine = _slide_(running, new, average.size, counts, number, skip_nonfinite)
    else:
        weight = average.weight(number)
        moved = (_step(running.mean, new[0], weight), _step(running.var, new[1], weight))
        fine = _finite(moved)
    allowed = counts & fine if skip_nonfinite else counts
    running.mean.copy_(torch.where(allowed, moved[0], running.mean))
    running.var.copy_(torch.where(allowed, moved[1], running.var))
    if running.batches is not None:  # a batch that no channel took does not count
        running.batches.add_(counts & fine.any() if skip_nonfinite else counts)
    if running.nonfinite is not None and skip_nonfinite:
        running.nonfinite.add_(counts & ~fine.all())


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Let forwards inside the block change no running statistics: a second forward, a probe, a graph capture.

    Everything else stays as it is: layers in training mode still normalise by their batch. Takes batch norm of any
    make and restores each layer when the block ends, however it ends; blocks may be nested. The layers carry it as
    ``track_running_stats=False``, so a copy made inside the block keeps that.

    Raises:
        ValueError: a lazy layer has not seen its first input, by which torch makes the statistics it tracks.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3)
    >>> with evenorm.no_update(layer):
    ...     _ = layer(torch.randn(8, 3))
    >>> layer.num_batches_tracked.item()
    0
    """
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, layer in named:
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            found = f"{name or 'the model'} ({type(layer).__name__})"
            raise ValueError(f"no_update: {found} makes its statistics at its first input; run one forward first")
    tracking = [layer for _, layer in named if layer.track_running_stats]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@contextmanager
def one_update(model: nn.Module) -> Iterator[None]:
    """Let all forwards inside the block count as ONE batch: the micro-batches of one optimizer step.

    Their moments are merged exactly, and enter the running statistics when the block ends, with one momentum step
    and one count. If the block raises, nothing enters. Normalisation itself still uses each micro-batch's own
    statistics: no gradient can flow to micro-batches whose graphs are gone. Blocks inside the block add nothing.

    Raises:
        ValueError: the network holds batch norm that is not evenorm's, which commits each forward by itself.

    >>> import torch, evenorm
    >>> layer, batch = evenorm.BatchNorm1d(3, momentum=1.0), torch.randn(8, 3)
    >>> with evenorm.one_update(layer):
    ...     for part in batch.split([2, 3, 3]):
    ...         _ = layer(part)
    >>> torch.testing.assert_close(layer.running_var, batch.var(0))
    >>> layer.num_batches_tracked.item()
    1
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, layer in layers:
        if not isinstance(layer, Gathering):
            found = f"{type(layer).__module__}.{type(layer).__name__}"
            raise ValueError(
                f"one_update needs evenorm's layers, {name or 'the model'} is {found}; convert it first"
            )
    gathering = [layer for _, layer in layers if isinstance(layer, Gathering) and not layer.gathers]
    for layer in gathering:
        layer.gathers = True
    try:
        yield
        for layer in gathering:
            layer.finish_step_()
    finally:
        for layer in gathering:
            layer.gathers, layer.step = False, None


@runtime_checkable
class Gathering(Protocol):
    """A layer that can put several batches together before it commits them."""

    gathers: bool
    step: Moments | None

    def finish_step_(self) -> None:
        """Commit what was gathered."""


@torch.library.custom_op("evenorm::check_finite_", mutates_args=("nonfinite",), schema=_CHECK_FINITE)
def check_finite_(nonfinite: Tensor, mean: Tensor, m2: Tensor, layer: str) -> None:
    """Raise if a channel holds NaN or inf. Asks the host; for `on_nonfinite="raise"` only.

    An operator, since torch.compile cannot look at values. It says that it changes the counter, which it does not:
    a compiler drops what neither changes nor returns anything.
    """
    bad = (~_finite((mean, m2))).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"{layer}: the batch holds NaN or inf in channel {shown}; its running statistics were left alone"
        )


def require_finite(buffer: Tensor, batch: Moments, layer: str) -> None:
    """Raise as `check_finite_` does, which says that it changes a buffer; for all transforms that show values."""
    if any(_is(wrapped, part) for wrapped in (_vmapped, _functionalized) for part in (buffer, batch.mean)):
        raise ValueError(
            f"{layer}: on_nonfinite='raise' looks at values, which vmap and functionalize do not show; set it to "
            "'skip', or hold the update back with evenorm.no_update(model)"
        )
    check_finite_(buffer, batch.mean.detach(), batch.m2.detach(), layer)


def _rewritten() -> bool:
    """Tell whether vmap or functionalize puts other operations in place of ours, for which an engine has none."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    kinds = torch._C._functorch.TransformType
    active = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() in (kinds.Vmap, kinds.Functionalize) for one in active)


_vmapped, _functionalized = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_functionaltensor


def _is(wrapped: Callable[[Tensor], bool], statistic: Tensor) -> bool:
    """Tell whether a transform has wrapped a statistic so, under whatever others."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(statistic):
        if wrapped(statistic):
            return True
        statistic = torch._C._functorch.get_unwrapped(statistic)
    return False


def _step(old: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    # Not old + weight * (new - old), which a weight of 1 does not make new where old is far away.
    return ((1 - weight) * old.to(new.dtype) + weight * new).to(old.dtype)


def _finite(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.isfinite(pair[0]) & torch.isfinite(pair[1])


def _slide_(
    running: Running, new: tuple[Tensor, Tensor], size: int, counts: Tensor, number: Tensor | None, skip: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Put the batch into its slot of the window, in place.

    Returns the means over the slots in use, and in which channels the batch is finite. One that is to be skipped
    leaves its channel's slot as it is, or as good as empty, with the mean of the others, where it never held one.
    """
    if running.window_mean is None or running.window_var is None or number is None:
        return (running.mean, running.var), torch.zeros_like(counts)
    window = (running.window_mean, running.window_var)
    entry = (new[0].to(running.mean.dtype), new[1].to(running.var.dtype))
    fine = _finite(entry)
    slots = torch.arange(size, device=counts.device).unsqueeze(1)
    here = counts & (slots == (number - 1) % size)
    if skip:
        here = here & fine.any()
    for slot, value, old in zip(window, entry, (running.mean, running.var), strict=True):
        kept = torch.where(number > size, slot, old)
        slot.copy_(torch.where(here, torch.where(fine, value, kept) if skip else value, slot))
    in_use = slots < number
    means = [torch.where(in_use, slot.double(), 0).sum(0) / in_use.sum() for slot in window]
    return (means[0].to(running.mean.dtype), means[1].to(running.var.dtype)), fine
