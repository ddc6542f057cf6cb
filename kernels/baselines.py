"""What people run today to give every row of a batch its own user's adapter: the same sums in plain PyTorch.

    y[t] = s_u B_u A_u x[t]          slot u owns row t          outputs and gradients of reference.segment_lora

    loop         one small product after another, user by user: reference.py               (PEFT, mLoRA)
    gather_bmm   every row gets its own copy of A and B, then batched products of one row  (fLoRA)
    padded_bmm   users side by side as [S, longest, K], short ones filled up with zeros    (batched training)
    grouped_mm   torch.nn.functional.grouped_mm: one launch, a group of rows per user      (Megatron-Bridge, SkyRL)

Each is the best short version we could write: the users' matrices are gathered once and never stacked, `scale` is
multiplied into v, and what depends on the batch alone is looked up in `Groups`, built once per batch like Segments.
The projects in brackets work this way; their code is not here. The two functions at the end do the same for IA3 and
for soft prompts.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segments import RowGroups, Segments


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
    """[U, R, K] -> [n, R, K], those of these slots; rows at or past a slot's rank become 0, whatever they hold."""
    gathered = matrices.index_select(0, slots)
    if ranks is None:
        return gathered
    unused = torch.arange(matrices.shape[1], device=slots.device) >= ranks.index_select(0, slots)[:, None]  # [n, R]
    return gathered.masked_fill(unused[:, :, None], 0.0)


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


def padded_bmm(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, groups: Groups, ranks: Tensor | None = None) -> Tensor:
    """Everybody as long as the longest: [S', longest, K] and [S', longest, N]."""
    S, K = len(groups.lengths), x.shape[1]
    padded = x if groups.places is None else x.new_zeros(S * groups.longest, K).index_copy(0, groups.places, x)
    own_A, own_Bt = (_own(matrices, groups.slots, ranks) for matrices in (A, Bt))
    v = torch.bmm(padded.view(S, groups.longest, K), own_A.transpose(1, 2))  # [S', longest, R]
    v = v * _own_scale(x, scale, groups.slots)[:, None, None]
    y = torch.bmm(v, own_Bt).view(S * groups.longest, Bt.shape[2])
    return y if groups.places is None else y.index_select(0, groups.places)


def grouped_mm(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, groups: Groups, ranks: Tensor | None = None) -> Tensor:
    """One grouped product for all As, one for all Bs. A rank that is not a multiple of 8 is padded to one.

    Raises:
        DoesNotApply: a dtype, a number of users or a width that torch's grouped_mm does not take.
    """
    K, N, S = x.shape[1], Bt.shape[2], len(groups.lengths)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DoesNotApply(f"grouped_mm: x is {x.dtype}; it takes fp32, bf16 and fp16.")
    if not 1 <= S < 1024:
        raise DoesNotApply(f"grouped_mm: {S} users have rows; it takes 1 to 1023.")
    if K * x.itemsize % 16 or N * x.itemsize % 16:
        raise DoesNotApply(f"grouped_mm: rows of {K} and {N} numbers in {x.dtype}; it takes whole 16 bytes.")
    own_A, own_Bt = (_own(matrices, groups.slots, ranks) for matrices in (A, Bt))
    if A.shape[1] % 8:
        own_A, own_Bt = (F.pad(matrices, (0, 0, 0, -A.shape[1] % 8)) for matrices in (own_A, own_Bt))
    v = F.grouped_mm(x, own_A.transpose(1, 2), offs=groups.ends)  # [T, padded R]
    v = v * _own_scale(x, scale, groups.slot_of_row)[:, None]
    return F.grouped_mm(v, own_Bt, offs=groups.ends)


def gather_ia3(x: Tensor, vectors: Tensor, groups: Groups) -> Tensor:
    """y[t] = vectors[u] * x[t] with every row's vector gathered: [T, D] is written and read once more."""
    return (vectors.index_select(0, groups.slot_of_row) * x).to(x.dtype)


def gather_prompts(x: Tensor, prompts: Tensor, plan: PromptPlan) -> Tensor:
    """Prompt rows of x replaced by index, all at once. Arguments as in prompts.py."""
    used = prompts[plan.token_slots, plan.tokens].to(x.dtype)  # [m, K]
    return x.index_copy(0, plan.rows, used.repeat_interleave(plan.starts.diff(), 0))
