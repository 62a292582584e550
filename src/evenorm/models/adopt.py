"""Turn torch.nn's layers into ours and back, in place: the same object, of another class.

Parameters, buffers, hooks, mode and every reference that others hold to the layer stay what they were, and a
layer used in several places is turned once for all of them.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from evenorm import layers, lazy
from evenorm.layers import Layer
from evenorm.models.walk import kind

OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: lazy.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: lazy.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: lazy.LazyBatchNorm3d,
    nn.SyncBatchNorm: layers.BatchNorm,  # whose "world" is torch's None
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}

# What only our layers know, and its value where nobody asked for anything.
DEFAULTS = {name: vars(Layer)[name] for name in Layer.__annotations__ if name in vars(Layer)}
UNSEEN = ("name", "gathers", "step", "_activation")  # of these, what is looked at elsewhere or concerns no forward
CURES = {"frozen": "call evenorm.unfreeze first", "_average": "set .average to evenorm.Exponential() first"}


def adopt_(layer: nn.Module) -> Layer | None:
    """Make a torch.nn layer one of ours, in place; None for one we cannot stand in for."""
    if isinstance(layer, Layer):
        return layer
    if why_not_ours(layer):
        return None
    pools = type(layer) is nn.SyncBatchNorm
    layer.__class__ = OURS[type(layer)]
    assert isinstance(layer, Layer)
    if pools and layer.process_group is None:
        layer.process_group = "world"
    layer.complete_()
    return layer


def why_not_ours(layer: nn.Module) -> str:
    """Say why a layer cannot become one of ours; "" if it can or is one.

    Only torch's own classes are taken: a subclass may have overridden anything.
    """
    if isinstance(layer, Layer):
        return ""
    if "parametrizations" in layer._modules:
        return "it carries parametrizations"
    if type(layer) not in OURS:
        return f"it is a {kind(layer)}, which may override anything"
    if "forward" in vars(layer):
        return "it had its forward replaced on the instance"
    if isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer.process_group, dist.ProcessGroup | None):
        return f"its process_group is {layer.process_group!r}, no group that this worker is in"
    named = {*vars(layer), *layer._modules, *layer._buffers}
    clash = sorted({*_ours_alone(type(layer)), "activation"} & named)
    return f"it has an attribute {clash[0]!r}, which means something else to our layer" if clash else ""


def release_(layer: Layer) -> None:
    """Make a layer of ours torch.nn's again, in place, with nothing left of what only ours have."""
    theirs = THEIRS[type(layer)]
    for name in _ours_alone(theirs):
        vars(layer).pop(name, None)
    if theirs is nn.SyncBatchNorm and layer.process_group == "world":
        layer.process_group = None
    layer._modules.pop("activation", None)
    layer._buffers.pop("nonfinite_batches", None)
    layer._non_persistent_buffers_set.discard("nonfinite_batches")
    if layer.weight is not None and layer.weight.itemsize < 4:  # torch wants statistics as narrow as the weight
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                layer._buffers[name] = buffer.to(layer.weight.dtype)
    layer.__class__ = theirs  # type: ignore[assignment]  # mypy knows no object that changes its class


def why_not_theirs(layer: Layer) -> str:
    """Say why torch.nn has no layer that does what ours does, the activation apart; "" if it has."""
    if type(layer) not in THEIRS:
        return f"torch.nn has no class that does what {kind(layer)} does"
    theirs = THEIRS[type(layer)]
    if theirs is nn.SyncBatchNorm and layer.process_group is None:
        return f"torch.nn has no class that does what {kind(layer)} does with no process_group"
    for name, default in _ours_alone(theirs).items():
        if name not in UNSEEN and getattr(layer, name) != default:
            cure = CURES.get(name, f"set .{name} to {default!r} first")
            return f"torch.nn has no {name.lstrip('_')}={getattr(layer, name)!r}; {cure}"
    return ""


def _ours_alone(theirs: type[nn.Module]) -> dict[str, object]:
    """Return what our layers know and this class of torch.nn does not, with its value where nobody asked."""
    pools = theirs is nn.SyncBatchNorm
    return {name: default for name, default in DEFAULTS.items() if not (pools and name == "process_group")}
