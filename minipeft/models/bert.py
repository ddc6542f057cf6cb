"""BERT and RoBERTa: encoders, in which every row sees its whole sequence (Devlin et al. 2019; Liu et al. 2019).

    x = n0(embedding[tokens] + types[token types] + positions[0, 1, ...])                  n0, n1, n2: LayerNorm
    for each layer:   x = n1(x + o(attention(q(x), k(x), v(x))))                           norms come after the sums
                      x = n2(x + down(gelu(up(x))))
    pool(x) = one vector per sequence: the mean of its rows, its first row, or tanh(pooler(first row))

RoBERTa, and XLM-R with it, is BERT whose table of positions begins with pad_token_id + 1 rows that no token uses; they
are not loaded.
Packed rows hold no padding, so a padding token in a text is a token like any other.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.causal import check_lengths
from minipeft.models.checkpoint import Family, Part, Source
from minipeft.models.fields import choice, flag, num_layers, real, whole
from minipeft.models.hooks import BASE, Hooks, Linear, Sites, together
from minipeft.models.layers import LayerNorm, gelu, gelu_tanh, stable
from minipeft.models.recompute import run
from minipeft.models.rows import Rows, joined

ACTIVATIONS = {"gelu": gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "relu": torch.relu}
POOLS = ("mean", "first", "pooler")


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder. Sizes are numbers of features, heads, layers or rows."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    max_positions: int = 512
    position_offset: int = 0  # rows of the checkpoint's table before position 0
    num_types: int = 2
    pooler: bool = True


class Attention(nn.Module):
    def __init__(self, layer: int, config: BertConfig):
        super().__init__()
        site, K = f"layers.{layer}.attn", config.width
        self.site, self.layer, self.head_dim = site, layer, K // config.num_heads
        self.q, self.k, self.v, self.o = (Linear(f"{site}.{name}", K, K, bias=True) for name in "qkvo")

    def forward(self, x: Tensor, rows: Rows, hooks: Hooks, products: Sequence[Tensor] | None = None) -> Tensor:
        qkv = together(self.qkv, x, hooks, products)
        q, k, v = (y.view(x.shape[0], -1, self.head_dim) for y in qkv)  # [T, H, D]
        k, v = hooks.keys(self.site, k, v)
        return self.o(rows.attend(self.layer, q, k, v).flatten(1), hooks)

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        return self.q, self.k, self.v


class MLP(nn.Module):
    def __init__(self, site: str, config: BertConfig):
        super().__init__()
        self.site = site
        self.up = Linear(f"{site}.up", config.width, config.mlp_width, bias=True)
        self.down = Linear(f"{site}.down", config.mlp_width, config.width, bias=True)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        return self.down(self.activation(self.up(x, hooks)), hooks)


class Layer(nn.Module):
    def __init__(self, layer: int, config: BertConfig):
        super().__init__()
        self.attn = Attention(layer, config)
        self.attn_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(f"layers.{layer}.mlp", config)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, rows: Rows, hooks: Hooks, products: Sequence[Tensor] | None = None) -> Tensor:
        """products: frozen q, k and v of x, see Hooks.linear; None: nobody has them."""
        y = hooks.block(self.attn.site, self.attn(x, rows, hooks, products), x, x, self.attn_norm)
        x = hooks.norm(self.attn_norm, x + y)
        y = hooks.block(self.mlp.site, self.mlp(x, hooks), x, x, self.mlp_norm)
        return hooks.norm(self.mlp_norm, x + y)


class Bert(Sites, nn.Module):
    """The frozen encoder: `hidden`, then `pool` for one vector per sequence. Weights are unset until load_model.

    The pooler's map is called as the site "pooler", which is not among the named ones (hooks.py).
    """

    recompute = False  # see recompute.py

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.types = nn.Embedding(config.num_types, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(Layer(i, config) for i in range(config.num_layers))
        self.pooler = Linear("pooler", config.width, config.width, bias=True) if config.pooler else None
        self.name_sites(
            g for a in self.layers for g in ((a.attn.q, a.attn.k, a.attn.v), (a.attn.o,), (a.mlp.up,), (a.mlp.down,)))
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def hidden(self, rows: Rows, hooks: Hooks = BASE, token_types: Tensor | None = None) -> Tensor:
        """Last hidden states. Returns [T, width], dtype of the weights.

        Args:
            rows: packed with causal=False.
            token_types: [T] int64, e.g. 0 in a first and 1 in a second sentence. None: 0 everywhere.
        Raises:
            ValueError: the rows are causal, or a sequence is longer than the base has positions.
        """
        check_lengths(rows, self.config.max_positions)
        if rows.attend.causal:
            raise ValueError("Bert.hidden: rows of a decoder, needed rows that see their whole sequence; "
                             "use Rows.pack(..., causal=False).")  # fmt: skip
        x = self.embedded(rows, hooks, token_types)
        for layer in self.layers:
            x = run(self, layer, x, rows, hooks)
        return x

    def embedded(self, rows: Rows, hooks: Hooks = BASE, token_types: Tensor | None = None) -> Tensor:
        """What the first layer reads, [T, width]."""
        types = self.types.weight[0] if token_types is None else self.types(token_types)  # [width] or [T, width]
        x = hooks.embed(self.embed(rows.tokens), rows.tokens) + types + self.positions(rows.positions)
        return hooks.norm(self.norm, x)

    def pool(self, hidden: Tensor, rows: Rows, how: str, hooks: Hooks = BASE) -> Tensor:
        """One vector per sequence, [sequences, width], from hidden states [T, width]. Sums run in row order.

        Virtual tokens count for nothing here: the first row is the text's own.

        how: "mean" of the sequence's rows (Sentence-BERT, arXiv:1908.10084); "first", the row of [CLS]; "pooler",
             tanh(W first + b), what BERT's classifiers read.
        Raises:
            ValueError: how is none of these, or "pooler" and the checkpoint has none.
        """
        if how not in POOLS:
            raise ValueError(f"Bert.pool: how is {how!r}, needed one of {', '.join(map(repr, POOLS))}.")
        virtual = 0 if rows.virtual is None else rows.virtual
        first_rows = np.cumsum(rows.lengths) - rows.lengths + virtual  # [sequences]
        starts = torch.from_numpy(first_rows).to(hidden.device)
        if how == "mean":
            text = np.arange(len(hidden))
            if rows.virtual is not None:
                kept = text >= np.repeat(first_rows, rows.lengths)
                text, starts = text[kept], starts - torch.from_numpy(np.cumsum(virtual)).to(starts.device)
            return F.embedding_bag(torch.from_numpy(text).to(hidden.device), hidden, starts, mode="mean")
        first = hidden.index_select(0, starts)
        if how == "first":
            return first
        if self.pooler is None:
            raise ValueError("Bert.pool: this base has no pooler, its checkpoint holds no pooler.dense; "
                             "use 'mean' or 'first'.")  # fmt: skip
        return self.pooled(first, hooks)

    def pooled(self, first: Tensor, hooks: Hooks = BASE) -> Tensor:
        """tanh(W first + b) of the pooler, [n, width]."""
        return stable(torch.tanh, self.pooler(first, hooks))

    @torch.no_grad()
    def encode(
        self, sequences: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Lists of token ids, and of their types -> for each its last hidden states [its length, width]."""
        rows = Rows.pack(sequences, self.device, causal=False, vocab_size=self.config.vocab_size)
        if token_types is not None:
            types, lengths = joined(token_types, "token types", self.config.num_types)
            if not np.array_equal(lengths, rows.lengths):
                raise InputError("Bert.encode: token_types must have one type for each token of each sequence.")
            token_types = torch.from_numpy(types).to(self.device)
        return rows.split(self.hidden(rows, token_types=token_types))


# Hugging Face's config.json and keys

KEY_PARTS = {  # our name of a module, below a layer or at the top -> Hugging Face's
    "embed": "embeddings.word_embeddings", "types": "embeddings.token_type_embeddings",
    "positions": "embeddings.position_embeddings", "norm": "embeddings.LayerNorm", "pooler": "pooler.dense",
    "attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense", "attn_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # bert-base-uncased's own


def read(fields: dict) -> BertConfig:
    """Our config from config.json's fields."""
    family = choice(fields, "model_type", ("bert", "roberta", "xlm-roberta"))
    choice(fields, "position_embedding_type", ("absolute",), default="absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if flag(fields, name):
            raise InputError(f"{name} is true; supported are encoders only. Choose another base.")
    if fields.get("pruned_heads"):
        raise InputError(f"pruned_heads is {fields['pruned_heads']!r}; supported is none. Choose another base.")
    width, num_heads = whole(fields, "hidden_size"), whole(fields, "num_attention_heads")
    if width % num_heads:
        raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}.")
    positions = whole(fields, "max_position_embeddings", default=512)
    offset = whole(fields, "pad_token_id", default=1, least=0) + 1 if family != "bert" else 0
    if positions <= offset:
        raise InputError(f"max_position_embeddings is {positions}; needed more than pad_token_id + 1 = {offset}.")
    return BertConfig(
        vocab_size=whole(fields, "vocab_size"),
        width=width,
        num_layers=num_layers(fields, "num_hidden_layers"),
        num_heads=num_heads,
        mlp_width=whole(fields, "intermediate_size"),
        activation=choice(fields, "hidden_act", tuple(ACTIVATIONS), default="gelu"),
        norm_eps=real(fields, "layer_norm_eps", default=1e-12),
        max_positions=positions - offset,
        position_offset=offset,
        num_types=whole(fields, "type_vocab_size", default=2),
    )


def key_of(name: str) -> str:
    """Our parameter name -> Hugging Face's: "layers.3.mlp.up.bias" -> "encoder.layer.3.intermediate.dense.bias"."""
    layer, module, leaf = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    return ("" if layer is None else f"encoder.layer.{layer}.") + f"{KEY_PARTS[module]}.{leaf}"


def _family(prefix: str) -> Family:
    def complete(config: BertConfig, keys: Collection[str]) -> BertConfig:
        return replace(config, pooler=any(key.startswith(f"{prefix}pooler.") for key in keys))

    def sources(model: Bert) -> dict[str, Source]:
        found = {name: Source(prefix + key_of(name)) for name, _ in model.named_parameters()}
        rows, K, before = model.config.max_positions, model.config.width, model.config.position_offset
        part = Part(before * K, rows * K, (before + rows) * K)
        return found | {"positions.weight": Source(found["positions.weight"].key, (before + rows, K), part)}

    return Family(
        config=read,
        model=Bert,
        complete=complete,
        sources=sources,
        prefix=prefix,
        unused=rf"{re.escape(prefix)}embeddings\.position_ids",
        heads=r"(cls|lm_head|classifier|qa_outputs)\..*",
        rename=lambda key: re.sub(r"LayerNorm\.(gamma|beta)$", lambda found: OLD_NAMES[found[0]], key),
    )


BERT, ROBERTA = _family("bert."), _family("roberta.")
