"""A batch norm layer by the book, in float64: gathered rows, a loop over sub-batches, averages by their definition.

It is written apart from the package and by other routes, with autograd for all gradients. `situations` draws
layers and what they go through, and `agree` plays them to a layer of ours and to the book.
Legend: x is (N, C, *positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import evenorm
from evenorm import Cumulative, Exponential, Renorm, Window

EPS = 1e-2
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,  # not 0 at 0: the padding has to be zeroed behind it
}
BAD = (math.nan, math.inf, -math.inf, 1e300, 0.0)  # what may stand in the padding


def limit(batch: int, start: int, end: int, low: float, high: float) -> float:
    """Return a limit of renormalisation for batch number `batch`: low up to start, high from end on."""
    if batch <= start:
        return low
    return high if batch >= end else low + (high - low) * (batch - start) / (end - start)


@dataclass
class Book:
    """The layer: its options, and the mean and unbiased variance of every batch that counted."""

    weight: Tensor
    bias: Tensor
    activation: str | None = None
    average: Any = None
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    on_single: str = "raise"
    history: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    training: bool = True

    def running(self) -> tuple[Tensor, Tensor]:
        start = (torch.zeros_like(self.weight), torch.ones_like(self.weight))
        average, batches = self.average or Exponential(), len(self.history)
        if not batches:
            return start
        means, variances = (torch.stack(values) for values in zip(*self.history, strict=True))
        if isinstance(average, Cumulative):
            return means.mean(0), variances.mean(0)
        if isinstance(average, Window):
            return means[-average.size :].mean(0), variances[-average.size :].mean(0)
        m, order = average.momentum, torch.arange(batches - 1, -1, -1, dtype=torch.float64)
        weights = (m * (1 - m) ** order).unsqueeze(1)
        if average.debias:
            return (weights * means).sum(0) / weights.sum(), (weights * variances).sum(0) / weights.sum()
        rest = (1 - m) ** batches
        return rest * start[0] + (weights * means).sum(0), rest * start[1] + (weights * variances).sum(0)

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool) if mask is None else mask
        runs = max(len(x) // self.virtual_batch_size, 1) if self.virtual_batch_size and self.training else 1
        parts, values = [], x.movedim(1, -1)
        added = torch.zeros_like(values) if residual is None else residual.movedim(1, -1)
        for samples in torch.tensor_split(torch.arange(len(x)), runs):
            rows = values[samples][mask[samples]]
            z = self.standardize(rows) * self.weight + self.bias + added[samples][mask[samples]]
            y = ACTIVATIONS[self.activation](z)
            parts.append(torch.zeros_like(values[samples]).index_put((mask[samples],), y))
        if self.training:
            rows = values[mask].detach()
            self.history.append((rows.mean(0), rows.var(0, correction=1)))
        return torch.cat(parts).movedim(-1, 1)

    def standardize(self, rows: Tensor) -> Tensor:
        mean, var = self.running()
        sigma = (var + EPS).sqrt()
        if not self.training or len(rows) == 0 or (len(rows) == 1 and self.on_single == "population"):
            return (rows - mean) / sigma
        batch_mean, batch_sigma = rows.mean(0), (rows.var(0, correction=0) + EPS).sqrt()
        xhat = (rows - batch_mean) / batch_sigma
        if self.renorm is None:
            return xhat
        number, start = len(self.history) + 1, self.renorm.start
        r_max = limit(number, start, self.renorm.r_steps, 1.0, self.renorm.r_max)
        d_max = limit(number, start, self.renorm.d_steps, 0.0, self.renorm.d_max)
        r = (batch_sigma / sigma).detach().clamp(1 / r_max, r_max)
        d = ((batch_mean - mean) / sigma).detach().clamp(-d_max, d_max)
        return xhat * r + d


@dataclass(frozen=True)
class Situation:
    """A layer's options, and the batches that it is going to see."""

    samples: tuple[int, ...]  # of each batch; the last one comes in eval mode
    channels: int
    positions: tuple[int, ...]
    options: dict[str, Any]
    with_residual: bool
    with_mask: bool
    seed: int

    def layer(self) -> evenorm.BatchNorm:
        weight, bias = self.parameters()
        layer = evenorm.BatchNorm(self.channels, EPS, dtype=torch.float64, **self.options)
        layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        return layer

    def book(self) -> Book:
        return Book(*(tensor.requires_grad_() for tensor in self.parameters()), **self.options)

    def parameters(self) -> tuple[Tensor, Tensor]:
        weight, bias = torch.randn(2, self.channels, generator=self.generator(), dtype=torch.float64)
        return weight, bias

    def generator(self, more: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + more)

    def batches(self) -> Iterator[Batch]:
        """Yield x, residual, mask and the gradient that comes from above; bad values in the padding of all."""
        for number, samples in enumerate(self.samples):
            generator = self.generator(1 + number)
            shape = (samples, self.channels, *self.positions)
            x, residual, dy = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            x = x * (1 + number) + number
            mask = None
            if self.with_mask:
                mask = torch.rand(samples, *self.positions, generator=generator) > 0.4
                mask.view(-1)[:2] = True  # one value has no variance
                for at, tensor in enumerate((x, residual, dy)):
                    tensor.movedim(1, -1)[~mask] = BAD[(number + at) % len(BAD)]
            yield x, residual if self.with_residual else None, mask, dy


AVERAGES = st.sampled_from(
    [None, Exponential(0.3), Exponential(0.3, debias=True), Cumulative(), Window(1), Window(2), Window(5)]
)
RENORMS = st.builds(
    lambda r_max, d_max, start, steps: Renorm(r_max, d_max, start, start + steps, start + 2 * steps),
    st.sampled_from([1.0, 1.2, 3.0, math.inf]),
    st.sampled_from([0.0, 0.3, 5.0, math.inf]),
    st.integers(0, 2),
    st.integers(0, 2),
)


@st.composite
def situations(draw: st.DrawFn, **fixed: Any) -> Situation:
    """Draw a situation; `fixed` may hold strategies for the options, `with_mask` and `with_residual`."""
    choices = {
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "average": AVERAGES,
        "virtual_batch_size": st.sampled_from([None, 2, 3]),
        "renorm": st.none() | RENORMS,
        "on_single": st.sampled_from(["raise", "population"]),
        "with_residual": st.booleans(),
        "with_mask": st.booleans(),
    } | fixed
    drawn = {name: draw(choice) for name, choice in choices.items()}
    return Situation(
        samples=tuple(draw(st.lists(st.integers(2, 8), min_size=3, max_size=5))),
        channels=draw(st.integers(1, 3)),
        positions=draw(st.sampled_from([(), (1,), (4,), (2, 3), (2, 1, 2)])),
        with_residual=drawn.pop("with_residual"),
        with_mask=drawn.pop("with_mask"),
        seed=draw(st.integers(0, 10_000)),
        options=drawn,
    )


Batch = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


def answer(layer: evenorm.BatchNorm | Book, batch: Batch) -> list[Tensor]:
    """Return y and its gradients: by x, by the residual if there is one, by weight and by bias."""
    x, residual, mask, dy = batch
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = layer(x, residual=residual, mask=mask)
    wanted = [tensor for tensor in (x, residual, layer.weight, layer.bias) if tensor is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def agree(situation: Situation) -> None:
    """Play the situation to both; every output, gradient and statistic must be the same."""
    layer, book = situation.layer(), situation.book()
    *training, evaluation = situation.batches()
    for batch in [*training, evaluation]:
        layer.train(batch is not evaluation)
        book.training = layer.training
        torch.testing.assert_close(answer(layer, batch), answer(book, batch), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close((layer.running_mean, layer.running_var), book.running(), rtol=1e-8, atol=1e-8)
    assert layer.num_batches_tracked == len(training)
