"""Does a prompt hold the examples it should, in the published way and in ours, and lose the right part if too long?"""

import math
from dataclasses import fields, replace

import pytest
import torch
from small_bases import MAKERS, POSITIONS

from minipeft.methods.bottleneck import Houlsby
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.ptuning import PTuning
from minipeft.models.t5 import T5, T5Config
from minipeft.peftu.asking import PUBLISHED_LENGTH, Asking, balanced_examples, published_examples
from minipeft.peftu.audit import Audit
from minipeft.peftu.protocol import FIXED, MOST_RATES, PAPER, Protocol, equal_size, grid_rate
from minipeft.peftu.runner import Plan, TaskRun
from minipeft.peftu.tidy import tidied
from minipeft.running import open_base
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import Example

KNOWN = [Example("u", str(i), f"t{i}", ("a" if i % 3 == 0 else "b",)) for i in range(8)]
ASKED = [Example("u", "9", "t9", ("b",)), Example("u", "10", "t10", ("a",))]


def test_published_examples_are_those_of_the_published_code():
    """What load_dataset_with_prompts of the published code, by its defaults, drew for these examples."""
    told = lambda known, asked: [" ".join(text + label for text, label in shots)  # noqa: E731
                                 for shots in published_examples(known, asked, 3, True)]  # fmt: skip
    assert told(KNOWN, KNOWN) == [
        "t6a t1b", "t0a t4b", "t0a t2b", "t0a t1b", "t6a t7b", "t0a t7b", "t3a t1b", "t0a t1b"]  # fmt: skip
    assert told(KNOWN, ASKED) == ["t6a t1b", "t0a t4b"]
    assert told([replace(KNOWN[0], label=("a", "b")), *KNOWN[1:]], ASKED) == ["t6a t0b", "t0a t7b"]
    five = [Example("u", str(i), f"t{i}", ("abcde"[i % 5],)) for i in range(10)]
    assert told(five, five[:4]) == ["t0a t1b t7c", "t0a t1b t2c", "t0a t1b t2c", "t0a t6b t2c"], "the first labels only"


def test_a_training_example_stands_in_its_own_prompt_only_as_published():
    own = lambda allowed: [any(text == query.text for text, _ in shots)  # noqa: E731
                           for query, shots in zip(KNOWN, published_examples(KNOWN, KNOWN, 3, allowed))]  # fmt: skip
    assert any(own(True)) and not any(own(False))
    for query in KNOWN:
        assert query.text not in [text for text, _ in balanced_examples("u", KNOWN, query, 8)]


def test_balanced_examples_take_labels_in_turn():
    labels = [label for _, label in balanced_examples("u", KNOWN, None, 6)]
    assert sorted(labels[:2]) == sorted(labels[2:4]) == sorted(labels[4:6]) == ["a", "b"]
    orders = {tuple(label for _, label in balanced_examples(f"u{i}", KNOWN, None, 4)) for i in range(40)}
    assert len(orders) == 4, "each round in an order of its own"
    assert len(balanced_examples("u", KNOWN, None, 99)) == 8
    assert balanced_examples("u", KNOWN, None, 4) == balanced_examples("u", KNOWN, None, 4)
    assert balanced_examples("u", KNOWN, None, 4) != balanced_examples("v", KNOWN, None, 4)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    task, _ = make_synthetic(SyntheticConfig(users=2, max_examples=24, test_examples=5, texts=60))
    return task, {kind: open_base(MAKERS[kind](task, tmp_path_factory.mktemp(kind)), 2) for kind in ("gpt2", "bert")}


def said(asking, question):
    return asking.prompts.tokenizer.decode(question.prompt)


def test_examples_go_first_then_the_text_is_shortened(asked):
    task, bases = asked
    user = task.users[0]
    sizes = [*range(1, 30), 300]
    texts = [replace(task.test[user][0], text="word " * n) for n in sizes]
    long = replace(task, instruction="Say.", test=task.test | {user: texts})
    asking = Asking(bases["gpt2"], long, FIXED, Audit(long))
    prompts = asking.questions(shots=2)["test"][user]
    counts = [said(asking, question).count("Text:") - 1 for question in prompts]
    assert counts == sorted(counts, reverse=True) and set(counts) == {2, 1, 0}
    assert all(said(asking, question).endswith(" Label:") for question in prompts)
    assert all(len(question.prompt) <= POSITIONS - 1 for question in prompts)
    whole = [said(asking, question).count("word") == n for question, n in zip(prompts, sizes)]
    assert all(kept for kept, count in zip(whole, counts) if count) and not whole[-1]
    assert asking.notes_of(shots=2)["texts shortened"] >= whole.count(False)
    assert asking.notes_of(shots=2)["prompts with fewer examples"] >= sum(count < 2 for count in counts)


def test_as_published_a_long_prompt_loses_its_query(asked):
    task, bases = asked
    user = task.users[0]
    long = replace(task, test=task.test | {user: [replace(task.test[user][0], text="word " * 300 + "query")]})
    asking = Asking(bases["gpt2"], long, replace(PAPER, examples=0), Audit(long))
    (question,) = asking.questions(shots=3)["test"][user]
    assert not said(asking, question).endswith("Label:") and asking.notes_of(shots=3)["queries cut"] >= 1


@pytest.mark.parametrize("method", [PrefixTuning(tokens=20), PrefixTuning(tokens=20, hf_compat=True),
                                    PromptTuning(tokens=20)])  # fmt: skip
def test_virtual_tokens_take_nothing_from_a_t5s_prompt(method, asked, tmp_path):
    """It has no positions: 512 tokens of the prompt are read with any method, as published."""
    task, _ = asked
    user = task.users[0]
    long = replace(task, test=task.test | {user: [replace(task.test[user][0], text="word " * 600)]})
    asking = Asking(open_base(MAKERS["t5"](task, tmp_path), 2), long, PAPER, Audit(long))
    (alone,), (question,) = (asking.questions(way, shots=3)["test"][user] for way in (None, method))
    assert question.prompt == alone.prompt and len(alone.prompt) == PUBLISHED_LENGTH


def test_an_encoder_reads_the_text_alone(asked):
    task, bases = asked
    asking = Asking(bases["bert"], task, PAPER, Audit(task))
    assert asking.questions(shots=3)["test"] == asking.questions()["test"]


def test_paper_differs_from_fixed_in_every_switch():
    assert FIXED == Protocol()
    assert all(getattr(PAPER, field.name) != getattr(FIXED, field.name) for field in fields(Protocol))
    assert all(f"{field.name}:" in Protocol.__doc__ for field in fields(Protocol))
    assert FIXED.rates("ia3") == [0.0017, 0.005, 0.015] and PAPER.rates("ia3") == [2e-5]
    assert PAPER.beyond("ia3", {2e-5: 0.5}) is None
    config = PAPER.config(PAPER.methods()["ia3"], 2e-5, 42, 8)
    assert (config.warmup, config.patience, config.batch_size, config.weight_decay) == (0.01, 8, 8, 0.01)


@pytest.mark.parametrize(("best", "tried"), [
    (-1, [-1, 0, 1, -2]), (0, [-1, 0, 1]), (2, [-1, 0, 1, 2, 3]), (9, [-1, 0, 1, 2, 3]), (-9, [-1, 0, 1, -2, -3]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["lora", "houlsby", "ia3", "prefix", "head", "shared", "adalora"])
def test_a_grid_goes_on_beyond_the_end_at_which_the_best_lies(best, tried, name):
    """Losses fall towards the best rate, so many steps from where the grid begins."""
    rates = {steps: grid_rate(name, steps) for steps in range(-4, 5)}
    losses = {rates[steps]: abs(steps - best) for steps in (-1, 0, 1)}
    assert list(losses) == FIXED.rates(name)
    while (rate := FIXED.beyond(name, losses)) is not None:
        (steps,) = (number for number, each in rates.items() if each == rate)
        losses[rate] = abs(steps - best)
    assert list(losses) == [rates[steps] for steps in tried]
    assert len(losses) <= MOST_RATES


def test_a_grid_goes_down_where_somebody_could_not_be_trained():
    losses = dict.fromkeys(FIXED.rates("lora"), math.inf)
    assert FIXED.beyond("lora", losses) == pytest.approx(7e-4 / 9, rel=0.05)
    up = dict(zip(FIXED.rates("lora"), (0.5, 0.4, 0.3))) | {grid_rate("lora", 2): math.inf}
    assert FIXED.beyond("lora", up) is None, "past the best one nobody learns"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_published_warm_ups_hold_with_a_head_beside_the_method(kind, asked, tmp_path):
    task, bases = asked
    shares = {"houlsby": 0.01, "ia3": 0.01, "lora": 0.1}
    for protocol in (PAPER, FIXED):
        methods = {name: protocol.methods()[name] for name in shares}
        run = TaskRun(Plan(protocol, methods), tidied(task), bases[kind], tmp_path, print, print)
        warmups = {name: run.cell(name, 2e-5, 42).config.warmup for name in shares}
        assert warmups == (shares if protocol is PAPER else dict.fromkeys(shares, 0.1))


@pytest.mark.parametrize(("method", "count"), [
    (LoRA(8, sites=("q", "v")), 110_592), (Houlsby(), 110_640), (PrefixTuning(20, hf_compat=True), 110_592),
    (PromptTuning(20), 110_592), (PTuning(20), 110_232),
])  # fmt: skip
def test_equal_sizes_are_the_published_ablations(method, count):
    with torch.device("meta"):
        base = T5(T5Config(32128, 768, 12, 12, 12, 64, 2048, start_token=0, gated=True))
    assert equal_size(method, base, 110_592).count(base) == count
