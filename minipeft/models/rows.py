"""Packed rows: many sequences of different lengths laid end to end, without padding.

A pass has T rows (tokens). Everything in a base treats rows one by one, except attention, which must know which rows
belong together: `Rows` carries the plan for that (attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipeft.models.attention import Packed


@dataclass(frozen=True)
class Rows:
    """Sequences as packed rows, one after another in the order given.

    tokens:    [T] int64.
    positions: [T] int64, counting from 0 in each sequence, or from where its prefix ends.
    attend:    who sees whom, and attention among them.
    lengths:   rows of each sequence, on the host.
    longest:   positions of the longest sequence, its prefix included.
    virtual:   how many rows at the start of each sequence are virtual tokens and no text, on the host; None: none.
    """

    tokens: Tensor
    positions: Tensor
    attend: Packed
    lengths: np.ndarray
    longest: int
    virtual: np.ndarray | None = None

    @staticmethod
    def pack(
        sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", causal: bool = True,
        prefixes: Sequence[int] | None = None, vocab_size: int | None = None,
        virtual: Sequence[int] | None = None,
    ) -> "Rows":  # fmt: skip
        """Rows of these token id lists, in the order given. Empty sequences are an error: they have no row.

        Args:
            causal:   each row sees its sequence up to itself (a decoder); otherwise all of it (an encoder).
            prefixes: for each sequence the number of another that it goes on from, as if that one stood before it, or
                      -1. The other has no prefix itself.
            virtual:  see above; their tokens, whatever they are, are read by nobody.
            vocab_size: token ids must be below it; None: not looked at.
        Raises:
            ValueError: no sequence, an empty one, or ids that are no tokens.
        """
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        if len(lengths) == 0 or lengths.min() == 0:
            raise ValueError("Rows.pack: needs at least one sequence and no empty one; drop empty sequences before.")
        tokens = np.concatenate([np.asarray(s) for s in sequences])
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"Rows.pack: token ids are {tokens.dtype}; needed whole numbers.")
        if vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise ValueError(f"Rows.pack: token ids from {tokens.min()} to {tokens.max()}, but this base's are 0 to "
                             f"{vocab_size - 1}. Use the tokenizer that came with it.")  # fmt: skip
        tokens = tokens.astype(np.int64)
        starts, shared, before = np.cumsum(lengths) - lengths, None, np.zeros_like(lengths)
        if prefixes is not None and max(prefixes) >= 0:
            prefixes = np.asarray(prefixes)
            assert causal and (prefixes[prefixes[prefixes >= 0]] < 0).all(), "a prefix has no prefix"
            before = np.where(prefixes < 0, 0, lengths[prefixes])
            shared = np.where(prefixes < 0, 0, starts[prefixes]), before
        positions = np.arange(len(tokens)) - np.repeat(starts - before, lengths)
        as_tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        return Rows(as_tensor(tokens), as_tensor(positions), Packed.plan(lengths, causal, device, shared=shared),
                    lengths, int((before + lengths).max()),
                    None if virtual is None or not any(virtual) else np.asarray(virtual))  # fmt: skip

    def split(self, x: Tensor) -> list[Tensor]:
        """x [T, ...] -> each sequence's own rows."""
        return list(x.split(self.lengths.tolist()))
