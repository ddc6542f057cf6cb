"""Adapters in the top layers only, and an encoder whose frozen lower layers run once for each text.

    h = layers k .. L - 1 of (the state of each text after layer k - 1)        as if all layers ran, to the last bit's
                                                                               rounding

Where no adapter acts below layer k, the states there depend on the text alone. Annotated data repeats each text over
users, and training over epochs: so they are computed once per distinct text, kept, and every pass starts from them.
So do layer k's frozen products: its q, k and v before anybody's LoRA is added. They are kept too where all texts are
known and there is room.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.classifier import Base, Classifier
from minipeft.models.hooks import BASE, Hooks
from minipeft.models.recompute import run
from minipeft.models.rows import Rows

if TYPE_CHECKING:
    from minipeft.methods.method import Method

TOKEN_BUDGET = 4096  # rows in a pass that computes states
MOST_BYTES = 2 << 30  # of kept states
TABLES = ("sites", "linears", "norms", "blocks", "attentions")  # of a base, by site

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

    _leave(base, lambda stack, layer: layer > last[stack] - num_layers)


def _leave(base: Base, stays: Callable[[str, int], bool]) -> None:
    """Take sites away: those outside the layers and of layers that do not stay. stays: (stack, layer) -> whether."""
    there = {site for table in TABLES for site in getattr(base, table)
             if (found := _layer_of(site)) is not None and stays(*found)}  # fmt: skip
    for table in TABLES:
        setattr(base, table, {site: what for site, what in getattr(base, table).items() if site in there})
    base.shared_inputs = tuple(group for group in base.shared_inputs if group[0] in there)
    base.embeddings = {}


def _layer_of(site: str) -> tuple[str, int] | None:
    """"decoder.layers.3.attn.q" -> ("decoder.", 3); None for a place outside the layers."""
    found = re.match(r"(.*?)layers\.(\d+)(\.|_|$)", site)
    return None if found is None else (found[1], int(found[2]))


def first_acting_layer(places: Iterable[str], num_layers: int) -> int:
    """The lowest layer among these sites or parameters; num_layers if all stand at the head, 0 if one is elsewhere."""
    layers = {place: _layer_of(place) for place in places}
    return min(found[1] if found else num_layers if "head." in place else 0 for place, found in layers.items())


def start_layer(base: Base, method: "Method | None" = None) -> int:
    """Where passes on this base start, 0 before the first layer; or those of a method's users at the latest: where its
    lowest place is, after the last layer if it acts at the head only."""
    lowest = base.first if isinstance(base, Trunk) else 0
    if method is None or not isinstance(base, Classifier) or base.lockstep is not None or any(method.virtual(base)):
        return lowest
    return max(lowest, first_acting_layer(method.shapes(base), len(base.encoder.layers)))


def above_frozen(base: Base, method: "Method", texts: Iterable[Sequence[int]] = ()) -> Base:
    """What users of this method train on: a Trunk where the base is an encoder and the method leaves its lowest layers
    alone, else the base.

    texts: as a Trunk's.
    """
    first = start_layer(base, method)
    return Trunk(base, texts, first) if first > start_layer(base) else base


class Trunk(Classifier):
    """A classifier that starts from kept states. A text's are computed when it is first asked about.

    Args:
        whole: the classifier; of a Trunk, states are computed from those it keeps.
        texts: token ids of texts whose states are computed at once, as far as there is room, and layer `first`'s
            products with them if there is room for all.
        first: the layer that passes start at, below which there are no sites; None: the lowest of whole's that has one.
        most_bytes: of kept states. First come, first kept: those of other texts are computed for every pass anew.
    """

    def __init__(
        self, whole: Classifier, texts: Iterable[Sequence[int]] = (), first: int | None = None,
        most_bytes: int = MOST_BYTES,
    ):  # fmt: skip
        super().__init__(whole.encoder, whole.head_size[1], whole.pooling)
        self._under = whole if isinstance(whole, Trunk) else None
        for table in (*TABLES, "shared_inputs"):
            setattr(self, table, getattr(whole, table))
        self.first = first_acting_layer(whole.sites, len(whole.encoder.layers)) if first is None else first
        _leave(self, lambda stack, layer: layer >= self.first)
        texts, most = list(dict.fromkeys(map(tuple, texts))), most_bytes // self.dtype.itemsize
        layer = self.encoder.layers[self.first] if self.first < len(self.encoder.layers) else None
        self._products = () if layer is None else layer.attn.qkv
        widths = [self.config.width, *(len(linear.weight) for linear in self._products)]
        if not texts or sum(map(len, texts)) * sum(widths) > most:
            self._products, widths = (), widths[:1]
        self.starts: dict[Tokens, int] = {}  # text -> its first row in `states`
        self.states = [torch.zeros(0, n, device=self.device, dtype=self.dtype) for n in widths]  # and the products
        self.num_rows = 0  # of `states` that hold some; the rest is room
        self.most_rows = most // sum(widths)
        self._lock = Lock()  # lanes of a pass ask at once
        self._passing: list[Tokens] = []  # the last of `starts`, for which there is no room
        self.have(self._fitting(texts))

    def have(self, texts: Collection[Tokens]) -> None:
        """Have the states of these distinct texts, until the next call at least."""
        for text in self._passing:
            if self.starts.pop(text, None) is not None:  # memory may not have held it
                self.num_rows -= len(text)
        new = sorted((text for text in texts if text not in self.starts), key=len)
        self._passing = new[len(self._fitting(new)) :]
        needed = self.num_rows + sum(map(len, new))
        if needed > (room := len(self.states[0])):
            more = max(needed, min(2 * room, self.most_rows)) - self.num_rows
            self.states = [torch.cat([kept[: self.num_rows], kept.new_zeros(more, kept.shape[1])])
                           for kept in self.states]  # fmt: skip
        for group in groups_within(new, TOKEN_BUDGET):
            self._compute(group)

    def _fitting(self, texts: list[Tokens]) -> list[Tokens]:
        """The first of these new texts, as many as there is room for."""
        ends = self.num_rows + np.cumsum([len(text) for text in texts])
        return texts[: int(np.searchsorted(ends, self.most_rows, side="right"))]

    def _compute(self, texts: list[Tokens]) -> None:
        for kept, own in zip(self.states, self.frozen(Rows.pack(texts, self.device, causal=False))):
            kept[self.num_rows :][: len(own)] = own
        for text in texts:
            self.starts[text] = self.num_rows
            self.num_rows += len(text)

    @torch.no_grad()
    def frozen(self, rows: Rows, anew: bool = False) -> list[Tensor]:
        """What is kept of these rows, computed: their states [T, width] before layer `first`, and its products.

        anew: from the tokens, whatever a Trunk below keeps.
        """
        kept = None if anew else self._under
        x, start = (self.encoder.embedded(rows), 0) if kept is None else kept.start_of(rows)
        for layer in self.encoder.layers[start : self.first]:
            x = layer(x, rows, BASE)
        return [x, *(linear(x, BASE) for linear in self._products)]

    def last_hidden(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """As Classifier's. Raises ValueError for rows with virtual tokens."""
        again = self.recompute and torch.is_grad_enabled()  # a layer that is computed again computes its products too
        with self._lock:  # those that pass are gone after the next call
            places = self._places(rows)
            x, *products = (kept.index_select(0, places) for kept in self.states[: 1 if again else None])
        for layer in self.encoder.layers[self.first :]:
            known = (products,) if products else ()  # which are overwritten
            x, products = run(self.encoder, layer, x, rows, hooks, *known), None
        return x

    def start_of(self, rows: Rows) -> tuple[Tensor, int]:
        """The rows' states [T, width], and the layer that takes them."""
        with self._lock:
            places = self._places(rows)  # after which `states` may be others
            return self.states[0].index_select(0, places), self.first

    def _places(self, rows: Rows) -> Tensor:
        """Where in `states` each row's state is, [T], once it is there."""
        if rows.virtual is not None:
            raise ValueError("Trunk: virtual tokens have no kept states; use a method without, or all layers.")
        tokens, ends = rows.tokens.tolist(), np.cumsum(rows.lengths).tolist()
        texts = [tuple(tokens[start:end]) for start, end in zip([0, *ends], ends)]
        self.have(dict.fromkeys(texts))
        places = [np.arange(len(text)) + self.starts[text] for text in texts]
        return torch.from_numpy(np.concatenate(places)).to(self.device)


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
