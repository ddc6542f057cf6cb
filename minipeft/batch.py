"""From each user's examples to one packed batch.

    user a: [seq][seq][fill]   user b: [seq][seq][seq][fill]   ...          rows, no padding between sequences

Users lie in the order of their bank and slot. Each user's rows are filled up to a multiple of TILE with a filler
sequence (token 0, no target), so every tile of rows belongs to one user and the kernels need no gather. A filler
sees only itself, nothing reads it, and its gradient is exactly 0.

The LM head runs on the rows that are read (those that predict a target or a label), also filled up per user.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minipeft.models.rows import Rows
from minipeft_kernels.segments import TILE, Segments


@dataclass(frozen=True)
class Read:
    """A token sequence whose last `num_read` rows are read: row i predicts the token after tokens[i].

    targets: in training, the tokens that these rows shall predict; else empty.
    after:   0, or how many reads before this one is the one whose tokens stand before these: several answers to one
             question read the question's rows once.
    """

    tokens: tuple[int, ...]
    num_read: int
    targets: tuple[int, ...] = ()
    after: int = 0


@dataclass(frozen=True)
class Part:
    """One user's share of a batch: the sequences of the user in `slot` of bank number `bank`."""

    bank: int
    slot: int
    reads: Sequence[Read]

    @property
    def num_rows(self) -> int:
        """Rows it takes in a batch, filler included."""
        return filled(sum(len(read.tokens) for read in self.reads))


def filled(num_rows: int) -> int:
    """num_rows rounded up to a multiple of TILE."""
    return -(-num_rows // TILE) * TILE


@dataclass(frozen=True)
class Batch:
    """One packed batch.

    rows:      the packed sequences, fillers included.
    groups:    (bank number, first row, Segments) of each bank in the batch; its rows are consecutive.
    head_rows: [M'] int64. Rows the head runs on: each user's read rows, filled up to a multiple of TILE.
    owners:    (bank number, slot) of each part. head_lengths: each part's number of head_rows.
    read:      [M] int64. Which of head_rows is each row that was asked for: parts, sequences and rows in order.
    num_real_rows: rows that are not filler.
    """

    rows: Rows
    groups: tuple[tuple[int, int, Segments], ...]
    head_rows: Tensor
    owners: list[tuple[int, int]]
    head_lengths: list[int]
    read: Tensor
    num_real_rows: int

    def head_groups(self) -> tuple[tuple[int, int, Segments], ...]:
        """As groups, of head_rows: for bases at whose head adapters act."""
        return groups_of(self.owners, self.head_lengths, self.head_rows.device)


def pack(parts: Sequence[Part], device: torch.device | str = "cpu", causal: bool = True) -> Batch:
    """The batch of these parts, which must be sorted by (bank, slot), one part per user. causal: see Rows.pack.

    Raises:
        ValueError: not sorted, a user without rows, or a read of more rows than its sequence has.
    """
    owners = [(part.bank, part.slot) for part in parts]
    if owners != sorted(set(owners)):
        raise ValueError(f"batch.pack: parts must be sorted by bank and slot, one each; got {owners}.")
    sequences: list[Sequence[int]] = []
    prefixes: list[int] = []
    head_rows: list[int] = []
    read: list[int] = []
    lengths, head_lengths, row, num_real_rows = [], [], 0, 0
    for part in parts:
        first_row, first_head_row = row, len(head_rows)
        for sequence in part.reads:
            if sequence.num_read > len(sequence.tokens):
                raise ValueError(f"batch.pack: bank {part.bank}, slot {part.slot} reads {sequence.num_read} rows of a "
                                 f"sequence of {len(sequence.tokens)}; was its prompt empty?")
            prefixes.append(len(sequences) - sequence.after if sequence.after else -1)
            sequences.append(sequence.tokens)
            row += len(sequence.tokens)
            read.extend(range(len(head_rows), len(head_rows) + sequence.num_read))
            head_rows.extend(range(row - sequence.num_read, row))
        if row == first_row:
            raise ValueError(f"batch.pack: bank {part.bank}, slot {part.slot} has no rows; leave that user out.")
        num_real_rows += row - first_row
        filler = -(row - first_row) % TILE
        if filler:
            prefixes.append(-1)
            sequences.append((0,) * filler)
            row += filler
        head_rows.extend([first_row] * (-(len(head_rows) - first_head_row) % TILE))
        lengths.append(row - first_row)
        head_lengths.append(len(head_rows) - first_head_row)

    return Batch(
        Rows.pack(sequences, device, causal, prefixes if causal else None),
        groups_of(owners, lengths, device),
        torch.tensor(head_rows, device=device),
        owners,
        head_lengths,
        torch.tensor(read, device=device),
        num_real_rows,
    )


def groups_of(
    owners: Sequence[tuple[int, int]], lengths: Sequence[int], device: torch.device | str
) -> tuple[tuple[int, int, Segments], ...]:
    """(bank number, first row, Segments) of each bank, for users (bank, slot) with these numbers of rows."""
    groups, starts, banks = [], np.concatenate([[0], np.cumsum(lengths)]), np.array([bank for bank, _ in owners])
    for bank in dict.fromkeys(banks.tolist()):
        members = np.flatnonzero(banks == bank)
        segments = Segments.build([owners[i][1] for i in members], [lengths[i] for i in members], device)
        groups.append((bank, int(starts[members[0]]), segments))
    return tuple(groups)
