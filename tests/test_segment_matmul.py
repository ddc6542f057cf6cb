"""Is a matrix per user the loop over users, in output and gradients, and is every user's part of it their own?"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import ANY_LENGTHS, LENGTHS, assert_as_accurate, few_examples, in_fp64
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels import reference
from minipeft_kernels import segments as segments_module
from minipeft_kernels.segment_matmul import segment_matmul
from minipeft_kernels.segments import Segments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = ("y", "grad_x", "grad_W")
OLD = 7.0  # what gradients hold before


def make_inputs(lengths, device, dtype=torch.float32, widths=(24, 40), seed=0):
    """x, W, segments, grad_y. Slot order differs from row order; two slots are absent.

    W is a view of a bank of longer rows. Absent slots, slots without rows and the rest of the bank hold NaN.
    """
    draw, U, (K, N) = torch.Generator().manual_seed(seed), len(lengths) + 2, widths
    slots = np.random.default_rng(seed).permutation(U)[: len(lengths)]
    bank = torch.full((U, K * N + 16), math.nan, dtype=dtype, device=device)
    W = bank[:, 8 : 8 + K * N].unflatten(1, (K, N))
    for slot, length in zip(slots, lengths):
        W[slot] = torch.randn(K, N, generator=draw) * K**-0.5 if length else math.nan
    x, grad_y = (torch.randn(sum(lengths), D, generator=draw).to(device, dtype) for D in widths)
    return x, W, Segments.build(slots, lengths, device), grad_y


def fused(x, W, segments, grad_y, x_needs_grad=True):
    """y, grad_x and grad_W, which held OLD everywhere and is a view of longer rows."""
    x, anchor = x.detach().requires_grad_(x_needs_grad), torch.zeros((), requires_grad=True)
    wide = torch.promote_types(x.dtype, torch.float32)
    grads = torch.full((len(W), W[0].numel() + 9), OLD, dtype=wide, device=x.device)
    grad_W = grads[:, 4:-5].unflatten(1, W.shape[1:])
    y = segment_matmul(x, anchor, W, grad_W, segments)
    y.backward(grad_y)
    assert anchor.grad is None or not anchor.grad.any()
    assert (grads[:, :4] == OLD).all() and (grads[:, -5:] == OLD).all()
    return [tensor if tensor is None else tensor.detach().cpu() for tensor in (y, x.grad, grad_W)]


def by_reference(x, W, segments, grad_y):
    """The same by the reference op; gradients of slots without rows as `fused` must leave them."""
    x, W = (tensor.detach().requires_grad_() for tensor in (x, W))
    y = reference.segment_matmul(x, W, segments)
    y.backward(grad_y)
    live = segments.slots[np.diff(segments.starts) > 0]
    W.grad[np.setdiff1d(np.arange(len(W)), live)] = OLD
    return [tensor.detach().cpu() for tensor in (y, x.grad, W.grad)]


def assert_matches_reference(inputs):
    kernel, plain, exact = fused(*inputs), by_reference(*inputs), by_reference(*in_fp64(inputs))
    for name, *versions in zip(NAMES, kernel, plain, exact):
        assert name == "grad_W" or versions[0].dtype == inputs[0].dtype
        assert_as_accurate(name, *versions)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_reference(lengths, dtype, device):
    assert_matches_reference(make_inputs(lengths, device, dtype))


@few_examples
@given(lengths=ANY_LENGTHS, widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
       dtype=st.sampled_from(list(DTYPES.values())), seed=st.integers(0, 99))  # fmt: skip
def test_any_lengths_widths_and_dtype_match_reference(lengths, widths, dtype, seed, device):
    """Widths are whole 16 bytes, which a GPU needs. A user of 33 rows is always there: few errors are luck."""
    widths = tuple(width * 16 // dtype.itemsize for width in widths)
    assert_matches_reference(make_inputs([33, *lengths], device, dtype, widths, seed))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("widths", [(1, 1), (5, 24), (16, 39), (8, 150), (64, 8)])
def test_a_cpu_takes_any_widths_and_a_gpu_whole_16_bytes(widths, dtype, device):
    inputs = make_inputs([70, 5, 33, 1], device, dtype, widths)
    if inputs[2].plan is None or all(width * dtype.itemsize % 16 == 0 for width in widths):
        assert_matches_reference(inputs)
    else:
        with pytest.raises(ValueError, match=rf"segment_matmul: W is \(6, {widths[0]}, {widths[1]}\) in {dtype}; on a "
                                             rf"GPU both widths must be multiples of {16 // dtype.itemsize}, whole"):
            fused(*inputs)


def test_more_users_than_one_product_takes_are_several(device, monkeypatch):
    inputs = make_inputs([5, 0, 17, 1, 30, 0, 2], device)
    at_once = fused(*inputs)
    monkeypatch.setattr(segments_module, "MOST_GROUPS", 2)
    inputs = make_inputs([5, 0, 17, 1, 30, 0, 2], device)
    if inputs[2].plan is not None:
        assert [rows for rows, _, _ in inputs[2].plan.groups] == [slice(0, 22), slice(22, 53), slice(53, 55)]
    assert all(torch.equal(one, other) for one, other in zip(at_once, fused(*inputs)))


def test_matrices_are_read_both_ways_without_a_transposed_copy(kernels, monkeypatch):
    x, W, segments, grad_y = make_inputs([5, 17], kernels)
    read, grouped_mm = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm",
                        lambda a, b, offs: read.append(b) or grouped_mm(a, b, offs=offs))  # fmt: skip
    fused(x, W, segments, grad_y)
    forward, _, backward = read  # the second is that of grad_W
    assert forward.is_contiguous() and forward.shape == (2, 24, 40)
    assert backward.transpose(1, 2).is_contiguous() and backward.shape == (2, 40, 24)


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_reads(device):
    x, W, segments, grad_y = make_inputs([20, 3], device)
    broadcast = fused(x, W, segments, torch.ones((), device=device).expand_as(grad_y))
    whole = fused(x, W, segments, torch.ones_like(grad_y))
    strided = fused(x.T.contiguous().T, W, segments, torch.ones_like(grad_y))
    for other in (whole, strided):
        assert all(torch.equal(one, two) for one, two in zip(broadcast, other))


def test_inputs_and_gradients_of_slots_without_rows_are_left_alone(device):
    x, W, segments, grad_y = make_inputs([5, 0, 40], device)
    before = [tensor.clone() for tensor in (x, W, grad_y)]
    _, _, grad_W = fused(x, W, segments, grad_y)
    for one, other in zip(before, (x, W, grad_y)):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    live = segments.slots[[0, 2]]
    for slot in range(len(W)):
        assert (grad_W[slot] != OLD).all() if slot in live else (grad_W[slot] == OLD).all()


def test_gradients_are_written_where_x_needs_none(device):
    inputs = make_inputs([16, 7, 32], device)
    with_grad, without = fused(*inputs), fused(*inputs, x_needs_grad=False)
    assert with_grad[1] is not None and without[1] is None
    assert torch.equal(with_grad[0], without[0]) and torch.equal(with_grad[2], without[2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("poison", [1e4, math.nan, math.inf])
def test_rewriting_a_users_rows_changes_nobody_else(poison, dtype, device):
    x, W, segments, grad_y = make_inputs([30, 7, 33, 16], device, dtype)
    before = fused(x, W, segments, grad_y)
    mine = slice(30, 37)
    other_x, other_grad_y = x.clone(), grad_y.clone()
    other_x[mine] *= poison
    other_grad_y[mine] *= poison
    after = fused(other_x, W, segments, other_grad_y)
    row_others, slot_others = torch.ones(len(x), dtype=torch.bool), torch.ones(len(W), dtype=torch.bool)
    row_others[mine] = False
    slot_others[int(segments.slots[1])] = False
    for name, one, other in zip(NAMES, before, after):
        others = slot_others if name == "grad_W" else row_others
        assert torch.equal(one[others], other[others]), name
        assert not torch.equal(one[~others], other[~others]), name


# ---- Errors --------------------------------------------------------------------------------------------------------


def wrong_inputs(device):
    """message -> (x, W, grad_W, segments) of which one is wrong."""
    x, W, segments, _ = make_inputs([16, 32], device)
    grads = torch.zeros_like(W)
    columns = W.transpose(1, 2).contiguous().transpose(1, 2)
    return {
        "x is (47, 24) but the segments cover 48 rows": (x[1:], W, grads, segments),
        "x is (48,) but the segments cover": (x[:, 0], W, grads, segments),
        "x has 23 columns but W is (4, 24, 40); needs [U, 23, N]": (x[:, 1:], W, grads, segments),
        "W is (24, 40); needs [U, 24, N]": (x, W[0], grads, segments),
        "x and W must share a dtype; got torch.float32 and torch.bfloat16": (x, W.bfloat16(), grads, segments),
        "W is (4, 24, 40) with strides (960, 1, 24); needed": (x, columns, grads, segments),
        "grad_W is (4, 24, 39) with strides": (x, W, grads[:, :, 1:], segments),
        "grad_W is torch.int32; gradients are summed and kept in": (x, W, grads.int(), segments),
        "x is torch.int32; ": (x.int(), W.nan_to_num().int(), grads, segments),
        "grad_W is (4, 24, 40) with strides (960, 1, 24); needed": (x, W, torch.zeros_like(columns), segments),
        "segment of slot 9 but the bank has 4 slots": (x, W, grads, Segments.build([0, 9], [16, 32], device)),
        "pass device=x.device to Segments.build":
            (x, W, grads, replace(segments, plan=object() if segments.plan is None else None)),
    }  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_inputs_that_disagree_are_errors(number, device):
    message, (x, W, grad_W, segments) = list(wrong_inputs(device).items())[number]
    with pytest.raises(ValueError) as error:
        segment_matmul(x, torch.zeros((), requires_grad=True), W, grad_W, segments)
    assert message in str(error.value) and str(error.value).startswith("segment_matmul: ")


def test_fp64_is_refused_on_a_gpu_and_exact_on_a_cpu(device):
    inputs = in_fp64(make_inputs([16, 32], device))
    if inputs[2].plan is not None:
        with pytest.raises(ValueError, match=r"x is torch.float64; the kernels take torch.bfloat16"):
            fused(*inputs)
    else:
        for one, other in zip(fused(*inputs), by_reference(*inputs)):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_device_without_an_implementation_is_an_error():
    x, W, segments, _ = make_inputs([16], "cpu")
    with pytest.raises(ValueError, match="no implementation for device 'meta'"):
        segment_matmul(x.to("meta"), torch.zeros(()), W.to("meta"), W.to("meta"), segments)
