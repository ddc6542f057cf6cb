"""AdamW for many users at once: one step of every given row of the bank, each row with its own settings.

    g <- g * min(1, max_norm / |g|)                                          clip, per user
    w <- w (1 - lr * wd)                                                     decoupled decay
    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2, with torch.optim.AdamW's order of operations. Every
elementwise line is one correctly rounded operation, so a row's bits do not depend on where it lies in a vector lane or
a thread's share; and the norm is summed in fixed blocks of a row.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_BLOCK = 64  # numbers summed first in the gradient norm; rows are padded to a multiple of it


@dataclass(frozen=True)
class AdamWSettings:
    """Each field [S] fp64: the settings of the rows being stepped, in the order of `slots`. step counts from 1."""

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    max_norm: Tensor
    step: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def adamw_(weights: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, slots: Tensor,
           settings: AdamWSettings) -> Tensor:
    """Step rows `slots` of the bank in place; rows not named are not touched, nor is any gradient.

    Args:
        weights, grads, exp_avg, exp_avg_sq: [U, P] fp32, P a multiple of 64.
        slots:    [S] int64, each at most once.
        settings: per row, fp64; max_norm may be infinite.
    Returns:
        [S] fp32 gradient norms before clipping. A row whose norm is not finite is left as it was (weights and moments):
        the caller must report that user.
    Cost: 28 bytes per number read or written at least; more on the CPU, where each line is a pass.
    """
    if weights.shape[1] % NORM_BLOCK:
        raise ValueError(f"adamw_: rows of {weights.shape[1]} numbers; pad them to a multiple of {NORM_BLOCK}.")
    column = lambda x: x.to(weights.dtype)[:, None]  # noqa: E731  [S, 1]
    grad = grads.index_select(0, slots)  # [S, P]
    sums = (grad * grad).view(len(slots), -1, NORM_BLOCK).sum(-1)  # [S, P / 64]
    while sums.shape[1] > 1:  # blocks of blocks: PyTorch shares one long sum among threads, but only if S is 1
        sums = F.pad(sums, (0, -sums.shape[1] % NORM_BLOCK)).view(len(slots), -1, NORM_BLOCK).sum(-1)
    norms = sums[:, 0].sqrt()
    finite = torch.isfinite(norms)
    if not finite.all():
        slots, grad = slots[finite], grad[finite]
        settings = AdamWSettings(**{name: value[finite] for name, value in settings.as_dict().items()})
    s = settings
    grad *= column(torch.clamp(s.max_norm / (norms[finite].double() + 1e-6), max=1.0))

    m, v, w = (buffer.index_select(0, slots) for buffer in (exp_avg, exp_avg_sq, weights))
    m = m.mul_(column(s.beta1)).add_(grad * column(1 - s.beta1))
    v = v.mul_(column(s.beta2)).add_(grad.mul_(grad).mul_(column(1 - s.beta2)))
    step_size = s.lr / (1 - s.beta1**s.step)
    denominator = (v * column(1 / (1 - s.beta2**s.step))).sqrt_().add_(column(s.eps))
    w = w.mul_(column(1 - s.lr * s.weight_decay)).sub_((m * column(step_size)).div_(denominator))
    for buffer, rows in ((exp_avg, m), (exp_avg_sq, v), (weights, w)):
        buffer.index_copy_(0, slots, rows)
    return norms
