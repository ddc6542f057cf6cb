"""Is attention on packed rows plain attention inside each sequence, to the bit whatever the company?"""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.models.attention import Packed, padded_length
from minipeft.models.causal import check_lengths
from minipeft.models.rows import Rows
from minipeft_kernels import reference

LENGTHS = {"one row": [1], "one sequence": [37], "one row each": [1, 1, 1], "ragged": [5, 100, 1, 17, 8, 9, 64, 33, 17]}
HEADS = {"equal": (4, 4), "grouped": (6, 2), "odd": (3, 1), "single": (1, 1)}
WINDOWS = {"no window": None, "window 1": 1, "window 5": 5}
NAMES = ("y", "grad_q", "grad_k", "grad_v")


def plain_attention(q, k, v, lengths, window, scale=None, softcap=None):
    """Definition: for each sequence and head, softmax over the rows at most window - 1 back, one matrix each."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for q_n, k_n, v_n in zip(q.split(lengths), k.split(lengths), v.split(lengths)):  # [n, H, D], [n, H_kv, D]
        group = q_n.shape[1] // k_n.shape[1]
        k_n, v_n = k_n.repeat_interleave(group, 1), v_n.repeat_interleave(group, 1)  # [n, H, D]
        scores = scale * torch.einsum("ihd,jhd->hij", q_n, k_n)  # [H, n, n]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        age = torch.arange(len(q_n))[:, None] - torch.arange(len(q_n))  # [n, n]
        seen = (age >= 0) & (age < (window or len(q_n)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v_n))
    return torch.cat(outputs)  # [T, H, D]


def packed(q, k, v, lengths, window, **settings):
    return Rows.pack([[0] * n for n in lengths]).attend(0, q, k, v, window, **settings)


CAP = {"scale": 0.4, "softcap": 1.5}  # scores of about 0.4 sqrt(20): most are bent
OPS = {"plain": (packed, plain_attention), "capped": (partial(packed, **CAP), partial(plain_attention, **CAP))}


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


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_match_plain_softmax(lengths, heads, window, dtype, ops):
    inputs = make_inputs(lengths, heads, dtype)
    ours, plain = (forward_backward(op, inputs, lengths, window) for op in ops)
    exact = forward_backward(ops[1], [x.double() for x in inputs], lengths, window)
    for name, one, other, truth in zip(NAMES, ours, plain, exact):
        # The fused kernel rebuilds each weight as exp(score - logsumexp): off by eps * |score| where plain is exact.
        allowed = 2 * (other.double() - truth).square().mean().sqrt() + 1e-6  # rms: the max is one bf16 ulp
        error = (one.double() - truth).square().mean().sqrt()
        assert one.dtype == dtype and error <= allowed, f"{name}: error {error:.2e}, plain PyTorch allows {allowed:.2e}"


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_fp64_is_exact(heads, window, ops):
    lengths = LENGTHS["ragged"]
    inputs = make_inputs(lengths, heads, torch.float64)
    ours, plain = (forward_backward(op, inputs, lengths, window) for op in ops)
    for name, one, truth in zip(NAMES, ours, plain):
        assert (one - truth).abs().max() < 1e-13, name


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("poison", [3.0, float("nan")], ids=["numbers", "nan"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_isolation(heads, window, poison, ops):
    lengths = LENGTHS["ragged"]
    inputs = make_inputs(lengths, heads)
    before = forward_backward(ops[0], inputs, lengths, window)
    for n in range(len(lengths)):
        start = sum(lengths[:n])
        mine = torch.zeros(sum(lengths), dtype=torch.bool)
        mine[start : start + lengths[n]] = True
        rewritten = [torch.where(mine[:, None, None], poison * x - 1, x) for x in inputs]
        for name, x, y in zip(NAMES, before, forward_backward(ops[0], rewritten, lengths, window)):
            assert torch.equal(x[~mine], y[~mine]), f"sequence {n} changed another's {name}"
        assert not torch.equal(before[0][mine], y[mine])


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 150), before=st.lists(st.integers(1, 150), max_size=8),
    after=st.lists(st.integers(1, 150), max_size=8), heads=st.sampled_from(list(HEADS.values())),
    window=st.sampled_from([None, 3, 40]), head_dim=st.sampled_from([2, 8, 20, 64]),
    ops=st.sampled_from(list(OPS.values())),
)  # fmt: skip
def test_bits_do_not_depend_on_company(length, before, after, heads, window, head_dim, ops):
    mine = make_inputs([length], heads, seed=1, head_dim=head_dim)
    lengths = [*before, length, *after]
    inputs = make_inputs(lengths, heads, seed=2, head_dim=head_dim)
    here = slice(sum(before), sum(before) + length)
    for x, own in zip(inputs, mine):
        x[here] = own
    alone, company = (forward_backward(ops[0], x, n, window) for x, n in ((mine, [length]), (inputs, lengths)))
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
    for layout in (plan.q, plan.k):
        assert layout.index[layout.places].tolist() == list(range(T))
        assert layout.absent is layout.copies is None
    assert sum(bucket.num for bucket in plan.buckets) == len(sequences) == len(rows.split(rows.tokens))
    assert len(plan.q.index) == sum(bucket.num * bucket.q_width for bucket in plan.buckets) == padded


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(prompts=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), max_size=4)), min_size=1,
                        max_size=5),
       heads=st.sampled_from(list(HEADS.values())), window=st.sampled_from([None, 1, 3, 20]),
       cap=st.sampled_from([{}, CAP]))  # fmt: skip
def test_sequences_that_go_on_from_one_prefix_share_its_rows(prompts, heads, window, cap):
    """As if the prefix stood before each of them: outputs, and gradients, which add up in the prefix's rows."""
    sequences, prefixes, whole = [], [], []  # whole: the rows of each sequence with its prefix before it
    for n, stems in prompts:
        home = len(sequences)
        for length in (n, *stems):
            start = sum(map(len, sequences))
            sequences.append([0] * length)
            prefixes.append(-1 if len(sequences) - 1 == home else home)
            own = list(range(start, start + length))
            whole.append((own, own if prefixes[-1] < 0 else whole[home][0] + own))
    inputs = make_inputs([sum(map(len, sequences))], heads, torch.float64)
    rows = Rows.pack(sequences, prefixes=prefixes)
    assert rows.positions.tolist() == [i for own, seen in whole for i in range(len(seen) - len(own), len(seen))]
    assert rows.longest == max(len(seen) for _, seen in whole)

    def shared(q, k, v, lengths, window):
        return rows.attend(0, q, k, v, window, **cap)

    def apart(q, k, v, lengths, window):
        return torch.cat([plain_attention(q[seen], k[seen], v[seen], [len(seen)], window, **cap)[-len(own) :]
                          for own, seen in whole])  # fmt: skip

    for name, one, other in zip(NAMES, *(forward_backward(op, inputs, None, window) for op in (shared, apart))):
        assert (one - other).abs().max() < 1e-12, name


def seeing_all(q, k, v, q_lengths, k_lengths, bias=None):
    """Definition: each row of a sequence sees all rows of its partner."""
    outputs = []
    for q_n, k_n, v_n in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths)):
        group = q_n.shape[1] // k_n.shape[1]
        k_n, v_n = k_n.repeat_interleave(group, 1), v_n.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q_n, k_n) / q_n.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias(torch.arange(len(q_n))[:, None] - torch.arange(len(k_n)))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_n))
    return torch.cat(outputs)


def bias_of(ages):
    """[..., q, k] -> [..., 6, q, k]: some function of the distance, another one for each head."""
    return torch.stack([torch.sin(ages * (h + 1.0)).double() for h in range(6)], -3)


PAIRS = {"alike": ([8, 16], [8, 16]), "ragged": ([5, 1, 40, 3], [17, 60, 2, 9]), "one": ([1], [1])}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("q_lengths, k_lengths", PAIRS.values(), ids=PAIRS.keys())
def test_cross_attention_sees_all_of_the_partner(q_lengths, k_lengths, biased):
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(q_lengths), 6, 8), (sum(k_lengths), 2, 8), (sum(k_lengths), 2, 8), (sum(q_lengths), 6, 8)]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    plan = Packed.plan(np.array(q_lengths), False, "cpu", np.array(k_lengths))

    def ours(q, k, v, lengths, window):
        return plan(0, q, k, v, biases=plan.scores_bias(bias_of) if biased else None)

    def plain(q, k, v, lengths, window):
        return seeing_all(q, k, v, q_lengths, k_lengths, bias_of if biased else None)

    for name, one, other in zip(NAMES, *(forward_backward(op, inputs, None, None) for op in (ours, plain))):
        assert (one - other).abs().max() < 1e-12, name


@pytest.mark.parametrize("biased", [False, True])
def test_an_encoder_sees_all_of_its_sequence(biased):
    lengths = LENGTHS["ragged"]
    inputs = make_inputs(lengths, (6, 6), torch.float64)
    plan = Rows.pack([[0] * n for n in lengths], causal=False).attend

    def ours(q, k, v, lengths, window):
        return plan(0, q, k, v, biases=plan.scores_bias(bias_of) if biased else None)

    def plain(q, k, v, lengths, window):
        return seeing_all(q, k, v, lengths, lengths, bias_of if biased else None)

    for name, one, other in zip(NAMES, *(forward_backward(op, inputs, lengths, None) for op in (ours, plain))):
        assert (one - other).abs().max() < 1e-12, name


def test_a_causal_bias_hides_what_comes_later():
    lengths = LENGTHS["ragged"]
    inputs, plan = make_inputs(lengths, (6, 6), torch.float64), Rows.pack([[0] * n for n in lengths]).attend

    def hiding(ages):
        return bias_of(ages).masked_fill(ages.unsqueeze(-3) < 0, -torch.inf)

    ours = plan(0, *inputs[:3], biases=plan.scores_bias(bias_of))
    assert (ours - seeing_all(*inputs[:3], lengths, lengths, hiding)).abs().max() < 1e-12


def test_several_sequences_may_see_one_partner():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 4, generator=draw, dtype=torch.float64) for n in (9, 7, 7))
    k.requires_grad_()
    plan = Packed.plan(np.array([4, 2, 3]), False, "cpu", np.array([5, 2]), sees=np.array([0, 1, 0]))
    own = [slice(0, 5), slice(5, 7), slice(0, 5)]
    expected = torch.cat([seeing_all(part, k[seen], v[seen], [len(part)], [len(k[seen])])
                          for part, seen in zip(q.split([4, 2, 3]), own)])  # fmt: skip
    y = plan(0, q, k, v)
    assert (y - expected).abs().max() < 1e-12
    (one,), (other,) = (torch.autograd.grad(x.square().sum(), k) for x in (y, expected))
    assert (one - other).abs().max() < 1e-12


# ---- On a GPU: flash attention on the rows where they lie ----------------------------------------------------------

PLANS = {
    "decoder": lambda: (Rows.pack([[0] * n for n in LENGTHS["ragged"]]).attend, LENGTHS["ragged"]),
    "encoder": lambda: (Rows.pack([[0] * n for n in LENGTHS["ragged"]], causal=False).attend, LENGTHS["ragged"]),
    "cross": lambda: (Packed.plan(np.array([5, 1, 40, 3]), False, "cpu", np.array([17, 60, 2, 9])), [17, 60, 2, 9]),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_flash_attention_is_asked_for_what_the_buckets_compute(plan, heads, window):
    """By the definition in its place: which rows, heads, window and scale it is given."""
    plan, k_lengths = plan()
    (q, _, _, grad_y), (_, k, v, _) = (make_inputs(lengths, heads, torch.float64)
                                       for lengths in (plan.stretches.q.diff().tolist(), k_lengths))  # fmt: skip

    def varlen(q, k, v, lengths, window):
        return plan.varlen(q, k, v, window, 0.4, reference.varlen_attention)

    def padded(q, k, v, lengths, window):
        return plan.padded(q, k, v, window, scale=0.4)

    found = (forward_backward(op, (q, k, v, grad_y), None, window) for op in (varlen, padded))
    for name, one, other in zip(NAMES, *found):
        assert (one - other).abs().max() < 1e-12, name


CUDA, CPU, BF16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize("expected, device, dtype, head_dim, plain", [
    ("varlen", CUDA, BF16, 64, True), ("varlen", CUDA, torch.float16, 256, True), ("padded", CPU, BF16, 64, True),
    ("padded", CUDA, torch.float32, 64, True), ("padded", CUDA, BF16, 64, False), ("padded", CUDA, BF16, 264, True),
    ("padded", CUDA, BF16, 36, True),
])  # fmt: skip
def test_which_way_is_taken(expected, device, dtype, head_dim, plain, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cu130"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for plan, _ in (make() for make in PLANS.values()):
        assert plan.way(device, dtype, head_dim, plain) == expected
    lengths = np.array([4, 2, 3])
    for gathered in (Packed.plan(lengths, False, "cpu", np.array([5, 2, 1]), sees=np.array([1, 0, 2])),
                     Packed.plan(lengths, True, "cpu", shared=(np.array([0, 0, 0]), np.array([0, 4, 4])))):
        assert gathered.way(device, dtype, head_dim, plain) == "padded"
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    assert Rows.pack([[1]]).attend.way(device, dtype, head_dim, plain) == "padded"


def test_a_gpu_without_flash_attention_goes_by_buckets(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cu130"))
    for capability, expected in (((7, 5), "padded"), ((8, 0), "varlen"), ((12, 0), "varlen")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        assert Rows.pack([[1]]).attend.way(CUDA, BF16, 64, True) == expected


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_sequences_plan_is_no_larger_than_the_sequence(causal):
    tracemalloc.start()
    plan = Packed.plan(np.array([4096]), causal, "cpu")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 200 and plan.buckets[0].before.numel() == 1


def test_a_call_goes_the_way_that_was_chosen(monkeypatch):
    calls = []
    monkeypatch.setattr(Packed, "way", lambda *args, **options: "varlen")
    monkeypatch.setattr(Packed, "varlen", lambda self, *args: calls.append(args))
    q, k, v, _ = make_inputs([3, 2], (4, 2))
    Rows.pack([[0] * 3, [0] * 2]).attend(0, q, k, v, 2, scale=0.5)
    assert len(calls) == 1 and calls[0][3:] == (2, 0.5) and all(x is y for x, y in zip(calls[0], (q, k, v)))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before torch 2.13 flash attention is not used")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_torchs_own_takes_the_call_and_returns_gradients(plan):
    """Shapes and arguments alone: on the meta device nothing is computed."""
    plan, k_lengths = plan()
    q, k = (torch.empty(n, heads, 64, dtype=BF16, device="meta", requires_grad=True)
            for n, heads in ((int(plan.stretches.q[-1]), 6), (sum(k_lengths), 2)))  # fmt: skip
    y = plan.varlen(q, k, k, 3, 0.5)
    assert y.shape == q.shape and y.dtype == BF16
    y.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_padded_length_grows_by_at_most_half():
    lengths = np.arange(1, 5000)
    padded = padded_length(lengths)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    assert (padded[:8] == 8).all() and (padded[8:16] == 16).all() and (padded[16:] <= 1.5 * lengths[16:]).all()
    assert all(padded_length(lengths[i : i + 1])[0] == padded[i] for i in range(0, len(lengths), 7))  # alone: the same


@pytest.mark.parametrize("sequences, message", [
    ([[1, 2], [40]], "token ids from 1 to 40, but this base's are 0 to 39. Use the tokenizer that came with it"),
    ([[1, -1]], "token ids from -1 to 1, but"), ([[1.7, 2]], "token ids are float64; needed whole numbers"),
    ([1, 2, 3], "token ids: number 0 is 1; needed a list of lists of ids"),
    (["abc"], "token ids: number 0 is 'abc'; needed a list of lists of ids"),
    ([[1], [[1, 2], [3, 4]]], "token ids: number 1 is .*; needed a list of lists"),
    ([[1], [[1, 2], [3]]], "token ids: number 1 is .*; needed a list of lists"), ([["a"]], "token ids are <U1; needed"),
])  # fmt: skip
def test_pack_refuses_what_is_no_token(sequences, message):
    with pytest.raises(InputError, match=message):
        Rows.pack(sequences, vocab_size=40)


def test_a_sequence_that_its_prefix_makes_too_long_is_named():
    rows = Rows.pack([[1] * 6, [2], [3] * 3], prefixes=[-1, 0, 0])
    with pytest.raises(InputError, match="too long: number 2 has 9 tokens with its prefix but"):
        check_lengths(rows, 8)
    check_lengths(rows, 9)


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_pack_refuses_empty(sequences):
    with pytest.raises(ValueError, match="empty"):
        Rows.pack(sequences)
