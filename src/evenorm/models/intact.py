"""Leave a network and the random numbers as they were found, however the work in between ends."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation, without gradients and without what torch.compile made of it, for one block.

    Afterwards each module is in the mode it was in and every generator of random numbers in its old state. Modes
    are set module by module: a ``train()`` that a class overrides may do anything.
    """
    modes = [(module, module.training) for module in model.modules()]
    restore_random = remember_random()
    with ExitStack() as stack:
        stack.callback(restore_random)
        stack.callback(_set_modes, modes)
        _set_modes([(module, False) for module, _ in modes])
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and loading it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


def remember_random() -> Callable[[], None]:
    """Return a function that puts the global generators of torch, Python and NumPy back to where they are now."""
    restores: list[Callable[[], None]] = []

    def remember(state: object, put_back: Callable[..., object]) -> None:
        restores.append(lambda: (put_back(state), None)[1])

    remember(torch.get_rng_state(), torch.set_rng_state)
    remember(random.getstate(), random.setstate)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        remember(torch.cuda.get_rng_state_all(), torch.cuda.set_rng_state_all)
    if torch.backends.mps.is_available():
        remember(torch.mps.get_rng_state(), torch.mps.set_rng_state)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        remember(numpy.random.get_state(), numpy.random.set_state)

    def restore() -> None:
        for put_back in restores:
            put_back()

    return restore


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
