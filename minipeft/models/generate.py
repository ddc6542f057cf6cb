"""Generation: the next token, again and again, for many sequences at once, each stopping on its own.

    prompt pass    all prompts as packed rows; every layer's keys and values go into a cache
    step           one row per live sequence: its last token, which sees what the cache holds of its sequence

A T5 reads its inputs once instead; what its decoder sees of them is kept, and the first step is the start token's.

Sequences of different users share a step like any other pass. The cache keeps sequences of similar length together on
a shelf, as attention on packed rows puts them into a bucket: how many places a sequence has, and how many of them a
step looks at, depends on its own length alone. Sequences that have stopped leave the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.models.attention import Packed, capped_attention, padded_length
from minipeft.models.hooks import BASE, Hooks
from minipeft.models.rows import Rows
from minipeft.randomness import generator

# (rows of each sequence in a pass [n], whose virtual tokens are among them) -> the pass's hooks. Whose: 0 the
# sequences', 1 an encoder-decoder's inputs' (Method.virtual), None nobody's.
HooksOf = Callable[[np.ndarray, int | None], Hooks]


class NotFinite(ValueError):
    """Logits that no token can be chosen by."""


@dataclass
class Shelf:
    """Keys and values of sequences of one padded length.

    members: [n] int64, their places among the rows of a step.
    width:   padded length of what was there at first. room: places in all.
    index:   [n, width] int64: which row of those at first lies where. Behind a sequence's end its last row again.
    keys, values: layer -> [n, room, H_kv, D].
    """

    members: Tensor
    width: int
    room: int
    index: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store what is there at first, rows k, v [T, H_kv, D]."""
        for kept, x in ((self.keys, k), (self.values, v)):
            kept[layer] = x.new_zeros(len(self.index), self.room, *x.shape[1:])
            kept[layer][:, : self.width] = x[self.index]

    def keep(self, chosen: Tensor) -> None:
        """Forget all members but these, by number on the shelf."""
        self.members, self.index = self.members[chosen], self.index[chosen]
        for kept in (self.keys, self.values):
            for layer, x in kept.items():
                kept[layer] = x[chosen]


@dataclass
class Cache:
    """Keys and values of n sequences, layer by layer.

    lengths: [n] int64, rows of each. longest: of them all, on the host. steps: how many came after those at first.
    """

    shelves: list[Shelf]
    lengths: Tensor
    longest: int
    steps: int = 0

    @staticmethod
    def of(lengths: np.ndarray, device: torch.device | str, steps: int = 0) -> "Cache":
        """Of packed sequences of these lengths [n], with room for so many steps."""
        on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        widths, first = padded_length(lengths), np.cumsum(lengths) - lengths
        shelves = []
        for width in np.unique(widths).tolist():
            members = np.flatnonzero(widths == width)
            index = first[members, None] + np.minimum(np.arange(width), lengths[members, None] - 1)  # [n, width]
            shelves.append(Shelf(on(members), width, _places(width, steps), on(index)))
        return Cache(shelves, on(lengths), int(lengths.max()))

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store what is there at first, rows k, v [T, H_kv, D]."""
        for shelf in self.shelves:
            shelf.put(layer, k, v)

    def step(self) -> None:
        """Every sequence gets one more row."""
        self.lengths, self.longest, self.steps = self.lengths + 1, self.longest + 1, self.steps + 1

    def ages(self) -> list[Tensor]:
        """Of each shelf, [n, 1, width] int64: how many places before the last row each lies; negative: not filled."""
        places = [torch.arange(_places(shelf.width, self.steps), device=self.lengths.device) for shelf in self.shelves]
        return [(self.lengths[shelf.members, None] - 1 - own)[:, None] for shelf, own in zip(self.shelves, places)]

    def keep(self, chosen: Tensor) -> None:
        """Forget all sequences but these."""
        place = torch.full_like(self.lengths, -1)  # of each in the next step
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        self.lengths = self.lengths[chosen]
        for shelf in self.shelves:
            shelf.members = place[shelf.members]
            if (stay := shelf.members >= 0).logical_not().any():
                shelf.keep(stay.nonzero()[:, 0])
        self.shelves = [shelf for shelf in self.shelves if len(shelf.members)]


def _places(width: int, steps: int) -> int:
    """How many places a sequence of this padded length has after so many steps."""
    return int(padded_length(np.array([width + steps]))[0])


@dataclass(frozen=True)
class Prefill:
    """Attention of the prompt pass: as the plan says, and into the cache."""

    plan: Packed
    cache: Cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
        self.cache.put(layer, k, v)
        return self.plan(layer, q, k, v, *args, **options)

    def scores_bias(self, bias_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return self.plan.scores_bias(bias_of)


class Step:
    """Attention of one new row per sequence, its last: Packed's call, cached."""

    def __init__(self, cache: Cache):
        self.cache, self.ages = cache, cache.ages()

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None,
        biases: Sequence[Tensor] | None = None, scale: float | None = None, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        last, y = self.cache.lengths - 1, torch.empty_like(q)
        for i, (shelf, ages) in enumerate(zip(self.cache.shelves, self.ages)):
            own = shelf.members
            number = torch.arange(len(own), device=own.device)
            shelf.keys[layer][number, last[own]], shelf.values[layer][number, last[own]] = k[own], v[own]
            if biases is not None:
                mask = biases[i]
            else:
                mask = (ages >= 0 if window is None else (ages >= 0) & (ages < window))[:, None]  # [n, 1, 1, width]
            y[own] = _attend(shelf, layer, q[own], mask, scale, softcap)
        return y

    def scores_bias(self, bias_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [torch.where((ages >= 0)[:, None], bias_of(ages), -torch.inf) for ages in self.ages]


class Memory:
    """Cross-attention of one new row per sequence to its input, which the cache holds: Packed's call, no k and v."""

    def __init__(self, cache: Cache):
        self.cache, self.masks = cache, [(ages >= 0)[:, None] for ages in cache.ages()]

    def __call__(self, layer: int, q: Tensor, scale: float | None = None) -> Tensor:
        y = torch.empty_like(q)
        for shelf, mask in zip(self.cache.shelves, self.masks):
            y[shelf.members] = _attend(shelf, layer, q[shelf.members], mask, scale)
        return y


def _attend(
    shelf: Shelf, layer: int, q: Tensor, mask: Tensor, scale: float | None, softcap: float | None = None
) -> Tensor:
    """q [n, H, D] of a shelf's members, mask [n, 1 or H, 1, width] over its first places -> [n, H, D]."""
    keys, values = (kept[layer][:, : mask.shape[3]].transpose(1, 2) for kept in (shelf.keys, shelf.values))
    q = q[:, :, None]  # [n, H, 1, D]
    if softcap is not None:
        return capped_attention(q, keys, values, mask, scale, softcap)[:, :, 0]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale,
                                          enable_gqa=q.shape[1] != keys.shape[1])[:, :, 0]  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest one.

    top_k: among the k likeliest. top_p: among the fewest whose probabilities reach p. A sequence's choices are a
    function of (seed, number of the sequence, step), whoever else is generated with it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError if a field makes no sense."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"generate: temperature is {self.temperature}; needed a finite number, 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k is {self.top_k}; needed at least 1, or None for no limit.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}; needed above 0 and at most 1, or None for no limit.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("generate: top_k and top_p choose among sampled tokens; give a temperature above 0.")

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits [n, vocab], draws [n] uniform in [0, 1) -> tokens [n]. ValueError if a logit is NaN or +inf."""
        largest, likeliest = logits.max(-1, keepdim=True)  # NaN where any is
        if not largest.isfinite().all():
            raise NotFinite(f"generate: the logits of {int((~largest.isfinite()).sum())} of {len(logits)} sequences "
                             "are NaN or infinite; look for such numbers in the base's weights and in the adapters, or "
                             "take a dtype with more range.")  # fmt: skip
        if self.temperature == 0:
            return likeliest[:, 0]
        scores = (logits.double() - largest) / self.temperature  # at most 0, however small the temperature
        probs, tokens = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            probs[:, self.top_k :] = 0.0
        if self.top_p is not None:  # a token stays if those before it do not reach p yet
            probs[probs.cumsum(-1) - probs >= self.top_p] = 0.0
        reached = probs.cumsum(-1)
        nth = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
        last = (probs > 0).sum(-1, keepdim=True) - 1  # rounding must not pass it
        return tokens.gather(1, nth.minimum(last))[:, 0]


GREEDY = Sampling()


@torch.no_grad()
def generate(
    model, sequences: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] | None = None,
    sampling: Sampling = GREEDY, hooks_of: HooksOf = lambda lengths, whose: BASE, virtual: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """What a decoder says after each of these sequences: its new tokens, the stop token included if it came.

    Args:
        model:     a Causal.
        sequences: prompts as token ids, none empty.
        stop:      tokens that end a sequence; None: the base's own (model.stop_tokens). Else max_new_tokens come.
        hooks_of:  called for each pass with the rows of each sequence that is still live.
        virtual:   virtual tokens before each sequence, which hooks fill in; None: none.
    Raises:
        ValueError: max_new_tokens is below 1, an option makes no sense, or a prompt with its new tokens would pass the
            base's positions.
    """
    stop, sequences = _check(max_new_tokens, sampling, model, stop), _begun(sequences, virtual)
    lengths = np.array([len(s) for s in sequences])
    limit = model.config.max_positions
    if (longest := int(lengths.max(initial=0))) + max_new_tokens - 1 > limit:
        raise ValueError(f"generate: sequence {int(lengths.argmax())} has {longest} tokens and may get "
                         f"{max_new_tokens} more, but this base has {limit} positions; shorten the text or lower "
                         "max_new_tokens.")
    rows = Rows.pack(sequences, model.device, vocab_size=model.config.vocab_size)
    cache = Cache.of(lengths, model.device, max_new_tokens - 1)
    prefill = replace(rows, attend=Prefill(rows.attend, cache))
    last = model.hidden(prefill, hooks_of(lengths, 0))[torch.from_numpy(lengths.cumsum() - 1).to(model.device)]
    logits = model.head(last, hooks_of(np.ones_like(lengths), None))

    def step(tokens: Tensor, live: np.ndarray) -> Tensor:
        cache.step()
        rows = _last_rows(tokens, cache)
        hooks = hooks_of(np.bincount(live, minlength=len(lengths)), None)
        return model.head(model.hidden(rows, hooks), hooks)

    return continue_(logits, step, cache.keep, max_new_tokens, stop, sampling)


@torch.no_grad()
def generate_from(
    model, inputs: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int] | None = None,
    sampling: Sampling = GREEDY, hooks_of: HooksOf = lambda lengths, whose: BASE, virtual: Sequence[int] | None = None,
    virtual_inputs: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """What a T5 writes for each of these inputs, without the start token. Arguments and errors as in `generate`.

    virtual: before the start token; virtual_inputs: before each input.
    """
    stop = _check(max_new_tokens, sampling, model, stop)
    read = Rows.pack(_begun(inputs, virtual_inputs), model.device, causal=False, vocab_size=model.config.vocab_size)
    hooks = hooks_of(read.lengths, 1)
    keys, n = model.cross_keys(model.encode_rows(read, hooks), hooks), len(read.lengths)
    write = Rows.pack(_begun([(model.config.start_token,)] * n, virtual), model.device)
    cache, read_cache = Cache.of(write.lengths, model.device, max_new_tokens - 1), Cache.of(read.lengths, model.device)
    prefill = replace(write, attend=Prefill(write.attend, cache))
    cross = Packed.plan(write.lengths, False, model.device, k_lengths=read.lengths)
    h = model.decode_rows(prefill, keys, cross, hooks_of(write.lengths, 0))
    last = h[torch.from_numpy(write.lengths.cumsum() - 1).to(model.device)]
    for layer, (k, v) in enumerate(keys):
        read_cache.put(layer, k, v)

    def step(tokens: Tensor, live: np.ndarray) -> Tensor:
        cache.step()
        rows = _last_rows(tokens, cache)
        hooks = hooks_of(np.bincount(live, minlength=n), None)
        return model.head(model.decode_rows(rows, [()] * len(keys), Memory(read_cache), hooks), hooks)

    def keep(chosen: Tensor) -> None:
        cache.keep(chosen)
        read_cache.keep(chosen)

    logits = model.head(last, hooks_of(np.ones_like(write.lengths), None))
    return continue_(logits, step, keep, max_new_tokens, stop, sampling)


def _last_rows(tokens: Tensor, cache: Cache) -> Rows:
    """Rows of a step: the last token of each sequence in the cache."""
    return Rows(tokens, cache.lengths - 1, Step(cache), np.ones(len(tokens), np.int64), cache.longest)


def _begun(sequences: Sequence[Sequence[int]], virtual: Sequence[int] | None) -> Sequence[Sequence[int]]:
    """Each sequence with placeholders for its virtual tokens in front."""
    if virtual is None or not any(virtual):
        return sequences
    return [(0,) * number + tuple(sequence) for sequence, number in zip(sequences, virtual, strict=True)]


def _check(max_new_tokens: int, sampling: Sampling, model, stop: Sequence[int] | None) -> set[int]:
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; needed at least 1.")
    sampling.check()
    return set(model.stop_tokens if stop is None else stop)


def continue_(
    logits: Tensor, step: Callable[[Tensor, np.ndarray], Tensor], keep: Callable[[Tensor], None], max_new_tokens: int,
    stop: set[int], sampling: Sampling,
) -> list[list[int]]:  # fmt: skip
    """The loop: choose, stop who has finished, step the others.

    Args:
        logits: [n, vocab] of the first new token.
        step:   (last tokens [m], numbers of their sequences [m]) -> logits [m, vocab] of the next ones.
        keep:   forget all sequences but these positions among those of the last step.
    """
    new: list[list[int]] = [[] for _ in logits]
    draws = torch.zeros(len(new), max_new_tokens, dtype=torch.float64, device=logits.device)
    if sampling.temperature:
        own = (generator(sampling.seed, "", "generate", number) for number in range(len(new)))
        draws.copy_(torch.from_numpy(np.stack([numbers.random(max_new_tokens) for numbers in own])))
    live = np.arange(len(new))  # numbers of the sequences in the cache; those that have stopped leave at the next turn
    for turn in range(max_new_tokens):
        tokens = sampling.choose(logits, draws[torch.from_numpy(live), turn])
        goes_on = np.ones(len(live), dtype=bool)
        for position, (number, token) in enumerate(zip(live.tolist(), tokens.tolist())):
            new[number].append(token)
            goes_on[position] = token not in stop
        if turn == max_new_tokens - 1 or not goes_on.any():
            return new
        if not goes_on.all():
            chosen = torch.from_numpy(np.flatnonzero(goes_on)).to(logits.device)
            keep(chosen)
            tokens, live = tokens[chosen], live[goes_on]
        logits = step(tokens, live)
    raise AssertionError("the last turn returns")
