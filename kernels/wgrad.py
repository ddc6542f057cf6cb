"""Weight gradients of many users: for each segment, the sum over its rows of an outer product.

    G_u = sum over rows t of slot u of v[t] x[t]^T          [R, D]

LoRA's two gradients (dA from w and x, dBt from v and grad_y) and a bottleneck's are all of this form.

Programs and rows. A segment of at most CHUNK rows (segments.py) is one piece of work: program (chunk, block of columns)
runs over its rows from the first to the last, in fp32, and stores [R, BLOCK_D] of the user's gradient, which nobody
else touches. A longer segment is several chunks, each of which leaves its sum in a buffer of parts, and a second launch
adds the parts in order. So a sum's order is fixed by the user's own rows, and there is nothing to be atomic about. The
longest chunks start first: a giant user does not become the tail.

A user's first micro-step stores and later ones add (`accumulate`), so nobody has to zero gradients. The program that
finishes a block also leaves the sum of its squares (`squares`): the gradient's norm without reading it again.

Bytes, with e per number: e * T * D + e * T * R read (v once per block of columns), 4 * R * D written per slot that has
rows, and 8 * R * D more per part.
"""

import torch
from torch import Tensor

from minipeft_kernels.blocks import MOST_RANKS, load_block, my_ranks
from minipeft_kernels.dropout import drop_key, keep_block
from minipeft_kernels.dtypes import jit, padded, tl
from minipeft_kernels.segments import Plan


@jit
def _finish(acc, grad_ptr, squares_ptr, accumulate_ptr, slot, ranks, used, block, row_stride, squares_stride,
            D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Store or add a finished block [RANKS, BLOCK_D] of a user's gradient; leave the sum of its squares."""
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = used[:, None]
    if D % BLOCK_D != 0:
        ok = ok & (cols < D)[None, :]
    places = grad_ptr + ranks[:, None] * row_stride + cols[None, :]
    if accumulate_ptr is not None:
        later = tl.load(accumulate_ptr + slot) != 0
        acc += tl.load(places, ok & later, other=0.0)
    tl.store(places, acc, ok)
    if squares_ptr is not None:
        kept = tl.where(ok, acc, 0.0)
        tl.store(squares_ptr + slot * squares_stride + block, tl.sum(kept * kept))


@jit
def _wgrad_kernel(
    v_ptr, x_ptr, grad_ptr, parts_ptr, squares_ptr,  # [T, V], [T, D], [U, R, D], [parts, R, D], [U, blocks] or None
    chunks_ptr, segments_ptr, ranks_ptr, accumulate_ptr, drop_ptr,  # [c, 4], [S, 3], [U], [U] or None, [S, 2] or None
    slot_stride, row_stride, squares_stride,
    V: tl.constexpr, x_stride: tl.constexpr,  # numbers between rows of v and of x: Triton learns what divides them
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk's share of G = v^T x. One program = the rows of one chunk, BLOCK_D columns of x."""
    # 1. Which rows, whose, and where does the sum go?
    chunk, block = chunks_ptr + 4 * tl.program_id(0), tl.program_id(1)
    segment, first_row, end_row = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    part = tl.load(chunk + 3)
    slot = tl.load(segments_ptr + 3 * segment + 2).to(tl.int64)
    start = tl.load(segments_ptr + 3 * segment)
    RANKS: tl.constexpr = padded(M * R)
    ranks, used = my_ranks(ranks_ptr, slot, R, M)
    if drop_ptr is not None:
        key, threshold, factor = drop_key(drop_ptr, segment)

    # 2. Sum over rows in fp32. Rows past the end count as 0 in both: 0 times somebody else's NaN is NaN.
    acc = tl.zeros((RANKS, BLOCK_D), tl.float32)
    for row in range(first_row, end_row, BLOCK_T):
        rows = row + tl.arange(0, BLOCK_T)
        row_ok = rows < end_row
        positions = rows - start
        rows = rows.to(tl.int64)
        v = load_block(v_ptr, rows, row_ok, V, 0, M * R, RANKS)  # [BLOCK_T, RANKS]
        x = load_block(x_ptr, rows, row_ok, x_stride, block * BLOCK_D, D, BLOCK_D)  # [BLOCK_T, BLOCK_D]
        if drop_ptr is not None:
            x = tl.where(keep_block(key, threshold, positions, block * BLOCK_D, BLOCK_T, BLOCK_D), x, 0.0)
        acc = tl.dot(tl.trans(v), x, acc, input_precision="ieee")
    if drop_ptr is not None:
        acc *= factor

    # 3. A whole segment is finished; a chunk of a longer one leaves its part.
    if part < 0:
        _finish(acc, grad_ptr + slot * slot_stride, squares_ptr, accumulate_ptr, slot, ranks, used, block, row_stride,
                squares_stride, D, BLOCK_D)  # fmt: skip
    else:
        cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
        places = part.to(tl.int64) * (M * R * D) + ranks[:, None] * D + cols[None, :]
        tl.store(parts_ptr + places, acc, (ranks < M * R)[:, None] & (cols < D)[None, :])


@jit
def _wgrad_final_kernel(
    parts_ptr, grad_ptr, squares_ptr,  # [parts, R, D], [U, R, D], [U, blocks] or None
    finals_ptr, segments_ptr, ranks_ptr, accumulate_ptr,  # [f, 3], [S, 3], [U] or None, [U] or None
    slot_stride, row_stride, squares_stride,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a long segment's parts in order. One program = one segment, BLOCK_D columns."""
    final, block = finals_ptr + 3 * tl.program_id(0), tl.program_id(1)
    slot = tl.load(segments_ptr + 3 * tl.load(final) + 2).to(tl.int64)
    RANKS: tl.constexpr = padded(M * R)
    ranks, used = my_ranks(ranks_ptr, slot, R, M)
    cols = block * BLOCK_D + tl.arange(0, BLOCK_D)
    places = ranks[:, None] * D + cols[None, :]
    ok = (ranks < M * R)[:, None] & (cols < D)[None, :]
    acc = tl.zeros((RANKS, BLOCK_D), tl.float32)
    for part in range(tl.load(final + 1), tl.load(final + 2)):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * (M * R * D) + places, ok, other=0.0)
    _finish(acc, grad_ptr + slot * slot_stride, squares_ptr, accumulate_ptr, slot, ranks, used, block, row_stride,
            squares_stride, D, BLOCK_D)  # fmt: skip


# ---- Launchers -----------------------------------------------------------------------------------------------------


def configuration(num_ranks: int, itemsize: int) -> dict[str, int]:
    """Block sizes for this many rank rows and bytes per number of v and x; never of the batch.

    Compiled as in shrink_expand.py, up to MOST_RANKS rank rows. In fp32 dropout in flight and a product's operands
    share the registers: smaller blocks.
    """
    assert num_ranks <= MOST_RANKS
    if itemsize > 2:
        return {"BLOCK_T": 16, "BLOCK_D": 64 if num_ranks <= 64 else 32, "num_warps": 4 if num_ranks <= 32 else 8,
                "num_stages": 3}  # fmt: skip
    if num_ranks <= 32:
        return {"BLOCK_T": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}
    if num_ranks <= 64:
        return {"BLOCK_T": 64, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_T": 32, "BLOCK_D": 64 if num_ranks <= 128 else 32, "num_warps": 8, "num_stages": 3}


def num_squares(num_ranks: int, D: int, itemsize: int) -> int:
    """Sums of squares that `wgrad` leaves per slot for a gradient [num_ranks, D]; itemsize: bytes per number of x."""
    return -(-D // configuration(num_ranks, itemsize)["BLOCK_D"])


def wgrad(
    v: Tensor, x: Tensor, plan: Plan, grad: Tensor, ranks: Tensor | None = None, accumulate: Tensor | None = None,
    squares: Tensor | None = None, drop: Tensor | None = None, M: int = 1,
) -> None:  # fmt: skip
    """grad[u] = sum over the rows t of slot u of v[t] x[t]^T, for the slots that have rows; others are not touched.

    Args:
        v:       [T, M * R] and x: [T, D], one dtype; any stride between rows.
        grad:    [U, M * R, D] fp32, any stride between slots and between rank rows.
        ranks:   [U] int32, or None where every slot uses all R; rank rows past a slot's own are not touched.
        accumulate: [U] int32 or None. Slots where it is not 0 add to what grad holds; others overwrite it.
        squares: [U, num_squares] fp32 or None: receives the sum of squares of each finished block of grad.
        drop:    [S, 2] of dropout.py or None: x stands for its dropped-out self.
        M:       how many sites' rank rows, R each, v has.
    Raises:
        ValueError: squares has more or fewer columns than there are blocks: sums would go beside it, or be missing.
    """
    num_ranks, D = v.shape[1], x.shape[1]
    assert all(tensor.shape[-1] == 1 or tensor.stride(-1) == 1 for tensor in (v, x, grad))
    if squares is not None and squares.shape[1] != (needed := num_squares(num_ranks, D, x.itemsize)):
        raise ValueError(f"wgrad: squares has {squares.shape[1]} columns, but a gradient of {num_ranks} rank rows and "
                         f"{D} columns from {x.dtype} leaves {needed} sums; make room by num_squares.")
    if not len(plan.chunks):
        return
    config = configuration(num_ranks, x.itemsize)
    blocks, R = -(-D // config["BLOCK_D"]), num_ranks // M
    parts = torch.empty(plan.num_parts, num_ranks, D, dtype=torch.float32, device=x.device)
    squares_stride = 0 if squares is None else squares.stride(0)
    _wgrad_kernel[(len(plan.chunks), blocks)](
        v, x, grad, parts, squares, plan.chunks, plan.segments, ranks, accumulate, drop,
        grad.stride(0), grad.stride(1), squares_stride, v.stride(0), x.stride(0), D, R, M, **config,
    )  # fmt: skip
    if len(plan.finals):
        del config["BLOCK_T"]
        _wgrad_final_kernel[(len(plan.finals), blocks)](
            parts, grad, squares, plan.finals, plan.segments, ranks, accumulate,
            grad.stride(0), grad.stride(1), squares_stride, D, R, M, **config,
        )  # fmt: skip
