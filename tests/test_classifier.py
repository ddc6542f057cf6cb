"""Does every user of an encoder get their own LoRA and their own head, as if they had trained alone?"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linears import hooks_of
from stores import through_a_store

from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Classes, Question, Tags
from minipeft.methods.head import Head
from minipeft.methods.lora import LoRA
from minipeft.methods.stack import Stack
from minipeft.models.bert import Bert, BertConfig
from minipeft.models.classifier import Classifier
from minipeft.models.loading import fingerprint
from minipeft.models.rows import Rows
from minipeft.schedule import Job, PassConfig, Run, TrainConfig
from minipeft.store import Store

C = 3
CONFIG = TrainConfig(method=Stack((LoRA(rank=4, sites=("q", "v", "down")), Head())), learning_rate=1e-2, epochs=2,
                     batch_size=4)  # fmt: skip


def make_model(pooling="mean"):
    encoder = Bert(BertConfig(vocab_size=50, width=24, num_layers=2, num_heads=4, mlp_width=40, max_positions=64,
                              pooler=pooling == "pooler"))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    return Classifier(encoder, C, pooling)


def make_jobs(num_users=5, seed=0):
    rng = np.random.default_rng(seed)

    def questions(n):
        return [Question(tuple(rng.integers(0, 50, length).tolist()), int(rng.integers(C)))
                for length in rng.integers(1, 30, n)]  # fmt: skip

    return [Job(f"user {u}", questions(int(rng.integers(5, 20))), questions(4), replace(CONFIG, seed=u))
            for u in range(num_users)]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    model, jobs = make_model(), make_jobs()
    before = fingerprint(model)
    adapters = Engine(model, Classes(C)).train(jobs)
    assert fingerprint(model) == before
    return model, jobs, adapters


def test_together_is_alone(trained):
    model, jobs, adapters = trained
    for job in jobs:
        alone = Engine(model, Classes(C), PassConfig(slots=1)).train([job])[job.user].row
        assert (adapters[job.user].row - alone).norm() <= 1e-5 * alone.norm()
    exact = PassConfig(deterministic=True)
    together, alone = (Engine(model, Classes(C), exact).train(some) for some in (jobs, jobs[2:3]))
    assert torch.equal(together[jobs[2].user].row, alone[jobs[2].user].row)


def test_every_tensor_is_trained(trained):
    model, jobs, adapters = trained
    for job in jobs:
        method = job.config.method
        start = method.tensors(method.initial_row(model, job.config.seed, job.user), model)
        for name, tensor in method.tensors(adapters[job.user].row, model).items():
            assert not torch.equal(tensor, start[name]), name
            assert name.startswith("layers") or not start[name].any()
        assert method.count(model) == sum(tensor.numel() for tensor in start.values())


def test_a_step_is_the_step_of_an_ordinary_classifier():
    """The gradient of one user's first step against autograd through a plain head and plain low-rank updates."""
    model, (job,) = make_model(), make_jobs(1)
    job = replace(job, train=job.train[:4], config=replace(job.config, max_grad_norm=1e9))
    engine = Engine(model, Classes(C))
    bank, slot = engine.admit(job.user, job.config.method, seed=job.config.seed)
    row = engine._banks[bank].bank.weights[slot]
    lora, layout = job.config.method.parts[0], job.config.method.layout(model)
    draw = torch.Generator().manual_seed(1)
    for name in layout.shapes:  # B and the head away from zero, so that everything has a gradient
        used = C if name == "head.W" else lora.rank
        part = layout.view(row, name)[:used]
        part.copy_(0.3 * torch.randn(part.shape, generator=draw))
    tensors = {name: t.clone().requires_grad_() for name, t in job.config.method.tensors(row, model).items()}

    @hooks_of
    def linear(sites, x, weights, biases):
        ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
        scale = lora.alpha / lora.rank
        return tuple(y + scale * x @ tensors[f"{site}.A"].T @ tensors[f"{site}.B"].T if f"{site}.A" in tensors else y
                     for site, y in zip(sites, ys))  # fmt: skip

    losses = []
    for question in job.train:
        rows = Rows.pack([question.prompt], causal=False)
        vector = model.encoder.hidden(rows, linear).mean(0)
        logits = tensors["head.weight"] @ vector + tensors["head.bias"]
        losses.append(F.cross_entropy(logits, torch.tensor(question.label)))
    torch.stack(losses).mean().backward()

    engine.train_step([Run(job, bank, slot)])
    grads = job.config.method.tensors(engine._banks[bank].bank.grads[slot], model)
    for name, tensor in tensors.items():
        torch.testing.assert_close(grads[name], tensor.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_rewriting_one_users_texts_changes_nobody_else(trained):
    model, jobs, adapters = trained
    rng = np.random.default_rng(1)
    rewritten = [Question(tuple(rng.permutation(q.prompt).tolist()), (q.label + 1) % C) for q in jobs[0].train]
    others = Engine(model, Classes(C)).train([replace(jobs[0], train=rewritten), *jobs[1:]])
    assert not torch.equal(others[jobs[0].user].row, adapters[jobs[0].user].row)
    for job in jobs[1:]:
        assert torch.equal(others[job.user].row, adapters[job.user].row)


def test_predictions_and_files(trained, tmp_path):
    model, jobs, adapters = trained
    scores = label_scores(model, Classes(C), adapters, {job.user: job.val for job in jobs})
    for job, loaded in zip(jobs, through_a_store(tmp_path, [adapters[job.user] for job in jobs], model)):
        assert torch.equal(loaded.row, adapters[job.user].row) and loaded.method == job.config.method
        again = label_scores(model, Classes(C), {job.user: loaded}, {job.user: job.val})
        np.testing.assert_allclose(again[job.user], scores[job.user], atol=1e-5)
        np.testing.assert_allclose(np.exp(scores[job.user]).sum(1), 1, atol=1e-5)
    two = Classifier(model.encoder, 2)
    two.origin = model.origin
    with pytest.raises(InputError, match=r"user 'user 0': its row has \d+ numbers, this base needs \d+, or others"):
        Store(tmp_path).get("user 0", two)


def test_users_with_and_without_early_stop_and_other_ranks_share_passes(trained):
    model, jobs, _ = trained
    ranked = [Stack((LoRA(rank=rank, sites=("q", "v", "down")), Head())) for rank in (1, 10)]
    mixed = [replace(job, config=replace(job.config, method=ranked[u % 2]))
             for u, job in enumerate(jobs)]  # fmt: skip
    together = Engine(model, Classes(C)).train(mixed)
    for job in mixed:
        alone = Engine(model, Classes(C), PassConfig(slots=1)).train([job])[job.user].row
        assert (together[job.user].row - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize("methods, message", [
    ((LoRA(sites=("q", "head")), Head()), "no site of this base is called 'head'"),
    ((Head(), Head()), "two methods of one user act at head.W"),
])
def test_a_head_that_does_not_fit_is_refused(methods, message):
    (job,) = make_jobs(1)
    job = replace(job, config=replace(job.config, method=Stack(methods)))
    with pytest.raises(InputError, match=message):
        Engine(make_model(), Classes(C)).train([job])


def tag_jobs():
    """Any of C classes may apply: an answer's number has a bit for each."""
    rng = np.random.default_rng(3)
    again = lambda questions: [replace(q, label=int(rng.integers(1 << C))) for q in questions]  # noqa: E731
    return [replace(job, train=again(job.train), val=again(job.val)) for job in make_jobs(4)]


def test_tags_train_by_binary_cross_entropy():
    """The head's first gradient against autograd through PyTorch's own loss; B is zero, so nothing else moves it."""
    model, job = make_model(), tag_jobs()[0]
    job = replace(job, train=job.train[:4], config=replace(job.config, max_grad_norm=1e9))
    engine = Engine(model, Tags(C))
    run = Run(job, *engine.admit(job.user, job.config.method, seed=job.config.seed))
    part = run.minibatch(engine.labels)
    engine.train_step([run])
    gradient = job.config.method.layout(model).view(engine.gradients([run])[0], "head.W")[:C]

    questions = [next(q for q in job.train if q.prompt == read.tokens) for read in part.reads]
    features = torch.stack([model.encoder.encode([q.prompt])[0].mean(0) for q in questions])
    W, b = torch.zeros(C, features.shape[1], requires_grad=True), torch.zeros(C, requires_grad=True)
    applies = torch.tensor([[float(q.label >> c & 1) for c in range(C)] for q in questions])
    F.binary_cross_entropy_with_logits(features @ W.T + b, applies).backward()
    torch.testing.assert_close(gradient[:, :-1], W.grad)
    torch.testing.assert_close(gradient[:, -1], b.grad)


def test_tags_together_are_alone():
    model, jobs = make_model(), tag_jobs()
    adapters = Engine(model, Tags(C)).train(jobs)
    for job in jobs:
        alone = Engine(model, Tags(C), PassConfig(slots=1)).train([job])[job.user]
        assert (adapters[job.user].row - alone.row).norm() <= 1e-5 * alone.row.norm()
        assert adapters[job.user].metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"], rel=1e-4)
    exact = PassConfig(deterministic=True)
    together, alone = (Engine(model, Tags(C), exact).train(some) for some in (jobs, jobs[2:3]))
    assert torch.equal(together[jobs[2].user].row, alone[jobs[2].user].row)


def test_tags_are_learned_and_answered():
    """Token 7 means classes 0 and 2, token 8 class 1: scores are log-odds, and the loss is that of the scores."""
    model = make_model()
    known = [Question((7, 7, 7), Tags.number([0, 2])), Question((8, 8), Tags.number([1]))] * 8
    job = Job("u", known, known, replace(CONFIG, epochs=12, learning_rate=3e-2))
    adapter = Engine(model, Tags(C)).train([job])["u"]
    scores = label_scores(model, Tags(C), {"u": adapter}, {"u": known[:2]})["u"]
    assert ((scores > 0) == [[True, False, True], [False, True, False]]).all()
    applies = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(scores), applies)
    assert min(adapter.metrics["val_loss"]) == pytest.approx(float(loss), rel=1e-3)


def test_a_pooler_reads_each_texts_first_row():
    model, sequences = make_model("pooler"), [[1, 2, 3], [4], [5] * 9]
    rows = Rows.pack(sequences, causal=False)
    pooler = model.encoder.pooler
    for sequence, own in zip(sequences, rows.split(model.hidden(rows))):
        (states,) = model.encoder.encode([sequence])
        expected = torch.tanh(states[0] @ pooler.weight.T + pooler.bias)
        assert torch.allclose(own, F.pad(expected, (0, 1), value=1.0).expand(len(sequence), -1), atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_users_of_a_pooler_train_as_alone(deterministic):
    model, jobs = make_model("pooler"), make_jobs(3)
    passes = PassConfig(deterministic=deterministic)
    together = Engine(model, Classes(C), passes).train(jobs)
    for job in jobs:
        alone = Engine(model, Classes(C), passes).train([job])[job.user].row
        error = (together[job.user].row - alone).norm() / alone.norm()
        assert error == 0 if deterministic else error < 1e-5


@pytest.mark.parametrize("pooling, message", [
    ("pooler", "this base has no pooler, its checkpoint holds no pooler.dense; take pooling 'mean'"),
    ("max", "pooling is 'max'; needed one of 'mean', 'pooler'"),
])  # fmt: skip
def test_a_pooling_that_is_not_there_is_refused(pooling, message):
    with pytest.raises(InputError, match=message):
        Classifier(make_model().encoder, C, pooling)
