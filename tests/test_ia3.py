"""Is fused IA3 the loop over users, in output and gradients, and is every user's part of it their own?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import ANY_LENGTHS, LENGTHS, assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st

import minipeft_kernels.segments
from minipeft_kernels import reference
from minipeft_kernels.ia3 import ia3_rows, segment_ia3
from minipeft_kernels.segments import Segments, VectorRows

DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
          "bf16, vectors fp32": (torch.bfloat16, torch.float32)}  # fmt: skip
GROUPS = {"one bank": ([[16, 48]], 0), "three banks": ([[33, 0, 15], [80], [16]], 0),
          "rows without a bank": ([[7], [64, 17]], 9), "a bank without rows": ([[0], [20]], 3),
          "no bank": ([], 32)}  # fmt: skip
NAMES = ("y", "grad_x", "grad_vectors")


def make_inputs(lengths, device, dtypes=DTYPES["fp32"], D=40, seed=0):
    """x, vectors, segments, grad_y. Slot order differs from row order; two slots are absent.

    vectors is a view of a bank of longer rows. Absent slots, slots without rows and the rest of the bank hold NaN.
    """
    draw, U = torch.Generator().manual_seed(seed), len(lengths) + 2
    slots = np.random.default_rng(seed).permutation(U)[: len(lengths)]
    bank = torch.full((U, D + 5), math.nan, dtype=dtypes[1], device=device)
    vectors = bank[:, 3 : 3 + D]
    for slot, length in zip(slots, lengths):
        vector = torch.randn(D, generator=draw) + 1
        vectors[slot] = vector if length else math.nan
    x, grad_y = (torch.randn(sum(lengths), D, generator=draw).to(device, dtypes[0]) for _ in range(2))
    return x, vectors, Segments.build(slots, lengths, device), grad_y


def forward_backward(op, x, vectors, segments, grad_y):
    x, vectors = (tensor.detach().requires_grad_() for tensor in (x, vectors))
    y = op(x, vectors, segments)
    y.backward(grad_y)
    return [tensor.detach().cpu() for tensor in (y, x.grad, vectors.grad)]


def assert_matches_reference(inputs):
    kernel = forward_backward(segment_ia3, *inputs)
    plain = forward_backward(reference.segment_ia3, *inputs)
    exact = forward_backward(reference.segment_ia3, *in_fp64(inputs))
    dtypes = inputs[0].dtype, inputs[0].dtype, inputs[1].dtype
    for name, dtype, *versions in zip(NAMES, dtypes, kernel, plain, exact):
        assert versions[0].dtype == dtype
        assert_as_accurate(name, *versions)


# ---- The op by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_reference(lengths, dtypes, device):
    assert_matches_reference(make_inputs(lengths, device, dtypes))


@pytest.mark.parametrize("D", [1, 17, 64, 96, 150])
def test_any_width_matches_reference(D, device):
    assert_matches_reference(make_inputs([70, 5, 33, 64, 1, 29, 40, 66], device, D=D))


@few_examples
@given(lengths=ANY_LENGTHS, D=st.integers(16, 150), dtypes=st.sampled_from(list(DTYPES.values())),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_lengths_widths_and_dtypes_match_reference(lengths, D, dtypes, seed, device):
    """A user of 33 rows is always there: errors of a handful of numbers cannot be compared."""
    assert_matches_reference(make_inputs([33, *lengths], device, dtypes, D, seed))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_segments_of_several_chunks_match_reference(dtypes, device, monkeypatch):
    monkeypatch.setattr(minipeft_kernels.segments, "CHUNK", 64)
    inputs = make_inputs([200, 64, 3, 129], device, dtypes)
    if inputs[2].plan is not None:
        assert len(inputs[2].plan.finals) == 2 and inputs[2].plan.num_parts == 7
    assert_matches_reference(inputs)


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_reads(device):
    x, vectors, segments, _ = make_inputs([20, 3], device)
    one = torch.ones((), device=device)
    broadcast = forward_backward(segment_ia3, x, vectors, segments, one.expand_as(x))
    whole = forward_backward(segment_ia3, x, vectors, segments, torch.ones_like(x))
    columns = x.T.contiguous().T  # [T, D], each column's numbers side by side
    strided = forward_backward(segment_ia3, columns, vectors, segments, torch.ones_like(x))
    for other in (whole, strided):
        assert all(torch.equal(one, two) for one, two in zip(broadcast, other))


def test_inputs_are_left_alone_and_slots_without_rows_get_gradient_zero(device):
    x, vectors, segments, grad_y = make_inputs([5, 0, 40], device)
    before = [tensor.clone() for tensor in (x, vectors, grad_y)]
    _, _, grad_vectors = forward_backward(segment_ia3, x, vectors, segments, grad_y)
    for one, other in zip(before, (x, vectors, grad_y)):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    live = segments.slots[[0, 2]]
    for slot in range(len(vectors)):
        assert grad_vectors[slot].all() if slot in live else torch.equal(grad_vectors[slot], torch.zeros(40))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's arithmetic is NumPy's, which remarks on inf
@pytest.mark.parametrize("poison", [1e4, math.nan, math.inf])
def test_rewriting_a_users_rows_changes_nobody_else(poison, device):
    x, vectors, segments, grad_y = make_inputs([30, 7, 33, 16], device)
    before = forward_backward(segment_ia3, x, vectors, segments, grad_y)
    mine = slice(30, 37)
    other_x, other_grad_y = x.clone(), grad_y.clone()
    other_x[mine] *= poison
    other_grad_y[mine] *= poison
    after = forward_backward(segment_ia3, other_x, vectors, segments, other_grad_y)
    row_others, slot_others = torch.ones(len(x), dtype=torch.bool), torch.ones(len(vectors), dtype=torch.bool)
    row_others[mine] = False
    slot_others[int(segments.slots[1])] = False
    for name, one, other in zip(NAMES, before, after):
        others = slot_others if name == "grad_vectors" else row_others
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_a_users_bits_do_not_depend_on_company_order_or_threads(dtypes, device, monkeypatch):
    monkeypatch.setattr(minipeft_kernels.segments, "CHUNK", 64)  # so some users have several chunks
    lengths = [150, 7, 33, 70, 1]
    x, vectors, segments, grad_y = make_inputs(lengths, device, dtypes, D=70)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(forward_backward(segment_ia3, x, vectors, segments, grad_y))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*runs))

    y, grad_x, grad_vectors = runs[0]
    backwards = forward_backward(segment_ia3, torch.cat(x.split(lengths)[::-1]), vectors,
                                 Segments.build(segments.slots[::-1], lengths[::-1], device),
                                 torch.cat(grad_y.split(lengths)[::-1]))  # fmt: skip
    assert torch.equal(backwards[2], grad_vectors)
    for one, other in zip((y, grad_x), backwards):
        assert torch.equal(torch.cat(one.split(lengths)[::-1]), other)
    for slot, start, end in zip(segments.slots, segments.starts[:-1], segments.starts[1:]):
        plan = Segments.build([slot], [end - start], device)
        alone = forward_backward(segment_ia3, x[start:end], vectors, plan, grad_y[start:end])
        assert torch.equal(alone[0], y[start:end]) and torch.equal(alone[1], grad_x[start:end])
        assert torch.equal(alone[2][slot], grad_vectors[slot])


# ---- On some rows of a batch, gradients into the bank --------------------------------------------------------------


def make_groups(lengths_of_groups, gap, device, dtypes=DTYPES["fp32"]):
    """(x, grad_y, groups) for banks one after another, `gap` rows that belong to no group after each and at the end."""
    draw, parts, groups, first_row = torch.Generator().manual_seed(9), [], [], 0
    loose = lambda: torch.randn(gap, 40, generator=draw).to(device, dtypes[0])  # noqa: E731
    for i, lengths in enumerate(lengths_of_groups):
        x, vectors, segments, grad_y = make_inputs(lengths, device, dtypes, seed=i)
        grads = torch.full((len(vectors), 50), 7.0, device=device)[:, 5:45]
        groups.append(VectorRows(first_row, vectors, segments, grads))
        parts.append((torch.cat([x, loose()]), torch.cat([grad_y, loose()])))
        first_row += len(x) + gap
    parts.append((loose(), loose()))
    return torch.cat([x for x, _ in parts]), torch.cat([grad_y for _, grad_y in parts]), groups


def fused(x, grad_y, groups, x_needs_grad=True):
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), requires_grad=True)
    y = ia3_rows(x, anchor, groups)
    y.backward(grad_y)
    assert anchor.grad is None or not anchor.grad.any()
    return [tensor if tensor is None else tensor.detach().cpu().clone()
            for tensor in (y, x.grad, *(g.grad_vectors for g in groups))]  # fmt: skip


def by_reference(x, grad_y, groups):
    """The same by the reference op; gradients of slots without rows as `fused` must leave them."""
    x = x.detach().requires_grad_()
    parts, leaves, row = [], [], 0
    for g in groups:
        leaves.append(g.vectors.to(torch.promote_types(g.vectors.dtype, x.dtype)).detach().requires_grad_())
        parts += [x[row : g.rows.start], reference.segment_ia3(x[g.rows], leaves[-1], g.segments)]
        row = g.rows.stop
    y = torch.cat([*parts, x[row:]])
    y.backward(grad_y)
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    for grad, g in zip(grads, groups):
        live = g.segments.slots[np.diff(g.segments.starts) > 0]
        grad[np.setdiff1d(np.arange(len(grad)), live)] = 7.0
    return [tensor.detach().cpu() for tensor in (y, x.grad, *grads)]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("groups, gap", GROUPS.values(), ids=GROUPS.keys())
def test_ia3_rows_is_ia3_on_the_groups_and_nothing_elsewhere(groups, gap, dtypes, device):
    x, grad_y, groups = make_groups(groups, gap, device, dtypes)
    x_before = x.clone()
    kernel = fused(x, grad_y, groups)
    plain, exact = by_reference(x, grad_y, groups), by_reference(x.double(), grad_y.double(), groups)
    for i, versions in enumerate(zip(kernel, plain, exact)):
        assert_as_accurate(f"result {i}", *versions)
    assert torch.equal(x, x_before)
    loose = torch.ones(len(x), dtype=torch.bool)
    for g in groups:
        loose[g.rows] = False
    assert torch.equal(kernel[0][loose], x.cpu()[loose]) and torch.equal(kernel[1][loose], grad_y.cpu()[loose])


def test_ia3_rows_has_the_bits_of_segment_ia3_and_overwrites_old_gradients(device):
    x, grad_y, groups = make_groups([[33, 5], [20]], 4, device)
    once, twice = fused(x, grad_y, groups), fused(x, grad_y, groups)
    assert all(torch.equal(one, other) for one, other in zip(once, twice))
    for g, grads in zip(groups, once[2:]):
        y, grad_x, grad_vectors = forward_backward(segment_ia3, x[g.rows], g.vectors, g.segments, grad_y[g.rows])
        assert torch.equal(y, once[0][g.rows]) and torch.equal(grad_x, once[1][g.rows])
        assert torch.equal(grad_vectors[g.segments.slots], grads[g.segments.slots])


def test_ia3_rows_writes_gradients_where_x_needs_none(device):
    with_grad = fused(*make_groups([[16, 48], [32]], 4, device))
    without = fused(*make_groups([[16, 48], [32]], 4, device), x_needs_grad=False)
    assert with_grad[1] is not None and without[1] is None
    assert all(torch.equal(one, other) for i, (one, other) in enumerate(zip(with_grad, without)) if i != 1)


def test_ia3_rows_keeps_a_users_nan_to_that_user(device):
    x, grad_y, groups = make_groups([[32, 16, 48], [80]], 5, device)
    before = fused(x, grad_y, groups)
    ruined, slot = x.clone(), int(groups[0].segments.slots[1])
    ruined[32:48] = math.nan
    after = fused(ruined, grad_y, groups)
    for i, (one, other) in enumerate(zip(before, after)):
        others = torch.ones(len(one), dtype=torch.bool)
        if i == 0:
            others[32:48] = False
        if i == 2:
            others[slot] = False
        assert torch.equal(one[others], other[others]), i
        assert torch.equal(one, other) == (i in (1, 3))  # grad_x does not depend on x; the other bank saw nothing


# ---- Errors --------------------------------------------------------------------------------------------------------


def wrong_inputs(device):
    """message -> (x, vectors, segments) of which one is wrong."""
    x, vectors, segments, _ = make_inputs([16, 32], device)
    elsewhere = replace(segments, plan=object() if segments.plan is None else None)
    return {
        "x is (47, 40) but the segments cover 48 rows": (x[1:], vectors, segments),
        "x is (48,) but": (x[:, 0], vectors, segments),
        "x has 39 columns but vectors is (4, 40); needs [U, 39]. Was this": (x[:, 1:], vectors, segments),
        "vectors is (40,); needs [U, 40]": (x, vectors[0], segments),
        "vectors are torch.bfloat16; give them in the dtype of x, torch.float32": (x, vectors.bfloat16(), segments),
        "stride(1) of vectors is 4; only slots": (x, vectors.T.contiguous().T, segments),
        "segment of slot 9 but the bank has 4 slots": (x, vectors, Segments.build([0, 9], [16, 32], device)),
        f"pass device='{x.device}' to Segments.build": (x, vectors, elsewhere),
    }


@pytest.mark.parametrize("message", [
    "x is (47, 40) but the segments cover 48 rows", "x is (48,) but", "x has 39 columns but vectors is (4, 40); needs",
    "vectors is (40,); needs [U, 40]", "vectors are torch.bfloat16; give them in the dtype of x, torch.float32",
    "stride(1) of vectors is 4; only slots", "segment of slot 9 but the bank has 4 slots", "to Segments.build",
])  # fmt: skip
def test_inputs_that_disagree_are_errors_of_both_ops(message, device):
    x, vectors, segments = next(inputs for known, inputs in wrong_inputs(device).items() if message in known)
    with pytest.raises(ValueError) as error:
        segment_ia3(x, vectors, segments)
    assert message in str(error.value) and str(error.value).startswith("segment_ia3: ")
    group = VectorRows(0, vectors, segments, torch.zeros_like(vectors))
    with pytest.raises(ValueError) as error:
        ia3_rows(x, torch.zeros((), requires_grad=True), [group])
    assert str(error.value).startswith("ia3_rows: ")
    assert message in str(error.value) or "but x has 47 rows" in str(error.value)


@pytest.mark.parametrize("first_rows, message", [
    ((0, 47), "a group starts at row 47 but only rows from 48 on are free"),
    ((-1, 60), "a group starts at row -1 but only rows from 0 on are free"),
    ((0, 49), "a group ends at row 97 but x has 96 rows"),
])  # fmt: skip
def test_groups_that_share_rows_or_lie_outside_are_errors(first_rows, message, device):
    x, vectors, segments, _ = make_inputs([16, 32], device)
    groups = [VectorRows(row, vectors, segments, torch.zeros_like(vectors)) for row in first_rows]
    for order in itertools.permutations(groups):
        with pytest.raises(ValueError) as error:
            ia3_rows(torch.cat([x, x]), torch.zeros((), requires_grad=True), list(order))
        assert message in str(error.value)


def test_gradients_must_have_the_shape_of_the_vectors(device):
    x, vectors, segments, _ = make_inputs([16, 32], device)
    for grads in (torch.zeros(4, 39, device=device), torch.zeros(40, 4, device=device).T):
        with pytest.raises(ValueError, match=r"ia3_rows: grad_vectors is .* needed is \(4, 40\), contiguous within"):
            ia3_rows(x, torch.zeros((), requires_grad=True), [VectorRows(0, vectors, segments, grads)])


def test_fp64_is_refused_by_the_kernels_and_exact_without_them(device):
    inputs = in_fp64(make_inputs([16, 32], device))
    if inputs[2].plan is not None:
        with pytest.raises(ValueError, match=r"x is torch.float64; the kernels take torch.bfloat16"):
            segment_ia3(*inputs[:3])
    else:
        for one, other in zip(forward_backward(segment_ia3, *inputs), forward_backward(reference.segment_ia3, *inputs)):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_device_without_an_implementation_is_an_error():
    x, vectors, segments, _ = make_inputs([16], "cpu")
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        segment_ia3(x.to("meta"), vectors.to("meta"), segments)
