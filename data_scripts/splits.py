"""Which of a user's examples are for training, validation and test: the `leaked` and `no_leak` splits of PEFT-U.

Source: Clarke, Heng, Tang, Mars 2024 (arXiv:2407.18078) and its published code
(github.com/ChrisIsKing/Parameter-Efficient-Personalization, peft_u/preprocess/convert_data_format.py), which is the
definition followed here. Its results depend on the order of users and examples and on Python's own random numbers.
These functions give what it gives, to the byte: the tests compare hashes, on the raw files and on made-up examples.

One rule cuts any list of n things (`_cut`): shuffle with seed 42, hold out max(2, round(0.2 n)) from the end, of which
the first round(0.5 held_out) are `val` and the others `test`. Halves round to even, as Python's `round` does, so of
three held-out things two are `val`; a list of two has no `train`, a list of one is all `val`.

- `leaked`: the rule is applied to each user alone, once per label, so that a label of three or more examples is in all
  three splits. A text may be a training example of one user and a test example of another. Published runs use it.
- `no_leak`: the rule is applied once, to the ids of all texts, and each user inherits it. A text is in the same split
  for everybody, and a user may be left with an empty split.

Examples are `{user: {text id: example}}`; an example is `{"text": str, "label": [str, ...]}` with any further fields;
splits are `{user: {"train" | "val" | "test": {text id: example}}}`. The order of every dict counts. Examples are shared
with what was given, not copied, and nothing given is changed.
"""

import random
from typing import Any, TypeVar

Example = dict[str, Any]
Examples = dict[str, dict[str, Example]]
Splits = dict[str, dict[str, dict[str, Example]]]
Item = TypeVar("Item")

SPLIT_NAMES = ("train", "val", "test")
TRAIN_RATIO = 0.8
SEED = 42
MIN_EXAMPLES = 10


def split_leaked(examples: Examples) -> Splits:
    """Every user's own examples, label by label in sorted order, cut 80 / 10 / 10.

    An example of several labels comes up once for each of them and stays where the first one put it, so that a rare
    label may be missing from a split after all. Within a split, examples stand in the order in which they came.

    The examples of a generative task count as of one label.

    Users without an example do not appear. Cost: linear in the examples and their labels.
    """
    splits = {}
    for user, own in examples.items():
        if not own:
            continue
        splits[user] = {name: {} for name in SPLIT_NAMES}
        placed = set()
        by_label: dict[str, list] = {}
        for text_id, example in own.items():
            for label in example.get("label", ("",)):
                by_label.setdefault(label, []).append(text_id)
        for label in sorted(by_label):
            cut = _cut(by_label[label])
            for name, text_ids in zip(SPLIT_NAMES, cut):
                splits[user][name].update({text_id: own[text_id] for text_id in text_ids if text_id not in placed})
                placed.update(text_ids)
    return splits


def split_no_leak(examples: Examples) -> Splits:
    """The ids of all users' texts cut 80 / 10 / 10; every user's examples follow their text, in the user's own order.

    The ids are sorted, shuffled with the seed, and then shuffled once more by `_cut`, as in the published code. Ids
    must be of one type (strings sort as strings: "10" before "9").
    """
    text_ids = sorted({text_id for own in examples.values() for text_id in own})
    random.Random(SEED).shuffle(text_ids)
    split_of = {text_id: name for name, part in zip(SPLIT_NAMES, _cut(text_ids)) for text_id in part}
    splits = {}
    for user, own in examples.items():
        splits[user] = {name: {} for name in SPLIT_NAMES}
        for text_id, example in own.items():
            splits[user][split_of[text_id]][text_id] = example
    return splits


def drop_small_users(splits: Splits) -> Splits:
    """The users who have at least MIN_EXAMPLES examples over all three splits.

    The published code drops users after splitting, so in `no_leak` a dropped user's texts still take part in the cut.
    """
    return {user: own for user, own in splits.items() if sum(map(len, own.values())) >= MIN_EXAMPLES}


def empty_splits(splits: Splits) -> dict[str, dict[str, int]]:
    """The size of each split, {user: {"train": n, "val": n, "test": n}}, of the users for whom one of them is empty."""
    sizes = {user: {name: len(part) for name, part in own.items()} for user, own in splits.items()}
    return {user: own for user, own in sizes.items() if 0 in own.values()}


def sample_users(examples: Examples, num_users: int, seed: int) -> Examples:
    """`num_users` users drawn without replacement, in the order drawn.

    As the published code does before splitting, for its larger data sets: `random.seed(seed)`, then `random.sample` of
    the users in order of appearance. Its default seed is 42.

    Raises:
        ValueError: there are fewer users than that.
    """
    return {user: examples[user] for user in random.Random(seed).sample(list(examples), num_users)}


def _cut(items: list[Item]) -> tuple[list[Item], list[Item], list[Item]]:
    """(train, val, test) of the items, shuffled."""
    shuffled = list(items)
    random.Random(SEED).shuffle(shuffled)                # as random.seed(SEED); random.shuffle(shuffled)
    held_out = max(2, round((1 - TRAIN_RATIO) * len(items)))
    num_val = round(0.5 * held_out)
    train, rest = shuffled[:-held_out], shuffled[-held_out:]
    return train, rest[:num_val], rest[num_val:]


# How to make each kind of split that a task is written with, and those that the published code writes as well.
KINDS = {"leaked": split_leaked, "no_leak": split_no_leak}
PUBLISHED_KINDS = ("leaked", "no_leak")
