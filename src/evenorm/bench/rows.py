"""What is measured: the shapes that networks have, and the blocks that people write around batch norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALL = 32_768  # below this many elements a call is dispatch, not arithmetic


@dataclass(frozen=True)
class Row:
    """An input: shape (N, C, *positions) and layout in memory."""

    shape: tuple[int, ...]
    channels_last: bool = False

    @property
    def name(self) -> str:
        """The shape as one writes it, with the layout where it is not the usual one."""
        return "×".join(map(str, self.shape)) + (" last" if self.channels_last else "")

    @property
    def elements(self) -> int:
        """How many values x has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """What stands around the batch norm: an add before an activation, either of them, or nothing."""

    name: str
    activation: str | None = None
    residual: bool = False


_SHAPES: tuple[tuple[int, ...], ...] = (
    (60, 100),
    (128, 256),
    (1024, 1024),
    (8192, 256),
    (100000, 32),
    (131072, 16),
    (16, 256, 1000),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 14, 14),
    (32, 2048, 7, 7),
    (16, 64, 112, 112),
    (8, 3, 224, 224),
    (4, 32, 16, 28, 28),
)
ROWS = tuple(Row(shape, last) for shape in _SHAPES for last in (False, True) if not last or len(shape) > 3)

BLOCKS = {
    "bn": Block("BatchNorm"),
    "bn-relu": Block("BatchNorm + ReLU", "relu"),
    "bn-add-relu": Block("BatchNorm + add + ReLU", "relu", residual=True),
    "bn-silu": Block("BatchNorm + SiLU", "silu"),
}
