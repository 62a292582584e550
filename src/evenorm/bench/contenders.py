"""The two that are compared: a block as a user of torch.nn writes it, and ours, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import evenorm
from evenorm.activations import module_of
from evenorm.bench.rows import Block, Row

Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one comparison; all contenders read the same ones."""

    x: Tensor
    residual: Tensor | None
    cotangent: Tensor

    def double(self) -> Inputs:
        """Return the same numbers in float64, for the truth."""
        residual = None if self.residual is None else _leaf(self.residual.detach().double())
        return Inputs(_leaf(self.x.detach().double()), residual, self.cotangent.double())


def make_inputs(row: Row, block: Block, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Inputs:
    """Draw x, a residual where the block has one, and a random cotangent, by the device's own generator."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(row.shape, generator=generator, device=device).mul_(scale).add_(shift).to(dtype)
        if row.channels_last:
            last = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
            values = values.contiguous(memory_format=last)
        return values

    return Inputs(_leaf(draw(2.0, 0.5)), _leaf(draw()) if block.residual else None, draw())


def theirs(row: Row, block: Block, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the block in torch.nn: BatchNorm, add, activation, one after the other."""
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(row.shape)]
    return _Chain(layer(row.shape[1], dtype=dtype), module_of(block.activation))


def ours(row: Row, block: Block) -> nn.Module:
    """Return the block as one layer of evenorm."""
    return evenorm.BatchNorm(row.shape[1], activation=block.activation)


def compiled(module: nn.Module) -> nn.Module:
    """Return the module compiled for its own sizes, whatever has been compiled before.

    Else torch would compile for any size from the second row on, and not at all from the ninth.
    """
    torch.compiler.reset()
    found: nn.Module = torch.compile(module, dynamic=False)  # type: ignore[assignment]  # a callable to mypy, a module in fact
    return found


def runner(module: nn.Module, inputs: Inputs, training: bool) -> Run:
    """Return a call that runs the module: forward and backward in training, forward alone in evaluation."""
    module.train(training)
    extra = {} if inputs.residual is None else {"residual": inputs.residual}
    if not training:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (module(inputs.x, **extra),)

        return forward
    wanted = [inputs.x, *extra.values(), *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        y = module(inputs.x, **extra)
        return y, *torch.autograd.grad(y, wanted, inputs.cotangent)

    return step


def floor_in_clones(block: Block, training: bool) -> float:
    """Return the least traffic of the block as a number of `x.clone()`, each of one read and one write.

    Forward: x is read and y written; backward: x and dy are read and dx written. A residual is read once, and its
    gradient written once.
    """
    forward = 2 + block.residual
    backward = 3 + block.residual
    return (forward + backward * training) / 2


class _Chain(nn.Module):
    def __init__(self, layer: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        if residual is not None:
            y = y + residual
        return y if self.activation is None else self.activation(y)


def _leaf(x: Tensor) -> Tensor:
    return x.requires_grad_()
