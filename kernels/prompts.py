"""Soft prompts for many users in one packed batch: learned rows in front of a sequence's embedded tokens.

    y[t] = P_u[j]     where row t is the j-th prompt row of a sequence of slot u
    y[t] = x[t]       everywhere else                          Lester et al. 2021 (arXiv:2104.08691), section 2

The paper puts a prompt P [V, K] before the embedded input, [P; X]. In a packed batch the host leaves placeholder rows
there, whose x is never read. Prompts have their user's own length, and one prompt stands before each of the user's
sequences. So its gradient is a sum over them:

    grad_P[u, j] = sum over u's sequences of grad_y[first row + j]       grad_x = grad_y, but 0 at prompt rows

Programs and rows. One program has one virtual token of one user, P_u[j], and up to BLOCK_K columns. Forward, it reads
its prompt row once and writes it to all its places; backward, it adds its places up in the order of the batch's rows.
The same table says where those places are. No program writes what another one writes, and no sum crosses users.
Virtual tokens past a user's count and slots without prompts are never read.

Bytes, with e per number: forward 2 e T K to copy x and e K (m + n) for m virtual tokens at n places; backward
e K (m + n), and 2 e T K more where x needs a gradient.

`gather_prompts` is the op by itself. Training calls `prompt_rows`: the same for the prompts of several banks, writing
gradients into the banks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.backend import chosen
from minipeft_kernels.dtypes import jit, store, tl
from minipeft_kernels.layouts import DTYPES, check_dtype
from minipeft_kernels.segments import to_device


@dataclass(frozen=True)
class PromptPlan:
    """Where prompts stand in a batch: rows first_rows[i] .. + counts[i] - 1 are the prompt of slots[i].

    slots, first_rows, counts: [S] int64 on the host, one per sequence that has a prompt, in row order.

    The rest lies on the device, int64. It has the m virtual tokens in use, by slot and number, and their n places:

    token_slots, tokens: [m]. Slot and number of each virtual token in use.
    starts: [m + 1]. The i-th of them stands at rows[starts[i]] .. rows[starts[i + 1] - 1].
    rows:   [n]. Rows of the batch; those of one virtual token ascend.
    """

    slots: np.ndarray
    first_rows: np.ndarray
    counts: np.ndarray
    token_slots: Tensor
    tokens: Tensor
    starts: Tensor
    rows: Tensor

    @staticmethod
    def build(
        slots_of_sequences: Sequence[int],
        first_rows: Sequence[int],
        counts: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> "PromptPlan":
        """The plan for sequences whose prompts belong to these slots and stand at these rows, in any order.

        counts: rows of each sequence's prompt: the same for all sequences of a slot, 0 where it has no prompt.

        Raises:
            ValueError: the lists differ in size, a number is negative, a slot comes with two counts, or two prompts
                share a row.
        """
        slots, first, counts = (np.asarray(a, dtype=np.int64) for a in (slots_of_sequences, first_rows, counts))
        if not slots.shape == first.shape == counts.shape or slots.ndim != 1:
            raise ValueError(f"PromptPlan.build: {len(slots)} slots, {len(first)} first rows and {len(counts)} counts; "
                             "give one of each per sequence.")
        if len(slots) and min(slots.min(), first.min(), counts.min()) < 0:
            raise ValueError(f"PromptPlan.build: a negative slot, first row or count (slots {slots}, first rows "
                             f"{first}, counts {counts}).")
        pairs = np.unique(np.stack([slots, counts], 1), axis=0)  # [users, 2], sorted
        for i in np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])[:1]:
            raise ValueError(f"PromptPlan.build: slot {pairs[i, 0]} comes with prompts of {pairs[i, 1]} and of "
                             f"{pairs[i + 1, 1]} rows; a user's prompt has one length.")
        order = np.argsort(first, kind="stable")
        slots, first, counts = (a[order][counts[order] > 0] for a in (slots, first, counts))
        _check_apart("PromptPlan.build", first, counts)

        sequence = np.repeat(np.arange(len(slots)), counts)  # [n], of each place
        token = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)  # [n]
        by_token = np.lexsort((sequence, token, slots[sequence]))  # by slot, then token, then row
        row, token, slot = (first[sequence] + token)[by_token], token[by_token], slots[sequence][by_token]
        new = np.ones(len(row), dtype=bool)  # [n], where another virtual token begins
        new[1:] = (np.diff(slot) != 0) | (np.diff(token) != 0)
        tables = slot[new], token[new], np.append(np.flatnonzero(new), len(row)), row
        padded = [np.pad(table, (0, len(table) % 2)) for table in tables]  # each starts at a multiple of 16 bytes
        parts = to_device(np.concatenate(padded), device).split([len(table) for table in padded])
        return PromptPlan(slots, first, counts, *(part[: len(table)] for table, part in zip(tables, parts)))


def _check_apart(op: str, first_rows: np.ndarray, counts: np.ndarray) -> None:
    order = np.argsort(first_rows, kind="stable")
    first, end = first_rows[order], (first_rows + counts)[order]
    for i in np.flatnonzero(first[1:] < end[:-1])[:1]:
        raise ValueError(f"{op}: a prompt takes rows {first[i]} to {end[i] - 1} and another one begins at row "
                         f"{first[i + 1]}; each needs placeholder rows of its own.")


# ---- Kernels -------------------------------------------------------------------------------------------------------


def _block_k(K: int) -> int:
    """Columns of a program: 1024 give each of its 128 threads one load of 16 bytes in bf16."""
    return min(1024, max(16, 1 << (K - 1).bit_length()))


@jit
def _forward_kernel(
    prompts_ptr, y_ptr,  # [U, V, K] with slot_stride between slots and token_stride between rows, [T, K]
    token_slots_ptr, tokens_ptr, starts_ptr, rows_ptr,  # [m], [m], [m + 1], [n]
    slot_stride, token_stride, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[t] = P[u, j] at each place t of P[u, j]. One program = one virtual token, BLOCK_K columns."""
    # 1. Which virtual token and columns are mine?
    i = tl.program_id(0)
    slot, token = tl.load(token_slots_ptr + i), tl.load(tokens_ptr + i)  # int64
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)

    # 2. Read it once, write it to each of its places.
    prompt_row = tl.load(prompts_ptr + slot * slot_stride + token * token_stride + cols, cols < K, other=0.0)
    for place in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
        row = tl.load(rows_ptr + place)
        store(y_ptr + row * K + cols, prompt_row.to(tl.float32), cols < K)


@jit
def _backward_kernel(
    grad_y_ptr, grad_prompts_ptr,  # [T, K], [U, V, K] with slot_stride between slots and token_stride between rows
    token_slots_ptr, tokens_ptr, starts_ptr, rows_ptr,  # [m], [m], [m + 1], [n]
    slot_stride, token_stride, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_P[u, j] = sum of grad_y[t] over its places t. One program = one virtual token, BLOCK_K columns."""
    # 1. Which virtual token and columns are mine?
    i = tl.program_id(0)
    slot, token = tl.load(token_slots_ptr + i), tl.load(tokens_ptr + i)  # int64
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)

    # 2. Add its places up, in the order of the rows.
    total = tl.zeros((BLOCK_K,), tl.float32)
    for place in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
        row = tl.load(rows_ptr + place)
        total += tl.load(grad_y_ptr + row * K + cols, cols < K, other=0.0).to(tl.float32)
    store(grad_prompts_ptr + slot * slot_stride + token * token_stride + cols, total, cols < K)


# ---- Both paths: forward and backward into given tensors -----------------------------------------------------------


def _launch(kernel, source: Tensor, target: Tensor, prompts: Tensor, plan: PromptPlan) -> None:
    K = prompts.shape[2]
    block_k = _block_k(K)
    kernel[(len(plan.tokens), -(-K // block_k))](
        source, target, plan.token_slots, plan.tokens, plan.starts, plan.rows,
        prompts.stride(0), prompts.stride(1), K, block_k, num_warps=4,
    )  # fmt: skip


def _forward_triton_(y: Tensor, prompts: Tensor, plan: PromptPlan) -> None:
    """Rows of y [T, K] become prompts."""
    _launch(_forward_kernel, prompts, y, prompts, plan)


def _backward_triton(grad_y: Tensor, grad_prompts: Tensor, plan: PromptPlan) -> None:
    """Rows of grad_prompts [U, V, K] that are in use become the sum over their places in grad_y [T, K]."""
    _launch(_backward_kernel, grad_y, grad_prompts, grad_prompts, plan)


def _forward_torch_(y: Tensor, prompts: Tensor, plan: PromptPlan) -> None:
    used = prompts[plan.token_slots, plan.tokens].to(y.dtype)  # [m, K]
    y.index_copy_(0, plan.rows, used.repeat_interleave(plan.starts.diff(), 0))


def _backward_torch(grad_y: Tensor, grad_prompts: Tensor, plan: PromptPlan) -> None:
    places = grad_y.index_select(0, plan.rows).to(torch.promote_types(grad_y.dtype, torch.float32))  # [n, K]
    order = torch.arange(len(places), device=grad_y.device)
    total = F.embedding_bag(order, places, plan.starts, mode="sum", include_last_offset=True)  # [m, K], each in order
    grad_prompts[plan.token_slots, plan.tokens] = total.to(grad_prompts.dtype)


TRITON, TORCH = (_forward_triton_, _backward_triton), (_forward_torch_, _backward_torch)


# ---- The op by itself ----------------------------------------------------------------------------------------------


class _GatherPrompts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, prompts, plan, path):
        forward_, ctx.backward_ = path
        ctx.plan, ctx.prompts_like = plan, (prompts.shape, prompts.dtype)
        y = x.clone(memory_format=torch.contiguous_format)
        forward_(y, prompts, plan)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grad_y, grad_x, grad_prompts = grad_y.contiguous(), None, None
        if ctx.needs_input_grad[0]:  # grad_y, but 0 at prompt rows: their x had no effect
            grad_x = grad_y.index_fill(0, ctx.plan.rows, 0.0)
        if ctx.needs_input_grad[1]:  # the sum of grad_y over the places of each virtual token
            shape, dtype = ctx.prompts_like
            grad_prompts = torch.zeros(shape, dtype=dtype, device=grad_y.device)
            ctx.backward_(grad_y, grad_prompts, ctx.plan)
        return grad_x, grad_prompts, None, None


def _check(op: str, x: Tensor, prompts: Tensor, plan: PromptPlan) -> None:
    if x.ndim != 2 or prompts.ndim != 3 or prompts.shape[2] != x.shape[1]:
        raise ValueError(f"{op}: x is {tuple(x.shape)} and prompts is {tuple(prompts.shape)}; needs [T, K] and "
                         "[U, V, K]. Was this prompt trained on another base?")
    if prompts.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: prompts are {prompts.dtype}; give them in the dtype of x, {x.dtype}, or in fp32.")
    if prompts.stride(2) != 1 and prompts.shape[2] > 1:
        raise ValueError(f"{op}: the numbers of a prompt row must lie side by side, but stride(2) of prompts is "
                         f"{prompts.stride(2)}; only slots and rows may be apart.")
    U, V = prompts.shape[:2]
    if len(plan.slots) and plan.slots.max() >= U:
        raise ValueError(f"{op}: a prompt of slot {plan.slots.max()} but the bank has {U} slots.")
    if len(plan.counts) and plan.counts.max() > V:
        raise ValueError(f"{op}: a prompt of {plan.counts.max()} rows but the bank's prompts have {V}.")
    if len(plan.slots) and (end := plan.first_rows[-1] + plan.counts[-1]) > len(x):
        raise ValueError(f"{op}: a prompt takes rows up to {end - 1} but x has {len(x)} rows; leave placeholder rows "
                         "for it.")
    if plan.rows.device != x.device:
        raise ValueError(f"{op}: the plan is on {plan.rows.device} but x is on {x.device}; pass "
                         f"device={str(x.device)!r} to PromptPlan.build.")
    check_dtype(op, x)


def gather_prompts(x: Tensor, prompts: Tensor, plan: PromptPlan) -> Tensor:
    """y[t] = prompts[u, j] where row t is the j-th prompt row of a sequence of slot u, else y[t] = x[t].

    Lester et al. 2021 (arXiv:2104.08691), section 2, for many users at once.

    Args:
        x:       [T, K]. Embedded packed rows; what placeholder rows hold has no effect.
        prompts: [U, V, K], dtype of x or fp32, a view of the bank: any stride between slots and between rows.
        plan:    which rows are prompt rows, and whose.
    Returns:
        [T, K], dtype of x. Differentiable in x and prompts. grad_prompts has the dtype of prompts, is summed in fp32
        (in fp64 where x is) and is 0 for virtual tokens that the plan does not use, which are never read.
    Raises:
        ValueError: the shapes or dtypes disagree, the plan names a slot, virtual token or row that does not exist or
            is on another device, or the device has no implementation.
    Cost: one copy of x; keeps nothing. Same bits on every run.
    """
    _check("gather_prompts", x, prompts, plan)
    return _GatherPrompts.apply(x, prompts, plan, chosen(x.device, TRITON, TORCH))


# ---- Of several banks, gradients into the banks --------------------------------------------------------------------


@dataclass(frozen=True)
class PromptRows:
    """One bank's prompts and where they stand in the batch.

    prompts, plan as in `gather_prompts`. grad_prompts has the shape of prompts and is a view of the bank's gradients
    (any strides and floating dtype): backward stores the gradients of the virtual tokens in use there and leaves others
    alone.
    """

    prompts: Tensor
    plan: PromptPlan
    grad_prompts: Tensor


class _PromptRows(torch.autograd.Function):
    """`anchor` is any tensor that requires grad: it starts the backward pass, as embedded tokens need no gradient."""

    @staticmethod
    def forward(ctx, x, anchor, groups, path):
        forward_, ctx.backward_ = path
        ctx.groups = groups
        y = x.clone(memory_format=torch.contiguous_format)
        for g in groups:
            forward_(y, g.prompts, g.plan)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grad_y = grad_y.contiguous()
        for g in ctx.groups:  # the sum of grad_y over the places of each virtual token
            ctx.backward_(grad_y, g.grad_prompts, g.plan)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y.clone()
            for g in ctx.groups:  # 0 at prompt rows: their x had no effect
                grad_x.index_fill_(0, g.plan.rows, 0.0)
        return grad_x, None, None, None


def prompt_rows(x: Tensor, anchor: Tensor, groups: list[PromptRows]) -> Tensor:
    """y[t] = the prompt row that stands at row t by one of the groups, y[t] = x[t] where none does.

    Args:
        x:      [T, K]. anchor: any tensor that requires grad, unused (see _PromptRows).
        groups: the banks whose users have prompts here. Gradients are written into their grad_prompts.
    Returns:
        [T, K], dtype of x. Differentiable in x.
    Raises:
        ValueError: as gather_prompts; or prompts of two groups share a row.
    """
    for g in groups:
        _check("prompt_rows", x, g.prompts, g.plan)
        if g.grad_prompts.dtype not in (*DTYPES, torch.float64):
            raise ValueError(f"prompt_rows: grad_prompts is {g.grad_prompts.dtype}; gradients need a floating dtype.")
        if g.grad_prompts.shape != g.prompts.shape or (g.grad_prompts.stride(2) != 1 and x.shape[1] > 1):
            raise ValueError(f"prompt_rows: grad_prompts is {tuple(g.grad_prompts.shape)} with strides "
                             f"{g.grad_prompts.stride()}; it must be {tuple(g.prompts.shape)}, each row's numbers "
                             "side by side.")
    if groups:
        _check_apart("prompt_rows", *(np.concatenate([getattr(g.plan, name) for g in groups])
                                      for name in ("first_rows", "counts")))  # fmt: skip
    return _PromptRows.apply(x, anchor, groups, chosen(x.device, TRITON, TORCH))
