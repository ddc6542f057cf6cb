"""Does every user get from the fused engine what they would have got alone, and nothing of anybody else?"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linears import site_by_site

import minipeft_kernels.backend
from minipeft import engine as engine_module
from minipeft.batch import filled
from minipeft.engine import Adapter, Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import LabelSet, Question
from minipeft.methods.lora import LoRA
from minipeft.models.decoder import MLP, Decoder, DecoderConfig
from minipeft.models.loading import fingerprint
from minipeft.models.rows import Rows
from minipeft.randomness import generator
from minipeft.schedule import Job, PassConfig, Run, TrainConfig

# An MLP that is no multiple of 64 wide: elements then lie anywhere in a vector register and a thread's share.
BASE = DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=75,
                     qkv_bias=True, max_positions=64)  # fmt: skip
LABELS = LabelSet([[5], [6, 7], [8, 9]])  # one token, two tokens: a prompt, and two labels that go on from it
RANKS = (1, 3, 8, 12)  # the first three in rank class 8, the last in rank class 16
SITES = (LoRA().sites, ("q", "v"), ("o", "down"), ("layers.1.mlp.gate", "k"))
COMPANIES = {  # order of admission, slots, token budget
    "all at once": ("given", 32, 4096),
    "few slots": ("given", 3, 300),
    "backwards": ("backwards", 7, 150),
    "shuffled, tiny passes": ("shuffled", 16, 1),
}


def make_model(seed=0, config=BASE):
    """A decoder whose every weight is far from zero, and whose answers depend on the whole prompt."""
    model, draw = Decoder(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(noise / weight.shape[1] ** 0.5 if weight.ndim == 2 else 1 + 0.3 * noise)
        model.embed.weight.mul_(4)
    return model


def make_questions(rng, number, flip, noisy=False, longest=20):
    """Prompts whose first token says which label this user gives; with `noisy`, labels that nothing says."""
    questions = []
    for _ in range(number):
        prompt = tuple(rng.integers(10, 60, size=rng.integers(2, longest)).tolist())
        label = rng.integers(3) if noisy else (prompt[0] + flip) % 3
        questions.append(Question(prompt, int(label)))
    return questions


def make_job(i):
    """User i of sixteen: each has another mixture of rank, sites, data and settings."""
    rng = np.random.default_rng(100 + i)
    config = TrainConfig(
        method=LoRA(RANKS[i % 4], alpha=(16.0, 4.0, 8.0)[i % 3], sites=SITES[i // 4]),
        learning_rate=(2e-3, 1e-2, 5e-3, 4e-2)[(i + i // 4) % 4], weight_decay=(0.01, 0.0, 0.1)[i % 3],
        warmup=(0.1, 0.0, 0.5)[i % 3], epochs=2 + i % 5, batch_size=1 + i % 6, patience=1 + i % 2,
        max_grad_norm=(1.0, math.inf, 0.1)[i % 3], beta1=(0.9, 0.5)[i % 2], beta2=(0.999, 0.9)[i % 2], seed=i % 3,
    )  # fmt: skip
    train = make_questions(rng, int(rng.integers(3, 12)), i)
    return Job(f"user {i}", train, make_questions(rng, int(rng.integers(2, 6)), i, noisy=i % 3 == 0), config)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def jobs():
    return [make_job(i) for i in range(16)]


@pytest.fixture(scope="module")
def alone(model, jobs):
    """What each user gets when nobody else is there, in the default mode."""
    return {job.user: train(model, [job])[job.user] for job in jobs}


@pytest.fixture(scope="module")
def exactly_alone(model, jobs):
    """The same in deterministic mode."""
    return {job.user: train(model, [job], deterministic=True)[job.user] for job in jobs}


def train(model, jobs, slots=1, token_budget=2048, deterministic=False):
    return Engine(model, LABELS, PassConfig(slots, token_budget, deterministic)).train(jobs)


def arranged(jobs, order):
    if order == "shuffled":
        return [jobs[i] for i in np.random.default_rng(5).permutation(len(jobs))]
    return jobs if order == "given" else jobs[::-1]


def assert_same(one: Adapter, other: Adapter):
    assert torch.equal(one.row, other.row), f"{one.user}: rows differ by {(one.row - other.row).abs().max():.1e}"
    assert one.metrics == other.metrics, f"{one.user}: {one.metrics} but {other.metrics}"


def relative(row, exact):
    return float((row.double() - exact.double()).norm() / exact.double().norm())


def random_row(model, method, seed=0, unused=0.0):
    """A row far from the start value: B is not zero, so every gradient is there. Unused rank rows hold `unused`."""
    layout, draw = method.layout(model), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout.shapes.items():
        tensors[name] = torch.full(shape, unused)
        tensors[name][: method.rank] = 0.3 * torch.randn((method.rank, shape[1]), generator=draw) / method.rank**0.5
    return layout.row(tensors)


def admit(engine, jobs, rows):
    """Every job resident at its row, and its run."""
    return [Run(job, *engine.admit(job.user, job.config.method, row)) for job, row in zip(jobs, rows)]


def in_order(runs):
    """All runs in the order that a pass needs."""
    return sorted(runs, key=lambda run: (run.bank, run.slot))


def first_minibatch(job):
    """The questions of the user's first step, from the promise: a shuffle that belongs to (seed, user, epoch)."""
    order = generator(job.config.seed, job.user, "shuffle", 0).permutation(len(job.train))
    return [job.train[i] for i in order[: job.config.batch_size]]


def matrices(model, method, row):
    """site -> (A [rank, K], B [N, rank]) as in the paper."""
    layout = method.layout(model)
    A, Bt = ({s: layout.view(row, f"{s}.{name}")[: method.rank] for s in method.chosen(model)}
             for name in ("A", "Bt"))  # fmt: skip
    return {site: (A[site].clone(), Bt[site].T.clone()) for site in A}


# ---- Fairness ------------------------------------------------------------------------------------------------------


def test_the_sixteen_users_really_differ(jobs, alone):
    stopped = [adapter.metrics["stopped_early"] for adapter in alone.values()]
    assert 3 <= sum(stopped) <= 13
    assert len({adapter.metrics["steps"] for adapter in alone.values()}) >= 8
    assert len({adapter.metrics["best_epoch"] for adapter in alone.values()}) >= 3
    assert {job.config.method.rank_class() for job in jobs} == {8, 16}
    assert {q.label for job in jobs for q in job.train} == {0, 1, 2}
    assert any(len(job.train) % job.config.batch_size for job in jobs)  # a last minibatch that is smaller


@pytest.mark.parametrize("order, slots, token_budget", COMPANIES.values(), ids=COMPANIES.keys())
def test_training_together_is_training_alone(model, jobs, alone, order, slots, token_budget):
    together = train(model, arranged(jobs, order), slots, token_budget)
    assert together.keys() == alone.keys()
    for user, expected in alone.items():
        assert relative(together[user].row, expected.row) <= 1e-5, user
        got, wanted = dict(together[user].metrics), dict(expected.metrics)
        assert got.pop("val_loss") == pytest.approx(wanted.pop("val_loss"), rel=1e-5), user
        assert got == wanted, user


@pytest.mark.parametrize("order, slots, token_budget", COMPANIES.values(), ids=COMPANIES.keys())
def test_deterministic_mode_gives_the_same_bits_in_any_company(model, jobs, exactly_alone, order, slots, token_budget):
    together = train(model, arranged(jobs, order), slots, token_budget, deterministic=True)
    for user, expected in exactly_alone.items():
        assert_same(together[user], expected)


def test_deterministic_mode_gives_the_same_bits_on_any_number_of_threads(model):
    rng = np.random.default_rng(0)
    jobs = []
    for i in range(6):
        config = TrainConfig(LoRA(RANKS[i % 4]), learning_rate=1e-2, batch_size=20 - i, epochs=1)
        data, val = (make_questions(rng, 20, i, longest=60) for _ in range(2))
        jobs.append(Job(f"user {i}", data, val, config))
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            engine = Engine(model, LABELS, PassConfig(6, 4096, deterministic=True))
            results[threads] = engine.train(jobs)
            # Enough rows that element by element work is really shared out.
            assert engine.totals.rows / engine.totals.passes * BASE.mlp_width > 65536
        by_one = train(model, jobs[:2], deterministic=True)
    finally:
        torch.set_num_threads(before)
    for user, expected in results[1].items():
        assert_same(results[2][user], expected)
        assert_same(results[3][user], expected)
    for user, adapter in by_one.items():  # alone and on three threads
        assert_same(adapter, results[1][user])


def test_each_mode_takes_its_own_path(model, jobs, monkeypatch):
    """Many sizes give the same bits by luck; in deterministic mode there is no product over everybody's rows at all."""
    taken, plain = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: taken.append("forward") or plain(*args))
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: taken.append("backward") or matmul(a, b))
    train(model, jobs[:8], 8, deterministic=True)
    assert not taken
    train(model, jobs[:8], 8)
    assert set(taken) == {"forward", "backward"}


# ---- Isolation -----------------------------------------------------------------------------------------------------


def rewritten(job, seed=7):
    """The job with every token and every label changed, each prompt and training label as long as it was."""
    rng = np.random.default_rng(seed)
    swap = {0: 0, 1: 2, 2: 1}  # training labels of the same length

    def other(question, labels):
        moves = rng.integers(1, 50, len(question.prompt))  # never 0: every token becomes another
        return Question(tuple(((np.array(question.prompt) - 10 + moves) % 50 + 10).tolist()), labels[question.label])

    return replace(job, train=[other(q, swap) for q in job.train], val=[other(q, {0: 1, 1: 2, 2: 0}) for q in job.val])


@pytest.mark.parametrize("victim", [2, 7])  # one in each rank class
def test_rewriting_a_users_examples_changes_nobody_else(model, jobs, victim):
    jobs = list(jobs)
    # The victim must not stop at another time, or the others' passes would have other sizes.
    jobs[victim] = replace(jobs[victim], config=replace(jobs[victim].config, patience=99))
    user = jobs[victim].user
    one = train(model, jobs, 6, 400)
    other = train(model, [rewritten(job) if job.user == user else job for job in jobs], 6, 400)
    assert relative(one[user].row, other[user].row) > 0.01
    assert one[user].metrics["val_loss"] != other[user].metrics["val_loss"]
    for bystander in one.keys() - {user}:
        assert_same(one[bystander], other[bystander])


def test_deterministic_mode_isolates_whatever_the_lengths_and_the_company(model, jobs, exactly_alone):
    rng = np.random.default_rng(3)
    company = list(jobs[:9])
    company[2] = replace(jobs[2], train=make_questions(rng, 17, 0, longest=40))
    together = train(model, company, 32, 700, deterministic=True)
    assert not torch.equal(together["user 2"].row, exactly_alone["user 2"].row)
    for user in together.keys() - {"user 2"}:
        assert_same(together[user], exactly_alone[user])


POISONS = {
    "an infinite learning rate": lambda job: replace(job, config=replace(job.config, learning_rate=math.inf)),
    "a learning rate of 1e30": lambda job: replace(job, config=replace(job.config, learning_rate=1e30)),
    "a loss that is no number": lambda job: replace(job, start=torch.full((job.config.method.layout(make_model())
                                                                           .row_size,), math.nan)),
    "a text without a token": lambda job: replace(job, train=[*job.train, Question((), 0)]),
    "a label outside the set": lambda job: replace(job, val=[*job.val, Question((10,), 3)]),
    "no example": lambda job: replace(job, train=[]),
    "a setting that makes no sense": lambda job: replace(job, config=replace(job.config, method=LoRA(rank=0))),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_user_leaves_with_a_reason_and_changes_nobody_else(model, jobs, exactly_alone, poison):
    """Slots are few: the poisoned one's is taken by others, so whatever was left in it would show."""
    poisoned, faults = list(jobs[:5]), []
    poisoned[1] = POISONS[poison](jobs[1])
    engine = Engine(model, LABELS, PassConfig(2, 400, deterministic=True))
    progress = []
    adapters = engine.train(poisoned, on_fault=faults.append, on_progress=progress.append)
    (fault,) = faults
    assert fault.user == "user 1" and fault.reason.count("\n") == 0
    assert ("diverged" in fault.reason) == (poison in list(POISONS)[:3])
    assert adapters.keys() == {job.user for job in poisoned} - {"user 1"}
    for user in adapters:
        assert_same(adapters[user], exactly_alone[user])
    assert all(bank.bank.users == [None] * 2 for bank in engine._banks)
    assert sum(progress) == sum(job.planned_examples for job in poisoned)
    with pytest.raises(InputError) as raised:  # unless somebody asks to be told
        Engine(model, LABELS).train([poisoned[1]])
    assert str(raised.value) == fault.reason


def test_who_diverges_leaves_after_one_epoch_without_a_finite_step(model, jobs):
    wild = replace(jobs[0], config=replace(jobs[0].config, learning_rate=math.inf, epochs=9, patience=9))
    seen = [done for done in Engine(model, LABELS).run([wild])]
    assert [fault.user for fault in seen[-1].faults] == ["user 0"] and not seen[-1].runs
    assert sum(len(done.faults) + len(done.finished) for done in seen) == 1
    steps = math.ceil(len(wild.train) / wild.config.batch_size)
    assert len(seen) == 2 * (steps + 1)  # the first step ruins the row; in the second epoch none is finite
    assert sum(done.worked_off for done in seen) == wild.planned_examples


@pytest.mark.parametrize("factor", [math.nan, 10.0], ids=["nan", "large"])
def test_a_row_of_nan_or_of_large_numbers_changes_nobody_else(model, jobs, factor):
    """Large: then the victims' gradients are the largest in the pass, and anything taken over the pass would show."""
    def three_steps(ruined):
        engine = Engine(model, LABELS)
        rows = [random_row(model, job.config.method, i) for i, job in enumerate(jobs)]
        rows = [row * factor if ruined and i in (4, 7) else row for i, row in enumerate(rows)]
        runs = admit(engine, jobs, rows)
        for _ in range(3):
            engine.train_step(in_order(runs))
        banks = [(engine._banks[run.bank].bank, run.slot) for run in runs]
        return [bank.weights[slot] for bank, slot in banks], [bank.exp_avg[slot] for bank, slot in banks], runs

    (rows, moments, _), (other_rows, other_moments, runs) = three_steps(False), three_steps(True)
    for i, run in enumerate(runs):
        if i not in (4, 7):
            assert run.skipped_steps == 0
            assert torch.equal(rows[i], other_rows[i]), run.job.user
            assert torch.equal(moments[i], other_moments[i]), run.job.user
        elif math.isnan(factor):
            assert run.skipped_steps == 3 and other_rows[i].isnan().all() and not other_moments[i].any()
        else:
            assert not torch.equal(rows[i], other_rows[i])


# ---- Gradients and steps -------------------------------------------------------------------------------------------


def own_gradient(model, job, row, questions):
    """The user's gradient [P] by autograd through dense weights W + s B A, sequence by sequence: the definition."""
    method = job.config.method
    dtype = model.embed.weight.dtype
    own = {site: tuple(m.to(dtype).requires_grad_() for m in pair)
           for site, pair in matrices(model, method, row).items()}  # fmt: skip

    @site_by_site
    def linear(site, x, weight, bias):
        if site in own:
            A, B = own[site]
            weight = weight + method.alpha / method.rank * (B @ A)
        return F.linear(x, weight, bias)

    nats = []
    for question in questions:
        label = LABELS.labels[question.label]
        hidden = model.hidden(Rows.pack([question.prompt + label[:-1]]), linear)[-len(label) :]
        nats.append(-F.log_softmax(model.head(hidden), -1)[torch.arange(len(label)), torch.tensor(label)])
    torch.cat(nats).mean().backward()
    layout = method.layout(model)
    grad = torch.zeros(layout.row_size, dtype=dtype)
    for site, (A, B) in own.items():
        layout.view(grad, f"{site}.A")[: method.rank] = A.grad
        layout.view(grad, f"{site}.Bt")[: method.rank] = B.grad.T
    return grad


def test_what_a_gpu_does_not_do_is_refused_before_anything_is_made(model, monkeypatch):
    monkeypatch.setattr(Decoder, "device", property(lambda self: torch.device("cuda:1")))
    with pytest.raises(InputError, match="deterministic mode is not built for a GPU"):
        Engine(model, LABELS, PassConfig(deterministic=True))
    monkeypatch.setattr(minipeft_kernels.backend, "triton", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match=r"cuda:0, not on cuda:1; call torch.cuda.set_device\(1\) first"):
        Engine(model, LABELS)


def test_a_base_in_fp64_trains_as_one_in_fp32(model, jobs):
    (plain,), (exact,) = (train(base, jobs[:1]).values() for base in (model, copy.deepcopy(model).double()))
    start = jobs[0].config.method.initial_row(model, jobs[0].config.seed, jobs[0].user)
    assert exact.row.dtype == torch.float32 and relative(exact.row, plain.row) < 1e-5 < relative(exact.row, start)


@pytest.mark.parametrize("deterministic", [False, True])
def test_fused_gradients_are_each_users_own(model, jobs, deterministic):
    engine = Engine(model, LABELS, PassConfig(deterministic=deterministic))
    rows = [random_row(model, job.config.method, i, unused=1.0) for i, job in enumerate(jobs)]
    runs = admit(engine, jobs, rows)
    engine.train_step(in_order(runs))
    assert len(engine._banks) == 8  # four choices of sites, two rank classes
    exact_model = copy.deepcopy(model).double()
    for job, row, run in zip(jobs, rows, runs):
        questions = first_minibatch(job)
        fused = engine._banks[run.bank].bank.grads[run.slot]
        plain = own_gradient(model, job, row, questions)
        exact = own_gradient(exact_model, job, row, questions)
        assert exact.norm() > 0
        # Norms over the row, not the worst number: rank 1 leaves few numbers, whose worst error is a matter of luck.
        assert relative(fused, exact) <= 2 * relative(plain, exact) + 1e-7, job.user


def test_a_step_uses_the_users_own_settings(model, jobs):
    """One fused step is torch.optim.AdamW with clipping on each user's own gradient."""
    engine = Engine(model, LABELS)
    rows = [random_row(model, job.config.method, i) for i, job in enumerate(jobs)]
    runs = admit(engine, jobs, rows)
    for run in runs[::2]:
        run.step = 1  # users need not stand at the same step
    rates = [run.learning_rate for run in runs]
    engine.train_step(in_order(runs))
    for job, row, run, rate in zip(jobs, rows, runs, rates):
        bank, config = engine._banks[run.bank].bank, job.config
        w = row.clone().requires_grad_()
        w.grad = bank.grads[run.slot].clone()
        torch.nn.utils.clip_grad_norm_([w], config.max_grad_norm)
        optimizer = torch.optim.AdamW([w], rate, (config.beta1, config.beta2), config.eps, config.weight_decay)
        optimizer.state[w] = {"step": torch.tensor(run.step - 1.0), "exp_avg": torch.zeros_like(w),
                              "exp_avg_sq": torch.zeros_like(w)}  # fmt: skip
        optimizer.step()
        assert relative(bank.weights[run.slot], w.detach()) <= 1e-6, job.user


def test_a_skipped_step_counts_for_the_plan_but_not_for_adamw(model, jobs):
    """A user whose first gradient was not finite takes the second step as a newcomer to AdamW does."""
    row, results = random_row(model, jobs[0].config.method), []
    for start in (row * math.nan, row):
        engine = Engine(model, LABELS)
        (run,) = admit(engine, jobs[:1], [start])
        bank = engine._banks[run.bank].bank
        engine.train_step([run])
        bank.weights[run.slot] = row
        if start is row:  # as if that step had never been taken, but the next minibatch is the second
            bank.exp_avg[run.slot] = bank.exp_avg_sq[run.slot] = 0.0
            run.skipped_steps = 1
        engine.train_step([run])
        assert (run.step, run.skipped_steps) == (2, 1)
        results.append(bank.weights[run.slot].clone())
    assert torch.equal(*results)
    # With a first step's bias correction no number moves further than the learning rate, and most do so.
    moved = (results[0] - row).abs()[row != 0]
    run.step = 1
    assert 0.9 * run.learning_rate < float(moved.median()) <= 1.1 * run.learning_rate


def test_every_trained_tensor_moved_and_nothing_else(jobs):
    model = make_model()
    before = fingerprint(model)
    adapters = train(model, jobs, 16)
    for job in jobs:
        method, layout = job.config.method, job.config.method.layout(model)
        start, end = method.initial_row(model, job.config.seed, job.user), adapters[job.user].row
        mine = torch.zeros(layout.row_size, dtype=torch.bool)
        for name in layout.shapes:
            moved = (layout.view(start, name) != layout.view(end, name)).any(-1)  # [R]
            assert moved[: method.rank].all(), f"{job.user}: {name} did not move in rank rows {(~moved).nonzero()}"
            layout.view(mine, name)[: method.rank] = True
        assert not end[~mine].any(), f"{job.user}: numbers outside rank {method.rank} are not 0"
    assert fingerprint(model) == before
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


def test_the_best_row_by_validation_is_kept(model, jobs, alone):
    scores = label_scores(model, LABELS, alone, {job.user: job.val for job in jobs})
    for job in jobs:
        metrics = alone[job.user].metrics
        right = [q.label for q in job.val]
        nats = -scores[job.user][np.arange(len(right)), right] / np.array([1, 2, 2])[right]
        best = metrics["val_loss"][metrics["best_epoch"] - 1]
        assert nats.mean() == pytest.approx(best, rel=1e-5), job.user
        assert best <= min(metrics["val_loss"]) * (1 + 1.1e-4)
        assert len(metrics["val_loss"]) == metrics["epochs"] <= job.config.epochs
        assert metrics["stopped_early"] == (metrics["epochs"] < job.config.epochs)
        if metrics["stopped_early"]:
            assert metrics["epochs"] - metrics["best_epoch"] == job.config.patience
        assert metrics["steps"] == metrics["epochs"] * math.ceil(len(job.train) / job.config.batch_size)
    assert any(len(a.metrics["val_loss"]) > a.metrics["best_epoch"] for a in alone.values())


def test_progress_adds_up_and_every_user_finishes_once(model, jobs):
    finished, progress = [], []
    engine = Engine(model, LABELS, PassConfig(slots=5))
    adapters = engine.train(jobs, finished.append, progress.append)
    assert sum(progress) == sum(job.config.epochs * len(job.train) for job in jobs)
    assert [adapter.user for adapter in finished] == list(adapters) and len(adapters) == len(jobs)
    assert all(bank.bank.users == [None] * 5 for bank in engine._banks)  # all have left
    assert 0 < engine.totals.tokens < engine.totals.rows and engine.totals.passes > 0
    again = engine.train(jobs[:2])
    assert again.keys() == {"user 0", "user 1"}


# ---- Scoring -------------------------------------------------------------------------------------------------------


def dense_scores(model, adapter, questions):
    """Label scores by a model of this user's own, its weights W + s B A, one whole sequence per label."""
    merged, method = copy.deepcopy(model), adapter.method
    modules = {module.site: module for module in merged.modules() if hasattr(module, "site")}
    for site, (A, B) in matrices(model, method, adapter.row).items():
        with torch.no_grad():
            update = method.alpha / method.rank * (B.double() @ A.double())
            modules[site].weight += update.to(merged.embed.weight.dtype)
    pairs = [(question, label) for question in questions for label in LABELS.labels]
    scores = []
    for (_, label), logits in zip(pairs, merged.logits([question.prompt + label for question, label in pairs])):
        log_probs = F.log_softmax(logits, -1)[-len(label) - 1 : -1]
        scores.append(float(log_probs[torch.arange(len(label)), torch.tensor(label)].sum()))
    return np.array(scores).reshape(len(questions), len(LABELS.labels))


@pytest.fixture(scope="module")
def asked(model, jobs):
    """Adapters far from the start value, and many questions for some users."""
    adapters = {job.user: Adapter(job.user, job.config.method, random_row(model, job.config.method, i, unused=1.0))
                for i, job in enumerate(jobs)}  # fmt: skip
    rng = np.random.default_rng(9)
    return adapters, {job.user: make_questions(rng, 1 + 3 * i, i) for i, job in enumerate(jobs)}


def test_predict_scores_as_a_merged_model_does(model, asked):
    adapters, questions = asked
    scores = label_scores(model, LABELS, adapters, questions)
    exact_model, errors, plain_errors = copy.deepcopy(model).double(), [], []
    assert list(scores) == list(questions)
    for user in questions:
        exact = dense_scores(exact_model, adapters[user], questions[user])
        errors.append((scores[user] - exact).ravel())
        plain_errors.append((dense_scores(model, adapters[user], questions[user]) - exact).ravel())
        assert (scores[user].argmax(1) == exact.argmax(1)).all()
    rms = lambda parts: np.sqrt(np.mean(np.concatenate(parts) ** 2))  # noqa: E731
    assert rms(errors) <= 2 * rms(plain_errors) + 1e-7


@pytest.mark.parametrize("slots, token_budget", [(1, 2048), (3, 1), (5, 100), (16, 500)])
def test_scores_do_not_depend_on_how_they_are_cut_into_passes(model, asked, slots, token_budget):
    adapters, questions = asked
    for deterministic in (False, True):
        whole = label_scores(model, LABELS, adapters, questions, PassConfig(32, 100_000, deterministic))
        cut = label_scores(model, LABELS, adapters, questions, PassConfig(slots, token_budget, deterministic))
        for user in questions:
            if deterministic:
                assert np.array_equal(cut[user], whole[user]), user
            else:
                np.testing.assert_allclose(cut[user], whole[user], rtol=1e-5, atol=1e-5)


def test_scores_come_in_pieces_in_order_whose_sizes_depend_on_the_user_alone(model, asked):
    adapters, questions = asked

    def sizes(users):
        engine = Engine(model, LABELS, PassConfig(token_budget=400))
        places = [engine.admit(user, adapters[user].method, adapters[user].row) for user in users]
        pieces = {user: [] for user in users}
        for position, scores in engine.score((*place, questions[user]) for place, user in zip(places, users)):
            pieces[users[position]].append(len(scores))
        return pieces

    together = sizes(list(questions))
    assert max(map(len, together.values())) >= 3
    for user, pieces in together.items():
        assert sum(pieces) == len(questions[user])
        assert sizes([user])[user] == pieces


def test_the_head_and_the_last_mlp_run_only_on_rows_that_are_read(model, jobs, monkeypatch):
    heads, bodies = [], []
    head, mlp = Decoder.head, MLP.forward
    monkeypatch.setattr(Decoder, "head", lambda self, h, *fn: heads.append(len(h)) or head(self, h, *fn))
    monkeypatch.setattr(MLP, "forward", lambda self, x, *fn: bodies.append(len(x)) or mlp(self, x, *fn))
    engine = Engine(model, LABELS)
    runs = admit(engine, jobs, [None] * len(jobs))
    read = [sum(len(LABELS.labels[q.label]) for q in first_minibatch(job)) for job in jobs]
    num_rows = [run.minibatch(LABELS).num_rows for run in runs]
    engine.train_step(in_order(runs))
    assert heads == [sum(filled(n) for n in read)]
    assert bodies == [sum(num_rows), heads[0]] and heads[0] < bodies[0]
    list(engine.score([(run.bank, run.slot, run.job.val) for run in runs]))
    assert heads[1] == sum(filled(len(job.val) * LABELS.rows_per_question) for job in jobs) == bodies[3] < bodies[2]


# ---- Memory that does not hold a pass -------------------------------------------------------------------------------


def short_of_memory(monkeypatch, most_rows, at="read"):
    """No pass of more rows than this from now on: as PyTorch says it on a CPU, in the middle of the forward pass, or
    after it, in the step of the pass's last bank. Returns the numbers of rows that did not fit."""
    read, step, refused = Decoder.read, engine_module.adamw_, []

    def refuse(num_rows):
        refused.append(num_rows)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")

    def cramped_read(model, rows, *more):
        cramped_read.rows = len(rows.tokens)
        if at == "read" and len(rows.tokens) > most_rows:
            refuse(len(rows.tokens))
        return read(model, rows, *more)

    def cramped_step(weights, *rest, **more):
        if at == "step" and cramped_read.rows > most_rows and weights.shape[1] == cramped_step.width:
            refuse(cramped_read.rows)
        return step(weights, *rest, **more)

    method = LoRA(RANKS[3], sites=SITES[0])
    cramped_step.width = method.layout(make_model()).row_size  # of the last user's bank
    monkeypatch.setattr(Decoder, "read", cramped_read)
    monkeypatch.setattr(engine_module, "adamw_", cramped_step)
    return refused


@pytest.mark.parametrize("at", ["read", "step"])
def test_a_pass_that_memory_does_not_hold_goes_in_parts_and_changes_nobody(model, jobs, exactly_alone, monkeypatch, at):
    """In the step: some banks' users have stepped by then and must not step twice."""
    refused = short_of_memory(monkeypatch, 250, at)
    engine = Engine(model, LABELS, PassConfig(16, 2048, deterministic=True))
    adapters = engine.train(jobs[:6])
    assert 0 < len(refused) == engine.totals.splits <= 5, "it remembers what did not fit"
    for user, adapter in adapters.items():
        assert_same(adapter, exactly_alone[user])


def test_rounding_to_bf16_allocates_nothing_once_a_step_is_taken(model, jobs, monkeypatch):
    """Where there is no room for it nobody has stepped, or they would step twice."""
    engine = Engine(model, LABELS)
    run = engine.begin(replace(jobs[0], config=replace(jobs[0].config, bf16_weights=True)))
    before, allocate = engine.row(run), torch.empty_like

    def cramped(tensor, **how):
        if how.get("dtype", tensor.dtype) == torch.bfloat16:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return allocate(tensor, **how)

    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: cramped(tensor, dtype=torch.bfloat16))
    monkeypatch.setattr(torch, "empty_like", cramped)
    assert not engine._fits(lambda: engine.train_step([run]))
    assert run.step == 0 and torch.equal(engine.row(run), before)


def test_whose_share_alone_does_not_fit_leaves_and_nobody_else(model, jobs, exactly_alone, monkeypatch):
    rng = np.random.default_rng(1)
    large = replace(jobs[0], train=make_questions(rng, 8, 0, longest=60), config=replace(jobs[0].config, batch_size=8))
    asks = replace(jobs[1], val=[*jobs[1].val, Question(tuple(range(10, 50)) * 4, 0)])  # beyond training's rows
    largest = max(Run(job, 0, 0).minibatch(LABELS).num_rows for job in jobs[2:6])
    short_of_memory(monkeypatch, max(144, largest))
    faults = []
    engine = Engine(model, LABELS, PassConfig(16, 2048, deterministic=True))
    adapters = engine.train([large, asks, *jobs[2:6]], on_fault=faults.append)
    assert {fault.user for fault in faults} == {"user 0", "user 1"}
    assert all("alone does not fit into memory" in fault.reason for fault in faults)
    assert adapters.keys() == {job.user for job in jobs[2:6]}
    for user, adapter in adapters.items():
        assert_same(adapter, exactly_alone[user])
    assert all(bank.bank.users == [None] * 16 for bank in engine._banks)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, jobs, monkeypatch):
    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(Decoder, "read", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(model, jobs[:3], 3)


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_jobs_that_make_no_sense_are_refused(model, jobs):
    cases = {
        "user 'user 0' is listed twice": [jobs[0], jobs[0]],
        "user 'user 0' has no training example": [replace(jobs[0], train=[])],
        "user 'user 0' has no validation example": [replace(jobs[0], val=[])],
        "learning_rate must be above 0": [replace(jobs[0], config=TrainConfig(learning_rate=0.0))],
        "rank must be at least 1": [replace(jobs[0], config=TrainConfig(LoRA(rank=0)))],
        "a validation example without a token": [replace(jobs[0], val=[Question((), 0)])],
        "a training example with label number -1; this task's labels are 0 to 2":
            [replace(jobs[0], train=[Question((10,), -1)])],
        "a training example with label number 3": [replace(jobs[0], train=[Question((10,), 3)])],
    }
    for message, wrong in cases.items():
        engine = Engine(model, LABELS)
        with pytest.raises(InputError, match=message):
            engine.train(wrong)
        assert engine.totals.passes == 0 and not engine._banks  # before anything was done


def test_predicting_takes_users_without_questions_but_not_without_adapters(model, asked):
    adapters, questions = asked
    scores = label_scores(model, LABELS, adapters, {"user 3": [], "user 1": questions["user 1"]})
    assert scores["user 3"].shape == (0, 3) and scores["user 1"].shape == (4, 3)
    with pytest.raises(InputError, match="no adapter of user 'nobody'"):
        label_scores(model, LABELS, adapters, {"user 1": questions["user 1"], "nobody": []})


@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm", "eps"])
def test_settings_that_must_be_positive(name):
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match=f"{name} must be above 0"):
            TrainConfig(**{name: value}).check()


@pytest.mark.parametrize("name", ["epochs", "batch_size", "patience"])
def test_settings_that_must_be_at_least_one(name):
    for value in (0, -3):
        with pytest.raises(InputError, match=f"{name} must be at least 1"):
            TrainConfig(**{name: value}).check()


@pytest.mark.parametrize("name", ["warmup", "beta1", "beta2"])
def test_settings_that_are_shares(name):
    for value in (-0.1, 1.0, 2.0, math.nan):
        with pytest.raises(InputError, match=f"{name} must be at least 0 and below 1"):
            TrainConfig(**{name: value}).check()


def test_other_settings(model):
    TrainConfig().check()
    TrainConfig(max_grad_norm=math.inf, weight_decay=0.0, warmup=0.0).check()
    for value in (-0.01, math.nan):
        with pytest.raises(InputError, match="weight_decay must not be negative"):
            TrainConfig(weight_decay=value).check()
    for name in ("slots", "token_budget"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            Engine(model, LABELS, PassConfig(**{name: 0}))


@pytest.mark.parametrize("method, message", [
    (LoRA(rank=0), "rank must be at least 1, got 0"),
    (LoRA(rank=17), "LoRA rank 17 is above the width of layers.0.attn.k"),
    (LoRA(sites=("q", "gat")), "no site of this base is called 'gat'; it has down, embed, gate, head, k, o, q, up, v"),
    (LoRA(sites=("layers.2.attn.q",)), "no site of this base is called 'layers.2.attn.q'"),
    (LoRA(sites=()), "LoRA: no sites"),
])  # fmt: skip
def test_methods_that_do_not_fit_the_base(model, method, message):
    with pytest.raises(InputError, match=message):
        method.check(model)
