"""Finding modules in a network by name and place, and leaving a network as it was if something goes wrong."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LeftAloneError(Exception):
    """Why something is left as it is; caught where the layer's entry in a summary is written."""


def names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module of a network with all its dotted names, one for each place that holds it."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return the batch norm layers of any make, each once, with its first dotted name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def kind(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def shown(name: str) -> str:
    """Return a dotted name for a message; the network itself has none."""
    return name or "the model"


def hooked(module: nn.Module) -> bool:
    """Tell whether somebody looks at what goes into or comes out of a module."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def put_(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module into every place where a module is held, in place."""
    for parent in list(model.modules()):
        for key, held in parent._modules.items():
            if held is module:
                parent._modules[key] = other


def twin(model: nn.Module, *, hooks: bool = True, share: bool = True) -> nn.Module:
    """Return a copy of a network, which shares the parameters or has its own of everything."""
    shared = [*model.parameters(), *filter(is_lazy, model.buffers())] if share else []
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        if not hooks:
            memo.update({id(getattr(module, kind)): OrderedDict() for kind in HOOKS})
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # torch copies none; weight norm keeps one
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give the modules back the classes and attributes they came with if the block raises or is interrupted.

    Attributes, not the values of tensors: inside the block tensors are replaced, not written to.
    """
    before = [(module, type(module), dict(vars(module)), _registries(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, was, attributes, registries in before:
            module.__class__ = was
            vars(module).clear()
            vars(module).update(attributes)
            for registry, contents in registries:  # refilled: the handles of hooks refer to these very objects
                registry.clear()
                registry.update(contents)
            if isinstance(module, fx.GraphModule):
                module.recompile()
        raise


def _registries(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return a module's parameters, buffers, children and hooks: each collection, and a copy of it."""
    return [
        (value, value.copy())
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, dict | set)
    ]
