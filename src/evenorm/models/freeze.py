"""Freezing that stays frozen: batch norm that normalises by its running statistics and leaves them alone."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.layers import Layer
from evenorm.models.adopt import adopt_, why_not_ours
from evenorm.models.walk import batch_norms, shown


def freeze(model: nn.Module, *, statistics: bool = True, affine: bool = False) -> nn.Module:
    """Freeze the batch norm layers of a network, in place, until `unfreeze`.

    A frozen layer normalises by its running statistics and does not change them, in ``train()`` too. No call of
    ``train()`` or ``eval()`` undoes that; it is copied and pickled with the layer, shows in its repr, and leaves
    the keys of the state_dict alone. torch.nn's layers become evenorm's, in place.

    Args:
        model: a network, or a single layer.
        statistics: freeze the statistics.
        affine: freeze weight and bias (``requires_grad_(False)``).

    Returns:
        The same model.

    Raises:
        ValueError: a layer has no running statistics, or is of a class that cannot be frozen; nothing is changed.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> _ = evenorm.freeze(model).train()(torch.randn(8, 4))
    >>> model[1].num_batches_tracked.item()
    0
    """
    found = batch_norms(model)
    if statistics:
        for name, module in found:
            _check_freezable(shown(name), module)
    for name, module in found:
        if statistics:
            layer = adopt_(module)
            assert layer is not None
            layer.frozen, layer.name = True, layer.name or name
        if affine:
            _require_gradient_(module, False)
    return model


def unfreeze(model: nn.Module, *, statistics: bool = True, affine: bool = True) -> nn.Module:
    """Undo `freeze`, in place: statistics follow ``train()`` and ``eval()`` again, weight and bias learn again.

    Args:
        model: a network, or a single layer.
        statistics: unfreeze the statistics.
        affine: unfreeze weight and bias (``requires_grad_(True)``).

    Returns:
        The same model.

    >>> import torch, evenorm
    >>> layer = evenorm.freeze(evenorm.BatchNorm1d(3))
    >>> _ = evenorm.unfreeze(layer)(torch.randn(8, 3))
    >>> layer.num_batches_tracked.item()
    1
    """
    for module in model.modules():
        if statistics and isinstance(module, Layer):
            module.frozen = False
        if affine and isinstance(module, _BatchNorm):
            _require_gradient_(module, True)
    return model


def _check_freezable(name: str, module: nn.Module) -> None:
    if module.running_mean is None or module.running_var is None:
        raise ValueError(f"{name} has no running statistics to freeze; construct it with track_running_stats=True")
    reason = why_not_ours(module)
    if reason:
        raise ValueError(f"{name} {reason.removeprefix('it ')}; freeze it by its own means")


def _require_gradient_(module: nn.Module, required: bool) -> None:
    for parameter in (module.weight, module.bias):
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(required)
