"""Pooling over the workers of a process group: every worker gets the moments of all their batches together.

One message forward, 2 C + 1 numbers a worker, and one of 2 C backward. While the world is small each worker gathers
all messages and merges them in the order of ranks (math.md, eq. 5). In a large one, where a gathered message would
grow with the world, sums are reduced instead: first those that give the mean, then those about it (eq. 22), in two
messages of C + 1 and 2 C numbers. Either way all workers hold the same bits afterwards, nothing depends on what a
worker knew before, and the outcome is that of one process on the concatenated batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evenorm.moments import Moments, finite_start

Group = dist.ProcessGroup | str | None
Workers = dist.ProcessGroup  # those to pool with, more than this one

# Called with the workers and x before a layer pools, its arguments checked; see `verify`.
before_pooling: list[Callable[[Workers, Tensor], None]] = []


class Held:
    """A process group in a layer's state: copies share it, and pickles know it only if it is the world.

    Any other group means nothing outside the processes that made it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Hold the group."""
        self.group = group

    def __deepcopy__(self, memo: Any) -> Held:
        """Return the same group: a copy of a layer pools with the same workers."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the world by its name, and refuse any other group."""
        if self.group is dist.group.WORLD:
            return str, ("world",)
        raise TypeError(
            "a process_group belongs to the processes that made it and cannot be pickled; save the state_dict, or "
            "call evenorm.set_process_group(model, None) first and give the group again after loading"
        )


# Up to here gathering is taken. These messages are latency, not bandwidth: a ring gathers in W - 1 hops, two trees
# reduce in 4 log2 W, so that they meet at 16 workers; and a gathered merge has one order of sums for any backend
# (docs/guide/workers.md).
GATHER_UP_TO = 16


def few(workers: Workers) -> bool:
    """Tell whether the world is so small that messages are gathered."""
    return workers.size() <= GATHER_UP_TO


def check_group(group: object, name: str = "process_group") -> None:
    """Raise unless this is what a layer can be told to pool with."""
    outside: object = dist.GroupMember.NON_GROUP_MEMBER
    if group is outside:
        raise ValueError("this worker is not in the layer's process_group, as torch.distributed.new_group told it")
    if group is not None and not isinstance(group, dist.ProcessGroup) and group != "world":
        raise ValueError(f"{name} must be None, 'world' or a torch ProcessGroup, got {group!r}")


def among(group: Group, x: Tensor) -> Workers | None:
    """Return whom a layer is about to pool with, or None where this worker is alone; raises as `resolve`."""
    found = resolve(group, x)
    if found is not None:
        for look in before_pooling:
            look(found, x)
    return found


def resolve(group: Group, x: Tensor) -> Workers | None:
    """Return the torch group that can carry x between workers, or None where this worker is alone.

    Raises:
        ValueError: no group, torch.distributed is not initialised, this worker is not in the group, or the group's
            backend cannot send x.
    """
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup):
        check_group(group)
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "process_group needs torch.distributed to be initialised in training: call "
            "torch.distributed.init_process_group first, e.g. under torchrun"
        )
    found = dist.group.WORLD if isinstance(group, str) else group
    if found is None or dist.get_rank(found) < 0:
        raise ValueError(f"this worker, rank {dist.get_rank()} of the world, is not in the layer's process_group")
    if dist.get_world_size(found) == 1:
        return None
    if dist.get_backend(found) == "nccl" and x.device.type != "cuda":
        raise ValueError(f"the process_group's backend is NCCL, which sends CUDA tensors only; x is on {x.device}")
    return found


def pool(batch: Moments, workers: Workers) -> Moments:
    """Return the moments of all workers' batches together, as one group, (1, C), from those of this one, (1, C)."""
    if few(workers):
        return _merge(*split(gather(torch.cat([batch.count.unsqueeze(0), batch.mean, batch.m2], dim=1), workers)))
    batch = batch.pooled()
    count = batch.count.reshape(1)
    count, first = _summed(torch.cat([count, count * batch.mean]), workers).split([1, len(batch.mean)])
    start = finite_start(first / count.clamp(min=1))
    rest = _summed(_shifted(batch, start)[1:], workers)
    return _as_group(_unshifted(torch.cat([count, rest]), start))


def _merge(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Return what `Moments.pooled` does of W workers, (W, 1) and (W, C), as one group, in half as many operations.

    These are so small that their number is what they cost.
    """
    total = count.sum(0, keepdim=True)
    start = finite_start(mean.index_select(0, count[:, 0].argmax(0, keepdim=True)))
    away = mean - start
    step = (count * away).sum(0, keepdim=True) / total.clamp(min=1)
    rest = away - step
    return Moments(total[0], start + step, torch.addcmul(m2, count * rest, rest).sum(0, keepdim=True))


def pool_differentiably(batch: Moments, workers: Workers) -> Moments:
    """Return what `pool` returns, in a way that autograd can follow to every worker and back."""
    with torch.no_grad():  # the sums' start is a constant, of which the outcome does not depend
        start = finite_start(pool(batch, workers).mean[0])
    return _as_group(_unshifted(Sum.apply(_shifted(batch.pooled(), start), workers), start))


def total(sums: tuple[Tensor, Tensor], workers: Workers) -> Tensor:
    """Add up two tensors of (1, C) over the workers, in one message; return them side by side, (1, 2 C)."""
    message = torch.cat(sums, dim=1)
    if few(workers):  # in the order of ranks, hence the same bits in each run
        return gather(message, workers).sum(0, keepdim=True)
    return _summed(message, workers)


# What torch.distributed's function of that name calls in the end; torch 2.13 renamed it.
_DIRECT = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"


def gather(message: Tensor, workers: Workers) -> Tensor:
    """Return the vectors of all workers, (W, numbers), in the order of ranks, from this one's, (1, numbers)."""
    rows = message.new_empty((workers.size(), message.shape[1]))
    # torch 2.13 gave the operation a new name and warns of the old one.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    if torch.compiler.is_compiling():
        getattr(dist, name)(rows, message, group=workers)
        return rows
    try:
        if message.is_cpu:
            # torch's function would first check what is so, and keep a record: 10 to 50 us on a core that was idle.
            getattr(workers, _DIRECT)(rows, message).wait()
        else:
            getattr(dist, name)(rows, message, group=workers)
    except RuntimeError as error:
        raise _failed(error) from error
    return rows


def _summed(message: Tensor, workers: Workers) -> Tensor:
    """Add up the vectors of all workers, in place of this one's, and return it."""
    if torch.compiler.is_compiling():
        dist.all_reduce(message, group=workers)
        return message
    try:
        dist.all_reduce(message, group=workers)
    except RuntimeError as error:
        raise _failed(error) from error
    return message


def _failed(error: RuntimeError) -> RuntimeError:
    if torch._C._current_graph_task_id() != -1:
        return RuntimeError(
            f"pooling over workers failed in backward: {error}. If no worker died, not all of them went backward, "
            "or not through the same layers: what a layer pooled forward it pools backward, on all workers alike"
        )
    return RuntimeError(
        f"pooling over workers failed: {error}. If no worker died, they run different layers, or run them "
        "differently often: `with evenorm.verify_workers(model):` says which and where"
    )


class Sum(torch.autograd.Function):
    """The sum over workers, which all of them get; its gradient is the sum of what all of them send back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, workers: Workers) -> Tensor:
        """Add up the workers' values."""
        ctx.workers = workers
        return _summed(values.clone(), workers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Add up the workers' gradients, in a way that can be differentiated again."""
        return Sum.apply(gradient.contiguous(), ctx.workers), None


def _as_group(batch: Moments) -> Moments:
    return Moments(batch.count.reshape(1), batch.mean.unsqueeze(0), batch.m2.unsqueeze(0))


def split(message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a message's count, means and m2, or the shifted sums that stand in their places."""
    channels = (message.shape[-1] - 1) // 2
    count, first, second = message.split([1, channels, channels], dim=-1)
    return count, first, second


def _shifted(batch: Moments, start: Tensor) -> Tensor:
    """Return count, sum of (x - start) and sum of its squares: what adds up over workers [22]."""
    away = batch.mean - start
    step = batch.count * away  # 0 of an empty batch, however far away
    return torch.cat([batch.count.reshape(1), step, batch.m2 + step * away])


def _unshifted(sums: Tensor, start: Tensor) -> Moments:
    """Return the moments from shifted sums [22]."""
    count, first, second = split(sums)
    per_count = count.clamp(min=1)
    return Moments(count[0], start + first / per_count, (second - first.square() / per_count).clamp(min=0))
