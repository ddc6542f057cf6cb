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
    longest:   tokens of the longest sequence.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    inverse: Tensor
    buckets: tuple[tuple[int, int], ...]
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
                    tuple(buckets), int(lengths.max()))


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


def packed_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, window: int | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v inside each sequence; grouped queries where q has more heads than k.

    Args:
        q:      [T, H, D]. k, v: [T, H_kv, D], H a multiple of H_kv. All with position encoding applied.
        window: each row sees itself and the window - 1 rows before it (Mistral); None sees all rows before it.
    Returns:
        [T, H, D], dtype of q.
    """
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (_Regroup.apply(x, rows.index, rows.inverse) for x in (q, k, v))  # [M, H, D]
    outputs, start = [], 0
    for num_sequences, width in rows.buckets:
        end = start + num_sequences * width
        shape = (num_sequences, width, -1, q.shape[-1])
        part = [x[start:end].view(shape).transpose(1, 2) for x in (q, k, v)]  # [n, H, width, D]
        mask = None
        if window is not None and width > window:
            age = torch.arange(width, device=q.device)[:, None] - torch.arange(width, device=q.device)  # [width, width]
            mask = (age >= 0) & (age < window)
        y = F.scaled_dot_product_attention(*part, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        outputs.append(y.transpose(1, 2).reshape(end - start, -1, q.shape[-1]))
        start = end
    return _Ungroup.apply(outputs[0] if len(outputs) == 1 else torch.cat(outputs), rows.inverse)
