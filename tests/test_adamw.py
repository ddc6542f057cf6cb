"""Is a fused step one AdamW step of every user's row, with that user's settings and nobody else's numbers?"""

import math

import pytest
import torch

from minipeft_kernels import reference
from minipeft_kernels.adamw import NORM_BLOCK, SQUARES_BLOCK, AdamWSettings, adamw_
from minipeft_kernels.backend import backend

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


def stepped(slots, num_steps=1, U=6, P=3 * NORM_BLOCK, op=adamw_, dtype=torch.float32, device="cpu", **extra):
    """Buffers after steps of these slots with new gradients each step, and the norms of the last step. On the CPU."""
    buffers = [buffer.to(device) for buffer in make_buffers(U, P, dtype)]
    steps = {slot: 1 + 3 * slot for slot in range(U)}
    for i in range(num_steps):
        buffers[1].copy_(make_buffers(U, P, dtype, seed=i)[1])
        s = make_settings(slots, steps)
        norms = op(*buffers, torch.tensor(slots, device=device), s if op is adamw_ else s.as_dict(), **extra)
        steps = {slot: step + 1 for slot, step in steps.items()}
    return {name: buffer.cpu() for name, buffer in zip(NAMES, buffers)}, norms.cpu()


def stepped_once(buffers, slots, device, **extra):
    """One step of copies of these buffers, as of the slots' third step: buffers and norms. On the CPU."""
    buffers = [buffer.to(device, copy=True) for buffer in buffers]
    settings = make_settings(slots, [3] * len(buffers[0]))
    norms = adamw_(*buffers, torch.tensor(slots, dtype=torch.int64, device=device), settings, **extra)
    return dict(zip(NAMES, (buffer.cpu() for buffer in buffers))), norms.cpu()


def squares_of(grads, Q):
    """[U, P] -> [U, Q]: what the weight gradient's kernels leave, one sum per block."""
    return grads.square().unflatten(1, (Q, -1)).sum(-1)


def relative(one, exact):
    return float((one.double() - exact).norm() / exact.norm())


def test_steps_match_reference(device):
    slots = [4, 0, 5, 2]
    kernel, norms = stepped(slots, num_steps=4, device=device)
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


def test_matches_torch_adamw_per_user_when_users_skip_steps(device):
    """Users who are not in a step stand still, their own step counts too."""
    U, P = 4, 2 * NORM_BLOCK
    buffers = [buffer.to(device) for buffer in make_buffers(U, P)]
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
        adamw_(*buffers, torch.tensor(slots, device=device), make_settings(slots, steps))
        for slot in slots:
            parameters[slot].grad = buffers[1][slot].clone()
            torch.nn.utils.clip_grad_norm_([parameters[slot]], float(everybody.max_norm[slot]))
            optimizers[slot].step()
    assert len(set(steps.values())) > 1
    for row, parameter in zip(buffers[0].cpu(), parameters):
        assert relative(row, parameter.detach().cpu().double()) <= 1e-6


def test_clips_only_what_is_above_the_norm(device):
    P = NORM_BLOCK
    grads = torch.stack([torch.full((P,), value) for value in (1e-3, 1.0, 1.0)])  # norms 0.008, 8, 8
    buffers = [x.to(device) for x in (torch.zeros(3, P), grads.clone(), torch.zeros(3, P), torch.zeros(3, P))]
    column = lambda value: torch.full((3,), value, dtype=torch.float64)  # noqa: E731
    max_norm = torch.tensor([2.0, 2.0, math.inf], dtype=torch.float64)
    settings = AdamWSettings(column(0.1), column(0.0), column(0.0), column(0.0), column(1e-8), max_norm, column(1.0))
    norms = adamw_(*buffers, torch.arange(3, device=device), settings).cpu()
    torch.testing.assert_close(norms, torch.tensor([0.008, 8.0, 8.0]))  # before clipping
    clipped = buffers[2].norm(dim=1).cpu()  # beta1 = 0: the first moment is the gradient that was used
    torch.testing.assert_close(clipped, torch.tensor([0.008, 2.0, 8.0]), rtol=1e-6, atol=0)
    assert torch.equal(buffers[1].cpu(), grads)  # gradients are not touched


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.9), (0.9999, 1 - 1e-9)], ids=str)
def test_extreme_betas_lose_no_accuracy(device, betas):
    """1 - beta from an fp32 beta, m + (1 - b1)(g - m), or corrections of an fp32 power would each show here."""
    P, slots = NORM_BLOCK, torch.tensor([1, 0])
    buffers = make_buffers(2, P)
    buffers[2].fill_(1e3)  # an old moment much larger than the gradient, forgotten at once if beta1 is 0
    column = lambda value: torch.full((2,), value, dtype=torch.float64)  # noqa: E731
    s = AdamWSettings(column(1e-3), column(0.01), *map(column, betas), column(1e-8), column(math.inf), column(3.0))
    exact = [buffer.double() for buffer in buffers]
    reference.adamw_(*exact, slots, s.as_dict())
    buffers = [buffer.to(device) for buffer in buffers]
    adamw_(*buffers, slots.to(device), s)
    for name, buffer, wanted in zip(NAMES, buffers, exact):
        assert relative(buffer.cpu(), wanted) <= 3e-7, name


@pytest.mark.parametrize("given", [False, True], ids=["norms from gradients", "norms from squares"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter, of the clip nobody uses
def test_a_row_that_is_not_finite_is_left_alone_and_others_step(device, bad, given):
    slots, buffers = [4, 0, 5, 2], make_buffers(6, 3 * NORM_BLOCK)

    def step():
        squares = squares_of(buffers[1], 12).to(device) if given else None
        compute = torch.full((6, 3 * NORM_BLOCK), 7.0, dtype=torch.bfloat16, device=device)
        after, norms = stepped_once(buffers, slots, device, squares=squares, compute=compute)
        return {**after, "compute": compute.cpu()}, norms

    clean, _ = step()
    buffers[1][0, 100] = bad  # in the middle of the row
    after, norms = step()
    assert torch.isfinite(norms).tolist() == [True, False, True, True]
    for name, old in zip((*NAMES, "compute"), (*buffers, torch.full_like(buffers[0], 7.0))):
        assert torch.equal(after[name][0].float().nan_to_num(), old[0].nan_to_num()), name
        assert torch.equal(after[name][[2, 4, 5]], clean[name][[2, 4, 5]]), name


def test_a_step_in_which_nobody_is_finite(device):
    buffers = make_buffers(3, NORM_BLOCK)
    buffers[1][:] = math.nan
    after, norms = stepped_once(buffers, [2, 0], device)
    assert not torch.isfinite(norms).any()
    assert all(torch.equal(after[name], old) for name, old in zip(NAMES, buffers) if name != "grads")


def test_a_step_of_nobody(device):
    buffers = make_buffers(3, NORM_BLOCK)
    after, norms = stepped_once(buffers, [], device)
    assert norms.shape == (0,)
    assert all(torch.equal(after[name], old) for name, old in zip(NAMES, buffers))


def test_rows_that_are_not_named_are_neither_read_nor_touched(device):
    buffers = make_buffers(6, 3 * NORM_BLOCK)
    squares, compute = squares_of(buffers[1], 6), torch.zeros(6, 3 * NORM_BLOCK, dtype=torch.bfloat16)
    absent, slots = [0, 1, 3, 5], [4, 2]
    clean, _ = stepped_once(buffers, slots, device)
    for buffer in (*buffers, squares, compute):
        buffer[absent] = math.nan  # what a free slot may hold
    for given in (None, squares.to(device)):
        copy = compute.to(device, copy=True)
        after, norms = stepped_once(buffers, slots, device, squares=given, compute=copy)
        assert torch.isfinite(norms).all()
        assert copy[absent].isnan().all() and not copy[slots].isnan().any()
        for name, old in zip(NAMES, buffers):
            assert after[name][absent].isnan().all(), name
            assert given is not None or torch.equal(after[name][slots], clean[name][slots]), name
            assert (after[name][slots] != old[slots]).any(1).all() or name == "grads", name


def test_sums_of_squares_that_are_given_stand_for_the_gradient_norm(device):
    slots, buffers = [4, 0, 5, 2], make_buffers(6, 3 * NORM_BLOCK)
    after, norms = stepped_once(buffers, slots, device)
    for Q in (1, 64, 96):
        given, given_norms = stepped_once(buffers, slots, device, squares=squares_of(buffers[1], Q).to(device))
        torch.testing.assert_close(given_norms, norms, rtol=1e-6, atol=0)
        for name in NAMES:
            torch.testing.assert_close(given[name], after[name], rtol=1e-5, atol=1e-7)
    half = squares_of(buffers[1] / 2, 6).to(device)  # what is given counts: the gradient is not read for its norm
    torch.testing.assert_close(stepped_once(buffers, slots, device, squares=half)[1], norms / 2, rtol=1e-6, atol=0)


def test_a_long_row_of_squares_is_summed_as_accurately_as_plain_pytorch(device):
    squares = torch.rand(2, 3001, generator=torch.Generator().manual_seed(0)) ** 8
    _, norms = stepped_once(make_buffers(2, NORM_BLOCK), [1, 0], device, squares=squares.to(device))
    torch.testing.assert_close(norms.double(), squares.double().sum(1).sqrt()[[1, 0]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_copy_is_the_new_weights_rounded_to_nearest(device, dtype):
    buffers, slots = make_buffers(6, 3 * NORM_BLOCK), [4, 0, 5, 2]
    buffers[0] = buffers[0].to(dtype).float()
    buffers[0][4] += torch.finfo(dtype).eps / 2 * 2 ** buffers[0][4].abs().log2().floor()  # halfway: ties go to even
    buffers[1][4], buffers[2][4] = 0.0, 0.0
    compute = torch.full((6, 3 * NORM_BLOCK), 7.0, dtype=dtype, device=device)
    before = compute.clone()
    settings = make_settings(slots, [3] * 6)
    settings.weight_decay[0] = 0.0  # slot 4 does not move, so its halfway numbers are rounded
    on_device = [buffer.to(device, copy=True) for buffer in buffers]
    adamw_(*on_device, torch.tensor(slots, device=device), settings, compute=compute)
    weights = on_device[0]
    assert torch.equal(weights[4].cpu(), buffers[0][4])
    assert torch.equal(compute[slots], weights[slots].to(dtype))
    assert torch.equal(compute[[1, 3]], before[[1, 3]])
    plain, _ = stepped_once(buffers, slots, device)  # the copy changes nothing else
    assert torch.equal(plain["weights"][[0, 5, 2]], weights.cpu()[[0, 5, 2]])


def test_a_copy_in_fp64_is_the_weights_on_a_cpu_and_refused_by_kernels(device):
    buffers = [buffer.to(device) for buffer in make_buffers(2, NORM_BLOCK)]
    compute = torch.zeros(2, NORM_BLOCK, dtype=torch.float64, device=device)
    slots, settings = torch.tensor([1], device=device), make_settings([1], [3] * 2)
    if backend(device) == "triton":
        with pytest.raises(ValueError, match=r"compute is .* torch.float64; .* or torch.float16, or None"):
            adamw_(*buffers, slots, settings, compute=compute)
    else:
        adamw_(*buffers, slots, settings, compute=compute)
        assert torch.equal(compute[1], buffers[0][1].double()) and not compute[0].any()


@pytest.mark.parametrize("P", [NORM_BLOCK, 5 * NORM_BLOCK, 2 * SQUARES_BLOCK + 3 * NORM_BLOCK])
@pytest.mark.parametrize("given", [False, True], ids=["norms from gradients", "norms from squares"])
def test_bits_of_a_row_do_not_depend_on_company_or_order(device, P, given):
    buffers, results = make_buffers(4, P), []
    squares = squares_of(buffers[1], NORM_BLOCK).to(device) if given else None
    for slots in ([1], [1, 0], [3, 2, 1], [0, 1, 2, 3], [1]):  # the last: a second run
        after, norms = stepped_once(buffers, slots, device, squares=squares)
        results.append([norms[slots.index(1)], *(after[name][1] for name in NAMES)])
    assert (results[0][1] != buffers[0][1]).view(-1, NORM_BLOCK).any(1).all(), "a block of the row was not stepped"
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_blocks", [1, 3, 64, 65, 1000])  # the last: long enough for PyTorch to use all threads
def test_bits_of_a_row_do_not_depend_on_threads(num_blocks, threads):
    buffers = make_buffers(2, num_blocks * NORM_BLOCK)
    torch.set_num_threads(1)
    wanted, wanted_norms = stepped_once(buffers, [1], "cpu")
    torch.set_num_threads(threads)
    for slots in ([1], [1, 0]):
        after, norms = stepped_once(buffers, slots, "cpu")
        assert norms[0] == wanted_norms[0] and all(torch.equal(after[name][1], wanted[name][1]) for name in NAMES)


def test_bits_of_a_long_sum_do_not_depend_on_threads(threads):
    """PyTorch shares one sum of 33,000 numbers among threads if it is alone; about a third of such sums show it."""
    buffers, settings = make_buffers(20, NORM_BLOCK), make_settings(range(20), [1] * 20)
    squares = torch.rand(20, 33_000, generator=torch.Generator().manual_seed(0)) ** 2
    torch.set_num_threads(1)
    together = adamw_(*buffers, torch.arange(20), settings, squares=squares)
    torch.set_num_threads(threads)
    for slot in range(20):
        assert stepped_once(buffers, [slot], "cpu", squares=squares)[1][0] == together[slot]


def test_rewriting_one_user_changes_nobody_else(device):
    slots, buffers = [4, 0, 5, 2], make_buffers(6, 3 * NORM_BLOCK)
    before, norms = stepped_once(buffers, slots, device)
    for buffer in buffers:
        buffer[5] = 100 * buffer[5] + 1
    after, other_norms = stepped_once(buffers, slots, device)
    others = [0, 1, 2, 3, 4]
    assert all(torch.equal(before[name][others], after[name][others]) for name in NAMES)
    assert torch.equal(norms[[0, 1, 3]], other_norms[[0, 1, 3]]) and norms[2] != other_norms[2]


def test_order_of_slots_does_not_matter(device):
    one, norms = stepped([0, 1, 2, 3, 4, 5], device=device)
    other, other_norms = stepped([3, 5, 0, 1, 4, 2], device=device)
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    assert torch.equal(norms[[3, 5, 0, 1, 4, 2]], other_norms)


def half_settings(slots):
    return AdamWSettings(**{name: value.float() for name, value in make_settings(slots, [1, 1]).as_dict().items()})


WRONG = {
    "rows that do not fill blocks": (dict(P=65), "rows of 65 numbers; pad them to a multiple of 64"),
    "a buffer of another shape": (dict(grads=torch.zeros(3, 64)), r"grads is \[3, 64\] torch.float32; all four must"),
    "a buffer of another dtype": (dict(exp_avg=torch.zeros(2, 64).half()), "exp_avg .* torch.float16; all four must"),
    "a buffer with gaps": (dict(weights=torch.zeros(2, 128)[:, :64]), "weights is .* contiguous"),
    "slots of another dtype": (dict(slots=torch.tensor([0], dtype=torch.int32)), "slots are .* give .S. int64"),
    "settings of another size": (dict(settings=make_settings([0, 1], [1, 1])), "lr is .2. .* each of 1 slots"),
    "settings in fp32": (dict(settings=half_settings([0])), "lr is .1. torch.float32 .* fp64"),
    "squares of another bank": (dict(squares=torch.zeros(3, 4)), r"squares is \[3, 4\] .* give contiguous \[2, Q\]"),
    "no squares": (dict(squares=torch.zeros(2, 0)), r"squares is \[2, 0\]"),
    "a copy of another shape": (dict(compute=torch.zeros(2, 32).bfloat16()), r"compute is \[2, 32\]"),
    "a copy in fp32": (dict(compute=torch.zeros(2, 64)), "compute is .* torch.float32; .* torch.float64, or None if"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_say_what_came_and_what_was_needed(changed, message):
    changed = dict(changed)
    arguments = dict(zip(NAMES, make_buffers(2, changed.pop("P", 64))))
    arguments |= {"slots": torch.tensor([0]), "settings": make_settings([0], [1]), **changed}
    with pytest.raises(ValueError, match="adamw_: " + message):
        adamw_(**arguments)
