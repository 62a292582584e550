"""Noise that makes the distribution of every unit jump at every step (Santurkar et al. 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evenorm.lab.trials import random_seed

MEAN, SCALE, SPREAD = 0.5, 1.25, 0.1  # n_μ, n_σ and r_μ = r_σ of appendix A.2.1


class Shaken(nn.Module):
    """Shift and scale what passes, and remember the moments of what comes out.

    For each unit and call μ ~ U(−0.5, 0.5) and σ ~ U(1, 1.25); for each of its values m ~ U(μ − 0.1, μ + 0.1) and
    s ~ N(σ, 0.1²); then x ← s x + m. Every member draws from a generator of its own.
    """

    def __init__(self, seeds: Sequence[int], stream: str, *, noisy: bool) -> None:
        """Take the members' seeds; without noise the moments are remembered all the same."""
        super().__init__()
        self.generators = [torch.Generator().manual_seed(random_seed(seed, stream)) for seed in seeds]
        self.noisy = noisy
        self.mean = self.variance = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, C, N), shaken."""
        if self.noisy:
            drawn = [_draw(x.shape[1:], generator) for generator in self.generators]
            scale, shift = (torch.stack(parts) for parts in zip(*drawn, strict=True))
            x = torch.addcmul(shift, scale, x)
        values = x.detach()
        self.mean = values.mean(2)
        self.variance = (values - self.mean[:, :, None]).square_().mean(2)
        return x


def _draw(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one member's s and m, each (C, N)."""
    units, samples = shape
    even = torch.rand(units, samples + 2, generator=generator)
    sigma, mu = 1 + (SCALE - 1) * even[:, :1], MEAN * (2 * even[:, 1:2] - 1)
    scale = torch.randn(units, samples, generator=generator).mul_(SPREAD).add_(sigma)
    return scale, (2 * even[:, 2:] - 1).mul_(SPREAD).add_(mu)
