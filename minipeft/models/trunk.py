"""Adapters in the top layers only, and an encoder whose frozen lower layers have run already.

    h = layers k .. L - 1 of (the state of each text after layer k - 1)        as if all layers ran, to the last bit's
                                                                               rounding

Where no adapter acts below layer k, the states there depend on the text alone. Annotated data repeats each text over
users, and training over epochs: so they are computed once per distinct text, kept, and every pass starts from them.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.classifier import Base, Classifier
from minipeft.models.hooks import BASE, Hooks, Sites
from minipeft.models.recompute import run
from minipeft.models.rows import Rows

TOKEN_BUDGET = 4096  # rows in a pass that computes states

Tokens = tuple[int, ...]


def keep_top(base: Base, num_layers: int) -> None:
    """Take the sites of all but the last layers away from this base, of each stack of layers that it has.

    Methods find the places that are left, whatever their options say; the embedding is not among them.

    Raises:
        InputError: there are fewer layers.
    """
    last: dict[str, int] = {}
    for site in base.sites:
        if found := _layer_of(site):
            last[found[0]] = max(last.get(found[0], 0), found[1])
    if not 1 <= num_layers <= 1 + min(last.values()):
        raise InputError(f"--top-layers {num_layers}: this base has {1 + min(last.values())} layers")

    def stays(site: str) -> bool:
        found = _layer_of(site)
        return found is not None and found[1] > last[found[0]] - num_layers

    for table in ("sites", "linears", "norms", "blocks", "attentions"):
        setattr(base, table, {site: what for site, what in getattr(base, table).items() if stays(site)})
    base.shared_inputs = tuple(group for group in base.shared_inputs if stays(group[0]))
    base.embeddings = {}


def _layer_of(site: str) -> tuple[str, int] | None:
    """"decoder.layers.3.attn.q" -> ("decoder.", 3); None for a place outside the layers."""
    found = re.match(r"(.*?)layers\.(\d+)(\.|_|$)", site)
    return None if found is None else (found[1], int(found[2]))


def first_acting_layer(base: Sites) -> int:
    """The lowest layer that has a site."""
    return min(_layer_of(site)[1] for site in base.sites)


class Trunk(Classifier):
    """A classifier that starts from kept states. Only the texts it was made with can be asked about.

    Args:
        whole: the classifier; its sites may lie in any layers, the lowest of them says where passes start.
        texts: the token ids of every text that will be asked about.
    """

    def __init__(self, whole: Classifier, texts: Iterable[Sequence[int]]):
        super().__init__(whole.encoder, whole.head_size[1], whole.pooling)
        for table in ("sites", "shared_inputs", "linears", "norms", "blocks", "attentions", "embeddings"):
            setattr(self, table, getattr(whole, table))
        self.first = first_acting_layer(whole)
        self.starts: dict[Tokens, int] = {}  # text -> its first row in `states`
        self.states = torch.cat([self._zero(), *self._computed(dict.fromkeys(map(tuple, texts)))])  # [rows, width]

    @property
    def num_rows(self) -> int:
        """Of all distinct texts together."""
        return len(self.states) - 1

    def _zero(self) -> Tensor:
        """Row 0: what filler starts from, which nothing reads."""
        return torch.zeros(1, self.config.width, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def _computed(self, texts: Iterable[Tokens]) -> Iterable[Tensor]:
        end = 1
        for group in groups_within(sorted(texts, key=len), TOKEN_BUDGET):
            rows = Rows.pack(group, self.device, causal=False)
            x = self.encoder.embedded(rows)
            for layer in self.encoder.layers[: self.first]:
                x = layer(x, rows, BASE)
            for text in group:
                self.starts[text] = end
                end += len(text)
            yield x

    def last_hidden(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """As Classifier's. Raises ValueError for a text it was not made with, or rows with virtual tokens."""
        x = self.states.index_select(0, self._rows_of(rows))
        for layer in self.encoder.layers[self.first :]:
            x = run(self.encoder, layer, x, rows, hooks)
        return x

    def _rows_of(self, rows: Rows) -> Tensor:
        """[T] rows of `states`."""
        if rows.virtual is not None:
            raise ValueError("Trunk: virtual tokens have no kept states; use a method without, or all layers.")
        tokens, places, at = rows.tokens.tolist(), np.zeros(len(rows.tokens), dtype=np.int64), 0
        for length in rows.lengths.tolist():
            text = tuple(tokens[at : at + length])
            start = self.starts.get(text)
            if start is not None:
                places[at : at + length] = np.arange(start, start + length)
            elif any(text):  # filler is token 0
                raise ValueError(f"Trunk: a text of {length} tokens has no kept states; make the trunk with "
                                 "every text that will be asked about.")  # fmt: skip
            at += length
        return torch.from_numpy(places).to(self.device)


def groups_within(texts: Iterable[Tokens], budget: int) -> Iterable[list[Tokens]]:
    """Consecutive texts of at most `budget` tokens together, at least one."""
    group, used = [], 0
    for text in texts:
        if group and used + len(text) > budget:
            yield group
            group, used = [], 0
        group.append(text)
        used += len(text)
    if group:
        yield group
