"""Reduced precision inside kernels: the same kernel source on a GPU and in Triton's interpreter.

On a GPU a bf16 tile goes into `tl.dot` as it is, and a cast from fp32 rounds to nearest, ties to even. The interpreter
(TRITON_INTERPRET=1) does arithmetic on bf16's raw bits and casts by cutting bits off, so there every operand is first
made fp32, which is exact, and rounding is done by hand. `INTERPRETED` is known when a kernel is compiled: on a GPU
these helpers leave no instruction behind.

Triton exists for Linux only, and a PyTorch that knows no GPU needs it only to interpret kernels, or where somebody has
imported it to compile them; it would take 70 MB. Elsewhere `jit` leaves a kernel a plain function that nobody calls, so
that every module imports and the PyTorch path works (backend.py chooses it).
"""

import os
import sys
from types import SimpleNamespace

import torch

try:
    if not (torch.backends.cuda.is_built() or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules):
        raise ModuleNotFoundError
    import triton
    import triton.language as tl

    jit, constexpr_function = triton.jit, triton.constexpr_function
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
except ModuleNotFoundError:
    triton, tl, INTERPRETED = None, SimpleNamespace(constexpr=None), False

    def jit(kernel):
        return kernel

    constexpr_function = jit


@constexpr_function
def padded(size):
    """The size of a block that holds `size` numbers: a power of two, and at least 16, the least a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


@jit
def operand(x):
    """x as an operand of a product or a sum: itself on a GPU, exactly the same numbers in fp32 in the interpreter."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x


@jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x rounded to dtype (nearest, ties to even), as an operand."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            return tl.where(x == x, (bits & -65536).to(tl.float32, bitcast=True), x)  # a NaN keeps its bits
        else:
            return x.to(dtype).to(tl.float32)
    else:
        return x.to(dtype)


@jit
def store(ptr, x, mask):
    """Store fp32 x where mask holds, rounded to what ptr points to."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr, rounded(x, dtype).to(dtype), mask)
