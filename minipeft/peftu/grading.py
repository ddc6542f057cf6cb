"""Answers to one task's test examples, graded: by the mode's scoring, by ours and by the published one.

Which of them a record's `correct` is, the mode says; every record has all three as far as the task knows them.
"""

from collections.abc import Sequence

import numpy as np

from minipeft.errors import InputError
from minipeft.peftu.baselines import Answers
from minipeft.peftu.metrics import Labels, Scored, label_metrics, scores, text_metrics, text_scores
from minipeft.peftu.protocol import Protocol
from minipeft.peftu.records import UNANSWERED, Record
from minipeft.peftu.scoring import published_reading, published_right
from minipeft.peftu.tidy import Tidied
from minipeft.prompts import JOINED_BY

SILENT = "test examples answered by nothing, for logits were not finite"


class Grading:
    """Of one task, in one mode."""

    def __init__(self, tidied: Tidied, protocol: Protocol):
        self.task, self.notes, self.protocol = tidied.task, tidied.notes, protocol
        self.users = [user for user in self.task.users if self.task.test[user]]  # who can be scored

    def graded(self, answers: Sequence[Labels], truths: Sequence[Labels]) -> list[float]:
        """A score from 0 to 1 of each answer: right or not, Jaccard's measure, or of a text ROUGE-L."""
        return text_scores(answers, truths) if self.task.generative else scores(answers, truths)

    def judged(
        self, said: list[Labels], truths: Sequence[Labels], decoded: list[str] | None = None
    ) -> tuple[list[Labels], list[float], list[float]]:
        """The answers as the mode reads them, their scores by the scoring that it ranks by, and by the published one.

        decoded: what a T5 said in so many words; None: the answers' labels stand for it. The last is [] where users
        write: the published scoring is of labels.
        """
        if self.task.generative:
            return said, self.graded(said, truths), []
        texts = [JOINED_BY.join(answer) for answer in said] if decoded is None else decoded
        right = [float(published_right(text, truth, self.task.labels)) for text, truth in zip(texts, truths)]
        if self.protocol.decoded and decoded is not None:
            said = [published_reading(text, self.task.labels) for text in texts]
        return said, right if self.protocol.any_hit else self.graded(said, truths), right

    def record(
        self, name: str, kind: str, seed: int, digest: str, answers: Answers, *,
        scored: Scored | None = None, decoded: dict[str, list[str]] | None = None, silent: int = 0, **facts,
    ) -> Record:  # fmt: skip
        """The record of these answers to the test examples; those that are None are left out and counted.

        silent: test examples to which the base said nothing, for its logits were not finite. facts: fields of a
        Record, those of training where there was any; more_notes: notes beside the task's own.
        """
        task, notes = self.task, self.notes | facts.pop("more_notes", {})
        known = {user: [i for i, answer in enumerate(answers[user]) if answer is not None] for user in self.users}
        users = [user for user in self.users if known[user]]
        if not users:
            raise InputError(f"task {task.name!r}: {name} has an answer to no test example")
        unknown = sum(len(answers[user]) - len(known[user]) for user in self.users)
        notes |= {what: number for what, number in ((UNANSWERED, unknown), (SILENT, silent)) if number}
        correct, fixed, metrics, paper, all_said, all_truths = [], [], {}, [], [], []
        for user in users:
            truths = [task.test[user][i].label for i in known[user]]
            said = [answers[user][i] for i in known[user]]
            fixed.append(float(np.mean(self.graded(said, truths))))
            said, graded, right = self.judged(said, truths, None if decoded is None else decoded[user])
            if right:
                paper.append(float(np.mean(right)))
            correct.append(graded)
            for metric, value in self._metrics(said, truths).items():
                metrics.setdefault(metric, []).append(value)
            all_said += said
            all_truths += truths
        pooled = self._metrics(all_said, all_truths)
        if scored is not None:
            pooled["ece"] = scored.calibration_error({user: known[user] for user in users}, all_truths)
        facts = {"method": {}, "trainable": 0, "bytes_per_user": 0, "train_flops_per_user": None, "train_seconds": 0.0,
                 "peak_memory_mb": None, "val_loss": [], "movement": {}, "chosen_lr": None, "lr_grid": {}, **facts}
        return Record(task.name, name, kind, seed, digest, users, correct, [len(task.train[user]) for user in users],
                      metrics, pooled, paper or None, notes=notes, fixed_accuracy=fixed,
                      answered=[known[user] for user in users] if unknown else None, **facts)  # fmt: skip

    def _metrics(self, answers: Sequence[Labels], truths: Sequence[Labels]) -> dict[str, float]:
        if self.task.generative:
            return text_metrics(answers, truths)
        return label_metrics(answers, truths, self.task.multi_label)
