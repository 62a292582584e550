"""Starts a kernel: Triton searches for what it has compiled at each call, which takes longer than to launch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_compiled: dict[tuple[object, ...], Any] = {}


def start(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    constants: tuple[int | bool, ...],
    warps: int = 4,
) -> None:
    """Start programs of a kernel, whose parameters are some tensors, then numbers, then compile-time constants.

    The parameters of numbers name their types, so that of what Triton compiles for only these are open: which
    tensors are None, their dtypes, and whether their memory begins at a multiple of 16 bytes; and the device.
    """
    found = [None if t is None else (t.get_device(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    key = (id(kernel), warps, constants, *found)
    known = _compiled.get(key)
    if known is not None:
        known[programs, 1, 1](*tensors, *numbers, *constants)
        return
    known = kernel[(programs,)](*tensors, *numbers, *constants, num_warps=warps)
    # The interpreter compiles nothing; on AMD's devices Triton looks at the size of the memory too.
    if known is not None and known.metadata.target.backend == "cuda":
        _compiled[key] = known
