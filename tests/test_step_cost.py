"""Does a fused step take as many operations as it should, however many users are in it?

Counts, not seconds: PyTorch operations of forward, backward and optimizer step, what they multiply, and calls of
Python functions.
"""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import flops
from minipeft.default_base import initialise
from minipeft.engine import Engine
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods import METHODS
from minipeft.methods import lora as lora_file
from minipeft.models.bert import Bert, BertConfig
from minipeft.models.classifier import Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.t5 import T5, T5Config
from minipeft.models.trunk import Trunk, keep_top
from minipeft.running import for_base
from minipeft.schedule import Job, PassConfig, Run, TrainConfig

LAYERS = 2
# PyTorch operations of a step on LAYERS layers. A change that needs more says why; one that needs fewer lowers it.
# The last layer's q is launched by itself, on fewer rows than its k and v (top.py); at q and v alone so is v.
MOST = {"lora": 411, "dora": 915, "vera": 406, "ia3": 354, "layernorm": 468, "houlsby": 482, "pfeiffer": 360,
        "parallel": 355, "prompt": 325, "prefix": 337, "ptuning": 2648}  # fmt: skip
# Views and allocations cost next to nothing beside what reads or writes numbers.
FREE = ("view", "as_strided", "transpose", "t", "slice", "select", "split", "unsqueeze", "squeeze", "expand", "detach",
        "alias", "empty", "new_empty", "empty_like", "empty_strided", "unbind", "permute", "_reshape_alias",
        "_unsafe_view", "lift_fresh", "split_with_sizes")  # fmt: skip


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops[name] += name not in FREE
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def base():
    config = DecoderConfig(100, 32, LAYERS, 2, 2, 16, 48, tied_head=True, max_positions=96)
    return initialise(Decoder(config), seed=0).requires_grad_(False)


def ready(base, name: str, num_users: int, **options) -> tuple[Engine, list[Run]]:
    """Users by a method, with as many rows each, after a first step."""
    method = for_base(METHODS[name](**options), base)
    engine, runs = Engine(base, LabelSet([[1], [2]]), PassConfig(slots=num_users)), []
    words = np.random.default_rng(0).integers(3, 100, (num_users, 2, 8)).tolist()
    for u in range(num_users):
        questions = [Question(tuple(text), i % 2) for i, text in enumerate(words[u])]
        runs.append(engine.begin(Job(f"user {u}", questions, questions, TrainConfig(method, epochs=9))))
    engine.train_step(runs)
    return engine, runs


def operations(base, name: str, num_users: int) -> Counter:
    engine, runs = ready(base, name, num_users)
    with Counted() as counted:
        engine.train_step(runs)
    return +counted.ops


def filled(model):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    return model


def multiplied(base, labels, prompts: list[list[tuple[int, ...]]]) -> int:
    """Floating-point operations of the matrix products and the attention of a fused LoRA step."""
    method = for_base(METHODS["lora"](rank=2, sites=("q", "v")), base)
    engine = Engine(base, labels, PassConfig(slots=len(prompts)))
    runs = []
    for u, own in enumerate(prompts):
        questions = [Question(prompt, i % 2) for i, prompt in enumerate(own)]
        runs.append(engine.begin(Job(f"user {u}", questions, questions, TrainConfig(method))))
    with flops.counter() as counter:
        engine.train_step(runs)
    return counter.get_total_flops()


def python_calls(action) -> int:
    """Calls of Python functions while action runs."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


def calls_of_a_step(base, name: str, num_users: int) -> int:
    engine, runs = ready(base, name, num_users)
    return python_calls(lambda: engine.train_step(runs))


@pytest.mark.parametrize("name", MOST)
def test_more_users_are_no_more_operations(base, name):
    few, many = operations(base, name, 4), operations(base, name, 32)
    assert few == many
    assert sum(many.values()) <= MOST[name], f"{sum(many.values())} operations: {many.most_common()}"


PRODUCTS = {"decoder": 49_729_536, "encoder": 66_959_616, "encoder, top layer": 27_420_928,
            "encoder-decoder": 110_927_872}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
def test_no_row_is_multiplied_that_nobody_reads(base, kind):
    """Operations of one step; a change that needs more says why, one that needs fewer lowers the figure. The head at
    every row, an unread row of the last layer or users filled up to more rows would be more."""
    words = np.random.default_rng(0).integers(3, 90, (6, 4, 40)).tolist()
    prompts = [[tuple(text[: 20 + 3 * u]) for text in own] for u, own in enumerate(words)]
    whole = Classifier(filled(Bert(BertConfig(100, 32, LAYERS, 2, 48, max_positions=96))), 2)
    if kind == "encoder, top layer":
        keep_top(whole, 1)
    made, labels = {
        "decoder": (base, LabelSet([[1], [2]])),
        "encoder": (whole, Classes(2)),
        "encoder, top layer": (Trunk(whole, (prompt for own in prompts for prompt in own)), Classes(2)),
        "encoder-decoder": (filled(T5(T5Config(100, 32, LAYERS, LAYERS, 2, 16, 48, start_token=0, gated=True))),
                            LabelSet([[1], [2]], 0)),
    }[kind]  # fmt: skip
    operations = multiplied(made.requires_grad_(False), labels, prompts)
    assert 0.99 * PRODUCTS[kind] < operations <= PRODUCTS[kind], f"{operations:,}"


def test_dropout_is_drawn_once_for_every_input_of_a_step_and_copied_at_once(base, monkeypatch):
    """q, k and v share an input, gate and up too, whether they are launched together or not. Once for all rows, once
    for those that are read."""
    engine, runs = ready(base, "lora", 4, dropout=0.5)
    inputs, copies, keys_of, to_device = [], [], lora_file.keys_of, lora_file.to_device
    monkeypatch.setattr(lora_file, "keys_of", lambda *args: inputs.append(args[2]) or keys_of(*args))
    monkeypatch.setattr(lora_file, "to_device", lambda *args: copies.append(args) or to_device(*args))
    engine.train_step(runs)
    assert sorted(inputs) == sorted(2 * [group[0] for group in base.shared_inputs]) and len(copies) == 2
    assert len(inputs) == 2 * 4 * LAYERS


@pytest.mark.parametrize("name", ["lora", "houlsby", "prefix"])
def test_a_user_costs_few_calls_of_python_whatever_the_layers(base, name):
    """What is done per user, is done once per step: the minibatch, packing, settings."""
    few, many = (calls_of_a_step(base, name, number) for number in (8, 40))
    assert (many - few) / 32 <= 60, f"{(many - few) / 32} calls per user"


@pytest.mark.parametrize("name", MOST)
def test_admitting_a_user_costs_few_calls_of_python(base, name):
    """What a method looks up in the base, it does not look up again for every user."""
    method = for_base(METHODS[name](), base)
    engine = Engine(base, LabelSet([[1], [2]]), PassConfig(slots=4))
    questions = [Question((3, 4, 5), 0)]
    jobs = [Job(f"user {u}", questions, questions, TrainConfig(method)) for u in range(4)]
    for job in jobs[:3]:
        engine.begin(job)
    calls = python_calls(lambda: engine.begin(jobs[3]))
    assert calls <= 100 + 30 * len(method.shapes(base)), f"{calls} calls"
