"""Leave a network and the random numbers as they were found, however the work in between ends."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation, without gradients and without what torch.compile made of it, for one block.

    Afterwards each module is in the mode it was in, every generator of random numbers in its old state, and what a
    forward wrote into buffers undone. Modes are set module by module: a ``train()`` that a class overrides may do
    anything, and a frozen script module has no mode.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    held = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone(), _version(buffer)) for buffer in model.buffers() if _holds(buffer)]
    restore_random = remember_random()
    with ExitStack() as stack:
        stack.callback(restore_random)
        stack.callback(_put_back, held, buffers)
        stack.callback(_set_modes, modes)
        _set_modes([(module, False) for module, _ in modes])
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and loading it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


def remember_random() -> Callable[[], bool]:
    """Return a function that puts the global generators of torch, Python and NumPy back to where they are now.

    It tells whether anybody had drawn from them.
    """
    restores: list[Callable[[], bool]] = []

    def remember(
        get: Callable[[], Any], put_back: Callable[[Any], object], same: Callable[[Any, Any], bool]
    ) -> None:
        state = get()

        def restore() -> bool:
            drawn = not same(get(), state)
            if drawn:
                put_back(state)
            return drawn

        restores.append(restore)

    remember(torch.get_rng_state, torch.set_rng_state, torch.equal)
    remember(random.getstate, random.setstate, operator.eq)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        remember(
            torch.cuda.get_rng_state_all,
            torch.cuda.set_rng_state_all,
            lambda now, before: all(map(torch.equal, now, before)),
        )
    if torch.backends.mps.is_available():
        remember(torch.mps.get_rng_state, torch.mps.set_rng_state, torch.equal)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        remember(
            numpy.random.get_state,
            numpy.random.set_state,
            lambda now, before: all(map(numpy.array_equal, now, before)),
        )
    # A list, so that all are put back, not those as far as the first that was drawn from.
    return lambda: sum([restore() for restore in restores]) > 0


def _holds(buffer: Tensor) -> bool:
    """Tell whether a buffer has values: one that is lazy or on the meta device has none."""
    return not (is_lazy(buffer) or buffer.is_meta)


def _version(buffer: Tensor) -> int | None:
    """Return what grows with every write; None for a tensor of inference mode, which keeps no such count."""
    return None if buffer.is_inference() else buffer._version


def _put_back(
    held: list[tuple[Any, dict[str, Tensor | None]]], buffers: list[tuple[Tensor, Tensor, int | None]]
) -> None:
    """Undo what was done to buffers; those that nobody wrote to are not touched."""
    for registry, before in held:
        if any(registry.get(name) is not buffer for name, buffer in before.items()):
            registry.update(before)
    with torch.no_grad():
        for buffer, value, version in buffers:
            if version is None:
                with torch.inference_mode():
                    buffer.copy_(value)
            elif buffer._version != version:
                buffer.copy_(value)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
