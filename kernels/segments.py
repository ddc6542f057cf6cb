"""Segments: which rows of a packed batch belong to which slot of the bank.

A batch has T rows. Segment s is rows starts[s] .. starts[s + 1] - 1, all of slot slots[s]. Rows are also cut into tiles
that start at their segment's own first row, so a tile sees one slot and its boundaries never depend on the company.
The plan is built once per batch on the host and reused by every layer: `Plan` for the kernels, in O(tiles); `Tiles`
for plain PyTorch, in O(rows), as it looks rows up one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft_kernels.backend import backend

PIECES = ((512, 512), (16, 5), (4, 2), (1, 1))  # rows of a piece on the CPU; the least rest that makes one more
TILE = 16  # rows; a batch whose segments are all multiples of it needs no gather on the CPU
BLOCKS = (16, 32, 64)  # rows of a kernel's tile; which one a kernel takes depends on its widths, never on the batch
MOST_GROUPS = 1023  # segments that one torch.nn.functional.grouped_mm takes
CHUNK = 2048  # rows of a segment whose weight gradient one program sums; longer segments are summed chunk by chunk


@dataclass(frozen=True)
class Pieces:
    """Pieces of one size, of several segments: the matrices of one batched product.

    size:   rows per piece, filled ones included.
    slots:  each piece's slot, [n]. rows: which row is in each place, piece after piece, [n * size]; a place that only
            fills a piece has that piece's first row. A slice where they follow one another, else int64.
    filled: None if no place only fills, else the other places [r], their rows [r], both int64, and 1 for them and 0 for
            the rest, [n, 1, size] fp32.
    """

    size: int
    slots: slice | Tensor
    rows: slice | Tensor
    filled: tuple[Tensor, Tensor, Tensor] | None

    def of(self, x: Tensor) -> Tensor:
        """Their rows of x [T, K]: [n, size, K], a view where the rows follow one another."""
        return take(x, self.rows).view(-1, self.size, x.shape[1])

    def zero_filled_(self, v: Tensor) -> Tensor:
        """v [n, R, size] with 0 in the places that are only there to fill, so that no sum over rows counts them."""
        return v if self.filled is None else v.mul_(self.filled[2].to(v.dtype))


def take(x: Tensor, index: slice | Tensor) -> Tensor:
    """x[index]: a view for a slice, else a copy."""
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _as_index(numbers: np.ndarray, device: torch.device | str) -> slice | Tensor:
    """The slice that is these numbers, or else they as a tensor."""
    if (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers).to(device)


@dataclass(frozen=True)
class RowGroups:
    """The segments that have rows, for products and sums on the rows where they lie. Index tensors, on the device.

    slots:       [S'] int64. Each segment's slot.
    slot_of_row: [T] int64.
    ends:        [S'] int32. Each segment's end row: `offs` of torch.nn.functional.grouped_mm.
    chunks:      [c] int64. First rows of chunks of at most TILE rows, each segment's from its own first row.
    first_chunk: [S'] int64. Each segment's first one.
    """

    slots: Tensor
    slot_of_row: Tensor
    ends: Tensor
    chunks: Tensor
    first_chunk: Tensor

    @staticmethod
    def build(slots: np.ndarray, starts: np.ndarray, device: torch.device | str) -> "RowGroups":
        live = np.diff(starts) > 0
        segment, chunks = _cut(starts, TILE)
        _, first_chunk = np.unique(segment, return_index=True)
        on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        return RowGroups(on(slots[live]), on(np.repeat(slots, np.diff(starts))),
                         on(starts[1:][live].astype(np.int32)), on(chunks), on(first_chunk))  # fmt: skip

    def sum_rows(self, x: Tensor) -> Tensor:
        """[T, D] -> [S', D], each segment's rows summed: chunk by chunk, rows and chunks in order."""
        for first in (self.chunks, self.first_chunk):
            x = F.embedding_bag(torch.arange(len(x), device=x.device), x, first, mode="sum")
        return x


@dataclass(frozen=True)
class Tiles:
    """The plan of the PyTorch path: every piece is a matrix of a batched product. Index tensors, all on the device.

    A segment is cut into pieces: as many of 512 rows as its length holds, then of 16, 4 or 1, the last of them filled
    up (PIECES). They start at the segment's own first row and depend on its own length alone.

    pieces:      those sizes that occur, in that order. If no segment is ragged, a size comes in stretches of pieces
                 that follow one another, which are views: copying rows costs more than some more products.
    order:       [p] int64: all of these pieces, one after another, in the order of their rows.
    first_piece: [S'] int64: where each segment's pieces begin in that order.
    groups:      the segments that have rows, as they are.
    ragged:      whether a segment's rows are no multiple of TILE. If none is, pieces of rows are views.
    """

    pieces: tuple[Pieces, ...]
    order: Tensor
    first_piece: Tensor
    groups: RowGroups
    ragged: bool


@dataclass(frozen=True)
class Plan:
    """The plan of the kernels: int32 tables on the device, views of one buffer that was copied there at once.

    segments: [S, 3]: first row, end row, slot of each segment.
    tiles:    block size -> [n, 2]: segment and first row of each tile of that many rows, for every size in BLOCKS.
    chunks:   [c, 4]: segment, first row, end row, part. Pieces of at most CHUNK rows, the longest first. part is -1
              where the segment is one chunk, else where to leave the chunk's sum among the num_parts partial sums.
    finals:   [f, 3]: segment, first part, end part, of each segment of several chunks: its parts are summed in order.
    slots:    [S'] int64: the slots of the segments that have rows.
    groups:   those segments, at most MOST_GROUPS at a time, for torch.nn.functional.grouped_mm: their rows, their slots
              [n] int64 and their end rows [n], counted from the first of these rows.
    """

    segments: Tensor
    tiles: dict[int, Tensor]
    chunks: Tensor
    finals: Tensor
    num_parts: int
    slots: Tensor
    groups: tuple[tuple[slice, Tensor, Tensor], ...]


@dataclass(frozen=True)
class Segments:
    """Which rows belong to which slot, and the plan of the backend that will run on them.

    slots:  [S] int64 on the host, each slot at most once. starts: [S + 1] int64 on the host.
    tiles:  the plan of the PyTorch path, or None. plan: that of the kernels, or None. One of them exists.
    """

    slots: np.ndarray
    starts: np.ndarray
    tiles: Tiles | None
    plan: Plan | None

    @staticmethod
    def build(slots: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """The plan for segments of these slots and lengths, in row order.

        Raises:
            ValueError: a slot appears twice or is negative, a length is negative, they are no whole numbers, the two
                lists differ in size, or the device has no implementation.
        """
        slots, lengths = _whole_numbers("slots", slots), _whole_numbers("lengths", lengths)
        if len(slots) != len(lengths):
            raise ValueError(f"Segments.build: {len(slots)} slots but {len(lengths)} lengths; give one per slot.")
        if len(slots) and (slots.min() < 0 or lengths.min() < 0):
            raise ValueError(f"Segments.build: negative slot or length (slots {slots}, lengths {lengths}).")
        if len(np.unique(slots)) != len(slots):
            raise ValueError(f"Segments.build: a slot appears twice in {slots}; join its rows into one segment.")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        if backend(device) == "torch":
            ragged = bool((lengths % TILE).any())
            tiles = Tiles(*_pieces(slots, starts, ragged, device), RowGroups.build(slots, starts, device), ragged)
            return Segments(slots, starts, tiles, None)
        return Segments(slots, starts, None, _plan(slots, starts, device))

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def largest_slot(self) -> int:
        """-1 where there is no segment."""
        return int(self.slots.max(initial=-1))

    def check_rows(self, op: str, x: Tensor) -> None:
        """Raises ValueError unless x is [T, ...] of the rows that the segments cover, where they were built for."""
        if x.ndim != 2 or len(x) != self.num_rows:
            raise ValueError(f"{op}: x is {tuple(x.shape)} but the segments cover {self.num_rows} rows.")
        if (backend(x.device) == "triton") != (self.plan is not None):
            raise ValueError(f"{op}: x is on {x.device} but the segments were built for another device or backend; "
                             "pass device=x.device to Segments.build.")

    def check_bank(self, op: str, num_slots: int) -> None:
        """Raises ValueError if a segment's slot is not among a bank's."""
        if self.largest_slot >= num_slots:
            raise ValueError(f"{op}: segment of slot {self.largest_slot} but the bank has {num_slots} slots.")

    @cached_property
    def slot_of_row(self) -> Tensor:
        """[T] int64 on the device: what plain PyTorch gathers by. Made there, of the plan's own tables."""
        if self.tiles is not None:
            return self.tiles.groups.slot_of_row
        start, end, slot = self.plan.segments.unbind(1)
        return torch.repeat_interleave(slot.long(), end - start, output_size=self.num_rows)

    @property
    def live_slots(self) -> Tensor:
        """[S'] int64 on the device: the slots of the segments that have rows."""
        return self.plan.slots if self.tiles is None else self.tiles.groups.slots


@dataclass(frozen=True)
class VectorRows:
    """One bank's vectors at one site, and the rows of the batch they act on: first_row .. first_row + T_g - 1.

    vectors: [U, D], slot u's own. grad_vectors: [U, D], where backward stores the gradients of slots that have rows and
    leaves other slots alone: fp32, on a CPU any floating dtype. Both views of a bank or of anything like it: any stride
    between slots.
    """

    first_row: int
    vectors: Tensor
    segments: Segments
    grad_vectors: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.segments.num_rows)


def other_rows(op: str, groups: Iterable[tuple[int, Segments]], num_rows: int) -> list[slice]:
    """The stretches of a batch's rows that belong to no group; a group is (its first row, its segments).

    Raises:
        ValueError: two groups share a row, or a group has rows that the batch has not.
    """
    others, end = [], 0
    for first_row, segments in sorted(groups, key=lambda group: (group[0], group[1].num_rows)):
        if not segments.num_rows:
            continue
        if first_row < end:
            raise ValueError(f"{op}: a group starts at row {first_row} but only rows from {end} on are free; a row can "
                             "belong to one group only.")
        others.append(slice(end, first_row))
        end = first_row + segments.num_rows
    if end > num_rows:
        raise ValueError(f"{op}: a group ends at row {end} but x has {num_rows} rows.")
    return [rows for rows in [*others, slice(end, num_rows)] if rows.start < rows.stop]


def _whole_numbers(name: str, numbers: Sequence[int]) -> np.ndarray:
    """The same as [n] int64.

    Raises:
        ValueError: they are no list, or not whole numbers.
    """
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"Segments.build: {name} must be a list of whole numbers; got {array.dtype} of shape "
                         f"{array.shape}.")
    return array.astype(np.int64)


def to_device(table: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """The same numbers on a device. A GPU gets them from pinned memory, and the host does not wait."""
    tensor = torch.as_tensor(table)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _cut(starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most `size` rows of every segment, from its own first row: their segments and first rows, [n]."""
    num_pieces = -(-np.diff(starts) // size)  # [S]
    segment = np.repeat(np.arange(len(num_pieces)), num_pieces)  # [n]
    nth = np.arange(len(segment)) - (np.cumsum(num_pieces) - num_pieces)[segment]
    return segment, starts[segment] + size * nth


def _pieces(
    slots: np.ndarray, starts: np.ndarray, ragged: bool, device: torch.device | str
) -> tuple[tuple[Pieces, ...], Tensor, Tensor]:
    """Tiles.pieces, order and first_piece."""
    pieces, segments, first_rows = [], [], []

    def add(size: int, segment: np.ndarray, first: np.ndarray, length: np.ndarray) -> None:
        real = np.arange(size) < length[:, None]  # [n, size]
        rows = first[:, None] + np.arange(size) * real
        filled = None
        if not real.all():
            filled = (np.flatnonzero(real), rows[real], real[:, None].astype(np.float32))
            filled = tuple(torch.from_numpy(table).to(device) for table in filled)
        pieces.append(Pieces(size, _as_index(slots[segment], device), _as_index(rows.ravel(), device), filled))
        segments.append(segment)
        first_rows.append(first)

    begin, end = starts[:-1], starts[1:]
    for size, least in PIECES:
        rest = (end - begin) % size
        count = (end - begin) // size + (rest >= least)  # [S]
        if count.any():
            segment = np.repeat(np.arange(len(slots)), count)  # [n]
            nth = np.arange(len(segment)) - (np.cumsum(count) - count)[segment]
            first = begin[segment] + size * nth
            length = np.minimum(size, end[segment] - first)
            cuts = [] if ragged else np.flatnonzero(np.diff(first) != size) + 1  # where neighbours end
            for stretch in zip(*(np.split(numbers, cuts) for numbers in (segment, first, length))):
                add(size, *stretch)
        begin = np.minimum(begin + size * count, end)
    if not pieces:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return (), nothing, nothing
    order = np.argsort(np.concatenate(first_rows), kind="stable")
    _, first_piece = np.unique(np.concatenate(segments)[order], return_index=True)
    return tuple(pieces), torch.from_numpy(order).to(device), torch.from_numpy(first_piece).to(device)


def _plan(slots: np.ndarray, starts: np.ndarray, device: torch.device | str) -> Plan:
    tables = [np.stack([starts[:-1], starts[1:], slots], 1)]
    tables += [np.stack(_cut(starts, block), 1) for block in BLOCKS]
    segment, first_row = _cut(starts, CHUNK)
    end_row = np.minimum(first_row + CHUNK, starts[segment + 1])
    num_chunks = np.bincount(segment, minlength=len(slots))
    several = num_chunks[segment] > 1  # [c]
    part = np.where(several, np.cumsum(several) - 1, -1)
    longest_first = np.argsort(first_row - end_row, kind="stable")
    tables.append(np.stack([segment, first_row, end_row, part], 1)[longest_first])
    cut_up = np.flatnonzero(num_chunks > 1)
    end_part = np.cumsum(num_chunks[cut_up])
    tables.append(np.stack([cut_up, end_part - num_chunks[cut_up], end_part], 1))
    live = np.flatnonzero(np.diff(starts))
    tables.append(slots[live].view(np.int32))  # each int64 as two int32
    grouped = [live[i : i + MOST_GROUPS] for i in range(0, len(live), MOST_GROUPS)]
    tables += [starts[some + 1] - starts[some[0]] for some in grouped]

    # Every table starts at a multiple of 16 bytes: Triton compiles a kernel again for a pointer that does not.
    padded = [np.pad(table.ravel(), (0, -table.size % 4)) for table in tables]
    parts = to_device(np.concatenate(padded).astype(np.int32), device).split([len(table) for table in padded])
    segments, *tables = [x[: table.size].view(table.shape) for x, table in zip(parts, tables)]
    tiles, (chunks, finals, live_slots, *ends) = tables[: len(BLOCKS)], tables[len(BLOCKS) :]
    live_slots = live_slots.view(torch.int64)
    groups = tuple((slice(int(starts[some[0]]), int(starts[some[-1] + 1])), own, own_ends) for some, own, own_ends in
                   zip(grouped, live_slots.split(MOST_GROUPS), ends))  # fmt: skip
    return Plan(segments, dict(zip(BLOCKS, tiles)), chunks, finals, int(several.sum()), live_slots, groups)
