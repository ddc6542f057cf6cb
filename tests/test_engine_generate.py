"""Do many users' models speak in one batch as each would alone, its LoRA multiplied into the weights?"""

import numpy as np
import pytest
import torch
from test_recompute import BASES

from minipeft.engine import Engine
from minipeft.labels import LabelSet
from minipeft.methods.lora import LoRA
from minipeft.models.generate import Sampling
from minipeft.randomness import generator
from minipeft.schedule import PassConfig

LABELS = LabelSet([[1], [2]])
METHODS = (
    LoRA(rank=3, sites=("q", "v", "down")), LoRA(rank=12, sites=("o", "up")), LoRA(rank=2, sites=("q", "k", "v")),
)  # fmt: skip


def drawn_row(method, base, user):
    """A row whose update is as large as the weights it is added to."""
    row, draw = method.initial_row(base, 0, user), generator(0, user, "test")
    for name, part in method.layout(base).tensors(row).items():
        if name.endswith("Bt"):
            part[: method.rank] = torch.from_numpy(draw.normal(size=part[: method.rank].shape)) * 0.1
    return row


def merged(model, method, row):
    """Adds B A to the weights; returns what undoes it."""
    tensors, before = method.tensors(row, model), {}
    linears = model.linears
    for site in method.chosen(model):
        weight = linears[site].weight
        before[site] = weight.clone()
        weight += method.alpha / method.rank * tensors[f"{site}.B"] @ tensors[f"{site}.A"]
    return lambda: [linears[site].weight.copy_(weight) for site, weight in before.items()]


@pytest.mark.parametrize("base", ["decoder", "gpt2", "gpt_neox", "t5"])
def test_users_speak_as_their_merged_models_do(base):
    model, rng = BASES[base], np.random.default_rng(0)
    engine, asked, expected = Engine(model, LABELS, PassConfig(slots=8)), [], []
    for u in range(6):
        method, user = METHODS[u % 3], f"user {u}"
        row = drawn_row(method, model, user)
        prompts = [rng.integers(0, 60, n).tolist() for n in rng.integers(1, 20, 1 + u % 3)]
        asked.append((*engine.admit(user, method, row), prompts))
        undo = merged(model, method, row)
        expected.append(model.generate(prompts, 10, stop=[4]))
        undo()
    asked, expected = asked[::-1], expected[::-1]  # in another order than the banks'
    assert engine.generate(asked, 10, stop=[4]) == expected
    alone = [engine.generate([one], 10, stop=[4])[0] for one in asked]
    assert alone == expected and expected != [model.generate(prompts, 10, stop=[4]) for *_, prompts in asked]
    sampled = engine.generate(asked, 10, [4], Sampling(temperature=1.0, seed=5))
    assert sampled != expected and sampled == engine.generate(asked, 10, [4], Sampling(temperature=1.0, seed=5))
