"""The Llama-shaped decoder: Llama 2/3, Mistral, Qwen2, Qwen3 and Phi-3 are this file with different settings.

    x = embedding[tokens]
    for each layer:   x = x + o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x)))          n1, n2: RMSNorm
                      x = x + down(silu(gate(n2 x)) * up(n2 x))                            SwiGLU
    logits = head(norm(x))

It runs on packed rows (rows.py): x is [T, width] and there is no batch axis. Weights are frozen. Every linear map has
a site name, and so have norms and blocks (hooks.py): there a pass adds each row's own adapter.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from minipeft.models.causal import Causal, check_lengths
from minipeft.models.hooks import BASE, Hooks, Linear, together
from minipeft.models.layers import HeadRMSNorm, RMSNorm, SwiGLU
from minipeft.models.recompute import run
from minipeft.models.rotary import Rotary, rotate
from minipeft.models.rows import Rows
from minipeft.models.top import Top


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
    rope_scaling: dict = field(default_factory=dict)  # {} or llama3's or linear scaling: see rotary.py
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # attention window of each layer in rows; () means none anywhere
    max_positions: int = 2048


class Attention(nn.Module):
    def __init__(self, layer: int, config: DecoderConfig, window: int | None):
        super().__init__()
        site, K, D = f"layers.{layer}.attn", config.width, config.head_dim
        self.site, self.layer, self.head_dim, self.window = site, layer, D, window
        self.q = Linear(f"{site}.q", K, config.num_heads * D, config.qkv_bias)
        self.k = Linear(f"{site}.k", K, config.num_kv_heads * D, config.qkv_bias)
        self.v = Linear(f"{site}.v", K, config.num_kv_heads * D, config.qkv_bias)
        self.o = Linear(f"{site}.o", config.num_heads * D, K, config.o_bias)
        self.q_norm = HeadRMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadRMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        qkv = top.qkv((self.q, self.k, self.v), x, hooks)
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in qkv)  # [T, H, D], fewer of q where few rows are read
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = hooks.keys(self.site, rotate(k, *rope), v)
        q = rotate(q, *map(top.of, rope))
        return self.o(top.attend(self.layer, q, k, v, self.window).flatten(1), top.hooks)


class MLP(nn.Module):
    def __init__(self, site: str, config: DecoderConfig):
        super().__init__()
        self.site = site
        self.gate = Linear(f"{site}.gate", config.width, config.mlp_width, config.mlp_bias)
        self.up = Linear(f"{site}.up", config.width, config.mlp_width, config.mlp_bias)
        self.down = Linear(f"{site}.down", config.mlp_width, config.width, config.mlp_bias)

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        gate, up = together((self.gate, self.up), x, hooks)
        return self.down(SwiGLU.apply(gate, up), hooks)


class Layer(nn.Module):
    def __init__(self, layer: int, config: DecoderConfig, window: int | None):
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(layer, config, window)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"layers.{layer}.mlp", config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        y = self.attn(h, rope, hooks, top)
        hooks, h, x = top.hooks, top.of(h), top.of(x)
        x = x + hooks.block(self.attn.site, y, h, x)
        h = hooks.norm(self.mlp_norm, x)
        return x + hooks.block(self.mlp.site, self.mlp(h, hooks), h, x)


class Decoder(Causal):
    """The Llama-shaped decoder. Weights are unset until somebody fills them in: load_model, or default_base.py."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        windows = config.windows or (None,) * config.num_layers
        assert len(windows) == config.num_layers, f"{len(windows)} windows for {config.num_layers} layers"
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(i, config, window) for i, window in enumerate(windows))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        groups = (g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,),
                                                   (a.mlp.gate, a.mlp.up), (a.mlp.down,)))  # fmt: skip
        self.name_sites(groups, self.head_linear)
        self.requires_grad_(False)

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        check_lengths(rows, self.config.max_positions)
        x = hooks.embed(self.embed(rows.tokens), rows.tokens)  # [T, width]
        rope = self.rotary(rows, x.dtype)
        for layer, at in self.layers_to(top, rows, hooks):
            x = run(self, layer, x, rope, hooks, at)
        return top.hooks.norm(self.norm, x)
