"""Normalisations and gated activations that bases share, with gradients by hand where PyTorch's own are slow.

What a row becomes depends on that row alone, to the bit.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadRMSNorm(nn.Module):
    """y = g * x / sqrt(mean(x^2) + eps), the mean over the last axis in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNorm(HeadRMSNorm):
    """The same of the stream [T, width], where it is a site (hooks.py): y = (weight + offset) * normalised(x)."""

    is_site, site, offset, bias = True, "", 0.0, None

    def normalised(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps), dtype of x."""
        return rms_norm(x, torch.ones_like(self.weight), self.eps)


class LayerNorm(nn.LayerNorm):
    """y = weight * normalised(x) + bias, normalised(x) = (x - mean(x)) / sqrt(var(x) + eps) (Ba et al. 2016)."""

    is_site, site, offset = True, "", 0.0

    def normalised(self, x: Tensor) -> Tensor:
        """[T, width], dtype of x."""
        return F.layer_norm(x, self.normalized_shape, None, None, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps). Differentiable in x and weight."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm by hand: on the CPU three times faster than F.rms_norm, which makes a pass for every arithmetic step.

    With r = 1 / sqrt(mean(x^2) + eps) and h = g * grad_y:  grad_x = r h - x r^3 mean(h x),  grad_g = sum_t grad_y x r.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays fp64
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, rstd = ctx.saved_tensors
        x32, grad_y = x.to(rstd.dtype), grad_y.to(rstd.dtype)
        h = grad_y * weight
        mean = (h * x32).mean(-1, keepdim=True)
        grad_x = h.mul_(rstd).sub_(x32 * mean.mul_(rstd * rstd * rstd)) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_y * x32 * rstd).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(g) * u by hand (Shazeer 2020, arXiv:2002.05202). With s = sigmoid(g) and a = g s:

    grad_u = grad_y a,  grad_g = grad_y u (s + a (1 - s)).
    """

    @staticmethod
    def forward(ctx, gate, up):
        s = stable_sigmoid(gate)
        ctx.save_for_backward(gate, up, s)
        return (gate * s).mul_(up)

    @staticmethod
    def backward(ctx, grad_y):
        gate, up, s = ctx.saved_tensors
        a = gate * s
        grad_gate = (1 - s).mul_(a).add_(s).mul_(up).mul_(grad_y)
        return grad_gate, a.mul_(grad_y)


def stable(function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """function(*xs), elementwise, with bits that depend on the elements alone, whatever the size and the threads.

    On the CPU PyTorch splits a large tensor evenly over the threads and computes what does not fill a vector register
    at the end of a share with another exp or erf, so an element's last bit may depend on where it lies. Where the
    shares are not whole registers this goes in blocks that one thread takes alone, the last one filled up with zeros.
    """
    GRAIN, LANES, x = 32768, 64, xs[0]  # elements one thread takes alone; more than any CPU's registers hold
    if x.device.type != "cpu":
        return function(*xs)
    if x.numel() % LANES:
        padded = (F.pad(x.flatten(), (0, -x.numel() % LANES)) for x in xs)
        return stable(function, *padded)[: x.numel()].view(x.shape)
    threads = min(torch.get_num_threads(), -(-x.numel() // GRAIN))
    if threads > 1 and -(-x.numel() // threads) % LANES:
        return torch.cat([function(*parts) for parts in zip(*(x.reshape(-1).split(GRAIN) for x in xs))]).view(x.shape)
    return function(*xs)


def stable_sigmoid(x: Tensor) -> Tensor:
    return stable(torch.sigmoid, x)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, approximate):
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return stable(lambda x: F.gelu(x, approximate=approximate), x)

    @staticmethod
    def backward(ctx, grad_y):
        slope = lambda grad_y, x: torch.ops.aten.gelu_backward(grad_y, x, approximate=ctx.approximate)  # noqa: E731
        return stable(slope, grad_y.contiguous(), ctx.saved_tensors[0].contiguous()), None


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the error function (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return _GELU.apply(x, "none")


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: what GPT-2, T5 1.1 and Gemma use ("gelu_new")."""
    return _GELU.apply(x, "tanh")
