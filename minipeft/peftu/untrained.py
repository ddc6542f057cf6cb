"""The baselines of one task, a record each: what answers without an adapter.

    from the labels alone    majorities, others' vote, retrieval (baselines.py)
    the base as it is        zero-shot and few-shot, where it can be told in words what to do
    probes                   logistic regression on its states (probes.py)
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from minipeft.labels import LabelSet
from minipeft.methods.lora import LoRA
from minipeft.peftu.asking import Asking
from minipeft.peftu.baselines import BASELINES, OF_TEXTS
from minipeft.peftu.cells import digest_of
from minipeft.peftu.features import features
from minipeft.peftu.metrics import Scored
from minipeft.peftu.probes import Probed, chosen_labels, probe_scores
from minipeft.peftu.records import UNANSWERED
from minipeft.running import for_base
from minipeft.schedule import Adapter

if TYPE_CHECKING:
    from minipeft.peftu.runner import TaskRun

FEW_SHOT = 4  # examples in the prompt of the few-shot baseline
BASE_MADE = "base"  # what an audit calls the making of a base
MADE_FROM = "training examples that this base was made from, labels and all: it is one model for all, not a stranger"


class Untrained:
    """The baselines of a run, which knows the task, the base and where records go."""

    def __init__(self, run: "TaskRun"):
        self.run, self.task, self.audit, self.asking, self.users = run, run.task, run.audit, run.asking, run.users

    def save_all(self) -> None:
        """A record of each that has none yet."""
        for name, baseline in (OF_TEXTS if self.task.generative else BASELINES).items():
            self._one(name, lambda name=name, baseline=baseline: {
                "answers": baseline(self.task, self.audit), "bytes_per_user": self._bytes_kept(name)})  # fmt: skip
        if self.asking.prompts.instructed or isinstance(self.asking.prompts.labels, LabelSet):
            zero = self.run.protocol.examples if self.run.protocol.zero_shot_examples else 0
            self._one("zero_shot", lambda: self._untrained(self.asking, zero))
        if self.asking.prompts.instructed:  # ours, in either mode: of what was published it would repeat `zero_shot`
            balanced = replace(self.run.protocol, first_labels_only=False)
            asking = Asking(self.asking.base, self.task, balanced, self.audit, self.asking.prompts)
            self._one("few_shot", lambda: self._untrained(asking, FEW_SHOT))
        for name in () if self.task.generative else ("probe_pooled", "probe_user", "probe_pooled_user"):
            self._one(name, lambda name=name: self._probed(name))

    def _one(self, name: str, make: Callable[[], dict]) -> None:
        digest = digest_of([name, asdict(self.run.protocol), self.run.task_digest, self.run.base_digest])
        record = self.run.existing(name, self.run.plan.seeds[0], digest)
        if record is None or (UNANSWERED in record.notes and record.answered is None):  # of before that was recorded
            made = make()
            if any(answer is not None for user in self.users for answer in made["answers"][user]):
                self.run.save(self.run.grading.record(name, "baseline", self.run.plan.seeds[0], digest, **made))
            self.run.show(f"{self.task.name}: {name}: done")

    def _bytes_kept(self, name: str) -> int:
        """What a baseline has to keep of a user: a label number, the labelled texts, or nothing; mean over users."""
        return self._bytes_of_texts() if name == "retrieval" else int(name == "own_majority")

    def _bytes_of_texts(self, most: float = math.inf) -> int:
        """Of a user's labelled texts, or of so many of them of mean length; mean over users. A label is a number.

        The published examples are drawn anew for every question, of all that the user has labelled.
        """
        kept = 0.0
        for user in self.users:
            own = self.task.train[user]
            labels = sum(len(example.label[0].encode()) if self.task.generative else 1 for example in own)
            kept += (labels + sum(len(example.text.encode()) for example in own)) * min(1, most / len(own))
        return round(kept / len(self.users))

    def _untrained(self, asking: Asking, shots: int) -> dict:
        """The base alone: a LoRA changes nothing at its start value."""
        silent = for_base(LoRA(rank=1), self.run.base)
        adapters = {user: Adapter(user, silent, silent.initial_row(self.run.base, 0, user)) for user in self.users}
        questions = asking.questions(shots=shots)["test"]
        made_from = self.audit.report().get(f"fitted_{BASE_MADE}", 0)
        return self.run.replies(adapters, questions) | {
            "bytes_per_user": self._bytes_of_texts(math.inf if shots and asking.protocol.first_labels_only else shots),
            "more_notes": asking.notes_of(shots=shots) | ({MADE_FROM: made_from} if made_from else {})}  # fmt: skip

    def _probed(self, name: str) -> dict:
        probed, scored = self._probes[name], self._probes[name].scores
        answers = {user: chosen_labels(self.task.labels, own, self.task.multi_label) for user, own in scored.items()}
        labels = [(label,) for label in self.task.labels]
        return {"answers": answers, "scored": Scored(scored, labels, self.task.multi_label),
                "trainable": probed.trainable, "bytes_per_user": 4 * probed.trainable,
                "more_notes": self.asking.notes_of(),
                "train_seconds": self.run.lower_seconds + self._features[1] + probed.seconds}  # fmt: skip

    @cached_property
    def _probes(self) -> dict[str, Probed]:
        feature = self.features
        return probe_scores(self.task, self.audit, lambda example: feature[example.text])

    @property
    def features(self) -> dict[str, np.ndarray]:
        """Each distinct text's [width]."""
        return self._features[0]

    @cached_property
    def _features(self) -> tuple[dict[str, np.ndarray], float]:
        """Each distinct text's feature, and the seconds that those of the training texts took."""
        found: dict[str, np.ndarray] = {}
        seconds = 0.0
        for split, of_users in self.asking.questions().items():  # training first
            tokens = {example.text: question.prompt for user, questions in of_users.items()
                      for example, question in zip(self.task.split(split)[user], questions)
                      if example.text not in found}  # fmt: skip
            began = time.perf_counter()
            known = features(self.run.base, tokens.values())
            if split == "train":
                seconds = time.perf_counter() - began
            found |= {text: known[prompt] for text, prompt in tokens.items()}
        return found, seconds
