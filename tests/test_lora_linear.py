"""Is lora_linear the frozen map plus every row's own LoRA, at one site or several, and do gradients reach the bank?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import ANY_LENGTHS, assert_as_accurate, few_examples
from hypothesis import given
from hypothesis import strategies as st
from test_segment_lora import DTYPES, K, N, R, make_inputs, with_gaps, wrong_inputs

from minipeft_kernels import lora_linear as lora_linear_file
from minipeft_kernels import reference
from minipeft_kernels.lora_linear import LoraRows, lora_linear
from minipeft_kernels.segment_lora import Lora
from minipeft_kernels.segments import Segments
from minipeft_kernels.shrink_expand import site_table

GROUPS = {"one bank": ([[16, 48]], 0), "any lengths": ([[17, 0, 39], [1]], 5),
          "three banks": ([[32, 0, 16], [80], [16]], 0), "rows without a bank": ([[16], [64, 16]], 32),
          "no bank": ([], 0)}  # fmt: skip


def make_groups(lengths_of_groups, device="cpu", seed=0, gap=0):
    """(x, grad_y, groups) for banks one after another, `gap` rows that belong to no group after each."""
    parts, groups, first_row = [], [], 0
    for i, lengths in enumerate(lengths_of_groups):
        x, A, Bt, scale, segments, ranks, grad_y = make_inputs(lengths, device, mixed_ranks=i % 2 == 0, seed=seed + i)
        grad_A, grad_Bt = (torch.full(M.shape, 7.0, device=device) for M in (A, Bt))
        groups.append(LoraRows(first_row, Lora(A, (Bt,), scale, ranks, segments, grad_A, (grad_Bt,))))
        rest = [torch.rand(gap, size, device=device) for size in (K, N)]
        parts.append((torch.cat([x, rest[0]]), torch.cat([grad_y, rest[1]])))
        first_row += len(x) + gap
    if not parts:
        return torch.rand(32, K, device=device), torch.rand(32, N, device=device), []
    return torch.cat([x for x, _ in parts]), torch.cat([grad_y for _, grad_y in parts]), groups


def make_weight(device, with_bias=False):
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(N, K, generator=draw) / K**0.5
    return weight.to(device), torch.randn(N, generator=draw).to(device) if with_bias else None


def fused(x, grad_ys, weights, biases, groups, tile=None, x_needs_grad=True):
    """y and gradient of x, then grad_A and the grad_Bts of every group, on the CPU."""
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), device=x.device, requires_grad=True)
    ys = lora_linear(x, anchor, weights, biases, groups, tile)
    torch.autograd.backward(ys, grad_ys)
    assert anchor.grad is None or not anchor.grad.any()
    grads = itertools.chain(*((g.lora.grad_A, *g.lora.grad_Bts) for g in groups))
    return [None if t is None else t.detach().cpu() for t in (*ys, x.grad, *grads)]


def by_reference(x, grad_y, weight, bias, groups, dtype):
    """The same for one site by F.linear and the reference op; gradients where `fused` must leave them stay 7."""
    x, grad_y, weight = (t.detach().cpu().to(dtype).clone() for t in (x, grad_y, weight))
    x, bias = x.requires_grad_(), None if bias is None else bias.cpu().to(dtype)
    y, deltas, leaves = F.linear(x, weight, bias), torch.zeros(len(x), len(weight), dtype=dtype), []
    for g in groups:
        segments, ranks = g.lora.segments, g.lora.ranks
        mine = slice(g.first_row, g.first_row + segments.num_rows)
        A, Bt = (t.cpu().to(dtype).detach().requires_grad_() for t in (g.lora.A, *g.lora.Bts))
        leaves += [(A, g), (Bt, g)]
        delta = reference.segment_lora(x[mine], A, Bt, g.lora.scale.cpu(), segments, ranks)
        deltas = deltas + F.pad(delta, (0, 0, mine.start, len(x) - mine.stop))
    (y + deltas).backward(grad_y)
    grads = []
    for leaf, g in leaves:
        stored = torch.zeros(leaf.shape, dtype=torch.bool)
        for slot, length in zip(g.lora.segments.slots, g.lora.segments.starts[1:] - g.lora.segments.starts[:-1]):
            # rank rows past the slot's own: 0 by the tiles, not touched by the kernels
            used = R if g.lora.ranks is None or g.lora.segments.tiles is not None else int(g.lora.ranks[slot])
            stored[slot, :used] = bool(length)
        grads.append(leaf.grad.where(stored, 7.0))
    return [(y + deltas).detach(), x.grad, *grads]


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("groups, gap", GROUPS.values(), ids=GROUPS.keys())
def test_is_linear_plus_lora(device, groups, gap, with_bias):
    check_against_reference(device, groups, gap, with_bias, None)


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "any lengths"])
def test_is_linear_plus_lora_in_fixed_tiles(name):
    check_against_reference("cpu", *GROUPS[name], True, 16)


def check_against_reference(device, groups, gap, with_bias, tile):
    weight, bias = make_weight(device, with_bias)
    x, grad_y, groups = make_groups(groups, device, gap=gap)
    x_before, kept = x.clone(), [g.lora.A.clone() for g in groups]
    kernel = fused(x, [grad_y], [weight], [bias], groups, tile)
    plain = by_reference(x, grad_y, weight, bias, groups, torch.float32)
    exact = by_reference(x, grad_y, weight, bias, groups, torch.float64)
    for i, versions in enumerate(zip(kernel, plain, exact)):
        assert_as_accurate(f"result {i}", *versions)
    assert torch.equal(x, x_before) and weight.grad is None
    assert all(torch.equal(g.lora.A.nan_to_num(), A.nan_to_num()) for g, A in zip(groups, kept))


WIDTHS = (128, 256, 128)  # multiples of the kernels' block of columns


def make_sites(device, slots, lengths, ranks, widths=WIDTHS, K=K, R=R, dtype=torch.float32, drop=None, seed=0):
    """x, grad_ys, weights, biases, and one bank's Lora at sites of one input. Gradients hold 7."""
    draw, U, M = torch.Generator().manual_seed(seed), len(ranks), len(widths)
    segments = Segments.build(slots, lengths, device)
    normal = lambda *shape: torch.randn(shape, generator=draw).to(device, dtype)  # noqa: E731
    bank = normal(U, R * (M * K + sum(widths))) / K**0.5
    grads = torch.full_like(bank, 7.0, dtype=torch.float32 if segments.plan is not None else dtype)

    def views(rows):
        A, *Bts = rows.split([M * R * K, *(R * width for width in widths)], dim=1)
        return A.unflatten(1, (M * R, K)), tuple(Bt.unflatten(1, (R, -1)) for Bt in Bts)

    (A, Bts), (grad_A, grad_Bts), scale = views(bank), views(grads), torch.rand(U, generator=draw).to(device) + 0.5
    sites = site_table(widths, M * R, dtype, device) if segments.plan is not None else None
    ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
    lora = Lora(A, Bts, scale, ranks, segments, grad_A, grad_Bts, sites, None if drop is None else drop.to(device))
    x, *grad_ys = (normal(segments.num_rows, size) for size in (K, *widths))
    weights = [normal(width, K) / K**0.5 for width in widths]
    return x, grad_ys, weights, [normal(width) if m == 1 else None for m, width in enumerate(widths)], lora


def three_sites(device, mixed_ranks, drop=None):
    """make_sites, and the same as three Loras of one site."""
    x, grad_ys, weights, biases, joint = make_sites(device, [2, 0, 3], [16, 48, 0], [1, 8, 5, 8], drop=drop)
    joint = joint if mixed_ranks else replace(joint, ranks=None)
    singles = [replace(joint, A=joint.A[:, m * R : m * R + R], Bts=(Bt,), grad_A=torch.full_like(joint.A[:, :R], 7.0),
                       grad_Bts=(torch.full_like(Bt, 7.0),), sites=None)
               for m, Bt in enumerate(joint.Bts)]  # fmt: skip
    return x, grad_ys, weights, biases, joint, singles


def sites_by_reference(x, grad_ys, weights, biases, lora, dtype):
    """What `fused` gives for one bank on all rows; gradients of slots and rank rows that are not used are 0."""
    there = lambda tensors: [None if t is None else t.detach().cpu().to(dtype) for t in tensors]  # noqa: E731
    leaves = [leaf.requires_grad_() for leaf in there((x, lora.A, *lora.Bts))]
    x, A, *Bts = leaves
    deltas = [reference.segment_lora(x, own_A, Bt, lora.scale.cpu(), lora.segments, lora.ranks)
              for own_A, Bt in zip(A.split(Bts[0].shape[1], dim=1), Bts)]  # fmt: skip
    ys = [F.linear(x, *frozen) + delta for *frozen, delta in zip(there(weights), there(biases), deltas)]
    torch.autograd.backward(ys, there(grad_ys))
    return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]


@few_examples
@given(lengths=ANY_LENGTHS, K=st.integers(1, 150), R=st.integers(1, 24), dtype=st.sampled_from(DTYPES),
       widths=st.one_of(st.tuples(st.integers(1, 150)), st.lists(st.sampled_from([128, 256]), min_size=2, max_size=3)),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_lengths_ranks_widths_sites_and_dtype_match_reference(device, lengths, K, R, dtype, widths, seed):
    """A user of 33 rows is always there: errors of a handful of numbers cannot be compared."""
    lengths, rng = [33, *lengths], np.random.default_rng(seed)
    slots, ranks = rng.permutation(len(lengths)), rng.integers(1, R + 1, len(lengths)).tolist()
    inputs = make_sites(device, slots, lengths, ranks, widths, K, R, dtype, seed=seed)
    lora = inputs[-1]
    results = fused(*inputs[:-1], [LoraRows(0, lora)])
    used = torch.zeros(len(ranks), R, 1, dtype=torch.bool)
    for slot, length in zip(slots, lengths):
        used[slot, : ranks[slot] if length else 0] = True
    for i, grad in enumerate(results[len(widths) + 1 :], len(widths) + 1):
        unused = ~used.repeat(1, grad.shape[1] // R, 1).expand_as(grad)
        assert ((grad[unused] == 7) | (grad[unused] == 0)).all()
        results[i] = grad.masked_fill(unused, 0.0)
    plain, exact = (sites_by_reference(*inputs, kind) for kind in (dtype, torch.float64))
    for i, versions in enumerate(zip(results, plain, exact, strict=True)):
        assert_as_accurate(f"result {i}", *versions)


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["full rank", "mixed ranks"])
def test_sites_of_one_input_at_once_are_the_sites_one_by_one(device, mixed_ranks, dropout):
    drop = torch.tensor([[5, 128], [6, 30], [7, 0]]) if dropout else None
    x, grad_ys, weights, biases, joint, singles = three_sites(device, mixed_ranks, drop)
    *ys, grad_x, grad_A, grad_q, grad_k, grad_v = fused(x, grad_ys, weights, biases, [LoraRows(0, joint)])
    grad_x_sum, grad_As = torch.zeros_like(grad_x), []
    for m, lora in enumerate(singles):
        y, part, grad_A_m, grad_Bt = fused(x, [grad_ys[m]], [weights[m]], [biases[m]], [LoraRows(0, lora)])
        torch.testing.assert_close(ys[m], y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((grad_q, grad_k, grad_v)[m], grad_Bt, rtol=1e-5, atol=1e-5)
        grad_x_sum += part
        grad_As.append(grad_A_m)
    torch.testing.assert_close(grad_A, torch.cat(grad_As, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_x, grad_x_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_products_that_the_caller_has_are_not_computed(device, with_bias):
    """Nor are the weights read, but for the gradient of x."""
    x, grad_ys, weights, _, lora, _ = three_sites(device, mixed_ranks=True)
    biases = [torch.randn(len(weight), device=device) if with_bias else None for weight in weights]
    groups, anchor, found = [LoraRows(0, lora)], torch.zeros((), device=device, requires_grad=True), []
    for known in (False, True):
        own = x.detach().clone().requires_grad_()
        products = [F.linear(x, *pair).detach() for pair in zip(weights, biases)] if known else None
        ys = lora_linear(own, anchor, weights, biases, groups, products=products)
        torch.autograd.backward(ys, grad_ys)
        found.append([*ys, own.grad, lora.grad_A.clone(), *(grad.clone() for grad in lora.grad_Bts)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="products are"):
        lora_linear(x, anchor, weights, biases, groups, products=[torch.zeros(1, 1, device=device)] * 3)


def test_rows_in_any_layout(device):
    weight, bias = make_weight(device, with_bias=True)
    x, grad_y, groups = make_groups([[16, 48], [32]], device, gap=3)
    before = [part.clone() for part in fused(x, [grad_y], [weight], [bias], groups)]
    for layout in (with_gaps, lambda rows: rows.t().contiguous().t()):
        after = fused(layout(x), [layout(grad_y)], [weight], [bias], groups)
        assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_writes_gradients_where_x_needs_none(device):
    weight, _ = make_weight(device)
    with_grad, without = (
        fused(x, [grad_y], [weight], [None], groups, x_needs_grad=needed)
        for needed in (True, False) for x, grad_y, groups in [make_groups([[16, 48], [32]], device)]
    )  # fmt: skip
    assert with_grad[1] is not None and without[1] is None
    assert all(torch.equal(one, other) for i, (one, other) in enumerate(zip(with_grad, without)) if i != 1)


@pytest.mark.parametrize("dropout", [False, True])
def test_where_x_needs_no_gradient_its_rows_are_not_written(device, monkeypatch, dropout):
    """Nor with several sites, where only the sums of planes are left of the way back to x."""
    rows_of_x = []  # whether a backward was given some to write

    def spied(function):
        return lambda *args, **beta: rows_of_x.append(args[-1] is not None) or function(*args, **beta)

    for name in ("backward_triton", "backward_torch"):
        monkeypatch.setattr(lora_linear_file, name, spied(getattr(lora_linear_file, name)))
    drop = torch.tensor([[3, 60], [4, 0], [5, 128]], device=device) if dropout else None
    x, grad_ys, weights, biases, joint, _ = three_sites(device, True, drop)
    results = []
    for needed in (True, False):
        found = fused(x, grad_ys, weights, biases, [LoraRows(0, joint)], x_needs_grad=needed)
        results.append([None if t is None else t.clone() for t in found])
    assert rows_of_x == [True, False]
    for i, (one, other) in enumerate(zip(*results)):
        assert other is None if i == 3 else torch.equal(one, other)


def test_later_micro_steps_add_to_the_first(device):
    """Two micro-batches, the second of them added for one user only, where the other one's gradient is overwritten."""
    x, grad_ys, weights, biases, joint, _ = three_sites(device, mixed_ranks=False)
    first = [part.clone() for part in fused(x, grad_ys, weights, biases, [LoraRows(0, joint)])[4:]]
    again = [2 * grad_y for grad_y in grad_ys]
    second = [part.clone() for part in fused(x, again, weights, biases, [LoraRows(0, joint)])[4:]]
    fused(x, grad_ys, weights, biases, [LoraRows(0, joint)])
    later = torch.tensor([0, 0, 1, 0], dtype=torch.int32, device=device)  # slot 2 has rows and so has slot 0
    both = fused(x, again, weights, biases, [LoraRows(0, replace(joint, accumulate=later))])[4:]
    for one, two, now in zip(first, second, both):
        torch.testing.assert_close(now[2], one[2] + two[2])
        assert torch.equal(now[0], two[0]) and torch.equal(now[1], one[1]) and torch.equal(now[3], one[3])


@pytest.mark.parametrize("lengths", [[32, 16, 48], [32, 528, 48]], ids=["one size of pieces", "two sizes"])
def test_in_tiles_gives_bits_that_do_not_depend_on_the_company(lengths):
    """With two sizes the rows of one do not follow one another; alone they do."""
    weight, _ = make_weight("cpu")
    x, grad_y, groups = make_groups([lengths, [80]])
    y, grad_x, grad_A, grad_Bt, *_ = fused(x, [grad_y], [weight], [None], groups, 16)
    g = groups[0].lora
    for slot, start, end in zip(g.segments.slots, g.segments.starts[:-1], g.segments.starts[1:]):
        alone = Lora(g.A, g.Bts, g.scale, g.ranks, Segments.build([slot], [end - start]),
                     torch.zeros_like(g.A), (torch.zeros_like(g.Bts[0]),))  # fmt: skip
        got = fused(x[start:end], [grad_y[start:end]], [weight], [None], [LoraRows(0, alone)], 16)
        assert torch.equal(got[0], y[start:end]) and torch.equal(got[1], grad_x[start:end])
        assert torch.equal(got[2][slot], grad_A[slot]) and torch.equal(got[3][slot], grad_Bt[slot])


def test_keeps_a_users_nan_to_that_user(device):
    weight, _ = make_weight(device)
    x, grad_y, groups = make_groups([[32, 16, 48], [80]], device)
    before = [part.clone() for part in fused(x, [grad_y], [weight], [None], groups)]
    ruined, slot = x.clone(), int(groups[0].lora.segments.slots[1])
    ruined[32:48] = math.nan
    after = fused(ruined, [grad_y], [weight], [None], groups)
    for i, (one, other) in enumerate(zip(before, after)):
        others = torch.ones(len(one), dtype=torch.bool)
        if i == 0:
            others[32:48] = False
        if i in (2, 3):
            others[slot] = False
        assert torch.equal(one[others], other[others]), i
        assert torch.equal(one, other) == (i in (1, 4, 5))  # grad_x does not depend on x; the other bank saw nothing


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", wrong_inputs("cpu"))
def test_shapes_dtypes_and_layouts_that_disagree_are_errors(device, message):
    x, A, Bt, scale, segments, ranks, drop = wrong_inputs(device)[message]
    lora = Lora(A, (Bt,), scale, ranks, segments, torch.zeros_like(A), (torch.zeros_like(Bt),), drop=drop)
    if A.shape[1] != Bt.shape[1]:
        message = "1 frozen maps, but a LoRA has 1 Bts and 8 rank rows in A; give it as many sites"
    if x.ndim == 1 or len(x) < segments.num_rows:
        return  # rows of a group are cut out of x, see the next test
    with pytest.raises(ValueError) as error:
        call(x, [torch.rand(N, K, device=device)], lora)
    assert message in str(error.value) and str(error.value).startswith("lora_linear: ")


def call(x, weights, lora):
    lora_linear(x, torch.zeros((), requires_grad=True), weights, [None] * len(weights), [LoraRows(0, lora)])


def test_what_does_not_fit_the_frozen_maps_is_an_error(device):
    x, _, weights, _, lora, _ = three_sites(device, mixed_ranks=True)
    narrow = [weights[0], weights[1][1:], weights[2]]
    later = torch.zeros(4, dtype=torch.int64, device=device)
    for wrong, frozen, message in (
        (lora, narrow, r"the frozen maps have \[128, 255, 128\] outputs, but a LoRA's Bts have \[128, 256, 128\]"),
        (replace(lora, grad_A=lora.grad_A[:, 1:]), weights, r"grad_A is \(4, 23, 40\) .* needed is \(4, 24, 40\)"),
        (replace(lora, grad_Bts=tuple(map(with_gaps, lora.grad_Bts))), weights, "grad_Bt is .* contiguous within a"),
        (replace(lora, grad_Bts=lora.grad_Bts[:2]), weights, "3 Bts but 2 grad_Bts"),
        (replace(lora, accumulate=later), weights, r"accumulate \(one per slot\) is \(4,\) torch.int64 .* torch.int32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"lora_linear: {message}"):
            call(x, frozen, wrong)


def test_frozen_maps_that_do_not_fit_x_are_errors(device):
    x, _, (g,) = make_groups([[16, 32]], device)
    weight, bias = make_weight(device, with_bias=True)
    for frozen, biases, tile, message in (
        ([weight], [], None, r"x is \(48, 40\), with 1 weights and 0 biases; give rows"),
        ([], [], None, r"0 frozen maps, but a LoRA has 1 Bts"),
        ([weight[:, 1:]], [bias], None, r"x has 40 columns but a weight is \(24, 39\); needed is \[N, 40\]"),
        ([weight], [bias[1:]], None, r"a weight is \(24, 40\) but its bias \(23,\); needed is \(24,\)"),
        ([weight.double()], [None], None, "x is torch.float32 on .* but a weight torch.float64 on .*; convert one"),
        ([weight], [bias.bfloat16()], None, ".* its bias torch.bfloat16 on .*; convert one"),
        ([weight], [bias], 32, "x has 48 rows, no multiple of tile 32; fill them up"),
        ([weight], [bias], 0, "x has 48 rows, no multiple of tile 0; fill them up"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"lora_linear: {message}"):
            lora_linear(x, torch.zeros((), requires_grad=True), frozen, biases, [g], tile)


def test_gradients_that_backward_cannot_write_are_errors(device):
    x, _, (g,) = make_groups([[16, 32]], device)
    for dtype in (torch.int64, *([torch.bfloat16] if g.lora.segments.plan is not None else [])):
        with pytest.raises(ValueError, match=f"lora_linear: grad_A is {dtype}; gradients are summed and kept in"):
            call(x, [make_weight(device)[0]], replace(g.lora, grad_A=g.lora.grad_A.to(dtype)))


def test_sites_that_kernels_cannot_take_at_once_are_errors(kernels):
    x, _, weights, _, lora, singles = three_sites(kernels, mixed_ranks=True)
    odd = replace(lora, Bts=(lora.Bts[0], lora.Bts[1][:, :, :255].contiguous(), lora.Bts[2]),
                  grad_Bts=(lora.grad_Bts[0], lora.grad_Bts[1][:, :, :255].contiguous(), lora.grad_Bts[2]))  # fmt: skip
    apart = replace(lora, Bts=tuple(Bt.clone() for Bt in lora.Bts))
    for wrong, frozen, message in (
        (replace(lora, sites=None), weights, r"3 sites of \[128, 256, 128\] columns at once need `sites`.* got none"),
        (odd, [weights[0], weights[1][:255], weights[2]], "at once need `sites`.* got one of other widths"),
        (replace(lora, sites=lora.sites[1:]), weights, r"sites \(one row per block of columns\) is"),
        (replace(lora, sites=lora.sites.long()), weights, r"sites \(one row per block of columns\) is .* torch.int64"),
        (apart, weights, "must lie one right after the other in every slot"),
        (replace(singles[0], sites=lora.sites), weights[:1], "a table of several sites but one Bt; leave sites out"),
    ):
        with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
            call(x, frozen, wrong)


def test_groups_that_pass_the_end_of_x_are_an_error(device):
    x, _, groups = make_groups([[16, 32]], device)
    with pytest.raises(ValueError, match=r"lora_linear: x is \(47, 40\) but the segments cover 48 rows"):
        lora_linear(x[1:], torch.zeros((), requires_grad=True), [make_weight(device)[0]], [None], groups)


def test_fixed_tiles_are_refused_by_the_kernels(device):
    x, _, groups = make_groups([[16, 32]], device)
    if groups[0].lora.segments.plan is None:
        pytest.skip("the CPU path has them")
    with pytest.raises(ValueError, match="are not built for a GPU"):
        lora_linear(x, torch.zeros((), requires_grad=True), [make_weight(device)[0]], [None], groups, 16)
