"""Whole networks over many workers: choose with whom to pool, and make their running statistics one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm import workers
from evenorm.models.adopt import adopt_, why_not_ours
from evenorm.models.merge import merge_statistics
from evenorm.workers import Group


def set_process_group(model: nn.Module, group: Group) -> nn.Module:
    """Pool every batch norm layer of a network over these workers, in place.

    torch.nn's layers become evenorm's first, as `convert` makes them. `None` ends the pooling.

    Args:
        model: a network, or a single layer.
        group: "world", a torch ProcessGroup, or None.

    Returns:
        The same model.

    Raises:
        ValueError: a layer that cannot be one of ours, or one that normalises virtual batches; nothing is changed.

    >>> import torch, evenorm
    >>> model = evenorm.set_process_group(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), "world")
    >>> model[0]
    BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, process_group=world)
    """
    workers.check_group(group, "group")
    found = [(name or "the model", layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in found:
        reason = why_not_ours(layer)
        if reason:
            raise ValueError(f"{name} cannot pool over workers: {reason}")
        if group is not None and getattr(layer, "virtual_batch_size", None) is not None:
            raise ValueError(f"{name} splits its batch (virtual_batch_size), so it cannot join it with others")
    for name, layer in found:
        ours = adopt_(layer)
        assert ours is not None
        ours.process_group, ours.name = group, ours.name or name
    return model


@torch.no_grad()
def pool_running_statistics_(model: nn.Module, group: Group = "world") -> nn.Module:
    """Make the running statistics of all workers one, in place: for networks whose layers did not pool.

    Means are averaged over the workers; variances get the variance between the workers' means on top, as in
    `merge_statistics`. Call it on every worker, before evaluation or saving.

    Args:
        model: the network, the same on every worker.
        group: the workers: "world" or a torch ProcessGroup; alone, nothing changes.

    Returns:
        The same model.

    Raises:
        ValueError: torch.distributed is not initialised, this worker is not in the group, or statistics of a worker
            that hold NaN or inf; nothing is changed on any worker.

    Note:
        A layer with ``average=Window`` then remembers the pooled statistics in all its places, as one does that
        loads a checkpoint without a window.

    >>> import torch, evenorm  # under torchrun: evenorm.pool_running_statistics_(model)
    >>> evenorm.pool_running_statistics_(torch.nn.BatchNorm1d(3), None)
    BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    entries = _statistics(model)
    if not entries:
        return model
    for name, value in merged_over_workers(entries, group).items():
        entries[name].copy_(value)
    for layer in model.modules():
        for name, window in layer.named_buffers(recurse=False):
            if isinstance(layer, _BatchNorm) and name.startswith("window_"):
                window.copy_(layer.get_buffer(name.replace("window", "running")))
    return model


def merged_over_workers(statistics: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return what `merge_statistics` makes of these entries of a state_dict, on all workers the same bits."""
    among = workers.resolve(group, next(iter(statistics.values())))
    if among is None:
        return statistics
    message = torch.cat([entry.double().reshape(-1) for entry in statistics.values()])
    if dist.get_backend(among) != "nccl":
        message = message.cpu()  # which any other backend can send
    states = [_unpack(row, statistics) for row in workers.gather(message.unsqueeze(0), among)]
    for rank, state in zip(dist.get_process_group_ranks(among), states, strict=True):
        for name, value in state.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{name} of rank {rank} holds NaN or inf; calibrate the network, or load a checkpoint, there "
                    "first; nothing was changed on any worker"
                )
    return merge_statistics(states)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics and counters of a network by their names in its state_dict."""
    found = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _unpack(message: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = message.split([entry.numel() for entry in like.values()])
    return {
        name: part.reshape(entry.shape).to(entry) for (name, entry), part in zip(like.items(), parts, strict=True)
    }
