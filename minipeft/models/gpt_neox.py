"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia (Biderman et al. 2023, arXiv:2304.01373).

    x = embedding[tokens]
    for each layer:   a = o(attention(rope(q(n1 x)), rope(k(n1 x)), v(n1 x)))       n1, n2: LayerNorm
                      x = x + a + down(gelu(up(n2 x)))                              parallel: both read the same x
                 or   x = x + a, then x = x + down(gelu(up(n2 x)))                  one after the other
    logits = head(norm(x))

Positions turn only the first features of each head (a quarter of them by default). Checkpoints keep q, k and v in one
tensor, head by head: [H, 3, D, width]; sources() cuts it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.causal import Causal, check_lengths
from minipeft.models.checkpoint import Family, Part, Source
from minipeft.models.fields import choice, flag, num_layers, real, rope, whole
from minipeft.models.gpt2 import ACTIVATIONS, MLP
from minipeft.models.hooks import BASE, Hooks, Linear
from minipeft.models.layers import LayerNorm
from minipeft.models.recompute import run
from minipeft.models.rotary import Rotary, rotate
from minipeft.models.rows import Rows
from minipeft.models.top import Top

KEY_PARTS = {  # our name of a module -> Hugging Face's
    "embed": "embed_in", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "norm": "final_layer_norm", "attn": "attention", "q": "query_key_value", "k": "query_key_value",
    "v": "query_key_value", "o": "dense", "up": "dense_h_to_4h", "down": "dense_4h_to_h",
}  # fmt: skip


@dataclass(frozen=True)
class GPTNeoXConfig:
    """The shape of a GPT-NeoX. Sizes are numbers of features, heads or layers."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    rotary_dim: int  # features of each head that turn with the position: the first ones
    norm_eps: float = 1e-5
    activation: str = "gelu"  # a key of gpt2.ACTIVATIONS
    parallel: bool = True  # whether a layer's attention and MLP read the same x
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} or llama3's or linear scaling: see rotary.py
    attn_bias: bool = True
    tied_head: bool = False
    max_positions: int = 2048


class Attention(nn.Module):
    def __init__(self, layer: int, config: GPTNeoXConfig):
        super().__init__()
        site, K = f"layers.{layer}.attn", config.width
        self.site, self.layer, self.head_dim = site, layer, K // config.num_heads
        self.q = Linear(f"{site}.q", K, K, config.attn_bias)
        self.k = Linear(f"{site}.k", K, K, config.attn_bias)
        self.v = Linear(f"{site}.v", K, K, config.attn_bias)
        self.o = Linear(f"{site}.o", K, K, config.attn_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        qkv = top.qkv((self.q, self.k, self.v), x, hooks)
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in qkv)  # [T, H, D], fewer of q where few rows are read
        k, v = hooks.keys(self.site, rotate_first(k, *rope), v)
        q = rotate_first(q, *map(top.of, rope))
        return self.o(top.attend(self.layer, q, k, v).flatten(1), top.hooks)


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first features of x [T, H, D], as many as cos and sin [T, 1, features] are for."""
    turned, kept = x.tensor_split((cos.shape[-1],), dim=-1)
    return torch.cat([rotate(turned, cos, sin), kept], -1)


class Layer(nn.Module):
    def __init__(self, layer: int, config: GPTNeoXConfig):
        super().__init__()
        self.parallel = config.parallel
        self.attn_norm = LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(layer, config)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"layers.{layer}.mlp", config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], hooks: Hooks, top: Top) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        y = self.attn(h, rope, hooks, top)
        hooks, h, x = top.hooks, top.of(h), top.of(x)
        after = x + hooks.block(self.attn.site, y, h, x)
        h = hooks.norm(self.mlp_norm, x if self.parallel else after)
        return after + hooks.block(self.mlp.site, self.mlp(h, hooks), h, after)


class GPTNeoX(Causal):
    """GPT-NeoX on packed rows. Weights are unset until load_model fills them in."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        self.rotary = Rotary(config.rotary_dim, config.rope_theta, config.rope_scaling)
        groups = (g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,),
                                                   (a.mlp.up,), (a.mlp.down,)))  # fmt: skip
        self.name_sites(groups, self.head_linear)
        self.requires_grad_(False)

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        check_lengths(rows, self.config.max_positions)
        x = hooks.embed(self.embed(rows.tokens), rows.tokens)  # [T, width]
        rope = self.rotary(rows, x.dtype)
        for layer, at in self.layers_to(top, rows, hooks):
            x = run(self, layer, x, rope, hooks, at)
        return top.hooks.norm(self.norm, x)


def read(fields: dict) -> GPTNeoXConfig:
    """Our config from config.json's fields. Transformers 4 calls theta rotary_emb_base, and what turns rotary_pct."""
    width, num_heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    if width % num_heads:
        raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}.")
    theta = real(fields, "rotary_emb_base", default=10000.0)
    rope_theta, rope_scaling = rope(fields | {"rope_theta": theta}, partial=True)
    found = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    turning = real(found, "partial_rotary_factor", default=real(fields, "rotary_pct", default=0.25))
    rotary_dim = int(width // num_heads * turning)
    if turning > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise InputError(f"rotary_pct or partial_rotary_factor {turning} turns {rotary_dim} of the "
                         f"{width // num_heads} features of a head; needed an even number of them.")  # fmt: skip
    return GPTNeoXConfig(
        vocab_size=whole(fields, "vocab_size"),
        width=width,
        num_layers=num_layers(fields, "num_hidden_layers"),
        num_heads=num_heads,
        mlp_width=whole(fields, "intermediate_size"),
        rotary_dim=rotary_dim,
        norm_eps=real(fields, "layer_norm_eps", default=1e-5),
        activation=choice(fields, "hidden_act", tuple(ACTIVATIONS), default="gelu"),
        parallel=flag(fields, "use_parallel_residual", default=True),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attn_bias=flag(fields, "attention_bias", default=True),
        tied_head=flag(fields, "tie_word_embeddings"),
        max_positions=whole(fields, "max_position_embeddings", default=2048),
    )


def sources(model: GPTNeoX) -> dict[str, Source]:
    """Where each parameter lies: q, k and v are cut out of [H, 3, D, width], or of [H, 3, D] for biases."""
    K, heads, found = model.config.width, model.config.num_heads, {}
    number = {"q": 0, "k": 1, "v": 2}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        key = "gpt_neox." + ".".join(KEY_PARTS.get(part, part) for part in parts)
        if parts[-2] in number:
            head = weight.numel() // heads  # numbers
            found[name] = Source(key, (3 * K, *weight.shape[1:]), Part(number[parts[-2]] * head, head, 3 * head))
        else:
            found[name] = Source("embed_out.weight" if name == "head_linear.weight" else key)
    return found


FAMILY = Family(
    config=read,
    model=GPTNeoX,
    sources=sources,
    aliases=lambda model: {"embed_out.weight": "gpt_neox.embed_in.weight"} if model.config.tied_head else {},
    prefix="gpt_neox.",
    unused=r"gpt_neox\.(layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq)",
)
