"""A task: many users' labelled texts in three splits, as files and in memory.

A folder holds `task.json` (name, instruction, labels, multi_label; sample, if users were drawn; further keys are
allowed and not read) and `train.jsonl`, `val.jsonl`, `test.jsonl`, UTF-8, one example a line, further fields not read:

    {"user": "u7", "id": "t123", "text": "...", "label": ["yes"]}

In a generative task users write: task.json has `"generative": true` and no labels, and a line `"target": "..."` for
`label`. In memory that is an example whose one label is what the user wrote, in a task without labels of its own.

These are the split of kind `leaked`. Others may lie in `splits/<kind>/{train,val,test}.jsonl`, beside one task.json;
what the kinds mean is told in data_scripts/splits.py.

An id names a text: users who saw the same text share its id. Errors name file, line and field but never quote a text,
which may be hate speech.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import InputError

SPLITS = ("train", "val", "test")
KINDS = ("leaked", "no_leak", "strict", "new_users")
MAX_NAME = 80  # bytes of a task's name: files are called by it, each byte escaped by three


@dataclass(frozen=True)
class Example:
    """One text as one user labelled it. `label` holds one name, or several if the task is multi-label; in a generative
    task what the user wrote."""

    user: str
    id: str
    text: str
    label: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What task.json says: all that asking and answering need to know of a task. labels: () if it is generative."""

    name: str
    instruction: str
    labels: tuple[str, ...]
    multi_label: bool = False

    @property
    def generative(self) -> bool:
        return not self.labels


@dataclass(frozen=True)
class Task:
    """Every split maps every user to that user's examples, in file order; only `train` is never empty for a user."""

    name: str
    instruction: str
    labels: tuple[str, ...]
    multi_label: bool
    train: dict[str, list[Example]]
    val: dict[str, list[Example]]
    test: dict[str, list[Example]]

    @property
    def users(self) -> tuple[str, ...]:
        """All users, in order of first appearance in the training file."""
        return tuple(self.train)

    @property
    def generative(self) -> bool:
        return self.header.generative

    @property
    def header(self) -> Header:
        return Header(self.name, self.instruction, self.labels, self.multi_label)

    @property
    def digest(self) -> str:
        """sha256 of what training reads."""
        digest = hashlib.sha256(repr(self.header).encode())
        for user in self.users:
            digest.update(repr(self.examples(user)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def num_train(self, user: str) -> int:
        return len(self.train[user])

    def size(self, user: str) -> int:
        """Characters of the user's training texts: how long they train, to speak of."""
        return sum(len(example.text) for example in self.train[user])

    def examples(self, user: str) -> tuple[list[Example], list[Example]]:
        """The user's training and validation examples."""
        return self.train[user], self.val[user]

    def split(self, name: str) -> dict[str, list[Example]]:
        """The split of that name: `train`, `val` or `test`."""
        if name not in SPLITS:
            raise InputError(f"Task.split: there is no split {name!r}; the splits are {', '.join(SPLITS)}")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def pooled(self, name: str) -> list[Example]:
        """All users' examples of one split in one list, user after user."""
        return [example for examples in self.split(name).values() for example in examples]

    def subset(self, users: Iterable[str]) -> "Task":
        """The same task with these users only, in the order given. Raises InputError on a user who is not in it."""
        users = list(users)
        unknown = [user for user in users if user not in self.train]
        if unknown:
            raise InputError(f"Task.subset: task {self.name!r} has no user {_some(unknown)}")
        splits = [{user: self.split(name)[user] for user in users} for name in SPLITS]
        return Task(self.name, self.instruction, self.labels, self.multi_label, *splits)

    def with_training(self, at_least: int) -> "Task":
        """The same task with only the users who have that many training examples; possibly nobody."""
        return self.subset(user for user in self.users if len(self.train[user]) >= at_least)


# ------------------------------------------------------------------------------------------------ files


def load_task(
    folder: str | Path, kind: str = "leaked", only_complete: bool = False, generative: bool = False
) -> Task:
    """Every example of task.json and three split files, or an InputError of one line: nothing is skipped or repaired.

    Args:
        kind:           which split, of KINDS.
        only_complete:  leave out the users for whom train, val or test is empty, as the published PEFT-U runs do.
        generative:     whether a generative task will do; else it is an error.
    Raises:
        InputError: a missing file, a line that is not JSON, a field that is missing, empty or of another type, a label
            outside task.json, a (user, id) that comes twice in a split or in two splits, a user who is never trained.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise InputError(f"load_task: there is no split of kind {kind!r}; the kinds are {', '.join(KINDS)}")
    if not folder.is_dir():
        raise InputError(f"load_task: no folder {folder}; needed a folder with task.json and train, val, test .jsonl")
    header = _read_header(folder / "task.json")
    header = header if generative else labels_needed(header, folder)
    folder = _split_folder(folder, kind)
    splits: dict[str, dict[str, list[Example]]] = {}
    places: dict[tuple[str, str], str] = {}                # (user, id) -> where it was first read
    for split in SPLITS:
        splits[split] = {}
        path = folder / f"{split}.jsonl"
        lines = _read(path).split(b"\n")
        if lines[-1] == b"":                               # what follows the last line's end, or an empty file
            lines.pop()
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            example = _parse_line(line, place, header)
            key = (example.user, example.id)
            if key in places:
                raise InputError(f"load_task: {place}: user {key[0]!r} already has id {key[1]!r} at {places[key]}; "
                                 "needed every (user, id) once in all splits together")
            places[key] = place
            splits[split].setdefault(example.user, []).append(example)
    if not splits["train"]:
        raise InputError(f"load_task: {folder / 'train.jsonl'} is empty; needed at least one training example")
    if only_complete:
        complete = splits["train"].keys() & splits["val"].keys() & splits["test"].keys()
        splits = {split: {user: own[user] for user in own if user in complete} for split, own in splits.items()}
        if not complete:
            raise InputError(f"load_task: no user of {folder} has examples in train, val and test; needed at least one")
    train = splits["train"]
    untrained = list(dict.fromkeys(user for split in ("val", "test") for user in splits[split] if user not in train))
    if untrained:
        raise InputError(f"load_task: {folder / 'train.jsonl'} has no example of {len(untrained)} user(s) of val or "
                         f"test: {_some(untrained)}; needed at least one each: drop these users or split again")
    val, test = ({user: splits[split].get(user, []) for user in train} for split in ("val", "test"))
    return Task(header.name, header.instruction, header.labels, header.multi_label, train, val, test)


def labels_needed(header: Header, folder: str | Path) -> Header:
    """The header of the task in that folder. Raises InputError if it is generative."""
    if header.generative:
        raise InputError(f"{Path(folder) / 'task.json'}: {header.name!r} is a generative task; needed one of "
                         "labels: only `python -m minipeft.bench peftu` takes tasks in which users write")
    return header


def save_task(task: Task, folder: str | Path) -> None:
    """Writes what `load_task` reads back as an equal task. Makes the folder; replaces the four files if they exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"name": task.name, "instruction": task.instruction}
    header |= {"generative": True} if task.generative else {"labels": task.labels, "multi_label": task.multi_label}
    (folder / "task.json").write_text(json.dumps(header, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for example in task.pooled(split):
                line = {"user": example.user, "id": example.id, "text": example.text}
                line |= {"target": example.label[0]} if task.generative else {"label": example.label}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_new_users(folder: str | Path) -> tuple[str, ...]:
    """The users whom the split of kind `new_users` holds out for cold start.

    `load_task(folder, "new_users")` holds them and the others: an adapter shared by the others may start a new user,
    who is given the first k of their `train` and tested on their `test`.
    """
    path = _split_folder(Path(folder), "new_users") / "new_users.json"
    users = _parse_json(_read(path), str(path))
    if not isinstance(users, list) or not all(isinstance(user, str) for user in users):
        raise InputError(f"load_new_users: {path}: needed a list of user ids")
    return tuple(users)


def load_sample(folder: str | Path) -> tuple[int, int] | None:
    """(users, seed) if the task's users were drawn from more when it was prepared, else None."""
    path = Path(folder) / "task.json"
    sample = _parse_object(_read(path), str(path)).get("sample")
    if sample is None:
        return None
    if not isinstance(sample, dict):
        raise InputError(f"load_task: {path}: \"sample\" is of type {type(sample).__name__}; needed users and seed")
    return _field(sample, "users", int, str(path)), _field(sample, "seed", int, str(path))


def load_is_subset(folder: str | Path) -> bool:
    """Whether the raw files that the task was prepared from hold only a part of the data set."""
    path = Path(folder) / "task.json"
    subset = _parse_object(_read(path), str(path)).get("subset", False)
    if not isinstance(subset, bool):
        raise InputError(f"load_task: {path}: \"subset\" is of type {type(subset).__name__}; needed true or false")
    return subset


def _split_folder(folder: Path, kind: str) -> Path:
    return folder if kind == "leaked" else folder / "splits" / kind


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"load_task: cannot read {path}: {error.strerror}") from None


def _read_header(path: Path) -> Header:
    header = _parse_object(_read(path), str(path))
    name = _field(header, "name", str, str(path))
    if not (name.strip() and name.isprintable() and len(name.encode()) <= MAX_NAME):
        raise InputError(f"load_task: {path}: \"name\" is empty, too long or not printable; needed 1 to {MAX_NAME} "
                         "bytes of visible text")
    instruction = _field(header, "instruction", str, str(path))
    if header.get("generative"):
        return Header(name, instruction, ())
    labels = _strings(header, "labels", str(path))
    multi_label = _field(header, "multi_label", bool, str(path))
    if len(labels) < 2:
        raise InputError(f"load_task: {path}: \"labels\" holds {len(labels)} label(s); needed at least 2")
    return Header(name, instruction, labels, multi_label)


def _parse_line(line: bytes, place: str, task: Header) -> Example:
    fields = _parse_object(line, place)
    user, id_, text = (_field(fields, name, str, place) for name in ("user", "id", "text"))
    for name, value in (("user", user), ("id", id_), ("text", text)):
        if not value.strip():
            raise InputError(f"load_task: {place}: \"{name}\" is empty; needed at least one visible character")
    if task.generative:
        return Example(user, id_, text, (_field(fields, "target", str, place),))
    label = _strings(fields, "label", place)
    if not label or (len(label) > 1 and not task.multi_label):
        needed = "at least one" if task.multi_label else "exactly one, for task.json says multi_label is false"
        raise InputError(f"load_task: {place}: \"label\" holds {len(label)} label(s); needed {needed}")
    unknown = [each for each in label if each not in task.labels]
    if unknown:
        came = repr(unknown[0]) if len(unknown[0]) <= 30 else f"a string of {len(unknown[0])} characters"
        raise InputError(f"load_task: {place}: label {came} is not in task.json; "
                         f"needed one of {_some(task.labels, 12)}")
    return Example(user, id_, text, label)


def _parse_object(data: bytes, place: str) -> dict:
    value = _parse_json(data, place)
    if not isinstance(value, dict):
        raise InputError(f"load_task: {place}: came a {type(value).__name__}; needed a JSON object")
    return value


def _parse_json(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:                  # its msg does not quote the line
        raise InputError(f"load_task: {place}: not JSON ({error.msg}, column {error.colno}); "
                         "needed one JSON object") from None
    except UnicodeDecodeError as error:
        raise InputError(f"load_task: {place}: byte {error.start + 1} is not UTF-8; needed UTF-8") from None
    except (ValueError, RecursionError):
        raise InputError(f"load_task: {place}: JSON that cannot be read (too deep or too large a number)") from None


def _field(fields: dict, name: str, kind: type, place: str):
    if name not in fields:
        raise InputError(f"load_task: {place}: no field \"{name}\"; needed one of type {kind.__name__}")
    value = fields[name]
    if not isinstance(value, kind):
        raise InputError(f"load_task: {place}: \"{name}\" is of type {type(value).__name__}; needed {kind.__name__}")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:                         # no tokenizer and no file takes half a character
            raise InputError(f"load_task: {place}: \"{name}\" holds half of a surrogate pair; "
                             "needed whole characters") from None
    return value


def _strings(fields: dict, name: str, place: str) -> tuple[str, ...]:
    values = _field(fields, name, list, place)
    if not all(isinstance(value, str) and value for value in values):
        raise InputError(f"load_task: {place}: \"{name}\" holds something else than non-empty strings")
    if len(set(values)) < len(values):
        raise InputError(f"load_task: {place}: \"{name}\" names a label twice; needed every label once")
    return tuple(values)


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


# ------------------------------------------------------------------------------------------------ what is known


def user_accuracy(task: Task, predicted: dict[str, list[tuple[str, ...]]]) -> dict[str, float]:
    """Percent of each user's test labels that are predicted exactly, of the users who have test examples.

    Args:
        predicted: for each of those users one label set per test example, in order. Several labels match as a set.
    Raises:
        InputError: a user's predictions are missing or not as many as the test examples, or nobody has any.
    """
    accuracy = {}
    for user, examples in task.test.items():
        answers = predicted.get(user, [])
        if len(answers) != len(examples):
            raise InputError(f"user_accuracy: user {user!r} came with {len(answers)} predictions; "
                             f"needed {len(examples)}, one per test example")
        if examples:
            hits = [set(answer) == set(example.label) for answer, example in zip(answers, examples)]
            accuracy[user] = 100 * sum(hits) / len(hits)
    if not accuracy:
        raise InputError(f"user_accuracy: no user of task {task.name!r} has a test example; needed at least one")
    return accuracy


def macro_accuracy(task: Task, predicted: dict[str, list[tuple[str, ...]]]) -> float:
    """The mean of `user_accuracy` over users, in percent: everybody counts the same."""
    accuracy = user_accuracy(task, predicted)
    return sum(accuracy.values()) / len(accuracy)


def majority_answers(task: Task) -> dict[str, list[tuple[str, ...]]]:
    """Each user's most frequent training label set as the answer to each of their test examples.

    Of equally frequent sets, the one whose labels come first in `task.labels`. The baseline that costs nothing.
    """
    predicted = {}
    for user, examples in task.train.items():
        counts = Counter(tuple(sorted(map(task.labels.index, example.label))) for example in examples)
        best = min(counts, key=lambda label: (-counts[label], label))
        predicted[user] = [tuple(task.labels[index] for index in best)] * len(task.test[user])
    return predicted


def own_majority(task: Task) -> float:
    """Macro accuracy in percent of `majority_answers`."""
    return macro_accuracy(task, majority_answers(task))


def nominal_alpha(task: Task) -> float:
    """alpha = 1 - observed / expected disagreement of the users who labelled the same text, nominal distance.

    Krippendorff 2011, "Computing Krippendorff's alpha-reliability". A unit is a text id with two or more users, over
    all splits; a label set counts as one value. 1 is full agreement, 0 what chance gives. No unit: nan; one value: 1.
    """
    units: dict[str, Counter] = {}
    for split in SPLITS:
        for example in task.pooled(split):
            units.setdefault(example.id, Counter())[frozenset(example.label)] += 1
    units = {id_: counts for id_, counts in units.items() if counts.total() > 1}
    totals = sum(units.values(), Counter())
    num_values = totals.total()
    if num_values == 0:
        return float("nan")
    # Ordered pairs that differ: within a unit each pair weighs 1 / (its values - 1), so that every value weighs 1.
    observed = sum((counts.total() ** 2 - sum(count ** 2 for count in counts.values())) / (counts.total() - 1)
                   for counts in units.values())
    expected = (num_values ** 2 - sum(count ** 2 for count in totals.values())) / (num_values - 1)
    return 1 - observed / expected if expected else 1.0
