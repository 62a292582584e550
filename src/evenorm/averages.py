"""Averages: how the moments of batches become the statistics of the population.

Each is a small frozen record of options; the values themselves live in the layer's buffers. An average says
how much of the new batch enters the running statistics (docs/math.md, eq. 10 and 11), and that is all that an
exponential and a cumulative average need; a window also has to remember what it will forget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Exponential:
    r"""An exponential average: each batch enters with weight ``momentum``, and older ones fade.

    .. math:: r_t = (1 - m)\, r_{t-1} + m\, b_t

    Args:
        momentum: the weight m of the NEW batch, between 0 and 1, as in torch (Keras and flax mean 1 - m).
        debias: take the initial value out. Without it, after t batches ``(1 - m) ** t`` of the running
            statistics are still the 0 and 1 they began with: 35 % after 10 batches at m = 0.1. With it, batch t
            enters with weight ``m / (1 - (1 - m) ** t)``, so that the first counts in full and the weights of
            all batches add up to 1 at every step.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3, average=evenorm.Exponential(0.1, debias=True))
    >>> x = torch.randn(8, 3)
    >>> _ = layer(x)
    >>> torch.testing.assert_close(layer.running_mean, x.mean(0))

    Source: the debiased form is Adam's (Kingma & Ba 2015, section 3), written as a recursion (math.md, eq. 11).
    """

    momentum: float = 0.1
    debias: bool = False

    def __post_init__(self) -> None:
        """Refuse a debiased average that would divide by nothing."""
        if self.debias and not 0 < self.momentum <= 1:
            raise ValueError(f"Exponential(debias=True) needs a momentum above 0, up to 1, got {self.momentum!r}")

    def weight(self, batches: Tensor | None) -> Tensor | float:
        """Return the weight of batch number ``batches``, counted from 1; 0 where that is needed but unknown."""
        if not self.debias or self.momentum == 1:
            return self.momentum
        if batches is None:
            return 0.0
        before = -((batches.double() - 1) * math.log1p(-self.momentum)).expm1()  # what all batches before weigh
        return self.momentum / (self.momentum + (1 - self.momentum) * before)  # 1 for the first, exactly


@dataclass(frozen=True)
class Cumulative:
    r"""The plain average of all batches so far, each with the same weight: torch's ``momentum=None``.

    .. math:: r_t = r_{t-1} + \frac1t (b_t - r_{t-1})

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3, average=evenorm.Cumulative())
    >>> batches = torch.randn(5, 8, 3)
    >>> for x in batches:
    ...     _ = layer(x)
    >>> torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    """

    def weight(self, batches: Tensor | None) -> Tensor | float:
        """Return 1 / ``batches``; 0 where that is unknown, as in torch."""
        return 0.0 if batches is None else 1 / batches.double().clamp(min=1)


@dataclass(frozen=True)
class Window:
    r"""The plain average of the last ``size`` batches; older ones are forgotten altogether.

    .. math:: r_t = \frac1k \sum_{j=t-k+1}^{t} b_j, \qquad k = \min(t, \mathrm{size})

    Args:
        size: how many batches to remember, at least 1. The layer keeps their means and variances in the buffers
            ``window_mean`` and ``window_var``, (size, C), which are saved and loaded with it.

    Raises:
        ValueError: a size below 1.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm1d(3, average=evenorm.Window(2))
    >>> batches = torch.randn(5, 8, 3)
    >>> for x in batches:
    ...     _ = layer(x)
    >>> torch.testing.assert_close(layer.running_mean, batches[-2:].mean((0, 1)))
    """

    size: int

    def __post_init__(self) -> None:
        """Refuse a window that holds nothing."""
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Window needs a size of at least 1 batch, got {self.size!r}")


Average = Exponential | Cumulative | Window
