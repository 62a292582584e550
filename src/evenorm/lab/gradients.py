"""What a step does to gradients: how far one layer's moves because the layers before it moved.

Legend as in `networks`: S members, activations (S, C, N). A block is a linear layer with all that follows it up
to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        cosines.append(nn.functional.cosine_similarity(g, new, dim=1))
        distances.append((g - new).norm(dim=1) / g.norm(dim=1))
    _set(parts, after)
    return torch.stack(cosines, 1), torch.stack(distances, 1)


def _weight_gradients(
    network: nn.Sequential, samples: Samples, criterion: Criterion, weights: Sequence[Tensor]
) -> list[Tensor]:
    loss = criterion(network(samples.x), samples.y).mean(1).sum()
    return [gradient.flatten(1) for gradient in torch.autograd.grad(loss, weights)]


@torch.no_grad()
def _set(parts: Sequence[Sequence[nn.Parameter]], values: Sequence[Tensor]) -> None:
    for parameter, value in zip([parameter for block in parts for parameter in block], values, strict=True):
        parameter.copy_(value)
