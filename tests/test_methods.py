"""Does every method do in a fused pass what its paper says, for every user, on every kind of base?"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_methods import plain_log_probs
from test_recompute import fill

from minipeft.engine import Engine, predict
from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods import (
    IA3,
    BitFit,
    DoRA,
    Head,
    Houlsby,
    LayerNormTuning,
    LoRA,
    Parallel,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Stack,
    VeRA,
)
from minipeft.methods.method import method_from
from minipeft.models import gpt2
from minipeft.models.bert import Bert, BertConfig
from minipeft.models.classifier import Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import fingerprint
from minipeft.models.t5 import T5, T5Config
from minipeft.schedule import Adapter, Job, PassConfig, Run, TrainConfig
from minipeft.store import load_adapter, save_adapter

METHODS = {
    "lora": LoRA(3, sites=("q", "v", "down")),
    "rslora": LoRA(4, sites=("k", "o", "up"), scaling="rslora", ranks=(("up", 9), ("layers.1.attn.k", 2)),
                   alphas=(("o", 3.0),)),
    "embedding": LoRA(2, sites=("embed", "q")),
    "dora": DoRA(3, sites=("q", "v", "down")),
    "vera": VeRA(16, sites=("q", "down")),
    "ia3": IA3(),
    "layernorm": LayerNormTuning(),
    "bitfit": BitFit(),
    "houlsby": Houlsby(reduction=4),
    "pfeiffer": Pfeiffer(reduction=8, activation="silu"),
    "parallel": Parallel(reduction=4, activation="gelu"),
    "prompt": PromptTuning(5),
    "prefix": PrefixTuning(3),
    "prefix of an MLP": PrefixTuning(4, hidden=7),
    "ptuning": PTuning(4, hidden=6),
    "ptuning by MLP": PTuning(3, encoder="mlp", hidden=9),
    "head": Head(),
}
LABELS = [[5], [6, 7], [6, 8]]


def make_bases():
    return {
        "decoder": fill(Decoder(DecoderConfig(60, 32, 2, 4, 2, 8, 48, qkv_bias=True))),
        "gpt2": fill(gpt2.GPT2(gpt2.GPT2Config(60, 32, 2, 4, 48, scales=(0.35,) * 2))),
        "t5": fill(T5(T5Config(60, 32, 2, 2, 4, 8, 48, start_token=0, gated=True))),
        "bert": Classifier(fill(Bert(BertConfig(60, 32, 2, 4, 48))), 3),
    }


BASES = make_bases()
EXACT = {name: copy.deepcopy(base).double() for name, base in BASES.items()}


def labels_of(base):
    if isinstance(base, Classifier):
        return Classes(3)
    return LabelSet(LABELS, start=0 if isinstance(base, T5) else None)


def applies(method, base):
    try:
        method.check(base)
    except InputError:
        return False
    return True


CASES = [(name, kind) for name in BASES for kind, method in METHODS.items() if applies(method, BASES[name])]


def of_base(method, base):
    """The method as that base's users have it: with a head on an encoder."""
    return Stack((method, Head())) if isinstance(base, Classifier) and method.name != "head" else method


def questions(rng, number):
    return [Question(tuple(rng.integers(9, 60, rng.integers(1, 12)).tolist()), int(rng.integers(3)))
            for _ in range(number)]  # fmt: skip


def drawn(method, base, seed=0):
    """Tensors far from the start value, where nothing is zero."""
    draw, start = torch.Generator().manual_seed(seed), method.tensors(method.initial_row(base, 0, "ann"), base)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw) for name, tensor in start.items()}


def test_what_does_not_apply_says_so():
    refused = {(name, kind) for name in BASES for kind in METHODS} - set(CASES)
    assert refused == {("t5", "embedding"), ("t5", "bitfit"), ("decoder", "head"), ("gpt2", "head")}
    for name, kind in refused:
        with pytest.raises(InputError, match="no site of this base is called 'embed'|no biases|no place for a head"):
            METHODS[kind].check(BASES[name])


@pytest.mark.parametrize("name, kind", CASES)
def test_gradients_are_those_of_the_plain_method(name, kind):
    """Of one step, between two other users, against autograd through a single user's equations in fp64."""
    base, rng = BASES[name], np.random.default_rng(0)
    method, labels = of_base(METHODS[kind], base), labels_of(base)
    tensors, mine = drawn(method, base), questions(rng, 5)
    engine, runs = Engine(base, labels), []
    for user in ("bob", "ann", "cem"):
        row = method.row(tensors if user == "ann" else drawn(method, base, len(user)), base)
        job = Job(user, mine if user == "ann" else questions(rng, 4), mine, TrainConfig(method, batch_size=5))
        bank, slot = engine.admit(user, method, row)
        runs.append(Run(job, bank, slot, engine.virtual(bank)))
    engine.train_step(runs)
    found = method.tensors(engine._banks[0].bank.grads[1], base)

    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    reads = [labels.training_read(question) for question in mine]
    losses = []
    for read in reads:
        log_probs = plain_log_probs(EXACT[name], method, exact, read)
        losses += [-log_probs[row, target] for row, target in enumerate(read.targets)]
    torch.stack(losses).mean().backward()
    largest = max(tensor.grad.norm() for tensor in exact.values())
    for name_, tensor in exact.items():  # a bias of keys has none: softmax does not see it
        error = (found[name_].double() - tensor.grad).norm() / max(tensor.grad.norm(), 1e-3 * largest)
        assert error < 2e-4, f"{name_}: gradients differ by {error:.1e} of their norm"


@pytest.mark.parametrize("name, kind", [case for case in CASES if not case[1].startswith(("prompt", "prefix", "ptun"))])
def test_the_start_changes_nothing(name, kind):
    base, rng = BASES[name], np.random.default_rng(1)
    method = of_base(METHODS[kind], base)
    asked = questions(rng, 6)
    own = {"ann": Adapter("ann", method, method.initial_row(base, 0, "ann"))}
    plain = np.full((6, 3), -np.log(3)) if isinstance(base, Classifier) else base_scores(base, asked)
    scores = predict(base, labels_of(base), own, {"ann": asked})["ann"]
    np.testing.assert_allclose(scores, plain, atol=2e-5)


def base_scores(base, asked):
    """Label scores of the base alone, by its three plain functions."""
    rows = []
    for question in asked:
        rows.append([])
        for label in LABELS:
            if isinstance(base, T5):
                (logits,) = base.logits([question.prompt], [label])
            else:
                (logits,) = base.logits([question.prompt + tuple(label)])
                logits = logits[len(question.prompt) - 1 : -1]
            rows[-1].append(float(logits.log_softmax(-1)[range(len(label)), label].sum()))
    return np.array(rows)


@pytest.mark.parametrize("name, kind", CASES)
def test_every_tensor_moves_and_the_base_does_not(name, kind, tmp_path):
    base, rng = BASES[name], np.random.default_rng(2)
    method = of_base(METHODS[kind], base)
    before, mine = fingerprint(base), questions(rng, 6)
    config = TrainConfig(method, learning_rate=1e-2, epochs=2, batch_size=3, patience=2)
    adapter = Engine(base, labels_of(base)).train([Job("ann", mine, mine, config)])["ann"]
    assert fingerprint(base) == before
    start, end = (method.tensors(row, base) for row in (method.initial_row(base, 0, "ann"), adapter.row))
    assert method.count(base) == sum(tensor.numel() for tensor in end.values())
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    save_adapter(tmp_path, adapter, base)
    again = load_adapter(tmp_path, "ann", base)
    assert torch.equal(again.row, adapter.row) and again.method == method == method_from(method.described())
    assert torch.equal(method.row(end, base), adapter.row)


def many_jobs(base, num_users=40):
    """Users under every method that applies, of every kind, with plans of their own."""
    kinds = [of_base(method, base) for method in METHODS.values() if applies(method, base)]
    if not isinstance(base, T5):
        kinds.append(of_base(LoRA(12, sites=("q", "v", "down"), dropout=0.25), base))
    jobs = []
    for u in range(num_users):
        rng = np.random.default_rng(u)
        config = TrainConfig(kinds[u % len(kinds)], learning_rate=(1e-2, 3e-3)[u % 2], epochs=1 + u % 2,
                             batch_size=2 + u % 3, seed=u % 2)  # fmt: skip
        jobs.append(Job(f"user {u}", questions(rng, 3 + u % 5), questions(rng, 2), config))
    return jobs


@pytest.mark.parametrize("name", BASES)
def test_forty_users_under_all_methods_get_what_they_get_alone(name):
    base, jobs = BASES[name], many_jobs(BASES[name])
    together = Engine(base, labels_of(base), PassConfig(slots=40)).train(jobs)
    for job in jobs:
        alone = Engine(base, labels_of(base), PassConfig(slots=1)).train([job])[job.user]
        error = (together[job.user].row - alone.row).norm() / alone.row.norm()
        assert error < 1e-5, f"{job.user} by {job.config.method}: {error:.1e}"
    asked = {job.user: job.val for job in jobs}
    scores = predict(base, labels_of(base), together, asked, PassConfig(slots=40))
    for job in jobs[::7]:
        mine = predict(base, labels_of(base), {job.user: together[job.user]}, {job.user: job.val})
        np.testing.assert_allclose(scores[job.user], mine[job.user], atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_rewriting_one_user_changes_no_bit_of_another(name):
    base, jobs = BASES[name], many_jobs(BASES[name], 20)
    rng = np.random.default_rng(9)
    changed = [replace(job, train=[Question(tuple(rng.permutation(q.prompt).tolist()), q.label)
                                   for q in job.train]) if u == 4 else job for u, job in enumerate(jobs)]  # fmt: skip
    one, other = (Engine(base, labels_of(base), PassConfig(slots=20)).train(some) for some in (jobs, changed))
    assert not torch.equal(one["user 4"].row, other["user 4"].row)
    assert [job.user for job in jobs if not torch.equal(one[job.user].row, other[job.user].row)] == ["user 4"]


@pytest.mark.parametrize("name", BASES)
def test_deterministic_adapters_are_the_same_bits_in_any_company(name):
    base, jobs = BASES[name], many_jobs(BASES[name], 20)
    together = Engine(base, labels_of(base), PassConfig(20, deterministic=True)).train(jobs)
    for job in jobs:
        alone = Engine(base, labels_of(base), PassConfig(1, deterministic=True)).train([job])[job.user]
        assert torch.equal(together[job.user].row, alone.row), f"{job.user} by {job.config.method}"
