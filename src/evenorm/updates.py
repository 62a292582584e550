"""When and how running statistics change: the only place that writes to them.

Besides the layers' own commits, `no_update` holds them back for a whole network and `one_update` gathers them. A
batch's moments enter the running statistics with the weight that the layer's average gives them, channel by
channel, and only where the outcome is finite. All is decided on the device, without asking the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from evenorm.averages import Average, Cumulative, Window
from evenorm.engines import cpu
from evenorm.moments import Moments


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


@torch.no_grad()
def commit_(running: Running, batch: Moments, average: Average, *, skip_nonfinite: bool = True) -> None:
    """Let one batch enter the running statistics, in place (math.md, eq. 10 and 11).

    Nothing changes where the batch holds fewer than two values per channel, for which there is no unbiased
    variance, nor, if `skip_nonfinite`, in channels where the outcome would not be finite.
    """
    if cpu.supports(running.mean) and not isinstance(average, Window):
        # One call in place of a dozen small operations: at small sizes they would cost more than the kernels.
        momentum, debias = (math.nan, False) if isinstance(average, Cumulative) else astuple(average)
        tracked = running.mean, running.var, running.batches
        cpu.track_(*tracked, batch, momentum, debias, skip_nonfinite, running.nonfinite)
        return
    batch = batch.pooled()
    counts = batch.count > 1
    if running.batches is not None:
        running.batches.add_(counts)
    new = (batch.mean, batch.variance(correction=1))
    if isinstance(average, Window):
        moved = _slide_(running, new, average.size, counts, skip_nonfinite)
    else:
        weight = average.weight(running.batches)
        moved = (_step(running.mean, new[0], weight), _step(running.var, new[1], weight))
    allowed = counts
    if skip_nonfinite:
        finite = _finite(moved)
        allowed = counts & finite
        if running.nonfinite is not None:
            running.nonfinite.add_(counts & ~finite.all())
    running.mean.copy_(torch.where(allowed, moved[0], running.mean))
    running.var.copy_(torch.where(allowed, moved[1], running.var))


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Let forwards inside the block change no running statistics: a second forward, a probe, a graph capture.

    Everything else stays as it is: layers in training mode still normalise by their batch. Takes batch norm of any
    make and restores each layer when the block ends, however it ends; blocks may be nested.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3)
    >>> with evenorm.no_update(layer):
    ...     _ = layer(torch.randn(8, 3))
    >>> layer.num_batches_tracked.item()
    0
    """
    tracking = [
        module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats
    ]
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


def check_finite(batch: Moments, layer: str) -> None:
    """Raise if a channel holds NaN or inf. Asks the host; for `on_nonfinite="raise"` only."""
    bad = (~_finite((batch.mean, batch.m2))).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"{layer}: the batch holds NaN or inf in channel {shown}; its running statistics were left alone"
        )


def _step(old: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    return (old + weight * (new - old)).to(old.dtype)


def _finite(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.isfinite(pair[0]) & torch.isfinite(pair[1])


def _slide_(
    running: Running, new: tuple[Tensor, Tensor], size: int, counts: Tensor, skip_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """Put the batch into its slot of the window, in place, and return the means over the slots in use."""
    if running.window_mean is None or running.window_var is None or running.batches is None:
        return running.mean, running.var
    window = (running.window_mean, running.window_var)
    entry = (new[0].to(running.mean.dtype), new[1].to(running.var.dtype))
    if skip_nonfinite:  # a channel that must not count repeats its running value, which moves nothing
        fine = _finite(entry)
        entry = (torch.where(fine, entry[0], running.mean), torch.where(fine, entry[1], running.var))
    slots = torch.arange(size, device=counts.device).unsqueeze(1)
    here = counts & (slots == (running.batches - 1) % size)
    in_use = slots < running.batches
    for slot, value in zip(window, entry, strict=True):
        slot.copy_(torch.where(here, value, slot))
    means = [torch.where(in_use, slot.double(), 0).sum(0) / in_use.sum().clamp(min=1) for slot in window]
    return means[0].to(running.mean.dtype), means[1].to(running.var.dtype)
