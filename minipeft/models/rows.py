"""Packed rows: many sequences of different lengths laid end to end, without padding.

A pass has T rows (tokens). Everything in a decoder treats rows one by one, except attention, which must know
which rows form a sequence. On the CPU attention gathers sequences of similar length into padded buckets, runs
`scaled_dot_product_attention` on each, and gathers the results back. The padded length of a sequence depends on
its own length alone, never on the company, so its bits do not either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Sequences as packed rows, one after another in the order given.

    tokens:    [T] int64.
    positions: [T] int64, counting from 0 in each sequence.
    index:     [M] int64. Padded layout -> row: buckets one after another, each [sequences, padded length] flattened.
    inverse:   [T] int64. Row -> its place in the padded layout.
    buckets:   (number of sequences, padded length) of each bucket, in the order of `index`.
    widths:    [T] int64. Padded length of the row's bucket.
    longest:   tokens of the longest sequence.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    inverse: Tensor
    buckets: tuple[tuple[int, int], ...]
    widths: Tensor
    longest: int

    @staticmethod
    def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "Rows":
        """Rows of these token id lists, in the order given. Empty sequences are an error: they have no row."""
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        if len(lengths) == 0 or lengths.min() == 0:
            raise ValueError("Rows.pack: needs at least one sequence and no empty one; drop empty sequences before.")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)

        padded = padded_length(lengths)
        index, inverse, buckets, filled = [], np.empty(starts[-1], dtype=np.int64), [], 0
        for width in np.unique(padded):
            members = np.flatnonzero(padded == width)
            columns = np.arange(width)
            # A padding place repeats the sequence's last row: finite, and causal attention never looks ahead to it.
            rows = starts[members][:, None] + np.minimum(columns, lengths[members][:, None] - 1)  # [n, width]
            places = filled + np.arange(rows.size).reshape(rows.shape)
            real = columns < lengths[members][:, None]
            inverse[rows[real]] = places[real]
            index.append(rows.ravel())
            buckets.append((len(members), int(width)))
            filled += rows.size
        as_tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        return Rows(as_tensor(tokens), as_tensor(positions), as_tensor(np.concatenate(index)), as_tensor(inverse),
                    tuple(buckets), as_tensor(np.repeat(padded, lengths)), int(lengths.max()))


def padded_length(lengths: np.ndarray) -> np.ndarray:
    """Each length rounded up to 8, 16, 24, 32, 48, 64, 96, 128, ...: at most half as long again past 16 rows."""
    steps = [8, 16, 24, 32]
    while steps[-1] < lengths.max():
        steps.append(steps[-1] * 3 // 2 if (steps[-1] & (steps[-1] - 1)) == 0 else steps[-1] * 4 // 3)
    steps = np.array(steps)
    return steps[np.searchsorted(steps, lengths)]


class _Regroup(torch.autograd.Function):
    """x[index] where the gradient is another gather, not a scatter: back[j] is the one place that copies row j.

    Padding places copy a row too, but nothing depends on them, so their gradient is zero and may be dropped.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.contiguous().index_select(0, ctx.saved_tensors[0]), None, None


class _Ungroup(torch.autograd.Function):
    """x[inverse], whose gradient is zero at the padding places."""

    @staticmethod
    def forward(ctx, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.places = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad_x = grad.new_zeros(ctx.places, *grad.shape[1:])
        grad_x.index_copy_(0, inverse, grad)
        return grad_x, None


@dataclass(frozen=True)
class AttentionPlan:
    """How H query heads and H_kv key heads of packed rows are gathered into buckets: built once for all layers.

    query, key: (index, inverse) as in Rows, but for single heads: row t, head h is entry t * H + h, and a bucket is
                [sequences, H, padded length] flattened, so that every sequence and head is a matrix of its own.
    """

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    buckets: tuple[tuple[int, int], ...]

    @staticmethod
    def build(rows: Rows, num_heads: int, num_kv_heads: int) -> "AttentionPlan":
        query = _head_index(rows, num_heads)
        key = query if num_kv_heads == num_heads else _head_index(rows, num_kv_heads)
        return AttentionPlan(query, key, rows.buckets)


def _head_index(rows: Rows, H: int) -> tuple[Tensor, Tensor]:
    """(index [M * H], inverse [T * H]) of AttentionPlan."""
    heads = torch.arange(H, device=rows.index.device)
    index, start = [], 0
    for num_sequences, width in rows.buckets:
        end = start + num_sequences * width
        index.append((rows.index[start:end].view(-1, 1, width) * H + heads[:, None]).view(-1))  # [n, H, width]
        start = end
    # Row t is in column positions[t] of a sequence whose first place is inverse[t] - positions[t].
    first = (rows.inverse - rows.positions) * H + rows.positions  # [T]: the place of head 0
    inverse = first[:, None] + heads * rows.widths[:, None]  # [T, H]
    return torch.cat(index), inverse.view(-1)


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * q k^T + mask) v for many small matrices: on the CPU three times faster than SDPA's flash kernel.

    With P the softmax and G = grad_y: grad_v = P^T G, and with S = P * (G v^T - rowsum(P * G v^T)):
    grad_q = scale * S k, grad_k = scale * S^T q.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        scores = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scale)
        p = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx, grad_y):
        q, k, v, p = ctx.saved_tensors
        grad_p = torch.bmm(grad_y, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q).mul_(ctx.scale)
        return grad_q, grad_k, torch.bmm(p.transpose(1, 2), grad_y), None, None


SHORT = 128  # padded length up to which _ShortAttention beats SDPA on the CPU


def packed_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: int | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v inside each sequence; grouped queries where q has more heads than k.

    Args:
        q:      [T, H, D]. k, v: [T, H_kv, D], H a multiple of H_kv. All with position encoding applied.
        window: each row sees itself and the window - 1 rows before it (Mistral); None sees all rows before it.
    Returns:
        [T, H, D], dtype of q.
    """
    (T, H, D), H_kv = q.shape, k.shape[1]
    q = _Regroup.apply(q.reshape(-1, D), *plan.query)  # [M * H, D]
    k, v = (_Regroup.apply(x.reshape(-1, D), *plan.key) for x in (k, v))  # [M * H_kv, D]
    outputs, start = [], 0
    for num_sequences, width in plan.buckets:
        end = start + num_sequences * width
        age = torch.arange(width, device=q.device)[:, None] - torch.arange(width, device=q.device)  # [width, width]
        visible = age >= 0 if window is None else (age >= 0) & (age < window)
        if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and width <= SHORT:
            # Query heads that share a key head lie one after another: their rows are rows of one taller matrix.
            matrices = [x.view(num_sequences * H_kv, -1, D) for x in (q[start * H : end * H],
                        k[start * H_kv : end * H_kv], v[start * H_kv : end * H_kv])]
            mask = torch.zeros(width, width, dtype=q.dtype).masked_fill_(~visible, -torch.inf).repeat(H // H_kv, 1)
            y = _ShortAttention.apply(*matrices, mask, D**-0.5)
        else:
            matrices = [x.view(num_sequences, -1, width, D) for x in (q[start * H : end * H],
                        k[start * H_kv : end * H_kv], v[start * H_kv : end * H_kv])]
            causal = window is None or width <= window
            y = F.scaled_dot_product_attention(
                *matrices, attn_mask=None if causal else visible, is_causal=causal, enable_gqa=H != H_kv
            )
        outputs.append(y.reshape(-1, D))
        start = end
    return _Ungroup.apply(outputs[0] if len(outputs) == 1 else torch.cat(outputs), plan.query[1]).view(T, H, D)
