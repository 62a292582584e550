"""The CPU engine: C++ kernels (csrc/) as torch operators, with shapes for tensors that have no data.

The functions here are those of `evenorm.formulas`, under the same names and arguments. The shared library is
loaded at first use, never at import; `EVENORM_ENGINE=off` in the environment switches it off.

Each operator returns a fixed number of tensors, since that is all that torch.compile takes: one that was not
asked for (the residual's gradient, the parameters' in inference) is empty, of shape (0,), and becomes None here
by the flag that did not ask for it, so nothing is read back. Outputs never share memory. A list of tensors or an
optional return would cost more on each call and gain nothing.

An operator takes x in two layouts, dense: as (N, C, *positions) in order, or with the channels last; y and the
gradients come back in the same strides. Other layouts are copied to the first one, and so is what comes along in
another layout than x.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenorm.engines.shapes import SHAPES
from evenorm.formulas import Setting
from evenorm.moments import Moments

Maybe = Tensor | None

# What `track_` takes besides the batch: running_mean, running_var, num_batches_tracked, momentum, debias,
# skip_nonfinite, skipped.
Update = tuple[Maybe, Maybe, Maybe, float, bool, bool, Maybe]
NO_UPDATE = (None, None, None, 0.0, False, False, None)

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
_operators = torch.ops.evenorm
_state: list[str | None] = []  # what `available` found, once it has looked
direct: dict[str, Callable[..., Any]] = {}  # a step's operators past torch's wrapper, which takes 1 us


def available() -> str | None:
    """Return None where the kernels can be used, else the reason why not; looks once, at the first call."""
    if not _state:
        _state.append(_load())
    return _state[0]


# To torch.compile the answer is a constant: it calls the function while it traces, so the library gets loaded.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have no such attribute


def supports(x: Tensor) -> bool:
    """Tell whether the kernels take x: an ordinary dense tensor in memory, of one of the four float types."""
    return is_plain(x) and x.dtype in _DTYPES and x.layout is torch.strided and available() is None


def is_plain(x: Tensor) -> bool:
    """Tell whether x is a tensor in memory, and nothing that only looks like one, except to torch.compile."""
    return x.is_cpu and (type(x) in _PLAIN or type(x).__name__ == "FakeTensor")


def _load() -> str | None:
    chosen = os.environ.get("EVENORM_ENGINE", "").lower()
    if chosen in ("off", "triton"):
        return f"switched off by EVENORM_ENGINE={chosen}"
    package = Path(__file__).parent.parent
    library, missing = package / "_engine.so", package / "_engine_missing.txt"
    if not library.exists():
        return missing.read_text().strip() if missing.exists() else "not built: evenorm/_engine.so is not there"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"could not be loaded: {error}"
    for name, shape_of in SHAPES.items():
        torch.library.register_fake(f"evenorm::{name}", _on_one_device(shape_of))
    for name in ("step_forward", "step_backward"):
        operator = getattr(_operators, name).default
        direct[name] = getattr(operator, "_op", operator)
    return None


def _on_one_device(shape_of: Callable[..., object]) -> Callable[..., object]:
    """Refuse tensors in memory beside such as have none: one on "meta" sends the whole call here, unasked."""

    def checked(*given: Any) -> object:
        devices = {tensor.device for tensor in given if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            other = next(device for device in devices if device.type != "cpu")
            raise ValueError(f"all tensors must be on x's device, cpu; one is on {other}")
        return shape_of(*given)

    return checked


def moments(x: Tensor, mask: Maybe = None, splits: Sequence[int] | None = None) -> Moments:
    """Pool: count, mean and m2 of each group and channel."""
    return Moments(*_operators.moments.default(x, mask, splits))


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
) -> Tensor:
    """Apply: y = activation(xhat * weight + bias + residual), in x's dtype; 0 where the mask is False."""
    y: Tensor = _operators.normalize.default(x, mean, var, weight, bias, residual, *setting)
    return y


def train_forward(
    x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool and apply in one go: y, and the count, mean and m2 it was normalised by."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _operators.train_forward.default(
        x, weight, bias, residual, *setting
    )
    return found


def step_forward(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    residual: Maybe,
    setting: Setting,
    update: Update = NO_UPDATE,
    messages: Maybe = None,
) -> tuple[Tensor, Tensor]:
    """Do `train_forward` and, in the same call, let the batch enter the running statistics, in place.

    Returns y and, in one tensor, what `step_backward` wants to know of the batch, (1, 2 C + 1): its count, means
    and m2. Given the `forward_message` of each worker, (W, 2 C + 1), the batch is that of all of them.
    """
    found: tuple[Tensor, Tensor] = _operators.step_forward.default(
        x, weight, bias, residual, *setting, *update, messages
    )
    return found


def forward_message(x: Tensor, mask: Maybe) -> Tensor:
    """Return what other workers have to know of a batch, (1, 2 C + 1): its count, means and m2."""
    message: Tensor = _operators.forward_message.default(x, mask)
    return message


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """Return sum g and sum g * xhat of each group and channel, (G, C)."""
    sums: tuple[Tensor, Tensor] = _operators.backward_sums.default(dy, x, mean, var, weight, bias, saved, *setting)
    return sums


def backward_message(
    dy: Tensor,
    x: Tensor,
    batch: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
) -> Tensor:
    """Return what other workers have to know for `step_backward`, (1, 2 C): a worker's `backward_sums`."""
    message: Tensor = _operators.backward_message.default(dy, x, batch, weight, bias, saved, *setting)
    return message


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
    offset: Maybe,
    slope: Maybe,
    needs_residual: bool,
) -> tuple[Tensor, Maybe]:
    """Return dx = weight / sqrt(var + eps) * (g - offset - slope * xhat), and the residual's gradient g."""
    computed = needs_residual and not is_dy(setting)
    dx, dresidual = _operators.input_gradient.default(
        dy, x, mean, var, weight, bias, saved, *setting, offset, slope, computed
    )
    return dx, residual_gradient(dy, dresidual, needs_residual, computed)


def train_backward(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    """Return the gradients of `train_forward` by x, weight, bias and residual."""
    computed = needs_residual and not is_dy(setting)
    dx, dweight, dbias, dresidual = _operators.train_backward.default(
        dy, x, count, mean, m2, weight, bias, saved, *setting, computed
    )
    return dx, dweight, dbias, residual_gradient(dy, dresidual, needs_residual, computed)


def step_backward(
    dy: Tensor,
    x: Tensor,
    batch: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
    needs_residual: bool,
    messages: Maybe = None,
    own: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Maybe]:
    """Return the gradients of `step_forward` by x, weight, bias and residual.

    Over workers it takes their `backward_message`, (W, 2 C), and which row is this one's own.
    """
    computed = needs_residual and not is_dy(setting)
    dx, dweight, dbias, dresidual = _operators.step_backward.default(
        dy, x, batch, weight, bias, saved, *setting, computed, messages, own
    )
    return dx, dweight, dbias, residual_gradient(dy, dresidual, needs_residual, computed)


def eval_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Maybe,
    bias: Maybe,
    saved: Maybe,
    setting: Setting,
    needs_sums: bool,
    needs_residual: bool,
) -> tuple[Tensor, Maybe, Maybe, Maybe]:
    """Return the gradients of `normalize` with fixed mean and var by x, weight, bias and residual."""
    computed = needs_residual and not is_dy(setting)
    mask, _, eps, activation, parameter = setting
    dx, dweight, dbias, dresidual = _operators.eval_backward.default(
        dy, x, mean, var, weight, bias, saved, mask, eps, activation, parameter, needs_sums, computed
    )
    dresidual = residual_gradient(dy, dresidual, needs_residual, computed)
    return (dx, dweight, dbias, dresidual) if needs_sums else (dx, None, None, dresidual)


def track_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Maybe,
    batch: Moments,
    momentum: float,
    debias: bool = False,
    skip_nonfinite: bool = True,
    skipped: Maybe = None,
) -> None:
    """Let one batch enter the running statistics, in place, as `evenorm.updates.commit_` does, in one call.

    Args:
        running_mean: (C,), any float type, changed in place; so is running_var.
        running_var: (C,).
        num_batches_tracked: int64, incremented where the batch counts.
        batch: the moments of the batch, of one group or of several.
        momentum: the weight of the new batch; NaN for a cumulative average.
        debias: take the initial value out of the exponential average.
        skip_nonfinite: leave a channel as it is where the outcome would not be finite.
        skipped: int64, (): incremented for a batch that some channel leaves out.
    """
    _operators.track_.default(
        running_mean,
        running_var,
        num_batches_tracked,
        batch.count,
        batch.mean,
        batch.m2,
        momentum,
        debias,
        skip_nonfinite,
        skipped,
    )


def is_dy(setting: Setting) -> bool:
    """Tell whether the residual's gradient is dy itself, with nothing to compute."""
    return setting.activation == 0 and setting.mask is None


def residual_gradient(dy: Tensor, computed: Tensor, needed: bool, was_computed: bool) -> Maybe:
    """Return the residual's gradient of what an operator returned, which is empty where it computed none."""
    if not needed:
        return None
    return computed if was_computed else dy
