"""LoRA for many users in one packed batch.

    delta[t] = s_u B_u A_u x[t]          slot u owns row t         Hu et al. 2021 (arXiv:2106.09685), eq. 3

Gradients, per segment of slot u, with v = s A x (kept) and w = s B^T grad_y:

    grad_x = A^T w       grad_A = sum_t w[t] x[t]^T       grad_Bt = sum_t v[t] grad_y[t]^T

Both matrices are stored rank-major, A [U, R, K] and Bt = B^T [U, R, N], so forward and backward are the same three
families: shrink (K -> R), expand (R -> N) and weight gradient. On a GPU they are the kernels of shrink_expand.py and
wgrad.py, on a CPU batched products over pieces (cpu.py), where segments are multiples of a tile, as in training. The op
by itself takes ragged segments on a CPU too, and gives those, and long ones, to torch's grouped_mm.

`segment_lora` is the op by itself, for tests and for readers. Training calls `lora_linear` (lora_linear.py): the same
`Lora`, forward and backward, around the frozen product.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels import cpu
from minipeft_kernels.blocks import MOST_RANKS
from minipeft_kernels.dropout import keep_mask
from minipeft_kernels.layouts import check_dtype, check_grads, check_no_grad, check_slots, check_table
from minipeft_kernels.segments import RowGroups, Segments, take
from minipeft_kernels.shrink_expand import empty_planes, expand, num_planes, shrink, shrink_expand
from minipeft_kernels.wgrad import wgrad

LONG = 160  # rows per segment on average from which a CPU multiplies segment by segment


@dataclass(frozen=True)
class Lora:
    """One bank's LoRA at M sites that share their input (q|k|v), for the rows of `segments`.

    A:        [U, M * R, K]: the sites' As one below the other, so that x is read once.
    Bts:      M tensors [U, R, N_m]. A and Bts are views of the bank, contiguous within a slot, any stride between
              slots; on a GPU several Bts lie one right after the other, and M * R is at most MOST_RANKS.
    scale:    [U] fp32. ranks: [U] int32, or None where every slot uses all R. All tables are contiguous.
    grad_A, grad_Bts: where `backward` stores the gradients of slots that have rows: shapes of A and Bts, fp32 (on a
              CPU any floating dtype). Other slots are left alone; rank rows past a slot's own get 0, or are left
              alone too. None instead of one: nobody wants it, and it is not computed.
    sites:    on a GPU shrink_expand.site_table of the widths N_m; None for one site.
    drop:     [S, 2] int64 (dropout.py): dropout of x on its way into A; None: none.
    accumulate: [U] int32: a slot where it is not 0 adds to the gradients that are there, the later micro-steps of one
              optimizer step; others overwrite them. None: all overwrite.
    squares:  on a GPU, where to leave the sums of squares of grad_A and of each of grad_Bts (wgrad.py); None: nowhere.
    """

    A: Tensor
    Bts: tuple[Tensor, ...]
    scale: Tensor
    ranks: Tensor | None
    segments: Segments
    grad_A: Tensor | None
    grad_Bts: tuple[Tensor | None, ...]
    sites: Tensor | None = None
    drop: Tensor | None = None
    accumulate: Tensor | None = None
    squares: tuple[Tensor | None, ...] | None = None

    def columns(self, x: Tensor) -> list[Tensor]:
        """x [..., M * R] cut into the sites' own R columns."""
        return list(x.split(self.Bts[0].shape[1], dim=-1))


# ---- On a GPU ------------------------------------------------------------------------------------------------------


def forward_triton(lora: Lora, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """y [T, N] = delta, the sites' columns side by side. Returns (v,), which backward wants."""
    return (shrink_expand(x, lora.A, lora.Bts[0], y, lora.scale, lora.ranks, lora.segments.plan, lora.sites,
                          drop_x=lora.drop),)  # fmt: skip


def backward_triton(
    lora: Lora, x: Tensor, grad_ys: list[Tensor], kept: tuple[Tensor, ...], grad_x: Tensor | None
) -> None:
    """grad_x [T, K], or None, = the delta's; the weights' gradients go where lora says. grad_ys: M contiguous
    [T, N_m]."""
    plan, ranks, M = lora.segments.plan, lora.ranks, len(lora.Bts)
    R = lora.Bts[0].shape[1]
    if M == 1:
        w = shrink_expand(grad_ys[0], lora.Bts[0], lora.A, grad_x, lora.scale, ranks, plan, drop_y=lora.drop)
    else:  # every site's gradient has its own shrink; one expand adds them up
        planes = empty_planes(max(num_planes(grad_y.shape[1]) for grad_y in grad_ys), len(x), M * R, x.device)
        for m, (grad_y, Bt) in enumerate(zip(grad_ys, lora.Bts)):
            shrink(grad_y, Bt, ranks, plan, planes=planes, column=m * R)
        w = expand(planes, lora.A, grad_x, lora.scale, ranks, plan, R, M, drop_y=lora.drop)
    squares_A, *squares = lora.squares or [None] * (1 + M)
    if lora.grad_A is not None:
        wgrad(w, x, plan, lora.grad_A, ranks, lora.accumulate, squares_A, lora.drop, M)
    for v, grad_y, grad_Bt, sums in zip(lora.columns(kept[0]), grad_ys, lora.grad_Bts, squares):
        if grad_Bt is not None:
            wgrad(v, grad_y, plan, grad_Bt, ranks, lora.accumulate, sums)


# ---- On a CPU ------------------------------------------------------------------------------------------------------


def _dropped(x: Tensor, drop: Tensor | None, segments: Segments) -> Tensor:
    """What LoRA's branch sees of x."""
    if drop is None:
        return x
    keep, factor = keep_mask(drop, segments.starts, x.shape[1])
    return torch.where(keep, x * factor.to(x.dtype), 0.0)


def _matrices(lora: Lora, slots: slice | Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """A, Bts and scale of every piece: [n, M * R, K], M times [n, R, N_m], [n]."""
    A = cpu.tile_matrices(lora.A, slots, lora.ranks, len(lora.Bts))
    Bts = [cpu.tile_matrices(Bt, slots, lora.ranks) for Bt in lora.Bts]
    return A, Bts, take(lora.scale, slots)


def forward_torch(lora: Lora, x: Tensor, ys: list[Tensor], beta: int) -> tuple[Tensor, ...]:
    """ys, M of [T, N_m], = beta * ys + delta, beta 0 or 1. Returns what backward_torch wants, see num_kept."""
    vs, parts, dropped = [], [], _dropped(x, lora.drop, lora.segments)
    for pieces in lora.segments.tiles.pieces:
        A, Bts, scale = _matrices(lora, pieces.slots)
        part = pieces.of(dropped)  # [n, size, K]
        v = pieces.zero_filled_(cpu.shrink(part, A, scale))  # [n, M * R, size]
        for y, Bt, v_m in zip(ys, Bts, v.split(Bts[0].shape[1], dim=1)):
            cpu.expand_rows_(y, pieces, v_m, Bt, beta)
        vs.append(v)
        parts.append(part)
    return (*vs, *(parts if lora.drop is None else [x]))


def num_kept(lora: Lora) -> int:
    """Tensors that forward_torch returns: v^T and x of all pieces, or, with dropout, v^T and the whole x."""
    num_pieces = len(lora.segments.tiles.pieces)
    return 2 * num_pieces if lora.drop is None else num_pieces + 1


def backward_torch(
    lora: Lora, grad_ys: list[Tensor], kept: tuple[Tensor, ...], grad_x: Tensor | None, beta: int
) -> None:
    """grad_x [T, K], or None, = beta * grad_x + the delta's; the weights' gradients go where lora says.

    grad_ys: M of [T, N_m]. kept: what forward_torch returned.
    """
    tiles = lora.segments.tiles
    vs, xs = kept[: len(tiles.pieces)], kept[len(tiles.pieces) :]
    if lora.drop is not None:
        x = _dropped(xs[0], lora.drop, lora.segments)
        xs = [pieces.of(x) for pieces in tiles.pieces]
    delta = grad_x if lora.drop is None or grad_x is None else torch.empty_like(grad_x)
    num_pieces, end = sum(len(v) for v in vs), 0
    grads = (lora.grad_A, *lora.grad_Bts)
    partials = [None if grad is None else M.new_empty(num_pieces, *M.shape[1:])  # of every piece
                for grad, M in zip(grads, (lora.A, *lora.Bts))]  # fmt: skip
    for pieces, v, x in zip(tiles.pieces, vs, xs):
        start, end = end, end + len(v)
        A, Bts, scale = _matrices(lora, pieces.slots)
        parts = [pieces.of(grad_y) for grad_y in grad_ys]
        ws = [cpu.shrink(part, Bt, scale) for part, Bt in zip(parts, Bts)]
        w = pieces.zero_filled_(ws[0] if len(ws) == 1 else torch.cat(ws, dim=1))  # [n, M * R, size]
        if delta is not None:
            cpu.expand_rows_(delta, pieces, w, A, beta if delta is grad_x else 0)
        for partial, ranks, rows in zip(partials, (w, *v.split(Bts[0].shape[1], dim=1)), (x, *parts)):
            if partial is not None:
                torch.bmm(ranks, rows, out=partial[start:end])
    if delta is not grad_x:
        delta = _dropped(delta, lora.drop, lora.segments)
        grad_x.copy_(grad_x + delta if beta else delta)
    if num_pieces:
        for grad, partial in zip(grads, partials):
            if grad is not None:
                cpu.store_(grad, cpu.sum_pieces(partial, tiles), tiles.groups.slots, lora.accumulate)


# ---- On a CPU, ragged or long --------------------------------------------------------------------------------------


def _can_group(x: Tensor, Bt: Tensor, segments: Segments) -> bool:
    """Whether a product for each segment is faster than for each piece, and torch's grouped_mm takes these."""
    widths, num_segments = (x.shape[1], Bt.shape[2]), len(segments.tiles.groups.slots)
    return ((segments.tiles.ragged or len(x) >= LONG * num_segments) and num_segments < 1024
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not any(width * x.itemsize % 16 for width in widths))  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, contiguous from an address that is a multiple of 16 bytes: grouped_mm takes nothing else."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _grouped_mm(x: Tensor, matrices: Tensor, groups: RowGroups) -> Tensor:
    """[T, n] = each row of x [T, k] times its segment's matrix of [S', k, n]; one segment is a plain product."""
    return x @ matrices[0] if len(matrices) == 1 else F.grouped_mm(x, matrices, offs=groups.ends)


class _GroupedLora(torch.autograd.Function):
    """The same sums by torch.nn.functional.grouped_mm: one product after another on the rows where they lie.

    Pieces of ragged segments are copies, of x and of grad_y and back into y and grad_x, and copying costs more than
    products of such few ranks. Segments of whole pieces are views, and then one bmm is faster than many products; until
    they are so long that copying A and Bt for each piece of 16 rows costs more than it saves.
    """

    @staticmethod
    def forward(ctx, x, A, Bt, scale, segments, ranks):
        groups = segments.tiles.groups
        own_A, own_Bt = (cpu.tile_matrices(M, groups.slots, ranks) for M in (A, Bt))  # [S', R, K], [S', R, N]
        if A.shape[1] * A.itemsize % 16:  # rows of v must be whole 16 bytes
            own_A, own_Bt = (F.pad(M, (0, 0, 0, -A.shape[1] % 8)) for M in (own_A, own_Bt))
        slots = groups.slots if len(groups.slots) == 1 else groups.slot_of_row
        own_scale = scale.index_select(0, slots)[:, None]  # [T, 1], or [1, 1] of one user
        v = _grouped_mm(x, own_A.transpose(1, 2), groups).mul_(own_scale)  # [T, padded R]
        ctx.save_for_backward(x, own_A, own_Bt, own_scale, v)
        ctx.groups, ctx.R, ctx.U = groups, A.shape[1], A.shape[0]
        return _grouped_mm(v, own_Bt, groups)

    @staticmethod
    def backward(ctx, grad_y):
        (x, own_A, own_Bt, own_scale, v), groups, grads = ctx.saved_tensors, ctx.groups, []
        grad_y = _aligned(grad_y)
        w = _grouped_mm(grad_y, own_Bt.transpose(1, 2), groups).mul_(own_scale)
        for wanted, ranks, rows in zip(ctx.needs_input_grad[1:3], (w, v), (x, grad_y)):
            if not wanted:
                grads.append(None)
                continue
            # grad_A = sum w x^T, grad_Bt = sum v grad_y^T
            own = F.grouped_mm(ranks.t(), rows, offs=groups.ends)[:, : ctx.R]  # [S', R, K or N]
            if len(own) == ctx.U:  # everybody: to read in another order is faster than to write in one
                grads.append(own.index_select(0, groups.slots.argsort()))
            else:
                grads.append(own.new_zeros(ctx.U, *own.shape[1:]).index_copy_(0, groups.slots, own))  # [U, R, K or N]
        return _grouped_mm(w, own_A, groups), *grads, None, None, None


# ---- The op --------------------------------------------------------------------------------------------------------


class _SegmentLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, Bt, scale, segments, ranks, drop):
        lora = Lora(A, (Bt,), scale, ranks, segments, None, (None,), drop=drop)
        y = x.new_empty(len(x), Bt.shape[2])
        if segments.plan is not None:
            kept = (x, *forward_triton(lora, x, y))
        else:
            kept = forward_torch(lora, x, [y], beta=0)
        ctx.save_for_backward(A, Bt, scale, ranks, drop, *kept)
        ctx.segments = segments
        return y

    @staticmethod
    def backward(ctx, grad_y):
        A, Bt, scale, ranks, drop, *kept = ctx.saved_tensors
        segments, grad_y = ctx.segments, grad_y.contiguous()
        dtype = torch.float32 if segments.plan is not None else A.dtype
        grad_A, grad_Bt = (torch.zeros(M.shape, dtype=dtype, device=M.device) if wanted else None
                           for M, wanted in zip((A, Bt), ctx.needs_input_grad[1:3]))  # fmt: skip
        lora = Lora(A, (Bt,), scale, ranks, segments, grad_A, (grad_Bt,), drop=drop)
        grad_x = grad_y.new_empty(len(grad_y), A.shape[2]) if ctx.needs_input_grad[0] else None
        if segments.plan is not None:
            backward_triton(lora, kept[0], [grad_y], kept[1:], grad_x)
        else:
            backward_torch(lora, [grad_y], kept, grad_x, beta=0)
        grads = (None if grad is None else grad.to(A.dtype) for grad in (grad_A, grad_Bt))
        return grad_x, *grads, None, None, None, None


def check(op: str, x: Tensor, lora: Lora) -> None:
    """x: the rows that lora's segments cover. The M sites of A are as many as Bts."""
    A, Bts, segments = lora.A, lora.Bts, lora.segments
    segments.check_rows(op, x)
    if A.ndim != 3 or A.shape[2] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but A is {tuple(A.shape)}, made for {A.shape[-1]}. "
                         "Was this adapter trained on another base?")
    check_dtype(op, x)
    if segments.plan is not None and A.shape[1] > MOST_RANKS:
        raise ValueError(f"{op}: A has {A.shape[1]} rank rows at {len(Bts)} sites but kernels take {MOST_RANKS} at "
                         "once; give each site a call of its own, lower the rank, or use a CPU, which takes any.")
    for Bt in Bts:
        if Bt.ndim != 3 or Bt.shape[:2] != (len(A), A.shape[1] // len(Bts)):
            raise ValueError(f"{op}: A is {tuple(A.shape)}, so Bt must be [{len(A)}, {A.shape[1] // len(Bts)}, N]; got "
                             f"{tuple(Bt.shape)}.")
        if not x.dtype == A.dtype == Bt.dtype:
            raise ValueError(f"{op}: x, A and Bt must share a dtype; got {x.dtype}, {A.dtype}, {Bt.dtype}.")
    segments.check_bank(op, len(A))
    for name, matrices, grad in (("A", A, lora.grad_A), *(("Bt", Bt, grad) for Bt, grad in zip(Bts, lora.grad_Bts))):
        check_slots(op, name, matrices, matrices.shape)
        if grad is not None:
            check_grads(op, f"grad_{name}", grad, matrices.shape)
    check_table(op, "scale (one per slot)", lora.scale, (len(A),), torch.float32)
    check_no_grad(op, "scale", lora.scale)
    for name, table in (("ranks", lora.ranks), ("accumulate", lora.accumulate)):
        if table is not None:
            check_table(op, f"{name} (one per slot)", table, (len(A),), torch.int32)
    if lora.drop is not None:
        check_table(op, "drop (one row per segment)", lora.drop, (len(segments.slots), 2), torch.int64)


def segment_lora(
    x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None = None,
    drop: Tensor | None = None, by_pieces: bool = False,
) -> Tensor:  # fmt: skip
    """y[t] = scale[u] * B[u] @ A[u] @ x[t], where slot u owns row t and Bt[u] is B[u] transposed.

    Hu et al. 2021 (arXiv:2106.09685), eq. 3, without the frozen term W0 @ x, for many users at once.

    Args:
        x:      [T, K] fp32, bf16 or fp16 (on a CPU also fp64). Packed rows, in segment order.
        A, Bt:  [U, R, K] and [U, R, N], dtype of x, views of the bank: contiguous within a slot, any stride between
                slots. On a GPU R is at most 256.
        scale:  [U] fp32, no unit. alpha / rank. Contiguous, as ranks and drop are. It gets no gradient.
        ranks:  [U] int32, or None where every slot uses all R. Rank rows at or past ranks[u] have no
                effect, whatever they hold, and get gradient 0.
        drop:   [S, 2] int64, key and threshold of each segment's dropout of x (dropout.py); None: no dropout.
        by_pieces: on a CPU, never take grouped_mm, whatever the company.
    Returns:
        [T, N], dtype of x; sums run in fp32. Differentiable in x, A and Bt; a slot without rows gets gradient 0.
    Raises:
        ValueError: shapes, dtypes or layouts disagree, scale requires grad, or the device has no implementation.
    Cost: 2 * T * R * (K + N) FLOPs; keeps v = scale * A @ x, [T, R], for backward, which computes the gradients that
    autograd asks for and no other. Same bits on every run; in kernels a user's also in any company. On a CPU libraries
    multiply, and company can change last bits: that it is ragged or long (LONG rows on average; neither matters to
    by_pieces of whole tiles), at odd widths, at ranks below 8.
    """
    check("segment_lora", x, Lora(A, (Bt,), scale, ranks, segments, None, (None,), drop=drop))
    if segments.plan is None and not by_pieces and _can_group(x, Bt, segments):
        return _GroupedLora.apply(_aligned(_dropped(x, drop, segments)), A, Bt, scale, segments, ranks)
    return _SegmentLora.apply(x.contiguous(), A, Bt, scale, segments, ranks, drop)
