"""Does the batch plan cut every segment into tiles of its own, and put every row back where it was?"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minipeft_kernels.backend
import minipeft_kernels.segments as segments_module
from minipeft_kernels.backend import backend
from minipeft_kernels.cpu import expand_rows_
from minipeft_kernels.segments import BLOCKS, TILE, Segments

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=7)


def build(lengths, tile=TILE):
    """Segments whose slots are in another order than their rows."""
    return Segments.build([(5 * i + 3) % 11 for i in range(len(lengths))], lengths, tile=tile)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(lengths=LENGTHS, tile=st.sampled_from([1, 4, 16]))
def test_tiles_hold_one_segment_each_and_rows_undo_tiles(lengths, tile):
    segments = build(lengths, tile)
    x = torch.arange(1.0, 1 + 3 * sum(lengths)).view(-1, 3)  # [T, 3], no zero among them
    tiles = segments.tiles.cut(x)  # [n, tile, 3]
    assert segments.num_rows == sum(lengths)
    assert tiles.shape == (sum(-(-n // tile) for n in lengths), tile, 3)
    assert torch.equal(segments.tiles.join(tiles), x)
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
    assert segments.tiles.tile_slots.tolist() == expected_slots
    assert segments.tiles.live_slots.tolist() == live and segments.tiles.first_tile.tolist() == first


@settings(derandomize=True, max_examples=30, deadline=None)
@given(lengths=LENGTHS, tile=st.sampled_from([4, 16]))
def test_tiles_do_not_depend_on_the_company(lengths, tile):
    segments, x = build(lengths, tile), torch.rand(sum(lengths), 2)
    together = segments.tiles.cut(x)
    for slot, mine in zip(segments.slots, x.split(lengths)):
        by_itself = Segments.build([slot], [len(mine)], tile=tile).tiles.cut(mine)
        assert torch.equal(together[segments.tiles.tile_slots == int(slot)], by_itself)


def test_aligned_segments_need_no_copy():
    segments = build([32, 0, 16, 48])
    assert segments.tiles.gather is None and segments.tiles.scatter is None
    x = torch.rand(96, 5)
    tiles = segments.tiles.cut(x)
    assert tiles.data_ptr() == x.data_ptr() and segments.tiles.join(tiles).data_ptr() == x.data_ptr()
    assert build([32, 1]).tiles.gather is not None


def test_slots_and_starts_are_on_the_host():
    segments = build([5, 0, 17])
    assert segments.slots.tolist() == [3, 8, 2] and segments.starts.tolist() == [0, 5, 5, 22]
    assert segments.slots.dtype == segments.starts.dtype == np.int64
    assert segments.tiles.tile_slots.dtype == torch.int64


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


def interpreter_plan(monkeypatch, lengths, chunk=2048):
    monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", True)
    monkeypatch.setattr(segments_module, "CHUNK", chunk)
    segments = build(lengths)
    assert segments.tiles is None
    return segments, segments.plan


@settings(derandomize=True, max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(lengths=LENGTHS)
def test_kernel_tiles_cover_every_row_once_from_the_segments_own_start(monkeypatch, lengths):
    segments, plan = interpreter_plan(monkeypatch, lengths)
    starts, ends, slots = plan.segments.T.tolist()
    assert starts == segments.starts[:-1].tolist() and ends == segments.starts[1:].tolist()
    assert slots == segments.slots.tolist() and plan.segments.dtype == torch.int32
    for block in BLOCKS:
        rows = []
        for segment, first_row in plan.tiles[block].tolist():
            assert (first_row - starts[segment]) % block == 0
            rows += range(first_row, min(first_row + block, ends[segment]))
        assert rows == list(range(segments.num_rows))


@settings(derandomize=True, max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(lengths=LENGTHS, chunk=st.sampled_from([1, 16, 50]))
def test_kernel_chunks_cover_every_row_once_and_parts_are_summed_in_row_order(monkeypatch, lengths, chunk):
    _, plan = interpreter_plan(monkeypatch, lengths, chunk)
    chunks = plan.chunks.tolist()
    sizes = [end - first for _, first, end, _ in chunks]
    assert sizes == sorted(sizes, reverse=True) and all(0 < size <= chunk for size in sizes)
    rows_of = {segment: [] for segment in range(len(lengths))}
    whole = [segment for segment, *_, part in chunks if part < 0]
    for segment, first, end, part in chunks:
        if part < 0:
            rows_of[segment] += range(first, end)
    part_of = {part: (segment, first, end) for segment, first, end, part in chunks if part >= 0}
    assert sorted(part_of) == list(range(plan.num_parts))
    for segment, first_part, end_part in plan.finals.tolist():
        assert segment not in whole and end_part - first_part > 1
        for part in range(first_part, end_part):
            assert part_of[part][0] == segment
            rows_of[segment] += range(*part_of[part][1:])
    for segment, (start, end, _) in enumerate(plan.segments.tolist()):
        assert rows_of[segment] == list(range(start, end))


def test_the_backend_is_a_function_of_the_device_and_the_interpreter(monkeypatch):
    assert backend("cpu") == backend(torch.device("cpu")) == "torch"
    monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", True)
    assert backend("cpu") == "triton"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 runs kernels on the CPU; unset it"):
        backend("cuda")
    monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this PyTorch sees no GPU; use the CPU, or install"):
        backend("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend("cuda:1") == "triton"
    monkeypatch.setattr(minipeft_kernels.backend, "triton", None)
    with pytest.raises(ValueError, match="a GPU needs Triton, which is not installed; pip install triton"):
        backend("cuda")
    assert backend("cpu") == "torch"
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        backend("meta")


@pytest.mark.parametrize("interpret, expected", [("0", "torch"), ("1", "triton")])
def test_the_environment_chooses_the_interpreter(interpret, expected):
    code = "from minipeft_kernels.backend import backend; print(backend('cpu'))"
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": interpret},
                         capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert out.strip() == expected


def test_without_triton_everything_imports_and_runs_on_pytorch():
    """As on macOS, for which there is no Triton."""
    code = ("import sys; sys.modules['triton'] = None; import minipeft.engine\n"
            "from minipeft_kernels.backend import backend; print(backend('cpu'))")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_a_row_does_not_depend_on_whether_the_rows_follow_one_another(dtype):
    draw = torch.Generator().manual_seed(0)
    y, v, Bt = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((608, 24), (6, 8, 16), (6, 8, 24)))
    pieces = Segments.build([4, 0, 2], [32, 528, 48]).tiles.pieces[1]
    assert pieces.size == 16 and not isinstance(pieces.rows, slice)
    alone = Segments.build([0], [96]).tiles.pieces[0]
    assert isinstance(alone.rows, slice)
    own, rows = y[pieces.rows].clone(), y.clone()
    expand_rows_(own, alone, v, Bt, beta=1)
    expand_rows_(rows, pieces, v, Bt, beta=1)
    assert torch.equal(rows[pieces.rows], own)
