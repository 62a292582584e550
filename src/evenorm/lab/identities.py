"""Statements about batch norm that hold exactly: each as the largest error of what a route makes of it.

A route is a way to compute batch norm in training: evenorm's layer, or algorithm 1 as printed. What it returns
is compared with a second derivation in float64. An error counts relative to the numbers that were added up, so
that a few roundings of the route's type are all it may be. Numbers in brackets are equations of docs/math.md.

Legend: x (m, C) holds m values of each of C channels; weight, bias (C,); g the gradient of the loss by y.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import evenorm
from evenorm.lab.data import digits
from evenorm.lab.language import Text
from evenorm.lab.trials import random_seed

M, CHANNELS, EPS = 64, 32, 1e-3
NO_EPS = 1e-300  # stands for ε = 0, which a layer refuses; in float64, as which eps is added, it changes nothing
BATCHES = 20_000  # of the Monte-Carlo means
ROUNDINGS = 16 * math.log2(M)  # papers' bound on kernels: 16 roundings for each doubling of the number of values


@dataclass(frozen=True)
class Route:
    """One way to compute batch norm in training, in one floating-point type."""

    name: str
    words: Text
    dtype: torch.dtype
    normalise: Callable[[Tensor, Tensor, Tensor, float], Tensor]  # x, weight, bias, eps
    variance: Callable[[Tensor], Tensor]  # the unbiased variance that inference is given

    @property
    def rounding(self) -> float:
        """Return half the gap between 1 and the next number."""
        return torch.finfo(self.dtype).eps / 2


class Case(NamedTuple):
    """Random values of a route's type, and random directions; all (m, C) or (C,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    g: Tensor
    u: Tensor
    by_weight: Tensor
    by_bias: Tensor


def layer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return what evenorm's layer makes of x in training, differentiable by weight and bias too."""
    module = evenorm.BatchNorm1d(x.shape[1], eps=eps, dtype=x.dtype)
    y: Tensor = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))
    return y


def layer_variance(x: Tensor) -> Tensor:
    """Return the unbiased variance that evenorm's layer keeps of one batch."""
    module = evenorm.BatchNorm1d(x.shape[1], momentum=1.0, affine=False, dtype=x.dtype)
    module(x)
    assert module.running_var is not None
    return module.running_var


def printed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return algorithm 1 of Ioffe & Szegedy, line by line."""
    mean = x.sum(0) / len(x)
    variance = (x - mean).square().sum(0) / len(x)
    standardised = (x - mean) / torch.sqrt(variance + eps)
    return weight * standardised + bias


LAYER64 = Route("layer, float64", Text("the layer, float64", "층, float64"), torch.float64, layer, layer_variance)
LAYER32 = replace(
    LAYER64, name="layer, float32", words=Text("the layer, float32", "층, float32"), dtype=torch.float32
)
PRINTED = Route(
    "printed",
    Text("as printed, float64", "인쇄된 그대로, float64"),
    torch.float64,
    printed,
    lambda x: x.var(0, correction=0) * len(x) / (len(x) - 1),
)
LAYERS = (LAYER64, LAYER32)
ROUTES = (*LAYERS, PRINTED)


def draw(route: Route, stream: str, m: int = M, channels: int = CHANNELS) -> Case:
    """Return random values, always the same ones for the same stream: means up to 3, deviations 0.5 to 2."""
    generator = torch.Generator().manual_seed(random_seed(0, stream))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(m, channels) * (0.5 + 1.5 * torch.rand(channels, generator=generator)) + 2 * normal(channels)
    shapes = ((channels,), (channels,), (m, channels), (m, channels), (channels,), (channels,))
    return Case(*(part.to(route.dtype) for part in (x, *(normal(*shape) for shape in shapes))))


def relative(found: Tensor, true: Tensor, scale: Tensor) -> float:
    """Return the largest |found − true| / scale."""
    return float(((found.detach().double() - true.detach().double()).abs() / scale.detach()).max())


class Standard(NamedTuple):
    """A case standardised in float64: x̂ and s = 1/√(σ² + ε), and the case's own numbers widened."""

    xhat: Tensor
    s: Tensor
    case: Case


def standardise(case: Case, eps: float = EPS) -> Standard:
    """Return x̂ and s in float64, by a route of their own."""
    wide = Case(*(part.double() for part in case))
    variance, mean = torch.var_mean(wide.x, 0, correction=0)
    s = torch.rsqrt(variance + eps)
    return Standard((wide.x - mean) * s, s, wide)


def project(h: Tensor, xhat: Tensor) -> Tensor:
    """Return A h = h − ⟨h⟩ − x̂⟨h x̂⟩ [12]."""
    return h - h.mean(0) - xhat * (h * xhat).mean(0)


def terms(h: Tensor, xhat: Tensor) -> Tensor:
    """Return the size of what A h adds up."""
    return h.abs() + h.mean(0).abs() + xhat.abs() * (h * xhat).abs().mean(0)


def forward(route: Route) -> float:
    """Compare y with algorithm 1."""
    case = draw(route, "forward")
    xhat, s, wide = standardise(case)
    y = route.normalise(case.x, case.weight, case.bias, EPS)
    size = (wide.weight * s).abs() * (wide.x.abs() + wide.x.mean(0).abs()) + wide.bias.abs()
    return relative(y, wide.weight * xhat + wide.bias, size)


def gradients(route: Route, case: Case, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, weight and bias that autograd finds through the route."""
    x, weight, bias = (part.clone().requires_grad_() for part in case[:3])
    dx, dweight, dbias = torch.autograd.grad(route.normalise(x, weight, bias, eps), (x, weight, bias), case.g)
    return dx, dweight, dbias


def backward_printed(route: Route) -> float:
    """Compare the gradients with the six printed lines of section 3, in their printed order."""
    case = draw(route, "backward printed")
    xhat, s, (x, weight, _, g, *_) = standardise(case)
    centred, m = x - x.mean(0), len(x)
    by_xhat = g * weight
    by_variance = (by_xhat * centred).sum(0) * -0.5 * s**3
    by_mean = (by_xhat * -s).sum(0) + by_variance * (-2 * centred).sum(0) / m
    by_x = by_xhat * s + by_variance * 2 * centred / m + by_mean / m
    dx, dweight, dbias = gradients(route, case)
    return max(
        relative(dx, by_x, weight.abs() * s * terms(g, xhat)),
        relative(dweight, (g * xhat).sum(0), (g * xhat).abs().sum(0)),
        relative(dbias, g.sum(0), g.abs().sum(0)),
    )


def backward_short(route: Route) -> float:
    """Compare dx with γ s (g − ⟨g⟩ − x̂⟨g x̂⟩) [8]."""
    case = draw(route, "backward short")
    xhat, s, wide = standardise(case)
    dx, _, _ = gradients(route, case)
    return relative(dx, wide.weight * s * project(wide.g, xhat), wide.weight.abs() * s * terms(wide.g, xhat))


def backward_of_two(route: Route) -> float:
    """Return the gradient by x of two values a channel, which is 0 without ε: x̂ is ±1 whatever they are."""
    case = draw(route, "two", m=2)
    xhat, s, wide = standardise(case, 0.0)
    dx, _, _ = gradients(route, case, NO_EPS)
    return relative(dx, torch.zeros(()), wide.weight.abs() * s * terms(wide.g, xhat))


class Second(NamedTuple):
    """What Φ = ⟨u, dx⟩ + a·dweight + b·dbias gives when it is differentiated by g, weight and x."""

    by_g: Tensor
    by_weight: Tensor
    by_x: Tensor


def differentiated_twice(route: Route, case: Case) -> Second:
    """Return the second derivatives that autograd finds through the route."""
    x, weight, bias, g = (part.clone().requires_grad_() for part in case[:4])
    first = torch.autograd.grad(route.normalise(x, weight, bias, EPS), (x, weight, bias), g, create_graph=True)
    cotangents = (case.u, case.by_weight, case.by_bias)
    return Second(*torch.autograd.grad(first, (g, weight, x), cotangents))


def double_backward(route: Route) -> float:
    """Compare the second derivatives with their closed form [13 to 16]."""
    case = draw(route, "double backward")
    xhat, s, (_, weight, _, g, u, a, b) = standardise(case)
    found = differentiated_twice(route, case)
    ag, au = project(g, xhat), project(u, xhat)
    gx, ux, c = ((left * right).mean(0) for left, right in ((g, xhat), (u, xhat), (u, ag)))
    by_x = -weight * s**2 * (c * xhat + gx * au + ux * ag) + a * s * ag
    size = (c.abs() + (u.abs() * terms(g, xhat)).mean(0)) * xhat.abs()
    size = size + (g * xhat).abs().mean(0) * terms(u, xhat) + (u * xhat).abs().mean(0) * terms(g, xhat)
    size = weight.abs() * s**2 * size + a.abs() * s * terms(g, xhat)
    of_g = weight.abs() * s * terms(u, xhat) + (a * xhat).abs() + b.abs()
    return max(
        relative(found.by_g, weight * s * au + a * xhat + b, of_g),
        relative(found.by_weight, s * (u * ag).sum(0), s * (u.abs() * terms(g, xhat)).sum(0)),
        relative(found.by_x, by_x, size),
    )


def central_differences(route: Route) -> float:
    """Compare the second derivative by x, along a random direction, with a central difference of the first."""
    case = draw(route, "central differences")
    direction = draw(route, "direction").g

    def phi(x: Tensor) -> Tensor:
        moved = case._replace(x=x)
        dx, dweight, dbias = gradients(route, moved)
        return (case.u * dx).sum(0) + case.by_weight * dweight + case.by_bias * dbias

    step = 1e-5
    slope = (phi(case.x + step * direction) - phi(case.x - step * direction)) / (2 * step)
    exact = differentiated_twice(route, case).by_x * direction
    return relative(slope, exact.sum(0), exact.abs().sum(0))


def inference(route: Route) -> float:
    """Compare evaluation with the last line of algorithm 2, γ/√(Var + ε) · x + (β − γ E/√(Var + ε))."""
    case = draw(route, "inference")
    module = evenorm.BatchNorm1d(CHANNELS, eps=EPS, momentum=1.0, dtype=route.dtype)
    module.load_state_dict({"weight": case.weight, "bias": case.bias}, strict=False)
    module(case.x)
    other = draw(route, "inference, another batch")
    y = module.eval()(other.x)
    mean, variance = _statistics(module)
    x, weight, bias = other.x.double(), case.weight.double(), case.bias.double()
    slope = weight / torch.sqrt(variance + EPS)
    return relative(y, slope * x + (bias - slope * mean), (slope * x).abs() + bias.abs() + (slope * mean).abs())


def folding(route: Route) -> float:
    """Compare a linear layer and batch norm in evaluation with the one linear layer they fold into."""
    case = draw(route, "folding", channels=20)
    weights = draw(route, "folding, weights", m=CHANNELS, channels=20)
    linear = nn.Linear(20, CHANNELS, dtype=route.dtype)
    norm = evenorm.BatchNorm1d(CHANNELS, momentum=1.0, dtype=route.dtype)
    with torch.no_grad():
        linear.weight.copy_(weights.g)
        norm.weight.copy_(draw(route, "folding, affine").weight)
        network = nn.Sequential(linear, norm)
        network(case.x)
        network.eval()
        y, folded = network(case.x), evenorm.fold(network, case.x).model(case.x)
        mean, variance = _statistics(norm)
        moved = norm.weight.double() / torch.sqrt(variance + norm.eps)
        size = (case.x.abs() @ linear.weight.abs().T) * moved.abs() + (moved * mean).abs()
    return relative(folded, y, size)


def cumulative(route: Route) -> float:
    """Compare a plain average of statistics with algorithm 2: E[μ_B] and m/(m − 1) · E[σ²_B] over the batches."""
    batches = [draw(route, f"batch {index}").x for index in range(10)]
    module = evenorm.BatchNorm1d(CHANNELS, average=evenorm.Cumulative(), dtype=route.dtype)
    for batch in batches:
        module(batch)
    wide = torch.stack(batches).double()
    variance, mean = torch.var_mean(wide, 1, correction=0)
    averaged = _statistics(module)
    return max(
        relative(averaged[0], mean.mean(0), mean.abs().mean(0)),
        relative(averaged[1], M / (M - 1) * variance.mean(0), variance.mean(0)),
    )


def _statistics(module: evenorm.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return the layer's running mean and variance, widened."""
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean.double(), module.running_var.double()


POPULATION = (1.0, 2.0, 4.0, 7.0, 11.0, 16.0)


def with_replacement(route: Route) -> float:
    """Average m/(m − 1) σ²_B over EVERY batch of m = 2 to 5 values drawn with replacement: the variance."""
    true = torch.tensor(POPULATION, dtype=torch.float64).var(correction=0)
    return max(_average_variance(route, itertools.product(POPULATION, repeat=m), true) for m in (2, 3, 4, 5))


def without_replacement(route: Route) -> float:
    """Average it over every batch of m different values of N: N/(N − 1) times the variance."""
    true = torch.tensor(POPULATION, dtype=torch.float64).var(correction=1)
    return max(_average_variance(route, itertools.combinations(POPULATION, m), true) for m in (2, 3, 4, 5))


def _average_variance(route: Route, batches: Iterable[tuple[float, ...]], true: Tensor) -> float:
    x = torch.tensor(list(batches), dtype=route.dtype).T.contiguous()  # a batch is a channel: one call for all
    return relative(route.variance(x).double().mean(), true, true)


def total_variance(route: Route) -> float:
    """Merge the moments of batches sorted by class [4, 5]: the mean and variance of all digits together."""
    x = digits().x_train[digits().y_train.argsort()].to(route.dtype)
    parts = [evenorm.moments(batch) for batch in x.split(60)]
    whole = sum(parts[1:], parts[0])
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    return max(relative(whole.mean, mean, mean.max()), relative(whole.variance(), variance, variance.max()))


def any_order(route: Route) -> float:
    """Merge parts of uneven size, forwards, backwards and in pairs, where the mean is 10 000 deviations away."""
    x = (draw(route, "order", m=4096).x.double() + 1e4).to(route.dtype)
    parts = [evenorm.moments(part) for part in x.split([1, 300, 2, 1793, 900, 1100])]
    pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    first, *others = (sum(order[1:], order[0]) for order in (parts, parts[::-1], pairs))
    size = first.variance() + first.mean.abs() * first.variance().sqrt()  # a mean is known to u·|mean|
    return max(relative(other.variance(), first.variance(), size) for other in others)


def mean_variance(route: Route, m: int) -> list[float]:
    """Return over 20 000 random batches: E[σ²_B]/σ², the same corrected, and its z against 1."""
    generator = torch.Generator().manual_seed(random_seed(0, f"batches of {m}"))
    x = torch.randn(m, BATCHES, generator=generator, dtype=torch.float64) * 3 + 5
    unbiased = route.variance(x) / 9
    z = (unbiased.mean() - 1) / (unbiased.std() / math.sqrt(BATCHES))
    return [float((m - 1) / m * unbiased.mean()), float(unbiased.mean()), float(z)]


def sorted_variance(route: Route) -> float:
    """Return m/(m − 1) · E[σ²_B] over the variance of all, where batches of 60 digits are sorted by class."""
    x = digits().x_train[digits().y_train.argsort()].double()
    mean_variance = torch.stack([route.variance(batch) for batch in x.split(60)[:-1]]).mean(0).sum()
    return float(mean_variance / x.var(0, correction=0).sum())
