"""The Llama-shaped decoder: Llama 2/3, Mistral, Qwen2 and Qwen3 are this file with different settings.

    x = embedding[tokens]
    for each layer:   x = x + o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x)))          n1, n2: RMSNorm
                      x = x + down(silu(gate(n2 x)) * up(n2 x))                            SwiGLU
    logits = head(norm(x))

It runs on packed rows (rows.py): x is [T, width] and there is no batch axis. Weights are frozen. Every linear map has
a site name. Maps that share an input are called together, `linear(sites, x, weights, biases)`: that function is where a
pass adds each row's own adapter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.models.rows import Rows, packed_attention

# (sites, x [T, K], weights, biases) -> y [T, N] of each site; the sites share their input
LinearFn = Callable[[tuple[str, ...], Tensor, list[Tensor], list[Tensor | None]], tuple[Tensor, ...]]


def plain_linear(
    sites: tuple[str, ...], x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """y = x W^T + b for each site: the base alone, no adapter anywhere."""
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. Sizes are numbers of features, heads or layers."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or llama3's or linear scaling: see rope_frequencies
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # attention window of each layer in rows; () means none anywhere
    max_positions: int = 2048


class RMSNorm(nn.Module):
    """y = g * x / sqrt(mean(x^2) + eps), the mean over the last axis in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


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


class Linear(nn.Module):
    """A linear map that knows its site name, e.g. "layers.3.attn.q"."""

    def __init__(self, site: str, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, linear: LinearFn) -> Tensor:
        return together((self,), x, linear)[0]


def together(linears: Sequence[Linear], x: Tensor, linear: LinearFn) -> tuple[Tensor, ...]:
    """y of linear maps that share the input x, e.g. q, k and v."""
    return linear(tuple(m.site for m in linears), x, [m.weight for m in linears], [m.bias for m in linears])


class Attention(nn.Module):
    def __init__(self, site: str, config: DecoderConfig, window: int | None):
        super().__init__()
        K, D = config.width, config.head_dim
        self.head_dim, self.window = D, window
        self.q = Linear(f"{site}.q", K, config.num_heads * D, config.qkv_bias)
        self.k = Linear(f"{site}.k", K, config.num_kv_heads * D, config.qkv_bias)
        self.v = Linear(f"{site}.v", K, config.num_kv_heads * D, config.qkv_bias)
        self.o = Linear(f"{site}.o", config.num_heads * D, K, config.o_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rows: Rows, rope: tuple[Tensor, Tensor], linear: LinearFn) -> Tensor:
        qkv = together((self.q, self.k, self.v), x, linear)
        q, k, v = (y.view(x.shape[0], -1, self.head_dim) for y in qkv)  # [T, H, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = packed_attention(rotate(q, *rope), rotate(k, *rope), v, rows, self.window)
        return self.o(y.flatten(1), linear)


class MLP(nn.Module):
    def __init__(self, site: str, config: DecoderConfig):
        super().__init__()
        self.gate = Linear(f"{site}.gate", config.width, config.mlp_width, config.mlp_bias)
        self.up = Linear(f"{site}.up", config.width, config.mlp_width, config.mlp_bias)
        self.down = Linear(f"{site}.down", config.mlp_width, config.width, config.mlp_bias)

    def forward(self, x: Tensor, linear: LinearFn) -> Tensor:
        gate, up = together((self.gate, self.up), x, linear)
        return self.down(_SwiGLU.apply(gate, up), linear)


class _SwiGLU(torch.autograd.Function):
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


def stable_sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x) whose bits depend on the element alone, whatever the size of x and the number of threads.

    On the CPU PyTorch splits a large tensor evenly over the threads and computes what does not fill a vector register
    at the end of a share with another exp, so an element's last bit may depend on where it lies. Where the shares are
    not whole registers this goes in blocks that one thread takes alone, the last one filled up with zeros.
    """
    GRAIN, LANES = 32768, 64  # elements one thread takes alone; more than any CPU's registers hold
    if x.device.type == "cpu" and x.numel() % LANES:
        return stable_sigmoid(F.pad(x.flatten(), (0, -x.numel() % LANES)))[: x.numel()].view(x.shape)
    if x.device.type == "cpu" and x.numel() > GRAIN:
        threads = min(torch.get_num_threads(), -(-x.numel() // GRAIN))
        if -(-x.numel() // threads) % LANES:
            y = torch.empty_like(x)
            for part, out in zip(x.view(-1).split(GRAIN), y.view(-1).split(GRAIN)):
                torch.sigmoid(part, out=out)
            return y
    return torch.sigmoid(x)


class Layer(nn.Module):
    def __init__(self, site: str, config: DecoderConfig, window: int | None):
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(f"{site}.attn", config, window)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"{site}.mlp", config)

    def forward(self, x: Tensor, rows: Rows, rope: tuple[Tensor, Tensor], linear: LinearFn) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rows, rope, linear)
        return x + self.mlp(self.mlp_norm(x), linear)


class Decoder(nn.Module):
    """A frozen decoder on packed rows. `hidden` then `head` is the forward pass; `logits` is the same for people.

    Weights are unset until somebody fills them in: loading.load_model, or default_base.initialise.

    sites: site name -> (in features K, out features N) of every linear map a method may act at, in forward order.
    shared_inputs: the same sites, in groups that share their input: the `sites` that `linear` is called with.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        windows = config.windows or (None,) * config.num_layers
        assert len(windows) == config.num_layers, f"{len(windows)} windows for {config.num_layers} layers"
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(f"layers.{i}", config, window) for i, window in enumerate(windows))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        self.register_buffer("rope", rope_table(config), persistent=False)
        groups = [g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,),
                                                   (a.mlp.gate, a.mlp.up), (a.mlp.down,))]  # fmt: skip
        self.sites = {m.site: (m.weight.shape[1], m.weight.shape[0]) for group in groups for m in group}
        self.shared_inputs = tuple(tuple(m.site for m in group) for group in groups)
        self.requires_grad_(False)

    def _apply(self, fn, recurse=True):
        """Moving or converting the model (`.to`, `.bfloat16`) leaves the angles in fp32: bf16 cannot count past 256."""
        super()._apply(fn, recurse)
        self.rope = rope_table(self.config).to(self.device)
        return self

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def hidden(self, rows: Rows, linear: LinearFn = plain_linear) -> Tensor:
        """Last hidden states after the final norm. Returns [T, width], dtype of the weights."""
        if rows.longest > self.config.max_positions:
            raise ValueError(f"Decoder: a sequence has {rows.longest} tokens but this base has "
                             f"{self.config.max_positions} positions; shorten the text.")
        x = self.embed(rows.tokens)  # [T, width]
        rope = tuple(self.rope[:, rows.positions, None].to(x.dtype))  # cos and sin, each [T, 1, D / 2]
        for layer in self.layers:
            x = layer(x, rows, rope, linear)
        return self.norm(x)

    def head(self, h: Tensor, linear: LinearFn = plain_linear) -> Tensor:
        """Hidden states of chosen rows [rows, width] -> logits [rows, vocab_size]."""
        return self.head_linear(h, linear)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of token ids -> for each the logits [its length, vocab_size]; row i predicts token i + 1."""
        all_logits = self.head(self.hidden(Rows.pack(sequences, self.device)))  # [T, vocab]
        return list(all_logits.split([len(s) for s in sequences]))


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """[D / 2] fp32 angles per position: theta^(-2i/D) (Su et al. 2021, arXiv:2104.09864, eq. 15), scaled if asked.

    Scaling "llama3" (Llama 3.1): wavelengths longer than original / low_freq_factor are stretched by `factor`, shorter
    than original / high_freq_factor are kept, and those between are blended. "linear" stretches all.
    """
    D, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D  # real numbers even in a model on "meta"
    frequencies = 1.0 / config.rope_theta**exponents
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


def rope_table(config: DecoderConfig) -> Tensor:
    """[2, max_positions, D / 2] fp32: cos and sin of every position's angles, computed once: bits of a position."""
    positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * rope_frequencies(config)  # [max_positions, D / 2]
    return torch.stack([angles.cos(), angles.sin()])


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
