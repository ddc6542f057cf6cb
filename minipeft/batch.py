"""From each user's examples to one packed batch.

    user a: [seq][seq][fill]   user b: [seq][seq][seq][fill]   ...          rows, no padding between sequences

Users lie in the order of their bank and slot. Each user's rows are filled up to a multiple of TILE with a filler
sequence (token 0, no target), so every tile of rows belongs to one user and the kernels need no gather. A filler
sees only itself, nothing reads it, and its gradient is exactly 0. Virtual tokens (prompts, prefixes) are rows of their
sequence like any other, in front: placeholders here, filled in where the method acts.

The LM head, and most of a decoder's last layer (models/top.py), run on the rows that are read (those that predict a
target or a label), also filled up per user. For an encoder-decoder these are target rows; its inputs are a second set
of rows, packed in the same way (`Batch.inputs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minipeft.models.attention import Packed, Spans
from minipeft.models.rows import Rows
from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segments import TILE, Segments


@dataclass(frozen=True)
class Read:
    """A token sequence whose last `num_read` rows are read: row i predicts the token after tokens[i].

    targets: in training, the tokens that these rows shall predict; else empty.
    after:   0, or how many reads before this one is the one whose tokens stand before these: several answers to one
             question read the question's rows once, and a minibatch's prompts what they all begin with.
    inputs:  what an encoder reads first; () for a base that is none, and where `after` says whose inputs they are.
    """

    tokens: tuple[int, ...]
    num_read: int
    targets: tuple[int, ...] = ()
    after: int = 0
    inputs: tuple[int, ...] = ()


def shared_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of these begin with; at most all but one of the shortest: each keeps one of its own."""
    first, last = min(prompts), max(prompts)  # in the order of their tokens: what these two begin with all do
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def after_shared(reads: Sequence[Read], num_shared: int) -> list[Read]:
    """The same reads of a decoder, their first tokens, which they share, read once: a read of its own that all go on
    from. As they are where that saves nothing."""
    if not num_shared or len(reads) == 1:
        return list(reads)
    own = [replace(read, tokens=read.tokens[num_shared:], after=1 + i) for i, read in enumerate(reads)]
    return [Read(reads[0].tokens[:num_shared], 0), *own]


@dataclass(frozen=True)
class Part:
    """One user's share of a batch: the sequences of the user in `slot` of bank number `bank`.

    virtual: virtual tokens before each sequence, and before each input (Method.virtual).
    """

    bank: int
    slot: int
    reads: Sequence[Read]
    virtual: tuple[int, int] = (0, 0)

    @property
    def num_rows(self) -> int:
        """Rows it takes in a batch, filler included."""
        own, inputs = self.virtual
        rows = filled(sum(len(read.tokens) + own * (not read.after) for read in self.reads))
        return rows + filled(sum(len(read.inputs) + inputs for read in self.reads if read.inputs))


def filled(num_rows: int) -> int:
    """num_rows rounded up to a multiple of TILE."""
    return -(-num_rows // TILE) * TILE


@dataclass(frozen=True)
class Group:
    """One bank's rows in a batch, consecutive. prompts: where its users' virtual tokens stand; None: nowhere."""

    bank: int
    first_row: int
    segments: Segments
    prompts: PromptPlan | None


@dataclass(frozen=True)
class Side:
    """Packed sequences, fillers included, and whose they are."""

    rows: Rows
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Batch:
    """One packed batch.

    rows, groups: what is read: a decoder's or encoder's sequences, or an encoder-decoder's targets.
    inputs:    an encoder-decoder's inputs, and cross: which of them each sequence of rows sees; None for other bases.
    head_rows: [M'] int64. Rows the head runs on: each user's read rows, filled up to a multiple of TILE.
    head_attend: attention of head_rows to all rows, where a decoder's last layer runs on them; None for other bases,
        and where no row is read.
    owners:    (bank number, slot) of each part. head_lengths: each part's number of head_rows.
    read:      [M] int64. Which of head_rows is each row that was asked for: parts, sequences and rows in order.
    num_rows:  rows in all. num_real_rows: those that are not filler.
    """

    rows: Rows
    groups: tuple[Group, ...]
    inputs: Side | None
    cross: Packed | None
    head_rows: Tensor
    head_attend: Packed | None
    owners: list[tuple[int, int]]
    head_lengths: list[int]
    read: Tensor
    num_rows: int
    num_real_rows: int

    def head_groups(self) -> tuple[Group, ...]:
        """As groups, of head_rows."""
        return groups_of(self.owners, self.head_lengths, self.head_rows.device)


class _Packer:
    """Sequences of one side of a batch, part after part."""

    def __init__(self):
        self.sequences: list[Sequence[int]] = []
        self.prefixes: list[int] = []
        self.virtual: list[int] = []
        self.first_rows: list[int] = []
        self.reads: list[tuple[int, int, int]] = []  # a sequence's number, its first of the head's rows and how many
        self.lengths: list[int] = []  # rows of each part
        self.num_rows = self.num_filler = 0

    def add(self, tokens: Sequence[int], virtual: int = 0, prefix: int = -1) -> int:
        """One more sequence after `virtual` virtual tokens. Returns its number."""
        self.sequences.append((0,) * virtual + tuple(tokens) if virtual else tokens)
        self.prefixes.append(prefix)
        self.virtual.append(virtual)
        self.first_rows.append(self.num_rows)
        self.num_rows += len(tokens) + virtual
        return len(self.sequences) - 1

    def end_part(self) -> None:
        """Fill up."""
        filler = -self.num_rows % TILE
        self.num_filler += filler
        if filler:
            self.add((0,) * filler)
        self.lengths.append(self.num_rows - sum(self.lengths))

    def side(self, owners: Sequence[tuple[int, int]], device: torch.device | str, causal: bool) -> Side:
        rows = Rows.pack(self.sequences, device, causal, self.prefixes if causal else None, virtual=self.virtual)
        ends = np.cumsum(self.lengths)
        part = np.searchsorted(ends, self.first_rows, side="right")  # of each sequence
        return Side(rows, groups_of(owners, self.lengths, device, (part, self.first_rows, self.virtual)))

    def head_attend(self, num_head_rows: int, device: torch.device | str) -> Packed:
        """Attention of the rows that the head runs on."""
        number, first_head_row, num_read = np.array([read for read in self.reads if read[2]]).T
        first, prefix = np.array(self.first_rows), np.array(self.prefixes)[number]
        lengths = np.array([len(sequence) for sequence in self.sequences])
        before = Spans(np.where(prefix < 0, 0, first[prefix]), np.where(prefix < 0, 0, lengths[prefix]))
        return Packed.of_last(Spans(first_head_row, num_read), num_head_rows, Spans(first[number], lengths[number]),
                              self.num_rows, before, device)  # fmt: skip


def pack(parts: Sequence[Part], device: torch.device | str = "cpu", causal: bool = True) -> Batch:
    """The batch of these parts, which must be sorted by (bank, slot), one part per user. causal: see Rows.pack.

    Raises:
        ValueError: not sorted, a user without rows, or a read of more rows than its sequence has.
    """
    owners = [(part.bank, part.slot) for part in parts]
    if owners != sorted(set(owners)):
        raise ValueError(f"batch.pack: parts must be sorted by bank and slot, one each; got {owners}.")
    own, inputs = _Packer(), _Packer()
    sees: list[int] = []  # which input each sequence sees; -1: a filler, which sees a filler or itself
    head_rows: list[int] = []
    read: list[int] = []
    head_lengths: list[int] = []
    for part in parts:
        first_row, first_head_row = own.num_rows, len(head_rows)
        for sequence in part.reads:
            if sequence.num_read > len(sequence.tokens):
                raise ValueError(f"batch.pack: bank {part.bank}, slot {part.slot} reads {sequence.num_read} rows of a "
                                 f"sequence of {len(sequence.tokens)}; was its prompt empty?")
            if sequence.after:
                before = len(own.sequences) - sequence.after
                own.add(sequence.tokens, 0, before)
                sees.append(sees[before])
            else:
                own.add(sequence.tokens, part.virtual[0])
                sees.append(inputs.add(sequence.inputs, part.virtual[1]) if sequence.inputs else -1)
            own.reads.append((len(own.sequences) - 1, len(head_rows), sequence.num_read))
            read.extend(range(len(head_rows), len(head_rows) + sequence.num_read))
            head_rows.extend(range(own.num_rows - sequence.num_read, own.num_rows))
        if own.num_rows == first_row:
            raise ValueError(f"batch.pack: bank {part.bank}, slot {part.slot} has no rows; leave that user out.")
        own.end_part()
        inputs.end_part()
        sees.extend([len(inputs.sequences) - 1] * (len(own.sequences) - len(sees)))  # a filler's gradient is 0
        head_rows.extend([first_row] * (-(len(head_rows) - first_head_row) % TILE))
        head_lengths.append(len(head_rows) - first_head_row)

    target, source, cross = own.side(owners, device, causal), None, None
    if inputs.sequences:
        source = inputs.side(owners, device, causal=False)
        cross = Packed.plan(target.rows.lengths, False, device, k_lengths=source.rows.lengths, sees=np.array(sees))
    num_rows = own.num_rows + inputs.num_rows
    return Batch(
        target.rows,
        target.groups,
        source,
        cross,
        torch.tensor(head_rows, device=device),
        own.head_attend(len(head_rows), device) if causal and head_rows and not inputs.sequences else None,
        owners,
        head_lengths,
        torch.tensor(read, device=device),
        num_rows,
        num_rows - own.num_filler - inputs.num_filler,
    )


def groups_of(
    owners: Sequence[tuple[int, int]], lengths: Sequence[int], device: torch.device | str,
    sequences: tuple[np.ndarray, Sequence[int], Sequence[int]] | None = None,
) -> tuple[Group, ...]:  # fmt: skip
    """The groups of users (bank, slot) with these numbers of rows.

    sequences: of each sequence its user's number, its first row and its virtual tokens; None: no virtual tokens.
    """
    groups, starts, banks = [], np.concatenate([[0], np.cumsum(lengths)]), np.array([bank for bank, _ in owners])
    user, first_rows, virtual = (np.array(x) for x in sequences or ([], [], []))
    for bank in dict.fromkeys(banks.tolist()):
        members = np.flatnonzero(banks == bank)
        segments = Segments.build([owners[i][1] for i in members], [lengths[i] for i in members], device)
        mine = np.flatnonzero((banks[user] == bank) & (virtual > 0)) if len(user) else user
        slots = [owners[user[i]][1] for i in mine]
        prompts = PromptPlan.build(slots, first_rows[mine], virtual[mine], device) if len(mine) else None
        groups.append(Group(bank, int(starts[members[0]]), segments, prompts))
    return tuple(groups)
