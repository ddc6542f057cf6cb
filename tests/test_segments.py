"""Does the batch plan cut every segment into tiles of its own, and put every row back where it was?"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft_kernels.backend import backend
from minipeft_kernels.segments import TILE, Segments

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=7)


def build(lengths, tile=TILE):
    """Segments whose slots are in another order than their rows."""
    return Segments.build([(5 * i + 3) % 11 for i in range(len(lengths))], lengths, tile=tile)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(lengths=LENGTHS, tile=st.sampled_from([1, 4, 16]))
def test_tiles_hold_one_segment_each_and_rows_undo_tiles(lengths, tile):
    segments = build(lengths, tile)
    x = torch.arange(1.0, 1 + 3 * sum(lengths)).view(-1, 3)  # [T, 3], no zero among them
    tiles = segments.tiles(x)  # [n, tile, 3]
    assert segments.num_rows == sum(lengths)
    assert tiles.shape == (sum(-(-n // tile) for n in lengths), tile, 3)
    assert torch.equal(segments.rows(tiles), x)
    expected_tiles, expected_slots, live, first = [], [], [], []
    for slot, mine in zip(segments.slots, x.split(lengths)):
        if len(mine):
            live.append(slot)
            first.append(len(expected_slots))
        for start in range(0, len(mine), tile):
            block = torch.zeros(tile, 3)  # the last tile of a segment is filled up with zeros
            block[: len(mine[start : start + tile])] = mine[start : start + tile]
            expected_tiles.append(block)
            expected_slots.append(slot)
    if expected_tiles:
        assert torch.equal(tiles, torch.stack(expected_tiles))
    assert segments.tile_slots.tolist() == expected_slots
    assert segments.live_slots.tolist() == live and segments.first_tile.tolist() == first


@settings(derandomize=True, max_examples=30, deadline=None)
@given(lengths=LENGTHS, tile=st.sampled_from([4, 16]))
def test_tiles_do_not_depend_on_the_company(lengths, tile):
    segments, x = build(lengths, tile), torch.rand(sum(lengths), 2)
    together = segments.tiles(x)
    for slot, mine in zip(segments.slots, x.split(lengths)):
        by_itself = Segments.build([slot], [len(mine)], tile=tile).tiles(mine)
        assert torch.equal(together[segments.tile_slots == int(slot)], by_itself)


def test_aligned_segments_need_no_copy():
    segments = build([32, 0, 16, 48])
    assert segments.gather is None and segments.scatter is None
    x = torch.rand(96, 5)
    tiles = segments.tiles(x)
    assert tiles.data_ptr() == x.data_ptr() and segments.rows(tiles).data_ptr() == x.data_ptr()
    assert build([32, 1]).gather is not None


def test_slots_and_starts_are_on_the_host():
    segments = build([5, 0, 17])
    assert segments.slots.tolist() == [3, 8, 2] and segments.starts.tolist() == [0, 5, 5, 22]
    assert segments.slots.dtype == segments.starts.dtype == np.int64
    assert segments.tile_slots.dtype == torch.int64


@pytest.mark.parametrize("slots, lengths, message", [
    ([0, 1, 0], [4, 4, 4], r"a slot appears twice in \[0 1 0\]; join its rows"),
    ([0, -1], [4, 4], "negative slot or length"),
    ([0, 1], [4, -4], "negative slot or length"),
    ([0, 1], [4], "2 slots but 1 lengths"),
    ([[0, 1]], [[4, 4]], "1 slots but 1 lengths"),
])  # fmt: skip
def test_plans_that_make_no_sense_are_refused(slots, lengths, message):
    with pytest.raises(ValueError, match=message):
        Segments.build(slots, lengths)


def test_a_device_without_an_implementation_is_an_error():
    assert backend("cpu") == backend(torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        backend("meta")
