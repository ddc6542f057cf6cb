"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): a decoder with a norm on both sides of every block, and capped scores.

    x = sqrt(width) embedding[tokens]
    for each layer:   x = x + n2(o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x))))
                      x = x + n4(down(gelu(gate(n3 x)) * up(n3 x)))                        GeGLU
    logits = cap(head(norm(x)))

cap(z) = c tanh(z / c), for the logits with one c and for the scores of attention with another. Every second layer sees
a window only. All norms scale by 1 + w. Packed rows, frozen weights and sites are those of decoder.py.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.attention import soft_cap
from minipeft.models.causal import Causal, check_lengths
from minipeft.models.checkpoint import Family, Source
from minipeft.models.decoder_files import KEY_PARTS, heads, key_of, sliding_layers
from minipeft.models.fields import choice, flag, num_layers, real, rope, whole
from minipeft.models.hooks import BASE, Hooks, Linear, together
from minipeft.models.layers import RMSNorm, gelu_tanh, rms_norm
from minipeft.models.recompute import run
from minipeft.models.rotary import Rotary, rotate
from minipeft.models.rows import Rows
from minipeft.models.top import Top

OUR_KEY_PARTS = KEY_PARTS | {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_out_norm": "post_feedforward_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Gemma2Config:
    """The shape of a Gemma 2. Sizes are numbers of features, heads or layers."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    windows: tuple[int | None, ...]  # attention window of each layer in rows; None: all before
    score_scale: float = 256**-0.5
    score_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or llama3's or linear scaling: see rotary.py
    tied_head: bool = True
    attn_bias: bool = False
    max_positions: int = 8192


class OffsetRMSNorm(RMSNorm):
    """y = (1 + w) * x / sqrt(mean(x^2) + eps), all in fp32 at least and rounded once, unlike RMSNorm in layers.py."""

    offset = 1.0

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, layer: int, config: Gemma2Config):
        super().__init__()
        site, K, D = f"layers.{layer}.attn", config.width, config.head_dim
        self.site, self.layer, self.head_dim, self.window = site, layer, D, config.windows[layer]
        self.score_scale, self.score_cap = config.score_scale, config.score_cap
        self.q = Linear(f"{site}.q", K, config.num_heads * D, config.attn_bias)
        self.k = Linear(f"{site}.k", K, config.num_kv_heads * D, config.attn_bias)
        self.v = Linear(f"{site}.v", K, config.num_kv_heads * D, config.attn_bias)
        self.o = Linear(f"{site}.o", config.num_heads * D, K, config.attn_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        qkv = top.qkv((self.q, self.k, self.v), x, hooks)
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in qkv)  # [T, H, D], fewer of q where few rows are read
        k, v = hooks.keys(self.site, rotate(k, *rope), v)
        q = rotate(q, *map(top.of, rope))
        y = top.attend(self.layer, q, k, v, self.window, scale=self.score_scale, softcap=self.score_cap)
        return self.o(y.flatten(1), top.hooks)


class MLP(nn.Module):
    def __init__(self, site: str, config: Gemma2Config):
        super().__init__()
        self.site = site
        self.gate = Linear(f"{site}.gate", config.width, config.mlp_width, bias=False)
        self.up = Linear(f"{site}.up", config.width, config.mlp_width, bias=False)
        self.down = Linear(f"{site}.down", config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        gate, up = together((self.gate, self.up), x, hooks)
        return self.down(gelu_tanh(gate) * up, hooks)


class Layer(nn.Module):
    def __init__(self, layer: int, config: Gemma2Config):
        super().__init__()
        self.attn_norm = OffsetRMSNorm(config.width, config.norm_eps)
        self.attn = Attention(layer, config)
        self.attn_out_norm = OffsetRMSNorm(config.width, config.norm_eps)
        self.mlp_norm = OffsetRMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"layers.{layer}.mlp", config)
        self.mlp_out_norm = OffsetRMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        y = self.attn(h, rope, hooks, top)
        hooks, h, x = top.hooks, top.of(h), top.of(x)
        x = x + hooks.block(self.attn.site, hooks.norm(self.attn_out_norm, y), h, x)
        h = hooks.norm(self.mlp_norm, x)
        y = hooks.norm(self.mlp_out_norm, self.mlp(h, hooks))
        return x + hooks.block(self.mlp.site, y, h, x)


class Gemma2(Causal):
    """Gemma 2. Weights are unset until somebody fills them in: load_model."""

    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.config = config
        assert len(config.windows) == config.num_layers, f"{len(config.windows)} windows, {config.num_layers} layers"
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.norm = OffsetRMSNorm(config.width, config.norm_eps)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        groups = (g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,),
                                                   (a.mlp.gate, a.mlp.up), (a.mlp.down,)))  # fmt: skip
        self.name_sites(groups, self.head_linear)
        self.embed_scale = config.width**0.5
        self.requires_grad_(False)

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        check_lengths(rows, self.config.max_positions)
        x = self.embed(rows.tokens)
        scale = torch.tensor(self.embed_scale, dtype=x.dtype)  # rounded: it was trained so in bf16
        x = hooks.embed(x, rows.tokens, scale)  # [T, width]
        rope = self.rotary(rows, x.dtype)
        for layer, at in self.layers_to(top, rows, hooks):
            x = run(self, layer, x, rope, hooks, at)
        return top.hooks.norm(self.norm, x)

    def head(self, h: Tensor, hooks: Hooks = BASE) -> Tensor:
        logits = self.head_linear(h, hooks)
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)


def read(fields: dict) -> Gemma2Config:
    """Our config from config.json's fields."""
    choice(fields, "hidden_activation", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    if flag(fields, "use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is true; supported is false. Choose another base.")
    layers = num_layers(fields, "num_hidden_layers")
    num_heads, num_kv_heads, head_dim = heads(fields, num_kv_heads=4, head_dim=256)
    window = whole({"sliding_window": fields.get("sliding_window", 4096)}, "sliding_window")  # null is no window here
    rope_theta, rope_scaling = rope(fields)
    slides = sliding_layers(fields, [layer % 2 == 0 for layer in range(layers)])
    return Gemma2Config(
        vocab_size=whole(fields, "vocab_size"),
        width=whole(fields, "hidden_size"),
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=whole(fields, "intermediate_size"),
        windows=tuple(window if slide else None for slide in slides),
        score_scale=real(fields, "query_pre_attn_scalar", default=256) ** -0.5,
        score_cap=cap(fields, "attn_logit_softcapping", default=50.0),
        logit_cap=cap(fields, "final_logit_softcapping", default=30.0),
        norm_eps=real(fields, "rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=flag(fields, "tie_word_embeddings", default=True),
        attn_bias=flag(fields, "attention_bias"),
        max_positions=whole(fields, "max_position_embeddings", default=8192),
    )


def cap(fields: dict, name: str, default: float) -> float | None:
    """fields[name], a positive number; null means no cap."""
    return None if fields.get(name, default) is None else real(fields, name, default)


FAMILY = Family(
    config=read,
    model=Gemma2,
    sources=lambda model: {name: Source(key_of(name, OUR_KEY_PARTS)) for name, _ in model.named_parameters()},
    aliases=lambda model: {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied_head else {},
    prefix="model.",
    unused=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # in old files; rope_theta says it
)
