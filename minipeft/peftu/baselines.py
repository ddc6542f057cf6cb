"""What costs next to nothing, and must be beaten: answers without any training of the base.

    global_majority   the label set that all users' training examples have most often
    own_majority      the one that this user's have most often
    others_vote       what most other users answered for the same text, in their training examples. Known only where
                      a split lets others label a test text: the published `leaked` one
    retrieval         what the user answered for the NEAREST of their own training texts, by BM25

In a generative task there is nothing to vote on: `retrieval` alone answers, what the user wrote to the nearest text.

Of equally many votes the label set that comes first in the task's order wins, unless said otherwise. Each takes an
Audit, through which it reads whatever it learns from, and returns user -> one answer per test example.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import bm25s
import numpy as np

from minipeft.peftu.audit import Audit
from minipeft.peftu.metrics import Labels
from minipeft.tasks.task import Example, Task, majority_answers

NEAREST = 5  # training texts that vote in `retrieval`
Answers = dict[str, list[Labels | None]]  # None: no answer can be known


def global_majority(task: Task, audit: Audit) -> Answers:
    winner = _winner(task, (example.label for example in audit.fitting("global_majority", task.pooled("train"))))
    return {user: [winner] * len(task.test[user]) for user in task.users}


def own_majority(task: Task, audit: Audit) -> Answers:
    return majority_answers(replace(task, train=_known("own_majority", task, audit)))


def others_vote(task: Task, audit: Audit) -> Answers:
    """None where no other user has the text among their training examples. Ties: the commoner label in training."""
    by_text: dict[str, list[Example]] = {}
    commonness: Counter[Labels] = Counter()
    for example in audit.fitting("others_vote", task.pooled("train")):
        by_text.setdefault(example.id, []).append(example)
        commonness[_ordered(task, example.label)] += 1

    def vote(asked: Example) -> Labels | None:
        votes = Counter(_ordered(task, other.label) for other in by_text.get(asked.id, ()) if other.user != asked.user)
        rank = lambda label: (-votes[label], -commonness[label], _numbers(task, label))  # noqa: E731
        return min(votes, key=rank, default=None)

    return {user: [vote(example) for example in task.test[user]] for user in task.users}


def retrieval(task: Task, audit: Audit) -> Answers:
    """Ties: the nearer text's label. Of texts that share no word with any: the user's own majority, or, in a generative
    task, what the user wrote first."""
    of_users, answers = _known("retrieval", task, audit), {}
    if task.generative:
        majority = {user: [known[0].label] * len(task.test[user]) for user, known in of_users.items()}
    else:
        majority = majority_answers(replace(task, train=of_users))
    for user, known in of_users.items():
        index = _index([example.text for example in known])
        answers[user] = [_nearest_vote(task, index, known, example.text) or common
                         for example, common in zip(task.test[user], majority[user])]  # fmt: skip
    return answers


def _known(what: str, task: Task, audit: Audit) -> dict[str, list[Example]]:
    """User -> training examples."""
    return {user: audit.fitting(what, own) for user, own in task.train.items()}


def _index(texts: list[str]) -> bm25s.BM25 | None:
    """None where the texts have no word at all."""
    words = _words(texts)
    if not any(words):
        return None
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return index


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)


def _nearest_vote(task: Task, index: bm25s.BM25 | None, known: list[Example], text: str) -> Labels | None:
    words = [] if index is None else [word for word in _words([text])[0] if word in index.vocab_dict]
    if not words:
        return None
    scores = index.get_scores(words)  # [len(known)]
    nearest = [i for i in np.argsort(-scores, kind="stable")[: 1 if task.generative else NEAREST]
               if scores[i] > 0]  # fmt: skip
    votes = Counter(_ordered(task, known[i].label) for i in nearest)  # in the order of nearness
    return max(votes, key=votes.get, default=None)


def _winner(task: Task, labels: Iterable[Labels]) -> Labels:
    votes = Counter(_ordered(task, label) for label in labels)
    return min(votes, key=lambda label: (-votes[label], _numbers(task, label)))


def _ordered(task: Task, label: Labels) -> Labels:
    """The label set in the task's order, so that equal sets are equal."""
    return label if task.generative else tuple(sorted(label, key=task.labels.index))


def _numbers(task: Task, label: Labels) -> list[int]:
    return [task.labels.index(name) for name in label]


BASELINES = {each.__name__: each for each in (global_majority, own_majority, others_vote, retrieval)}
OF_TEXTS = {"retrieval": retrieval}  # those of a generative task
