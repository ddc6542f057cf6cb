"""Are the splits those of the published PEFT-U code, and is every example in exactly one of them?"""

import copy
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import (
    MIN_EXAMPLES,
    SPLIT_NAMES,
    drop_small_users,
    empty_splits,
    sample_users,
    split_leaked,
    split_no_leak,
)

SPLITTERS = {"leaked": split_leaked, "no_leak": split_no_leak}

# sha256 of json.dumps of what the published `data2dataset_splits` returns for `made_up_examples()`, and its list of
# users with an empty split. Made by running that function.
PUBLISHED_SHA256 = {
    "leaked": "63ab7a2f78cec2346d57644ac0ee95e1b737d95d008ded2ae7cca26d6ba926cc",
    "no_leak": "ef9b562e4c52ceb71235cbc4390813a24984fffc4d9f6fed769885ce3faecd8a",
}
PUBLISHED_EMPTY = {
    "leaked": {"labels all different": {"train": 0, "val": 11, "test": 0}},
    "no_leak": {"labels all different": {"train": 10, "val": 0, "test": 1}},
}


def made_up_examples():
    """Users with common, rare and overlapping labels, with too few examples, and without some split."""

    def example(i, labels):
        return {"text": f"text {i}", "label": labels}

    colours = ("red", "green", "blue")
    return {
        "one label each": {str(i): example(i, [colours[i * i % 3]]) for i in range(37)},
        "several labels": {
            str(i): example(i, [c for k, c in enumerate(colours) if (i + k) % (k + 2) == 0] or ["none"])
            for i in range(60, 2, -1)
        },
        "a rare label": {str(i): example(i, ["green" if i in (4, 12) else "blue"]) for i in range(0, 40, 2)},
        "a label seen once": {str(i): example(i, ["green" if i == 9 else "blue"]) for i in range(3, 14)},
        "nine examples": {str(i): example(i, ["red"]) for i in range(9)},
        "ten examples": {str(i): example(i, ["red", "blue"][: 1 + i % 2]) for i in range(50, 60)},
        "labels all different": {str(i): example(i, [f"colour {i}"]) for i in range(20, 31)},
    }


@pytest.mark.parametrize("kind", SPLITTERS)
def test_same_bytes_as_published_code(kind):
    splits = drop_small_users(SPLITTERS[kind](made_up_examples()))
    assert hashlib.sha256(json.dumps(splits).encode()).hexdigest() == PUBLISHED_SHA256[kind]
    assert empty_splits(splits) == PUBLISHED_EMPTY[kind]


def test_users_below_the_threshold_are_dropped_and_others_kept():
    examples = made_up_examples()
    for split in SPLITTERS.values():
        kept = drop_small_users(split(examples))
        assert list(kept) == [user for user in examples if user != "nine examples"]
        assert all(sum(map(len, own.values())) >= MIN_EXAMPLES for own in kept.values())


def test_a_user_without_examples_does_not_appear():
    examples = made_up_examples() | {"nobody": {}}
    assert "nobody" not in split_leaked(examples)
    assert "nobody" not in drop_small_users(split_no_leak(examples))


@st.composite
def user_examples(draw):
    """Some users, texts and labels; every user has labelled some of the texts, with one or more labels each."""
    text_ids = [str(i) for i in range(draw(st.integers(1, 40)))]
    labels = st.lists(st.sampled_from("abcde"), min_size=1, max_size=draw(st.integers(1, 3)), unique=True)
    chosen = st.lists(st.sampled_from(text_ids), min_size=1, unique=True)
    return {
        user: {i: {"text": f"text {i}", "label": draw(labels)} for i in draw(chosen)}
        for user in "uvwx"[: draw(st.integers(1, 4))]
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(examples=user_examples())
@pytest.mark.parametrize("kind", SPLITTERS)
def test_disjoint_exhaustive_stable_and_inputs_untouched(kind, examples):
    before = copy.deepcopy(examples)
    splits = SPLITTERS[kind](examples)
    assert examples == before
    assert json.dumps(SPLITTERS[kind](examples)) == json.dumps(splits)
    assert list(splits) == list(examples)
    for user, own in splits.items():
        assert tuple(own) == SPLIT_NAMES
        text_ids = [text_id for part in own.values() for text_id in part]
        assert sorted(text_ids) == sorted(examples[user])
        assert all(part[i] is examples[user][i] for part in own.values() for i in part)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(examples=user_examples())
def test_leaked_split_of_a_user_does_not_depend_on_other_users(examples):
    together = split_leaked(examples)
    for user, own in examples.items():
        assert split_leaked({user: own}) == {user: together[user]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(examples=user_examples())
def test_no_leak_puts_a_text_in_one_split_for_everybody(examples):
    split_of = {}
    for own in split_no_leak(examples).values():
        for name, part in own.items():
            for text_id in part:
                assert split_of.setdefault(text_id, name) == name


def test_sizes_are_80_10_10_and_two_are_held_out_of_any_label():
    for num_examples, sizes in {1: (0, 1, 0), 2: (0, 1, 1), 3: (1, 1, 1), 13: (10, 2, 1), 100: (80, 10, 10)}.items():
        own = {str(i): {"text": "", "label": ["a"]} for i in range(num_examples)}
        for split in SPLITTERS.values():
            parts = split({"u": own})["u"]
            assert tuple(len(parts[name]) for name in SPLIT_NAMES) == sizes


def test_sampled_users_are_those_of_seeded_random_sample():
    examples = {f"u{i}": {"0": {"text": "", "label": ["a"]}} for i in range(10)}
    assert list(sample_users(examples, 3, seed=42)) == ["u1", "u0", "u4"]    # random.seed(42); random.sample(users, 3)
    assert list(sample_users(examples, 10, seed=7)) != list(examples)
    with pytest.raises(ValueError):
        sample_users(examples, 11, seed=42)
