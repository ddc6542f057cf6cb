"""Biases of many users in one packed batch: a learned vector is added to every row of its user.

    y[t] = x[t] + c_u        slot u owns row t        BitFit, Ben Zaken et al. 2022 (arXiv:2106.10199), section 2
    grad_x = grad_y          grad_c[u] = sum_t grad_y[t]

Forward is a gather and a sum, plain PyTorch everywhere. Backward is a weight gradient whose other factor is 1: on a GPU
wgrad.py's, against a column of ones; on a CPU a sum of each segment's rows. Sums run over a user's own rows in their
order, so the company changes no bit.

`segment_shift` is the op by itself. Training calls `shift_rows`: the same on some of a batch's rows, writing gradients
into the bank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipeft_kernels.layouts import check_dtype, check_grads, check_slots
from minipeft_kernels.segments import Segments, VectorRows, other_rows
from minipeft_kernels.wgrad import wgrad


def _sum_rows(grad_y: Tensor, segments: Segments, grad_vectors: Tensor) -> None:
    """grad_vectors[u] = sum of u's rows of grad_y, in fp32 at least."""
    if segments.plan is not None:
        ones = grad_y.new_ones(len(grad_y), 1)
        wgrad(ones, grad_y, segments.plan, grad_vectors[:, None])
        return
    groups = segments.tiles.groups
    sums = groups.sum_rows(grad_y.to(torch.promote_types(grad_y.dtype, torch.float32)))
    grad_vectors.index_copy_(0, groups.slots, sums.to(grad_vectors.dtype))


class _ShiftRows(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive at a site whose x needs no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, groups):
        ctx.groups, y = groups, x.clone()
        for g in groups:
            y[g.rows] += g.vectors.index_select(0, g.segments.slot_of_row)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grad_y = grad_y.contiguous()
        for g in ctx.groups:
            _sum_rows(grad_y[g.rows], g.segments, g.grad_vectors)
        return grad_y, None, None


def shift_rows(x: Tensor, anchor: Tensor, groups: Sequence[VectorRows]) -> Tensor:
    """y[t] = x[t] + c[u] for rows of a group, y[t] = x[t] for all others.

    Args:
        x:      [T, D]. anchor: any tensor that requires grad, unused (see _ShiftRows).
        groups: the banks that act here, each on its own rows. Gradients are written into their grad_vectors.
    Returns:
        [T, D], dtype of x. Differentiable in x.
    Raises:
        ValueError: as segment_shift; or groups share rows or lie outside of x.
    """
    other_rows("shift_rows", ((g.first_row, g.segments) for g in groups), len(x))
    for g in groups:
        _check("shift_rows", x[g.rows], g.vectors, g.segments)
        check_grads("shift_rows", "grad_vectors", g.grad_vectors, g.vectors.shape)
    return _ShiftRows.apply(x, anchor, groups)


class _SegmentShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, vectors, segments):
        ctx.segments, ctx.vectors = segments, vectors
        return (x + vectors.index_select(0, segments.slot_of_row)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        wide = torch.promote_types(grad_y.dtype, torch.float32)
        grad_vectors = torch.zeros(ctx.vectors.shape, dtype=wide, device=grad_y.device)  # sum_t grad_y[t]
        _sum_rows(grad_y.contiguous(), ctx.segments, grad_vectors)
        return grad_y, grad_vectors.to(ctx.vectors.dtype), None


def _check(op: str, x: Tensor, vectors: Tensor, segments: Segments) -> None:
    segments.check_rows(op, x)
    if vectors.ndim != 2 or vectors.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but vectors is {tuple(vectors.shape)}; needs [U, "
                         f"{x.shape[1]}]. Was this adapter trained on another base?")
    check_slots(op, "vectors", vectors, vectors.shape)
    check_dtype(op, x)
    if vectors.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: vectors are {vectors.dtype}; give them in the dtype of x, {x.dtype}, or in fp32.")
    segments.check_bank(op, len(vectors))


def segment_shift(x: Tensor, vectors: Tensor, segments: Segments) -> Tensor:
    """y[t] = x[t] + c[u], where slot u owns row t and vectors[u] is c[u].

    Args:
        x:       [T, D]. Packed rows, in segment order.
        vectors: [U, D], dtype of x or fp32, any stride between slots. Those of slots without rows are never read.
    Returns:
        [T, D], dtype of x. Differentiable in x and vectors; sums run in fp32 at least; 0 for a slot without rows.
    Raises:
        ValueError: the shapes, dtypes or layouts disagree, the segments were made for another device, or the device has
            no implementation.
    Cost: T * D additions; keeps nothing. Same bits on every run.
    """
    _check("segment_shift", x, vectors, segments)
    return _SegmentShift.apply(x, vectors, segments)
