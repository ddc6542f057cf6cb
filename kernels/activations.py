"""Activations inside kernels, and their slopes: what PyTorch's functions of the same name give, to rounding.

    relu       max(z, 0)
    gelu       z Phi(z)               Phi the standard normal distribution: exact, by erf
    gelu_tanh  z sigmoid(2 a(z))      a(z) = sqrt(2 / pi) (z + 0.044715 z^3)
    silu       z sigmoid(z)

gelu_tanh is usually written 0.5 z (1 + tanh a), and 0.5 (1 + tanh a) is sigmoid(2 a), which needs one exponential. All
are 0 at 0: what is 0 because nobody uses it stays 0. A NaN stays a NaN, for its user to be told.
"""

from functools import partial

import torch
from torch.nn import functional

from minipeft_kernels.dtypes import jit, tl

ACTIVATIONS = {"relu": torch.relu, "gelu": functional.gelu, "gelu_tanh": partial(functional.gelu, approximate="tanh"),
               "silu": functional.silu}  # fmt: skip


@jit
def act(z, ACT: tl.constexpr):
    """act(z), fp32."""
    if ACT == "relu":
        return tl.where(z < 0.0, 0.0, z)  # not max, which would turn a NaN into 0
    elif ACT == "gelu":
        return z * _normal(z)
    elif ACT == "gelu_tanh":
        gate, _ = _sigmoid(_twice_a(z))
        return z * gate
    else:
        gate, _ = _sigmoid(z)
        return z * gate


@jit
def act_slope(z, ACT: tl.constexpr):
    """act'(z), fp32."""
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACT == "gelu":  # Phi(z) + z Phi'(z)
        return _normal(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        gate, slope = _sigmoid(_twice_a(z))
        return gate + z * slope * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        gate, slope = _sigmoid(z)
        return gate + z * slope


@jit
def _normal(z):
    """Phi(z)."""
    return 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)


@jit
def _sigmoid(a):
    """sigmoid(a) and its slope. Neither overflows, and the slope is not a difference of two numbers close to 1."""
    e = tl.exp(-tl.abs(a))
    larger = 1.0 / (1.0 + e)  # of sigmoid(a) and sigmoid(-a)
    return tl.where(a >= 0.0, larger, e * larger), e * larger * larger


@jit
def _twice_a(z):
    """2 a(z)."""
    return z * 1.5957691216057308 * (1.0 + 0.044715 * z * z)
