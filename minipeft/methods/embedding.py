"""LoRA at the token embedding: e = E[token] + s B A[token]. The input is a token's number, so A's product is a gather.

Gradients, per user:  grad_A[token] = sum over the token's rows of s B^T grad_e,  grad_B^T = sum of s A[token] grad_e^T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.methods.method import Share, Vectors
from minipeft_kernels.segment_matmul import segment_matmul


class _Gather(torch.autograd.Function):
    """v[t] = At[u, token t]; writes grad_At of the slots in the batch. Same bits on every run."""

    @staticmethod
    def forward(ctx, anchor, At, grad_At, slots, slot_of_row, tokens):
        ctx.save_for_backward(slots, slot_of_row, tokens)
        ctx.grad_At = grad_At
        return At[slot_of_row, tokens]  # [T, R]

    @staticmethod
    def backward(ctx, grad_v):
        slots, slot_of_row, tokens = ctx.saved_tensors
        ctx.grad_At[slots] = 0.0
        vocab_size = ctx.grad_At.shape[1]
        places, order = torch.sort(slot_of_row * vocab_size + tokens, stable=True)  # [T]
        places, counts = torch.unique_consecutive(places, return_counts=True)  # [n], every one once
        wide = grad_v.to(torch.promote_types(grad_v.dtype, torch.float32))
        sums = F.embedding_bag(order, wide, counts.cumsum(0) - counts, mode="sum")  # [n, R], rows in order, no atomics
        ctx.grad_At[places // vocab_size, places % vocab_size] = sums.to(ctx.grad_At.dtype)
        return (None,) * 6


@dataclass(frozen=True)
class EmbeddingUpdate:
    """At [U, vocabulary, R], Bt [U, R, width] and scale [U] of a bank: called with tokens, gives what is added."""

    At: Vectors
    Bt: Vectors
    scale: Tensor

    def __call__(self, tokens: Tensor, share: Share) -> Tensor:
        segments, anchor = share.segments, share.anchor
        v = _Gather.apply(anchor, *self.At, segments.live_slots, segments.slot_of_row, tokens)
        v = (v * self.scale.index_select(0, segments.slot_of_row)[:, None]).to(v.dtype)
        return segment_matmul(v, anchor, *self.Bt, segments)
