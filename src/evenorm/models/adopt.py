"""Turn torch.nn's layers into ours and back, in place: the same object, of another class.

Parameters, buffers, hooks, mode and every reference that others hold to the layer stay what they were, and a
layer used in several places is turned once for all of them.
"""

from __future__ import annotations

from torch import nn

from evenorm import layers, lazy
from evenorm.layers import Layer

OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: lazy.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: lazy.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: lazy.LazyBatchNorm3d,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def adopt_(layer: nn.Module) -> Layer | None:
    """Make a torch.nn layer one of ours, in place; None for a class we cannot stand in for.

    Only torch's own classes are taken: a subclass may have overridden anything.
    """
    if isinstance(layer, Layer):
        return layer
    if type(layer) not in OURS:
        return None
    layer.__class__ = OURS[type(layer)]
    assert isinstance(layer, Layer)
    layer.complete_()
    return layer
