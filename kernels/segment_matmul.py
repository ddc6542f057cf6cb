"""A whole matrix per user in one packed batch: what is no low-rank update, a layer of one's own.

    y[t] = W_u^T x[t]        W_u [K, N], slot u owns row t
    grad_x[t] = W_u grad_y[t]        grad_W[u] = sum_t x[t] grad_y[t]^T

A matrix per user is read once for few rows, so this only waits for memory and libraries do it well: torch's grouped_mm
on a GPU; batched products over pieces (cpu.py) on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels import cpu
from minipeft_kernels.layouts import check_dtype, check_grads, check_slots
from minipeft_kernels.segments import Segments, take

ALIGNED = 16  # bytes: it wants whole ones of these in a row
NARROW = 16  # columns: on a CPU the last bits of narrower products change with their number; transposed they do not


def _product(x: Tensor, W: Tensor, segments: Segments, transposed: bool = False) -> Tensor:
    """[T, K], [U, K, N] -> [T, N]. transposed: W is [U, N, K] and its slots are read the other way, where they lie."""

    def of(slots: slice | Tensor) -> Tensor:
        return take(W, slots).transpose(1, 2) if transposed else take(W, slots)

    N = W.shape[1 if transposed else 2]
    if segments.plan is not None:
        parts = [F.grouped_mm(x[rows], of(slots), offs=ends) for rows, slots, ends in segments.plan.groups]
        return parts[0] if len(parts) == 1 else torch.cat([x.new_empty(0, N), *parts])
    y = x.new_empty(len(x), N)
    for pieces in segments.tiles.pieces:
        own, part = of(pieces.slots), pieces.of(x)
        if y.shape[1] >= NARROW:
            cpu.expand_rows_(y, pieces, part.transpose(1, 2), own, beta=0)
        else:
            cpu.put_rows_(y, pieces, torch.bmm(own.transpose(1, 2), part.transpose(1, 2)).transpose(1, 2))
    return y


class _SegmentMatmul(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive where x needs no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, W, grad_W, segments):
        ctx.save_for_backward(x)
        ctx.W, ctx.grad_W, ctx.segments = W, grad_W, segments
        return _product(x, W, segments)

    @staticmethod
    def backward(ctx, grad_y):
        (x,), segments, grad_y = ctx.saved_tensors, ctx.segments, grad_y.contiguous()
        if segments.plan is not None:
            for rows, slots, ends in segments.plan.groups:
                ctx.grad_W[slots] = F.grouped_mm(x[rows].t(), grad_y[rows], offs=ends).to(ctx.grad_W.dtype)
        elif segments.tiles.pieces:
            wide = torch.promote_types(x.dtype, torch.float32)
            partial = [torch.bmm(pieces.zero_filled_(pieces.of(x).transpose(1, 2).to(wide, copy=True)),
                                 pieces.of(grad_y).to(wide)) for pieces in segments.tiles.pieces]  # fmt: skip
            own = cpu.sum_pieces(torch.cat(partial), segments.tiles)
            cpu.store_(ctx.grad_W, own, segments.tiles.groups.slots, None)
        grad_x = _product(grad_y, ctx.W, segments, transposed=True) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def _check(x: Tensor, W: Tensor, grad_W: Tensor, segments: Segments) -> None:
    op = "segment_matmul"
    segments.check_rows(op, x)
    if W.ndim != 3 or W.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but W is {tuple(W.shape)}; needs [U, {x.shape[1]}, N]. Was "
                         "this adapter trained on another base?")
    check_dtype(op, x)
    if x.dtype != W.dtype:
        raise ValueError(f"{op}: x and W must share a dtype; got {x.dtype} and {W.dtype}.")
    check_slots(op, "W", W, W.shape)
    check_grads(op, "grad_W", grad_W, W.shape)
    segments.check_bank(op, len(W))
    if segments.plan is None:
        return
    if any(width * x.itemsize % ALIGNED for width in W.shape[1:]):
        raise ValueError(f"{op}: W is {tuple(W.shape)} in {x.dtype}; on a GPU both widths must be multiples of "
                         f"{ALIGNED // x.itemsize}, whole {ALIGNED} bytes. Pad them with zeros.")


def segment_matmul(x: Tensor, anchor: Tensor, W: Tensor, grad_W: Tensor, segments: Segments) -> Tensor:
    """y[t] = W[u]^T x[t], where slot u owns row t.

    Args:
        x:      [T, K] fp32, bf16 or fp16 (on a CPU also fp64). Packed rows, in segment order. anchor: any tensor that
                requires grad, unused.
        W:      [U, K, N], dtype of x. grad_W: [U, K, N] fp32 (on a CPU any of these dtypes), where backward stores the
                gradients of slots that have rows and leaves other slots alone. Both contiguous within a slot, any
                stride between slots. On a GPU K and N are whole 16 bytes, which torch's grouped_mm wants; a CPU takes
                any. grouped_mm gives nothing but x's dtype: on a GPU gradients of bf16 or fp16 rows are summed in fp32
                and rounded to that before they are stored; a CPU does not round them.
    Returns:
        [T, N], dtype of x. Differentiable in x.
    Raises:
        ValueError: the shapes, dtypes or layouts disagree, the segments were made for another device, the device has no
            implementation, or grouped_mm does not take the widths.
    Cost: 2 * T * K * N FLOPs, twice that backward; keeps x. A slot without rows is never read.
    """
    _check(x, W, grad_W, segments)
    return _SegmentMatmul.apply(x.contiguous(), anchor, W, grad_W, segments)
