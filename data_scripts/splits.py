"""Which of a user's examples are for training, validation and test: two kinds of split as PEFT-U has them, two of ours.

`leaked` and `no_leak`. Source: Clarke, Heng, Tang, Mars 2024 (arXiv:2407.18078) and its published code
(github.com/ChrisIsKing/Parameter-Efficient-Personalization, peft_u/preprocess/convert_data_format.py), which is the
definition followed here. Its results depend on the order of users and examples and on Python's own random numbers.
These functions give what it gives, to the byte: the tests compare hashes, on the raw files and on made-up examples.

There, one rule cuts any list of n things (`_cut`): shuffle with seed 42, hold out max(2, round(0.2 n)) from the end,
of which the first round(0.5 held_out) are `val` and the others `test`. Halves round to even, as Python's `round` does,
so of three held-out things two are `val`; a list of two has no `train`, a list of one is all `val`.

- `leaked`: the rule is applied to each user alone, once per label, so that a label of three or more examples is in all
  three splits. A text may be a training example of one user and a test example of another. Published runs use it.
- `no_leak`: the rule is applied once, to the ids of all texts, and each user inherits it. A text is in the same split
  for everybody, and a user may be left with an empty split.

The published rule holds out two examples even of a label that a user gave twice, which leaves none to learn from, and
has no users who are new. `strict` and `new_users` are ours for that. Both are functions of a user's id, text ids and
labels alone: neither other users nor the order of a file changes anything but the order in which examples are written.

- `strict`: per user, of n examples exactly n // 10 are `val`, as many `test`, and all others `train`; and of the s
  examples with any one set of labels, `val` and `test` have each s * (n // 10) / n, rounded up or down, and together
  twice that, rounded up or down. Nothing is held out of a user with fewer than ten examples.
- `new_users`: for cold start. One user in five, by a hash of seed and id, is new; the others are cut as in `strict`. A
  new user's examples are put in random order: the first n // 2 are `train`, in that order, so that the first k of them
  are what is known after k answers; the others are `test`. There is no `val`: it would be answers not counted in k.

Both are per user, as `leaked` is: a text may be for training with one user and for test with another.

Examples are `{user: {text id: example}}`; an example is `{"text": str, "label": [str, ...]}` with any further fields,
or without "label" in a generative task, whose examples all count as of the same label. Splits are
`{user: {"train" | "val" | "test": {text id: example}}}`. The order of every dict counts. Examples are shared with what
was given, not copied, and nothing given is changed.
"""

import hashlib
import random
from collections.abc import Hashable
from typing import Any, TypeVar

Example = dict[str, Any]
Examples = dict[Hashable, dict[Hashable, Example]]       # users and texts are strings or, in some sources, numbers
Splits = dict[Hashable, dict[str, dict[Hashable, Example]]]
Item = TypeVar("Item")

SPLIT_NAMES = ("train", "val", "test")
TRAIN_RATIO = 0.8
SEED = 42
MIN_EXAMPLES = 10
NEW_USERS_ONE_IN = 5


def split_leaked(examples: Examples) -> Splits:
    """Every user's own examples, label by label in sorted order, cut 80 / 10 / 10.

    An example of several labels comes up once for each of them and stays where the first one put it, so that a rare
    label may be missing from a split after all. Within a split, examples stand in the order in which they came.

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


def split_strict(examples: Examples) -> Splits:
    """Every user's own examples cut 80 / 10 / 10, each set of labels in proportion, however rare.

    Systematic sampling: the examples lie in a ring, those with the same labels side by side in random order, and 2m =
    2 (n // 10) points lie over it, n / 2m apart, from a random start. The examples under them are alternately `val` and
    `test`. Of points that are d apart, s / d lie over any s neighbours, rounded up or down: hence the promise above.
    Within a split, examples stand in the order in which they came. Cost: O(n log n) for each user.
    """
    return {user: _cut_strictly(user, own) for user, own in examples.items()}


def split_new_users(examples: Examples) -> Splits:
    """The examples of most users as in `strict`; of a new user, half to be given, in that order, and half to test."""
    return {
        user: _cut_new_user(user, own) if is_new_user(user) else _cut_strictly(user, own)
        for user, own in examples.items()
    }


def is_new_user(user: Hashable) -> bool:
    """Whether this user is held out for cold start: one in NEW_USERS_ONE_IN is, whoever else there is."""
    digest = hashlib.sha256(f"{SEED} {user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % NEW_USERS_ONE_IN == 0


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


def _cut_strictly(user: Hashable, own: dict[Hashable, Example]) -> dict[str, dict[Hashable, Example]]:
    text_ids, rng = _shuffled(user, own)
    text_ids.sort(key=lambda text_id: sorted(own[text_id].get("label", ())))      # stable: shuffled within equal labels
    num_points = 2 * (len(own) // 10)
    start = rng.randrange(2 * len(own)) if own else 0
    points = [(start + k * len(own)) // num_points % len(own) for k in range(num_points)]
    split_of = {text_ids[point]: ("val", "test")[k % 2] for k, point in enumerate(points)}
    parts = {name: {} for name in SPLIT_NAMES}
    for text_id, example in own.items():
        parts[split_of.get(text_id, "train")][text_id] = example
    return parts


def _cut_new_user(user: Hashable, own: dict[Hashable, Example]) -> dict[str, dict[Hashable, Example]]:
    text_ids, _ = _shuffled(user, own)
    num_given = len(own) // 2
    parts = {"train": text_ids[:num_given], "val": [], "test": text_ids[num_given:]}
    return {name: {text_id: own[text_id] for text_id in part} for name, part in parts.items()}


def _shuffled(user: Hashable, own: dict[Hashable, Example]) -> tuple[list[Hashable], random.Random]:
    """A user's text ids in random order, and what drew it, which goes on from there. Only user and ids matter."""
    rng = random.Random(f"{SEED} {user}")                # of a string it takes a hash that is the same everywhere
    text_ids = sorted(own, key=str)
    rng.shuffle(text_ids)
    return text_ids, rng


# How to make each kind of split that a task is written with, and those that the published code writes as well.
KINDS = {"leaked": split_leaked, "no_leak": split_no_leak, "strict": split_strict, "new_users": split_new_users}
PUBLISHED_KINDS = ("leaked", "no_leak")
