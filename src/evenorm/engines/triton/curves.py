"""The activations of `evenorm.activations.TABLE` in Triton: value and slope as functions of z, chosen by code.

`code` is a compile-time constant, so that a kernel holds one of them. float32 throughout; what Triton's language
lacks (expm1, tanh) is put together from its exponential, with a polynomial where that would cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, code: tl.constexpr, parameter):
    """Return the activation's value at z."""
    y = z
    if code == 1:
        y = tl.where(z <= 0, 0.0, z)
    elif code == 2:
        y = tl.where(z > 0, z, z * parameter)
    elif code == 3:
        y = z / (1.0 + tl.exp(-z))
    elif code == 4:
        y = z * _below(z)
    elif code == 5:
        y = tl.where(z > 0, z, parameter * _expm1(tl.where(z > 0, 0.0, z)))
    elif code == 6:
        up = tl.where(z + 3.0 < 0, 0.0, z + 3.0)
        y = z * tl.where(up > 6, 6.0, up) / 6.0
    elif code == 7:
        y = _sigmoid(z)
    elif code == 8:
        grown = _expm1(-2.0 * tl.abs(z))
        size = -grown / (2.0 + grown)
        y = tl.where(z < 0, -size, size)
    elif code == 9:
        y = z * _sigmoid(_doubled(z))
    return y


@triton.jit
def slope(z, code: tl.constexpr, parameter):
    """Return the activation's derivative at z. Where z is NaN, ReLU lets the gradient pass, as torch does."""
    d = tl.full(z.shape, 1.0, tl.float32)
    if code == 1:
        d = tl.where(z <= 0, 0.0, 1.0)
    elif code == 2:
        d = tl.where(z > 0, 1.0, parameter)
    elif code == 3:
        up = _sigmoid(z)
        d = up * (1.0 + z * _sigmoid(-z))
    elif code == 4:
        d = _below(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif code == 5:
        d = tl.where(z > 0, 1.0, parameter * tl.exp(tl.where(z > 0, 0.0, z)))
    elif code == 6:
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, z / 3.0 + 0.5, 1.0))
    elif code == 7:
        d = _sigmoid(z) * _sigmoid(-z)
    elif code == 8:
        d = 4.0 * _sigmoid(2.0 * z) * _sigmoid(-2.0 * z)
    elif code == 9:
        # Beyond 20 the slope is 0 or 1; the clamp keeps the square from overflowing.
        near = tl.where(z > 20, 20.0, tl.where(z < -20, -20.0, z))
        u = _doubled(near)
        up = _sigmoid(u)
        d = up + near * up * _sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    return d


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _below(z):
    """P(Z < z) for a standard normal Z."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _doubled(z):
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def _expm1(z):
    """exp(z) - 1 for z <= 0: Taylor's series to the eighth power down to -0.5, error 1e-8 of the value."""
    t = tl.where(z < -0.5, -0.5, z)
    q = 2.4801587e-5 * t + 1.9841270e-4
    q = q * t + 1.3888889e-3
    q = q * t + 8.3333333e-3
    q = q * t + 4.1666667e-2
    q = q * t + 1.6666667e-1
    q = q * t + 0.5
    return tl.where(z < -0.5, tl.exp(z) - 1.0, t + t * t * q)
