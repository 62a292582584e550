"""The rounding error of the variance, by algorithm and by distance of the mean from 0.

κ = √(⟨x²⟩ / σ²) says how many times larger the values are than their spread; the error of an algorithm grows
with a power of it (Chan, Golub & LeVeque 1983). The truth is exact rational arithmetic on the rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import geometric_mean

import torch
from torch import Tensor

from evenorm.functional import moments
from evenorm.lab.identities import Route
from evenorm.lab.trials import random_seed

KAPPAS = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
SIZES = (4, 64, 1024)
DRAWS = 8  # channels a κ and size


def textbook(x: Tensor) -> Tensor:
    """Return (⟨x²⟩ − ⟨x⟩²) · n/(n − 1): error κ² u."""
    n = len(x)
    return (x.square().sum(0) - x.sum(0).square() / n) / (n - 1)


def welford(x: Tensor) -> Tensor:
    """Return the variance of a running update, one value at a time: error κ u."""
    mean, m2 = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for count, value in enumerate(x, start=1):
        step = value - mean
        mean = mean + step / count
        m2 = m2 + step * (value - mean)
    return m2 / (len(x) - 1)


def two_passes(x: Tensor) -> Tensor:
    """Return the mean square about the mean: error (κ u)²."""
    return (x - x.mean(0)).square().sum(0) / (len(x) - 1)


def pooled(x: Tensor) -> Tensor:
    """Return what evenorm's layers normalise by, made unbiased."""
    return moments(x).variance(1)


ALGORITHMS: dict[str, Callable[[Tensor], Tensor]] = {
    "textbook": textbook,
    "welford": welford,
    "two passes": two_passes,
    "layer": pooled,
}


def values(kappa: float, size: int, dtype: torch.dtype) -> Tensor:
    """Return (size, DRAWS) values with deviation 1 about a mean of √(κ² − 1)."""
    generator = torch.Generator().manual_seed(random_seed(0, f"variance {kappa:g} {size}"))
    x = torch.randn(size, DRAWS, generator=generator, dtype=torch.float64)
    return (x + math.sqrt(kappa**2 - 1)).to(dtype)


def exact(x: Tensor) -> list[Fraction]:
    """Return each channel's unbiased variance without any rounding."""
    variances = []
    for channel in x.T.tolist():
        numbers = [Fraction(value) for value in channel]
        whole = sum(numbers, Fraction(0))
        squares = sum((number * number for number in numbers), Fraction(0))
        variances.append((squares - whole * whole / len(numbers)) / (len(numbers) - 1))
    return variances


def errors(variance: Callable[[Tensor], Tensor], x: Tensor, true: Sequence[Fraction]) -> list[float]:
    """Return |found − true| / true of each channel, itself computed exactly."""
    found = variance(x).double().tolist()
    return [float(abs(Fraction(value) - right) / right) for value, right in zip(found, true, strict=True)]


def sweep(dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> dict[str, list[float]]:
    """Return the geometric mean of each algorithm's error at each κ, floored at 1e-18."""
    found: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    for kappa in KAPPAS:
        sets = [values(kappa, size, dtype) for size in sizes]
        truths = [exact(x) for x in sets]
        for name, algorithm in ALGORITHMS.items():
            every = [error for x, true in zip(sets, truths, strict=True) for error in errors(algorithm, x, true)]
            found[name].append(geometric_mean(max(error, 1e-18) for error in every))
    return found


def worst(route: Route) -> float:
    """Return the largest error of the layer's variance over all κ and sizes."""
    sets = [values(kappa, size, route.dtype) for kappa in KAPPAS for size in SIZES]
    return max(error for x in sets for error in errors(pooled, x, exact(x)))
