"""Is the fused LoRA the loop over users, in output and gradients, and is every user's part of it their own?"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft_kernels import reference
from minipeft_kernels.segment_lora import LoraRows, lora_linear, segment_lora
from minipeft_kernels.segments import Segments

LENGTHS = {"one user": [64], "one row each": [1, 1, 1], "an empty user": [0, 5, 17], "skewed": [130, 3, 1, 250],
           "aligned": [16, 48, 32], "nobody": [0, 0]}  # fmt: skip
GROUPS = {"one bank": ([[16, 48]], 0), "three banks": ([[32, 0, 16], [80], [16]], 0),
          "rows without a bank": ([[16], [64, 16]], 32), "no bank": ([], 0)}  # fmt: skip
NAMES = ("y", "grad_x", "grad_A", "grad_Bt")
K, N, R = 40, 24, 8


def make_inputs(lengths, mixed_ranks=True, dtype=torch.float32, seed=0):
    """x, A, Bt, scale, segments, ranks, grad_y. Slot order differs from row order; two slots are absent.

    A and Bt are views of one bank of rows. Absent slots, unused rank rows and what lies between hold NaN.
    """
    draw, U = torch.Generator().manual_seed(seed), len(lengths) + 2
    slots = np.random.default_rng(seed).permutation(U)[: len(lengths)]
    ranks = torch.tensor([(1, 8, 3)[u % 3] for u in range(U)]) if mixed_ranks else None
    bank = torch.full((U, R * (K + N) + 5), math.nan, dtype=dtype)
    A = bank[:, : R * K].unflatten(1, (R, K))
    Bt = bank[:, R * K + 5 :].unflatten(1, (R, N))
    for slot in slots:
        used = R if ranks is None else int(ranks[slot])
        A[slot, :used] = (torch.randn(used, K, generator=draw) / K**0.5).to(dtype)
        Bt[slot, :used] = torch.randn(used, N, generator=draw).to(dtype)
    x, grad_y = (torch.randn(sum(lengths), size, generator=draw).to(dtype) for size in (K, N))
    return x, A, Bt, torch.rand(U, generator=draw) + 0.5, Segments.build(slots, lengths), ranks, grad_y


def forward_backward(op, x, A, Bt, scale, segments, ranks, grad_y):
    x, A, Bt = (tensor.detach().requires_grad_() for tensor in (x, A, Bt))
    y = op(x, A, Bt, scale, segments, ranks)
    y.backward(grad_y)
    return [tensor.detach() for tensor in (y, x.grad, A.grad, Bt.grad)]


def in_fp64(inputs):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def assert_as_accurate(name, kernel, plain, exact):
    """Root mean square, not the worst number: one row of one rank leaves few numbers, and their worst is luck."""
    rms = lambda error: float(error.square().mean().sqrt()) if error.numel() else 0.0  # noqa: E731
    allowed = 2 * rms(plain.double() - exact) + 1e-7
    error = rms(kernel.double() - exact)
    assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch errs {allowed / 2:.2e}"


# ---- The op by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["full rank", "mixed ranks"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_reference(lengths, mixed_ranks, dtype):
    inputs = make_inputs(lengths, mixed_ranks, dtype)
    kernel = forward_backward(segment_lora, *inputs)
    plain = forward_backward(reference.segment_lora, *inputs)
    exact = forward_backward(reference.segment_lora, *in_fp64(inputs))
    for name, *versions in zip(NAMES, kernel, plain, exact):
        assert versions[0].dtype == dtype and versions[0].shape == versions[2].shape
        assert_as_accurate(name, *versions)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6), seed=st.integers(0, 99), mixed_ranks=st.booleans())
def test_any_lengths_match_reference(lengths, seed, mixed_ranks):
    inputs = in_fp64(make_inputs(lengths, mixed_ranks, seed=seed))
    for name, one, other in zip(NAMES, forward_backward(segment_lora, *inputs),
                                forward_backward(reference.segment_lora, *inputs)):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=name)


def test_unused_rank_rows_and_absent_slots_get_gradient_zero():
    inputs = make_inputs([5, 40])
    *_, segments, ranks, _ = inputs
    _, _, grad_A, grad_Bt = forward_backward(segment_lora, *inputs)
    for slot in range(len(ranks)):
        used = int(ranks[slot]) if slot in segments.slots else 0
        for grad in (grad_A, grad_Bt):
            assert not grad[slot, used:].any() and grad[slot, :used].any(-1).all()


@pytest.mark.parametrize("poison", [1e4, math.nan, math.inf])
def test_rewriting_a_users_rows_changes_nobody_else(poison):
    lengths = [30, 7, 33, 16]
    x, A, Bt, scale, segments, ranks, grad_y = make_inputs(lengths)
    before = forward_backward(segment_lora, x, A, Bt, scale, segments, ranks, grad_y)
    mine = slice(30, 37)
    other_x, other_grad_y = x.clone(), grad_y.clone()
    other_x[mine] *= poison
    other_grad_y[mine] *= poison
    after = forward_backward(segment_lora, other_x, A, Bt, scale, segments, ranks, other_grad_y)
    row_others, slot_others = torch.ones(len(x), dtype=torch.bool), torch.ones(len(A), dtype=torch.bool)
    row_others[mine] = False
    slot_others[int(segments.slots[1])] = False
    for name, one, other in zip(NAMES, before, after):
        others = slot_others if name in ("grad_A", "grad_Bt") else row_others
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


def test_a_users_bits_do_not_depend_on_company_order_or_threads():
    lengths = [300, 7, 33, 500, 16, 1]
    x, A, Bt, scale, segments, ranks, grad_y = make_inputs(lengths)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(forward_backward(segment_lora, x, A, Bt, scale, segments, ranks, grad_y))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run))
    y, grad_x, grad_A, grad_Bt = runs[0]
    absent = next(u for u in range(len(A)) if u not in segments.slots)
    A, Bt = A.nan_to_num(1.0), Bt.nan_to_num(1.0)  # now the absent slot has an adapter too
    for slot, start, end in zip(segments.slots, segments.starts[:-1], segments.starts[1:]):
        own_x, own_grad_y = x[start:end], grad_y[start:end]
        plan = Segments.build([slot], [end - start])
        alone = forward_backward(segment_lora, own_x, A, Bt, scale, plan, ranks, own_grad_y)
        plan = Segments.build([absent, slot], [19, end - start])
        after_another = forward_backward(segment_lora, torch.cat([x[-19:], own_x]), A, Bt, scale, plan, ranks,
                                         torch.cat([grad_y[-19:], own_grad_y]))  # fmt: skip
        for run in (alone, after_another):
            assert torch.equal(run[0][-len(own_x) :], y[start:end])
            assert torch.equal(run[1][-len(own_x) :], grad_x[start:end])
            assert torch.equal(run[2][slot], grad_A[slot]) and torch.equal(run[3][slot], grad_Bt[slot])


# ---- With the frozen linear map ------------------------------------------------------------------------------------


def make_groups(lengths_of_groups, seed=0, gap=0):
    """(x, grad_y, groups) for banks one after another, `gap` rows that belong to no group after each."""
    parts, groups, first_row = [], [], 0
    for i, lengths in enumerate(lengths_of_groups):
        x, A, Bt, scale, segments, ranks, grad_y = make_inputs(lengths, mixed_ranks=i % 2 == 0, seed=seed + i)
        grad_A, grad_Bt = torch.full_like(A, 7.0), torch.full_like(Bt, 7.0)
        groups.append(LoraRows(first_row, A, Bt, scale, ranks, segments, grad_A, grad_Bt))
        parts.append((torch.cat([x, torch.rand(gap, K)]), torch.cat([grad_y, torch.rand(gap, N)])))
        first_row += len(x) + gap
    return torch.cat([x for x, _ in parts]), torch.cat([grad_y for _, grad_y in parts]), groups


def fused(x, grad_y, weight, bias, groups, tile, x_needs_grad=True):
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), requires_grad=True)
    y = lora_linear(x, anchor, weight, bias, groups, tile)
    y.backward(grad_y)
    assert anchor.grad is None or not anchor.grad.any()
    return [y.detach(), x.grad, *itertools.chain(*((g.grad_A, g.grad_Bt) for g in groups))]


def by_reference(x, grad_y, weight, bias, groups):
    """The same by F.linear and the reference op; gradients of absent slots as `fused` must leave them."""
    x = x.detach().requires_grad_()
    y, deltas, leaves = F.linear(x, weight, bias), torch.zeros(len(x), len(weight), dtype=x.dtype), []
    for g in groups:
        mine = slice(g.first_row, g.first_row + g.segments.num_rows)
        A, Bt = (tensor.to(x.dtype).detach().requires_grad_() for tensor in (g.A, g.Bt))
        leaves += [(A, g), (Bt, g)]
        delta = reference.segment_lora(x[mine], A, Bt, g.scale, g.segments, g.ranks)
        deltas = deltas + F.pad(delta, (0, 0, mine.start, len(x) - mine.stop))
    (y + deltas).backward(grad_y)
    grads = []
    for leaf, g in leaves:
        present = torch.zeros(len(leaf), 1, 1, dtype=torch.bool)
        present[g.segments.live_slots] = True
        grads.append(leaf.grad.where(present, 7.0))
    return [(y + deltas).detach(), x.grad, *grads]


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups, gap", GROUPS.values(), ids=GROUPS.keys())
def test_lora_linear_is_linear_plus_lora(groups, gap, with_bias, tile):
    draw = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(N, K, generator=draw) / K**0.5, torch.randn(N, generator=draw) if with_bias else None
    x, grad_y, groups = make_groups(groups, gap=gap) if groups else (torch.rand(32, K), torch.rand(32, N), [])
    x_before, kept = x.clone(), [g.A.clone() for g in groups]
    kernel = fused(x, grad_y, weight, bias, groups, tile)
    plain = by_reference(x, grad_y, weight, bias, groups)
    exact = by_reference(x.double(), grad_y.double(), weight.double(), None if bias is None else bias.double(), groups)
    for i, versions in enumerate(zip(kernel, plain, exact)):
        assert_as_accurate(f"result {i}", *versions)
    assert torch.equal(x, x_before) and weight.grad is None
    assert all(torch.equal(g.A.nan_to_num(), A.nan_to_num()) for g, A in zip(groups, kept))


@pytest.mark.parametrize("tile", [None, 16])
def test_lora_linear_writes_gradients_where_x_needs_none(tile):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    with_grad = fused(*(inputs := make_groups([[16, 48], [32]]))[:2], weight, None, inputs[2], tile)
    without = fused(*(inputs := make_groups([[16, 48], [32]]))[:2], weight, None, inputs[2], tile, x_needs_grad=False)
    assert with_grad[1] is not None and without[1] is None
    assert all(torch.equal(one, other) for i, (one, other) in enumerate(zip(with_grad, without)) if i != 1)


def test_lora_linear_in_tiles_gives_bits_that_do_not_depend_on_the_company():
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    x, grad_y, groups = make_groups([[32, 16, 48], [80]])
    y, grad_x, grad_A, grad_Bt, *_ = fused(x, grad_y, weight, None, groups, 16)
    g = groups[0]
    for slot, start, end in zip(g.segments.slots, g.segments.starts[:-1], g.segments.starts[1:]):
        alone = LoraRows(0, g.A, g.Bt, g.scale, g.ranks, Segments.build([slot], [end - start]),
                         torch.zeros_like(g.A), torch.zeros_like(g.Bt))  # fmt: skip
        got = fused(x[start:end], grad_y[start:end], weight, None, [alone], 16)
        assert torch.equal(got[0], y[start:end]) and torch.equal(got[1], grad_x[start:end])
        assert torch.equal(got[2][slot], grad_A[slot]) and torch.equal(got[3][slot], grad_Bt[slot])


@pytest.mark.parametrize("tile", [None, 16])
def test_lora_linear_keeps_a_users_nan_to_that_user(tile):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    x, grad_y, groups = make_groups([[32, 16, 48], [80]])
    before = [part.clone() for part in fused(x, grad_y, weight, None, groups, tile)]
    ruined, slot = x.clone(), int(groups[0].segments.slots[1])
    ruined[32:48] = math.nan
    after = fused(ruined, grad_y, weight, None, groups, tile)
    for i, (one, other) in enumerate(zip(before, after)):
        others = torch.ones(len(one), dtype=torch.bool)
        if i == 0:
            others[32:48] = False
        if i in (2, 3):
            others[slot] = False
        assert torch.equal(one[others], other[others]), i
        assert torch.equal(one, other) == (i in (1, 4, 5))  # grad_x does not depend on x; the other bank saw nothing


# ---- Errors --------------------------------------------------------------------------------------------------------


def wrong_inputs():
    """message -> (x, A, Bt, scale, segments, ranks) of which one is wrong."""
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16, 32])
    U = len(A)
    return {
        "x is (47, 40) but the segments cover 48 rows": (x[1:], A, Bt, scale, segments, ranks),
        "x is (48,) but": (x[:, 0], A, Bt, scale, segments, ranks),
        "x has 39 columns but A is (4, 8, 40), made for 40. Was this adapter trained": (
            x[:, 1:], A, Bt, scale, segments, ranks),
        f"so Bt must be [{U}, 8, N] and scale [{U}]; got (4, 7, 24)": (x, A, Bt[:, 1:], scale, segments, ranks),
        f"so Bt must be [{U}, 8, N] and scale [{U}]; got (4, 8, 24) and (3,)": (x, A, Bt, scale[1:], segments, ranks),
        "must share a dtype; got torch.float32, torch.float64, torch.float32": (
            x, A.double(), Bt, scale, segments, ranks),
        "segment of slot 9 but the bank has 4 slots": (x, A, Bt, scale, Segments.build([0, 9], [16, 32]), ranks),
        "ranks must be [4], one per slot; got (3,)": (x, A, Bt, scale, segments, ranks[1:]),
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_inputs())
def test_shapes_that_disagree_are_errors_of_both_ops(message):
    x, A, Bt, scale, segments, ranks = wrong_inputs()[message]
    with pytest.raises(ValueError) as error:
        segment_lora(x, A, Bt, scale, segments, ranks)
    assert message in str(error.value) and str(error.value).startswith("segment_lora: ")
    group = LoraRows(0, A, Bt, scale, ranks, segments, torch.zeros_like(A), torch.zeros_like(Bt))
    with pytest.raises(ValueError) as error:
        lora_linear(x, torch.zeros((), requires_grad=True), torch.rand(N, K), None, [group])
    assert message in str(error.value) and str(error.value).startswith("lora_linear: ")


def test_lora_linear_takes_only_aligned_segments():
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16, 31])
    group = LoraRows(0, A, Bt, scale, ranks, segments, torch.zeros_like(A), torch.zeros_like(Bt))
    with pytest.raises(ValueError, match="segments must be multiples of their tile"):
        lora_linear(x, torch.zeros((), requires_grad=True), torch.rand(N, K), None, [group])


def test_a_device_without_an_implementation_is_an_error():
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16])
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        segment_lora(x.to("meta"), A.to("meta"), Bt.to("meta"), scale, segments, ranks)
