"""One trained layer taken apart: what the page's sliders for γ and β work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_ACTIVATIONS = ("sigmoid", "tanh", "relu")


@dataclass(frozen=True)
class LayerView:
    """One unit of one trained layer: what enters its batch norm, and what the batch norm has learned.

    Args:
        name: what to call the unit, for example "hidden layer 3, unit 17".
        pre_activations: the values that enter the batch norm, one a sample; some hundreds are plenty.
        gamma: the learned scale (`weight`).
        beta: the learned shift (`bias`).
        mean: the mean that the layer subtracts.
        std: the standard deviation that the layer divides by, sqrt(var + eps); positive.
        activation: what follows the batch norm: "sigmoid", "tanh" or "relu".

    Raises:
        ValueError: fewer than two values, a value that is not finite, std not positive, an unknown activation.
    """

    name: str
    pre_activations: Sequence[float]
    gamma: float
    beta: float
    mean: float
    std: float
    activation: str = "sigmoid"

    def __post_init__(self) -> None:
        """Refuse what could not be drawn."""
        if len(self.pre_activations) < 2:
            raise ValueError(
                f"a layer view needs at least two pre-activations, got {len(self.pre_activations)}; "
                "pass one value a sample"
            )
        scalars = (self.gamma, self.beta, self.mean, self.std)
        if not all(math.isfinite(value) for value in (*scalars, *self.pre_activations)):
            raise ValueError("a layer view needs finite numbers, got NaN or infinity; choose a unit that trained")
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}; pass sqrt(var + eps)")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}")


def slider_limits(view: LayerView) -> dict[str, tuple[float, float]]:
    """How far the sliders reach: always past what was learned, and far enough to saturate a sigmoid.

    >>> slider_limits(LayerView("unit", [0.0, 1.0], gamma=-1.5, beta=0.2, mean=0.5, std=0.5))["gamma"]
    (-5.0, 5.0)
    """
    gamma = float(max(5, math.ceil(abs(view.gamma) + 1)))
    beta = float(max(4, math.ceil(abs(view.beta) + 1)))
    return {"gamma": (-gamma if view.gamma < 0 else 0.0, gamma), "beta": (-beta, beta)}
