"""LoRA for decoding: one row per sequence, each with its own user's matrices. Inference only.

    y[s] = scale[u] * B[u] A[u] x[s]         u = slots[s]; a row of slot -1 has no adapter and gets zeros

Hu et al. 2021 (arXiv:2106.09685), eq. 3, without the frozen term; "batched gather matrix-vector multiplication" is
Punica's name for it (arXiv:2310.18547). Several rows may have one slot: a user may have several sequences.

Programs and rows. One program has one row and some blocks of its columns. It computes all of v = scale A x, which stays
in registers, then its columns of B v. There is one row per user and no tile to share, so a matrix unit would be idle
in 15 of its 16 rows: the products are plain multiply-adds in fp32, and memory sets the pace anyway.

Few rows would leave most of a GPU idle, so then a row's columns are shared out among more programs, each of which
computes v again. Only how many columns a program has depends on the number of rows. Blocks, and with them every sum
and its order, depend on K, N and R alone, and the compiled code is the same: a row's bits do not depend on its company.

Bytes, with e per number: e * (R * (K + N) + K + N) per row from memory, each once. The other programs of a row find A
and x in the L2 cache: e * (R + 1) * K per program, at most e * (R + 1) * K * PROGRAMS in all (37 MB for bf16, K = 4096,
R = 16), and nothing once a row is one program. Leaving v in memory would save those reads and cost a second launch.

Plain PyTorch multiplies and sums. `bmm` would do both at once, but its bits depend on how many rows there are (seen
with MKL: one row differs from several, and any number from any other where widths are odd).
"""

import torch
from torch import Tensor

from minipeft_kernels.backend import backend
from minipeft_kernels.dtypes import jit, store, tl
from minipeft_kernels.layouts import DTYPES, check_table

PROGRAMS = 264  # two for every multiprocessor of the largest GPUs we know (132)
BLOCK_NUMBERS = 4096  # of A or Bt a program works on at a time, 32 per thread, while two more blocks are on their way


@jit
def _bgmv_kernel(
    x_ptr, A_ptr, Bt_ptr, y_ptr,  # [S, K], [U, R, K], [U, R, N], [S, N]
    scale_ptr, slots_ptr, ranks_ptr,  # [U], [S], [U] or None: all R
    x_stride, A_slot_stride, A_row_stride, Bt_slot_stride, Bt_row_stride,
    cols_per_program,  # a multiple of BLOCK_N
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[s] = scale B A x[s], for cols_per_program columns of one row."""
    # 1. Which row and columns are mine, and which rank rows does its user have?
    num_programs = tl.cdiv(N, cols_per_program)  # of one row
    row = (tl.program_id(0) // num_programs).to(tl.int64)
    first_col = tl.program_id(0) % num_programs * cols_per_program
    slot = tl.load(slots_ptr + row)
    live = slot >= 0
    rank = tl.where(live, R, 0)  # nothing is read for slot -1
    if ranks_ptr is not None:
        rank = tl.minimum(rank, tl.load(ranks_ptr + slot, live, other=0))
    ranks = tl.arange(0, BLOCK_R)
    used = ranks < rank

    # 2. v = scale A x. One accumulator per number of the block: the threads meet once, after the loop.
    A_ptr += slot * A_slot_stride + ranks[:, None] * A_row_stride
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=3):
        cols = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + cols, cols < K, other=0.0).to(tl.float32)
        a = tl.load(A_ptr + cols[None, :], used[:, None] & (cols < K)[None, :], other=0.0).to(tl.float32)
        acc += a * x[None, :]
    v = tl.sum(acc, 1) * tl.load(scale_ptr + slot, live, other=0.0)
    v = tl.where(used, v, 0.0)[:, None]  # what is not used is 0, whatever x holds

    # 3. y = B v, block by block of columns.
    Bt_ptr += slot * Bt_slot_stride + ranks[:, None] * Bt_row_stride
    for n in tl.range(0, cols_per_program, BLOCK_N, num_stages=3):
        cols = first_col + n + tl.arange(0, BLOCK_N)
        b = tl.load(Bt_ptr + cols[None, :], used[:, None] & (cols < N)[None, :], other=0.0).to(tl.float32)
        store(y_ptr + row * N + cols, tl.sum(v * b, 0), cols < N)


def _blocks(K: int, N: int, R: int) -> tuple[int, int, int]:
    """Rank rows, columns of A and columns of Bt of a block: powers of two.

    At least 16 columns of Bt: Triton compiles one kernel for all multiples of 16, so one for every cols_per_program.
    """
    power_of_two = lambda size: 1 << (size - 1).bit_length()  # noqa: E731
    BLOCK_R = power_of_two(R)
    widest = min(max(BLOCK_NUMBERS // BLOCK_R, 16), 1024)
    return BLOCK_R, min(power_of_two(K), widest), max(min(power_of_two(N), widest), 16)


def _bgmv_with_kernels(x, A, Bt, scale, slots, ranks) -> Tensor:
    (S, K), (_, R, N) = x.shape, Bt.shape
    y = x.new_empty(S, N)
    BLOCK_R, BLOCK_K, BLOCK_N = _blocks(K, N, R)
    num_blocks = -(-N // BLOCK_N)
    num_programs = min(max(PROGRAMS // max(S, 1), 1), num_blocks)  # of one row
    cols_per_program = -(-num_blocks // num_programs) * BLOCK_N
    grid = (S * -(-N // cols_per_program),)
    _bgmv_kernel[grid](x, A, Bt, y, scale, slots, ranks, x.stride(0), A.stride(0), A.stride(1), Bt.stride(0),
                       Bt.stride(1), cols_per_program, K, N, R, BLOCK_R, BLOCK_K, BLOCK_N,
                       num_warps=4)  # fmt: skip
    return y


def _bgmv_with_pytorch(x, A, Bt, scale, slots, ranks) -> Tensor:
    """Every row's matrices gathered side by side, in fp32, and what is not used becomes 0."""
    owners = slots.clamp(min=0)
    unused = (slots < 0)[:, None].expand(-1, A.shape[1])  # [S, R]
    if ranks is not None:
        unused = unused | (torch.arange(A.shape[1], device=x.device) >= ranks[owners, None])
    v = A.index_select(0, owners).float().mul_(x[:, None]).sum(2)  # [S, R]
    v = v.mul_(scale[owners, None]).masked_fill_(unused, 0.0)
    b = Bt.index_select(0, owners).float().masked_fill_(unused[:, :, None], 0.0)  # [S, R, N]
    return b.mul_(v[:, :, None]).sum(1).to(x.dtype)


def _check(x, A, Bt, scale, slots, ranks) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, A, Bt, scale)):
        raise ValueError("bgmv: an input requires grad but bgmv has no backward; call it under torch.no_grad(), or "
                         "train with segment_lora.")  # fmt: skip
    if x.dim() != 2 or A.dim() != 3 or Bt.dim() != 3 or A.shape[:2] != Bt.shape[:2]:
        raise ValueError(f"bgmv: x {list(x.shape)}, A {list(A.shape)}, Bt {list(Bt.shape)}; "
                         "give [S, K], [U, R, K], [U, R, N].")  # fmt: skip
    (S, K), U = x.shape, len(A)
    if K != A.shape[2]:
        raise ValueError(f"bgmv: x has {K} columns but A was made for {A.shape[2]}. "
                         "Was this adapter trained on another base?")  # fmt: skip
    if not x.dtype == A.dtype == Bt.dtype or x.dtype not in DTYPES:
        raise ValueError(f"bgmv: x is {x.dtype}, A {A.dtype}, Bt {Bt.dtype}; give all in bf16, all in fp16 or all in "
                         "fp32 (the bank has a compute copy).")  # fmt: skip
    if x.stride(1) != 1 or A.stride(2) != 1 or Bt.stride(2) != 1:
        raise ValueError("bgmv: the last dimension of x, A and Bt must be contiguous; call .contiguous().")
    check_table("bgmv", "scale (one per slot)", scale, (U,), torch.float32)
    check_table("bgmv", "slots (one per row of x)", slots, (S,), torch.int64)
    if ranks is not None:
        check_table("bgmv", "ranks (one per slot)", ranks, (U,), torch.int32, torch.int64)
    for name, tensor in (("A", A), ("Bt", Bt), ("scale", scale), ("slots", slots), ("ranks", ranks)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"bgmv: {name} is on {tensor.device} but x is on {x.device}; move it there.")


def bgmv(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, slots: Tensor, ranks: Tensor | None = None) -> Tensor:
    """y[s] = scale[u] * B[u] @ A[u] @ x[s] with u = slots[s], where Bt[u] is B[u] transposed. Not differentiable.

    Args:
        x:      [S, K] bf16, fp16 or fp32. One row per sequence; rows may have any stride.
        A, Bt:  [U, R, K] and [U, R, N], dtype of x, views of the bank: any stride between slots and between rank rows.
        scale:  [U] fp32, no unit. alpha / rank. Contiguous, as slots and ranks are.
        slots:  [S] int64. The slot of each row, below U (not checked: it would wait for the device), as often as one
                likes; -1: no adapter, zeros.
        ranks:  [U] int, or None: all R. Rank rows at or past a slot's rank are not read.
    Returns:
        [S, N], dtype of x. Sums and v are fp32. Same bits on every run and in any company.
    Raises:
        ValueError: an input requires grad, or shapes, dtypes, layouts or devices disagree.
    Cost: 2 * S * R * (K + N) FLOPs, and R * (K + N) numbers read per row: the time is that of reading them.
    """
    _check(x, A, Bt, scale, slots, ranks)
    op = _bgmv_with_kernels if backend(x.device) == "triton" else _bgmv_with_pytorch
    return op(x, A, Bt, scale, slots, ranks)
