"""Engines: the same few operations, each fast somewhere.

An engine is a module that offers the functions of `evenorm.formulas`, under the same names and arguments. It
never decides when running statistics change. What the fast engines do not take, a device, a dtype, a tensor
subclass, falls to the formulas.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from evenorm import formulas
from evenorm.engines import cpu, triton


def choose(x: Tensor) -> ModuleType:
    """Return the fastest engine that takes x."""
    return cpu if cpu.supports(x) else triton if triton.supports(x) else formulas
