"""Is the fused bottleneck the loop over users, in output and gradients, and is every user's part of it their own?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import LENGTHS, assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st
from test_segment_lora import with_gaps

import minipeft_kernels.segments
from minipeft_kernels import reference
from minipeft_kernels.activations import ACTIVATIONS
from minipeft_kernels.bottleneck import MAX_F, Bottleneck, BottleneckTensors, configuration, segment_bottleneck
from minipeft_kernels.bottleneck_rows import BottleneckRows, bottleneck_rows
from minipeft_kernels.segments import BLOCKS, Segments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("y", "grad_x", "grad_residual", *(f"grad_{name}" for name in BottleneckTensors._fields))
GROUPS = {"three banks": ([[17, 0, 5], [9], [16]], 0),
          "rows without a bank": ([[7], [20, 6]], 9), "a bank without rows": ([[0], [20]], 3),
          "no bank": ([], 12)}  # fmt: skip
K, F = 40, 10


def views(bank, K, F):
    """down, down_bias, up, up_bias as views of a bank [U, 2 F K + F + K + 6], with gaps between them."""
    down, _, down_bias, _, up, _, up_bias = bank.split((F * K, 1, F, 2, F * K, 3, K), dim=1)
    return BottleneckTensors(down.unflatten(1, (F, K)), down_bias, up.unflatten(1, (F, K)), up_bias)


def make_inputs(lengths, device, dtype=torch.float32, K=K, F=F, activation="gelu", serial=False, plain=False, seed=0):
    """x, residual, down, down_bias, up, up_bias, segments, activation, scale, widths, grad_y.

    Slot order differs from row order; two slots are absent. The weights are views of one bank. Slots without rows, what
    lies past a slot's own width and what lies between the four hold NaN. plain: no scale and every width F.
    """
    draw, U = torch.Generator().manual_seed(seed), len(lengths) + 2
    slots = np.random.default_rng(seed).permutation(U)[: len(lengths)]
    widths = torch.tensor([F if plain else (F, 1, (F + 1) // 2)[u % 3] for u in range(U)], dtype=torch.int32)
    bank = torch.full((U, 2 * F * K + F + K + 6), math.nan)
    down, down_bias, up, up_bias = views(bank, K, F)
    for slot, length in zip(slots, lengths):
        if length:
            width = int(widths[slot])
            down[slot, :width] = torch.randn(width, K, generator=draw) / K**0.5
            down_bias[slot, :width] = torch.randn(width, generator=draw)
            up[slot, :width] = torch.randn(width, K, generator=draw) / width**0.5
            up_bias[slot] = torch.randn(K, generator=draw)
    scale = torch.rand(U, generator=draw) + 0.5
    x, residual, grad_y = (torch.randn(sum(lengths), K, generator=draw).to(device, dtype) for _ in range(3))
    return (x, None if serial else residual, *views(bank.to(device, dtype), K, F),
            Segments.build(slots, lengths, device), activation,
            None if plain else scale.to(device), None if plain else widths.to(device), grad_y)  # fmt: skip


def forward_backward(op, *inputs):
    """y and the gradients of x, residual (0 if there is none) and the four weights, on the CPU."""
    *tensors, segments, activation, scale, widths, grad_y = inputs
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    y = op(*leaves, segments, activation, scale, widths)
    y.backward(grad_y)
    return [y.detach().cpu(), *(torch.zeros(1) if leaf is None else leaf.grad.cpu() for leaf in leaves)]


def assert_matches_reference(inputs):
    kernel = forward_backward(segment_bottleneck, *inputs)
    plain = forward_backward(reference.segment_bottleneck, *inputs)
    exact = forward_backward(reference.segment_bottleneck, *in_fp64(inputs))
    for name, *versions in zip(NAMES, kernel, plain, exact):
        assert versions[0].dtype == versions[1].dtype
        assert_as_accurate(name, *versions)


def rows_of(inputs):
    """Slot -> its rows, for slots that have rows."""
    segments = inputs[6]
    spans = zip(segments.slots.tolist(), segments.starts[:-1].tolist(), segments.starts[1:].tolist())
    return {slot: slice(start, end) for slot, start, end in spans if start < end}


# ---- The op by itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_reference(lengths, dtype, device):
    assert_matches_reference(make_inputs(lengths, device, dtype))


@pytest.mark.parametrize("serial", [False, True], ids=["residual", "serial"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_serial_or_not_matches_reference(activation, serial, device):
    assert_matches_reference(make_inputs([33, 6, 40], device, activation=activation, serial=serial))


@pytest.mark.parametrize("K, F, dtype", [(17, 1, "fp32"), (64, 16, "bf16"), (96, 50, "bf16"), (70, 100, "fp32"),
                                         (40, 200, "bf16"), (33, 256, "fp32")])  # fmt: skip
def test_any_width_matches_reference(K, F, dtype, device):
    assert_matches_reference(make_inputs([40, 5] if F > 1 else [20, 5, 9, 13, 3, 11], device, DTYPES[dtype], K, F))


@few_examples
@given(lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 40]), max_size=3), K=st.integers(16, 100),
       F=st.integers(4, 70), dtype=st.sampled_from(list(DTYPES.values())),
       activation=st.sampled_from(list(ACTIVATIONS)), serial=st.booleans(), plain=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_lengths_widths_and_dtype_match_reference(lengths, K, F, dtype, activation, serial, plain, seed, device):
    """Two users of many rows are always there: errors of a handful of numbers cannot be compared."""
    assert_matches_reference(make_inputs([33, 20, *lengths], device, dtype, K, F, activation, serial, plain, seed))


@pytest.mark.parametrize("F", [16, 50, 100])
def test_users_of_several_tiles_match_reference(F, device):
    """In bf16, whose tiles are of up to 64 rows."""
    assert_matches_reference(make_inputs([130, 65, 64], device, torch.bfloat16, F=F))


def test_rows_in_any_layout(device):
    x, residual, *inputs, grad_y = make_inputs([33, 6], device)
    runs = [forward_backward(segment_bottleneck, layout(x), layout(residual), *inputs, layout(grad_y))
            for layout in (torch.Tensor.contiguous, with_gaps)]  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_segments_of_several_chunks_match_reference(device, monkeypatch):
    monkeypatch.setattr(minipeft_kernels.segments, "CHUNK", 16)
    inputs = make_inputs([40, 16, 3, 33], device)
    if inputs[6].plan is not None:
        assert len(inputs[6].plan.finals) == 2 and inputs[6].plan.num_parts == 6
    assert_matches_reference(inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_slopes_are_torchs_to_rounding(activation, device):
    z = torch.cat([torch.linspace(-14, 14, 225), torch.tensor([-1e4, -90.0, -0.0, 1e-30, 90.0, 1e4])])
    one, zero = torch.ones(1, 1, 1, device=device), torch.zeros(1, 1, device=device)
    x, nothing = z[:, None].to(device), torch.zeros(len(z), 1, device=device)
    segments = Segments.build([0], [len(z)], device)
    y, slope, *_ = forward_backward(  # of a bottleneck that is the activation
        segment_bottleneck, x, nothing, one, zero, one, zero, segments, activation, None, None, torch.ones_like(x))
    for name, result in (("act", y[:, 0]), ("slope", slope[:, 0])):
        plain, exact = (_by_torch(name, activation, z.to(dtype)) for dtype in (torch.float32, torch.float64))
        errors = [((values.double() - exact) / exact.abs().clamp(min=1.0)).abs().max() for values in (result, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-7, f"{name}: worst error {errors[0]:.1e}, PyTorch's {errors[1]:.1e}"


def _by_torch(name, activation, z):
    z = z.requires_grad_()
    values = ACTIVATIONS[activation](z)
    return (values if name == "act" else torch.autograd.grad(values.sum(), z)[0]).detach()


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_reads(device):
    *inputs, grad_y = make_inputs([20, 3], device)
    strided = grad_y.t().contiguous().t()
    assert not strided.is_contiguous()
    runs = [forward_backward(segment_bottleneck, *inputs, grad) for grad in (grad_y, strided)]
    assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_weights_train_where_x_needs_no_gradient(device):
    inputs = make_inputs([20, 3], device)
    x, residual, *weights = inputs[:6]
    weights = [weight.detach().requires_grad_() for weight in weights]
    segment_bottleneck(x, residual, *weights, *inputs[6:10]).backward(inputs[10])
    expected = forward_backward(segment_bottleneck, *inputs)[3:]
    assert x.grad is None and all(torch.equal(one.grad.cpu(), other) for one, other in zip(weights, expected))


def test_a_scale_is_not_rounded_to_bf16(device):
    """One that bf16 would round up by nearly 2^-8."""
    x, _, *weights, segments, activation, scale, widths, _ = make_inputs([5, 200], device, torch.bfloat16, plain=True)
    scale = torch.full((len(weights[0]),), 1.25 + 2**-8 + 2**-12, device=device)
    inputs = (x, torch.zeros_like(x), *weights, segments, activation, scale, widths)
    y = segment_bottleneck(*inputs).cpu().double()
    exact = reference.segment_bottleneck(*in_fp64([t.cpu() if isinstance(t, torch.Tensor) else t for t in inputs]))
    assert abs(float((y * exact).sum() / exact.square().sum()) - 1) < 1e-3


def test_unused_parts_and_absent_slots_get_gradient_zero(device):
    inputs = make_inputs([5, 40, 0, 7], device)
    widths, rows = inputs[9], rows_of(inputs)
    grads = BottleneckTensors(*forward_backward(segment_bottleneck, *inputs)[3:])
    for slot in range(len(widths)):
        used = int(widths[slot]) if slot in rows else 0
        for grad in (grads.down, grads.down_bias, grads.up):
            assert not grad[slot, used:].any()
            assert all(row.any() for row in grad[slot, :used])
        assert grads.up_bias[slot].any() == (slot in rows)


def test_rewriting_a_users_rows_changes_nobody_else(device):
    inputs = make_inputs([30, 7, 17], device)
    x, residual, *rest, grad_y = inputs
    before = forward_backward(segment_bottleneck, *inputs)
    slot = int(inputs[6].slots[1])
    mine, others = slice(30, 37), [u for u in range(len(rest[0])) if u != slot]
    changed = [tensor.clone() for tensor in (x, residual, grad_y)]
    for tensor in changed:
        tensor[mine] = math.nan
    after = forward_backward(segment_bottleneck, *changed[:2], *rest, changed[2])
    for name, one, other in zip(NAMES, before, after):
        if name in NAMES[:3]:
            assert torch.equal(one[:30], other[:30]) and torch.equal(one[37:], other[37:]), name
            assert not torch.equal(one[mine], other[mine]), name
        else:
            assert torch.equal(one[others], other[others]), name
            assert not torch.equal(one[slot], other[slot]), name


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_users_bits_do_not_depend_on_company_or_order(dtype, device, one_thread, monkeypatch):
    """On a CPU with one thread: with several, a batched product of odd widths is shared out by how many there are."""
    monkeypatch.setattr(minipeft_kernels.segments, "CHUNK", 16)
    inputs = make_inputs([35, 7], device, dtype)
    x, residual, *weights, segments, activation, scale, widths, grad_y = inputs
    together, again = (forward_backward(segment_bottleneck, *inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(together, again))

    def run(slots):
        """The results of these slots' rows, in this order."""
        parts = [torch.arange(len(x), device=device)[rows_of(inputs)[slot]] for slot in slots]
        rows, plan = torch.cat(parts), Segments.build(slots, [len(part) for part in parts], device)
        own = (x[rows], residual[rows], *weights, plan, activation, scale, widths, grad_y[rows])
        results, rows = forward_backward(segment_bottleneck, *own), rows.cpu()
        assert all(torch.equal(result, whole[rows]) for result, whole in zip(results[:3], together[:3]))
        for name, result, whole in zip(NAMES[3:], results[3:], together[3:]):
            assert torch.equal(result[slots], whole[slots]), name

    slots = segments.slots.tolist()
    run(slots[::-1])
    for slot in slots:
        run([slot])


def test_tiles_are_of_sizes_that_the_plan_has():
    assert {configuration(F, itemsize)["BLOCK_T"] for F in range(1, MAX_F + 1) for itemsize in (2, 4)} <= set(BLOCKS)


# ---- On some rows of a batch ---------------------------------------------------------------------------------------


def make_groups(lengths_of_groups, device, serial, gap=0, dtype=torch.float32):
    """x, residual, grad_y, groups: banks one after another, after each `gap` rows of no group. Gradients hold 7."""
    parts, groups, first_row = [[torch.rand(3, gap, K, dtype=dtype, device=device)]], [], gap
    for i, lengths in enumerate(lengths_of_groups):
        activation = list(ACTIVATIONS)[i % 4]
        x, residual, *weights, segments, _, scale, widths, grad_y = make_inputs(
            lengths, device, dtype, activation=activation, plain=i % 2 == 1, seed=i)
        weights = BottleneckTensors(*weights)
        grads = views(torch.full((len(weights.down), 2 * F * K + F + K + 6), 7.0, device=device), K, F)
        group = Bottleneck(weights, grads, activation, segments, scale, widths)
        groups.append(BottleneckRows(first_row, group))
        parts.append([torch.stack([x, residual, grad_y]), torch.rand(3, gap, K, dtype=dtype, device=device)])
        first_row += len(x) + gap
    x, residual, grad_y = torch.cat([part for pair in parts for part in pair], 1)
    return x, None if serial else residual, grad_y, groups


def fused(x, residual, grad_y, groups, x_needs_grad=True):
    """[y, grad_x, grad_residual, the groups' grads ..]"""
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), requires_grad=True)
    residual = None if residual is None else residual.detach().requires_grad_()
    y = bottleneck_rows(x, residual, anchor, groups)
    y.backward(grad_y)
    assert anchor.grad is None or not anchor.grad.any()
    grads = itertools.chain(*(g.bottleneck.grads for g in groups))
    return [y.detach().cpu(), x.grad, None if residual is None else residual.grad, *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("serial", [False, True], ids=["residual", "serial"])
@pytest.mark.parametrize("groups, gap", GROUPS.values(), ids=GROUPS.keys())
def test_rows_of_groups_get_their_bottleneck_and_others_their_residual(groups, gap, serial, device):
    x, residual, grad_y, groups = make_groups(groups, device, serial, gap)
    kept = [tensor.clone() for g in groups for tensor in g.bottleneck.weights]
    y, grad_x, grad_residual, *grads = fused(x, residual, grad_y, groups)
    expected_y = (x if serial else residual).clone().cpu()
    expected_grad_x = (grad_y if serial else torch.zeros_like(grad_y)).clone().cpu()
    for i, g in enumerate(groups):
        b = g.bottleneck
        op = (g.of(x), None if serial else g.of(residual), *b.weights, b.segments, b.activation, b.scale, b.widths)
        results = forward_backward(segment_bottleneck, *op, g.of(grad_y))
        g.of(expected_y)[:], g.of(expected_grad_x)[:] = results[:2]
        live = sorted(rows_of((*op, None)))
        absent = [slot for slot in range(len(b.weights.down)) if slot not in live]
        for name, got, expected in zip(BottleneckTensors._fields, grads[4 * i : 4 * i + 4], results[3:]):
            got = got.cpu()
            assert (got[absent] == 7).all(), name
            for slot in live:
                used = slice(None if b.widths is None or name == "up_bias" else int(b.widths[slot]))
                assert torch.equal(got[slot, used], expected[slot, used]), name
                assert ((got[slot] == 7) | (got[slot] == expected[slot])).all(), name
    assert torch.equal(y, expected_y) and torch.equal(grad_x.cpu(), expected_grad_x)
    assert grad_residual is None if serial else torch.equal(grad_residual, grad_y)
    now = [tensor for g in groups for tensor in g.bottleneck.weights]
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(kept, now))


def test_rows_train_where_x_needs_no_gradient(device):
    runs = [fused(*make_groups([[20], [7, 16]], device, serial=True), x_needs_grad=needs) for needs in (True, False)]
    assert runs[0][1] is not None and runs[1][1] is None
    assert all(torch.equal(one, other) for one, other in zip(runs[0][3:], runs[1][3:]))


def test_evaluation_needs_no_place_for_gradients(device):
    x, residual, grad_y, groups = make_groups([[20], [7, 16]], device, serial=False)
    y, *_ = fused(x, residual, grad_y, groups)
    frozen = [BottleneckRows(g.first_row, replace(g.bottleneck, grads=None)) for g in groups]
    with torch.no_grad():
        assert torch.equal(bottleneck_rows(x, residual, torch.zeros(()), frozen).cpu(), y)
    with pytest.raises(ValueError, match="bottleneck_rows: a group has no grads, which backward would write"):
        bottleneck_rows(x, residual, torch.zeros(()), frozen)


# ---- Errors --------------------------------------------------------------------------------------------------------


def wrong_inputs(device):
    """message -> arguments of segment_bottleneck of which one is wrong."""
    right = make_inputs([16, 32], device)[:-1]
    names = ("x", "residual", *BottleneckTensors._fields, "segments", "activation", "scale", "widths")

    def wrong(**changes):
        return tuple({**dict(zip(names, right)), **changes}.values())

    x, residual, down, down_bias, up, _, _, _, scale, widths = right
    wide = torch.zeros(4, MAX_F + 1, K, device=device)
    return {
        "x is (47, 40) but the segments cover 48 rows": wrong(x=x[1:]),
        "x is (48,) but": wrong(x=x[:, 0]),
        "x has 39 columns but down is (4, 10, 40), made for 40. Was this adapter trained": wrong(x=x[:, 1:]),
        "a bottleneck of width 257; supported are 1 to 256": wrong(down=wide),
        "so down_bias, up (transposed) and up_bias must be ((4, 10), (4, 10, 40), (4, 40)); got ((4, 10), (4, 40, 10)":
            wrong(up=up.transpose(1, 2)),
        "scale (one per slot) is (3,) torch.float32 with strides (1,); needed is (4,) torch.float32, contiguous": wrong(
            scale=scale[1:]),
        "scale (one per slot) is (4,) torch.float32 with strides (2,); needed": wrong(scale=with_gaps(scale)),
        "scale (one per slot) is (4,) torch.float64 with strides (1,); needed": wrong(scale=scale.double()),
        "scale requires grad but gets no gradient here; detach it": wrong(scale=scale.clone().requires_grad_()),
        "x is torch.int64; ": wrong(x=x.long(), residual=None, **{
            name: tensor.nan_to_num(1.0).long() for name, tensor in zip(BottleneckTensors._fields, right[2:6])}),
        "widths (one per slot) is (4, 1) torch.int32 with strides (1, 1); needed is (4,) torch.int32": wrong(
            widths=widths[:, None]),
        "widths (one per slot) is (4,) torch.int32 with strides (2,); needed": wrong(widths=with_gaps(widths)),
        "widths (one per slot) is (4,) torch.int64 with strides (1,); needed": wrong(widths=widths.long()),
        "residual is (47, 40) torch.float32 but x is (48, 40) torch.float32; they must agree": wrong(
            residual=residual[1:]),
        "x and the weights must share a dtype; got torch.float32 and torch.float32, torch.float64": wrong(
            down_bias=down_bias.double()),
        "down of the weights is (4, 10, 40) with strides (400, 1, 10)": wrong(
            down=down.transpose(1, 2).contiguous().transpose(1, 2)),
        "unknown activation 'tanh'; choose one of relu, gelu, gelu_tanh, silu": wrong(activation="tanh"),
        "segment of slot 9 but the bank has 4 slots": wrong(segments=Segments.build([0, 9], [16, 32], device)),
    }


@pytest.mark.parametrize("message", wrong_inputs("cpu"))
def test_arguments_that_disagree_are_errors(message, device):
    with pytest.raises(ValueError) as error:
        segment_bottleneck(*wrong_inputs(device)[message])
    assert message in str(error.value) and str(error.value).startswith("segment_bottleneck: ")


def test_segments_of_another_backend_are_an_error(device, monkeypatch):
    inputs = make_inputs([16], device)
    with monkeypatch.context() as patched:
        patched.setattr(minipeft_kernels.segments, "backend", lambda _: "torch" if inputs[6].plan else "triton")
        other = Segments.build([0], [16], device)
    with pytest.raises(ValueError, match="built for another device or backend"):
        segment_bottleneck(*inputs[:6], other, *inputs[7:10])


def test_groups_that_do_not_fit_are_errors(device):
    x, residual, _, groups = make_groups([[20], [7, 16]], device, serial=False)
    anchor, (first, second) = torch.zeros((), requires_grad=True), groups
    grads = first.bottleneck.grads
    without_a_row = BottleneckRows(0, replace(first.bottleneck, grads=grads._replace(up=grads.up[:, 1:])))
    for message, wrong in (
        ("a group starts at row 19 but only rows from 20 on are free", [replace(second, first_row=19), first]),
        ("a group ends at row 44 but x has 43 rows", [first, replace(second, first_row=21)]),
        (r"up of the grads is \(3, 9, 40\) with strides .* needed is \(3, 10, 40\)", [without_a_row]),
    ):
        with pytest.raises(ValueError, match=f"bottleneck_rows: {message}"):
            bottleneck_rows(x, residual, anchor, wrong)


def test_a_device_without_an_implementation_is_an_error():
    x, residual, *weights, segments, activation, scale, widths, _ = make_inputs([16], "cpu")
    x, residual, *weights = (tensor.to("meta") for tensor in (x, residual, *weights))
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        segment_bottleneck(x, residual, *weights, segments, activation, scale, widths)
