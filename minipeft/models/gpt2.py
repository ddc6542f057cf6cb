"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    x = embedding[tokens] + positions[0, 1, 2, ... of each sequence]         learned, so a sequence cannot be longer
    for each layer:   x = x + o(attention(q(n1 x), k(n1 x), v(n1 x)))        n1, n2: LayerNorm
                      x = x + down(gelu(up(n2 x)))
    logits = head(norm(x))                                                   the head is the embedding, if tied

Its checkpoints keep linear maps as [in, out], and q, k and v side by side in one [width, 3 width]: sources() cuts them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.causal import Causal, check_lengths
from minipeft.models.checkpoint import Family, Part, Source
from minipeft.models.fields import choice, flag, num_layers, real, whole
from minipeft.models.hooks import BASE, Hooks, Linear
from minipeft.models.layers import LayerNorm, gelu, gelu_tanh
from minipeft.models.recompute import run
from minipeft.models.rows import Rows
from minipeft.models.top import Top

ACTIVATIONS = {  # config.json's name -> the function; the tanh ones are one formula written three ways
    "gelu": gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "relu": torch.relu,
}  # fmt: skip
FIELD_NAMES = {  # other spellings that transformers accepts -> GPT-2's own
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
KEY_PARTS = {  # our name of a module -> Hugging Face's
    "embed": "wte", "positions": "wpe", "layers": "h", "attn_norm": "ln_1", "mlp_norm": "ln_2", "norm": "ln_f",
    "q": "c_attn", "k": "c_attn", "v": "c_attn", "o": "c_proj", "up": "c_fc", "down": "c_proj",
}  # fmt: skip


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. Sizes are numbers of features, heads or layers."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    scales: tuple[float, ...]  # of each layer: its scores are scale * q k^T
    norm_eps: float = 1e-5
    activation: str = "gelu_new"  # a key of ACTIVATIONS
    tied_head: bool = True
    max_positions: int = 1024


class Attention(nn.Module):
    def __init__(self, layer: int, config: GPT2Config):
        super().__init__()
        site, K = f"layers.{layer}.attn", config.width
        self.site, self.layer, self.head_dim, self.scale = site, layer, K // config.num_heads, config.scales[layer]
        self.q = Linear(f"{site}.q", K, K, bias=True)
        self.k = Linear(f"{site}.k", K, K, bias=True)
        self.v = Linear(f"{site}.v", K, K, bias=True)
        self.o = Linear(f"{site}.o", K, K, bias=True)

    def forward(self, x: Tensor, hooks: Hooks, top: Top) -> Tensor:
        qkv = top.qkv((self.q, self.k, self.v), x, hooks)
        q, k, v = (y.view(len(y), -1, self.head_dim) for y in qkv)  # [T, H, D], fewer of q where few rows are read
        k, v = hooks.keys(self.site, k, v)
        return self.o(top.attend(self.layer, q, k, v, scale=self.scale).flatten(1), top.hooks)


class MLP(nn.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, site: str, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.site = site
        self.up = Linear(f"{site}.up", width, mlp_width, bias=True)
        self.down = Linear(f"{site}.down", mlp_width, width, bias=True)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        return self.down(self.activation(self.up(x, hooks)), hooks)


class Layer(nn.Module):
    def __init__(self, layer: int, config: GPT2Config):
        super().__init__()
        self.attn_norm = LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(layer, config)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"layers.{layer}.mlp", config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor, hooks: Hooks, top: Top) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        y = self.attn(h, hooks, top)
        hooks, h, x = top.hooks, top.of(h), top.of(x)
        x = x + hooks.block(self.attn.site, y, h, x)
        h = hooks.norm(self.mlp_norm, x)
        return x + hooks.block(self.mlp.site, self.mlp(h, hooks), h, x)


class GPT2(Causal):
    """GPT-2 on packed rows. Weights are unset until load_model fills them in."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        groups = (g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,),
                                                   (a.mlp.up,), (a.mlp.down,)))  # fmt: skip
        self.name_sites(groups, self.head_linear)
        self.requires_grad_(False)

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        check_lengths(rows, self.config.max_positions)
        x = hooks.embed(self.embed(rows.tokens), rows.tokens) + self.positions(rows.positions)  # [T, width]
        for layer, at in self.layers_to(top, rows, hooks):
            x = run(self, layer, x, hooks, at)
        return top.hooks.norm(self.norm, x)


def read(fields: dict) -> GPT2Config:
    """Our config from config.json's fields. reorder_and_upcast_attn moves roundings only, so it is not read."""
    fields = {FIELD_NAMES.get(name, name): value for name, value in fields.items()}
    if flag(fields, "add_cross_attention"):
        raise InputError("add_cross_attention is true; supported is GPT-2 as a decoder alone, without an encoder.")
    width, num_heads, layers = whole(fields, "n_embd"), whole(fields, "n_head"), num_layers(fields, "n_layer")
    if width % num_heads:
        raise InputError(f"n_embd {width} is not a multiple of n_head {num_heads}.")
    scale = (width // num_heads) ** -0.5 if flag(fields, "scale_attn_weights", default=True) else 1.0
    by_layer = flag(fields, "scale_attn_by_inverse_layer_idx")
    return GPT2Config(
        vocab_size=whole(fields, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=num_heads,
        mlp_width=whole(fields, "n_inner", default=4 * width),
        scales=tuple(scale / (layer + 1) if by_layer else scale for layer in range(layers)),
        norm_eps=real(fields, "layer_norm_epsilon", default=1e-5),
        activation=choice(fields, "activation_function", tuple(ACTIVATIONS), default="gelu_new"),
        tied_head=flag(fields, "tie_word_embeddings", default=True),
        max_positions=whole(fields, "n_positions", default=1024),
    )


def sources(model: GPT2) -> dict[str, Source]:
    """Where each parameter lies: linear maps transposed, q, k and v as the thirds of c_attn's columns."""
    K, found = model.config.width, {}
    thirds = {"q": Part(0, K, 3 * K), "k": Part(K, K, 3 * K), "v": Part(2 * K, K, 3 * K)}  # of each row
    for name, weight in model.named_parameters():
        parts = name.split(".")
        key = "transformer." + ".".join(KEY_PARTS.get(part, part) for part in parts)
        if parts[-2] in thirds:
            shape = (K, 3 * K) if weight.ndim == 2 else (3 * K,)
            found[name] = Source(key, shape, thirds[parts[-2]], transposed=weight.ndim == 2)
        elif parts[-2] in ("o", "up", "down"):
            found[name] = Source(key, tuple(weight.shape)[::-1], transposed=weight.ndim == 2)
        else:
            found[name] = Source("lm_head.weight" if name == "head_linear.weight" else key)
    return found


FAMILY = Family(
    config=read,
    model=GPT2,
    sources=sources,
    aliases=lambda model: {"lm_head.weight": "transformer.wte.weight"} if model.config.tied_head else {},
    prefix="transformer.",
    unused=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # in old files: who may see whom
)
