"""IA3 for many users in one packed batch: every feature of a row is rescaled by a learned vector of the row's user.

    y[t] = l_u * x[t]          elementwise, slot u owns row t          Liu et al. 2022 (arXiv:2205.05638), section 3.3

The paper rescales keys, values (softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)) and the inner activations of the
feed-forward block ((l_ff * g(W_1 x)) W_2). Gradients, per segment of slot u:

    grad_x = l_u * grad_y       grad_l[u] = sum_t grad_y[t] * x[t]

Programs and rows. Forward: one program has BLOCK_T rows of one segment and BLOCK_D columns. Backward: one program has
one chunk of a segment (up to CHUNK rows, from the segment's own first row) and BLOCK_D columns; it reads x and grad_y
once, writes grad_x as it goes and keeps the sum over its rows in registers. The sum of a segment of one chunk goes
straight to its place; those of several chunks are added up in order by a second kernel. Nothing is shared between
users and all sizes depend on D alone, so a user's bits do not depend on the company. Vectors of slots without rows are
never read.

Bytes, with e per number: forward 2 e T D, backward 3 e T D (4 and 6 bytes per element in bf16), plus the vectors. One
multiplication per number read: these kernels only wait for memory.

`segment_ia3` is the op by itself. Training calls `ia3_rows`: the same arithmetic on some of a batch's rows, writing
gradients into the bank.
"""


import torch
from torch import Tensor

from minipeft_kernels.backend import chosen
from minipeft_kernels.dtypes import jit, store, tl
from minipeft_kernels.layouts import check_dtype, check_grads
from minipeft_kernels.segments import Segments, VectorRows, other_rows

BLOCK_T = 64  # rows of a kernel's tile, one of segments.BLOCKS


def _block_d(D: int) -> int:
    """Columns of a kernel's tile: 64 are 128 bytes of a row in bf16, a whole cache line."""
    return min(64, max(16, 1 << (D - 1).bit_length()))


# ---- Kernels -------------------------------------------------------------------------------------------------------
# Programs are numbered column block by column block of the same rows: those that run together then read whole rows.


@jit
def _forward_kernel(
    x_ptr, vectors_ptr, y_ptr,  # [T, D], [U, D] with slot_stride between slots, [T, D]
    segments_ptr, tiles_ptr,  # [S, 3] first row, end row, slot; [n, 2] segment, first row
    slot_stride, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[t] = x[t] * l[u]. One program = BLOCK_T rows of one segment, so it sees one user, by BLOCK_D columns."""
    # 1. Which rows and columns are mine, and whose are they?
    tile, block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    segment = tl.load(tiles_ptr + 2 * tile)
    rows = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_T)
    row_ok = rows < tl.load(segments_ptr + 3 * segment + 1)
    slot = tl.load(segments_ptr + 3 * segment + 2).to(tl.int64)
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = row_ok[:, None] & (cols < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + cols[None, :]  # int64: rows * D may pass 2**31

    # 2. Rescale.
    vector = tl.load(vectors_ptr + slot * slot_stride + cols, cols < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    x = tl.load(x_ptr + offsets, ok, other=0.0).to(tl.float32)
    store(y_ptr + offsets, x * vector[None, :], ok)


@jit
def _backward_kernel(
    x_ptr, grad_y_ptr, vectors_ptr,  # [T, D], [T, D], [U, D] with slot_stride between slots
    grad_x_ptr, grad_vectors_ptr, parts_ptr,  # [T, D], [U, D] with grad_stride between slots, [num_parts, D] fp32
    segments_ptr, chunks_ptr,  # [S, 3] first row, end row, slot; [c, 4] segment, first row, end row, part
    slot_stride, grad_stride, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x = l * grad_y and the chunk's sum of grad_y * x. One program = one chunk by BLOCK_D columns."""
    # 1. Which chunk and columns are mine, and whose are they?
    chunk, block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    segment, first_row = tl.load(chunks_ptr + 4 * chunk), tl.load(chunks_ptr + 4 * chunk + 1)
    end_row, part = tl.load(chunks_ptr + 4 * chunk + 2), tl.load(chunks_ptr + 4 * chunk + 3)
    slot = tl.load(segments_ptr + 3 * segment + 2).to(tl.int64)
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    col_ok = cols < D
    vector = tl.load(vectors_ptr + slot * slot_stride + cols, col_ok, other=0.0).to(tl.float32)  # [BLOCK_D]

    # 2. Down the rows. Row i of every tile is added up by itself: one reduction at the end instead of one per tile.
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for row in range(first_row, end_row, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        ok = (rows < end_row)[:, None] & col_ok[None, :]
        offsets = rows.to(tl.int64)[:, None] * D + cols[None, :]
        grad_y = tl.load(grad_y_ptr + offsets, ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, ok, other=0.0).to(tl.float32)  # 0 in both: 0 times the next user's NaN is NaN
        store(grad_x_ptr + offsets, grad_y * vector[None, :], ok)
        acc += grad_y * x
    total = tl.sum(acc, 0)  # [BLOCK_D]

    # 3. The sum goes to its place, or to those of the segment's other chunks.
    if part < 0:
        store(grad_vectors_ptr + slot * grad_stride + cols, total, col_ok)
    else:
        tl.store(parts_ptr + part.to(tl.int64) * D + cols, total, col_ok)


@jit
def _add_parts_kernel(
    parts_ptr, grad_vectors_ptr,  # [num_parts, D] fp32, [U, D] with grad_stride between slots
    segments_ptr, finals_ptr,  # [S, 3] first row, end row, slot; [f, 3] segment, first part, end part
    grad_stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_l[u] = the sums of u's chunks, added up in order. One program = one segment by BLOCK_D columns."""
    final, block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    segment = tl.load(finals_ptr + 3 * final)
    slot = tl.load(segments_ptr + 3 * segment + 2).to(tl.int64)
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    place = parts_ptr + tl.load(finals_ptr + 3 * final + 1).to(tl.int64) * D + cols
    total = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(tl.load(finals_ptr + 3 * final + 1), tl.load(finals_ptr + 3 * final + 2)):
        total += tl.load(place, cols < D, other=0.0)
        place += D
    store(grad_vectors_ptr + slot * grad_stride + cols, total, cols < D)


# ---- Both paths: forward and backward into given tensors -----------------------------------------------------------


def _forward_triton(x: Tensor, vectors: Tensor, segments: Segments, y: Tensor) -> None:
    """y = x * l, all [T, D]."""
    D, tiles = x.shape[1], segments.plan.tiles[BLOCK_T]
    block_d = _block_d(D)
    _forward_kernel[(len(tiles) * -(-D // block_d),)](
        x, vectors, y, segments.plan.segments, tiles, vectors.stride(0), D, BLOCK_T, block_d, num_warps=4
    )


def _backward_triton(
    x: Tensor, grad_y: Tensor, vectors: Tensor, segments: Segments, grad_x: Tensor, grad_vectors: Tensor
) -> None:
    """grad_x = l * grad_y [T, D]; rows of grad_vectors [U, D] whose slots have rows become sum_t grad_y[t] * x[t]."""
    D, plan = x.shape[1], segments.plan
    block_d = _block_d(D)
    num_blocks = -(-D // block_d)
    parts = torch.empty(plan.num_parts, D, dtype=torch.float32, device=x.device)
    _backward_kernel[(len(plan.chunks) * num_blocks,)](
        x, grad_y, vectors, grad_x, grad_vectors, parts, plan.segments, plan.chunks,
        vectors.stride(0), grad_vectors.stride(0), D, BLOCK_T, block_d, num_warps=4,
    )  # fmt: skip
    _add_parts_kernel[(len(plan.finals) * num_blocks,)](
        parts, grad_vectors, plan.segments, plan.finals, grad_vectors.stride(0), D, block_d, num_warps=2
    )


def _forward_torch(x: Tensor, vectors: Tensor, segments: Segments, y: Tensor) -> None:
    """As _forward_triton, with every row's vector gathered."""
    torch.mul(x, vectors.index_select(0, segments.tiles.groups.slot_of_row), out=y)


def _backward_torch(
    x: Tensor, grad_y: Tensor, vectors: Tensor, segments: Segments, grad_x: Tensor, grad_vectors: Tensor
) -> None:
    """As _backward_triton."""
    _forward_torch(grad_y, vectors, segments, grad_x)
    groups = segments.tiles.groups
    products = grad_y.to(torch.promote_types(x.dtype, torch.float32)) * x  # [T, D]
    grad_vectors.index_copy_(0, groups.slots, groups.sum_rows(products).to(grad_vectors.dtype))


TRITON, TORCH = (_forward_triton, _backward_triton), (_forward_torch, _backward_torch)


# ---- The op by itself ----------------------------------------------------------------------------------------------


class _SegmentIa3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, vectors, segments, path):
        forward, ctx.backward_ = path
        ctx.save_for_backward(x, vectors)
        ctx.segments = segments
        y = torch.empty_like(x)
        forward(x, vectors, segments, y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, vectors = ctx.saved_tensors
        grad_x = torch.empty_like(x)  # l * grad_y: y is linear in x
        grad_vectors = torch.zeros(vectors.shape, dtype=vectors.dtype, device=x.device)  # sum_t grad_y[t] * x[t]
        ctx.backward_(x, grad_y.contiguous(), vectors, ctx.segments, grad_x, grad_vectors)
        return grad_x, grad_vectors, None, None


def _check(op: str, x: Tensor, vectors: Tensor, segments: Segments) -> None:
    """x: the rows that the segments cover."""
    segments.check_rows(op, x)
    if vectors.ndim != 2 or vectors.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: x has {x.shape[1]} columns but vectors is {tuple(vectors.shape)}; needs [U, "
                         f"{x.shape[1]}]. Was this adapter trained on another base?")
    check_dtype(op, x)
    if vectors.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: vectors are {vectors.dtype}; give them in the dtype of x, {x.dtype}, or in fp32.")
    if vectors.stride(1) != 1 and vectors.shape[1] > 1:
        raise ValueError(f"{op}: the numbers of a vector must lie side by side, but stride(1) of vectors is "
                         f"{vectors.stride(1)}; only slots may be apart.")
    segments.check_bank(op, len(vectors))


def segment_ia3(x: Tensor, vectors: Tensor, segments: Segments) -> Tensor:
    """y[t] = l[u] * x[t], elementwise, where slot u owns row t and vectors[u] is l[u].

    Liu et al. 2022 (arXiv:2205.05638), section 3.3, for many users at once.

    Args:
        x:        [T, D]. Packed rows, in segment order.
        vectors:  [U, D], dtype of x or fp32, a view of the bank: any stride between slots.
    Returns:
        [T, D], dtype of x. Differentiable in x and vectors. grad_vectors has the dtype of vectors, is summed in fp32
        (in fp64 where x is) and is 0 for a slot without rows, whose vector is never read.
    Raises:
        ValueError: the shapes or dtypes disagree, the segments were made for another device, or the device has no
            implementation.
    Cost: 4 bytes per element forward, 6 backward in bf16; keeps x. Same bits on every run.
    """
    _check("segment_ia3", x, vectors, segments)
    return _SegmentIa3.apply(x.contiguous(), vectors, segments, chosen(x.device, TRITON, TORCH))


# ---- On some rows of a batch, gradients into the bank --------------------------------------------------------------


class _Ia3Rows(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it keeps backward alive at a site whose x needs no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, groups, others, path):
        forward, ctx.backward_ = path
        ctx.save_for_backward(x)
        ctx.groups, ctx.others = groups, others
        y = torch.empty_like(x)
        for g in groups:
            forward(x[g.rows], g.vectors, g.segments, y[g.rows])
        for rows in others:
            y[rows] = x[rows]
        return y

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        grad_y, grad_x = grad_y.contiguous(), torch.empty_like(x)
        for g in ctx.groups:  # grad_x = l * grad_y, grad_vectors = sum_t grad_y[t] * x[t]
            ctx.backward_(x[g.rows], grad_y[g.rows], g.vectors, g.segments, grad_x[g.rows], g.grad_vectors)
        for rows in ctx.others:  # y = x there
            grad_x[rows] = grad_y[rows]
        return grad_x, None, None, None, None


def ia3_rows(x: Tensor, anchor: Tensor, groups: list[VectorRows]) -> Tensor:
    """y[t] = l[u] * x[t] for rows of a group, y[t] = x[t] for all others.

    Args:
        x:      [T, D]. anchor: any tensor that requires grad, unused (see _Ia3Rows).
        groups: the banks that act here, each on its own rows. Gradients are written into their grad_vectors.
    Returns:
        [T, D], dtype of x. Differentiable in x.
    Raises:
        ValueError: as segment_ia3; or groups that share rows or lie outside of x.
    """
    others = other_rows("ia3_rows", ((g.rows.start, g.segments) for g in groups), len(x))
    for g in groups:
        _check("ia3_rows", x[g.rows], g.vectors, g.segments)
        check_grads("ia3_rows", "grad_vectors", g.grad_vectors, g.vectors.shape)
    return _Ia3Rows.apply(x.contiguous(), anchor, groups, others, chosen(x.device, TRITON, TORCH))
