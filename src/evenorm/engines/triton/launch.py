"""One function a kernel: the memory it writes, its arguments, its launch. Nothing asks the device for anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evenorm.engines.triton import backward, forward, track
from evenorm.engines.triton.plan import Plan, divide_up, make_merge, make_plan
from evenorm.engines.triton.start import start

Maybe = Tensor | None
Context = contextlib.AbstractContextManager[Any]
EXPONENTIAL, DEBIASED, CUMULATIVE = 0, 1, 2  # what track_kernel is compiled for
TRACKED_TOGETHER = 1024  # channels


class Input(NamedTuple):
    """An input in memory's order, what fits it, and how it is cut."""

    x: Tensor
    plan: Plan
    mask: Maybe  # uint8
    channels_last: bool

    def like(self, other: Maybe) -> Maybe:
        """Return a tensor of x's shape in x's layout; a copy where it has another."""
        if other is None:
            return None
        if self.channels_last:
            return other if _is_channels_last(other) else torch.empty_like(self.x).copy_(other)
        return other.contiguous()


class Affine(NamedTuple):
    """What normalises: statistics, (C,) or (G, C), and parameters (C,). With a number of values, var holds m2."""

    mean: Tensor
    var: Tensor
    number: Maybe
    weight: Maybe
    bias: Maybe

    @property
    def stride(self) -> int:
        """How far apart the statistics of two groups are."""
        return self.mean.shape[1] if self.mean.dim() == 2 else 0

    def contiguous(self) -> Affine:
        """Return the same without gaps, as the kernels read it."""
        return Affine(*(None if t is None else t.contiguous() for t in self))  # type: ignore[arg-type]  # None stays at its place


class Curve(NamedTuple):
    """What is done with z, and eps; in the kernels' order."""

    eps: float
    parameter: float
    code: int


def arrange(x: Tensor, mask: Maybe, splits: Sequence[int] | None, *others: Maybe, twice: bool = False) -> Input:
    """Look at an input's layout; one with gaps is copied. What comes along must be on x's device.

    `twice`: the operation reads x twice, so that it should stay on the chip between the two.
    """
    require_device(x, mask, *others)
    samples, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    channels_last = not x.is_contiguous() and _is_channels_last(x)
    if not channels_last:
        x = x.contiguous()
    rows = channels_last or positions == 1
    groups = 1 if splits is None else len(splits)
    plan = make_plan(samples, channels, positions, rows, groups, x.itemsize, twice)
    return Input(x, plan, None if mask is None else mask.contiguous().view(torch.uint8), channels_last)


def require_device(x: Tensor, *others: Maybe) -> None:
    """Raise unless all tensors are on x's device."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"all tensors must be on x's device, {x.device}; one is on {other.device}")


def on_device(x: Tensor) -> Context:
    """Return a context in which Triton launches on x's device: that is the current one."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def pool(given: Input) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (G,), mean and m2 (G, C)."""
    plan = given.plan
    found = _memory(given, plan.groups * plan.chunks)
    tensors = (given.x, given.mask, *found)
    start(forward.pool_kernel, plan.programs, tensors, (*plan.sizes, *plan.cut), plan.blocking, plan.warps)
    chunks = plan.chunks
    while chunks > 1:
        merge = make_merge(plan.channels, chunks)
        parts, chunks = found, divide_up(chunks, merge.block_p)
        found = _memory(given, plan.groups * chunks)
        programs = plan.groups * chunks * divide_up(plan.channels, merge.block_c)
        sizes = plan.channels, len(parts[0]) // plan.groups
        start(forward.merge_kernel, programs, (*parts, *found), sizes, merge.blocking, merge.warps)
    return found


def normalize(given: Input, by: Affine, residual: Maybe, curve: Curve) -> Tensor:
    """Return y."""
    y, plan, by = torch.empty_like(given.x), given.plan.finely, by.contiguous()
    start(
        forward.normalize_kernel,
        plan.programs,
        (given.x, given.mask, *by, given.like(residual), y),
        (*plan.sizes, *plan.cut, by.stride, curve.eps, curve.parameter),
        (curve.code, *plan.blocking),
        plan.warps,
    )
    return y


def pool_and_normalize(
    given: Input, weight: Maybe, bias: Maybe, residual: Maybe, curve: Curve
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, count, mean and m2 of an input whose channels are one tile each."""
    y, plan = torch.empty_like(given.x), given.plan
    found = _memory(given, plan.groups)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    start(
        forward.train_kernel,
        plan.programs,
        (given.x, given.mask, weight, bias, given.like(residual), y, *found),
        (*plan.sizes, curve.eps, curve.parameter),
        (curve.code, *plan.blocking),
        plan.warps,
    )
    return y, *found


def sums(
    given: Input, dy: Tensor, by: Affine, saved: Maybe, curve: Curve, dx: Maybe = None, dresidual: Maybe = None
) -> Tensor:
    """Return sum g and sum g * xhat of each chunk, (2, P, C); write the gradients of fixed statistics too."""
    plan, by = given.plan, by.contiguous()
    parts = given.x.new_empty((2, plan.groups * plan.chunks, plan.channels), dtype=torch.float64)
    start(
        backward.sums_kernel,
        plan.programs,
        (given.like(dy), given.x, given.mask, *by, given.like(saved), parts[0], parts[1], dx, dresidual),
        (*plan.sizes, *plan.cut, by.stride, curve.eps, curve.parameter),
        (curve.code, *plan.blocking),
        plan.warps,
    )
    return parts


def merge_sums(plan: Plan, parts: Tensor, sum_g: Maybe, sum_g_xhat: Maybe, dweight: Maybe, dbias: Maybe) -> None:
    """Add up what the chunks hold: into sums of groups, (G, C), and into the parameters' gradients, (C,)."""
    chunks = parts.shape[1] // plan.groups
    merge = make_merge(plan.channels, chunks, sums=True)
    start(
        backward.merge_sums_kernel,
        divide_up(plan.channels, merge.block_c),
        (parts[0], parts[1], sum_g, sum_g_xhat, dweight, dbias),
        (plan.channels, chunks, plan.groups),
        merge.blocking,
        merge.warps,
    )


def gradient(
    given: Input,
    dy: Tensor,
    by: Affine,
    saved: Maybe,
    curve: Curve,
    offset: Maybe,
    slope: Maybe,
    needs_residual: bool,
) -> tuple[Tensor, Maybe]:
    """Return dx, and g where the residual needs it. With a count, offset and slope are sums."""
    plan, by = given.plan.finely, by.contiguous()
    dx = torch.empty_like(given.x)
    dresidual = torch.empty_like(given.x) if needs_residual else None
    offset, slope = (None if t is None else t.contiguous() for t in (offset, slope))
    start(
        backward.gradient_kernel,
        plan.programs,
        (given.like(dy), given.x, given.mask, *by, given.like(saved), offset, slope, dx, dresidual),
        (*plan.sizes, *plan.cut, by.stride, curve.eps, curve.parameter),
        (curve.code, *plan.blocking),
        plan.warps,
    )
    return dx, dresidual


def sums_and_gradient(
    given: Input,
    dy: Tensor,
    by: Affine,
    saved: Maybe,
    curve: Curve,
    dweight: Tensor,
    dbias: Tensor,
    needs_residual: bool,
) -> tuple[Tensor, Maybe]:
    """Return dx, and g where needed, of an input whose channels are one tile each; write dweight and dbias."""
    plan, by = given.plan, by.contiguous()
    dx = torch.empty_like(given.x)
    dresidual = torch.empty_like(given.x) if needs_residual else None
    found = None
    if plan.groups > 1:
        found = given.x.new_empty((2, plan.groups, plan.channels), dtype=torch.float64)
    results = (*found, None, None) if found is not None else (None, None, dweight, dbias)
    start(
        backward.train_backward_kernel,
        plan.programs,
        (given.like(dy), given.x, given.mask, *by, given.like(saved), *results, dx, dresidual),
        (*plan.sizes, curve.eps, curve.parameter),
        (curve.code, *plan.blocking),
        plan.warps,
    )
    if found is not None:
        merge_sums(plan, found, None, None, dweight, dbias)
    return dx, dresidual


def update_(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Maybe,
    skipped: Maybe,
    batch: Sequence[Tensor],
    momentum: float,
    average: int,
    skip_nonfinite: bool,
) -> None:
    """Let count (G,), mean and m2 (G, C) enter the running statistics, in place."""
    require_device(running_mean, running_var, batches, skipped, *batch)
    rest = math.log1p(-momentum) if average == DEBIASED and momentum < 1 else -math.inf
    start(
        track.track_kernel,
        1,
        (running_mean, running_var, batches, skipped, *(t.contiguous() for t in batch)),
        (running_mean.numel(), batch[0].numel(), momentum, rest),
        (average, skip_nonfinite, TRACKED_TOGETHER),
    )


def _memory(given: Input, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for count (P,), mean and m2 (P, C); apart, since an operator's results share none."""
    count = given.x.new_empty(parts, dtype=torch.float64)
    mean, m2 = (given.x.new_empty((parts, given.plan.channels), dtype=torch.float64) for _ in range(2))
    return count, mean, m2


def _is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()
