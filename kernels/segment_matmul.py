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
from minipeft_kernels.segments import Segments, take

NARROW = 16  # columns: on a CPU the last bits of narrower products change with their number; transposed they do not


def _product(x: Tensor, W: Tensor, segments: Segments) -> Tensor:
    """[T, K], [U, K, N] -> [T, N]."""
    if segments.plan is not None:
        slots, ends = _live(segments)
        return F.grouped_mm(x, W.index_select(0, slots), offs=ends)
    y = x.new_empty(len(x), W.shape[2])
    for pieces in segments.tiles.pieces:
        own, part = take(W, pieces.slots), pieces.of(x)
        if y.shape[1] >= NARROW:
            cpu.expand_rows_(y, pieces, part.transpose(1, 2), own, beta=0)
        else:
            cpu.put_rows_(y, pieces, torch.bmm(own.transpose(1, 2), part.transpose(1, 2)).transpose(1, 2))
    return y


def _live(segments: Segments) -> tuple[Tensor, Tensor]:
    """Slots and end rows of the segments that have rows."""
    table = segments.plan.segments[segments.plan.segments[:, 1] > segments.plan.segments[:, 0]]
    return table[:, 2].long(), table[:, 1].contiguous()


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
            slots, ends = _live(segments)
            ctx.grad_W[slots] = F.grouped_mm(x.t(), grad_y, offs=ends).to(ctx.grad_W.dtype)
        elif segments.tiles.pieces:
            wide = torch.promote_types(x.dtype, torch.float32)
            partial = [torch.bmm(pieces.zero_filled_(pieces.of(x).transpose(1, 2).to(wide, copy=True)),
                                 pieces.of(grad_y).to(wide)) for pieces in segments.tiles.pieces]  # fmt: skip
            own = cpu.sum_pieces(torch.cat(partial), segments.tiles)
            cpu.store_(ctx.grad_W, own, segments.tiles.groups.slots, None)
        grad_x = _product(grad_y, ctx.W.transpose(1, 2), segments) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def segment_matmul(x: Tensor, anchor: Tensor, W: Tensor, grad_W: Tensor, segments: Segments) -> Tensor:
    """y[t] = W[u]^T x[t], where slot u owns row t.

    Args:
        x:      [T, K]. Packed rows, in segment order. anchor: any tensor that requires grad, unused.
        W:      [U, K, N], dtype of x, any strides. grad_W: [U, K, N], where backward stores the gradients of slots that
                have rows.
    Returns:
        [T, N], dtype of x. Differentiable in x.
    Raises:
        ValueError: the shapes disagree.
    Cost: 2 * T * K * N FLOPs, twice that backward; keeps x.
    """
    if len(x) != segments.num_rows or W.ndim != 3 or W.shape[1] != x.shape[1] or grad_W.shape != W.shape:
        raise ValueError(f"segment_matmul: x is {tuple(x.shape)}, W {tuple(W.shape)}, grad_W {tuple(grad_W.shape)} and "
                         f"the segments cover {segments.num_rows} rows; needed [T, K], [U, K, N] twice and T.")
    return _SegmentMatmul.apply(x.contiguous(), anchor, W, grad_W, segments)
