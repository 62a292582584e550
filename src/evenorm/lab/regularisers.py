"""What is set against overfitting beside batch norm: dropout, and penalties on the size of weights.

Legend as in `networks`: S members, activations (S, C, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenorm.lab.trials import random_seed


class Dropout(nn.Module):
    """S dropouts side by side: in training every value is 0 with probability share, else divided by 1 − share.

    Each member draws its masks from a stream of its own, so they do not depend on who else is in the stack.
    A value costs one random byte, an eighth of what a random float does: the share counts in 256ths.
    """

    def __init__(self, seeds: Sequence[int], stream: str, share: float) -> None:
        """Take each member's seed, the name of this layer's stream, and the share to drop."""
        super().__init__()
        self.dropped = round(256 * share)
        self.generators = [torch.Generator().manual_seed(random_seed(seed, stream)) for seed in seeds]

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, C, N)."""
        if not self.training:
            return x
        kept = torch.stack([self._bytes(generator, x[0].numel()) for generator in self.generators])
        return x * (kept >= self.dropped).view(x.shape) * (256 / (256 - self.dropped))

    @staticmethod
    def _bytes(generator: torch.Generator, count: int) -> Tensor:
        words = torch.empty(math.ceil(count / 8), dtype=torch.int64)
        return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]


class Lasso:
    """λ Σ |w|, by its gradient."""

    def __init__(self, strength: float) -> None:
        """Take λ."""
        self.strength = strength

    def __call__(self, weight: Tensor) -> Tensor:
        """Return λ sign(w)."""
        return self.strength * weight.sign()


class Ridge:
    """λ/2 Σ w², by its gradient: the weight decay of plain gradient descent."""

    def __init__(self, strength: float) -> None:
        """Take λ."""
        self.strength = strength

    def __call__(self, weight: Tensor) -> Tensor:
        """Return λ w."""
        return self.strength * weight
