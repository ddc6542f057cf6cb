"""What people run today to give every row of a batch its own user's adapter: the same sums in plain PyTorch.

    y[t] = s_u B_u A_u x[t]          slot u owns row t          outputs and gradients of reference.segment_lora

    loop         one small product after another, user by user: reference.py               (PEFT, mLoRA)
    gather_bmm   every row gets its own copy of A and B, then batched products of one row  (fLoRA)
    padded_bmm   users side by side as [S, longest, K], short ones filled up with zeros    (batched training)
    grouped_mm   torch.nn.functional.grouped_mm: one launch, a group of rows per user      (Megatron-Bridge, SkyRL)

Each is the best short version we could write: the users' matrices are gathered once and never stacked, `scale` is
multiplied into v, and what depends on the batch alone is looked up in `Groups`, built once per batch like Segments.
The projects in brackets work this way; their code is not here. Below them the same for weight gradients by themselves,
for bottleneck adapters, IA3 and soft prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segments import RowGroups, Segments

Activation = Callable[[Tensor], Tensor]


class DoesNotApply(ValueError):
    """This way of computing cannot do this batch at all."""


@dataclass(frozen=True)
class Groups:
    """A batch as the baselines see it. Segments without rows are left out: they have nothing to compute.

    lengths: [S'] on the host. Rows of each segment.
    slots, slot_of_row, ends: as in segments.RowGroups.
    places:  [T] int64, place of each row in the padded [S' * longest]; None if all are as long and none is padded.
    """

    lengths: list[int]
    slots: Tensor
    slot_of_row: Tensor
    ends: Tensor
    places: Tensor | None

    @staticmethod
    def build(segments: Segments, device: torch.device | str = "cpu") -> "Groups":
        lengths = np.diff(segments.starts)
        own = RowGroups.build(segments.slots, segments.starts, device)
        starts, lengths, places = segments.starts[:-1][lengths > 0], lengths[lengths > 0], None
        if len(lengths) and (lengths != lengths[0]).any():
            nth = np.arange(segments.num_rows) - np.repeat(starts, lengths)  # [T], within its segment
            places = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths) * lengths.max() + nth).to(device)
        return Groups(lengths.tolist(), own.slots, own.slot_of_row, own.ends, places)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


def _own(matrices: Tensor, slots: Tensor, ranks: Tensor | None) -> Tensor:
    """[U, R, ...] -> [n, R, ...], those of these slots; rows at or past a slot's rank become 0, whatever they hold."""
    gathered = matrices.index_select(0, slots)
    if ranks is None:
        return gathered
    unused = torch.arange(matrices.shape[1], device=slots.device) >= ranks.index_select(0, slots)[:, None]  # [n, R]
    return gathered.masked_fill(unused if matrices.ndim == 2 else unused[:, :, None], 0.0)


def _own_scale(x: Tensor, scale: Tensor, slots: Tensor) -> Tensor:
    """[n], dtype of x."""
    return scale.index_select(0, slots).to(x.dtype)


def gather_bmm(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, groups: Groups, ranks: Tensor | None = None) -> Tensor:
    """Every row with its own matrices: [T, R, K] and [T, R, N] are written and read again.

    Arguments of all three as in segment_lora.py, but for groups.
    """
    row_A, row_Bt = (_own(matrices, groups.slot_of_row, ranks) for matrices in (A, Bt))
    v = torch.bmm(row_A, x[:, :, None]) * _own_scale(x, scale, groups.slot_of_row)[:, None, None]  # [T, R, 1]
    return torch.bmm(v.transpose(1, 2), row_Bt)[:, 0]


def _pad(x: Tensor, groups: Groups) -> Tensor:
    """[T, K] -> [S', longest, K], filled up with 0."""
    S, K = len(groups.lengths), x.shape[1]
    padded = x if groups.places is None else x.new_zeros(S * groups.longest, K).index_copy(0, groups.places, x)
    return padded.view(S, groups.longest, K)


def _unpad(padded: Tensor, groups: Groups) -> Tensor:
    """[S', longest, N] -> [T, N]."""
    y = padded.flatten(0, 1)
    return y if groups.places is None else y.index_select(0, groups.places)


def padded_bmm(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, groups: Groups, ranks: Tensor | None = None) -> Tensor:
    """Everybody as long as the longest: [S', longest, K] and [S', longest, N]."""
    own_A, own_Bt = (_own(matrices, groups.slots, ranks) for matrices in (A, Bt))
    v = torch.bmm(_pad(x, groups), own_A.transpose(1, 2))  # [S', longest, R]
    return _unpad(torch.bmm(v * _own_scale(x, scale, groups.slots)[:, None, None], own_Bt), groups)


def _check_grouped(x: Tensor, N: int, groups: Groups) -> None:
    """Raises DoesNotApply where torch's grouped_mm does not take rows of x's width and of N numbers, or this batch."""
    K, S = x.shape[1], len(groups.lengths)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DoesNotApply(f"grouped_mm: x is {x.dtype}; it takes fp32, bf16 and fp16.")
    if not 1 <= S < 1024:
        raise DoesNotApply(f"grouped_mm: {S} users have rows; it takes 1 to 1023.")
    if K * x.itemsize % 16 or N * x.itemsize % 16:
        raise DoesNotApply(f"grouped_mm: rows of {K} and {N} numbers in {x.dtype}; it takes whole 16 bytes.")


def grouped_mm(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, groups: Groups, ranks: Tensor | None = None) -> Tensor:
    """One grouped product for all As, one for all Bs. A rank that is not a multiple of 8 is padded to one.

    Raises:
        DoesNotApply: a dtype, a number of users or a width that torch's grouped_mm does not take.
    """
    _check_grouped(x, Bt.shape[2], groups)
    own_A, own_Bt = (_own(matrices, groups.slots, ranks) for matrices in (A, Bt))
    if A.shape[1] % 8:
        own_A, own_Bt = (F.pad(matrices, (0, 0, 0, -A.shape[1] % 8)) for matrices in (own_A, own_Bt))
    v = F.grouped_mm(x, own_A.transpose(1, 2), offs=groups.ends)  # [T, padded R]
    v = v * _own_scale(x, scale, groups.slot_of_row)[:, None]
    return F.grouped_mm(v, own_Bt, offs=groups.ends)


# ---- Weight gradients by themselves: G_u = sum over rows t of slot u of v[t] x[t]^T --------------------------------


def loop_wgrad(v: Tensor, x: Tensor, grad: Tensor, groups: Groups) -> None:
    """One product per user, into the user's place of grad [U, R, K]. v: [T, R], x: [T, K], all of one dtype.

    A framework's gradients have the dtype of its weights, so grad does in all three, where ours is fp32.
    """
    for slot, v_u, x_u in zip(groups.slots.tolist(), v.split(groups.lengths), x.split(groups.lengths)):
        torch.mm(v_u.t(), x_u, out=grad[slot])


def padded_wgrad(v: Tensor, x: Tensor, grad: Tensor, groups: Groups) -> None:
    """One batched product of rows filled up with 0; then the users' gradients go to their places."""
    grad.index_copy_(0, groups.slots, torch.bmm(_pad(v, groups).transpose(1, 2), _pad(x, groups)))


def grouped_wgrad(v: Tensor, x: Tensor, grad: Tensor, groups: Groups) -> None:
    """One grouped product, a group of rows per user. Raises DoesNotApply as grouped_mm does."""
    _check_grouped(x, x.shape[1], groups)
    R = v.shape[1]
    own = F.grouped_mm(F.pad(v, (0, -R % 8)).t(), x, offs=groups.ends)  # [S', padded R, K]
    grad.index_copy_(0, groups.slots, own[:, :R])


# ---- Bottleneck adapters: y[t] = x[t] + s_u (Wu_u act(Wd_u x[t] + bd_u) + bu_u) --------------------------------------


def padded_bottleneck(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, act: Activation,
    groups: Groups, widths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Everybody as long as the longest. Arguments of both as in bottleneck.py, but for groups and act, a function."""
    own_down, own_down_bias, own_up = (_own(weights, groups.slots, widths) for weights in (down, down_bias, up))
    z = torch.baddbmm(own_down_bias[:, None], _pad(x, groups), own_down.transpose(1, 2))  # [S', longest, F]
    y = torch.baddbmm(up_bias.index_select(0, groups.slots)[:, None], act(z), own_up)  # [S', longest, K]
    return x + _unpad(y * _own_scale(x, scale, groups.slots)[:, None, None], groups)


def grouped_bottleneck(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scale: Tensor, act: Activation,
    groups: Groups, widths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One grouped product down, one up; biases are gathered row by row. Raises DoesNotApply as grouped_mm does."""
    _check_grouped(x, x.shape[1], groups)
    own_down, own_up = (_own(weights, groups.slots, widths) for weights in (down, up))
    row_bias = _own(down_bias, groups.slot_of_row, widths)  # [T, F]
    if fill := -down.shape[1] % 8:
        own_down, own_up = (F.pad(weights, (0, 0, 0, fill)) for weights in (own_down, own_up))
        row_bias = F.pad(row_bias, (0, fill))
    h = act(F.grouped_mm(x, own_down.transpose(1, 2), offs=groups.ends) + row_bias)  # [T, padded F]
    y = F.grouped_mm(h, own_up, offs=groups.ends) + up_bias.index_select(0, groups.slot_of_row)
    return x + y * _own_scale(x, scale, groups.slot_of_row)[:, None]


# ---- A matrix per user: y[t] = W_u^T x[t] --------------------------------------------------------------------------


def gather_matmul(x: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """Every row with its own matrix: [T, K, N] is written and read again. W of all three as in segment_matmul.py."""
    return torch.bmm(x[:, None], W.index_select(0, groups.slot_of_row))[:, 0]


def padded_matmul(x: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """Everybody as long as the longest."""
    return _unpad(torch.bmm(_pad(x, groups), W.index_select(0, groups.slots)), groups)


def grouped_matmul(x: Tensor, W: Tensor, groups: Groups) -> Tensor:
    """One grouped product. Raises DoesNotApply as grouped_mm does."""
    _check_grouped(x, W.shape[2], groups)
    return F.grouped_mm(x, W.index_select(0, groups.slots), offs=groups.ends)


# ---- IA3, biases and soft prompts ----------------------------------------------------------------------------------


def gather_ia3(x: Tensor, vectors: Tensor, groups: Groups) -> Tensor:
    """y[t] = vectors[u] * x[t] with every row's vector gathered: [T, D] is written and read once more."""
    return (vectors.index_select(0, groups.slot_of_row) * x).to(x.dtype)


def gather_shift(x: Tensor, vectors: Tensor, groups: Groups) -> Tensor:
    """y[t] = x[t] + vectors[u] with every row's vector gathered."""
    return (x + vectors.index_select(0, groups.slot_of_row)).to(x.dtype)


def gather_prompts(x: Tensor, prompts: Tensor, plan: PromptPlan) -> Tensor:
    """Prompt rows of x replaced by index, all at once. Arguments as in prompts.py."""
    used = prompts[plan.token_slots, plan.tokens].to(x.dtype)  # [m, K]
    return x.index_copy(0, plan.rows, used.repeat_interleave(plan.starts.diff(), 0))
