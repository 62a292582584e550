"""What batch norm does to the weights before it and to the gradient through it, as identities.

Routes, cases and errors as in `identities`; u (m, inputs) are a layer's inputs, W (C, inputs) its weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from evenorm.lab.data import digits
from evenorm.lab.identities import CHANNELS, EPS, NO_EPS, Case, Route, draw, gradients, relative, standardise

FACTOR = 37.3  # no power of two, by which a multiplication would not round
DRAWS = 2000  # of theorem 4.1


class Layered(NamedTuple):
    """Batch norm behind a linear layer: its output, and the gradients by the layer's inputs and weights."""

    y: Tensor
    by_u: Tensor
    by_w: Tensor


def _layered(route: Route, u: Tensor, w: Tensor, case: Case, eps: float) -> Layered:
    u, w = u.clone().requires_grad_(), w.clone().requires_grad_()
    y = route.normalise(u @ w.T, case.weight, case.bias, eps)
    return Layered(y.detach(), *torch.autograd.grad(y, (u, w), case.g))


def scaled_weights(route: Route) -> float:
    """Compare BN((aW)u) with BN(Wu): the same output and gradient by u, and 1/a of the gradient by W."""
    case, inputs = draw(route, "scaled"), draw(route, "scaled, inputs", channels=20)
    w = draw(route, "scaled, weights", m=CHANNELS, channels=20).g
    once = _layered(route, inputs.x, w, case, NO_EPS)
    scaled = _layered(route, inputs.x, FACTOR * w, case, NO_EPS)
    return max(
        relative(scaled.y, once.y, once.y.abs().max().double()),
        relative(scaled.by_u, once.by_u, once.by_u.abs().max().double()),
        relative(FACTOR * scaled.by_w, once.by_w, once.by_w.abs().max().double()),
    )


def radial_gradient(route: Route) -> float:
    """Compare ⟨w, ∂ℓ/∂w⟩ of each unit with ε/(σ² + ε) · γ ∂ℓ/∂γ: without ε a step is at right angles to w."""
    eps = 0.5
    case, inputs = draw(route, "radial"), draw(route, "radial, inputs", channels=20).x
    w = draw(route, "radial, weights", m=CHANNELS, channels=20).g
    found = _layered(route, inputs, w, case, eps)
    _, by_weight, _ = gradients(route, case._replace(x=inputs @ w.T), eps)
    variance = (inputs.double() @ w.double().T).var(0, correction=0)
    true = eps / (variance + eps) * case.weight.double() * by_weight.double()
    radial = (w.double() * found.by_w.double()).sum(1)
    return relative(radial, true, (w.double() * found.by_w.double()).abs().sum(1))


def scaled_training(route: Route) -> float:
    """Train twice, (W₀, η) and (37.3 W₀, 37.3² η), all weights before batch norm: the largest change of a loss."""
    first, second = (_losses(route, scale) for scale in (1.0, FACTOR))
    return relative(second, first, first)


def _losses(route: Route, scale: float, steps: int = 50, rate: float = 0.5) -> Tensor:
    x, y = digits().x_train[:256].to(route.dtype), digits().y_train[:256]
    generator = torch.Generator().manual_seed(0)
    weights = [
        scale * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64).to(route.dtype)
        for inputs, outputs in ((64, 30), (30, 10))
    ]
    ones = [torch.ones(len(w), dtype=route.dtype) for w in weights]
    losses = []
    for _ in range(steps):
        weights = [w.requires_grad_() for w in weights]
        h = x
        for w, one in zip(weights, ones, strict=True):
            h = route.normalise(torch.tanh(h) @ w.T, one, 0 * one, NO_EPS)
        loss = functional.cross_entropy(h, y)
        found = torch.autograd.grad(loss, weights)
        weights = [(w - scale**2 * rate * g).detach() for w, g in zip(weights, found, strict=True)]
        losses.append(loss.detach().double())
    return torch.stack(losses)


class Theorem(NamedTuple):
    """Both sides of Santurkar et al.'s theorem 4.1 over many draws, as shares of γ²/σ² ‖g‖²."""

    left: Tensor  # ‖∂ℓ/∂x‖²
    corrected: Tensor  # with 1/m, as the paper's own proof gives it
    printed: Tensor  # with 1/√m, as main text and appendix print it
    distance: Tensor  # of the mean from 0, in deviations: x̂ is known to so many roundings


def theorem(route: Route, draws: int = DRAWS) -> Theorem:
    """Return both sides for random x and g: draws are channels, so one call has them all."""
    case = draw(route, "theorem 4.1", channels=draws)
    xhat, s, wide = standardise(case, 0.0)
    dx, _, _ = gradients(route, case, NO_EPS)
    m, whole = len(case.x), wide.g.square().sum(0)
    centred = whole - wide.g.sum(0).square() / m
    along = (wide.g * xhat).sum(0).square()
    left = dx.double().square().sum(0) / (wide.weight * s).square() / whole
    sides = (centred - along / m) / whole, (centred - along / math.sqrt(m)) / whole
    return Theorem(left, *sides, wide.x.mean(0).abs() * s)


def theorem_corrected(route: Route) -> float:
    """Return how far the two sides of theorem 4.1 with 1/m are apart."""
    found = theorem(route)
    return relative(found.left, found.corrected, 1 + found.distance)


def curvature(route: Route) -> float:
    """Compare the curvature of a quadratic loss along its gradient with theorem 4.2, which is an equality too."""
    case = draw(route, "curvature")
    root = draw(route, "curvature, hessian", m=len(case.x), channels=len(case.x)).g
    hessian = (root @ root.T) / len(case.x)  # of the loss by y, the same for each channel
    x = case.x.clone().requires_grad_()
    y = route.normalise(x, case.weight, torch.zeros_like(case.bias), NO_EPS)
    loss = (0.5 * y * (hessian @ y) + case.g * y).sum()
    (v,) = torch.autograd.grad(loss, x, create_graph=True)
    (hv,) = torch.autograd.grad(v, x, v.detach())
    xhat, s, wide = standardise(case, 0.0)
    v, hessian = v.detach().double(), hessian.double()
    by_y = hessian @ (wide.weight * xhat) + wide.g
    scale = (wide.weight * s).square()
    true = scale * (v * (hessian @ v)).sum(0) - wide.weight * s**2 * (by_y * xhat).mean(0) * v.square().sum(0)
    size = scale * (v * (hessian @ v)).sum(0) + wide.weight.abs() * s**2 * (by_y * xhat).abs().mean(
        0
    ) * v.square().sum(0)
    return relative((v * hv.double()).sum(0), true, size)


def largest_value(route: Route) -> float:
    """Compare the largest |x̂| of one value among m − 1 equal ones with √(m − 1), the most it can be."""
    case = draw(route, "outlier")
    x = torch.full_like(case.x, 3.0)
    x[0] = x[0] + case.weight
    one = torch.ones_like(case.bias)
    y = route.normalise(x, one, 0 * one, NO_EPS)
    limit = torch.tensor(math.sqrt(len(x) - 1), dtype=torch.float64)
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    return relative(y.abs().amax(0), limit, limit * (1 + mean.abs() / variance.sqrt()))


def constant_channel(route: Route) -> float:
    """Return |y − bias| where a channel is constant, at values from 1e-30 to 1e38."""
    values = torch.tensor([0.0, 1e-30, 0.1, 1 / 3, 100.0, 12345.678, 1e10, 1e38], dtype=route.dtype)
    case = draw(route, "constant", channels=len(values))
    y = route.normalise(values.expand(len(case.x), -1).contiguous(), case.weight, case.bias, 1e-5)
    return relative(y, case.bias, case.bias.abs())


def own_channel(route: Route) -> float:
    """Return how much NaN and inf in two channels change the others; inf if they do not spoil their own."""
    case = draw(route, "nan")
    clean = route.normalise(case.x, case.weight, case.bias, EPS)
    x = case.x.clone()
    x[3, 5], x[0, 9] = math.nan, math.inf
    y = route.normalise(x, case.weight, case.bias, EPS)
    others = [channel for channel in range(CHANNELS) if channel not in (5, 9)]
    if torch.isfinite(y[:, [5, 9]]).any(0).all():
        return math.inf
    return relative(y[:, others], clean[:, others], torch.ones(()))
