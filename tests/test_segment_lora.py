"""Is the fused LoRA the loop over users, in output and gradients, and is every user's part of it their own?"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from accuracy import ANY_LENGTHS, LENGTHS, assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels import cpu, reference, segments
from minipeft_kernels import segment_lora as segment_lora_file
from minipeft_kernels.backend import backend
from minipeft_kernels.dropout import keep_mask
from minipeft_kernels.segment_lora import segment_lora
from minipeft_kernels.segments import TILE, Segments

NAMES = ("y", "grad_x", "grad_A", "grad_Bt")
DTYPES = (torch.float32, torch.bfloat16)
K, N, R = 40, 24, 8


def make_inputs(lengths, device="cpu", mixed_ranks=True, dtype=torch.float32, seed=0, R=R, sizes=(K, N)):
    """x, A, Bt, scale, segments, ranks, grad_y. Slot order differs from row order; two slots are absent.

    A and Bt are views of one bank of rows. Absent slots, unused rank rows and what lies between hold NaN. Mixed ranks
    are 1, R and then any.
    """
    draw, U, (K, N) = torch.Generator().manual_seed(seed), len(lengths) + 2, sizes
    rng = np.random.default_rng(seed)
    slots, any_ranks = rng.permutation(U)[: len(lengths)], rng.integers(1, R + 1, U - 2)
    ranks = torch.tensor([1, R, *any_ranks], dtype=torch.int32) if mixed_ranks else None
    bank = torch.full((U, R * (K + N) + 5), math.nan, dtype=dtype)
    A = bank[:, : R * K].unflatten(1, (R, K))
    Bt = bank[:, R * K + 5 :].unflatten(1, (R, N))
    for slot in slots:
        used = R if ranks is None else int(ranks[slot])
        A[slot, :used] = (torch.randn(used, K, generator=draw) / K**0.5).to(dtype)
        Bt[slot, :used] = torch.randn(used, N, generator=draw).to(dtype)
    x, grad_y = (torch.randn(sum(lengths), size, generator=draw).to(dtype) for size in (K, N))
    scale, segments = torch.rand(U, generator=draw) + 0.5, Segments.build(slots, lengths, device)
    on = lambda tensor: None if tensor is None else tensor.to(device)  # noqa: E731
    return on(x), on(A), on(Bt), on(scale), segments, on(ranks), on(grad_y)


def forward_backward(op, x, A, Bt, scale, segments, ranks, grad_y):
    x, A, Bt = (tensor.detach().requires_grad_() for tensor in (x, A, Bt))
    y = op(x, A, Bt, scale, segments, ranks)
    y.backward(grad_y)
    return [tensor.detach().cpu() for tensor in (y, x.grad, A.grad, Bt.grad)]


def assert_matches_reference(inputs, op=segment_lora, definition=reference.segment_lora):
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs]
    kernel = forward_backward(op, *inputs)
    plain = forward_backward(definition, *on_cpu)
    exact = forward_backward(definition, *in_fp64(on_cpu))
    for name, *versions in zip(NAMES, kernel, plain, exact):
        assert versions[0].dtype == inputs[0].dtype
        assert_as_accurate(name, *versions)


# ---- Right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["full rank", "mixed ranks"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_reference(device, lengths, mixed_ranks, dtype):
    assert_matches_reference(make_inputs(lengths, device, mixed_ranks, dtype))


@few_examples
@given(lengths=ANY_LENGTHS, seed=st.integers(0, 99), mixed_ranks=st.booleans(), R=st.integers(1, 64),
       sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)), dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_lengths_ranks_widths_and_dtype_match_reference(device, lengths, seed, mixed_ranks, R, sizes, dtype):
    """A user of 33 rows is always there: errors of a handful of numbers cannot be compared."""
    assert_matches_reference(make_inputs([33, *lengths], device, mixed_ranks, dtype, seed, R, sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_dropout_of_the_adapters_input(device, dtype):
    """The reference with x dropped out, and the gradient of x through the same mask."""
    *inputs, grad_y = make_inputs([5, 0, 40, 33], device, dtype=dtype)
    plan = inputs[4]
    drop = torch.tensor([[7, 64], [8, 64], [1 << 40, 0], [-3, 200]])

    def definition(x, A, Bt, scale, segments, ranks):
        keep, factor = keep_mask(drop, segments.starts, K)
        return reference.segment_lora(torch.where(keep, x * factor.to(x.dtype), 0.0), A, Bt, scale, segments, ranks)

    def op(*args):
        return segment_lora(*args, drop=drop.to(device))

    assert_matches_reference([*inputs, grad_y], op, definition)
    y = op(*inputs).cpu()
    without = segment_lora(*inputs).cpu()
    kept_whole = slice(int(plan.starts[2]), int(plan.starts[3]))  # threshold 0: nothing is dropped
    assert torch.equal(y[kept_whole], without[kept_whole]) and not torch.equal(y, without)


def test_dropping_everything_gives_zeros(device):
    x, *inputs, grad_y = make_inputs([5, 40], device)
    x = x.requires_grad_()
    y = segment_lora(x, *inputs, drop=torch.tensor([[7, 256], [8, 30]], device=device))
    y.backward(grad_y)
    for rows in (y, x.grad):
        assert not rows[:5].any() and rows[5:].any() and rows.isfinite().all()


def test_rows_in_any_layout(device):
    x, *inputs, grad_y = make_inputs([16, 33], device)
    for one, other in zip(forward_backward(segment_lora, x, *inputs, grad_y),
                          forward_backward(segment_lora, with_gaps(x), *inputs, with_gaps(grad_y))):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("why, lengths, changes, function", [
    ("ragged", [5, 40], {}, "_GroupedLora"),
    ("whole tiles", [16, 48], {}, "_SegmentLora"),
    ("long on average", [304, 16], {}, "_GroupedLora"),
    ("odd width", [5, 40], {"sizes": (K, 23)}, "_SegmentLora"),
    ("fp64", [5, 40], {"dtype": torch.float64}, "_SegmentLora"),
    ("more users than grouped_mm takes", [1] * 1024, {"R": 3}, "_SegmentLora"),
])  # fmt: skip
def test_which_path_a_cpu_takes(why, lengths, changes, function):
    x, *inputs, _ = make_inputs(lengths, **changes)
    assert type(segment_lora(x.requires_grad_(), *inputs).grad_fn).__name__ == f"{function}Backward", why
    assert type(segment_lora(x, *inputs, by_pieces=True).grad_fn).__name__ == "_SegmentLoraBackward", why


def test_rows_at_odd_addresses(device):
    x, *inputs, grad_y = make_inputs([5, 40], device)
    moved = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, grad_y)]
    for one, other in zip(forward_backward(segment_lora, x, *inputs, grad_y),
                          forward_backward(segment_lora, moved[0], *inputs, moved[1])):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("by_pieces", [False, True])
def test_a_scale_is_not_rounded_to_bf16(device, by_pieces):
    """One that bf16 would round up by nearly 2^-8."""
    x, A, Bt, scale, *rest = make_inputs([5, 200], device, False, torch.bfloat16)
    scale.fill_(1.25 + 2**-8 + 2**-12)
    op = partial(segment_lora, by_pieces=by_pieces)
    y = op(x, A, Bt, scale, *rest[:2]).cpu().double()
    exact = reference.segment_lora(*in_fp64([x.cpu(), A.cpu(), Bt.cpu(), scale.cpu(), *rest[:2]]))
    assert abs(float((y * exact).sum() / exact.square().sum()) - 1) < 1e-3


@pytest.mark.parametrize("lengths", [[16, 48], [5, 40]], ids=["whole tiles", "ragged"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(device, monkeypatch, lengths):
    """As of an adapter that lies under others: its A and Bt let gradients through to x and want none."""
    x, *inputs, grad_y = make_inputs(lengths, device)
    expected = forward_backward(segment_lora, x, *inputs, grad_y)[1]
    products = []
    for file, name in ((segment_lora_file, "wgrad"), (cpu, "sum_pieces"), (torch.nn.functional, "grouped_mm")):
        function = getattr(file, name)
        monkeypatch.setattr(file, name, lambda *args, f=function, **more: products.append(f) or f(*args, **more))
    x = x.detach().requires_grad_()
    y = segment_lora(x, *inputs)
    products.clear()
    y.backward(grad_y)
    assert torch.equal(x.grad.cpu(), expected)
    grouped = type(y.grad_fn).__name__ == "_GroupedLoraBackward"
    assert len(products) == (2 if grouped else 0)  # grouped_mm does what leads to x too


def test_unused_rank_rows_and_absent_slots_get_gradient_zero(device):
    inputs = make_inputs([5, 40], device)
    *_, plan, ranks, _ = inputs
    _, _, grad_A, grad_Bt = forward_backward(segment_lora, *inputs)
    for slot in range(len(ranks)):
        used = int(ranks[slot]) if slot in plan.slots else 0
        for grad in (grad_A, grad_Bt):
            assert not grad[slot, used:].any() and grad[slot, :used].any(-1).all()


# ---- Everyone's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [1e4, math.nan, math.inf])
def test_rewriting_a_users_rows_changes_nobody_else(device, poison):
    x, A, Bt, scale, plan, ranks, grad_y = make_inputs([30, 7, 33, 16], device)
    before = forward_backward(segment_lora, x, A, Bt, scale, plan, ranks, grad_y)
    mine = slice(30, 37)
    other_x, other_grad_y = x.clone(), grad_y.clone()
    other_x[mine] *= poison
    other_grad_y[mine] *= poison
    after = forward_backward(segment_lora, other_x, A, Bt, scale, plan, ranks, other_grad_y)
    row_others, slot_others = torch.ones(len(x), dtype=torch.bool), torch.ones(len(A), dtype=torch.bool)
    row_others[mine] = False
    slot_others[int(plan.slots[1])] = False
    for name, one, other in zip(NAMES, before, after):
        others = slot_others if name in ("grad_A", "grad_Bt") else row_others
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


@pytest.mark.parametrize("ragged", [True, False])
def test_a_users_bits_do_not_depend_on_company_order_or_threads(device, monkeypatch, ragged):
    """On a CPU in any company that is ragged, at one number of threads, or by pieces in any that is not: two ways."""
    op = partial(segment_lora, by_pieces=not ragged)
    monkeypatch.setattr(segments, "CHUNK", 32)  # so that some users' gradients are summed in parts
    on_cpu = backend(device) == "torch"
    if ragged:
        lengths, company = [300, 7, 33, 500, 16, 1] if on_cpu else [70, 7, 33, 1], 19
    else:
        lengths, company = [304, 16, 512, 1024 + 48] if on_cpu else [64, 16, 48], 32
    x, A, Bt, scale, plan, ranks, grad_y = make_inputs(lengths, device)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in ((before, before) if ragged else (1, 2, 3)) if on_cpu else (1, 2):
            torch.set_num_threads(threads)
            runs.append(forward_backward(op, x, A, Bt, scale, plan, ranks, grad_y))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run))
    y, grad_x, grad_A, grad_Bt = runs[0]
    absent = next(u for u in range(len(A)) if u not in plan.slots)
    A, Bt = A.nan_to_num(1.0), Bt.nan_to_num(1.0)  # now the absent slot has an adapter too
    for slot, start, end in zip(plan.slots, plan.starts[:-1], plan.starts[1:]):
        own_x, own_grad_y = x[start:end], grad_y[start:end]
        one = Segments.build([slot], [end - start], device)
        alone = forward_backward(op, own_x, A, Bt, scale, one, ranks, own_grad_y)
        two = Segments.build([absent, slot], [company, end - start], device)
        after_another = forward_backward(op, torch.cat([x[-company:], own_x]), A, Bt, scale, two, ranks,
                                         torch.cat([grad_y[-company:], own_grad_y]))  # fmt: skip
        alone_is_as_ragged = not on_cpu or bool((end - start) % TILE) == ragged
        for run in (alone, after_another) if alone_is_as_ragged else (after_another,):
            assert torch.equal(run[0][-len(own_x) :], y[start:end])
            assert torch.equal(run[1][-len(own_x) :], grad_x[start:end])
            assert torch.equal(run[2][slot], grad_A[slot]) and torch.equal(run[3][slot], grad_Bt[slot])


# ---- Errors --------------------------------------------------------------------------------------------------------


def with_gaps(tensor):
    """The same numbers with others in between."""
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def wrong_inputs(device):
    """message -> (x, A, Bt, scale, segments, ranks, drop) of which one is wrong."""
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16, 32], device)
    drop = torch.tensor([[7, 64], [8, 30]], device=device)
    whole = [tensor.nan_to_num(1.0).long() for tensor in (x, A, Bt)]

    def wrong(**changes):
        right = {"x": x, "A": A, "Bt": Bt, "scale": scale, "segments": segments, "ranks": ranks, "drop": drop}
        return tuple({**right, **changes}.values())

    return {
        "x is (47, 40) but the segments cover 48 rows": wrong(x=x[1:]),
        "x is (48,) but": wrong(x=x[:, 0]),
        "x has 39 columns but A is (4, 8, 40), made for 40. Was this adapter trained": wrong(x=x[:, 1:]),
        "A is (4, 8, 40), so Bt must be [4, 8, N]; got (4, 7, 24)": wrong(Bt=Bt[:, 1:]),
        "must share a dtype; got torch.float32, torch.float64, torch.float32": wrong(A=A.double()),
        "x is torch.int64; ": wrong(x=whole[0], A=whole[1], Bt=whole[2]),
        "scale requires grad but gets no gradient here; detach it": wrong(scale=scale.clone().requires_grad_()),
        "segment of slot 9 but the bank has 4 slots": wrong(segments=Segments.build([0, 9], [16, 32], device)),
        "A is (4, 8, 40) with strides (320, 1, 8); needed is (4, 8, 40), contiguous within a slot": wrong(
            A=A.transpose(1, 2).contiguous().transpose(1, 2)),
        "Bt is (4, 8, 24) with strides (384, 48, 2); needed is (4, 8, 24), contiguous within": wrong(Bt=with_gaps(Bt)),
        "scale (one per slot) is (3,) torch.float32 with strides (1,); needed is (4,) torch.float32, contiguous": wrong(
            scale=scale[1:]),
        "scale (one per slot) is (4,) torch.float32 with strides (2,); needed": wrong(scale=with_gaps(scale)),
        "scale (one per slot) is (4,) torch.float32 with strides (0,); needed": wrong(scale=scale[:1].expand(4)),
        "scale (one per slot) is (4,) torch.float64 with strides (1,); needed": wrong(scale=scale.double()),
        "ranks (one per slot) is (3,) torch.int32 with strides (1,); needed is (4,) torch.int32": wrong(
            ranks=ranks[1:]),
        "ranks (one per slot) is (4,) torch.int32 with strides (2,); needed": wrong(ranks=with_gaps(ranks)),
        "ranks (one per slot) is (4,) torch.int64 with strides (1,); needed": wrong(ranks=ranks.long()),
        "drop (one row per segment) is (1, 2) torch.int64 with strides (2, 1); needed is (2, 2) torch.int64": wrong(
            drop=drop[:1]),
        "drop (one row per segment) is (2, 2) torch.int64 with strides (1, 2); needed": wrong(
            drop=drop.t().contiguous().t()),
        "drop (one row per segment) is (2, 2) torch.int32 with strides (2, 1); needed": wrong(drop=drop.int()),
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_inputs("cpu"))
def test_shapes_dtypes_and_layouts_that_disagree_are_errors(device, message):
    with pytest.raises(ValueError) as error:
        segment_lora(*wrong_inputs(device)[message])
    assert message in str(error.value) and str(error.value).startswith("segment_lora: ")


def test_more_rank_rows_than_kernels_take_are_an_error_there_and_right_on_a_cpu(device):
    inputs = make_inputs([16, 3], device, R=264, sizes=(8, 8))
    if inputs[4].plan is None:
        assert_matches_reference(inputs)
    else:
        with pytest.raises(ValueError, match="A has 264 rank rows at 1 sites but kernels take 256 at once; give each"):
            segment_lora(*inputs[:-1])


def test_a_device_without_an_implementation_is_an_error():
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16])
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        segment_lora(x.to("meta"), A.to("meta"), Bt.to("meta"), scale, segments, ranks)


def test_segments_of_another_backend_are_an_error(device):
    x, A, Bt, scale, segments, ranks, _ = make_inputs([16], device)
    plans = (None, object()) if segments.plan is None else (object(), None)
    other = Segments(segments.slots, segments.starts, *plans)
    with pytest.raises(ValueError, match="the segments were built for another device or backend; pass device="):
        segment_lora(x, A, Bt, scale, other, ranks)
