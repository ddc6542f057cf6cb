"""Do passes that start from kept states give what passes through all layers give, and is only the top trained?"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_bases import make_bert
from test_classifier import CONFIG, C, make_jobs, make_model

from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Classes
from minipeft.methods.bottleneck import Houlsby
from minipeft.methods.head import Head
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.stack import Stack
from minipeft.models import trunk
from minipeft.models.trunk import Trunk, above_frozen, keep_top
from minipeft.peftu.features import features
from minipeft.running import evaluate, for_base, open_base
from minipeft.schedule import PassConfig
from minipeft.store import Store
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.training import Training

METHODS = {"lora": CONFIG.method, "houlsby": Stack((Houlsby(reduction=3), Head())), "head": Head(),
           "k alone": Stack((LoRA(2, sites=("k", "down")), Head())),
           "inputs": Stack((IA3(("q", "v", "down"), inputs=("q",)), Head()))}  # fmt: skip


def made(jobs):
    whole = make_model()
    keep_top(whole, 1)
    return whole, Trunk(whole, (q.prompt for job in jobs for q in (*job.train, *job.val)))


def test_the_top_layers_are_what_is_left():
    model = make_model()
    before = list(model.sites)
    keep_top(model, 1)
    assert list(model.sites) == [site for site in before if site.startswith("layers.1.")]
    assert set(model.blocks) == {"layers.1.attn", "layers.1.mlp"} and set(model.attentions) == {"layers.1.attn"}
    assert set(model.norms) == {"layers.1.attn_norm", "layers.1.mlp_norm"} and not model.embeddings
    keep_top(model, 1)  # a base that several tasks share
    assert list(model.sites) == [site for site in before if site.startswith("layers.1.")]
    with pytest.raises(InputError, match="has 2 layers"):
        keep_top(make_model(), 3)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_kept_states_train_and_answer_as_all_layers_do(method, recompute, monkeypatch):
    monkeypatch.setattr(trunk, "TOKEN_BUDGET", 64)  # several passes
    jobs = [replace(job, config=replace(job.config, method=method)) for job in make_jobs(3)]
    whole, top = made(jobs)
    assert top.first == 1 and len(top.starts) == len({q.prompt for job in jobs for q in (*job.train, *job.val)})
    passes = PassConfig(recompute=recompute)
    slow, quick = (Engine(model, Classes(C), passes).train(jobs) for model in (whole, top))
    for user in slow:
        assert (slow[user].row - quick[user].row).norm() <= 1e-5 * slow[user].row.norm()
    asked = {job.user: job.val for job in jobs}
    texts = [job.val[0].prompt for job in jobs]
    feature = features(whole, texts)
    for text, again in features(top, texts).items():
        torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(feature[text]))
    for user, scores in label_scores(top, Classes(C), quick, asked).items():
        torch.testing.assert_close(torch.from_numpy(scores),
                                   torch.from_numpy(label_scores(whole, Classes(C), slow, asked)[user]))


def test_the_lower_layers_do_not_run_nor_what_the_next_ones_q_k_and_v_multiply(monkeypatch):
    jobs = make_jobs(2)
    _, top = made(jobs)
    Engine(top, Classes(C)).train(jobs)  # which keeps what fills users up to whole tiles, too
    monkeypatch.setattr(top.encoder.layers[0], "forward", lambda *args: pytest.fail("a frozen layer ran"))
    qkv = {id(linear.weight) for linear in top.encoder.layers[1].attn.qkv}
    linear = F.linear

    def no_product(x, weight, bias=None):
        assert id(weight) not in qkv
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", no_product)
    Engine(top, Classes(C)).train(jobs)


def test_products_are_kept_where_there_is_room_for_those_of_all_texts():
    jobs = make_jobs(2)
    whole, top = made(jobs)
    rows = sum(len(text) for text in top.starts)
    assert [len(kept[0]) for kept in top.states] == [whole.config.width] * 4
    texts, numbers = list(top.starts), 4 * whole.config.width * rows
    assert len(Trunk(whole, texts, most_bytes=4 * numbers).states) == 4
    small = Trunk(whole, texts, most_bytes=4 * numbers - 1)
    assert len(small.states) == 1 and small.starts.keys() == top.starts.keys()
    assert len(Trunk(whole).states) == 1  # whose texts nobody knows yet


def test_states_come_from_those_that_a_base_keeps_already(monkeypatch):
    jobs = make_jobs(2)
    whole, top = made(jobs)
    texts = list(top.starts)
    straight = Trunk(whole, texts, first=2)
    monkeypatch.setattr(top.encoder.layers[0], "forward", lambda *args: pytest.fail("a layer ran again"))
    above = Trunk(top, texts, first=2)
    assert above.starts == straight.starts
    torch.testing.assert_close(above.states[0], straight.states[0])


def test_states_come_from_a_base_that_has_to_compute_them_first():
    jobs = make_jobs(2)
    whole, top = made(jobs)
    new = [tuple(range(3, 20)), (4, 5)]
    assert not top.starts.keys() & set(new)
    above, straight = Trunk(top, new, first=2), Trunk(whole, new, first=2)
    assert set(new) <= top.starts.keys()
    torch.testing.assert_close(above.states[0], straight.states[0])


def test_texts_are_kept_when_they_are_first_asked_about():
    jobs = make_jobs(3)
    whole, at_once = made(jobs)
    later = Trunk(whole)
    assert later.num_rows == 0 and not later.starts
    rows = [Engine(base, Classes(C)).train(jobs)["user 1"].row for base in (at_once, later)]
    assert (rows[0] - rows[1]).norm() <= 1e-5 * rows[0].norm()
    assert {q.prompt for job in jobs for q in (*job.train, *job.val)} <= later.starts.keys()
    assert sum(map(len, later.starts)) == later.num_rows <= len(later.states[0])


def test_states_for_which_there_is_no_room_are_computed_for_every_pass():
    """And those that were first are kept."""
    jobs = make_jobs(4)
    whole, kept = made(jobs)
    given = [question.prompt for question in jobs[0].train]
    small = Trunk(whole, given, most_bytes=100 * whole.config.width * 4)
    first = dict(small.starts)
    assert first and set(first) == set(given[: len(first)])
    slots = PassConfig(slots=2, token_budget=64)
    rows = [Engine(base, Classes(C), slots).train(jobs)["user 3"].row for base in (kept, small)]
    assert (rows[0] - rows[1]).norm() <= 1e-5 * rows[0].norm()
    assert first.items() <= small.starts.items() and small.num_rows == sum(map(len, small.starts))
    assert len(small.states[0]) < kept.num_rows / 2
    texts = {question.prompt for job in jobs for question in (*job.train, *job.val)}
    assert 100 - max(map(len, texts)) < sum(len(text) for text in small.starts if small.starts[text] < 100) <= 100


def test_memory_that_does_not_hold_states_splits_the_pass_and_no_more(monkeypatch):
    jobs = make_jobs(3)
    whole, kept = made(jobs)
    small, compute, refused = Trunk(whole, most_bytes=0), Trunk._compute, []

    def cramped(trunk, texts):
        if not refused:
            refused.append(texts)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        compute(trunk, texts)

    expected = Engine(kept, Classes(C)).train(jobs)["user 2"].row
    monkeypatch.setattr(Trunk, "_compute", cramped)
    engine = Engine(small, Classes(C), PassConfig(slots=3))
    row = engine.train(jobs)["user 2"].row
    assert refused and engine.totals.splits == 1
    assert (row - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method, first", [
    (LoRA(2, sites=("layers.1.attn.q",)), 1), (LoRA(2, sites=("layers.1.attn.q", "layers.0.mlp.down")), 0),
    (Head(), 2), (LoRA(2, sites=("q",)), 0), (PromptTuning(2), 0), (LoRA(2, sites=("layers.1.attn.v", "embed")), 0),
], ids=["top", "both", "head", "all", "prompt", "embedding"])  # fmt: skip
def test_a_method_that_leaves_the_lowest_layers_alone_starts_above_them(method, first):
    """On an encoder, without being told."""
    whole = make_model()
    method = for_base(method, whole)
    base = above_frozen(whole, method)
    assert getattr(base, "first", 0) == first
    assert method.shapes(base) == method.shapes(whole)
    jobs = [replace(job, config=replace(job.config, method=method)) for job in make_jobs(2)]
    slow, quick = (Engine(each, Classes(C)).train(jobs) for each in (whole, base))
    for user in slow:
        assert (slow[user].row - quick[user].row).norm() <= 1e-5 * slow[user].row.norm()
    if first:
        with pytest.raises(InputError, match="no site of this base"):
            for_base(LoRA(2, sites=("layers.0.attn.q",)), base).check(base)


def test_what_reads_the_pooler_still_does():
    whole = make_model("pooler")
    method = for_base(LoRA(2, sites=("layers.1.attn.q",)), whole)
    jobs = [replace(job, config=replace(job.config, method=method)) for job in make_jobs(2)]
    slow, quick = (Engine(each, Classes(C)).train(jobs) for each in (whole, above_frozen(whole, method)))
    for user in slow:
        assert (slow[user].row - quick[user].row).norm() <= 1e-5 * slow[user].row.norm()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_training_into_a_store_starts_above_frozen_layers(deterministic, tmp_path):
    """Adapters are those of the whole base, which the store's users are asked on. Deterministic mode goes without."""
    task, _ = make_synthetic(SyntheticConfig(users=3, max_examples=24, test_examples=5, texts=30))
    model = make_bert(task, tmp_path / "bert")
    config = replace(CONFIG, method=LoRA(2, sites=("layers.1.attn.q",)), epochs=2)
    passes = PassConfig(deterministic=deterministic)
    plan = Training.plan(model, task, config, tmp_path / "store", passes=passes)
    assert plan.run().trained == 3
    (start,) = (line for line in map(json.loads, (tmp_path / "store" / "log.jsonl").read_text().splitlines())
                if line["event"] == "start")  # fmt: skip
    assert start["frozen_layers"] == (not deterministic)
    base, store = open_base(model, len(task.labels)), Store(tmp_path / "store")
    expected = Engine(base, plan.prompts.labels, passes).train([plan.job(user)[0] for user in plan.users])
    for user, adapter in expected.items():
        row = store.get(user, base).row
        assert (row - adapter.row).norm() <= 1e-5 * adapter.row.norm()
        assert torch.equal(row, adapter.row) or not deterministic
    assert 0 <= evaluate(base, store, task).mean <= 100
