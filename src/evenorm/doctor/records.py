"""What the doctor knows of one layer: read from a state_dict, and from the live layer where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from evenorm.layers import Layer

MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class Record:
    """The tensors of a batch norm layer, and its options where they are known: a checkpoint holds none."""

    name: str
    mean: Tensor | None
    var: Tensor | None
    batches: int | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    live: _BatchNorm | None = None
    bias_in_front: str = ""  # the parameter of the layer in front whose only effect batch norm takes away

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names in the layer."""
        named = {"running_mean": self.mean, "running_var": self.var, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def debiased(self) -> bool:
        """Whether the layer's average leaves nothing of the initial value."""
        return isinstance(self.live, Layer) and (
            self.live.momentum is None or bool(getattr(self.live.average, "debias", True))
        )


def check_state(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no check can bear: sparse, quantized, without values, or larger than what they hold.

    Raises:
        ValueError: one of these, by name.
    """
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{name!r} is no dense tensor with values; save the network's plain state_dict")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name!r} claims {tensor.numel()} values, and its storage holds fewer; save it anew")


def in_order(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict by name, numbers in names by their value: "2" before "10".

    A file's own order is not the network's: safetensors sorts, torch keeps the order in which modules were made.
    """
    return {name: state[name] for name in sorted(state, key=_natural)}


def _natural(name: str) -> tuple[list[list[tuple[int, str]]], str]:
    parts = [re.split("([0-9]+)", part) for part in name.split(".")]  # text, digits, text, ...
    return [[_value(text) if place % 2 else (0, text) for place, text in enumerate(part)] for part in parts], name


def _value(digits: str) -> tuple[int, str]:
    """Return what compares as the number does, however long."""
    bare = digits.lstrip("0")
    return len(bare), bare


def from_state(state: Mapping[str, Tensor]) -> list[Record]:
    """Return the records of the batch norm layers in a state_dict `in_order`: with a running mean and variance.

    Raises:
        ValueError: a tensor that cannot be what its name says.
    """
    check_state(state)
    prefixes = [key[: -len(MEAN)] for key in state if key.endswith(MEAN) and key[: -len(MEAN)] + VAR in state]
    keys = list(state)
    found = []
    places = {key: index for index, key in enumerate(keys)}
    for prefix in prefixes:
        counter = state.get(prefix + COUNTER)
        _check_shapes(state, prefix)
        found.append(
            Record(
                name=prefix.removesuffix("."),
                mean=state[prefix + MEAN],
                var=state[prefix + VAR],
                batches=None if counter is None else _whole(counter),
                weight=state.get(prefix + "weight"),
                bias=state.get(prefix + "bias"),
                bias_in_front=_bias_in_front(state, keys, places[prefix + MEAN], prefix, as_made=False),
            )
        )
    return found


def from_model(model: nn.Module) -> list[Record]:
    """Return the records of the batch norm layers of a live network, of any make; lazy ones hold nothing yet."""
    state = model.state_dict()
    keys, found = list(state), []
    places = {key: index for index, key in enumerate(keys)}
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or (layer.running_mean is not None and is_lazy(layer.running_mean)):
            continue
        counter = layer.num_batches_tracked
        prefix = f"{name}." if name else ""
        place = places.get(prefix + MEAN)
        found.append(
            Record(
                name=name,
                mean=layer.running_mean,
                var=layer.running_var,
                batches=None if counter is None else int(counter),
                weight=layer.weight,
                bias=layer.bias,
                eps=layer.eps,
                momentum=layer.momentum,
                live=layer,
                bias_in_front="" if place is None else _bias_in_front(state, keys, place, prefix, as_made=True),
            )
        )
    return found


def _bias_in_front(state: Mapping[str, Tensor], keys: list[str], place: int, prefix: str, *, as_made: bool) -> str:
    """Return the bias of the module that stands right before the layer in the state_dict, if it has its channels.

    Only a neighbour of the same parent counts, and of two that are numbered, as in nn.Sequential, only the next:
    an activation may be in between. By name alone "conv1" and "norm1" do not tell which comes first. Keys
    `as_made`, in the order in which a live network made its modules, do: it is seldom another than that of use.
    """
    while place > 0 and keys[place].startswith(prefix):
        place -= 1
    layer = keys[place].rpartition(".")[0] + "."
    before = layer + "bias"
    (parent, first), (own, second) = _place(layer), _place(prefix)
    follows = as_made if first is None or second is None else second == first + 1
    if before not in state or layer + MEAN in state or parent != own or not follows:
        return ""
    weight, mean = state.get(layer + "weight"), state[prefix + MEAN]
    affine = weight is not None and weight.dim() >= 2
    return before if affine and state[before].numel() == mean.numel() else ""


def _place(prefix: str) -> tuple[str, int | None]:
    """Return a module's parent, and its number there if it has one."""
    parent, _, name = prefix.rstrip(".").rpartition(".")
    return parent, int(name) if re.fullmatch("[0-9]{1,9}", name) else None


def _check_shapes(state: Mapping[str, Tensor], prefix: str) -> None:
    channels = state[prefix + MEAN].shape
    for kind in (MEAN, VAR, "weight", "bias"):
        tensor = state.get(prefix + kind)
        if tensor is None:
            continue
        if not tensor.is_floating_point() or tensor.dim() != 1 or tensor.shape != channels:
            raise ValueError(
                f"{prefix + kind!r} must hold one floating-point number a channel, like running_mean "
                f"{tuple(channels)}, and is {tensor.dtype} {tuple(tensor.shape)}"
            )


def _whole(counter: Tensor) -> int | None:
    if counter.numel() != 1 or counter.is_complex() or not bool(torch.isfinite(counter).all()):
        return None
    return int(counter)
