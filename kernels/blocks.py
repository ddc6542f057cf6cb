"""Blocks of a matrix inside a kernel: which rows a program has, and loads that read only what exists.

A program that works on rows looks up its tile in the batch plan (segments.py), so it sees one user:

    tile -> (segment, first row)      segment -> (start, end, slot)      slot -> the user's rows of the bank
"""

from minipeft_kernels.dtypes import jit, operand, padded, tl

MOST_RANKS = 256  # rank rows, of all sites, that a program takes: as many as tests/test_aot.py compiles


@jit
def my_rows(tiles_ptr, segments_ptr, BLOCK_T: tl.constexpr):
    """Rows of this program's tile: (segment, rows [BLOCK_T] int64, row_ok [BLOCK_T], position in the segment, slot)."""
    tile = tl.program_id(0)
    segment = tl.load(tiles_ptr + 2 * tile)
    rows = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_T)
    row_ok = rows < tl.load(segments_ptr + 3 * segment + 1)
    positions = rows - tl.load(segments_ptr + 3 * segment)
    slot = tl.load(segments_ptr + 3 * segment + 2).to(tl.int64)
    return segment, rows.to(tl.int64), row_ok, positions, slot  # int64: rows * width may pass 2**31


@jit
def my_ranks(ranks_ptr, slot, R: tl.constexpr, M: tl.constexpr):
    """Rank rows of M sites, R each, padded to a power of two: (ranks, which of them this slot uses)."""
    RANKS: tl.constexpr = padded(M * R)
    ranks = tl.arange(0, RANKS)
    used = ranks < M * R
    if ranks_ptr is not None:
        used = used & (ranks % R < tl.load(ranks_ptr + slot))
    return ranks, used


@jit
def load_block(ptr, rows, row_ok, stride, first_col, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first_col .. first_col + BLOCK - 1 of these rows, as an operand; 0, unread, where row or column is not.

    A width that is a multiple of BLOCK has no columns to mask: then the mask is constant along a row and loads are
    16 bytes wide.
    """
    cols = first_col + tl.arange(0, BLOCK)
    ok = row_ok[:, None]
    if WIDTH % BLOCK != 0:
        ok = ok & (cols < WIDTH)[None, :]
    return operand(tl.load(ptr + rows[:, None] * stride + cols[None, :], ok, other=0.0))
