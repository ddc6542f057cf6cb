"""Is attention on packed rows plain attention inside each sequence, to the bit whatever the company?"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.models.attention import padded_length
from minipeft.models.rows import Rows

LENGTHS = {"one row": [1], "one sequence": [37], "one row each": [1, 1, 1], "ragged": [5, 100, 1, 17, 8, 9, 64, 33, 17]}
HEADS = {"equal": (4, 4), "grouped": (6, 2), "odd": (3, 1), "single": (1, 1)}
WINDOWS = {"no window": None, "window 1": 1, "window 5": 5}
NAMES = ("y", "grad_q", "grad_k", "grad_v")


def plain_attention(q, k, v, lengths, window):
    """Definition: for each sequence and head, softmax over the rows at most window - 1 back, one matrix each."""
    outputs = []
    for q_n, k_n, v_n in zip(q.split(lengths), k.split(lengths), v.split(lengths)):  # [n, H, D], [n, H_kv, D]
        group = q_n.shape[1] // k_n.shape[1]
        k_n, v_n = k_n.repeat_interleave(group, 1), v_n.repeat_interleave(group, 1)  # [n, H, D]
        scores = torch.einsum("ihd,jhd->hij", q_n, k_n) / q_n.shape[-1] ** 0.5  # [H, n, n]
        age = torch.arange(len(q_n))[:, None] - torch.arange(len(q_n))  # [n, n]
        seen = (age >= 0) & (age < (window or len(q_n)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v_n))
    return torch.cat(outputs)  # [T, H, D]


def packed(q, k, v, lengths, window):
    return Rows.pack([[0] * n for n in lengths]).attend(0, q, k, v, window)


def make_inputs(lengths, heads, dtype=torch.float32, seed=0, head_dim=20):
    """q, k, v and the gradient that arrives at y."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), heads[i], head_dim) for i in (0, 1, 1, 0)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def forward_backward(op, inputs, lengths, window):
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    y = op(q, k, v, lengths, window)
    y.backward(inputs[3])
    return [x.detach() for x in (y, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_plain_softmax(lengths, heads, window, dtype):
    inputs = make_inputs(lengths, heads, dtype)
    ours = forward_backward(packed, inputs, lengths, window)
    plain = forward_backward(plain_attention, inputs, lengths, window)
    exact = forward_backward(plain_attention, [x.double() for x in inputs], lengths, window)
    for name, one, other, truth in zip(NAMES, ours, plain, exact):
        # The fused kernel rebuilds each weight as exp(score - logsumexp): off by eps * |score| where plain is exact.
        allowed = 2 * (other.double() - truth).square().mean().sqrt() + 1e-6  # rms: the max is one bf16 ulp
        error = (one.double() - truth).square().mean().sqrt()
        assert one.dtype == dtype and error <= allowed, f"{name}: error {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_fp64_is_exact(heads, window):
    lengths = LENGTHS["ragged"]
    inputs = make_inputs(lengths, heads, torch.float64)
    ours, plain = (forward_backward(op, inputs, lengths, window) for op in (packed, plain_attention))
    for name, one, truth in zip(NAMES, ours, plain):
        assert (one - truth).abs().max() < 1e-13, name


@pytest.mark.parametrize("poison", [3.0, float("nan")], ids=["numbers", "nan"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_isolation(heads, window, poison):
    lengths = LENGTHS["ragged"]
    inputs = make_inputs(lengths, heads)
    before = forward_backward(packed, inputs, lengths, window)
    for n in range(len(lengths)):
        start = sum(lengths[:n])
        mine = torch.zeros(sum(lengths), dtype=torch.bool)
        mine[start : start + lengths[n]] = True
        rewritten = [torch.where(mine[:, None, None], poison * x - 1, x) for x in inputs]
        for name, x, y in zip(NAMES, before, forward_backward(packed, rewritten, lengths, window)):
            assert torch.equal(x[~mine], y[~mine]), f"sequence {n} changed another's {name}"
        assert not torch.equal(before[0][mine], y[mine])


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 150), before=st.lists(st.integers(1, 150), max_size=8),
    after=st.lists(st.integers(1, 150), max_size=8), heads=st.sampled_from(list(HEADS.values())),
    window=st.sampled_from([None, 3, 40]), head_dim=st.sampled_from([2, 8, 20, 64]),
)  # fmt: skip
def test_bits_do_not_depend_on_company(length, before, after, heads, window, head_dim):
    mine = make_inputs([length], heads, seed=1, head_dim=head_dim)
    lengths = [*before, length, *after]
    inputs = make_inputs(lengths, heads, seed=2, head_dim=head_dim)
    here = slice(sum(before), sum(before) + length)
    for x, own in zip(inputs, mine):
        x[here] = own
    alone, company = (forward_backward(packed, x, n, window) for x, n in ((mine, [length]), (inputs, lengths)))
    for name, x, y in zip(NAMES, alone, company):
        assert torch.equal(x, y[here]), name


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(sequences=st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), min_size=1, max_size=20))
def test_pack_lays_out_every_row_once(sequences):
    rows = Rows.pack(sequences)
    lengths = np.array([len(s) for s in sequences])
    T = lengths.sum()
    assert rows.tokens.tolist() == [token for s in sequences for token in s]
    assert rows.positions.tolist() == [i for s in sequences for i in range(len(s))]
    plan, padded = rows.attend, padded_length(lengths).sum()
    assert plan.q_index[plan.q_places].tolist() == plan.k_index[plan.k_places].tolist() == list(range(T))
    assert sum(bucket.num for bucket in plan.buckets) == len(sequences) == len(rows.split(rows.tokens))
    assert len(plan.q_index) == sum(bucket.num * bucket.q_width for bucket in plan.buckets) == padded


def test_padded_length_grows_by_at_most_half():
    lengths = np.arange(1, 5000)
    padded = padded_length(lengths)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    assert (padded[:8] == 8).all() and (padded[8:16] == 16).all() and (padded[16:] <= 1.5 * lengths[16:]).all()
    assert all(padded_length(lengths[i : i + 1])[0] == padded[i] for i in range(0, len(lengths), 7))  # alone: the same


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_pack_refuses_empty(sequences):
    with pytest.raises(ValueError, match="empty"):
        Rows.pack(sequences)
