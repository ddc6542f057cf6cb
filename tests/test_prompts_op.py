"""Are prompts put where the plan says, and is every user's gradient the sum over their own sequences, in order?"""

import itertools
import math

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels import reference
from minipeft_kernels.prompts import PromptPlan, PromptRows, gather_prompts, prompt_rows

DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
          "bf16, prompts fp32": (torch.bfloat16, torch.float32)}  # fmt: skip
V, U = 6, 7
# Each sequence: (slot, rows of its prompt, rows of its text).
CASES = {
    "one sequence": [(0, 4, 3)],
    "several sequences of a user": [(2, 5, 7), (2, 5, 1), (0, 3, 4), (2, 5, 2), (4, 1, 9), (0, 3, 1)],
    "users without prompts": [(1, 0, 6), (0, 4, 2), (3, 0, 5), (3, 0, 2)],
    "prompts only": [(5, 2, 0), (1, V, 0), (5, 2, 0)],
    "nobody has a prompt": [(1, 0, 4)],
    "many sequences": [(6, 3, 1)] * 9 + [(2, 4, 2)] * 12,
}
NAMES = ("y", "grad_x", "grad_prompts")


def rows_of(sequences):
    """First row of each sequence, and the number of rows of all."""
    ends = np.cumsum([0, *(count + length for _, count, length in sequences)])
    return ends[:-1], int(ends[-1])


def make_plan(sequences, device):
    slots, counts, _ = zip(*sequences)
    return PromptPlan.build(slots, rows_of(sequences)[0], counts, device)


def make_inputs(sequences, device, dtypes=DTYPES["fp32"], K=40, seed=0):
    """x, prompts, plan, grad_y. prompts is a view of a bank, with gaps between slots and between rows.

    Placeholder rows of x, virtual tokens past a user's count, absent slots and the gaps hold NaN.
    """
    draw, (first_rows, T) = torch.Generator().manual_seed(seed), rows_of(sequences)
    bank = torch.full((U, V + 1, K + 3), math.nan, dtype=dtypes[1], device=device)
    prompts = bank[:, :V, 2 : 2 + K]
    x, grad_y = (torch.randn(T, K, generator=draw) for _ in range(2))
    for (slot, count, _), first in zip(sequences, first_rows):
        prompts[slot, :count] = torch.randn(count, K, generator=draw).to(device, dtypes[1])
        x[first : first + count] = math.nan
    return x.to(device, dtypes[0]), prompts, make_plan(sequences, device), grad_y.to(device, dtypes[0])


def forward_backward(op, x, prompts, plan, grad_y):
    x, prompts = (tensor.detach().requires_grad_() for tensor in (x, prompts))
    y = op(x, prompts, plan)
    y.backward(grad_y)
    grad_prompts = torch.zeros_like(prompts) if prompts.grad is None else prompts.grad  # the reference without prompts
    return [tensor.detach().cpu() for tensor in (y, x.grad, grad_prompts)]


def assert_matches_reference(inputs):
    kernel = forward_backward(gather_prompts, *inputs)
    plain = forward_backward(reference.gather_prompts, *inputs)
    exact = forward_backward(reference.gather_prompts, *in_fp64(inputs))
    dtypes = inputs[0].dtype, inputs[0].dtype, inputs[1].dtype
    for name, dtype, *versions in zip(NAMES, dtypes, kernel, plain, exact):
        assert versions[0].dtype == dtype and not versions[0].isnan().any(), name
        assert_as_accurate(name, *versions)


# ---- The op by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_match_reference(sequences, dtypes, device):
    assert_matches_reference(make_inputs(sequences, device, dtypes))


@pytest.mark.parametrize("K", [1, 17, 96, 1030])
def test_any_width_matches_reference(K, device):
    assert_matches_reference(make_inputs(CASES["several sequences of a user"], device, K=K))


@few_examples
@given(data=st.data())
def test_any_batch_matches_reference(data, device):
    counts = data.draw(st.lists(st.integers(0, V), min_size=U, max_size=U))
    owners = data.draw(st.lists(st.tuples(st.integers(0, U - 1), st.integers(0, 5)), min_size=1, max_size=12))
    assert_matches_reference(make_inputs([(slot, counts[slot], length) for slot, length in owners], device))


def test_rows_are_prompt_rows_or_those_of_x_to_the_bit(device):
    sequences = CASES["several sequences of a user"]
    x, prompts, plan, grad_y = make_inputs(sequences, device)
    y, grad_x, grad_prompts = forward_backward(gather_prompts, x, prompts, plan, grad_y)
    x, prompts, grad_y = x.cpu(), prompts.cpu(), grad_y.cpu()
    for (slot, count, length), first in zip(sequences, rows_of(sequences)[0]):
        own, text = slice(first, first + count), slice(first + count, first + count + length)
        assert torch.equal(y[own], prompts[slot, :count]) and torch.equal(y[text], x[text])
        assert not grad_x[own].any() and torch.equal(grad_x[text], grad_y[text])
    used = {slot: count for slot, count, _ in sequences}
    for slot in range(U):
        count = used.get(slot, 0)
        assert grad_prompts[slot, :count].all() and not grad_prompts[slot, count:].any()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_gradients_add_up_in_row_order_however_the_sequences_are_listed(dtypes, device):
    sequences = CASES["many sequences"]
    x, prompts, plan, grad_y = make_inputs(sequences, device, dtypes)
    expected = torch.zeros(U, V, 40)
    for (slot, count, _), first in zip(sequences, rows_of(sequences)[0]):
        expected[slot, :count] += grad_y[first : first + count].float().cpu()
    shuffled = np.random.default_rng(1).permutation(len(sequences))
    slots, counts, _ = zip(*sequences)
    lists = (slots, rows_of(sequences)[0], counts)
    other_plan = PromptPlan.build(*(np.array(numbers)[shuffled] for numbers in lists), device)
    for either in (plan, other_plan):
        _, _, grad_prompts = forward_backward(gather_prompts, x, prompts, either, grad_y)
        assert torch.equal(grad_prompts, expected.to(dtypes[1]))


def test_inputs_are_left_alone_and_any_gradient_layout_is_taken(device):
    x, prompts, plan, grad_y = make_inputs(CASES["several sequences of a user"], device)
    before = [tensor.clone() for tensor in (x, prompts, grad_y)]
    first = forward_backward(gather_prompts, x, prompts, plan, grad_y)
    for one, other in zip(before, (x, prompts, grad_y)):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    by_column = [tensor.T.contiguous().T for tensor in (x, grad_y)]  # [T, K], each column's numbers side by side
    second = forward_backward(gather_prompts, by_column[0], prompts, plan, by_column[1])
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_only_the_gradients_that_are_needed_are_made(device):
    x, prompts, plan, grad_y = make_inputs(CASES["one sequence"], device)
    for needs_x, needs_prompts in ((True, False), (False, True)):
        x, prompts = x.detach().requires_grad_(needs_x), prompts.detach().requires_grad_(needs_prompts)
        gather_prompts(x, prompts, plan).backward(grad_y)
        assert (x.grad is not None) == needs_x and (prompts.grad is not None) == needs_prompts


@pytest.mark.parametrize("poison", [1e4, math.nan])
def test_rewriting_a_users_rows_and_prompt_changes_nobody_else(poison, device):
    sequences = CASES["several sequences of a user"]
    x, prompts, plan, grad_y = make_inputs(sequences, device)
    before = forward_backward(gather_prompts, x, prompts, plan, grad_y)
    owner = torch.tensor([slot for slot, count, length in sequences for _ in range(count + length)])
    other_x, other_prompts, other_grad_y = x.clone(), prompts.clone(), grad_y.clone()
    other_x[owner == 0] *= poison
    other_grad_y[owner == 0] *= poison
    other_prompts[0] *= poison
    after = forward_backward(gather_prompts, other_x, other_prompts, plan, other_grad_y)
    for name, one, other in zip(NAMES, before, after):
        others = torch.arange(U) != 0 if name == "grad_prompts" else owner != 0
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_a_users_bits_do_not_depend_on_company_order_or_threads(dtypes, device):
    sequences = [(6, 3, 1), (2, 4, 2), (2, 4, 0), (0, 3, 2)] * 4
    inputs = make_inputs(sequences, device, dtypes)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(forward_backward(gather_prompts, *inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*runs))

    x, prompts, _, grad_y = inputs
    sizes = [count + length for _, count, length in sequences]
    pieces = [list(tensor.split(sizes)) for tensor in (x, grad_y, runs[0][0], runs[0][1])]
    for slots in ([0], [2], [6], [6, 2, 0]):  # alone, and users in another order, their own sequences in the same
        chosen = [i for slot in slots for i, sequence in enumerate(sequences) if sequence[0] == slot]
        own_x, own_grad_y, y, grad_x = (torch.cat([piece[i] for i in chosen]) for piece in pieces)
        got = forward_backward(gather_prompts, own_x, prompts, make_plan([sequences[i] for i in chosen], device),
                               own_grad_y)  # fmt: skip
        assert torch.equal(got[0], y) and torch.equal(got[1], grad_x)
        assert torch.equal(got[2][slots], runs[0][2][slots])


# ---- Of several banks, gradients into the banks --------------------------------------------------------------------


def make_groups(device, dtypes=DTYPES["fp32"]):
    """(x, grad_y, groups): two banks whose sequences take turns, and one without prompts in this batch."""
    x, prompts, _, grad_y = make_inputs(CASES["many sequences"], device, dtypes)
    _, short_prompts, *_ = make_inputs([(3, 2, 1)], device, dtypes, seed=1)
    first_rows, _ = rows_of(CASES["many sequences"])
    plans = [PromptPlan.build([6, 6, 2, 2], first_rows[[0, 2, 10, 12]], [3, 3, 4, 4], device),
             PromptPlan.build([3, 3, 3], first_rows[[1, 11, 4]], [2, 2, 2], device),
             PromptPlan.build([1], [0], [0], device)]  # fmt: skip
    all_prompts = [prompts, short_prompts[:, :2], prompts]
    grads = [torch.full((U, p.shape[1] + 1, 50), 7.0, device=device)[:, :-1, 4:44] for p in all_prompts]
    return x.nan_to_num(0.5), grad_y, [PromptRows(*group) for group in zip(all_prompts, plans, grads)]


def fused(x, grad_y, groups, x_needs_grad=True):
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), requires_grad=True)
    y = prompt_rows(x, anchor, groups)
    y.backward(grad_y)
    assert anchor.grad is None or not anchor.grad.any()
    return [tensor if tensor is None else tensor.detach().cpu().clone()
            for tensor in (y, x.grad, *(g.grad_prompts for g in groups))]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_prompt_rows_is_gather_prompts_for_every_group(dtypes, device):
    x, grad_y, groups = make_groups(device, dtypes)
    leaf = y = x.detach().requires_grad_()
    prompts = [g.prompts.detach().requires_grad_() for g in groups]
    for g, own in zip(groups, prompts):
        y = gather_prompts(y, own, g.plan)
    y.backward(grad_y)
    got = fused(x, grad_y, groups)
    assert torch.equal(got[0], y.detach().cpu()) and torch.equal(got[1], leaf.grad.cpu())
    for own, g, grad in zip(prompts, groups, got[2:]):
        used = torch.zeros(own.shape, dtype=torch.bool)
        for slot, count in zip(g.plan.slots, g.plan.counts):
            used[slot, :count] = True
        assert (grad[~used] == 7.0).all() and torch.equal(grad[used].to(dtypes[1]), own.grad.cpu()[used])


def test_prompt_rows_overwrites_old_gradients_and_needs_no_gradient_of_x(device):
    x, grad_y, groups = make_groups(device)
    with_grad, again, without = (fused(x, grad_y, groups, needs) for needs in (True, True, False))
    assert without[1] is None
    assert all(torch.equal(one, other) for one, other in zip(with_grad, again))
    assert all(torch.equal(one, other) for i, (one, other) in enumerate(zip(with_grad, without)) if i != 1)


def test_prompt_rows_without_groups_is_x(device):
    x, grad_y, _ = make_groups(device)
    y, grad_x = fused(x, grad_y, [])
    assert torch.equal(y, x.cpu()) and torch.equal(grad_x, grad_y.cpu())


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists, message", [
    (([0, 1], [0], [4, 4]), "2 slots, 1 first rows and 2 counts"),
    (([[0, 1]], [[0, 4]], [[4, 4]]), "give one of each per sequence"),
    (([0, -1], [0, 4], [4, 4]), "a negative slot, first row or count"),
    (([0, 1], [0, -4], [4, 4]), "a negative slot, first row or count"),
    (([0, 1], [0, 4], [4, -4]), "a negative slot, first row or count"),
    (([2, 1, 2], [0, 4, 8], [4, 3, 2]), "slot 2 comes with prompts of 2 and of 4 rows; a user's prompt has one length"),
    (([2, 1, 2], [0, 4, 8], [4, 3, 0]), "slot 2 comes with prompts of 0 and of 4 rows; a user's prompt has one length"),
    (([0, 1], [7, 4], [2, 4]), "a prompt takes rows 4 to 7 and another one begins at row 7"),
    (([0, 0], [4, 4], [2, 2]), "a prompt takes rows 4 to 5 and another one begins at row 4"),
    (([0, 1, 2], [0, 4, 2], [9, 2, 1]), "a prompt takes rows 0 to 8 and another one begins at row 2"),
])  # fmt: skip
def test_plans_that_make_no_sense_are_refused(lists, message, device):
    with pytest.raises(ValueError, match=message) as error:
        PromptPlan.build(*lists, device)
    assert str(error.value).startswith("PromptPlan.build: ")


def test_prompts_side_by_side_and_empty_ones_anywhere_are_fine(device):
    plan = PromptPlan.build([0, 1, 2, 3], [4, 0, 8, 5], [4, 4, 2, 0], device)
    assert plan.slots.tolist() == [1, 0, 2] and plan.first_rows.tolist() == [0, 4, 8]
    assert plan.rows.tolist() == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9] and plan.tokens.tolist() == [0, 1, 2, 3] * 2 + [0, 1]
    assert plan.token_slots.tolist() == [0] * 4 + [1] * 4 + [2] * 2 and plan.starts.tolist() == list(range(11))
    assert len(PromptPlan.build([], [], [], device).rows) == 0


def wrong_inputs(device):
    """message -> (x, prompts, plan) of which one is wrong."""
    x, prompts, plan, _ = make_inputs([(0, 4, 3), (1, 5, 0)], device)
    return {
        "x is (12, 39) and prompts is (7, 6, 40); needs [T, K] and [U, V, K]. Was this": (x[:, 1:], prompts, plan),
        "x is (12,) and prompts": (x[:, 0], prompts, plan),
        "prompts is (6, 40); needs": (x, prompts[0], plan),
        "prompts are torch.bfloat16; give them in the dtype of x, torch.float32": (x, prompts.bfloat16(), plan),
        "stride(2) of prompts is 42; only slots and rows": (x, prompts.permute(2, 1, 0).contiguous().permute(2, 1, 0),
                                                           plan),
        "a prompt of slot 1 but the bank has 1 slots": (x, prompts[:1], plan),
        "a prompt of 5 rows but the bank's prompts have 4": (x, prompts[:, :4], plan),
        "a prompt takes rows up to 11 but x has 11 rows; leave": (x[:11], prompts, plan),
        "the plan is on cpu but x is on meta": (x.to("meta"), prompts.to("meta"), make_plan([(0, 4, 3)], "cpu")),
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_inputs("cpu"))
def test_inputs_that_disagree_are_errors_of_both_ops(message, device):
    x, prompts, plan = wrong_inputs(device)[message]
    with pytest.raises(ValueError) as error:
        gather_prompts(x, prompts, plan)
    assert message in str(error.value) and str(error.value).startswith("gather_prompts: ")
    with pytest.raises(ValueError) as error:
        prompt_rows(x, torch.zeros((), requires_grad=True), [PromptRows(prompts, plan, torch.zeros_like(prompts))])
    assert message in str(error.value) and str(error.value).startswith("prompt_rows: ")


def test_groups_that_share_a_row_are_an_error(device):
    x, _, groups = make_groups(device)
    thief = PromptRows(groups[1].prompts, PromptPlan.build([3], [2], [2], device), groups[1].grad_prompts)
    for order in itertools.permutations([groups[0], thief]):
        with pytest.raises(ValueError, match="prompt_rows: a prompt takes rows 0 to 2 and another one begins at row 2"):
            prompt_rows(x, torch.zeros((), requires_grad=True), list(order))


def test_gradients_must_have_the_shape_of_the_prompts(device):
    x, prompts, plan, _ = make_inputs(CASES["one sequence"], device)
    for grads in (torch.zeros(U, V - 1, 40, device=device), torch.zeros(U, 40, V, device=device).transpose(1, 2)):
        with pytest.raises(ValueError, match=r"it must be \(7, 6, 40\), each row's numbers side by side"):
            prompt_rows(x, torch.zeros((), requires_grad=True), [PromptRows(prompts, plan, grads)])
    whole = PromptRows(prompts, plan, torch.zeros_like(prompts, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prompt_rows: grad_prompts is torch.int64; gradients need a floating dtype"):
        prompt_rows(x, torch.zeros((), requires_grad=True), [whole])


def test_fp64_is_refused_by_the_kernels_and_exact_without_them(request, device):
    inputs = in_fp64(make_inputs(CASES["many sequences"], device))
    if request.node.callspec.params["device"] == "triton":
        with pytest.raises(ValueError, match=r"x is torch.float64; the kernels take torch.bfloat16"):
            gather_prompts(*inputs[:3])
    else:
        kernel, exact = (forward_backward(op, *inputs) for op in (gather_prompts, reference.gather_prompts))
        for one, other in zip(kernel, exact):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
