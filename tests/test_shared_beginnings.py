"""What a user's prompts begin with is read once a minibatch: does that change nothing but the number of rows?"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_methods import plain_log_probs
from test_engine import COMPANIES, arranged, assert_same
from test_methods import BASES, CASES, EXACT, METHODS, drawn, labels_of, questions
from test_recompute import BASES as FAMILIES

from minipeft.batch import Read, after_shared, shared_tokens
from minipeft.engine import LEAST_SHARED, Engine
from minipeft.labels import LabelSet, Question
from minipeft.methods import LoRA
from minipeft.models.t5 import T5
from minipeft.schedule import Job, PassConfig, TrainConfig

BEGINNING = tuple(range(20, 31))
DECODERS = [case for case in CASES if case[0] in ("decoder", "gpt2")]


def beginning(asked, tokens=BEGINNING):
    return [replace(question, prompt=tokens + question.prompt) for question in asked]


def job_of(i, method=None):
    """User i, with a beginning of their own length and a last minibatch that may hold one example."""
    rng = np.random.default_rng(i)
    config = TrainConfig(method or LoRA(3), learning_rate=1e-2, epochs=2 + i % 2, batch_size=2 + i % 3, seed=i)
    mine = [beginning(questions(rng, n), BEGINNING[: LEAST_SHARED - 1 + i]) for n in (5 + i % 3, 3)]
    return Job(f"user {i}", *mine, config)


def test_what_prompts_begin_with():
    assert shared_tokens([(1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 9)]) == 2
    assert shared_tokens([(1, 2, 3)] * 2) == 2  # the last one stays with each
    assert shared_tokens([(1, 2), (1, 2, 3), (1, 2, 4)]) == 1
    assert shared_tokens([(1,), (1, 2)]) == shared_tokens([(5, 1), (4, 1)]) == 0
    reads = [Read((1, 2, 3), 1, (7,)), Read((1, 2, 4, 5), 2, (8, 9))]
    assert after_shared(reads, 2) == [Read((1, 2), 0), Read((3,), 1, (7,), 1), Read((4, 5), 2, (8, 9), 2)]
    assert after_shared(reads, 0) == reads and after_shared(reads[:1], 2) == reads[:1]


@pytest.mark.parametrize("name, kind", DECODERS)
def test_gradients_are_those_of_the_plain_method(name, kind):
    """Every method's, against autograd through the whole sequences of a single user in fp64."""
    base, method, labels = BASES[name], METHODS[kind], LabelSet([[5], [6, 7], [6, 8]])
    rng, tensors = np.random.default_rng(0), drawn(METHODS[kind], BASES[name])
    mine = beginning(questions(rng, 5))
    engine, runs = Engine(base, labels), []
    for user in ("bob", "ann", "cem"):
        own = tensors if user == "ann" else drawn(method, base, len(user))
        asked = mine if user == "ann" else beginning(questions(rng, 4), BEGINNING[:9] if user == "bob" else ())
        start = method.row(own, base)
        runs.append(engine.begin(Job(user, asked, asked, TrainConfig(method, batch_size=5), start=start)))
    engine.train_step(runs)
    found = method.tensors(engine._banks[0].bank.grads[1], base)

    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    losses = []
    for read in map(labels.training_read, mine):
        log_probs = plain_log_probs(EXACT[name], method, exact, read)
        losses += [-log_probs[row, target] for row, target in enumerate(read.targets)]
    torch.stack(losses).mean().backward()
    largest = max(tensor.grad.norm() for tensor in exact.values())
    for name_, tensor in exact.items():
        error = (found[name_].double() - tensor.grad).norm() / max(tensor.grad.norm(), 1e-3 * largest)
        assert error < 2e-4, f"{name_}: gradients differ by {error:.1e} of their norm"


@pytest.mark.parametrize("family", ["decoder", "gpt2", "gpt_neox", "t5"])
def test_every_decoder_trains_the_same_with_fewer_rows(family):
    base, rng = FAMILIES[family], np.random.default_rng(0)
    asked = beginning(questions(rng, 8))
    job = Job("ann", asked, asked[:2], TrainConfig(METHODS["lora"], learning_rate=1e-3, epochs=1, batch_size=4))
    rows, adapters = [], []
    for share in (True, False):
        engine = Engine(base, labels_of(base), PassConfig(share=share))
        adapters.append(engine.train([job])["ann"])
        rows.append(engine.totals.tokens)
    difference = (adapters[0].row - adapters[1].row).norm() / adapters[1].row.norm()
    assert difference < 1e-5
    # A decoder reads the beginning once in each of two minibatches of four; of a T5's inputs each sees its own end.
    assert rows[1] - rows[0] == (0 if isinstance(base, T5) else 2 * 3 * len(BEGINNING))


@pytest.mark.parametrize("order, slots, token_budget", COMPANIES.values(), ids=COMPANIES.keys())
def test_nobody_else_is_noticed(order, slots, token_budget):
    """Deterministic mode, to the bit: among others whose prompts have beginnings of other lengths, or none."""
    jobs = [job_of(i) for i in range(8)]
    alone = {job.user: Engine(BASES["decoder"], labels_of(BASES["decoder"]), PassConfig(1, 2048, True)).train([job])
             for job in jobs}  # fmt: skip
    engine = Engine(BASES["decoder"], labels_of(BASES["decoder"]), PassConfig(slots, token_budget, True))
    for user, adapter in engine.train(arranged(jobs, order)).items():
        assert_same(adapter, alone[user][user])


def test_who_shares():
    """Not a user with dropout, which drops other numbers of each example, nor one whose prompts hardly begin alike."""
    base = BASES["decoder"]
    shared = [Engine(base, labels_of(base)).begin(job).shared for job in map(job_of, range(3))]
    assert shared == [0, LEAST_SHARED, LEAST_SHARED + 1]
    assert Engine(base, labels_of(base)).begin(job_of(2, LoRA(3, dropout=0.25))).shared == 0
    assert Engine(base, labels_of(base), PassConfig(share=False)).begin(job_of(2)).shared == 0
    assert Engine(BASES["bert"], labels_of(BASES["bert"])).begin(job_of(2, METHODS["head"])).shared == 0


def test_an_epoch_is_still_every_example_once():
    """One example in the last minibatch: read as it is."""
    base = BASES["decoder"]
    asked = beginning([Question((i,), 0) for i in range(40, 45)])
    run = Engine(base, labels_of(base)).begin(Job("ann", asked, asked, TrainConfig(LoRA(3), batch_size=2)))
    seen = []
    for size in (3, 3, 1):
        reads = run.minibatch(labels_of(base)).reads
        assert len(reads) == size
        seen += [read.tokens[-1] for read in reads if read.targets]
        run.advance()
    assert sorted(seen) == list(range(40, 45)) and run.next_example == 0
