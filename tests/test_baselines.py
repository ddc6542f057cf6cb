"""Are the baselines honest: the same outputs and gradients as the loop over users?"""

import pytest
import torch
import torch.nn.functional as F
from accuracy import LENGTHS, assert_as_accurate, in_fp64
from test_segment_lora import NAMES, forward_backward, make_inputs

from minipeft_kernels import baselines, reference
from minipeft_kernels.baselines import DoesNotApply, Groups, gather_bmm, grouped_mm, padded_bmm
from minipeft_kernels.prompts import PromptPlan
from minipeft_kernels.segments import Segments

BATCHES = {f"{baseline.__name__}, {name}": (baseline, lengths)
           for baseline in (gather_bmm, padded_bmm, grouped_mm)
           for name, lengths in (LENGTHS | {"all as long": [32, 32, 32]}).items()
           if any(lengths) or baseline is not grouped_mm}  # fmt: skip


def on_groups(baseline):
    """The baseline with the arguments of the reference."""
    return lambda x, A, Bt, scale, segments, ranks: baseline(x, A, Bt, scale, Groups.build(segments), ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed_ranks", [False, True], ids=["full rank", "mixed ranks"])
@pytest.mark.parametrize("baseline, lengths", BATCHES.values(), ids=BATCHES.keys())
def test_output_and_gradients_are_those_of_the_reference(baseline, lengths, mixed_ranks, dtype):
    inputs = make_inputs(lengths, mixed_ranks=mixed_ranks, dtype=dtype)
    ours = forward_backward(on_groups(baseline), *inputs)
    plain = forward_backward(reference.segment_lora, *inputs)
    exact = forward_backward(reference.segment_lora, *in_fp64(inputs))
    for name, *versions in zip(NAMES, ours, plain, exact):
        assert versions[0].dtype == dtype
        assert_as_accurate(name, *versions)


@pytest.mark.parametrize("R", [1, 5, 16])
def test_grouped_mm_takes_any_rank(R):
    inputs = make_inputs([20, 7], R=R, mixed_ranks=False)
    for one, other in zip(forward_backward(on_groups(grouped_mm), *inputs),
                          forward_backward(reference.segment_lora, *inputs)):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_grouped_mm_says_what_it_does_not_take():
    def run(x, A, Bt, scale, segments, ranks, _):
        return on_groups(grouped_mm)(x, A, Bt, scale, segments, ranks)

    for inputs, message in (
        (in_fp64(make_inputs([20, 7])), r"x is torch\.float64"),
        (make_inputs([0, 0]), r"0 users have rows; it takes 1 to 1023"),
        (make_inputs([1] * 1024, R=3, sizes=(8, 8)), r"1024 users have rows"),
        (make_inputs([20, 7], sizes=(39, 24)), r"rows of 39 and 24 numbers in torch\.float32; it takes whole 16 bytes"),
    ):
        with pytest.raises(DoesNotApply, match=message):
            run(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("baseline", [baselines.loop_wgrad, baselines.padded_wgrad, baselines.grouped_wgrad])
@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS.values() if any(lengths)])
def test_weight_gradients_are_sums_of_outer_products(baseline, lengths, dtype):
    draw = torch.Generator().manual_seed(0)
    v, x = (torch.randn(sum(lengths), width, generator=draw).to(dtype) for width in (5, 24))
    segments = Segments.build([2 * nth for nth in range(len(lengths))], lengths)
    grad = torch.full((2 * len(lengths), 5, 24), 7.0, dtype=dtype)
    baseline(v, x, grad, Groups.build(segments))
    live = [slot for slot, length in zip(segments.slots.tolist(), lengths) if length]
    exact = torch.stack([a.double().T @ b.double() for a, b in zip(v.split(lengths), x.split(lengths)) if len(a)])
    plain = torch.stack([a.T @ b for a, b in zip(v.split(lengths), x.split(lengths)) if len(a)])
    assert_as_accurate("grad", grad[live], plain, exact)
    assert (grad[[slot for slot in range(len(grad)) if slot not in live]] == 7).all()


@pytest.mark.parametrize("mixed", [False, True], ids=["full width", "mixed widths"])
@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("baseline", [baselines.padded_bottleneck, baselines.grouped_bottleneck])
@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS.values() if any(lengths)])
def test_bottlenecks_are_the_reference(baseline, lengths, width, mixed):
    draw, S, K = torch.Generator().manual_seed(0), len(lengths), 24
    segments = Segments.build(range(S, 0, -1), lengths)
    groups, scale = Groups.build(segments), torch.rand(S + 2, generator=draw)
    widths = torch.arange(S + 2).clamp(1, width).int() if mixed else None
    weights = [torch.randn(S + 2, *shape, generator=draw) for shape in ((width, K), (width,), (width, K), (K,))]
    if mixed:  # nobody may read what is past a slot's own width
        for weight in weights[:3]:
            weight[torch.arange(width) >= widths[:, None]] = torch.nan
    inputs = torch.randn(sum(lengths), K, generator=draw), *weights
    for one, other in both(lambda x, *w: baseline(x, *w, scale, F.gelu, groups, widths),
                           lambda x, *w: reference.segment_bottleneck(x, None, *w, segments, "gelu", scale, widths),
                           *inputs):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def both(one, other, *inputs):
    """Output and gradients of two functions of (x, weights)."""
    results = []
    for function in (one, other):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        y = function(*leaves)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append([y, *torch.autograd.grad(y, leaves, grad_y)])
    return zip(*results)


@pytest.mark.parametrize("baseline, op, shape", [
    (baselines.gather_ia3, reference.segment_ia3, (24,)), (baselines.gather_shift, reference.segment_shift, (24,)),
    (baselines.gather_matmul, reference.segment_matmul, (24, 8)),
    (baselines.padded_matmul, reference.segment_matmul, (24, 8)),
    (baselines.grouped_matmul, reference.segment_matmul, (24, 8)),
])  # fmt: skip
def test_one_tensor_per_user_is_the_reference(baseline, op, shape):
    torch.manual_seed(0)
    segments = Segments.build([2, 0, 3], [5, 0, 20])
    groups = Groups.build(segments)
    for one, other in both(lambda x, weights: baseline(x, weights, groups),
                           lambda x, weights: op(x, weights, segments),
                           torch.randn(25, 24), torch.randn(4, *shape)):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_gathered_prompts_are_the_reference():
    torch.manual_seed(0)
    plan = PromptPlan.build([1, 0, 1], [0, 9, 15], [3, 4, 3])
    for one, other in both(lambda x, prompts: baselines.gather_prompts(x, prompts, plan),
                           lambda x, prompts: reference.gather_prompts(x, prompts, plan),
                           torch.randn(20, 24), torch.randn(2, 5, 24)):  # fmt: skip
        torch.testing.assert_close(one, other)
