"""Generation: the next token, again and again, for many sequences at once, each stopping on its own.

    prompt pass    all prompts as packed rows; every layer's keys and values go into a cache
    step           one row per live sequence: its last token, which sees what the cache holds of its sequence

A T5 reads its inputs once instead; what its decoder sees of them is kept, and the first step is the start token's.

Sequences of different users share a step like any other pass. The cache holds [n, capacity, H_kv, D] per layer;
sequences that have stopped leave it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.models.attention import Packed, capped_attention
from minipeft.models.hooks import BASE, Hooks
from minipeft.models.rows import Rows
from minipeft.randomness import generator

# (rows of each sequence in a pass [n], whose virtual tokens are among them) -> the pass's hooks. Whose: 0 the
# sequences', 1 an encoder-decoder's inputs' (Method.virtual), None nobody's.
HooksOf = Callable[[np.ndarray, int | None], Hooks]


@dataclass
class Cache:
    """Keys and values of n sequences, layer by layer: [n, capacity, H_kv, D] each, of which lengths [n] are filled."""

    capacity: int
    lengths: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, sequences: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows k, v [T, H_kv, D] of these sequences [T] at these places [T]."""
        if layer not in self.keys:
            for kept, x in ((self.keys, k), (self.values, v)):
                kept[layer] = x.new_zeros(len(self.lengths), self.capacity, *x.shape[1:])
        self.keys[layer][sequences, places] = k
        self.values[layer][sequences, places] = v

    def keep(self, chosen: Tensor) -> None:
        """Forget all sequences but these."""
        self.lengths = self.lengths[chosen]
        for kept in (self.keys, self.values):
            for layer, x in kept.items():
                kept[layer] = x[chosen]


@dataclass(frozen=True)
class Prefill:
    """Attention of the prompt pass: as the plan says, and into the cache."""

    plan: Packed
    cache: Cache
    sequences: Tensor  # [T] int64, of each row
    positions: Tensor  # [T] int64

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
        self.cache.put(layer, self.sequences, self.positions, k, v)
        return self.plan(layer, q, k, v, *args, **options)

    def scores_bias(self, bias_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return self.plan.scores_bias(bias_of)


@dataclass(frozen=True)
class Step:
    """Attention of one new row per sequence, the row at place lengths - 1 of its sequence: Packed's call, cached."""

    cache: Cache

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None,
        biases: Sequence[Tensor] | None = None, scale: float | None = None, softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        cache = self.cache
        cache.put(layer, torch.arange(len(q), device=q.device), cache.lengths - 1, k, v)
        ages = self._ages()
        keys, values = (kept[layer][:, : ages.shape[2]].transpose(1, 2) for kept in (cache.keys, cache.values))
        if biases is not None:
            mask = biases[0]
        else:
            seen = ages >= 0 if window is None else (ages >= 0) & (ages < window)
            mask = seen[:, None]  # [n, 1, 1, width]
        q = q[:, :, None]  # [n, H, 1, D]
        if softcap is not None:
            return capped_attention(q, keys, values, mask, scale, softcap)[:, :, 0]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale,
                                              enable_gqa=q.shape[1] != keys.shape[1])[:, :, 0]  # fmt: skip

    def _ages(self) -> Tensor:
        """[n, 1, width] int64: how many places before the new row each place lies; negative: not filled yet."""
        places = torch.arange(int(self.cache.lengths.max()), device=self.cache.lengths.device)
        return (self.cache.lengths[:, None] - 1 - places)[:, None]

    def scores_bias(self, bias_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        ages = self._ages()
        return [torch.where((ages >= 0)[:, None], bias_of(ages), -torch.inf)]


@dataclass
class Memory:
    """What a T5's decoder sees of n inputs, for one new row each: called like a Packed plan of cross-attention.

    keys: k and v of each layer, [n, longest, H, D] each. real: [n, 1, 1, longest] bool: which places hold a row.
    """

    keys: list[tuple[Tensor, Tensor]]
    real: Tensor

    @staticmethod
    def of(rows: Rows, keys: list[tuple[Tensor, Tensor]]) -> "Memory":
        """rows: of the inputs. keys: k and v of each layer, [T, H, D] each."""
        places, ends = np.arange(rows.longest), rows.lengths.cumsum()[:, None]
        index = ends - rows.lengths[:, None] + np.minimum(places, rows.lengths[:, None] - 1)  # [n, longest]
        index, real = (torch.from_numpy(x).to(rows.tokens.device) for x in (index, places < rows.lengths[:, None]))
        return Memory([(k[index], v[index]) for k, v in keys], real[:, None, None])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [n, H, longest, D]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=self.real, scale=scale)[:, :, 0]

    def keep(self, chosen: Tensor) -> None:
        """Forget all inputs but these."""
        self.keys, self.real = [(k[chosen], v[chosen]) for k, v in self.keys], self.real[chosen]


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
        if not self.temperature >= 0:
            raise ValueError(f"generate: temperature is {self.temperature}; needed 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k is {self.top_k}; needed at least 1, or None for no limit.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}; needed above 0 and at most 1, or None for no limit.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("generate: top_k and top_p choose among sampled tokens; give a temperature above 0.")

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """logits [n, vocab], draws [n] uniform in [0, 1) -> tokens [n]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probs, tokens = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
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
    cache = Cache(longest + max_new_tokens - 1, torch.from_numpy(lengths).to(model.device))
    of_row = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(model.device)
    prefill = Rows(rows.tokens, rows.positions, Prefill(rows.attend, cache, of_row, rows.positions), lengths, longest)
    last = model.hidden(prefill, hooks_of(lengths, 0))[torch.from_numpy(lengths.cumsum() - 1).to(model.device)]
    logits = model.head(last, hooks_of(np.ones_like(lengths), None))

    def step(tokens: Tensor, live: np.ndarray) -> Tensor:
        cache.lengths = cache.lengths + 1
        attend, ones = Step(cache), np.ones(len(tokens), np.int64)
        hooks = hooks_of(np.bincount(live, minlength=len(lengths)), None)
        rows = Rows(tokens, cache.lengths - 1, attend, ones, int(cache.lengths.max()))
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
    cache = Cache(write.longest + max_new_tokens - 1, torch.from_numpy(write.lengths).to(model.device))
    of_row = torch.from_numpy(np.repeat(np.arange(n), write.lengths)).to(model.device)
    prefill = replace(write, attend=Prefill(write.attend, cache, of_row, write.positions))
    cross = Packed.plan(write.lengths, False, model.device, k_lengths=read.lengths)
    h = model.decode_rows(prefill, keys, cross, hooks_of(write.lengths, 0))
    last = h[torch.from_numpy(write.lengths.cumsum() - 1).to(model.device)]
    memory = Memory.of(read, keys)

    def step(tokens: Tensor, live: np.ndarray) -> Tensor:
        cache.lengths = cache.lengths + 1
        ones = np.ones(len(tokens), np.int64)
        rows = Rows(tokens, cache.lengths - 1, Step(cache), ones, int(cache.lengths.max()))
        hooks = hooks_of(np.bincount(live, minlength=n), None)
        return model.head(model.decode_rows(rows, memory.keys, memory, hooks), hooks)

    def keep(chosen: Tensor) -> None:
        cache.keep(chosen)
        memory.keep(chosen)

    logits = model.head(last, hooks_of(np.ones_like(write.lengths), None))
    return continue_(logits, step, keep, max_new_tokens, stop, sampling)


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
