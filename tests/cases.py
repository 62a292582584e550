"""The one table of cases of the tests: inputs by name, the same values at every call.

The shapes that are timed stand in evenorm.bench.rows, so that an installed evenorm can time them too.

A case says what an input looks like (shape, layout, dtype) and how its values are made; a test crosses the
cases with what it wants to see. Legend: x is (N, C, *positions).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

BFLOAT16, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
Shape = tuple[int, ...]


class State(NamedTuple):
    """What a layer holds for an input, in the dtype of its parameters; each (C,)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@dataclass(frozen=True)
class Case:
    """An input of batch norm, by its properties."""

    name: str
    shape: Shape
    dtype: torch.dtype = SINGLE
    layout: str = "contiguous"
    values: str = "normal"
    parameters: torch.dtype | None = None  # None: x's dtype

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0, device: str = "cpu") -> Tensor:
        """Return x; it is laid out on its device, since a tensor with gaps loses them on its way to another."""
        values = VALUES[self.values](torch.Generator().manual_seed(seed), self.shape)
        return LAYOUTS[self.layout](values.to(self.dtype).to(device))

    def noise(self, seed: int, device: str = "cpu") -> Tensor:
        """Return normal values in x's shape, dtype and layout: a residual, or a gradient that comes from above."""
        values = _normal(torch.Generator().manual_seed(seed), self.shape).to(self.dtype).to(device)
        return values if self.layout == "expanded" else LAYOUTS[self.layout](values)

    def mask(self, seed: int = 3) -> Tensor:
        """Return a mask that leaves out about a third of the positions, and not all of them."""
        positions = (self.shape[0], *self.shape[2:])
        mask = torch.rand(positions, generator=torch.Generator().manual_seed(seed)) > 1 / 3
        mask.view(-1)[:2] = True
        return mask

    def state(self, seed: int = 4) -> State:
        """Return parameters with a zero and a negative weight, and running statistics near x's own."""
        generator = torch.Generator().manual_seed(seed)
        channels = self.shape[1]
        weight, bias, nearby = torch.randn(3, channels, generator=generator, dtype=DOUBLE)
        weight[: channels // 2] *= -1
        weight[channels // 2 : channels // 2 + 1] = 0
        dtype = self.parameters or self.dtype
        x = self.make().to(DOUBLE).nan_to_num(0, 0, 0).transpose(0, 1).flatten(1)
        start = x[:, :1].sum(1, keepdim=True)  # so that a constant channel has a variance of exactly 0
        mean = ((x - start).sum(1, keepdim=True) / max(x.shape[1], 1) + start).squeeze(1)
        deviation = ((x - mean.unsqueeze(1)).square().sum(1) / max(x.shape[1], 1)).sqrt()
        var = (1.3 * deviation.square() + 1e-3).clamp(max=torch.finfo(dtype).max)
        return State(weight.to(dtype), bias.to(dtype), (mean + 0.1 * nearby * deviation).to(dtype), var.to(dtype))


def _normal(generator: Generator, shape: Shape) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def _away(offset: float) -> Callable[[Generator, Shape], Tensor]:
    return lambda generator, shape: _normal(generator, shape) + offset


def _times(scale: float) -> Callable[[Generator, Shape], Tensor]:
    return lambda generator, shape: _normal(generator, shape) * scale


def _per_channel(numbers: Tensor, shape: Shape) -> Tensor:
    channels = numbers.repeat(math.ceil(shape[1] / len(numbers)))[: shape[1]]
    return channels.reshape(1, -1, *[1] * (len(shape) - 2))


def _constant(numbers: list[float]) -> Callable[[Generator, Shape], Tensor]:
    return lambda _, shape: _per_channel(torch.tensor(numbers, dtype=DOUBLE), shape).expand(shape)


def _scales(generator: Generator, shape: Shape) -> Tensor:
    """Channels that differ a billionfold in scale, and in offset too."""
    scale = _per_channel(torch.tensor([1e-6, 1e-3, 1.0, 1e3], dtype=DOUBLE), shape)
    return (_normal(generator, shape) + 7) * scale


def _outlier(generator: Generator, shape: Shape) -> Tensor:
    """The first value of each channel is a thousand standard deviations away: a poor value to shift by."""
    values = _normal(generator, shape)
    values[0].view(shape[1], -1)[:, 0] += 1000
    return values


def _with(bad: float) -> Callable[[Generator, Shape], Tensor]:
    """One bad value, in the second channel."""

    def make(generator: Generator, shape: Shape) -> Tensor:
        values = _normal(generator, shape)
        values[shape[0] // 2, 1].view(-1)[-1:] = bad
        return values

    return make


# How the values are made. The comments say what each is after.
VALUES: dict[str, Callable[[Generator, Shape], Tensor]] = {
    "normal": _normal,
    "offset 50": _away(50),  # half precision keeps few digits of it
    "offset 1e4": _away(1e4),
    "offset 1e5": _away(1e5),  # E[x^2] - E[x]^2 has no digit left in float32
    "outlier": _outlier,
    "scales": _scales,
    "constant": _constant([0.0, 0.1, -3.0, 1e4 + 0.1, -1e-8]),  # m2 exactly 0, output exactly bias
    "constant, any size": _constant([1e30, -3e38, 1e-30, 1e-42, 0.3]),
    "huge": _times(1e30),  # squares overflow float32
    "tiny": _times(1e-30),  # squares underflow float32
    "nan": _with(math.nan),  # stays in its channel
    "inf": _with(math.inf),
    "-inf": _with(-math.inf),
}


def _transposed(values: Tensor) -> Tensor:
    """Channels innermost: torch's channels_last, for any number of dimensions."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _batch_inside(values: Tensor) -> Tensor:
    return values.transpose(0, 1).contiguous().transpose(0, 1)


def _sliced(values: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor, whose others are NaN."""
    larger = values.new_full([2 * size + 1 for size in values.shape], math.nan)
    inner = larger[tuple(slice(1, None, 2) for _ in values.shape)]
    return inner.copy_(values)


def _expanded(values: Tensor) -> Tensor:
    """The first sample again and again, in the memory of one: a stride of 0."""
    return values[:1].contiguous().expand_as(values)


def _offset(values: Tensor) -> Tensor:
    """Contiguous, but its first element is not aligned to any vector's width."""
    storage = values.new_full((values.numel() + 3,), math.nan)
    return storage[1:-2].view(values.shape).copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels_last": _transposed,
    "batch inside": _batch_inside,
    "sliced": _sliced,
    "expanded": _expanded,
    "offset": _offset,
}

SHAPES: dict[str, Shape] = {
    "2-D": (33, 7),
    "2-D, wide": (5, 130),
    "2-D, long": (1031, 3),
    "3-D": (6, 5, 37),
    "4-D": (4, 6, 9, 7),
    "5-D": (2, 5, 3, 4, 5),
    "6-D": (2, 3, 2, 2, 3, 2),
    "7x7 planes": (3, 40, 7, 7),
    "1x1 planes": (9, 4, 1, 1),
    "one channel": (3, 1, 19, 11),
    "one sample": (1, 5, 8, 9),
    "two values": (2, 3),
    "large plane": (2, 3, 64, 67),
    "empty batch": (0, 4, 3, 3),
    "empty batch, 2-D": (0, 4),
    "no positions": (3, 4, 0, 2),
}


def _rows() -> list[Case]:
    """Vary one property at a time around plain cases: every property, not every combination."""
    rows = [Case(name, shape) for name, shape in SHAPES.items()]
    layouts = {
        "channels_last": ["3-D", "4-D", "5-D", "7x7 planes", "one sample", "one channel", "large plane"],
        "batch inside": ["2-D", "4-D"],
        "sliced": ["2-D", "3-D", "4-D", "5-D"],
        "expanded": ["2-D", "4-D"],
        "offset": ["2-D", "4-D", "large plane"],
    }
    rows += [
        Case(f"{name}, {layout}", SHAPES[name], layout=layout)
        for layout, names in layouts.items()
        for name in names
    ]
    rows += [
        Case(f"{name}, {values}", SHAPES[name], layout=layout, values=values)
        for values in VALUES
        if values != "normal"
        for name, layout in (("2-D", "contiguous"), ("4-D", "contiguous"), ("4-D", "channels_last"))
        if (name, layout) != ("4-D", "channels_last") or "constant" not in values
    ]
    for dtype, title in ((DOUBLE, "float64"), (BFLOAT16, "bfloat16"), (HALF, "float16")):
        rows += [
            Case(f"{title}, {name}, {layout}", SHAPES[name], dtype, layout)
            for name, layout in (("2-D", "contiguous"), ("4-D", "contiguous"), ("4-D", "channels_last"))
        ]
        rows.append(Case(f"{title}, offset 50", SHAPES["large plane"], dtype, values="offset 50"))
    for dtype, title in ((BFLOAT16, "bfloat16"), (HALF, "float16")):
        rows += [
            Case(f"{title}, float32 parameters, {name}", SHAPES[name], dtype, layout, values, SINGLE)
            for name, layout, values in (
                ("2-D", "contiguous", "normal"),
                ("4-D", "channels_last", "normal"),
                ("large plane", "contiguous", "offset 50"),
            )
        ]
    return rows


CASES = {case.name: case for case in _rows()}
