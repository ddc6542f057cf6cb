"""What all decoders have in common: the three plain functions for people, and how the engine calls them."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.models.generate import Sampling, generate
from minipeft.models.hooks import BASE, Hooks, Sites
from minipeft.models.rows import Rows
from minipeft.models.top import Top


class Causal(Sites, nn.Module):
    """A frozen decoder on packed rows: `read`, then `head` at the rows that are read.

    A subclass sets, besides its weights:

    config:  with vocab_size, width, num_layers and max_positions.
    embed:   the token embedding. head_linear: hidden states -> logits, site "head".
    stop_tokens: what ends a text, as the checkpoint's folder says.
    """

    causal = True
    recompute = False  # see recompute.py
    stop_tokens: tuple[int, ...] = ()

    def read(self, rows: Rows, top: Top, hooks: Hooks = BASE) -> Tensor:
        """Last hidden states after the final norm, of top's rows [n, width], dtype of the weights.

        Raises:
            InputError: a sequence is longer than the base has positions.
        """
        raise NotImplementedError

    def hidden(self, rows: Rows, hooks: Hooks = BASE) -> Tensor:
        """Those of all rows: [T, width]."""
        return self.read(rows, Top.all(rows, hooks), hooks)

    def layers_to(self, top: Top, rows: Rows, hooks: Hooks) -> Iterator[tuple[nn.Module, Top]]:
        """Each layer, and what it hands on: all rows, the last one top's."""
        *lower, last = self.layers
        whole = Top.all(rows, hooks)
        return chain(((layer, whole) for layer in lower), [(last, top)])

    def head(self, h: Tensor, hooks: Hooks = BASE) -> Tensor:
        """Hidden states of chosen rows [rows, width] -> logits [rows, vocab_size]."""
        return self.head_linear(h, hooks)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of token ids -> for each the logits [its length, vocab_size]; row i predicts token i + 1."""
        rows = Rows.pack(sequences, self.device, vocab_size=self.config.vocab_size)
        return rows.split(self.head(self.hidden(rows)))

    @torch.no_grad()
    def encode(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Lists of token ids -> for each its last hidden states [its length, width]."""
        rows = Rows.pack(sequences, self.device, vocab_size=self.config.vocab_size)
        return rows.split(self.hidden(rows))

    def generate(
        self, sequences: Sequence[Sequence[int]], max_new_tokens: int, *, stop: Sequence[int] | None = None,
        temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Lists of token ids -> what comes after each: its new tokens, see generate.py. temperature 0 is greedy."""
        return generate(self, sequences, max_new_tokens, stop, Sampling(temperature, top_k, top_p, seed))


def check_lengths(rows: Rows, max_positions: int) -> None:
    """No sequence is longer than the base has positions, or ValueError. Nothing is ever cut here."""
    if rows.longest > max_positions:
        ends = rows.positions[torch.from_numpy(rows.lengths.cumsum() - 1)] + 1  # [n], prefixes included
        sizes = enumerate(zip(ends.tolist(), rows.lengths.tolist()))
        long = [f"number {i} has {n} tokens{' with its prefix' if n > own else ''}"
                for i, (n, own) in sizes if n > max_positions]  # fmt: skip
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise InputError(f"sequences are too long: {', '.join(long[:3])}{more} but this base has {max_positions} "
                         "positions; shorten the texts or choose a base with more.")  # fmt: skip
