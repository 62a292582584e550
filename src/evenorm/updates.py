"""When and how running statistics change: the only place that writes to them.

A batch's moments enter the running statistics with the weight that the layer's average gives them, channel by
channel, and only where the outcome is finite. All is decided on the device, without asking the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from evenorm.averages import Average, Window
from evenorm.moments import Moments


class Running(NamedTuple):
    """The buffers that a layer keeps for its running statistics; those that it lacks are None."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None = None  # how many batches have been committed
    window_mean: Tensor | None = None
    window_var: Tensor | None = None


def recomputing() -> bool:
    """Tell whether this forward runs inside a backward, as activation checkpointing's recomputation does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def commit_(running: Running, batch: Moments, average: Average, *, skip_nonfinite: bool = True) -> None:
    """Let one batch enter the running statistics, in place (math.md, eq. 10 and 11).

    Nothing changes where the batch holds fewer than two values per channel, for which there is no unbiased
    variance, nor, if `skip_nonfinite`, in channels where the outcome would not be finite.
    """
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
    allowed = counts & _finite(moved) if skip_nonfinite else counts
    running.mean.copy_(torch.where(allowed, moved[0], running.mean))
    running.var.copy_(torch.where(allowed, moved[1], running.var))


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
