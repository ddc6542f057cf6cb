"""A task as the protocol trains it: what is odd about it is handled in one place, and said.

    no validation examples     a tenth of the user's training examples, drawn, is taken for it, of every label in
                               proportion, but never a label's only example (who has no label twice validates by all)
    no test examples           the user is not scored, but what they labelled is still common knowledge
    one label in training      the user trains like others: the answer is easy
    a label unseen in training nobody can learn it; its test examples count like others

Of a generative task only the first two are asked: what users write is rarely written twice.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minipeft.errors import InputError
from minipeft.randomness import generator
from minipeft.running import first_users
from minipeft.tasks.task import Example, Task, load_is_subset, load_new_users, load_sample, load_task

VALIDATION_SHARE = 0.1
PART = "texts, of raw files that hold only a part of the data set"


@dataclass(frozen=True)
class Tidied:
    """notes: what is odd or was done, and how often. new_users: those whom the split holds out for cold start."""

    task: Task
    notes: dict[str, int] = field(default_factory=dict)
    new_users: tuple[str, ...] = ()


def load_tidied(folder: Path, kind: str = "leaked", num_users: int | None = None) -> Tidied:
    """The split of that kind, of the first users. In `no_leak` only users with all three parts stay, as published."""
    task = load_task(folder, kind, only_complete=kind == "no_leak", generative=True)
    new = load_new_users(folder) if kind == "new_users" else ()
    task = task if num_users is None else first_users(task, num_users)
    found = tidied(task, [user for user in new if user in task.train])
    more = {}
    if load_is_subset(folder):
        more[PART] = len({e.text for name in ("train", "val", "test") for e in task.pooled(name)})
    if sample := load_sample(folder):
        users, seed = sample
        more[f"users drawn with seed {seed} when the task was prepared"] = users
    return replace(found, notes=found.notes | more)


def tidied(task: Task, new_users: Sequence[str] = ()) -> Tidied:
    """The task with labels in its own order and validation examples for everybody.

    Raises:
        InputError: nobody has a test example.
    """
    if not any(task.test.values()):
        raise InputError(f"task {task.name!r}: the test split is empty; needed at least one test example")
    rank = {label: i for i, label in enumerate(task.labels)}  # of a generative task, whose examples have one each: none
    ordered = {name: {user: [replace(e, label=tuple(sorted(e.label, key=rank.get))) for e in examples]
                      for user, examples in task.split(name).items()}
               for name in ("train", "val", "test")}  # fmt: skip
    task = replace(task, **ordered)
    without = {user: _lent(user, task.train[user], task.generative) for user in task.users if not task.val[user]}
    train = task.train | {user: kept for user, (kept, _) in without.items()}
    val = task.val | {user: given or kept for user, (kept, given) in without.items()}
    seen = {label for examples in train.values() for example in examples for label in example.label}
    notes = {
        "users without validation examples: a tenth of their training examples taken": len(without),
        "users without a test example, not scored": sum(not own for own in task.test.values()),
        "users with one label in training":
            0 if task.generative else sum(len({e.label for e in own}) == 1 for own in train.values()),
        "labels unseen in training": len(set(task.labels) - seen),
    }  # fmt: skip
    return Tidied(replace(task, train=train, val=val), {what: n for what, n in notes.items() if n}, tuple(new_users))


def _lent(user: str, own: Sequence[Example], generative: bool) -> tuple[list[Example], list[Example]]:
    """A user's training examples: those that still are, and those given for validation, perhaps none.

    Stratified: the j-th drawn of s examples with the same labels lies at a random place between j / s and (j + 1) / s,
    and the first of all are taken, but none that is the last one left of any of its labels. In a generative task all
    examples are alike.
    """
    number, draw, alike = max(1, round(VALIDATION_SHARE * len(own))), generator(0, user, "validation"), {}
    labels = [("",) if generative else example.label for example in own]
    for i in draw.permutation(len(own)):
        alike.setdefault(labels[i], []).append(int(i))
    places = {i: (j + draw.random()) / len(same) for same in alike.values() for j, i in enumerate(same)}
    left, taken = Counter(label for each in labels for label in each), set()
    for i in sorted(places, key=places.__getitem__):
        if len(taken) < number and all(left[label] > 1 for label in labels[i]):
            left.subtract(labels[i])
            taken.add(i)
    return [e for i, e in enumerate(own) if i not in taken], [e for i, e in enumerate(own) if i in taken]
