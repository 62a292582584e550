"""Run batches of any kind through a network of any signature, and say where it went wrong."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenorm.models.walk import shown

Forward = Callable[[nn.Module, Any], Any]

# What a network raises when it is given what it does not fit. Anything else is not about the batch and passes.
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, KeyError)


class DataError(ValueError):
    """Data that statistics cannot be taken from; says why, and where."""


def forward_by_default(model: nn.Module, batch: Any) -> Any:
    """Call a network with a batch, on the network's device; see `arguments`."""
    positional, named = arguments(model, batch)
    return model(*positional, **named)


def arguments(
    model: nn.Module, batch: Any, parameters: Sequence[inspect.Parameter] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return what of a batch a network is called with, by position and by name, on the network's device.

    Its ``forward``'s parameters can be given, where many batches come, since looking them up takes 50 us.

    A tensor is its input. Of a tuple or list it gets the first entries, as many as it cannot do without and at
    least one: the others are labels. Of a dict it gets the entries that its ``forward`` has arguments for.

    Raises:
        TypeError: another kind of batch, or one without tensors in those places.
    """
    positional: list[Any] = []
    named: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        positional = [batch]
    elif isinstance(batch, (tuple, list)):
        positional = list(batch[: max(_required(parameters or parameters_of(model)), 1)])
    elif isinstance(batch, Mapping):
        named = {key: batch[key] for key in _accepted(parameters or parameters_of(model), batch)}
    if not any(isinstance(value, Tensor) for value in (*positional, *named.values())):
        raise TypeError(
            "a batch must be a tensor, a tuple that starts with the network's inputs, or a dict of its arguments, "
            f"got a {_described(batch)}; for others give forward=, a function of model and batch"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    moved = {key: _moved(value, device) for key, value in named.items()}
    return [_moved(value, device) for value in positional], moved


def run(model: nn.Module, batch: Any, number: int, forward: Forward | None) -> None:
    """Run one batch through a network.

    Raises:
        ValueError: the network does not take the batch, naming the innermost layer that complained.
    """
    try:
        (forward or forward_by_default)(without_replicas(model), batch)
    except (DataError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        name, layer = _innermost(model, error)
        where = f"{name} ({type(layer).__name__})" if layer is not None else "forward"
        raise ValueError(
            f"batch {number}, a {_described(batch)}, could not be run: {where} raised {type(error).__name__}: "
            f"{error}; nothing was changed"
        ) from error


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of a network's ``forward``."""
    return list(inspect.signature(unwrapped(model).forward).parameters.values())


def without_replicas(model: nn.Module) -> nn.Module:
    """Return the network that a wrapper of torch's runs on several devices or workers."""
    return model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside torch's wrappers, which take any arguments: of replicas, of averages, compiled."""
    inner = without_replicas(model)
    swa_utils = sys.modules.get("torch.optim.swa_utils")
    if swa_utils is not None and isinstance(inner, swa_utils.AveragedModel):
        inner = inner.module
    inner = getattr(inner, "_orig_mod", inner)
    return inner if inner is model else unwrapped(inner)


def _required(parameters: Sequence[inspect.Parameter]) -> int:
    """Return how many positional arguments a forward cannot do without."""
    return sum(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
    )


def _accepted(parameters: Sequence[inspect.Parameter], batch: Mapping[str, Any]) -> list[str]:
    """Return the keys of a batch that a forward has arguments for."""
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(batch)
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}
    return [key for key in batch if key in named]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _described(batch: Any) -> str:
    """Say what a batch is, in a few words."""
    if isinstance(batch, Tensor):
        return f"tensor {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of ({', '.join(map(_described, batch[:4]))}{', ...' * (len(batch) > 4)})"
    if isinstance(batch, Mapping):
        return f"dict with the keys {', '.join(map(str, batch)) or '(none)'}"
    return type(batch).__name__


def _innermost(model: nn.Module, error: BaseException) -> tuple[str, nn.Module | None]:
    """Return the innermost layer of a network whose code an error went through, by name."""
    names = {id(module): shown(name) for name, module in model.named_modules()}
    found: tuple[str, nn.Module | None] = "", None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if id(owner) in names:
            found = names[id(owner)], owner
        trace = trace.tb_next
    return found
