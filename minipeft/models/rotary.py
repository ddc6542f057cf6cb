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
    """The angles of one base: `rotary(rows, dtype)` -> cos and sin of every row, each [T, 1, dim / 2].

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
            tables.append(torch.stack([angles.cos(), angles.sin()]))
        cos, sin = torch.cat(tables, 1)[:, rows.positions, None].to(dtype)
        return cos, sin


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); the gradient is the opposite rotation."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad_y):
        cos, sin = ctx.saved_tensors
        return _rotated(grad_y, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    y = torch.empty_like(x)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).sub_(x2 * sin)
    torch.mul(x2, cos, out=y2).add_(x1 * sin)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) of x [T, H, D] by the row's angles: Hugging Face's order of the pairs.

    Su et al. 2021 (arXiv:2104.09864), eq. 34. cos, sin: [T, 1, D / 2].
    """
    return _Rotate.apply(x, cos, sin)
