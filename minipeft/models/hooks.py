"""Sites: the named places of a frozen base where a method can act, and the hooks that a base calls there.

    linear   y = W x + b of linear maps that share an input            "layers.3.attn.q", "head"
    norm     y = g * normalised(x) + b                                 "layers.3.attn_norm"
    block    y, what an attention or MLP block adds to its stream      "layers.3.attn", "layers.3.mlp"
    keys     k and v of an attention, position encoding applied        "layers.3.attn"
    embed    the rows of the token embedding                           "embed"
             on an encoder-decoder those of inputs, and targets' beside them
    tail     the stream after an encoder-decoder's last encoder layer

`Hooks` itself does what the base alone does. A pass of many users gives the base hooks of its own, which add each row's
own adapter; a base does not know of users.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.models.rows import Rows

if TYPE_CHECKING:
    from minipeft.models.checkpoint import Family
    from minipeft.models.loading import Origin
    from minipeft.sharding import Lockstep


class Hooks:
    """The base alone, no adapter anywhere. All tensors are of packed rows: [T, ...]."""

    def linear(
        self, sites: tuple[str, ...], x: Tensor, weights: list[Tensor], biases: list[Tensor | None],
        products: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """y = x W^T + b, [T, N], of each of these sites, which share their input x [T, K].

        products: these, where a caller has them (trunk.py); they may be overwritten.
        """
        return tuple(products or (F.linear(x, weight, bias) for weight, bias in zip(weights, biases)))

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """norm(x), [T, width]. norm is one of layers.py's and knows its `site`."""
        return norm(x)

    def block(self, site: str, y: Tensor, read: Tensor, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """What a block adds to the stream x: its output y. All [T, width].

        read: what the block's own linear maps have read. norm: what the sum x + y goes through next, where it does.
        """
        return y

    def keys(self, site: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is attended to: k and v, [T, H, D]."""
        return k, v

    def embed(self, x: Tensor, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        """Embedded tokens [T, width], before positions are added. tokens [T] int64.

        scale: [], what the base multiplies them by, None: nothing. Virtual tokens take their place after that.
        """
        return x if scale is None else x * scale

    def embed_targets(self, x: Tensor, tokens: Tensor) -> Tensor:
        """An encoder-decoder's embedded target tokens [T, width], of the same table. tokens [T] int64."""
        return x

    def tail(self, x: Tensor, rows: Rows) -> Tensor:
        """A T5's stream [T, width] between its encoder's last layer and the norm after it."""
        return x


BASE = Hooks()


class Linear(nn.Module):
    """A linear map that knows its site name, e.g. "layers.3.attn.q"."""

    def __init__(self, site: str, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor, hooks: Hooks) -> Tensor:
        return together((self,), x, hooks)[0]


def together(
    linears: Sequence[Linear], x: Tensor, hooks: Hooks, products: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """y of linear maps that share the input x, e.g. q, k and v. products: see Hooks.linear."""
    known = {} if products is None else {"products": products}
    return hooks.linear(tuple(m.site for m in linears), x, [m.weight for m in linears], [m.bias for m in linears],
                        **known)  # fmt: skip


class Sites:
    """The places of a base, for methods to choose from. A base inherits this and calls `name_sites` when it is built.

    sites:         linear site -> (in features K, out features N), in forward order.
    shared_inputs: the same sites, in groups that share their input: what `Hooks.linear` is called with; or, of q, k
                   and v in a decoder's last layer, q alone and the others.
    heads:         "head" -> (width, vocabulary): the map to the vocabulary, where rows are read; {}: there is none.
    linears:       linear site, or head -> its frozen map.
    norms:         norm site -> its frozen norm.
    blocks:        block site -> width of the stream that it adds to.
    attentions:    block site of an attention -> (heads of its keys, head width).
    embeddings:    "embed" -> (vocabulary, width), where a method may act on embedded tokens.
    embed_scale:   what embedded tokens are multiplied by before they are the stream.
    head_size:     (K, classes) of the head of one's own that an encoder with classes takes at "head"; None for others.
    family:        how load_model read it, which says what Hugging Face calls its parameters; None: it was not loaded.
    origin:        the folder it was loaded from (loading.py); None: it was made in memory.
    lockstep:      how the ranks that share its layers agree on passes (sharding.py); None: it is whole.
    """

    sites: dict[str, tuple[int, int]]
    shared_inputs: tuple[tuple[str, ...], ...]
    heads: dict[str, tuple[int, int]]
    linears: dict[str, Linear]
    norms: dict[str, nn.Module]
    blocks: dict[str, int]
    attentions: dict[str, tuple[int, int]]
    embeddings: dict[str, tuple[int, int]]
    embed_scale: float = 1.0
    head_size: tuple[int, int] | None = None
    family: "Family | None" = None
    origin: "Origin | None" = None
    lockstep: "Lockstep | None" = None

    def name_sites(self, groups: Iterable[Sequence[Linear]], head: Linear | None = None) -> None:
        """Fill in the tables. groups: the linear maps that share their input, in forward order. head: if it speaks."""
        groups = [tuple(group) for group in groups]
        self.linears = {m.site: m for group in groups for m in group}
        self.sites = {site: (m.weight.shape[1], m.weight.shape[0]) for site, m in self.linears.items()}
        self.shared_inputs = tuple(tuple(m.site for m in group) for group in groups)
        self.heads = {} if head is None else {head.site: (head.weight.shape[1], head.weight.shape[0])}
        self.linears |= {} if head is None else {head.site: head}
        self.norms, self.blocks, self.attentions = {}, {}, {}
        self.embeddings = {"embed": tuple(self.embed.weight.shape)}
        for name, module in self.named_modules():
            if getattr(module, "is_site", False):  # layers.py's norms, except those of single heads
                module.site = name
                self.norms[name] = module
        for site, (_, N) in self.sites.items():
            block, _, last = site.rpartition(".")
            if last in ("o", "down"):
                self.blocks[block] = N
            elif last == "k":
                D = self.get_submodule(block).head_dim
                self.attentions[block] = (N // D, D)
