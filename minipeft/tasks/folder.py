"""A task that stays on disk: an index of whose examples lie where, read user by user.

A million users' texts need not fit into memory to train them: a few are resident at a time. The index holds every
user's id and 16 bytes an example. Only what says whose a line is, is looked at when the folder is opened; the rest is
checked when the user's examples are asked for, so that a broken line is its user's affair and nobody else's.
"""

import hashlib
from array import array
from pathlib import Path

import numpy as np

from minipeft.errors import InputError
from minipeft.tasks.task import Example, _field, _parse_line, _parse_object, _read, _read_header, labels_needed

SPLITS = ("train", "val")  # what training reads


class TaskFolder:
    """A prepared task's training and validation examples. `Task` in memory has the same attributes.

    users:  all, in order of first appearance, or the first so many.
    digest: sha256 of what training reads, the number of users included.

    Raises:
        InputError: a file is missing, task.json makes no sense, a line does not say whose it is, or there are not as
            many users.
    """

    def __init__(self, folder: str | Path, num_users: int | None = None):
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; needed a task's folder with task.json and train, val, test .jsonl")
        self.header = labels_needed(_read_header(folder / "task.json"), folder)
        digest, numbers = hashlib.sha256(_read(folder / "task.json")), {}
        self._splits = {split: _Split(folder / f"{split}.jsonl", numbers, digest) for split in SPLITS}
        for split in self._splits.values():
            split.sort(len(numbers))
        if not numbers:
            raise InputError(f"{folder / 'train.jsonl'} is empty; needed at least one training example")
        if num_users is not None and not 1 <= num_users <= len(numbers):
            raise InputError(f"--users {num_users}: task {self.header.name!r} has {len(numbers)} users")
        self.users = tuple(numbers)[:num_users]
        self.digest = f"{digest.hexdigest()} {len(self.users)}"
        self._numbers = numbers

    def num_train(self, user: str) -> int:
        return int(np.diff(self._splits["train"].starts[self._numbers[user] :][:2])[0])

    def size(self, user: str) -> int:
        """Bytes of the user's training lines: how long they train, to speak of."""
        return int(self._splits["train"].sizes[self._numbers[user]])

    def examples(self, user: str) -> tuple[list[Example], list[Example]]:
        """The user's training and validation examples, in file order. Raises InputError for the first broken line."""
        places: dict[str, str] = {}  # id -> where it was first read
        splits = []
        for name in SPLITS:
            splits.append([])
            for place, line in self._splits[name].lines_of(self._numbers[user]):
                example = _parse_line(line, place, self.header)
                if example.user != user:
                    raise InputError(f"{place} was changed while it was in use; start again")
                if example.id in places:
                    raise InputError(f"{place}: user {user!r} already has id {example.id!r} at {places[example.id]}; "
                                     "needed every (user, id) once in all splits together")  # fmt: skip
                places[example.id] = place
                splits[-1].append(example)
        return splits[0], splits[1]


class _Split:
    """Where each user's lines of one file are. numbers: user -> number, grown here; digest: fed with every line."""

    def __init__(self, path: Path, numbers: dict[str, int], digest):
        self.path, owners, offsets = path, array("q"), array("q", [0])
        try:
            self._file = open(path, "rb")
            for number, line in enumerate(self._file, start=1):
                place = f"{path}:{number}"
                user = _field(_parse_object(line, place), "user", str, place)
                if not user.strip():
                    raise InputError(f'{place}: "user" is empty; needed at least one visible character')
                owners.append(numbers.setdefault(user, len(numbers)))
                offsets.append(offsets[-1] + len(line))
                digest.update(line)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        self._owners, self._offsets = np.array(owners), np.array(offsets)  # of each line

    def sort(self, num_users: int) -> None:
        """Once all users are known: starts [users + 1] among the lines in the users' order, sizes [users] in bytes."""
        self._lines = np.argsort(self._owners, kind="stable")
        self.starts = np.searchsorted(self._owners[self._lines], np.arange(num_users + 1))
        lengths = np.diff(self._offsets)
        self.sizes = np.bincount(self._owners, lengths, num_users)
        del self._owners

    def lines_of(self, number: int):
        """(place, line) of this user, in file order."""
        for line in self._lines[self.starts[number] : self.starts[number + 1]].tolist():
            self._file.seek(self._offsets[line])
            yield f"{self.path}:{line + 1}", self._file.readline()
