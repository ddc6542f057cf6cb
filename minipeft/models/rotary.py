"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): feature pairs of q and k turn with the position."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.models.rows import Rows

CHUNK = 1024  # positions whose angles are computed at a time


def rope_frequencies(dim: int, theta: float, scaling: dict) -> Tensor:
    """[dim / 2] fp32 angles per position: theta^(-2i/dim) (Su et al. 2021, eq. 15), scaled if asked.

    Scaling "llama3" (Llama 3.1): wavelengths longer than original / low_freq_factor are stretched by `factor`, shorter
    than original / high_freq_factor are kept, and those between are blended. "linear" stretches all. {}: none.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / theta**exponents
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretch, 1: keep
        return frequencies * (keep + (1 - keep) / scaling["factor"])
    assert kind == "default", kind
    return frequencies


@dataclass(frozen=True)
class Rotary:
    """The angles of one base: `rotary(rows, dtype)` -> what `rotate` wants of every row, each [T, 1, dim].

    dim: features of a head that turn. theta, scaling: see rope_frequencies.
    """

    dim: int
    theta: float
    scaling: dict

    def __call__(self, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # In chunks of one size: where a number lies in a tensor can decide its cosine's last bit.
        tables, device = [], rows.positions.device
        frequencies = rope_frequencies(self.dim, self.theta, self.scaling).to(device)  # fp32: bf16 counts to 256
        for start in range(0, rows.longest, CHUNK):
            positions = torch.arange(start, start + CHUNK, dtype=torch.float32, device=device)
            angles = positions[:, None] * frequencies  # [CHUNK, dim / 2]
            cos, sin = angles.cos(), angles.sin()
            tables.append(torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]))
        cos, sin = torch.cat(tables, 1)[:, rows.positions, None].to(dtype)
        return cos, sin


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the opposite one."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad_y):
        cos, sin = ctx.saved_tensors
        return _rotated(grad_y, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin), alpha=sign)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) of x [T, H, D] by the row's angles: Hugging Face's order of the pairs.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)        Su et al. 2021 (arXiv:2104.09864), eq. 34

    cos, sin: [T, 1, D], of every feature: of the pairs' first ones sin has the other sign.
    """
    return _Rotate.apply(x, cos, sin)
