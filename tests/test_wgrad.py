"""Is every user's weight gradient the sum over their own rows, in a fixed order, stored or added as asked?"""

import math

import pytest
import torch
from accuracy import ANY_LENGTHS, assert_as_accurate, few_examples
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels import segments as segments_module
from minipeft_kernels.segments import Segments
from minipeft_kernels.wgrad import num_squares, wgrad


def make(lengths, device, R=8, D=40, dtype=torch.float32, seed=0):
    """v [T, R], x [T, D], segments in slots other than their order, grad [U, R, D] full of 7 in a wider buffer."""
    draw, U = torch.Generator().manual_seed(seed), len(lengths) + 2
    v, x = (torch.randn(sum(lengths), size, generator=draw).to(dtype).to(device) for size in (R, D))
    slots = [(5 * i + 3) % U if U % 5 else i for i in range(len(lengths))]
    grad = torch.full((U, R * D + 3), 7.0, device=device)[:, 3:].unflatten(1, (R, D))
    return v, x, Segments.build(slots, lengths, device), grad


def definition(v, x, segments, U, dtype):
    v, x = v.cpu().to(dtype), x.cpu().to(dtype)
    grads = torch.zeros(U, v.shape[1], x.shape[1], dtype=dtype)
    for slot, start, end in zip(segments.slots, segments.starts[:-1], segments.starts[1:]):
        grads[slot] = v[start:end].T @ x[start:end]
    return grads


@few_examples
@given(lengths=ANY_LENGTHS, R=st.integers(1, 70), D=st.integers(1, 300), seed=st.integers(0, 9),
       chunk=st.sampled_from([16, 33, 2048]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_is_the_sum_over_each_users_rows(kernels, monkeypatch, lengths, R, D, seed, chunk, dtype):
    monkeypatch.setattr(segments_module, "CHUNK", chunk)
    v, x, segments, grad = make(lengths, kernels, R, D, dtype, seed)
    wgrad(v, x, segments.plan, grad)
    live = [int(slot) for slot, start, end in zip(segments.slots, segments.starts, segments.starts[1:]) if end > start]
    # v and x are exact in fp32 and so is the gradient: it owes fp32's accuracy, not that of the inputs' dtype
    exact, plain = (definition(v, x, segments, len(grad), kind) for kind in (torch.float64, torch.float32))
    assert_as_accurate("grad", grad[live], plain[live], exact[live])
    absent = [slot for slot in range(len(grad)) if slot not in live]
    assert (grad[absent] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 2048])
def test_adds_for_slots_that_ask_and_leaves_sums_of_squares(kernels, monkeypatch, chunk, dtype):
    monkeypatch.setattr(segments_module, "CHUNK", chunk)
    D = 300
    v, x, segments, grad = make([40, 5, 0, 20], kernels, D=D, dtype=dtype)
    first, later = int(segments.slots[0]), int(segments.slots[1])
    accumulate = torch.zeros(len(grad), dtype=torch.int32, device=kernels)
    accumulate[later] = 1
    squares = torch.full((len(grad), num_squares(8, D, x.itemsize) + 2), -1.0, device=kernels)
    ranks = torch.full((len(grad),), 8, dtype=torch.int32, device=kernels)
    ranks[first] = 3
    wgrad(v, x, segments.plan, grad, ranks, accumulate, squares[:, 1:-1])
    exact = definition(v, x, segments, len(grad), torch.float64)
    grad = grad.cpu().double()
    torch.testing.assert_close(grad[later], exact[later] + 7.0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[first, :3], exact[first, :3], rtol=1e-5, atol=1e-5)
    assert (grad[first, 3:] == 7).all()  # rank rows past the slot's own
    live = segments.slots[[0, 1, 3]].tolist()
    for slot in live:
        used = int(ranks[slot])
        total = squares[slot, 1:-1].cpu().double().sum()
        torch.testing.assert_close(total, grad[slot, :used].square().sum(), rtol=1e-5, atol=0)
    assert (squares[:, [0, -1]] == -1).all()  # nothing beside its own columns
    assert (squares[[slot for slot in range(len(grad)) if slot not in live]] == -1).all()


def test_rows_of_others_do_not_leak_even_if_they_are_nan(kernels):
    v, x, segments, grad = make([20, 7, 33], kernels)
    clean = grad.clone()
    wgrad(v, x, segments.plan, clean)
    v[20:27], x[20:27] = math.nan, math.inf
    wgrad(v, x, segments.plan, grad)
    others = segments.slots[[0, 2]].tolist()
    assert torch.equal(grad[others], clean[others]) and grad[int(segments.slots[1])].isnan().all()


def test_strides_between_rows(kernels):
    """One site's columns of a wider v, as lora_linear passes them."""
    v, x, segments, grad = make([20, 7], kernels, R=24)
    part = torch.full((len(grad), 8, 40), 7.0, device=kernels)
    wgrad(v, x, segments.plan, grad)
    wgrad(v[:, 8:16], x, segments.plan, part)
    torch.testing.assert_close(part, grad[:, 8:16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("too_many", [-1, 1])
def test_room_for_other_than_its_sums_of_squares_is_an_error(kernels, too_many):
    v, x, segments, grad = make([5], kernels, D=300, dtype=torch.bfloat16)
    squares = torch.zeros(len(grad), num_squares(8, 300, 2) + too_many, device=kernels)
    with pytest.raises(ValueError, match=rf"squares has {3 + too_many} columns.* from torch.bfloat16 leaves 3 sums"):
        wgrad(v, x, segments.plan, grad, squares=squares)
