"""What is required of the arguments, checked before any work: what came, and how to fix it, in torch's words."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from evenorm.activations import resolve
from evenorm.averages import Average
from evenorm.renorm import Renorm
from evenorm.workers import Group, check_group

OnNonfinite = Literal["skip", "raise", "propagate"]
OnSingle = Literal["raise", "population"]


def check(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Raise the errors of `batch_norm` that concern tensors, before any work."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
        raise _no_input(x)
    if x.dim() < 2:
        raise ValueError(f"expected 2D or higher input (got {x.dim()}D input): (N, C, *positions)")
    shape = (x.shape[1],)
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    elif running_mean.shape != shape or not running_mean.is_floating_point():
        raise _wrong_vector("running_mean", running_mean, shape[0])
    elif running_var.shape != shape or not running_var.is_floating_point():
        raise _wrong_vector("running_var", running_var, shape[0])
    if weight is not None and (weight.shape != shape or not weight.is_floating_point()):
        raise _wrong_vector("weight", weight, shape[0])
    if bias is not None and (bias.shape != shape or not bias.is_floating_point()):
        raise _wrong_vector("bias", bias, shape[0])
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a tensor of x's shape, got {type(residual).__name__}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if mask is not None:
        check_mask(x, mask)


def check_vectors(**vectors: Tensor | None) -> None:
    """Raise unless each is a tensor or None, which a layer's own are by torch.nn's care."""
    for name, vector in vectors.items():
        if vector is not None and not isinstance(vector, Tensor):
            raise _no_vector(name, type(vector).__name__)


def check_dense(x: object) -> None:
    """Raise unless x is a floating-point tensor in the ordinary layout."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
        raise _no_input(x)


def _no_input(x: object) -> TypeError:
    if isinstance(x, Tensor) and x.is_floating_point():
        return TypeError(
            f"expected a tensor of layout torch.strided, got {x.layout}; convert it, e.g. x.to_dense()"
        )
    found = x.dtype if isinstance(x, Tensor) else type(x).__name__
    return TypeError(f"expected a floating-point tensor, got {found}; convert it first, e.g. x.float()")


def _no_vector(name: str, found: object) -> TypeError:
    return TypeError(f"{name} must be a floating-point tensor of shape (C,) or None, got {found}")


def _wrong_vector(name: str, vector: Tensor, channels: int) -> TypeError | ValueError:
    if not vector.is_floating_point():
        return _no_vector(name, vector.dtype)
    if vector.numel() == channels:
        return ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}; flatten it first")
    return ValueError(f"{name} should contain {channels} elements not {vector.numel()}")


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Raise unless the mask says for each position of x, on x's device, whether it is valid."""
    positions = (x.shape[0], *x.shape[2:])
    if not isinstance(mask, Tensor):
        found = type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where a position is valid; got {found}")
    if mask.dtype != torch.bool:
        fix = "convert it, e.g. mask.bool()"
        raise ValueError(f"mask must be bool, True where a position is valid; got {mask.dtype}; {fix}")
    if mask.shape != positions:
        raise ValueError(f"mask must have shape {positions} for x {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on x's device, {x.device}; it is on {mask.device}")


def check_eps(eps: float, training: bool) -> None:
    """Raise torch's error for an eps that could divide by zero."""
    if training and eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_count(
    x: Tensor, training: bool = True, mask: Tensor | None = None, may_be_single: bool = False, *, cure: str
) -> None:
    """Raise torch's error, with the cure behind it, where a channel has one value only, which has no variance.

    A mask is looked into where that needs no host sync: for others, a batch without valid values changes nothing.
    """
    valid = None if mask is None or not training or x.numel() == 0 else _known_count(mask)
    if valid == 0:
        text = "mask must leave at least one valid position (True) when training"
        raise ValueError(f"{text}, got mask {tuple(x.shape[:1] + x.shape[2:])}, all False")
    if valid == 1 and not may_be_single:
        text = "Expected more than 1 value per channel when training"
        raise ValueError(f"{text}, got input size {x.size()} with 1 valid position; {cure}")
    if x.numel() == x.shape[1] and x.numel() > 0 and not may_be_single:
        if training:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}; {cure}"
            )
        raise ValueError(
            "Expected more than 1 value per channel without running statistics (there are none to normalise by), "
            f"got input size {x.size()}"
        )


def _known_count(mask: Tensor) -> int | None:
    """Return how many positions are valid; None where asking would stall a device or stop whoever traces us."""
    if torch.compiler.is_compiling() or mask.device.type != "cpu" or type(mask) is not Tensor:
        return None
    watched = torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    return None if watched or torch._C._len_torch_dispatch_stack() else int(torch.count_nonzero(mask))


def check_options(
    layer: nn.Module,
    activation: str | nn.Module | None,
    average: Average | None,
    virtual_batch_size: int | None,
    renorm: Renorm | None,
    on_nonfinite: OnNonfinite,
    on_single: OnSingle,
    process_group: Group,
) -> None:
    """Raise unless the options of a layer make sense, each and together."""
    resolve(activation)
    if average is not None and layer.momentum != 0.1:
        raise ValueError(f"give either momentum or average, got momentum={layer.momentum} and {average}")
    if virtual_batch_size is not None and (
        isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int) or virtual_batch_size < 2
    ):
        raise ValueError(
            f"virtual_batch_size must be a whole number of at least 2 samples, got {virtual_batch_size!r}"
        )
    if renorm is not None and not isinstance(renorm, Renorm):
        raise TypeError(f"renorm must be a Renorm, got {renorm!r}")
    for name, value, known in (
        ("on_nonfinite", on_nonfinite, get_args(OnNonfinite)),
        ("on_single", on_single, get_args(OnSingle)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_group(process_group)
    if process_group is not None and virtual_batch_size is not None:
        raise ValueError("give either virtual_batch_size, which splits the batch, or process_group, which joins it")
    need = {
        "average": average is not None,
        "renorm": renorm is not None,
        "on_nonfinite='raise'": on_nonfinite == "raise",
        "on_single='population'": on_single == "population",
    }
    for option, given in need.items():
        if given and not layer.track_running_stats:
            raise ValueError(f"{option} needs running statistics, got track_running_stats=False")
