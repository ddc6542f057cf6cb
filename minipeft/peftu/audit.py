"""No test example is fitted on: every call that fits anything shows its examples here first.

    fitting     training and validation of adapters, examples in prompts, retrieval, votes, features' classifiers
    a leak      an example (user, id) that is in the test split of the task

The published `leaked` split has the same *text* in one user's training and another's test, by design: those are counted
(`texts_others_test`), not refused. So are test examples whose text the same user has labelled in training or validation
too, under another id (`own_texts_test`).
"""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.peftu.records import read_object
from minipeft.tasks.task import Task

Some = TypeVar("Some")  # has a `user` and an `id`: an example, or a question about one


class LeakError(AssertionError):
    """A test example was about to be fitted on: an error of ours, never of the input's."""


class Audit:
    """Watches what is fitted on, for one task.

    kept: the file that `keep` writes, so that a run that was killed still knows what it fitted on.
    """

    def __init__(self, task: Task, kept: Path | None = None):
        self.task, self._test = task.name, {(example.user, example.id) for example in task.pooled("test")}
        self.kept, self._earlier = kept, read_object(kept) if kept is not None and kept.exists() else {}
        if not all(isinstance(count, int) for count in self._earlier.values()):
            raise InputError(f"{kept} is damaged: needed whole numbers; delete it and run again")
        self._texts = {id_ for _, id_ in self._test}
        known = {(example.user, example.text) for split in ("train", "val") for example in task.pooled(split)}
        self._twice = sum((example.user, example.text) in known for example in task.pooled("test"))
        self._seen: dict[str, set[tuple[str, str]]] = {}

    def fitting(self, what: str, examples: Iterable[Some]) -> list[Some]:
        """Examples, or questions about them, unchanged, after a look at each. Raises LeakError at a test example."""
        examples = list(examples)
        for example in examples:
            if (example.user, example.id) in self._test:
                raise LeakError(f"{what}: example {example.id!r} of user {example.user!r} is a test example of task "
                                f"{self.task!r}; nothing may be fitted on it")  # fmt: skip
        self._seen.setdefault(what, set()).update((example.user, example.id) for example in examples)
        return examples

    def report(self) -> dict[str, int]:
        """For result.json: how many (user, text) pairs each call fitted on, and texts of them that test somebody.

        `test_examples_fitted` is 0 in every result there is, for `fitting` stops a run at the first: it says that a
        watch was kept. Of an earlier run and this one the larger number: both fit on the same examples.
        """
        everything = set(chain.from_iterable(self._seen.values()))
        found = {
            "test_examples": len(self._test),
            "test_examples_fitted": len(everything & self._test),
            "texts_others_test": len({id_ for _, id_ in everything} & self._texts),
            "own_texts_test": self._twice,
            **{f"fitted_{what}": len(seen) for what, seen in self._seen.items()},
        }
        return {what: max(each.get(what, 0) for each in (found, self._earlier)) for what in found | self._earlier}

    def keep(self) -> None:
        write_file(self.kept, (json.dumps(self.report()) + "\n").encode())
