"""The Llama-shaped decoder: Llama 2/3, Mistral, Qwen2 and Qwen3 are this file with different settings.

    x = embedding[tokens]
    for each layer:   x = x + o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x)))          n1, n2: RMSNorm
                      x = x + down(silu(gate(n2 x)) * up(n2 x))                            SwiGLU
    logits = head(norm(x))

It runs on packed rows (rows.py): x is [T, width] and there is no batch axis. Weights are frozen. Every linear map
has a site name, and calls `linear(site, x, weight, bias)`: that function is where a pass adds each row's own adapter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.models.rows import Rows, packed_attention

LinearFn = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]


def plain_linear(site: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b: the base alone, no adapter at any site."""
    return F.linear(x, weight, bias)


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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Module):
    """A linear map that knows its site name, e.g. "layers.3.attn.q"."""

    def __init__(self, site: str, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, linear: LinearFn) -> Tensor:
        return linear(self.site, x, self.weight, self.bias)


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
        q, k, v = (p(x, linear).view(x.shape[0], -1, self.head_dim) for p in (self.q, self.k, self.v))  # [T, H, D]
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
        return self.down(F.silu(self.gate(x, linear)) * self.up(x, linear), linear)


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
    """A frozen decoder on packed rows. `hidden` then `head` is the forward pass; `logits` is the same for people."""

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
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.requires_grad_(False)

    def _apply(self, fn, recurse=True):
        """Moving or converting the model (`.to`, `.bfloat16`) leaves the angles in fp32: bf16 cannot count past 256."""
        super()._apply(fn, recurse)
        self.frequencies = rope_frequencies(self.config).to(self.device)
        return self

    @property
    def sites(self) -> dict[str, tuple[int, int]]:
        """Site name -> (in features K, out features N) of every linear map a method may act at, in forward order."""
        linears = [m for m in self.layers.modules() if isinstance(m, Linear)]
        return {m.site: (m.weight.shape[1], m.weight.shape[0]) for m in linears}

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def hidden(self, rows: Rows, linear: LinearFn = plain_linear) -> Tensor:
        """Last hidden states after the final norm. Returns [T, width], dtype of the weights."""
        x = self.embed(rows.tokens)  # [T, width]
        rope = rope_tables(self.frequencies, rows.positions, x.dtype)
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


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every row's angles, each [T, 1, D] (both halves alike), computed in fp32."""
    angles = positions.float()[:, None] * frequencies  # [T, D / 2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, D]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) of x [T, H, D] by the row's angles: Hugging Face's order of the pairs."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
