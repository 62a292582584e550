"""The GPU engine: Triton kernels, for CUDA and ROCm from one source.

The functions here are those of `evenorm.formulas`, under the same names and arguments. Triton is imported, and the
device looked at, at first use, never at import. `EVENORM_ENGINE=off` switches the engine off; where Triton is
missing or broken, or the device too old for a dtype, the formulas take over, with one warning.

The kernels take float32, bfloat16 and float16. Empty inputs, and groups that are not cut as virtual batches are,
go to the formulas too: they are rare, and each would be a case in every kernel. With `TRITON_INTERPRET=1` and
`EVENORM_ENGINE=triton` in the environment Triton's interpreter runs the kernels on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from evenorm import formulas
from evenorm.engines.cpu import is_dy, residual_gradient
from evenorm.engines.triton.plan import regular
from evenorm.formulas import Setting
from evenorm.moments import Moments

Maybe = Tensor | None

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
_registered: list[str | None] = []  # what `_load` found, once it has been called
_probed: dict[int, str | None] = {}  # what a launch on a device showed
_usable: dict[tuple[int | None, torch.dtype], bool] = {}
_lock = threading.RLock()  # of these three: operators can be registered once
_operators = torch.ops.evenorm_triton
OLDEST, OLDEST_BFLOAT16 = (7, 0), (8, 0)  # compute capabilities: Triton's own, and that with bfloat16 arithmetic


def available(index: int | None = None) -> str | None:
    """Return None where the kernels can be used on a device, else why not; without index, the current one.

    Looks once at each device, by a launch. What may be otherwise the next time, it does not remember.
    """
    with _lock:
        if not _registered:
            _registered.append(_load())
        if _registered[0] is not None or _interpreted():
            return _registered[0]
        return _launches(torch.cuda.current_device() if index is None else index)


def supports(x: Tensor) -> bool:
    """Tell whether the kernels take x: an ordinary tensor on a GPU, of one of the three types."""
    return (
        x.dtype in _DTYPES
        and (x.is_cuda or (x.is_cpu and _interpreted()))
        and x.layout is torch.strided
        and (type(x) in _PLAIN or type(x).__name__ == "FakeTensor")
        and _takes(x.device.index, x.dtype)
    )


def _load() -> str | None:
    """Import Triton and register the operators; return why that cannot be."""
    if os.environ.get("EVENORM_ENGINE", "").lower() == "off":
        return "switched off by EVENORM_ENGINE=off"
    if not (_interpreted() or torch.cuda.is_available()):
        return "torch finds no GPU"
    try:
        from evenorm.engines.triton import operators

        operators.register()
    except ImportError as error:
        return f"Triton is not installed: {error}"
    except Exception as error:  # whatever a broken installation raises, the formulas work
        return _broken(error)
    return None


def _launches(index: int) -> str | None:
    """Launch a kernel on a device, since Triton needs a compiler and a driver that fit; return what went wrong."""
    if index in _probed:
        return _probed[index]
    if torch.cuda.is_current_stream_capturing():
        return "its first use is within the capture of a CUDA graph, where nothing can be loaded; run a step before"
    from evenorm.engines.triton import operators

    try:
        with _disable_current_modes():  # torch.compile's fake tensors have no memory
            operators.moments(torch.zeros(2, 1, device=f"cuda:{index}"), None, None)
        _probed[index] = None
    except Exception as error:  # as above
        if "out of memory" in str(error).lower():  # there may be some the next time
            return _broken(error)
        _probed[index] = _broken(error)
    return _probed[index]


def _broken(error: Exception) -> str:
    return f"Triton does not work: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _interpreted() -> bool:
    """Tell whether the environment asks for the kernels on CPU tensors, by Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("EVENORM_ENGINE", "").lower() == "triton"


def _takes(index: int | None, dtype: torch.dtype) -> bool:
    """Tell whether the kernels run with a dtype on a device; warn once of each that they do not."""
    known = _usable.get((index, dtype))
    if known is None:
        reason = available(index) or _too_old(index, dtype)
        known = reason is None
        if known or _registered[0] is not None or index in _probed:  # else the next call may find otherwise
            _usable[index, dtype] = known
        if reason is not None and not reason.startswith("switched off"):
            warnings.warn(f"evenorm's GPU engine is not used, torch's operations are: {reason}", stacklevel=2)
    return known


def _too_old(index: int | None, dtype: torch.dtype) -> str | None:
    if _interpreted() or torch.version.hip is not None:
        return None
    found = torch.cuda.get_device_capability(index)
    needed = OLDEST_BFLOAT16 if dtype == torch.bfloat16 else OLDEST
    if found >= needed:
        return None
    return f"{dtype} needs compute capability {needed[0]}.{needed[1]}, device {index} has {found[0]}.{found[1]}"


# To torch.compile the answers are constants: it calls the functions while it traces.
for _constant in (available, _interpreted, _takes):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]  # functions have no such attribute


def moments(x: Tensor, mask: Maybe = None, splits: Sequence[int] | None = None) -> Moments:
    """Pool: count, mean and m2 of each group and channel."""
    if _hands_over(x, splits):
        return formulas.moments(x, mask, splits)
    return Moments(*_run("moments", x)(x, mask, splits))


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
) -> Tensor:
    """Apply: y = activation(xhat * weight + bias + residual), in x's dtype; 0 where the mask is False."""
    given = (x, mean, var, weight, bias, residual)
    if _hands_over(x, setting.splits):
        return formulas.normalize(*given, setting)
    y: Tensor = _run("normalize", x)(*given, *setting)
    return y


def train_forward(
    x: Tensor, weight: Maybe, bias: Maybe, residual: Maybe, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool and apply: y, and the count, mean and m2 it was normalised by."""
    given = (x, weight, bias, residual)
    if _hands_over(x, setting.splits):
        return formulas.train_forward(*given, setting)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _run("train_forward", x)(*given, *setting)
    return found


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
    given = (dy, x, mean, var, weight, bias, saved)
    if _hands_over(x, setting.splits):
        return formulas.backward_sums(*given, setting)
    sums: tuple[Tensor, Tensor] = _run("backward_sums", x)(*given, *setting)
    return sums


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
    given = (dy, x, mean, var, weight, bias, saved)
    if _hands_over(x, setting.splits):
        return formulas.input_gradient(*given, setting, offset, slope, needs_residual)
    computed = needs_residual and not is_dy(setting)
    dx, dresidual = _run("input_gradient", x)(*given, *setting, offset, slope, computed)
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
    given = (dy, x, count, mean, m2, weight, bias, saved)
    if _hands_over(x, setting.splits):
        return formulas.train_backward(*given, setting, needs_residual)
    computed = needs_residual and not is_dy(setting)
    dx, dweight, dbias, dresidual = _run("train_backward", x)(*given, *setting, computed)
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
    given = (dy, x, mean, var, weight, bias, saved)
    if _hands_over(x, setting.splits):
        return formulas.eval_backward(*given, setting, needs_sums, needs_residual)
    computed = needs_residual and not is_dy(setting)
    mask, _, *curve = setting
    dx, dweight, dbias, dresidual = _run("eval_backward", x)(*given, mask, *curve, needs_sums, computed)
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
    """Let one batch enter the running statistics, in place, as `evenorm.updates.commit_` does, in one launch.

    The arguments are those of `evenorm.engines.cpu.track_`.
    """
    moments = (batch.count, batch.mean, batch.m2)
    state = (running_mean, running_var, num_batches_tracked)
    _run("track_", running_mean)(*state, *moments, momentum, debias, skip_nonfinite, skipped)


def _hands_over(x: Tensor, splits: Sequence[int] | None) -> bool:
    """Tell whether the formulas compute this one; see the head of this file."""
    return x.numel() == 0 or (splits is not None and not regular(splits, x.shape[0]))


def _run(name: str, x: Tensor) -> Callable[..., Any]:
    """Return the operator, or what it calls where nobody watches: its dispatch takes as long as a launch."""
    watched = torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack()
    if watched:
        operator: Callable[..., Any] = getattr(_operators, name).default
        return operator
    from evenorm.engines.triton import operators

    function: Callable[..., Any] = getattr(operators, name)
    return function
