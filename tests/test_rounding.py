"""Half precision: every number of it, in and out, against torch's own conversions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evenorm.engines import cpu
from evenorm.formulas import Setting

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"no C++ engine: {cpu.available()}")


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return x * factor as the engine rounds it: batch norm of mean 0, variance 1 and weight `factor`."""
    channels = x.shape[1]
    zeros, ones = (torch.full((channels,), value, dtype=torch.float64) for value in (0.0, 1.0))
    weight = torch.full((channels,), factor)
    return cpu.normalize(x, zeros, ones, weight, None, None, Setting(None, None, 0.0, 0, 0.0))


# 2^-40 takes what is small to where a format has no more digits, or none; 1 + 2^-12 needs rounding, ties among it.
@pytest.mark.parametrize("factor", [1.0, -1.0, 1 + 2**-12, 3.0, 2.0**-10, 1.5 * 2**-40])
@pytest.mark.parametrize("shape", [(1, 1, 65536), (256, 256), (1, 8, 8192)], ids=["plane", "rows", "planes"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_rounded_as_torch_rounds_it(
    dtype: torch.dtype, shape: tuple[int, ...], factor: float
) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(shape)
    expected = (x.float() * factor).to(dtype)
    torch.testing.assert_close(scaled(x, factor), expected, rtol=0, atol=0, equal_nan=True)
