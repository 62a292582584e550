"""Evidence that two networks compute the same: largest differences on given inputs and on random ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evenorm.models.intact import remember_random

PROBES = 4  # each costs a run of both networks; errors of rounding differ little from one input to the next


@dataclass(frozen=True)
class Fold:
    """A batch norm that was folded away: its dotted name, and the name of the layer that it was merged into."""

    layer: str
    into: str


@dataclass(frozen=True)
class Refusal:
    """A batch norm that was left in the network: its dotted name and the reason."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Difference:
    """How far two networks are apart: ``absolute`` is the largest difference between two values of the outputs.

    ``relative`` is the largest, over the output tensors, of that difference divided by the tensor's largest value,
    ``compared`` the number of values that were looked at.
    """

    absolute: float = 0.0
    relative: float = 0.0
    compared: int = field(default=0, compare=False)

    def __or__(self, other: Difference) -> Difference:
        """Return the larger of each, over the values of both."""
        compared = self.compared + other.compared
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative), compared)


@dataclass(frozen=True)
class Certificate:
    """What `fold` did and did not do, and how far the answers are from the original's. Printed, it is a table.

    ``folds`` and ``refusals`` name every batch norm layer. ``examples`` is the difference on the example inputs,
    ``probes`` the one on random inputs of the same shapes, ``tolerance`` the relative difference that was allowed.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    >>> evenorm.fold(model, torch.randn(8, 4)).certificate.folds
    (Fold(layer='1', into='0'),)
    """

    folds: tuple[Fold, ...]
    refusals: tuple[Refusal, ...]
    examples: Difference
    probes: Difference
    tolerance: float

    def __str__(self) -> str:
        """Return a line for each layer, and the differences."""
        entries = [(fold.layer, f"folded into {fold.into}") for fold in self.folds]
        entries += [(refusal.layer, f"left: {refusal.reason}") for refusal in self.refusals]
        width = max((len(layer) for layer, _ in entries), default=0)
        lines = [f"{layer:<{width}}  {what}" for layer, what in entries]
        for name, found in (("examples", self.examples), ("random probes", self.probes)):
            lines.append(
                f"largest difference on {name}: {found.absolute:.2g} absolute, {found.relative:.2g} relative"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a network."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return the floating-point tensors of a network's output; the inputs stay as they are."""
        positional, named = copy.deepcopy((self.positional, self.named))  # a network may write into what it gets
        restore_random = remember_random()  # dropout in training mode then draws the same for both networks
        try:
            with torch.no_grad():
                output = model(*positional, **named)
        finally:
            restore_random()
        found = [
            leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not found:
            raise ValueError(
                f"the network returns {type(output).__name__} without a floating-point tensor in it, which leaves "
                "nothing to compare; fold the part of it that does"
            )
        return found

    def probe(self, generator: torch.Generator) -> Inputs:
        """Return random inputs of the same shapes and dtypes, between the examples' smallest and largest values."""
        drawn = pytree.tree_map(lambda leaf: _draw(leaf, generator), (self.positional, self.named))
        return Inputs(*drawn)


def inputs_of(example_inputs: object) -> Inputs:
    """Return examples given as a tensor, as a tuple or list of arguments, or as a dict of named ones."""
    example_inputs = pytree.tree_map_only(Tensor, Tensor.detach, example_inputs)
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, tuple | list):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, dict):
        return Inputs((), dict(example_inputs))
    raise TypeError(
        "example_inputs must be a tensor, a tuple of the network's arguments or a dict of its named arguments, "
        f"got {type(example_inputs).__name__}"
    )


def compare(original: nn.Module, folded: nn.Module, inputs: Inputs) -> tuple[Difference, Difference]:
    """Return the differences of two networks on the inputs, and on random ones like them."""
    examples = _apart(original, folded, inputs)
    generator = torch.Generator().manual_seed(0)
    probes = Difference()
    for _ in range(PROBES):
        probes |= _apart(original, folded, inputs.probe(generator))
    return examples, probes


def tolerance_for(model: nn.Module) -> float:
    """Return half the digits of the coarsest dtype that a network computes in."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    coarsest = max((torch.finfo(tensor.dtype).eps for tensor in tensors), default=torch.finfo(torch.float32).eps)
    return float(coarsest**0.5)


def _apart(original: nn.Module, folded: nn.Module, inputs: Inputs) -> Difference:
    differences = Difference()
    for before, after in zip(inputs.run(original), inputs.run(folded), strict=True):
        differences |= difference(before, after)
    return differences


def difference(before: Tensor, after: Tensor) -> Difference:
    """Return how far a tensor is from another; equal infinities, and NaN at the same places, are no difference."""
    if before.shape != after.shape:
        return Difference(float("inf"), float("inf"), before.numel())
    before, after = before.double(), after.double()
    same = (before == after) | (before.isnan() & after.isnan())
    apart = torch.where(same, 0.0, (before - after).abs()).nan_to_num(float("inf"), float("inf"))
    if not apart.numel():
        return Difference()
    absolute = apart.max().item()
    largest = before[before.isfinite()].abs().max().item() if before.isfinite().any() else 0.0
    return Difference(absolute, absolute / largest if largest else absolute, before.numel())


def _draw(leaf: object, generator: torch.Generator) -> object:
    if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool or leaf.is_complex() or not leaf.numel():
        return leaf
    if leaf.is_floating_point():
        finite = leaf[leaf.isfinite()].double()
        low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (0.0, 1.0)
        drawn = low + (high - low) * torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
        return drawn.to(leaf.device, leaf.dtype)
    low, high = int(leaf.min()), int(leaf.max())
    return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
