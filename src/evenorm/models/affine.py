"""Batch norm with fixed statistics as an affine map, and merging it with the affine layer next to it.

The arithmetic is float64, and the outcome is cast once, to the dtype of the weights that it replaces (docs/math.md,
eq. 17 and 18).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from evenorm.models.walk import LeftAloneError

# The layers that a batch norm merges with, and the dimensions of the input in which their channels are dimension 1.
DIMENSIONS: dict[type[nn.Module], int] = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}


class Affine(NamedTuple):
    """y = scale * (x - mean) + bias for each channel, in float64."""

    scale: Tensor
    mean: Tensor
    bias: Tensor


class Merged(NamedTuple):
    """The new weight and bias of a layer, in the dtype of its weight."""

    weight: Tensor
    bias: Tensor


def affine_of(layer: _BatchNorm) -> Affine:
    """Return what a batch norm does with its running statistics."""
    if layer.running_mean is None or layer.running_var is None:
        raise LeftAloneError("it normalises by the batch's own statistics at inference too")
    mean, var = layer.running_mean.detach().double(), layer.running_var.detach().double()
    scale = (var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
    if not all(torch.isfinite(values).all() for values in (scale, mean, bias)):
        raise LeftAloneError("its statistics or parameters are not finite")
    return Affine(scale, mean, bias)


def merge_before(layer: nn.Module, affine: Affine) -> Merged:
    """Merge a batch norm into the layer before it [17]."""
    weight, bias = _parameters(layer)
    scale = affine.scale
    if isinstance(layer, _BatchNorm):
        scaled = weight * scale
    elif isinstance(
        layer, _ConvTransposeNd
    ):  # (in, out / groups, ...): the groups' outputs stand one behind the other
        inside, outside = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        grouped = weight.reshape(layer.groups, inside, outside, -1)
        scaled = (grouped * scale.reshape(layer.groups, 1, outside, 1)).reshape(weight.shape)
    else:
        scaled = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return _cast(layer, scaled, scale * (bias - affine.mean) + affine.bias)


def merge_behind(layer: nn.Module, affine: Affine) -> Merged:
    """Merge a batch norm into the layer behind it [18]."""
    weight, bias = _parameters(layer)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    shift = affine.bias - affine.scale * affine.mean
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    columns = (groups, 1, weight.shape[1], 1)
    scaled = (grouped * affine.scale.reshape(columns)).reshape(weight.shape)
    return _cast(layer, scaled, bias + (grouped * shift.reshape(columns)).sum((2, 3)).flatten())


def check_mergeable(layer: nn.Module, name: str, where: str) -> None:
    """Raise LeftAloneError unless a layer, before or behind a batch norm, has a weight that can be replaced."""
    known = [kind for kind in DIMENSIONS if isinstance(layer, kind)]
    if not known:
        raise LeftAloneError(f"{where} it stands {name} ({type(layer).__name__})")
    if "parametrizations" in layer._modules or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise LeftAloneError(f"the weight of its neighbour {name} is computed from other parameters")
    theirs = known[0]
    overridden = type(layer).forward is not theirs.forward or "forward" in vars(layer)
    if overridden or getattr(type(layer), "_conv_forward", None) is not getattr(theirs, "_conv_forward", None):
        raise LeftAloneError(f"its neighbour {name} ({type(layer).__name__}) overrides forward")


def check_unpadded(layer: nn.Module, name: str) -> None:
    """Raise LeftAloneError unless each output of a layer behind batch norm reads as many inputs as any other."""
    if isinstance(layer, _ConvTransposeNd):
        raise LeftAloneError(
            f"behind it is the transposed convolution {name}, whose outputs read unlike many inputs"
        )
    if not isinstance(layer, _ConvNd) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return
    reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = reach if isinstance(layer.padding, str) else layer.padding
    if any(padding):
        raise LeftAloneError(f"behind it, {name} pads with zeros, which batch norm would shift")


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float64; what a layer does not have is 1 or 0."""
    held, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if held is not None:
        weight = held.detach().double()
    else:
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        weight = torch.ones_like(layer.running_mean, dtype=torch.float64)
    channels = layer.out_channels if isinstance(layer, _ConvNd) else weight.shape[0]
    return weight, weight.new_zeros(channels) if bias is None else bias.detach().double()


def _cast(layer: nn.Module, weight: Tensor, bias: Tensor) -> Merged:
    held = layer._parameters.get("weight")
    dtype = weight.dtype if held is None else held.dtype
    if held is None and isinstance(layer, _BatchNorm) and layer.running_mean is not None:
        dtype = layer.running_mean.dtype
    merged = Merged(weight.to(dtype), bias.to(dtype))
    largest = max((values.abs().max().item() for values in merged if values.numel()), default=0.0)
    if not math.isfinite(largest):
        raise LeftAloneError(f"the folded weights do not fit into {dtype}")
    return merged
