"""Is the embedded base made once, from the training split and the seed alone, and does it learn?"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minipeft import default_base as module
from minipeft.default_base import cache_folder, default_base, initialise, train_decoder, train_tokenizer
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import fingerprint, load_model, load_tokenizer
from minipeft.prompts import ANSWER, encode_task, label_token
from minipeft.tasks.task import Example, Task

SHAPE = dict(width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=48, max_positions=32)
WORDS = {"good": ["fine", "nice", "sunny"], "bad": ["rain", "grim", "cold"]}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """A base that takes a second, in a cache of its own."""
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    for name, value in dict(SHAPE=SHAPE, STEPS=6, TOKENS_PER_STEP=256, VOCAB_SIZE=300, LEARNING_RATE=1e-2).items():
        monkeypatch.setattr(module, name, value)


def make_task(num_users=4, seed=0):
    """A word of the text says the label, for everybody."""
    rng, splits = np.random.default_rng(seed), []
    for split, number in (("train", 12), ("val", 3), ("test", 6)):
        splits.append({})
        for user in (f"u{i}" for i in range(num_users)):
            examples = []
            for i in range(number):
                label = ("good", "bad")[rng.integers(2)]
                words = [*rng.choice(["the", "day", "was", "and"], 3), rng.choice(WORDS[label])]
                examples.append(Example(user, f"{split}{i}", " ".join(rng.permutation(words)), (label,)))
            splits[-1][user] = examples
    return Task("weather", "How was it?", ("good", "bad"), False, *splits)


def rewritten(task, split):
    """The task with one split's texts and labels all changed."""
    other = {"good": ("bad",), "bad": ("good",)}
    changed = {user: [replace(e, text=e.text + " !", label=other[e.label[0]]) for e in examples]
               for user, examples in task.split(split).items()}  # fmt: skip
    return replace(task, **{split: changed})


def steps_of(*args, **kwargs):
    """The folder, and how many steps were trained for it."""
    steps = []
    return default_base(*args, on_step=lambda done, total: steps.append((done, total)), **kwargs), steps


def test_a_base_in_the_cache_is_not_made_again(tmp_path):
    folder, steps = steps_of(make_task())
    assert steps == [(i, 6) for i in range(1, 7)]
    assert folder.parent == tmp_path / "cache" / "bases"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, steps = steps_of(make_task())
    assert again == folder and steps == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]  # nothing temporary is left


def test_a_base_is_a_function_of_training_split_and_seed_alone():
    task = make_task()
    folder = default_base(task)
    for split in ("val", "test"):
        again, steps = steps_of(rewritten(task, split))
        assert again == folder and steps == []
    assert default_base(rewritten(task, "train")) != folder
    assert default_base(task, seed=1) != folder
    weights = [fingerprint(load_model(default_base(task, seed=seed))) for seed in (0, 1)]
    assert weights[0] != weights[1]


def test_nothing_but_the_training_split_is_looked_at():
    task = make_task()
    train_only = replace(task, val={user: [] for user in task.users}, test={user: [] for user in task.users})
    tokenizer = train_tokenizer(task)
    assert tokenizer.to_str() == train_tokenizer(train_only).to_str()
    assert fingerprint(train_decoder(task, tokenizer, 0)) == fingerprint(train_decoder(train_only, tokenizer, 0))


@pytest.mark.parametrize("name, value", [("STEPS", 7), ("TOKENS_PER_STEP", 128), ("LEARNING_RATE", 2e-2),
                                         ("VOCAB_SIZE", 290), ("TEXT_WEIGHT", 0.1), ("RECALL_WEIGHT", 0.5),
                                         ("TEXT_EVERY", 2), ("SHAPE", {**SHAPE, "num_layers": 1})])  # fmt: skip
def test_another_recipe_is_another_base(monkeypatch, name, value):
    task, made = make_task(1), []
    monkeypatch.setattr(module, "save_model", lambda model, tokenizer, folder: made.append(folder))
    monkeypatch.setattr(module, "train_decoder", lambda *args: None)
    default_base(task)
    monkeypatch.setattr(module, name, value)
    default_base(task)
    assert made[0] != made[1]


def test_the_same_seed_gives_the_same_weights():
    task = make_task()
    tokenizer = train_tokenizer(task)
    one = train_decoder(task, tokenizer, 3)
    torch.manual_seed(99)  # global state plays no part
    assert fingerprint(one) == fingerprint(train_decoder(task, tokenizer, 3))
    assert not any(weight.requires_grad for weight in one.parameters())
    start = initialise(Decoder(one.config), 3)
    for (name, weight), before in zip(one.named_parameters(), start.parameters()):
        assert not torch.equal(weight, before), name  # every weight was trained


def test_the_folder_holds_what_was_trained():
    task = make_task()
    folder = default_base(task)
    tokenizer = load_tokenizer(folder)
    assert all(tokenizer.token_to_id(token) is not None for token in (ANSWER, label_token("good"), label_token("bad")))
    assert fingerprint(load_model(folder)) == fingerprint(train_decoder(task, train_tokenizer(task), 0))
    text = "naïve 😀 day"  # bytes that no training text had
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text


def test_it_learns_a_trivial_task(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)
    task = make_task()
    folder = default_base(task)
    model, encoded = load_model(folder), encode_task(task, load_tokenizer(folder), SHAPE["max_positions"])
    questions = [question for user in task.users for question in encoded.test[user]]
    logits = torch.stack([rows[-1] for rows in model.logits([question.prompt for question in questions])])
    answers = logits[:, [label[0] for label in encoded.labels.labels]].argmax(1)
    right = torch.tensor([question.label for question in questions])
    assert 6 < int(right.sum()) < 18 and (answers == right).float().mean() >= 0.9


def test_start_values():
    config = DecoderConfig(vocab_size=300, width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
                           mlp_width=96, tied_head=True)  # fmt: skip
    model = initialise(Decoder(config), 0)
    expected = {"embed": 0.02, "q": 64**-0.5, "up": 64**-0.5, "o": 64**-0.5 / 2, "down": 96**-0.5 / 2}  # sqrt(2 L) = 2
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in expected:
            assert float(weight.std()) == pytest.approx(expected[kind], rel=0.06), name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name
    assert fingerprint(model) == fingerprint(initialise(Decoder(config), 0))
    assert fingerprint(model) != fingerprint(initialise(Decoder(config), 1))


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MINIPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "minipeft"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "minipeft"
