"""Every op in plain PyTorch: the definition, and the loop over users that the fused op replaces.

Slow on purpose: each function reads like its equation. Tests compare with it in fp64, benchmarks time it as the
baseline a user would otherwise write. So rows are cut apart with `split` and matrices with `unbind`: every slice of a
tensor has a gradient of the whole tensor's size, and a loop over slices would mostly add up zeros.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segments import Segments


def _by_user(x: Tensor, segments: Segments) -> Iterator[tuple[int, Tensor]]:
    """Each segment's slot and rows."""
    return zip(segments.slots, x.split(np.diff(segments.starts).tolist()))


def segment_lora(
    x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None = None
) -> Tensor:
    """y[t] = scale[u] * B[u] @ A[u] @ x[t], where slot u owns row t. Arguments as in segment_lora.py."""
    As, Bts, parts = A.unbind(), Bt.unbind(), []
    for slot, rows in _by_user(x, segments):
        R = A.shape[1] if ranks is None else int(ranks[slot])
        v = (scale[slot, None] * (rows @ As[slot][:R].T)).to(x.dtype)  # scale is fp32, and stays so until it is applied
        parts.append(v @ Bts[slot][:R])
    return torch.cat(parts)


def bgmv(x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, slots: Tensor, ranks: Tensor | None = None) -> Tensor:
    """y[s] = scale[u] * B[u] @ A[u] @ x[s] with u = slots[s]; zeros for slot -1. Arguments as in bgmv.py."""
    y = x.new_zeros(len(x), Bt.shape[2])
    for s, slot in enumerate(slots.tolist()):
        if slot >= 0:
            R = A.shape[1] if ranks is None else int(ranks[slot])
            y[s] = (scale[slot, None] * (A[slot, :R] @ x[s])).to(x.dtype) @ Bt[slot, :R]
    return y


def adamw_(
    weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor, hyper: dict[str, Tensor]
) -> Tensor:
    """One AdamW step of each row in `slots`, each with its own settings. Arguments and source as in adamw.py."""
    norms = []
    for i, u in enumerate(slots.tolist()):
        norm = grads[u].norm()
        norms.append(norm)
        if not torch.isfinite(norm):
            continue  # that user alone skips the step
        grad = grads[u] * torch.clamp(hyper["max_norm"][i] / (norm + 1e-6), max=1.0)
        beta1, beta2, step, lr = (hyper[key][i] for key in ("beta1", "beta2", "step", "lr"))
        weights[u] *= 1 - lr * hyper["weight_decay"][i]
        exp_avg[u] = beta1 * exp_avg[u] + (1 - beta1) * grad
        exp_avg_sq[u] = beta2 * exp_avg_sq[u] + (1 - beta2) * grad**2
        corrected = (exp_avg_sq[u] / (1 - beta2**step)).sqrt() + hyper["eps"][i]
        weights[u] -= lr / (1 - beta1**step) * exp_avg[u] / corrected
    return torch.stack(norms)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """y[i] = sum_j softmax(scale q[i] . k[j])_j v[j] within each sequence. Called like torch's varlen_attn.

    Args:
        q:      [T, H, D]. k, v: [T', H_kv, D]; H a multiple of H_kv, more heads only with enable_gqa.
        q_ends, k_ends: [n + 1] int32, first rows of the sequences and the end; longest_q, longest_k: most rows of one.
        window_size: row i sees rows i - left to i + right; -1: no bound on that side.
    """
    assert q_ends.dtype == k_ends.dtype == torch.int32 and enable_gqa == (q.shape[1] != k.shape[1])
    q_lengths, k_lengths = q_ends.diff().tolist(), k_ends.diff().tolist()
    assert (max(q_lengths), max(k_lengths)) == (longest_q, longest_k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    left, right = (longest_q + longest_k if bound < 0 else bound for bound in window_size)
    scale, parts = q.shape[2] ** -0.5 if scale is None else scale, []
    for q_n, k_n, v_n in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)):
        ages = torch.arange(len(q_n), device=q.device)[:, None] - torch.arange(len(k_n), device=q.device)
        scores = scale * torch.einsum("ihd,jhd->hij", q_n, k_n)  # [H, n, n']
        weights = scores.masked_fill((ages > left) | (-ages > right), -torch.inf).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v_n))
    return torch.cat(parts)


def segment_ia3(x: Tensor, vectors: Tensor, segments: Segments) -> Tensor:
    """y[t] = vectors[u] * x[t], where slot u owns row t. Arguments as in ia3.py."""
    each, parts = vectors.unbind(), []
    for slot, rows in _by_user(x, segments):
        parts.append((each[slot] * rows).to(x.dtype))
    return torch.cat(parts)


def segment_shift(x: Tensor, vectors: Tensor, segments: Segments) -> Tensor:
    """y[t] = x[t] + vectors[u], where slot u owns row t. Arguments as in shift.py."""
    each, parts = vectors.unbind(), []
    for slot, rows in _by_user(x, segments):
        parts.append((rows + each[slot]).to(x.dtype))
    return torch.cat(parts)


def segment_matmul(x: Tensor, W: Tensor, segments: Segments) -> Tensor:
    """y[t] = W[u]^T x[t], where slot u owns row t. Arguments as in segment_matmul.py."""
    each = W.unbind()
    return torch.cat([rows @ each[slot] for slot, rows in _by_user(x, segments)])


def gather_prompts(x: Tensor, prompts: Tensor, plan: PromptPlan) -> Tensor:
    """y = x with each sequence's prompt rows put in. Arguments as in prompts.py."""
    y = x.clone()
    for slot, first_row, count in zip(plan.slots, plan.first_rows, plan.counts):
        y[first_row : first_row + count] = prompts[slot, :count].to(x.dtype)
    return y


def segment_bottleneck(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    segments: Segments, activation: str, scale: Tensor | None = None, widths: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = r[t] + scale[u] * (up[u]^T @ act(down[u] @ x[t] + down_bias[u]) + up_bias[u]). As in bottleneck.py."""
    act = {"relu": torch.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
    downs, down_biases, ups, up_biases = (tensor.unbind() for tensor in (down, down_bias, up, up_bias))
    parts, residuals = [], _by_user(x if residual is None else residual, segments)
    for (slot, rows), (_, r) in zip(_by_user(x, segments), residuals):
        width = down.shape[1] if widths is None else int(widths[slot])
        h = act[activation](F.linear(rows, downs[slot][:width], down_biases[slot][:width]))
        s = 1.0 if scale is None else scale[slot, None]
        parts.append(r + (s * F.linear(h, ups[slot][:width].T, up_biases[slot])).to(x.dtype))
    return torch.cat(parts)
