"""What operators return, told by the shapes of what they take: for torch.compile, whose tensors have no data.

Those of the CPU engine, by name; the GPU engine's are made of the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Maybe = Tensor | None


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor as the kernels make it: x's strides where x is dense, else contiguous."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _double(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64)


def _groups(splits: Sequence[int] | None) -> int:
    return 1 if splits is None else len(splits)


def _fake_moments(x: Tensor, mask: Maybe, splits: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    groups, channels = _groups(splits), x.shape[1]
    return _double(x, groups), _double(x, groups, channels), _double(x, groups, channels)


def _fake_normalize(x: Tensor, *given: Any) -> Tensor:
    return _like(x)


def _fake_train_forward(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    mask: Maybe,
    splits: Sequence[int] | None,
    eps: float,
    activation: int,
    parameter: float,
) -> tuple[Tensor, ...]:
    return (_like(x), *_fake_moments(x, mask, splits))


def _fake_backward_sums(dy: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return _fake_moments(x, None, given[6])[1:]


def _fake_input_gradient(dy: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x) if given[-1] else x.new_empty(0)


def for_parameter(x: Tensor, parameter: Maybe, needed: bool = True) -> Tensor:
    """Return an uninitialised gradient of weight or bias, or an empty one where none is needed."""
    dtype = torch.float32 if parameter is None else parameter.dtype
    return x.new_empty(x.shape[1] if needed else 0, dtype=dtype)


def _gradients(
    x: Tensor, weight: Maybe, bias: Maybe, needs_residual: bool, needs_sums: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight, dbias = (for_parameter(x, of, needs_sums) for of in (weight, bias))
    return _like(x), dweight, dbias, _like(x) if needs_residual else x.new_empty(0)


def _fake_train_backward(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    splits: Sequence[int] | None,
    eps: float,
    activation: int,
    parameter: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, needs_residual)


def _fake_eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    eps: float,
    activation: int,
    parameter: float,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, needs_residual, needs_sums)


def _fake_track(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Maybe,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float,
    debias: bool,
    skip_nonfinite: bool,
    skipped: Maybe,
) -> None:
    return None


def _packed(x: Tensor) -> Tensor:
    return _double(x, 1, 2 * x.shape[1] + 1)


def _fake_step_backward(
    dy: Tensor,
    x: Tensor,
    batch: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    mask: Maybe,
    splits: Sequence[int] | None,
    eps: float,
    activation: int,
    parameter: float,
    needs_residual: bool,
    messages: Maybe,
    own: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, needs_residual)


SHAPES: dict[str, Callable[..., object]] = {
    "moments": _fake_moments,
    "normalize": _fake_normalize,
    "train_forward": _fake_train_forward,
    "backward_sums": _fake_backward_sums,
    "input_gradient": _fake_input_gradient,
    "train_backward": _fake_train_backward,
    "eval_backward": _fake_eval_backward,
    "track_": _fake_track,
    "step_forward": lambda x, *given: (_like(x), _packed(x)),
    "step_backward": _fake_step_backward,
    "forward_message": lambda x, mask: _packed(x),
    "backward_message": lambda dy, x, *given: _double(x, 1, 2 * x.shape[1]),
}
