"""Bottleneck adapters on some of a batch's rows, gradients into the bank: what training calls.

    y[t] = r[t] + s_u (Wu_u act(Wd_u x[t] + bd_u) + bu_u)        row t of a group, slot u owns it
    y[t] = r[t]                                                 any other row

The kernels and gradients of bottleneck.py. A group is one bank's slots at this site, on its own rows of the batch:
users of several banks, and users of other methods, share the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft_kernels.bottleneck import Bottleneck, check, path
from minipeft_kernels.segments import other_rows


@dataclass(frozen=True)
class BottleneckRows:
    """A bank's bottlenecks at one site and the rows of the batch they act on: first_row .. first_row + T_g - 1."""

    first_row: int
    bottleneck: Bottleneck

    def of(self, x: Tensor) -> Tensor:
        """Its rows of x [T, K]: a view [T_g, K]."""
        return x[self.first_row : self.first_row + self.bottleneck.segments.num_rows]


class _BottleneckRows(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive at a site whose x needs no gradient."""

    @staticmethod
    def forward(ctx, x, residual, anchor, groups, others, forward_backward):
        forward, ctx.backward_ = forward_backward
        ctx.serial, ctx.groups, ctx.others = residual is None, groups, others
        base, y = x if residual is None else residual, torch.empty_like(x)
        zs = [forward(g.bottleneck, g.of(x), g.of(base), g.of(y)) for g in groups]
        for rows in others:
            y[rows] = base[rows]
        ctx.save_for_backward(x, *zs)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, *zs = ctx.saved_tensors
        grad_y, grad_x = grad_y.contiguous(), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for g, z in zip(ctx.groups, zs):
            own_grad_x = None if grad_x is None else g.of(grad_x)
            ctx.backward_(g.bottleneck, g.of(x), g.of(grad_y), z, ctx.serial, own_grad_x)
        if grad_x is not None:
            for rows in ctx.others:  # y = r there: x matters only where it is r
                grad_x[rows] = grad_y[rows] if ctx.serial else 0.0
        return grad_x, None if ctx.serial else grad_y, None, None, None, None


def bottleneck_rows(x: Tensor, residual: Tensor | None, anchor: Tensor, groups: Sequence[BottleneckRows]) -> Tensor:
    """y[t] = r[t] + the bottleneck of x[t] by row t's own slot; y[t] = r[t] for rows of no group.

    Args:
        x, residual: [T, K], as in `segment_bottleneck`: residual None, the serial adapter, means r = x.
        anchor:      any tensor that requires grad, unused (see _BottleneckRows).
        groups:      the banks that act here, each on its own rows. Gradients are written into their grads.
    Returns:
        [T, K], dtype of x. Differentiable in x and residual.
    Raises:
        ValueError: as segment_bottleneck; or groups share rows or lie outside of x.
    """
    others = other_rows("bottleneck_rows", ((g.first_row, g.bottleneck.segments) for g in groups), len(x))
    for g in groups:
        check("bottleneck_rows", g.bottleneck, g.of(x), None if residual is None else g.of(residual))
        if g.bottleneck.grads is None and torch.is_grad_enabled():
            raise ValueError("bottleneck_rows: a group has no grads, which backward would write; give it some or call "
                             "under torch.no_grad().")
    residual = None if residual is None else residual.contiguous()
    return _BottleneckRows.apply(x.contiguous(), residual, anchor, groups, others, path(x.device))
