"""Is a fused step one AdamW step of every user's row, with that user's settings and nobody else's numbers?"""

import math

import pytest
import torch

from minipeft_kernels import reference
from minipeft_kernels.adamw import NORM_BLOCK, AdamWSettings, adamw_

NAMES = ("weights", "grads", "exp_avg", "exp_avg_sq")


def make_buffers(U, P, dtype=torch.float32, seed=0):
    """weights, grads, exp_avg, exp_avg_sq [U, P], as after some steps, users' gradients of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, U)[:, None]
    weights, grads, exp_avg, exp_avg_sq = (torch.randn(U, P, generator=draw) for _ in range(4))
    return [b.to(dtype) for b in (weights, grads * sizes, 0.1 * exp_avg * sizes, (0.1 * exp_avg_sq * sizes) ** 2)]


def make_settings(slots, steps):
    """Settings that belong to the slot, so a slot has its own whatever the order. Every field differs."""
    values = {"lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "max_norm": 1.0}
    columns = {name: [value / (1 + 0.07 * slot) for slot in slots] for name, value in values.items()}
    columns["max_norm"] = [math.inf if slot % 3 == 0 else 0.5 * (slot + 1) for slot in slots]
    columns["step"] = [steps[slot] for slot in slots]
    return AdamWSettings(**{name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()})


def stepped(slots, num_steps=1, U=6, P=3 * NORM_BLOCK, op=adamw_, dtype=torch.float32):
    """Buffers after steps of these slots with new gradients each step, and the norms of the last step."""
    buffers = make_buffers(U, P, dtype)
    steps = {slot: 1 + 3 * slot for slot in range(U)}
    for i in range(num_steps):
        buffers[1].copy_(make_buffers(U, P, dtype, seed=i)[1])
        s = make_settings(slots, steps)
        norms = op(*buffers, torch.tensor(slots), s if op is adamw_ else s.as_dict())
        steps = {slot: step + 1 for slot, step in steps.items()}
    return dict(zip(NAMES, buffers)), norms


def relative(one, exact):
    return float((one.double() - exact).norm() / exact.norm())


def test_steps_match_reference():
    slots = [4, 0, 5, 2]
    kernel, norms = stepped(slots, num_steps=4)
    plain, plain_norms = stepped(slots, num_steps=4, op=reference.adamw_)
    exact, exact_norms = stepped(slots, num_steps=4, op=reference.adamw_, dtype=torch.float64)
    for name in NAMES:
        for slot in slots:
            allowed = 2 * relative(plain[name][slot], exact[name][slot]) + 1e-7
            assert relative(kernel[name][slot], exact[name][slot]) <= allowed, f"{name} of slot {slot}"
    assert norms.dtype == torch.float32
    assert relative(norms, exact_norms) <= 2 * relative(plain_norms, exact_norms) + 1e-7


def test_definition_is_torch_adamw_with_clipping():
    """The reference itself, in fp64, is what each user would run alone: also over several steps from nothing."""
    U, P, slots = 5, NORM_BLOCK, [3, 1, 4]
    weights, *_ = start = make_buffers(U, P, torch.float64)
    for buffer in start[2:]:
        buffer.zero_()
    parameters = {slot: torch.nn.Parameter(weights[slot].clone()) for slot in slots}
    s = make_settings(slots, dict.fromkeys(range(U), 1)).as_dict()
    optimizers = {}
    for i, slot in enumerate(slots):
        lr, decay, beta1, beta2, eps, max_norm = (float(s[name][i]) for name in list(s)[:6])
        optimizers[slot] = (torch.optim.AdamW([parameters[slot]], lr, (beta1, beta2), eps, decay), max_norm)
    for step in range(1, 6):
        start[1].copy_(make_buffers(U, P, torch.float64, seed=step)[1])
        reference.adamw_(*start, torch.tensor(slots), make_settings(slots, dict.fromkeys(range(U), step)).as_dict())
        for slot, (optimizer, max_norm) in optimizers.items():
            parameters[slot].grad = start[1][slot].clone()
            torch.nn.utils.clip_grad_norm_([parameters[slot]], max_norm)
            optimizer.step()
            torch.testing.assert_close(weights[slot], parameters[slot].detach(), rtol=1e-12, atol=1e-14)


def test_matches_torch_adamw_per_user_when_users_skip_steps():
    """Users who are not in a step stand still, their own step counts too."""
    U, P = 4, 2 * NORM_BLOCK
    buffers = make_buffers(U, P)
    for buffer in buffers[2:]:
        buffer.zero_()
    parameters = [torch.nn.Parameter(row.clone()) for row in buffers[0]]
    everybody = make_settings(range(U), dict.fromkeys(range(U), 1))
    optimizers = [torch.optim.AdamW([p], float(everybody.lr[u]), (float(everybody.beta1[u]), float(everybody.beta2[u])),
                                    float(everybody.eps[u]), float(everybody.weight_decay[u]))
                  for u, p in enumerate(parameters)]  # fmt: skip
    steps = dict.fromkeys(range(U), 0)
    for i, slots in enumerate([[0, 1, 2, 3], [2, 0], [3], [1, 3, 0], [2, 0]]):
        buffers[1].copy_(make_buffers(U, P, seed=i)[1])
        steps.update({slot: steps[slot] + 1 for slot in slots})
        adamw_(*buffers, torch.tensor(slots), make_settings(slots, steps))
        for slot in slots:
            parameters[slot].grad = buffers[1][slot].clone()
            torch.nn.utils.clip_grad_norm_([parameters[slot]], float(everybody.max_norm[slot]))
            optimizers[slot].step()
    assert len(set(steps.values())) > 1
    for row, parameter in zip(buffers[0], parameters):
        assert relative(row, parameter.detach().double()) <= 1e-6


def test_clips_only_what_is_above_the_norm():
    P = NORM_BLOCK
    grads = torch.stack([torch.full((P,), value) for value in (1e-3, 1.0, 1.0)])  # norms 0.008, 8, 8
    buffers = [torch.zeros(3, P), grads.clone(), torch.zeros(3, P), torch.zeros(3, P)]
    column = lambda value: torch.full((3,), value, dtype=torch.float64)  # noqa: E731
    max_norm = torch.tensor([2.0, 2.0, math.inf], dtype=torch.float64)
    settings = AdamWSettings(column(0.1), column(0.0), column(0.0), column(0.0), column(1e-8), max_norm, column(1.0))
    norms = adamw_(*buffers, torch.arange(3), settings)
    torch.testing.assert_close(norms, torch.tensor([0.008, 8.0, 8.0]))  # before clipping
    clipped = buffers[2].norm(dim=1)  # beta1 = 0: the first moment is the gradient that was used
    torch.testing.assert_close(clipped, torch.tensor([0.008, 2.0, 8.0]), rtol=1e-6, atol=0)
    assert torch.equal(buffers[1], grads)  # gradients are not touched


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_left_alone_and_others_step(bad):
    clean, _ = stepped([4, 0, 5, 2])
    buffers = make_buffers(6, 3 * NORM_BLOCK)
    buffers[1][0, 17] = bad
    before = [buffer.clone() for buffer in buffers]
    slots = [4, 0, 5, 2]
    norms = adamw_(*buffers, torch.tensor(slots), make_settings(slots, {slot: 1 + 3 * slot for slot in range(6)}))
    assert torch.isfinite(norms).tolist() == [True, False, True, True]
    for name, buffer, old in zip(NAMES, buffers, before):
        assert torch.equal(buffer[0].nan_to_num(), old[0].nan_to_num()), name
        assert torch.equal(buffer[[2, 4, 5]], clean[name][[2, 4, 5]]), name


def test_a_step_in_which_nobody_is_finite():
    buffers = make_buffers(3, NORM_BLOCK)
    buffers[1][:] = math.nan
    weights = buffers[0].clone()
    assert not torch.isfinite(adamw_(*buffers, torch.tensor([2, 0]), make_settings([2, 0], [1, 1, 1]))).any()
    assert torch.equal(buffers[0], weights)


def test_rows_that_are_not_named_are_not_touched():
    before = dict(zip(NAMES, make_buffers(6, 3 * NORM_BLOCK)))
    after, _ = stepped([4, 2])
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][[0, 1, 3, 5]], before[name][[0, 1, 3, 5]]), name
        assert (after[name][[4, 2]] != before[name][[4, 2]]).any(1).all(), name
    assert torch.equal(after["grads"], before["grads"])


@pytest.mark.parametrize("num_blocks", [1, 3, 64, 65, 33_000])  # the last: one sum long enough for PyTorch to share out
def test_bits_of_a_row_do_not_depend_on_company_or_threads(num_blocks):
    P, before, results = num_blocks * NORM_BLOCK, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for slots in ([1], [1, 0]):
                buffers, norms = stepped(slots, U=2, P=P)
                results.append([norms[slots.index(1)], *(buffers[name][1] for name in NAMES)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result))


def test_order_of_slots_does_not_matter():
    one, norms = stepped([0, 1, 2, 3, 4, 5])
    other, other_norms = stepped([3, 5, 0, 1, 4, 2])
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    assert torch.equal(norms[[3, 5, 0, 1, 4, 2]], other_norms)


def test_rows_that_do_not_fill_blocks_are_an_error():
    with pytest.raises(ValueError, match="adamw_: rows of 65 numbers; pad them to a multiple of 64"):
        adamw_(*make_buffers(2, 65), torch.tensor([0]), make_settings([0], [1]))
