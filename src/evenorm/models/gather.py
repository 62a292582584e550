"""What calibration gathers while data run through a network, without a hook and without touching a buffer.

Every batch norm that torch or evenorm computes is a call of one of a few functions, to which a layer hands its
running statistics. So the calls are watched, a layer is recognised by the very tensor it hands over, and the call
goes on with other statistics in its place: the batch's own, or those that are known already. That sees what a
layer really normalises, also where a subclass transposes first or a network calls the function itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from evenorm import engines, functional
from evenorm.models.batches import DataError
from evenorm.moments import Moments
from evenorm.workers import Group, resolve

# How many batches wait until they are merged at once: merging costs as much as a small layer's whole forward, and
# waiting costs 3 numbers a channel and batch.
MERGE_EVERY = 32

ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    functional.infer: tuple(inspect.signature(functional.infer).parameters),
    nn.functional.batch_norm: tuple(inspect.signature(nn.functional.batch_norm).parameters),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}
RENAMED = {"mean": "running_mean", "var": "running_var", "x": "input"}  # evenorm's names to torch's


@dataclass(frozen=True, eq=False)
class Gathered:
    """What one layer has been given; ``a + b`` merges.

    Args:
        values: the moments of all values.
        means: the moments of the batches' means, where a mean weighs the square of its batch's count: the variance
            of a weighted mean is the sum of these.
        samples: the rows of its inputs; a row without a valid position is none.
        batches: how many batches, a batch that reached the layer twice being two.
    """

    values: Moments
    means: Moments
    samples: int
    batches: int

    def __add__(self, other: Gathered) -> Gathered:
        """Merge with what was gathered of other batches."""
        return Gathered(
            self.values + other.values,
            self.means + other.means,
            self.samples + other.samples,
            self.batches + other.batches,
        )

    def standard_error(self) -> Tensor | None:
        """Return the standard error of the mean, (C,), by how batches differ; None where there is one only.

        Values of one batch may depend on each other, neighbouring pixels do; batches are taken as independent.
        """
        if self.batches < 2:
            return None
        spread = self.means.m2 + self.means.count * (self.means.mean - self.values.mean).square()
        return (spread * self.batches / (self.batches - 1)).sqrt() / self.values.count


class Watch(TorchFunctionMode):
    """While entered, gather what the layers are given, and choose what they normalise by."""

    def __init__(self, layers: Mapping[str, _BatchNorm], gather: Sequence[str]) -> None:
        """Take the layers by name, and the names of those to gather from."""
        super().__init__()
        self.names = {id(layer.running_mean): name for name, layer in layers.items()}
        self.gather = frozenset(gather)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}  # mean and variance to normalise by, if not the batch's
        self.found: dict[str, Gathered] = {}  # in the order in which the layers were first reached
        self.waiting: dict[str, list[tuple[Moments, int, int]]] = {}  # moments, samples, number of the batch
        self.batch = 0  # the number of the batch that is under way, from 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let every call pass, but for the batch norm of the layers."""
        if func not in ARGUMENTS:
            return func(*args, **(kwargs or {}))
        given = dict(zip(ARGUMENTS[func], args, strict=False)) | (kwargs or {})
        standard = {RENAMED.get(key, key): value for key, value in given.items()}
        name = self.names.get(id(standard.get("running_mean")))
        x = standard["input"]
        if name is None or not _fits(x, standard["running_mean"]):
            return func(*args, **(kwargs or {}))  # which says what does not fit
        mean, var = self._see(name, x, standard.get("mask"))
        # Copies: a layer that is in training whatever its mode writes to what it is given.
        standard["running_mean"] = mean.to(standard["running_mean"].dtype, copy=True)
        standard["running_var"] = var.to(standard["running_var"].dtype, copy=True)
        return func(**{key: standard[RENAMED.get(key, key)] for key in given})

    def _see(self, name: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gather x, if that is wanted, and return what normalises it."""
        wanted = name in self.gather
        if not wanted and name in self.known:
            return self.known[name]
        batch = engines.choose(x).moments(x, mask)
        if wanted:
            samples = x.shape[0] if mask is None else int(mask.reshape(len(mask), -1).any(1).sum())
            waiting = self.waiting.setdefault(name, [])
            waiting.append((batch, samples, self.batch))
            if len(waiting) >= MERGE_EVERY:
                self.merge(name)
        if name in self.known:
            return self.known[name]
        count = int(batch.count) if mask is not None else x.numel() // x.shape[1]
        if count == 1:  # it has no variance; those gathered so far have
            total = self.merge(name).values
            if total.count < 2:
                raise DataError(
                    f"{name}: the first batch has one value per channel, which has no variance to normalise by; "
                    "give larger batches"
                )
            return total.mean, total.variance()
        return batch.mean[0], batch.m2[0] / max(count, 1)

    def merge(self, name: str) -> Gathered:
        """Merge the batches that wait, and return all that the layer was given so far.

        Raises:
            ValueError: a value was NaN or inf, naming the layer and the batch.
        """
        waiting = self.waiting.get(name)
        if waiting:
            batches, samples, numbers = zip(*waiting, strict=True)
            values = Moments(*(torch.cat(parts) for parts in zip(*map(_fields, batches), strict=True)))
            check_finite(name, values, numbers)
            means = Moments(values.count.square(), values.mean, torch.zeros_like(values.m2))
            new = Gathered(values.pooled(), means.pooled(), sum(samples), len(batches))
            self.found[name] = self.found[name] + new if name in self.found else new
            waiting.clear()
        return self.found[name]

    def merge_all(self) -> dict[str, Gathered]:
        """Merge all that waits; return what each layer was given, in the order in which they were reached."""
        return {name: self.merge(name) for name in self.waiting}


def check_finite(name: str, batches: Moments, numbers: Sequence[int]) -> None:
    """Raise if one of some batches, (B, C), held NaN or inf; m2 shows either. `numbers` are the batches' own."""
    bad = ~torch.isfinite(batches.m2)
    if bad.any():
        where, channel = (int(index) for index in bad.nonzero()[0])
        raise DataError(
            f"{name}: its input holds NaN or inf in channel {channel} of batch {numbers[where]}, counted from 0; "
            "nothing was changed"
        )


def over_workers(
    found: dict[str, Gathered], layers: Mapping[str, _BatchNorm], group: Group, batches: int, failed: bool
) -> tuple[dict[str, Gathered], int]:
    """Merge what each worker has gathered, by one message: the same bits on all, in an order all agree on.

    Returns:
        What the layers were given on all workers, and the batches of all.

    Raises:
        ValueError: another worker has failed; this one has to stop as well.
    """
    first = _mean(next(iter(layers.values())))
    resolved = resolve(group, first)
    if resolved is None:
        return found, batches
    device = first.device if dist.get_backend(resolved) == "nccl" else torch.device("cpu")
    message = torch.cat([torch.tensor([failed, batches], dtype=torch.float64), *_pack(found, layers)]).to(device)
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(resolved))]
    dist.all_gather(messages, message, group=resolved)
    ranks = [message.cpu() for message in messages]
    bad = [str(rank) for rank, (failed_there, *_) in enumerate(ranks) if failed_there]
    if bad and not failed:
        raise ValueError(f"worker {', '.join(bad)} failed, see its own error; nothing was changed on any worker")
    return _unpack(ranks, layers), int(sum(rank[1] for rank in ranks))


def _fields(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    return moments.count, moments.mean, moments.m2


def _fits(x: Tensor, running_mean: Tensor) -> bool:
    """Tell whether x, (N, C, *positions), is what a layer with these statistics can take."""
    return x.is_floating_point() and x.dim() >= 2 and x.shape[1] == running_mean.numel()


def _pack(found: dict[str, Gathered], layers: Mapping[str, _BatchNorm]) -> list[Tensor]:
    """Lay out, layer by layer: its place in the order reached or -1, four counts, four rows of C numbers."""
    order = list(found)
    parts = []
    for name, layer in layers.items():
        if name not in found:
            parts.append(torch.full((5 + 4 * layer.num_features,), -1.0, dtype=torch.float64))
            continue
        one = found[name]
        counts = [order.index(name), one.samples, one.batches, float(one.values.count), float(one.means.count)]
        parts.append(torch.tensor(counts, dtype=torch.float64))
        parts += [part.detach().cpu().double() for part in (one.values.mean, one.values.m2)]
        parts += [part.detach().cpu().double() for part in (one.means.mean, one.means.m2)]
    return parts


def _unpack(ranks: Sequence[Tensor], layers: Mapping[str, _BatchNorm]) -> dict[str, Gathered]:
    """Merge the workers' messages in the order of ranks, laid out as `_pack` says."""
    merged: dict[str, tuple[float, Gathered]] = {}
    start = 2
    for name, layer in layers.items():
        channels = layer.num_features
        for rank in ranks:
            counts, numbers = rank[start : start + 5], rank[start + 5 : start + 5 + 4 * channels]
            place = float(counts[0])
            if place < 0:
                continue
            mean, m2, mean_of_means, m2_of_means = numbers.view(4, channels)
            values, means = Moments(counts[3], mean, m2), Moments(counts[4], mean_of_means, m2_of_means)
            one = Gathered(values, means, int(counts[1]), int(counts[2]))
            before = merged.get(name)
            merged[name] = (place, one) if before is None else (min(before[0], place), before[1] + one)
        start += 5 + 4 * channels
    device = {name: _mean(layer).device for name, layer in layers.items()}
    in_order = sorted(merged, key=lambda name: merged[name][0])  # stable: ties keep the layers' own order
    return {name: _on(merged[name][1], device[name]) for name in in_order}


def _mean(layer: _BatchNorm) -> Tensor:
    assert layer.running_mean is not None  # layers without statistics are not gathered
    return layer.running_mean


def _on(gathered: Gathered, device: torch.device) -> Gathered:
    values, means = (
        Moments(part.count.to(device), part.mean.to(device), part.m2.to(device))
        for part in (gathered.values, gathered.means)
    )
    return Gathered(values, means, gathered.samples, gathered.batches)
