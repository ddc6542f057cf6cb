"""AdamW for many users at once: one step of every given row of the bank, each row with its own settings.

    g <- g * min(1, max_norm / (|g| + 1e-6))                                 clip, per user
    w <- w (1 - lr * wd)                                                     decoupled decay
    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, with torch.optim.AdamW's order of operations. Whatever does
not depend on g, m, v or w is computed in fp64 on the host and copied to the device in one table. A user whose |g| is
not finite does not step, and nothing of theirs is written; the others do step.

Kernels. Norms: a program sums the squares of SQUARES_BLOCK numbers of one row, unless the weight gradient's kernels
have left such sums; then one program per row adds the sums up in order. The step: a program has STEP_BLOCK numbers of
one row. No sum crosses rows and no block's size depends on how many rows there are, so neither does any bit.

Bytes per number: read g, w, m, v and write w, m, v, 4 each, and the copy of w for the base's dtype, 2: 30. Nothing
else passes over memory when the sums of squares are there; without them g is read once more: 34. Rows are multiples of
64 numbers, so every access is 16 bytes wide.

Plain PyTorch: each line is a pass over memory. Each is also one correctly rounded operation per number, so a row's bits
do not depend on where it lies in a vector lane or a thread's share; and the norm is summed in fixed blocks of a row.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.backend import backend, chosen
from minipeft_kernels.dtypes import jit, store, tl
from minipeft_kernels.segments import to_device

NORM_BLOCK = 64  # numbers PyTorch sums first in the gradient norm; rows are padded to a multiple of it
SQUARES_BLOCK = 8192  # numbers whose squares one program sums; 32 per thread
COPIES = (torch.bfloat16, torch.float16)  # dtypes of a copy of the weights; plain PyTorch takes fp64 too
STEP_BLOCK = 2048  # numbers one program steps; 8 per thread, of four buffers


@dataclass(frozen=True)
class AdamWSettings:
    """Each field [S] fp64, on the host: the settings of the rows being stepped, in the order of `slots`.

    lr, weight_decay, beta1, beta2, eps: as in torch.optim.AdamW. max_norm: may be infinite. step: counts from 1.
    """

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    max_norm: Tensor
    step: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _table(settings: AdamWSettings) -> Tensor:
    """[S, 8] fp32: what a row's step multiplies by, derived in fp64. The columns are in the order of their use."""
    s = settings
    step_size = s.lr / (1 - s.beta1**s.step)
    correction = 1 / (1 - s.beta2**s.step).sqrt()
    columns = (s.max_norm, 1 - s.lr * s.weight_decay, 1 - s.beta1, s.beta2, 1 - s.beta2, correction, s.eps, step_size)
    return torch.stack(columns, 1).float()


@jit
def _squares_kernel(grads_ptr, slots_ptr, squares_ptr, P, BLOCK: tl.constexpr):  # [U, P], [S], [U, P / BLOCK up]
    """squares[u, b] = sum of g^2 over block b of row u. One program = one block of one row."""
    num_blocks = tl.cdiv(P, BLOCK)
    slot = tl.load(slots_ptr + tl.program_id(0) // num_blocks)
    block = tl.program_id(0) % num_blocks
    cols = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grads_ptr + slot * P + cols, cols < P, other=0.0)
    tl.store(squares_ptr + slot * num_blocks + block, tl.sum(g * g))


@jit
def _norm_kernel(squares_ptr, slots_ptr, norms_ptr, Q, BLOCK: tl.constexpr):  # [U, Q], [S], [S]
    """norms[s] = sqrt(sum of squares[u]), summed in order. One program = one row."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    acc = tl.zeros((BLOCK,), tl.float32)
    for q in range(0, Q, BLOCK):
        cols = q + tl.arange(0, BLOCK)
        acc += tl.load(squares_ptr + slot * Q + cols, cols < Q, other=0.0)
    tl.store(norms_ptr + tl.program_id(0), tl.sqrt_rn(tl.sum(acc)))


@jit
def _step_kernel(
    weights_ptr, grads_ptr, exp_avg_ptr, exp_avg_sq_ptr,  # [U, P] fp32
    compute_ptr,  # [U, P] bf16 or fp16, or None
    slots_ptr, norms_ptr, table_ptr,  # [S], [S], [S, 8]: see _table
    P, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of one row's numbers b * BLOCK .. in one pass: everything is read once and written once."""
    # 1. Which numbers are mine? None, where the norm is not finite: nothing is read and nothing is written.
    num_blocks = tl.cdiv(P, BLOCK)
    row = tl.program_id(0) // num_blocks
    cols = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(norms_ptr + row)
    ok = cols < tl.where(norm < float("inf"), P, 0)  # a NaN is not below infinity either
    places = tl.load(slots_ptr + row) * P + cols  # int64, as slots are: U * P may pass 2**31
    g = tl.load(grads_ptr + places, ok, other=0.0)
    w = tl.load(weights_ptr + places, ok, other=0.0)
    m = tl.load(exp_avg_ptr + places, ok, other=0.0)
    v = tl.load(exp_avg_sq_ptr + places, ok, other=0.0)

    # 2. This user's own settings.
    table_ptr += row * 8
    max_norm, decay = tl.load(table_ptr), tl.load(table_ptr + 1)
    rest1, beta2, rest2 = tl.load(table_ptr + 2), tl.load(table_ptr + 3), tl.load(table_ptr + 4)  # rest = 1 - beta
    correction, eps, step_size = tl.load(table_ptr + 5), tl.load(table_ptr + 6), tl.load(table_ptr + 7)

    # 3. Step. div_rn and sqrt_rn round correctly; Triton's plain ones approximate.
    g *= tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0)
    w *= decay
    m = (1 - rest1) * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    w -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * correction + eps)
    tl.store(weights_ptr + places, w, ok)
    tl.store(exp_avg_ptr + places, m, ok)
    tl.store(exp_avg_sq_ptr + places, v, ok)
    if compute_ptr is not None:
        store(compute_ptr + places, w, ok)


def _step_with_kernels(buffers, slots, table, squares, compute) -> Tensor:
    weights, grads, exp_avg, exp_avg_sq = buffers
    (U, P), S = weights.shape, len(slots)
    if squares is None:
        num_blocks = -(-P // SQUARES_BLOCK)
        squares = grads.new_empty(U, num_blocks)
        _squares_kernel[(S * num_blocks,)](grads, slots, squares, P, SQUARES_BLOCK, num_warps=8)
    norms = grads.new_empty(S)
    _norm_kernel[(S,)](squares, slots, norms, squares.shape[1], 1024, num_warps=4)
    table = to_device(table, weights.device)
    grid = (S * -(-P // STEP_BLOCK),)
    _step_kernel[grid](weights, grads, exp_avg, exp_avg_sq, compute, slots, norms, table, P, STEP_BLOCK, num_warps=8)
    return norms


def _row_sums(x: Tensor) -> Tensor:
    """[S, Q] -> [S]: blocks, then blocks of blocks. PyTorch shares one long sum among threads, but only if S is 1."""
    while x.shape[1] > 1:
        if x.shape[1] % NORM_BLOCK:
            x = F.pad(x, (0, -x.shape[1] % NORM_BLOCK))
        x = x.unflatten(1, (-1, NORM_BLOCK)).sum(-1)
    return x[:, 0]


def _step_with_pytorch(buffers, slots, table, squares, compute) -> Tensor:
    weights, grads, exp_avg, exp_avg_sq = buffers
    grad = grads.index_select(0, slots)  # [S, P]
    norms = _row_sums(grad * grad if squares is None else squares.index_select(0, slots)).sqrt()
    finite = torch.isfinite(norms)
    if not finite.all():
        slots, grad, table = slots[finite], grad[finite], table[finite]
    max_norm, decay, rest1, beta2, rest2, correction, eps, step_size = table.split(1, dim=1)  # [S, 1] each
    grad *= torch.clamp(max_norm / (norms[finite, None] + 1e-6), max=1.0)

    m, v, w = (buffer.index_select(0, slots) for buffer in (exp_avg, exp_avg_sq, weights))
    m = m.mul_(1 - rest1).add_(grad * rest1)
    v = v.mul_(beta2).add_(grad.mul_(grad).mul_(rest2))
    denominator = v.sqrt().mul_(correction).add_(eps)
    w = w.mul_(decay).sub_((m * step_size).div_(denominator))
    written = [(exp_avg, m), (exp_avg_sq, v), (weights, w)]
    if compute is not None:
        written.append((compute, w.to(compute.dtype)))
    for buffer, rows in written:  # all is allocated by now: short of memory, a step is taken whole or not at all
        buffer.index_copy_(0, slots, rows)
    return norms


def _check(buffers, slots, settings, squares, compute) -> None:
    U, P = buffers[0].shape
    if P % NORM_BLOCK:
        raise ValueError(f"adamw_: rows of {P} numbers; pad them to a multiple of {NORM_BLOCK}.")
    for name, x in zip(("weights", "grads", "exp_avg", "exp_avg_sq"), buffers):
        if x.shape != (U, P) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"adamw_: {name} is {list(x.shape)} {x.dtype}; all four must be contiguous "
                             f"[{U}, {P}] fp32, as minipeft.bank makes them.")  # fmt: skip
    if slots.dtype != torch.int64 or slots.dim() != 1 or slots.device != buffers[0].device:
        raise ValueError(f"adamw_: slots are {list(slots.shape)} {slots.dtype} on {slots.device}; "
                         f"give [S] int64 on {buffers[0].device}.")  # fmt: skip
    for name, value in settings.as_dict().items():
        if value.shape != slots.shape or value.dtype != torch.float64 or value.device.type != "cpu":
            raise ValueError(f"adamw_: {name} is {list(value.shape)} {value.dtype} on {value.device}; "
                             f"give one fp64 number for each of {len(slots)} slots, on the CPU.")  # fmt: skip
    if squares is not None and (squares.dim() != 2 or len(squares) != U or squares.shape[1] == 0
                                or squares.dtype != torch.float32 or not squares.is_contiguous()):  # fmt: skip
        raise ValueError(f"adamw_: squares is {list(squares.shape)} {squares.dtype}; give contiguous [{U}, Q] fp32.")
    dtypes = chosen(buffers[0].device, COPIES, (*COPIES, torch.float64))
    if compute is not None and (compute.shape != (U, P) or compute.dtype not in dtypes or not compute.is_contiguous()):
        raise ValueError(f"adamw_: compute is {list(compute.shape)} {compute.dtype}; give contiguous [{U}, {P}] "
                         f"{' or '.join(map(str, dtypes))}, or None if the base computes in fp32.")  # fmt: skip


def adamw_(
    weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor, settings: AdamWSettings,
    squares: Tensor | None = None, compute: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Step rows `slots` of the bank in place; rows not named are not touched, nor is any gradient.

    Args:
        weights, grads, exp_avg, exp_avg_sq: [U, P] fp32, P a multiple of 64.
        slots:    [S] int64, on the device, each at most once and below U (not checked: it would wait for the device).
        settings: per row, fp64, on the host.
        squares:  [U, Q] fp32. Each row adds up to the sum of that gradient row's squares, as the weight gradient's
                  kernels leave it; None: it is computed here. Rows not in slots are not read.
        compute:  [U, P] bf16 or fp16, on a CPU also fp64: a copy of the weights in the base's dtype. Stepped rows are
                  written, rounded to nearest even.
    Returns:
        [S] fp32 gradient norms before clipping. A row whose norm is not finite is left as it was (weights, moments and
        copy): the caller must report that user. The norm of finite gradients is infinite from 1.8e19 on.
    Raises:
        ValueError: a shape, dtype, device or layout that differs from the above.
    Cost: 30 bytes per number read or written, 28 without the copy, 4 more without squares; more on the CPU, where each
    line is a pass.
    """
    buffers = (weights, grads, exp_avg, exp_avg_sq)
    _check(buffers, slots, settings, squares, compute)
    step = _step_with_kernels if backend(weights.device) == "triton" else _step_with_pytorch
    return step(buffers, slots, _table(settings), squares, compute)
