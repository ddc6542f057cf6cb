"""T5 (Raffel et al. 2020, arXiv:1910.10683), T5 1.1 and Flan-T5: an encoder reads the input, a decoder writes.

    x = embedding[inputs]
    for each layer of the encoder:  x = x + o(attention(q(n1 x), k(n1 x), v(n1 x)))        n1, n2, n3: RMSNorm
                                    x = x + mlp(n2 x)
    memory = norm(x)
    y = embedding[start token, targets without the last]
    for each layer of the decoder:  y = y + o(attention(q(n1 y), k(n1 y), v(n1 y)))        each row sees up to itself
                                    y = y + o(attention(q(n2 y), k(memory), v(memory)))    all rows of its input
                                    y = y + mlp(n3 y)
    logits = head(norm(y))
    mlp(x) = down(relu(up(x)))  in T5 1.0;   down(gelu(gate(x)) * up(x))  in 1.1 and Flan; or with silu

Attention is softmax(q k^T + bias) v, unscaled. Positions are nowhere but in bias, a number per head and distance that
all layers of a stack share; cross-attention has none. Inputs and targets are packed rows of their own (rows.py), so
each side has its own segments of users: `encode_rows` and `cross_keys` see input rows, `decode_rows` target rows.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.attention import Packed
from minipeft.models.checkpoint import Family, Source
from minipeft.models.fields import choice, flag, num_layers, real, whole
from minipeft.models.generate import Memory, Sampling, generate_from
from minipeft.models.hooks import BASE, Hooks, Linear, Sites, together
from minipeft.models.layers import RMSNorm, SwiGLU, gelu_tanh
from minipeft.models.recompute import run
from minipeft.models.rows import Rows, joined

Keys = tuple[Tensor, Tensor]  # k and v of a layer, [T, H, D] each
KEY_PARTS = {  # our name of a module in a layer -> Hugging Face's; {} is 1 in the encoder, 2 in the decoder
    "attn_norm": "layer.0.layer_norm", "attn": "layer.0.SelfAttention",
    "cross_norm": "layer.1.layer_norm", "cross": "layer.1.EncDecAttention",
    "mlp_norm": "layer.{}.layer_norm", "mlp": "layer.{}.DenseReluDense",
}  # fmt: skip


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5. Sizes are numbers of features, heads or layers."""

    vocab_size: int
    width: int
    num_layers: int  # of the encoder
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int
    start_token: int  # what a target begins with, unwritten
    gated: bool = False  # T5 1.1's MLP
    gate_activation: str = "gelu_new"  # or "silu"
    norm_eps: float = 1e-6
    num_buckets: int = 32  # of distances
    max_distance: int = 128  # from here on all distances are one
    tied_head: bool = True
    scaled_output: bool = True  # the head reads width**-0.5 times the last hidden state
    max_positions: None = None  # no limit


def distance_buckets(num_buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """The bucket of each age from -max_distance to max_distance; ages are q's place - k's. [2 max_distance + 1] int64.

    Section 2.1 of the paper: half of the buckets hold one distance each, from 0 on; the others grow logarithmically up
    to max_distance. both_ways: k may lie after q, at the same distances in buckets of its own; otherwise all such k
    are as near as q itself.
    """
    ages = torch.arange(-max_distance, max_distance + 1)
    one_way = num_buckets // 2 if both_ways else num_buckets
    distances = ages.abs() if both_ways else ages.clamp(min=0)
    exact = one_way // 2
    share = torch.log(distances / exact) / math.log(max_distance / exact)  # of the way to max_distance, in fp32
    far = exact + (share * (one_way - exact)).clamp(0, one_way - exact - 1).long()
    return torch.where(distances < exact, distances, far) + (ages < 0) * (one_way if both_ways else 0)


class RelativeBias(nn.Module):
    """bias[head, i, j] = weight[bucket of i - j, head]."""

    def __init__(self, config: T5Config, both_ways: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_buckets, config.num_heads))
        self.max_distance, self.both_ways = config.max_distance, both_ways

    def forward(self, ages: Tensor) -> Tensor:
        """Ages [n, q_width, k_width] -> [n, H, q_width, k_width]."""
        buckets = distance_buckets(len(self.weight), self.max_distance, self.both_ways).to(ages.device)
        by_age = self.weight[buckets].t()  # [H, 2 max_distance + 1]
        index = ages.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return by_age.index_select(1, index.flatten()).unflatten(1, ages.shape).transpose(0, 1)


class Attention(nn.Module):
    """Attention among a stack's own rows."""

    def __init__(self, site: str, layer: int, config: T5Config):
        super().__init__()
        K, N = config.width, config.num_heads * config.head_dim
        self.site, self.layer, self.head_dim = site, layer, config.head_dim
        self.q = Linear(f"{site}.q", K, N, bias=False)
        self.k = Linear(f"{site}.k", K, N, bias=False)
        self.v = Linear(f"{site}.v", K, N, bias=False)
        self.o = Linear(f"{site}.o", N, K, bias=False)

    def forward(self, x: Tensor, rows: Rows, biases: Sequence[Tensor], hooks: Hooks) -> Tensor:
        q, k, v = (y.unflatten(1, (-1, self.head_dim)) for y in together((self.q, self.k, self.v), x, hooks))
        k, v = hooks.keys(self.site, k, v)
        return self.o(rows.attend(self.layer, q, k, v, biases=biases, scale=1.0).flatten(1), hooks)


class CrossAttention(nn.Module):
    """Attention of target rows to input rows."""

    def __init__(self, site: str, layer: int, config: T5Config):
        super().__init__()
        K, N = config.width, config.num_heads * config.head_dim
        self.site, self.layer, self.head_dim = site, layer, config.head_dim
        self.k = Linear(f"{site}.k", K, N, bias=False)
        self.v = Linear(f"{site}.v", K, N, bias=False)
        self.q = Linear(f"{site}.q", K, N, bias=False)
        self.o = Linear(f"{site}.o", N, K, bias=False)

    def keys(self, memory: Tensor, hooks: Hooks) -> Keys:
        k, v = together((self.k, self.v), memory, hooks)
        return hooks.keys(self.site, k.unflatten(1, (-1, self.head_dim)), v.unflatten(1, (-1, self.head_dim)))

    def forward(self, x: Tensor, keys: Keys | tuple[()], cross: Packed | Memory, hooks: Hooks) -> Tensor:
        q = self.q(x, hooks).unflatten(1, (-1, self.head_dim))  # [T, H, D]
        return self.o(cross(self.layer, q, *keys, scale=1.0).flatten(1), hooks)


class MLP(nn.Module):
    def __init__(self, site: str, config: T5Config):
        super().__init__()
        self.site = site
        self.gate = Linear(f"{site}.gate", config.width, config.mlp_width, bias=False) if config.gated else None
        self.up = Linear(f"{site}.up", config.width, config.mlp_width, bias=False)
        self.down = Linear(f"{site}.down", config.mlp_width, config.width, bias=False)
        self.silu = config.gate_activation == "silu"

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        if self.gate is None:
            return self.down(torch.relu(self.up(x, hooks)), hooks)
        gate, up = together((self.gate, self.up), x, hooks)
        return self.down(SwiGLU.apply(gate, up) if self.silu else gelu_tanh(gate) * up, hooks)


class EncoderLayer(nn.Module):
    def __init__(self, layer: int, config: T5Config):
        super().__init__()
        site = f"encoder.layers.{layer}"
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(f"{site}.attn", layer, config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"{site}.mlp", config)

    def forward(self, x: Tensor, rows: Rows, biases: Sequence[Tensor], hooks: Hooks) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        x = x + hooks.block(self.attn.site, self.attn(h, rows, biases, hooks), h, x)
        h = hooks.norm(self.mlp_norm, x)
        return x + hooks.block(self.mlp.site, self.mlp(h, hooks), h, x)


class DecoderLayer(nn.Module):
    def __init__(self, layer: int, config: T5Config):
        super().__init__()
        site = f"decoder.layers.{layer}"
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(f"{site}.attn", layer, config)
        self.cross_norm = RMSNorm(config.width, config.norm_eps)
        self.cross = CrossAttention(f"{site}.cross", layer, config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"{site}.mlp", config)

    def forward(
        self, x: Tensor, rows: Rows, biases: Sequence[Tensor], keys: Keys | tuple[()], cross: Packed | Memory,
        hooks: Hooks,
    ) -> Tensor:
        h = hooks.norm(self.attn_norm, x)
        x = x + hooks.block(self.attn.site, self.attn(h, rows, biases, hooks), h, x)
        h = hooks.norm(self.cross_norm, x)
        x = x + hooks.block(self.cross.site, self.cross(h, keys, cross, hooks), h, x)
        h = hooks.norm(self.mlp_norm, x)
        return x + hooks.block(self.mlp.site, self.mlp(h, hooks), h, x)


class Stack(nn.Module):
    """The encoder's or the decoder's layers, the bias that they share, and the norm at the end."""

    def __init__(self, layer_of: Callable[[int, T5Config], nn.Module], num_layers: int, both_ways: bool,
                 config: T5Config):  # fmt: skip
        super().__init__()
        self.bias = RelativeBias(config, both_ways)
        self.layers = nn.ModuleList(layer_of(i, config) for i in range(num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class T5(Sites, nn.Module):
    """T5 on packed rows. Weights are unset until load_model fills them in.

    embed: the embedding of input and target tokens. head_linear: hidden states -> logits, site "head".
    Sites of the encoder and cross.k and cross.v see input rows, the others target rows.
    """

    causal = True  # of the rows that are read: the targets
    stop_tokens: tuple[int, ...] = ()
    recompute = False  # see recompute.py

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Stack(EncoderLayer, config.num_layers, True, config)
        self.decoder = Stack(DecoderLayer, config.num_decoder_layers, False, config)
        self.head_linear = Linear("head", config.width, config.vocab_size, bias=False)
        if config.tied_head:
            self.head_linear.weight = self.embed.weight
        ups = lambda a: (a.mlp.gate, a.mlp.up) if config.gated else (a.mlp.up,)  # noqa: E731
        groups = [g for a in self.encoder.layers
                  for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,), ups(a), (a.mlp.down,))]  # fmt: skip
        groups += [(a.cross.k, a.cross.v) for a in self.decoder.layers]
        groups += [g for a in self.decoder.layers
                   for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,), (a.cross.q,), (a.cross.o,),
                             ups(a), (a.mlp.down,))]  # fmt: skip
        self.name_sites(groups, self.head_linear)
        self.requires_grad_(False)

    def encode_rows(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """Input rows, not causal -> the encoder's last hidden states [T_in, width], dtype of the weights."""
        x = hooks.embed(self.embed(rows.tokens), rows.tokens)
        biases = rows.attend.scores_bias(self.encoder.bias)
        for layer in self.encoder.layers:
            x = run(self, layer, x, rows, biases, hooks)
        return hooks.norm(self.encoder.norm, hooks.tail(x, rows))

    def cross_keys(self, memory: Tensor, hooks: Hooks = BASE) -> list[Keys]:
        """The encoder's last hidden states -> what each layer of the decoder sees of them. Once for many passes.

        Args:
            hooks:  those of the input rows.
        Returns:
            k and v for each layer of the decoder, [T_in, H, D] each.
        """
        return [layer.cross.keys(memory, hooks) for layer in self.decoder.layers]

    def decode_rows(
        self, rows: Rows, keys: Sequence[Keys | tuple[()]], cross: Packed | Memory, hooks: Hooks = BASE
    ) -> Tensor:
        """Last hidden states of the decoder after the final norm.

        Args:
            rows:   target rows, causal, each target after the start token.
            keys:   from cross_keys; () for each layer where cross holds them.
            cross:  which input each target sees: Packed.plan(..., k_lengths=...), or generate.py's Memory.
            hooks:  those of the target rows.
        Returns:
            [T_out, width], dtype of the weights.
        """
        x = hooks.embed_targets(self.embed(rows.tokens), rows.tokens)
        biases = rows.attend.scores_bias(self.decoder.bias)
        for layer, seen in zip(self.decoder.layers, keys, strict=True):
            x = run(self, layer, x, rows, biases, seen, cross, hooks)
        return hooks.norm(self.decoder.norm, x)

    def head(self, h: Tensor, hooks: Hooks = BASE) -> Tensor:
        """The decoder's hidden states of chosen rows [rows, width] -> logits [rows, vocab_size]."""
        return self.head_linear(h * self.config.width**-0.5 if self.config.scaled_output else h, hooks)

    def pack_pairs(
        self, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> tuple[Rows, Rows, Packed]:
        """Input rows, target rows and who sees whom across, where target i belongs to input i.

        Row j of a target holds the token before its token j, so the last token is nobody's row: it is predicted only.

        Raises:
            InputError: not as many targets as inputs, or see `joined`.
        """
        vocab_size = self.config.vocab_size
        _, lengths = joined(targets, "target ids", vocab_size)  # the last of each is in no row
        if len(inputs) != len(lengths):
            raise InputError(f"T5: {len(inputs)} inputs and {len(lengths)} targets; needed one for each.")
        read = Rows.pack(inputs, self.device, causal=False, vocab_size=vocab_size)
        begun = [[self.config.start_token, *target[:-1]] for target in targets]
        write = Rows.pack(begun, self.device, vocab_size=vocab_size)
        return read, write, Packed.plan(write.lengths, False, self.device, k_lengths=read.lengths)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @torch.no_grad()
    def logits(self, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of token ids -> for each target the logits [its length, vocab_size]; row j predicts its token j."""
        read, write, cross = self.pack_pairs(inputs, targets)
        keys = self.cross_keys(self.encode_rows(read))
        return write.split(self.head(self.decode_rows(write, keys, cross)))

    @torch.no_grad()
    def encode(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of token ids -> for each the encoder's last hidden states [its length, width]."""
        rows = Rows.pack(sequences, self.device, causal=False, vocab_size=self.config.vocab_size)
        return rows.split(self.encode_rows(rows))

    def generate(
        self, inputs: Sequence[Sequence[int]], max_new_tokens: int, *, stop: Sequence[int] | None = None,
        temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Lists of token ids -> what is written for each, without the start token, see generate.py."""
        return generate_from(self, inputs, max_new_tokens, stop, Sampling(temperature, top_k, top_p, seed))


def read(fields: dict) -> T5Config:
    """Our config from config.json's fields.

    Up to transformers 4 tie_word_embeddings false means a head of its own and an unscaled output. 5 always says true,
    and scale_decoder_outputs beside it; whether the head is its own, only the weights say then: `complete`.
    """
    if not flag(fields, "is_encoder_decoder", default=True) or flag(fields, "is_decoder"):
        raise InputError("is_encoder_decoder is false or is_decoder is true; supported is T5 as a whole, both stacks.")
    activations = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}
    kind = choice(fields, "feed_forward_proj", tuple(activations), default="relu")
    gated, activation = kind != "relu", activations[kind]
    choice(fields, "dense_act_fn", (activation,), default=activation)
    if flag(fields, "is_gated_act", default=gated) != gated:
        raise InputError(f"is_gated_act is {fields['is_gated_act']!r} but feed_forward_proj is {kind!r}.")
    tied = flag(fields, "tie_word_embeddings", default=True)
    scaled = flag(fields, "scale_decoder_outputs", default=tied)
    if scaled and not tied:
        raise InputError("scale_decoder_outputs is true but tie_word_embeddings is false; only a tied head is scaled.")
    layers, vocab_size = num_layers(fields, "num_layers"), whole(fields, "vocab_size")
    num_buckets = whole(fields, "relative_attention_num_buckets", default=32, least=4, most=2**15)
    return T5Config(
        vocab_size=vocab_size,
        width=whole(fields, "d_model"),
        num_layers=layers,
        num_decoder_layers=whole(fields, "num_decoder_layers", default=layers, most=10_000),
        num_heads=whole(fields, "num_heads"),
        head_dim=whole(fields, "d_kv"),
        mlp_width=whole(fields, "d_ff"),
        start_token=whole(fields, "decoder_start_token_id", least=0, most=vocab_size - 1),
        gated=gated,
        gate_activation=activation if gated else "gelu_new",
        norm_eps=real(fields, "layer_norm_epsilon", default=1e-6),
        num_buckets=num_buckets,
        max_distance=whole(fields, "relative_attention_max_distance", default=128, least=num_buckets // 2 + 1,
                           most=2**16),
        tied_head=tied,
        scaled_output=scaled,
    )  # fmt: skip


def complete(config: T5Config, keys: Collection[str]) -> T5Config:
    """An unscaled head is its own if the weights have one, whatever transformers 5 wrote."""
    own = not config.scaled_output and "lm_head.weight" in keys
    return replace(config, tied_head=config.tied_head and not own)


def key_of(name: str, gated: bool) -> str:
    """Our parameter name -> Hugging Face's: "decoder.layers.3.mlp.up.weight" -> "decoder.block.3.[...].wi.weight"."""
    parts = name.split(".")
    if parts[0] in ("embed", "head_linear"):
        return {"embed": "shared", "head_linear": "lm_head"}[parts[0]] + ".weight"
    stack, part = parts[:2]
    if part == "norm":
        return f"{stack}.final_layer_norm.weight"
    if part == "bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layer, module, *rest = parts[2:]
    rest = [{"gate": "wi_0", "up": "wi_1" if gated else "wi", "down": "wo"}.get(name, name) for name in rest]
    return ".".join([stack, "block", layer, KEY_PARTS[module].format({"encoder": 1, "decoder": 2}[stack]), *rest])


def aliases(model: T5) -> dict[str, str]:
    names = ["encoder.embed_tokens", "decoder.embed_tokens", *(["lm_head"] if model.config.tied_head else [])]
    return {f"{name}.weight": "shared.weight" for name in names}


FAMILY = Family(
    config=read,
    model=T5,
    sources=lambda model: {name: Source(key_of(name, model.config.gated)) for name, _ in model.named_parameters()},
    aliases=aliases,
    unused=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # in old files, never used
    complete=complete,
)
