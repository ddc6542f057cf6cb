"""Does one decoded row of every sequence get its own user's LoRA, and nothing of anybody else's?"""

import math

import pytest
import torch
from accuracy import assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels import bgmv as module
from minipeft_kernels import reference
from minipeft_kernels.bgmv import bgmv

U = 7
SLOTS = {"one row": [3], "one row each": [5, 0, 2], "two sequences of a user": [2, 4, 2, 2], "nobody": [],
         "some have no adapter": [1, -1, 6, -1], "none has an adapter": [-1, -1]}  # fmt: skip
WIDTHS = {"small": (64, 96, 8), "odd": (33, 17, 5), "one": (1, 1, 1), "several blocks": (700, 530, 16),
          "rank 1": (96, 64, 1), "large rank": (40, 56, 300)}  # fmt: skip


def make_inputs(slots, widths=(64, 96, 8), dtype=torch.float32, mixed_ranks=False, device="cpu", seed=0):
    """x, A, Bt, scale, slots, ranks: views of a bank, and NaN wherever nothing may be read."""
    K, N, R = widths
    draw = torch.Generator().manual_seed(seed)
    width_b = N + 16  # Bt lies beside another site's
    bank = torch.full((U, 16 + R * K + R * width_b), math.nan, dtype=dtype)
    x = torch.randn(len(slots), K, generator=draw).to(dtype)
    scale = torch.rand(U, generator=draw) + 0.5
    ranks = torch.tensor([max(R * (u + 1) // U, 1) for u in range(U)], dtype=torch.int32) if mixed_ranks else None
    views = lambda bank: (bank[:, 16 : 16 + R * K].unflatten(1, (R, K)),  # noqa: E731
                          bank[:, 16 + R * K :].unflatten(1, (R, width_b))[:, :, :N])  # fmt: skip
    for view in views(bank):
        for u in set(slots) - {-1}:
            rank = R if ranks is None else int(ranks[u])
            numbers = torch.randn(rank, view.shape[2], generator=draw.manual_seed(97 * seed + u))
            view[u, :rank] = (numbers / view.shape[2] ** 0.5).to(dtype)
    scale[[u for u in range(U) if u not in slots]] = math.nan
    bank = bank.to(device)
    x, scale, slots = x.to(device), scale.to(device), torch.tensor(slots, dtype=torch.int64, device=device)
    return [x, *views(bank), scale, slots, None if ranks is None else ranks.to(device)]


def on_cpu(inputs):
    return [None if x is None else x.cpu() for x in inputs]


def assert_matches_reference(inputs):
    inputs_on_cpu = on_cpu(inputs)
    plain, exact = reference.bgmv(*inputs_on_cpu), reference.bgmv(*in_fp64(inputs_on_cpu))
    y = bgmv(*inputs)
    assert y.dtype == inputs[0].dtype
    assert_as_accurate("y", y, plain, exact)
    assert torch.equal(y[inputs[4] < 0].cpu(), plain[inputs_on_cpu[4] < 0])  # zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
def test_output_matches_reference(device, slots, dtype):
    assert_matches_reference(make_inputs(slots, dtype=dtype, mixed_ranks=True, device=device))


@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["all ranks", "mixed ranks"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_output_matches_reference_at_any_width(device, widths, mixed_ranks):
    assert_matches_reference(make_inputs([4, 0, -1, 4, 6], widths, mixed_ranks=mixed_ranks, device=device))


@few_examples
@given(slots=st.lists(st.integers(-1, U - 1), max_size=12), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       widths=st.tuples(st.integers(1, 96), st.integers(1, 96), st.integers(1, 20) | st.integers(1, 130)))  # fmt: skip
def test_output_matches_reference_for_any_slots(device, slots, dtype, widths):
    assert_matches_reference(make_inputs(slots, widths, dtype, mixed_ranks=True, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_result_is_rounded_and_to_nearest(device, dtype):
    inputs = make_inputs([4, 0, 6], dtype=dtype, device=device)
    exact = reference.bgmv(*in_fp64(on_cpu(inputs)))
    half_a_step = torch.finfo(dtype).eps / 2 * 2 ** exact.abs().log2().floor()
    assert ((bgmv(*inputs).cpu().double() - exact).abs() <= half_a_step + 1e-6).all()


def test_a_rank_of_zero_adds_nothing(device):
    inputs = make_inputs([1, 2], device=device)
    inputs[5] = torch.tensor([8, 0, 8, 8, 8, 8, 8], device=device)  # int64 ranks serve as well
    y = bgmv(*inputs)
    assert (y[0] == 0).all() and (y[1] != 0).all()


def test_a_row_without_adapter_gets_zeros_whatever_it_holds(device):
    inputs = make_inputs([3, -1], device=device)
    inputs[0][1] = math.nan
    assert torch.equal(bgmv(*inputs)[1].cpu(), torch.zeros(96))


@pytest.mark.parametrize("widths", [(64, 96, 8), (700, 530, 16)], ids=str)
def test_bits_of_a_row_do_not_depend_on_company_or_order(device, widths):
    slots = [5, 0, 2, -1, 0, 6]
    x, *rest = make_inputs(slots, widths, mixed_ranks=True, device=device)
    A, Bt, scale, slots, ranks = rest
    together = bgmv(x, *rest)
    assert torch.equal(together, bgmv(x, *rest))  # a second run
    for s in range(len(slots)):
        assert torch.equal(bgmv(x[s : s + 1], A, Bt, scale, slots[s : s + 1], ranks)[0], together[s])
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    assert torch.equal(bgmv(x[order], A, Bt, scale, slots[order], ranks), together[order])


def test_bits_do_not_depend_on_how_many_programs_share_a_row(device, monkeypatch):
    inputs = make_inputs([5, 0, 2], (300, 1100, 16), mixed_ranks=True, device=device)
    together = bgmv(*inputs)
    for programs in (1, 6, 9):  # 1, 2 and 3 for a row of 5 blocks; 1 is what a large batch gets
        monkeypatch.setattr(module, "PROGRAMS", programs)
        assert torch.equal(bgmv(*inputs), together)


def test_rewriting_one_row_or_user_changes_nobody_else(device):
    slots = [5, 0, 2, 0]
    inputs = make_inputs(slots, mixed_ranks=True, device=device)
    before = bgmv(*inputs)
    x = inputs[0].clone()
    x[1] = math.nan
    after = bgmv(x, *inputs[1:])
    assert after[1].isnan().all() and torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    inputs[2][0] = math.nan  # Bt of user 0
    after = bgmv(*inputs)
    assert after[[1, 3]].isnan().all() and torch.equal(after[[0, 2]], before[[0, 2]])


def test_rows_of_x_may_have_a_stride(device):
    inputs = make_inputs([5, 0, 2], device=device)
    wide = torch.full((3, 96), math.nan, device=device)
    wide[:, :64] = inputs[0]
    assert torch.equal(bgmv(wide[:, :64], *inputs[1:]), bgmv(*inputs))


def test_gradients_are_refused_not_dropped(device):
    inputs = make_inputs([5, 0], device=device)
    inputs[0].requires_grad_()
    with pytest.raises(ValueError, match=r"bgmv: an input requires grad .* under torch.no_grad\(\), or train with"):
        bgmv(*inputs)
    with torch.no_grad():
        assert not bgmv(*inputs).requires_grad


def wrong(**changed):
    names = ("x", "A", "Bt", "scale", "slots", "ranks")
    return {**dict(zip(names, make_inputs([5, 0]))), **changed}


WRONG = {
    "matrices of other ranks": (wrong(Bt=torch.zeros(U, 4, 96)), r"A \[7, 8, 64\], Bt \[7, 4, 96\]; give \[S, K\]"),
    "another base": (wrong(A=torch.zeros(U, 8, 32)), "x has 64 columns but A was made for 32. Was this adapter"),
    "mixed dtypes": (wrong(A=torch.zeros(U, 8, 64).bfloat16()), "A torch.bfloat16, .* give all in bf16, all in"),
    "fp64": (dict(zip(wrong(), in_fp64(wrong().values()))), "x is torch.float64, .* give all in bf16"),
    "columns with gaps": (wrong(x=torch.zeros(2, 128)[:, ::2]), r"must be contiguous; call .contiguous\(\)"),
    "scales of another bank": (wrong(scale=torch.ones(3)), r"scale .* \(3,\) torch.float32 .* \(7,\) torch.float32"),
    "a scale in bf16": (wrong(scale=torch.ones(U).bfloat16()), r"scale .* torch.bfloat16 .* \(7,\) torch.float32"),
    "one scale for all": (wrong(scale=torch.ones(1).expand(U)), r"scale .* strides \(0,\); needed .* contiguous"),
    "one slot too many": (wrong(slots=torch.tensor([1, 2, 3])), r"slots .* \(3,\) torch.int64 .* \(2,\) torch.int64"),
    "slots of another dtype": (wrong(slots=torch.tensor([1, 2]).int()), r"slots .* torch.int32 .* \(2,\) torch.int64"),
    "slots with gaps": (wrong(slots=torch.tensor([1, 9, 2, 9])[::2]), r"slots .* strides \(2,\); needed .* contiguous"),
    "ranks of another bank": (wrong(ranks=torch.tensor([8, 8])), r"ranks .* \(7,\) torch.int32 or torch.int64, cont"),
    "ranks with gaps": (wrong(ranks=torch.ones(2 * U).int()[::2]), r"ranks .* strides \(2,\); needed .* contiguous"),
    "another device": (wrong(scale=torch.ones(U, device="meta")), "scale is on meta but x is on cpu"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_say_what_came_and_what_was_needed(arguments, message):
    """Before a path is chosen, so on a CPU and on a GPU alike."""
    with pytest.raises(ValueError, match="bgmv: .*" + message):
        bgmv(**arguments)
