"""A trained stack of networks evaluated with statistics of one's choice in place of its own.

Legend as in `networks`: S members, activations (S, C, N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

import evenorm
from evenorm.averages import Average
from evenorm.lab.networks import BatchNorm
from evenorm.lab.training import Samples

Statistics: TypeAlias = "tuple[Tensor, Tensor]"  # mean and variance, broadcast against (S, C, N)
Choice: TypeAlias = "Callable[[int, Tensor], Statistics]"  # of the k-th batch norm, given its input


@torch.no_grad()
def logits(network: nn.Sequential, x: Tensor, choose: Choice) -> Tensor:
    """Return the network's answer to x (S, C, N) when its k-th batch norm uses the statistics choose(k, input)."""
    index = 0
    for layer in network:
        if isinstance(layer, BatchNorm):
            own = layer.layer
            average, variance = choose(index, x)
            weight, bias = (by_member(parameter, x.shape[0]) for parameter in (own.weight, own.bias))
            x = (x - average) / torch.sqrt(variance + own.eps) * weight + bias
            index += 1
        else:
            x = layer(x)
    return x


def own_statistics(size: int) -> Choice:
    """Choose each batch's own statistics; a batch of 1 has variance 0 and is normalised to the bias."""

    def choose(index: int, x: Tensor) -> Statistics:
        batches = x.reshape(*x.shape[:2], -1, size)
        average = batches.mean(3, keepdim=True).expand_as(batches).flatten(2)
        variance = batches.var(3, correction=0, keepdim=True).expand_as(batches).flatten(2)
        return average, variance

    return choose


def exact_statistics(network: nn.Sequential, training: Samples) -> Choice:
    """Choose the statistics of the whole training set, each layer's taken behind the layers before it."""
    found: list[Statistics] = []

    def keep(index: int, x: Tensor) -> Statistics:
        found.append((x.mean(2, keepdim=True), x.var(2, correction=0, keepdim=True)))
        return found[-1]

    logits(network, training.x, keep)
    return lambda index, x: found[index]


def track(network: nn.Sequential, average: Average) -> list[evenorm.BatchNorm1d]:
    """Return layers that see what the network's batch norms see in training, and only keep statistics of it."""
    trackers = []
    for layer in network:
        if isinstance(layer, BatchNorm):
            tracker = evenorm.BatchNorm1d(layer.layer.num_features, affine=False, average=average)
            layer.layer.register_forward_pre_hook(_observe(tracker))
            trackers.append(tracker)
    return trackers


def _observe(tracker: evenorm.BatchNorm1d) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        with torch.no_grad():
            tracker(inputs[0].detach())

    return hook


def by_member(values: Tensor | None, members: int) -> Tensor:
    """Return a layer's vector (S*C,) as (S, C, 1)."""
    assert values is not None
    return values.detach().view(members, -1, 1).clone()
