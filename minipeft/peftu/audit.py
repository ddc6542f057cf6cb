"""No test example is fitted on: every call that fits anything shows its examples here first.

    fitting     training and validation of adapters, examples in prompts, retrieval, votes, features' classifiers
    a leak      an example (user, id) that is in the test split of the task

The published `leaked` split has the same *text* in one user's training and another's test, by design: those are counted
(`texts_others_test`), not refused.
"""

from collections.abc import Iterable
from itertools import chain

from minipeft.tasks.task import Example, Task


class LeakError(AssertionError):
    """A test example was about to be fitted on: an error of ours, never of the input's."""


class Audit:
    """Watches what is fitted on, for one task."""

    def __init__(self, task: Task):
        self.task, self._test = task.name, {(example.user, example.id) for example in task.pooled("test")}
        self._texts = {id_ for _, id_ in self._test}
        self._seen: dict[str, set[tuple[str, str]]] = {}

    def fitting(self, what: str, examples: Iterable[Example]) -> list[Example]:
        """The examples, unchanged, after a look at each. Raises LeakError at a test example."""
        examples = list(examples)
        for example in examples:
            if (example.user, example.id) in self._test:
                raise LeakError(f"{what}: example {example.id!r} of user {example.user!r} is a test example of task "
                                f"{self.task!r}; nothing may be fitted on it")  # fmt: skip
        self._seen.setdefault(what, set()).update((example.user, example.id) for example in examples)
        return examples

    def report(self) -> dict[str, int]:
        """For result.json: how many (user, text) pairs each call fitted on, and texts of them that test somebody."""
        everything = set(chain.from_iterable(self._seen.values()))
        return {
            "test_examples": len(self._test),
            "test_examples_fitted": len(everything & self._test),
            "texts_others_test": len({id_ for _, id_ in everything} & self._texts),
            **{f"fitted_{what}": len(seen) for what, seen in self._seen.items()},
        }
