"""Every op in plain PyTorch: the definition, and the loop over users that the fused op replaces.

Slow on purpose: each function reads like its equation. Tests compare with it in fp64, benchmarks time it as the
baseline a user would otherwise write.
"""

import torch
from torch import Tensor

from minipeft_kernels.segments import Segments


def segment_lora(
    x: Tensor, A: Tensor, Bt: Tensor, scale: Tensor, segments: Segments, ranks: Tensor | None = None
) -> Tensor:
    """y[t] = scale[u] * B[u] @ A[u] @ x[t], where slot u owns row t. Arguments as in segment_lora.py."""
    parts = []
    for slot, start, end in zip(segments.slots, segments.starts[:-1], segments.starts[1:]):
        R = A.shape[1] if ranks is None else int(ranks[slot])
        parts.append(scale[slot].to(x.dtype) * (x[start:end] @ A[slot, :R].T @ Bt[slot, :R]))
    return torch.cat(parts)


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
