"""Does a decoder's last layer, computed at the rows that are read alone, give what it gives computed whole?"""

import copy

import numpy as np
import pytest
import torch
from test_recompute import BASES, fill

from minipeft.batch import TILE, Part, Read, after_shared, pack
from minipeft.models.causal import Causal
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.hooks import Hooks
from minipeft.models.top import Top


class Embedded(Hooks):
    """Keeps the embedded tokens, for their gradient."""

    def embed(self, x, tokens, scale=None):
        self.x = super().embed(x, tokens, scale).requires_grad_()
        return self.x


def batch_of(seed=0):
    """Users who read one token of each prompt, or some, or all; whose prompts share a beginning, or go on in several
    ways; and one with a single token."""
    rng = np.random.default_rng(seed)

    def reads(number, num_read, longest=20):
        texts = [tuple(rng.integers(3, 60, rng.integers(num_read, longest)).tolist()) for _ in range(number)]
        return [Read(text, num_read) for text in texts]

    beginning = tuple(range(20, 32))
    shared = [Read(beginning + read.tokens, 2) for read in reads(3, 2)]
    several = [*reads(1, 1), Read((7, 8), 2, after=1), Read((9,), 1, after=2)]
    ones = [Read((5,), 1)]
    return pack([Part(0, u, own) for u, own in enumerate((reads(5, 1), after_shared(shared, 12), several, ones,
                                                          reads(2, 4), reads(1, 1, 70)))])  # fmt: skip


BASES_HERE = {name: base for name, base in BASES.items() if isinstance(base, Causal)} | {
    "one query a key": fill(Decoder(DecoderConfig(60, 32, 3, 4, 4, 8, 48)))}  # fmt: skip


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("name", BASES_HERE)
def test_what_is_read_and_its_gradient_are_those_of_the_whole_layer(name, window):
    """With a short window too, where rows that only fill a bucket lie past all keys."""
    model, batch, found = copy.deepcopy(BASES_HERE[name]).double(), batch_of(), []
    for layer in model.layers:
        if hasattr(layer.attn, "window"):
            layer.attn.window = window
    for few in (True, False):
        hooks = Embedded()
        if few:
            h = model.read(batch.rows, Top(batch.head_rows, batch.head_attend, hooks), hooks)
        else:
            h = model.hidden(batch.rows, hooks).index_select(0, batch.head_rows)
        pull = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=h.dtype)
        (h * pull).index_select(0, batch.read).sum().backward()
        found.append((h.index_select(0, batch.read), hooks.x.grad))
    for one, other in zip(*found):
        assert one.abs().max() > 0.1 and (one - other).abs().max() < 1e-12


def test_poison_in_one_users_rows_reaches_nobody_else():
    """Nor rows that only fill: what they make is multiplied by a gradient of 0, which leaves NaN as it is."""
    model, batch = BASES["decoder"], batch_of()
    hooks, ends = Embedded(), np.cumsum(batch.head_lengths)
    poisoned = torch.arange(len(batch.rows.tokens)) < batch.groups[0].segments.starts[1]

    class Poisoned(Embedded):
        def embed(self, x, tokens, scale=None):
            return super().embed(torch.where(poisoned[:, None], torch.nan, x), tokens, scale)

    hooks = Poisoned()
    h = model.read(batch.rows, Top(batch.head_rows, batch.head_attend, hooks), hooks)
    assert h[: ends[0]].isnan().all() and not h[ends[0] :].isnan().any()
    h.nansum().backward()
    assert not hooks.x.grad[~poisoned].isnan().any()


def test_rows_that_fill_get_no_attention_and_give_no_gradient():
    batch = batch_of()
    attend, num = batch.head_attend, len(batch.head_rows)
    fills = torch.ones(num, dtype=torch.bool)
    fills[batch.read] = False
    assert fills.any() and num % TILE == 0
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 8, generator=draw).requires_grad_() for n in (num, *[len(batch.rows.tokens)] * 2))
    y = attend(0, q, k, v)
    y.sum().backward()
    assert not y[fills].any() and y[~fills].any(-1).all()
    assert not q.grad[fills].any()
    seen = v.grad.flatten(1).any(1)  # by rows that are read: not what fills users up
    filler = torch.cat([torch.full((n,), bool(n < TILE) and not len(set(own.tolist())) > 1) for n, own in
                        zip(batch.rows.lengths, batch.rows.tokens.split(batch.rows.lengths.tolist()))])  # fmt: skip
    assert (seen | filler).all() and not seen[batch.rows.tokens == 0].any()


def test_a_batch_that_reads_nothing_has_no_last_rows():
    batch = pack([Part(0, 0, [Read((1, 2), 0)])])
    assert batch.head_attend is None and len(batch.head_rows) == len(batch.read) == 0
