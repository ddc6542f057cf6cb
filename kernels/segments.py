"""Segments: which rows of a packed batch belong to which slot of the bank.

A batch has T rows. Segment s is rows starts[s] .. starts[s + 1] - 1, all of slot slots[s]. Rows are also cut into
tiles of `tile` rows that start at their segment's own first row, so a tile sees one slot and its boundaries never
depend on the company. The plan is built once per batch on the host and reused by every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE = 16  # rows; a batch whose segments are all multiples of it needs no gather (see `aligned`)


@dataclass(frozen=True)
class Segments:
    """The batch plan. Host arrays for the reference's loop, device tensors for everyone else.

    slots:      [S] int64 on the host, each slot at most once.
    starts:     [S + 1] int64 on the host.
    tile:       rows per tile.
    tile_slots: [n] int64 on the device. Which slot each tile belongs to.
    live_slots: [S'] int64 on the device. Slots of the segments that have rows, in row order.
    first_tile: [S'] int64 on the device. The first tile of each of those; a segment's tiles are consecutive.
    gather:     [n * tile] int64 on the device, row of each place of each tile, T where there is none; None if aligned.
    scatter:    [T] int64 on the device, place of each row; None if aligned.
    """

    slots: np.ndarray
    starts: np.ndarray
    tile: int
    tile_slots: Tensor
    first_tile: Tensor
    live_slots: Tensor
    gather: Tensor | None
    scatter: Tensor | None

    @staticmethod
    def build(
        slots: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu", tile: int = TILE
    ) -> "Segments":
        """The plan for segments of these slots and lengths, in row order.

        Raises:
            ValueError: a slot appears twice or is negative, a length is negative, or the two lists differ in size.
        """
        slots, lengths = np.asarray(slots, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        if slots.shape != lengths.shape or slots.ndim != 1:
            raise ValueError(f"Segments.build: {len(slots)} slots but {len(lengths)} lengths; give one per slot.")
        if len(slots) and (slots.min() < 0 or lengths.min() < 0):
            raise ValueError(f"Segments.build: negative slot or length (slots {slots}, lengths {lengths}).")
        if len(np.unique(slots)) != len(slots):
            raise ValueError(f"Segments.build: a slot appears twice in {slots}; join its rows into one segment.")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        num_tiles = -(-lengths // tile)  # [S]
        first_tile = np.cumsum(num_tiles) - num_tiles  # [S]
        tile_segment = np.repeat(np.arange(len(slots)), num_tiles)  # [n]

        gather = scatter = None
        if (lengths % tile).any():
            first_row = starts[tile_segment] + tile * (np.arange(len(tile_segment)) - first_tile[tile_segment])  # [n]
            rows = first_row[:, None] + np.arange(tile)  # [n, tile]
            real = rows < starts[tile_segment + 1][:, None]
            gather = np.where(real, rows, starts[-1]).ravel()
            scatter = np.flatnonzero(real.ravel())
        live = lengths > 0
        on_device = lambda a: None if a is None else torch.from_numpy(a).to(device)  # noqa: E731
        return Segments(slots, starts, tile, on_device(slots[tile_segment]), on_device(first_tile[live]),
                        on_device(slots[live]), on_device(gather), on_device(scatter))

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def tiles(self, x: Tensor) -> Tensor:
        """Rows [T, K] -> tiles [n, tile, K]: a view if all segments are multiples of the tile, else a padded copy."""
        if self.gather is not None:
            x = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, self.gather)
        return x.view(-1, self.tile, x.shape[-1])

    def rows(self, tiles: Tensor) -> Tensor:
        """Tiles [n, tile, N] -> rows [T, N]: undoes `tiles`."""
        rows = tiles.reshape(-1, tiles.shape[-1])
        return rows if self.scatter is None else rows.index_select(0, self.scatter)
