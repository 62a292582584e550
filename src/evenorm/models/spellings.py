"""How activations and additions are written in a torch.fx graph: as modules, functions, methods and operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from evenorm.activations import IDENTITY, resolve
from evenorm.models.flows import Flow
from evenorm.models.walk import hooked

# A function that activates: the module that does the same, and its parameters in the order of the arguments.
FUNCTIONS: dict[Callable[..., Any], tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.relu: (nn.ReLU, ("inplace",)),
    functional.relu_: (nn.ReLU, ()),
    torch.relu: (nn.ReLU, ()),
    torch.relu_: (nn.ReLU, ()),
    functional.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    functional.silu: (nn.SiLU, ("inplace",)),
    functional.gelu: (nn.GELU, ("approximate",)),
    functional.elu: (nn.ELU, ("alpha", "inplace")),
    functional.hardswish: (nn.Hardswish, ("inplace",)),
    functional.sigmoid: (nn.Sigmoid, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    functional.tanh: (nn.Tanh, ()),
    torch.tanh: (nn.Tanh, ()),
}
METHODS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "sigmoid_": nn.Sigmoid,
    "tanh": nn.Tanh,
    "tanh_": nn.Tanh,
}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (operator.iadd, "add_")


def activation_at(node: fx.Node, flow: Flow) -> nn.Module | None:
    """Return the module that does what a node does, if that is an activation the layers know."""
    called = flow.called(node)
    if called is not None:
        plain = len(node.args) == 1 and not node.kwargs and not hooked(called) and "forward" not in vars(called)
        found = called if plain else None
    elif node.op == "call_method" and str(node.target) in METHODS and len(node.args) == 1 and not node.kwargs:
        found = METHODS[str(node.target)]()
    elif node.op == "call_function" and node.target in FUNCTIONS:
        kind, names = FUNCTIONS[node.target]
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        constant = not any(isinstance(value, fx.Node) for value in given.values())
        found = (
            kind(**given) if constant and len(node.args) <= 1 + len(names) and set(given) <= set(names) else None
        )
    else:
        found = None
    return None if found is None or resolve(found) in (None, IDENTITY) else found


def word(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
