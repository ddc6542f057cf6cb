"""LoRA for many users in one packed batch, with and without the frozen linear map it belongs to.

    delta[t] = s_u B_u A_u x[t]          slot u owns row t         Hu et al. 2021 (arXiv:2106.09685), eq. 3

Gradients, per segment of slot u, with v = s A x (kept) and w = s B^T grad_y:

    grad_x = A^T w       grad_A = sum_t w[t] x[t]^T       grad_Bt = sum_t v[t] grad_y[t]^T

Both matrices are stored rank-major, A [U, R, K] and Bt = B^T [U, R, N], so forward and backward are the same three
families: shrink (K -> R), expand (R -> N) and weight gradient (cpu.py).

`segment_lora` is the op by itself, for tests and for readers. Training calls `lora_linear`: the same arithmetic around
the frozen product, adding in place instead of making one more [T, N] tensor, and writing gradients into the bank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels import cpu
from minipeft_kernels.backend import backend
from minipeft_kernels.segments import Segments


def _forward(x: Tensor, A: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tiles x [n, tile, K] -> v^T = scale * A x^T [n, R, tile], and the scale of every tile [n]."""
    tile_scale = scale.index_select(0, segments.tile_slots).to(x.dtype)
    return cpu.shrink(x, cpu.tile_matrices(A, segments, ranks), tile_scale), tile_scale


def _backward(
    x: Tensor, grad_y: Tensor, v: Tensor, Bt: Tensor, tile_scale: Tensor, segments: Segments, ranks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles x [n, tile, K], grad_y [n, tile, N] and v^T -> w^T [n, R, tile], grad_A and grad_Bt of the live slots."""
    w = cpu.shrink(grad_y, cpu.tile_matrices(Bt, segments, ranks), tile_scale)
    return w, cpu.wgrad(w, x, segments), cpu.wgrad(v, grad_y, segments)


class _SegmentLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, Bt, scale, segments, ranks):
        v, tile_scale = _forward(segments.tiles(x), A, scale, segments, ranks)
        ctx.save_for_backward(x, v, A, Bt, tile_scale)
        ctx.segments, ctx.ranks = segments, ranks
        return segments.rows(torch.bmm(v.transpose(1, 2), cpu.tile_matrices(Bt, segments, ranks)))

    @staticmethod
    def backward(ctx, grad_y):
        x, v, A, Bt, tile_scale = ctx.saved_tensors
        segments, ranks = ctx.segments, ctx.ranks
        grad_tiles = segments.tiles(grad_y.contiguous())  # [n, tile, N]
        w, grad_A_live, grad_Bt_live = _backward(segments.tiles(x), grad_tiles, v, Bt, tile_scale, segments, ranks)
        grad_x = segments.rows(torch.bmm(w.transpose(1, 2), cpu.tile_matrices(A, segments, ranks)))
        grad_A, grad_Bt = torch.zeros_like(A), torch.zeros_like(Bt)
        grad_A[segments.live_slots] = grad_A_live
        grad_Bt[segments.live_slots] = grad_Bt_live
        return grad_x, grad_A, grad_Bt, None, None, None


def _check(op: str, x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None) -> None:
    if x.ndim != 2 or x.shape[0] != segments.num_rows:
        raise ValueError(f"{op}: x is {tuple(x.shape)} but the segments cover {segments.num_rows} rows.")
    if A.ndim != 3 or A.shape[2] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but A is {tuple(A.shape)}, made for {A.shape[-1]}. "
                         "Was this adapter trained on another base?")
    if Bt.ndim != 3 or Bt.shape[:2] != A.shape[:2] or scale.shape != A.shape[:1]:
        raise ValueError(f"{op}: A is {tuple(A.shape)}, so Bt must be [{A.shape[0]}, {A.shape[1]}, N] and scale "
                         f"[{A.shape[0]}]; got {tuple(Bt.shape)} and {tuple(scale.shape)}.")
    if not x.dtype == A.dtype == Bt.dtype:
        raise ValueError(f"{op}: x, A and Bt must share a dtype; got {x.dtype}, {A.dtype}, {Bt.dtype}.")
    if len(segments.slots) and segments.slots.max() >= A.shape[0]:
        raise ValueError(f"{op}: segment of slot {segments.slots.max()} but the bank has {A.shape[0]} slots.")
    if ranks is not None and ranks.shape != A.shape[:1]:
        raise ValueError(f"{op}: ranks must be [{A.shape[0]}], one per slot; got {tuple(ranks.shape)}.")


def segment_lora(
    x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None = None
) -> Tensor:
    """y[t] = scale[u] * B[u] @ A[u] @ x[t], where slot u owns row t and Bt[u] is B[u] transposed.

    Hu et al. 2021 (arXiv:2106.09685), eq. 3, without the frozen term W0 @ x, for many users at once.

    Args:
        x:      [T, K]. Packed rows, in segment order.
        A, Bt:  [U, R, K] and [U, R, N], dtype of x, views of the bank: any stride between slots.
        scale:  [U] fp32, no unit. alpha / rank.
        ranks:  [U] int64, or None where every slot uses all R. Rank rows at or past ranks[u] have no
                effect, whatever they hold, and get gradient 0.
    Returns:
        [T, N], dtype of x. Differentiable in x, A and Bt; a slot without rows gets gradient 0.
    Raises:
        ValueError: the shapes or dtypes disagree, or the device has no implementation.
    Cost: 2 * T * R * (K + N) FLOPs; keeps v = scale * A @ x, [T, R], for backward. Same bits on every run.
    """
    _check("segment_lora", x, A, Bt, scale, segments, ranks)
    assert backend(x.device) == "cpu"
    return _SegmentLora.apply(x, A, Bt, scale, segments, ranks)


@dataclass(frozen=True)
class LoraRows:
    """One bank's LoRA at one site, and the rows of the batch it acts on: rows first_row .. first_row + T_g - 1.

    A, Bt, scale, ranks, segments as in `segment_lora`; segments aligned to their tile. grad_A and grad_Bt have the
    shapes of A and Bt and are views of the bank's gradients: backward stores the gradients of the batch's slots there
    and leaves other slots alone.
    """

    first_row: int
    A: Tensor
    Bt: Tensor
    scale: Tensor
    ranks: Tensor | None
    segments: Segments
    grad_A: Tensor
    grad_Bt: Tensor

    def tiles(self, x: Tensor) -> Tensor:
        return self.segments.tiles(x[self.first_row : self.first_row + self.segments.num_rows])


class _LoraLinear(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive at a site whose x needs no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, groups, tile):
        y = F.linear(x, weight, bias) if tile is None else cpu.tiled_linear(x, weight, bias, tile)
        kept = []
        for g in groups:
            v, tile_scale = _forward(g.tiles(x), g.A, g.scale, g.segments, g.ranks)
            cpu.expand_add_(g.tiles(y), v, cpu.tile_matrices(g.Bt, g.segments, g.ranks))
            kept += [v, tile_scale]
        ctx.save_for_backward(x, weight, *kept)
        ctx.groups, ctx.tile = groups, tile
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, *kept = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.tile is None:
                grad_x = grad_y @ weight
            else:
                grad_x = cpu.tiled_linear(grad_y, weight.t(), None, ctx.tile)
        for g, v, tile_scale in zip(ctx.groups, kept[::2], kept[1::2]):
            w, grad_A, grad_Bt = _backward(g.tiles(x), g.tiles(grad_y), v, g.Bt, tile_scale, g.segments, g.ranks)
            g.grad_A[g.segments.live_slots] = grad_A
            g.grad_Bt[g.segments.live_slots] = grad_Bt
            if grad_x is not None:
                cpu.expand_add_(g.tiles(grad_x), w, cpu.tile_matrices(g.A, g.segments, g.ranks))
        return grad_x, None, None, None, None, None


def lora_linear(
    x: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor | None, groups: list[LoraRows], tile: int | None = None
) -> Tensor:
    """y[t] = W x[t] + b + scale[u] * B[u] @ A[u] @ x[t]: a frozen linear map and every row's own LoRA on it.

    Args:
        x:      [T, K]. anchor: any tensor that requires grad, unused (see _LoraLinear).
        weight: [N, K], frozen. bias: [N] or None, frozen.
        groups: the banks that act here, each on its own rows. Their gradients are written into their grad_A, grad_Bt.
        tile:   None: one matrix product for all rows. A number: fixed tiles of that many rows (T a multiple of it), so
                that a row's bits do not depend on the company; costs a few percent.
    Returns:
        [T, N], dtype of x. Differentiable in x.
    """
    for g in groups:
        if g.segments.gather is not None:
            raise ValueError("lora_linear: segments must be multiples of their tile; pad the batch (minipeft.batch).")
        mine = x[g.first_row : g.first_row + g.segments.num_rows]
        _check("lora_linear", mine, g.A, g.Bt, g.scale, g.segments, g.ranks)
    assert backend(x.device) == "cpu"
    return _LoraLinear.apply(x, anchor, weight, bias, groups, tile)
