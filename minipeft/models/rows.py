"""Packed rows: many sequences of different lengths laid end to end, without padding.

A pass has T rows (tokens). Everything in a base treats rows one by one, except attention, which must know which rows
belong together: `Rows` carries the plan for that (attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.attention import Packed
from minipeft.models.fields import shown


def joined(sequences: Sequence[Sequence[int]], what: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids, none empty -> all of them end to end [T] int64, and the lists' lengths [n] int64.

    Args:
        what: what the ids are, for messages. size: they must be below it; None: not looked at.
    Raises:
        InputError: no list, an empty one, something else than a list of whole numbers, or an id out of range.
    """
    arrays = []
    for i, sequence in enumerate(sequences):
        try:
            array = np.asarray(sequence)
        except ValueError:  # lists of unlike lengths in it
            array = None
        if array is None or array.ndim != 1:
            raise InputError(f"{what}: number {i} is {shown(sequence)}; needed a list of lists of ids, as "
                             "[[5, 8, 2], [7]]: one for each sequence.")  # fmt: skip
        arrays.append(array)
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise InputError(f"{what}: needed at least one sequence and no empty one; drop empty sequences before.")
    ids = np.concatenate(arrays)
    if ids.dtype.kind not in "iu":
        raise InputError(f"{what} are {ids.dtype}; needed whole numbers.")
    if size is not None and not 0 <= ids.min() <= ids.max() < size:
        raise InputError(f"{what} from {ids.min()} to {ids.max()}, but this base's are 0 to {size - 1}. Use the "
                         "tokenizer that came with it.")  # fmt: skip
    return ids.astype(np.int64), lengths


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
            InputError: see `joined`.
        """
        tokens, lengths = joined(sequences, "token ids", vocab_size)
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
