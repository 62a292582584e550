"""Many small networks of one shape, trained as ONE: at this size a training step is all overhead.

Legend: S members (one seed and learning rate each), C channels, N samples. Activations are (S, C, N), so that
a linear layer is one `torch.baddbmm`, and batch norm sees (1, S*C, N) without a copy: its pool over (1, N) is
each member's own batch. Member s of every parameter p is p.view(S, -1)[s].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evenorm.lab.trials import random_seed
from evenorm.layers import BatchNorm1d


class Linear(nn.Module):
    """S linear layers side by side: weight (S, out, in) times x (S, in, N), plus bias (S, out, 1)."""

    def __init__(self, members: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        """Take the number of members and the widths of each one's layer."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, outputs, 1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, out, N)."""
        return torch.bmm(self.weight, x) if self.bias is None else torch.baddbmm(self.bias, self.weight, x)


class BatchNorm(nn.Module):
    """S batch norms side by side: evenorm's own layer over S*C channels."""

    def __init__(self, members: int, channels: int, *, affine: bool = True) -> None:
        """Take the number of members, the channels of each, and whether they are scaled and shifted."""
        super().__init__()
        self.layer = BatchNorm1d(members * channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, C, N), each member normalised by its own batch."""
        normalised: Tensor = self.layer(x.reshape(1, -1, x.shape[2]))
        return normalised.view(x.shape)


class Sigmoid(nn.Module):
    """The logistic function, rounded alike wherever a value lies.

    `torch.sigmoid` rounds the last few values of a tensor otherwise than the rest, and which those are depends
    on how many members are stacked; a trial's numbers may not. Costs 5 % of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 / (1 + exp(-x))."""
        result: Tensor = _Logistic.apply(x)
        return result


class _Logistic(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        y = (x * 0.5).tanh_().mul_(0.5).add_(0.5)
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (y,) = context.saved_tensors
        return torch.ops.aten.sigmoid_backward(gradient, y)  # type: ignore[no-any-return]


def perceptron(
    members: int,
    widths: Sequence[int],
    activation: Callable[[], nn.Module],
    *,
    normalise: bool,
    affine: bool = True,
    after: bool = False,
) -> nn.Sequential:
    """Return members networks widths[0]-...-widths[-1], with batch norm before or after each activation if asked.

    Before batch norm a linear layer has no bias: batch norm's shift takes its place (Ioffe & Szegedy 2015, §3.2).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers.append(Linear(members, inputs, outputs, bias=after or not normalise))
        layers.append(activation())
        if normalise:
            layers.insert(len(layers) - (not after), BatchNorm(members, outputs, affine=affine))
    layers.append(Linear(members, widths[-2], widths[-1]))
    return nn.Sequential(*layers)


def initialise_(network: nn.Module, seeds: Sequence[int], deviation: Callable[[int], float]) -> None:
    """Draw every linear weight of member s from N(0, deviation(inputs)²), by seeds[s]; biases stay 0.

    The k-th linear layer of a network draws from a stream of its own, so two arms with the same linear layers
    start from the same weights whatever stands between those layers.
    """
    linear = [module for module in network.modules() if isinstance(module, Linear)]
    with torch.no_grad():
        for index, layer in enumerate(linear):
            for member, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(random_seed(seed, f"weight {index}"))
                weight = layer.weight[member]
                weight.normal_(0.0, deviation(weight.shape[1]), generator=generator)
