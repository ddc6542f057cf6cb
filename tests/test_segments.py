"""Does the batch plan cut every segment into pieces and tiles of its own, every row once?"""

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
from minipeft_kernels.segments import BLOCKS, Segments

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=7)


def build(lengths):
    """Segments whose slots are in another order than their rows."""
    return Segments.build([(5 * i + 3) % 11 for i in range(len(lengths))], lengths)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(0, 70) | st.integers(500, 1100), min_size=1, max_size=7))
def test_pieces_hold_one_segment_each_and_every_row_once(lengths):
    segments, T = build(lengths), sum(lengths)
    tiles, seen, of_piece = segments.tiles, [], []
    for pieces in tiles.pieces:
        rows, slots = (torch.arange(end)[index] for end, index in ((T, pieces.rows), (11, pieces.slots)))
        rows = rows.view(-1, pieces.size)
        real = torch.ones_like(rows, dtype=torch.bool) if pieces.filled is None else pieces.filled[2][:, 0] > 0
        if pieces.filled is not None:
            assert torch.equal(pieces.filled[0], real.flatten().nonzero()[:, 0])
            assert torch.equal(pieces.filled[1], rows[real])
        for slot, own, ok in zip(slots.tolist(), rows, real):
            s = segments.slots.tolist().index(slot)
            assert ((segments.starts[s] <= own.numpy()) & (own.numpy() < segments.starts[s + 1])).all()
            seen += own[ok].tolist()
            of_piece.append((int(own[0]), s))
    assert sorted(seen) == list(range(T))
    in_order = [of_piece[i] for i in tiles.order.tolist()]
    assert in_order == sorted(of_piece)
    live = [s for s, length in enumerate(lengths) if length]
    assert [in_order[i][1] for i in tiles.first_piece.tolist()] == live
    assert [in_order[i][0] for i in tiles.first_piece.tolist()] == segments.starts[live].tolist()


@settings(derandomize=True, max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_pieces_do_not_depend_on_the_company(lengths):
    def sizes(segments, slot):
        return [(pieces.size, int((torch.arange(11)[pieces.slots] == slot).sum())) for pieces in segments.tiles.pieces]

    segments = build(lengths)
    for slot, length in zip(segments.slots, lengths):
        here = [entry for entry in sizes(segments, slot) if entry[1]]
        assert here == sizes(Segments.build([slot], [length]), slot)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_groups_are_the_segments_with_rows(lengths):
    segments = build(lengths)
    groups, live = segments.tiles.groups, [s for s, length in enumerate(lengths) if length]
    assert groups.slots.tolist() == segments.slots[live].tolist()
    x = torch.randn(sum(lengths), 3, dtype=torch.float64)
    expected = [rows.sum(0) for rows in x.split(lengths) if len(rows)]
    torch.testing.assert_close(groups.sum_rows(x), torch.stack(expected) if expected else x)
    assert groups.ends.tolist() == segments.starts[1:][live].tolist() and groups.ends.dtype == torch.int32
    assert groups.slot_of_row.tolist() == [int(slot) for slot, n in zip(segments.slots, lengths) for _ in range(n)]


@pytest.mark.parametrize("lengths, sizes", [
    ([32, 0, 16, 48], [16]), ([1024, 512], [512]), ([48, 1040, 16, 528], [512, 512, 16, 16, 16]),
])  # fmt: skip
def test_whole_tiles_need_no_copy(lengths, sizes):
    x, tiles = torch.rand(sum(lengths), 5), build(lengths).tiles
    assert [pieces.size for pieces in tiles.pieces] == sizes and not tiles.ragged
    assert all(pieces.of(x).untyped_storage().data_ptr() == x.data_ptr() for pieces in tiles.pieces)
    assert build([32, 1]).tiles.ragged


def test_slots_and_starts_are_on_the_host():
    segments = build([5, 0, 17])
    assert segments.slots.tolist() == [3, 8, 2] and segments.starts.tolist() == [0, 5, 5, 22]
    assert segments.slots.dtype == segments.starts.dtype == np.int64


@pytest.mark.parametrize("slots, lengths, message", [
    ([0, 1, 0], [4, 4, 4], r"a slot appears twice in \[0 1 0\]; join its rows"),
    ([0, -1], [4, 4], "negative slot or length"),
    ([0, 1], [4, -4], "negative slot or length"),
    ([0, 1], [4], "2 slots but 1 lengths"),
    ([[0, 1]], [[4, 4]], r"slots must be a list of whole numbers; got int64 of shape \(1, 2\)"),
    (5, 5, r"slots must be a list of whole numbers; got int64 of shape \(\)"),
    ([0.7], [1], "slots must be a list of whole numbers; got float64 of shape"),
    ([0], [1.9], "lengths must be a list of whole numbers; got float64 of shape"),
    (["a"], [1], "slots must be a list of whole numbers"),
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


@settings(derandomize=True, max_examples=20, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(lengths=LENGTHS, most=st.sampled_from([1, 2, 1023]))
def test_a_kernel_plan_has_the_tables_of_plain_pytorchs(monkeypatch, lengths, most):
    monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", False)
    monkeypatch.setattr(segments_module, "MOST_GROUPS", most)
    plain = build(lengths)
    segments, plan = interpreter_plan(monkeypatch, lengths)
    for one, other in ((plain.live_slots, segments.live_slots), (plain.slot_of_row, segments.slot_of_row)):
        assert torch.equal(one, other) and one.dtype == other.dtype == torch.int64
    slots, ends = [], []
    for rows, own, own_ends in plan.groups:
        assert 1 <= len(own) == len(own_ends) <= most and own_ends.dtype == torch.int32
        assert rows.start == (ends[-1] if ends else 0) and rows.stop == rows.start + own_ends[-1]
        slots += own.tolist()
        ends += (rows.start + own_ends).tolist()
    assert slots == plain.tiles.groups.slots.tolist() and ends == plain.tiles.groups.ends.tolist()


def test_a_plan_is_one_copy_to_the_device(monkeypatch):
    """Whatever an op needs of it later is there, or is made there."""
    copies = []
    monkeypatch.setattr(segments_module, "to_device", lambda table, device: copies.append(1) or torch.from_numpy(table))
    segments, plan = interpreter_plan(monkeypatch, [5, 0, 40])
    tables = [plan.segments, *plan.tiles.values(), plan.chunks, plan.finals, plan.slots, segments.live_slots,
              *(tensor for _, *tensors in plan.groups for tensor in tensors)]  # fmt: skip
    assert len(copies) == 1 and len({table.untyped_storage().data_ptr() for table in tables}) == 1


def test_rows_other_than_the_segments_own_or_elsewhere_are_errors(device):
    segments = Segments.build([1, 0], [16, 3], device)
    segments.check_rows("op", torch.zeros(19, 2, device=device))
    for x in (torch.zeros(18, 2, device=device), torch.zeros(19, device=device), torch.zeros((), device=device)):
        with pytest.raises(ValueError, match=r"op: x is \(.*\) but the segments cover 19 rows"):
            segments.check_rows("op", x)
    plans = (None, object()) if segments.plan is None else (object(), None)
    other = Segments(segments.slots, segments.starts, *plans)
    with pytest.raises(ValueError, match=r"op: .* built for another device or backend; pass device=x.device"):
        other.check_rows("op", torch.zeros(19, 2, device=device))


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backend("cuda") == backend("cuda:1") == "triton"
    with pytest.raises(ValueError, match=r"on the current GPU, cuda:1, not on cuda:0; call torch.cuda.set_device\(0\)"):
        backend("cuda:0")
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
    y, v, Bt = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((609, 24), (6, 8, 16), (6, 8, 24)))
    pieces = Segments.build([4, 0, 2], [32, 528, 49]).tiles.pieces[1]  # ragged, so that they are not cut apart
    assert pieces.size == 16 and not isinstance(pieces.rows, slice)
    alone = Segments.build([0], [96]).tiles.pieces[0]
    assert isinstance(alone.rows, slice)
    own, rows = y[pieces.rows].clone(), y.clone()
    expand_rows_(own, alone, v, Bt, beta=1)
    expand_rows_(rows, pieces, v, Bt, beta=1)
    assert torch.equal(rows[pieces.rows], own)
