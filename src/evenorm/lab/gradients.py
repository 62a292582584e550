"""What a step does to loss and gradients: along the gradient, and to a layer because those before it moved.

Legend as in `networks`: S members, activations (S, C, N). A block is a linear layer with all that follows it up
to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evenorm.lab.networks import Linear
from evenorm.lab.training import Criterion, Samples


def blocks(network: nn.Sequential) -> list[list[nn.Parameter]]:
    """Return the parameters of each block, a linear layer's weight first."""
    found: list[list[nn.Parameter]] = []
    for module in network:
        if isinstance(module, Linear):
            found.append([module.weight])
            found[-1] += [module.bias] if module.bias is not None else []
        elif found:
            found[-1] += module.parameters()
    return found


def parameters_of(network: nn.Sequential) -> list[Tensor]:
    """Return a copy of all parameters, in the order of `blocks`."""
    return [parameter.detach().clone() for block in blocks(network) for parameter in block]


def shift_of_gradients(
    network: nn.Sequential, before: Sequence[Tensor], samples: Samples, criterion: Criterion
) -> tuple[Tensor, Tensor]:
    """Compare each weight's gradient with what it is once the blocks before it have taken their step.

    G is ∂loss/∂Wᵢ with all parameters as `before`; G′ the same with those of the blocks before i as they are in
    the network now (Santurkar et al. 2018, definition 2.1). All on the same samples.

    Returns:
        cos(G, G′) and ‖G − G′‖ / ‖G‖, each (S, blocks - 1): the first block has none before it.
    """
    parts = blocks(network)
    after = [parameter.detach().clone() for block in parts for parameter in block]
    network.train()
    _set(parts, before)
    old = _weight_gradients(network, samples, criterion, [block[0] for block in parts])
    cosines, distances = [], []
    moved = 0
    for index in range(1, len(parts)):
        moved += len(parts[index - 1])
        _set(parts, [*after[:moved], *before[moved:]])
        (new,) = _weight_gradients(network, samples, criterion, [parts[index][0]])
        g = old[index]
        cosines.append(_product([g], [new]) / (_norm([g]) * _norm([new])))
        distances.append(_norm([g - new]) / _norm([g]))
    _set(parts, after)
    return torch.stack(cosines, 1), torch.stack(distances, 1)


def _weight_gradients(
    network: nn.Sequential, samples: Samples, criterion: Criterion, weights: Sequence[Tensor]
) -> list[Tensor]:
    loss = criterion(network(samples.x), samples.y).mean(1).sum()
    return list(torch.autograd.grad(loss, weights))


@torch.no_grad()
def _set(parts: Sequence[Sequence[nn.Parameter]], values: Sequence[Tensor]) -> None:
    for parameter, value in zip([parameter for block in parts for parameter in block], values, strict=True):
        parameter.copy_(value)


class Along(NamedTuple):
    """What lies along minus the gradient: at each of the lengths, for each member."""

    loss: Tensor  # at w itself, (S,)
    losses: Tensor  # (S, lengths)
    distances: Tensor  # ‖g′ − g‖, (S, lengths)
    cosines: Tensor  # of g′ and g, (S, lengths)
    norm: Tensor  # ‖g‖, (S,)
    weights: Tensor  # ‖w‖² of the linear layers, (S,)


def along_gradient(
    network: nn.Sequential, samples: Samples, lengths: Sequence[float], criterion: Criterion
) -> Along:
    """Walk from the network's parameters w along −g, and take loss and gradient g′ at w − length · g.

    All parameters, training mode, the same samples throughout (Santurkar et al. 2018, section 3.1 and appendix A).
    """
    parts = [[parameter for block in blocks(network) for parameter in block]]
    start = [parameter.detach().clone() for parameter in parts[0]]
    network.train()
    here, g = _loss_and_gradients(network, samples, criterion, parts[0])
    losses, distances, cosines = [], [], []
    for length in lengths:
        _set(parts, [place - length * slope for place, slope in zip(start, g, strict=True)])
        loss, moved = _loss_and_gradients(network, samples, criterion, parts[0])
        losses.append(loss)
        distances.append(_norm([a - b for a, b in zip(moved, g, strict=True)]))
        cosines.append(_product(moved, g) / (_norm(moved) * _norm(g)))
    _set(parts, start)
    weights = _norm([block[0].detach() for block in blocks(network)]).square()
    every = [torch.stack(found, 1) for found in (losses, distances, cosines)]
    return Along(here, every[0], every[1], every[2], _norm(g), weights)


def _loss_and_gradients(
    network: nn.Sequential, samples: Samples, criterion: Criterion, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    loss = criterion(network(samples.x), samples.y).mean(1)
    return loss.detach(), list(torch.autograd.grad(loss.sum(), parameters))


def _product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return each member's inner product over all tensors, (S,); the first of a is (S, ...).

    Member by member: how the sum of a row is rounded depends on how many rows there are.
    """
    members = a[0].shape[0]
    products = torch.cat([(x * y).reshape(members, -1) for x, y in zip(a, b, strict=True)], 1)
    return torch.stack([row.sum() for row in products])


def _norm(a: Sequence[Tensor]) -> Tensor:
    return _product(a, a).sqrt()
