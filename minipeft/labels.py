"""Answers: what a question asks for, how it is trained on, and how it is scored.

In classification by a language model a label is a short text, scored exactly:

    score(label) = sum_i log p(label token i | prompt, label tokens before i)

An example becomes a question (prompt tokens, which label is right). Training minimises -log p over the right labels'
tokens (engine.py says how they are averaged); prediction takes the label with the highest score. All labels
share the prompt's rows, and labels that share their first tokens share those rows too: with one-token labels a question
costs one sequence however many labels there are.

    LabelSet   a language model's labels, or sets of labels, as texts
    Texts      a language model writes: what users wrote, as tokens
    Classes    an encoder's head: one of C classes
    Tags       an encoder's head: any of C classes, each by itself
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.batch import Read
from minipeft.errors import InputError


@dataclass(frozen=True)
class Question:
    """One example for a model: the prompt's tokens and the number of the right answer, below `num_answers`."""

    prompt: tuple[int, ...]
    label: int


def written(prompt: tuple[int, ...], answer: tuple[int, ...], start: int | None) -> Read:
    """The sequence in which this answer's tokens are predicted, from the prompt and one another.

    start: an encoder-decoder's start token: it reads the prompt as its inputs; None: a decoder, which goes on from it.
    """
    if start is not None:
        return Read((start, *answer[:-1]), len(answer), answer, inputs=prompt)
    return Read(prompt + answer[:-1], len(answer), answer)


def begun(labels: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The numbers (i, j) of labels of which i's tokens begin j's."""
    return [(i, j) for i, label in enumerate(labels) for j, other in enumerate(labels)
            if i != j and other[: len(label)] == label]  # fmt: skip


class OneOf:
    """Answers that are predicted as one of many: of all tokens, or of all classes."""

    def log_probs(self, logits: Tensor) -> Tensor:
        """Logits of read rows -> log-probabilities of what a target may be, fp32, both [M, vocab] or [M, C]."""
        return F.log_softmax(logits.float(), dim=-1)


class LabelSet(OneOf):
    """The labels of a task as tokens.

    Args:
        labels: token ids of each label. None may be the beginning of another: end them with an end-of-text token.
        start:  an encoder-decoder's start token: questions are its inputs and it writes the labels; None: a decoder,
                which goes on from the question.
    """

    def __init__(self, labels: Sequence[Sequence[int]], start: int | None = None):
        self.labels, self.start = [tuple(label) for label in labels], start
        for i, j in begun(self.labels):
            raise InputError(
                f"labels {i} and {j} of the task cannot be told apart: the tokens of one begin the other's; "
                "end each label with an end-of-text token or rename one"
            )
        # What must be read after the prompt: label[:-1], once for labels that share it.
        stems = sorted({label[:-1] for label in self.labels if len(label) > 1}, key=len, reverse=True)
        self.stems: list[tuple[int, ...]] = []
        for stem in stems:
            if not any(kept[: len(stem)] == stem for kept in self.stems):
                self.stems.append(stem)
        self.reads_per_question = 1 + len(self.stems)
        # Where each label's tokens are predicted: (row among a question's read rows, token). Row 0: the prompt's last.
        firsts = np.cumsum([1] + [len(stem) for stem in self.stems])
        self.rows_per_question = int(firsts[-1])
        rows, tokens, owners = [], [], []
        for number, label in enumerate(self.labels):
            rows.append(0)
            if len(label) > 1:
                home = next(k for k, stem in enumerate(self.stems) if stem[: len(label) - 1] == label[:-1])
                rows += [int(firsts[home]) + i for i in range(len(label) - 1)]
            tokens += label
            owners += [number] * len(label)
        self.rows, self.tokens, self.owners = (torch.tensor(x) for x in (rows, tokens, owners))
        self.lengths = torch.tensor([len(label) for label in self.labels])
        self.num_answers = self.num_scores = len(self.labels)

    def training_read(self, question: Question) -> Read:
        """The sequence that trains on a question: prompt and right label, its label tokens' rows read."""
        return written(question.prompt, self.labels[question.label], self.start)

    def scoring_reads(self, question: Question) -> list[Read]:
        """The sequences from which every label of a question is scored: the prompt, and what goes on from it."""
        first = Read(question.prompt, 1) if self.start is None else Read((self.start,), 1, inputs=question.prompt)
        return [first, *(Read(stem, len(stem), after=1 + k) for k, stem in enumerate(self.stems))]

    def scores(self, log_probs: Tensor, reads: Sequence[Read] = ()) -> Tensor:
        """Log-probabilities of the read rows [questions * rows_per_question, vocab] -> label scores [questions, C].

        The few numbers that labels need are added up on the CPU, in order: there the scores are.
        """
        per_question = log_probs.view(-1, self.rows_per_question, log_probs.shape[-1])
        picked = per_question[:, self.rows, self.tokens].cpu()  # [questions, all label tokens]
        scores = picked.new_zeros(len(picked), len(self.labels))
        return scores.index_add_(1, self.owners, picked)

    def nats(self, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Scores [questions, C] and right answers [questions] -> -log p of each right one, per label token."""
        return -scores[np.arange(len(right)), right] / self.lengths.numpy()[right]


class Texts(OneOf):
    """What users wrote in training and validation examples, as tokens: the answers of a generative task.

    A question's answer has a number, as a label has. Only that one is scored: others are not alternatives to it.

    Args:
        texts: token ids of each, at least one. start: as LabelSet's.
    """

    reads_per_question = num_scores = 1

    def __init__(self, texts: Sequence[Sequence[int]], start: int | None = None):
        self.texts, self.start = [tuple(text) for text in texts], start
        self.num_answers = len(self.texts)

    def training_read(self, question: Question) -> Read:
        """The sequence that trains on a question: prompt and answer, all of the answer's tokens' rows read."""
        return written(question.prompt, self.texts[question.label], self.start)

    def scoring_reads(self, question: Question) -> list[Read]:
        """The same one."""
        return [self.training_read(question)]

    def scores(self, log_probs: Tensor, reads: Sequence[Read]) -> Tensor:
        """Log-probabilities of these reads' rows [all answers' tokens, vocab] -> log p per token of each [reads, 1]."""
        targets = torch.tensor([token for read in reads for token in read.targets], device=log_probs.device)
        picked = log_probs.gather(1, targets[:, None]).flatten().cpu()
        return torch.stack([own.mean() for own in picked.split([read.num_read for read in reads])])[:, None]

    def nats(self, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Scores [questions, 1] -> -log p of each answer, per token; `right` is not read, for no other is scored."""
        return -scores[:, 0]


class Classes(OneOf):
    """The labels of a task as classes of an encoder's head (classifier.py): a LabelSet for bases that do not speak."""

    reads_per_question = rows_per_question = 1

    def __init__(self, num_classes: int):
        self.labels = list(range(num_classes))
        self.num_answers = self.num_scores = num_classes

    def training_read(self, question: Question) -> Read:
        return Read(question.prompt, 1, (question.label,))

    def scoring_reads(self, question: Question) -> list[Read]:
        return [Read(question.prompt, 1)]

    def scores(self, log_probs: Tensor, reads: Sequence[Read] = ()) -> Tensor:
        """[questions, C], as they are."""
        return log_probs

    def nats(self, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Scores [questions, C] and right classes [questions] -> -log p of each right one."""
        return -scores[np.arange(len(right)), right]


class Tags:
    """The labels of a multi-label task as classes of an encoder's head, each of which applies or not.

        p(class c) = sigmoid(z_c) = softmax over (0, z_c)          loss: binary cross-entropy, averaged over classes

    An answer is a set of classes; its number has bit c set where class c is in it (`number`).
    """

    reads_per_question = rows_per_question = 1

    def __init__(self, num_classes: int):
        self.labels = list(range(num_classes))
        self.num_answers, self.num_scores = 2**num_classes, num_classes

    @staticmethod
    def number(classes: Sequence[int]) -> int:
        return sum(1 << each for each in set(classes))

    def training_read(self, question: Question) -> Read:
        """One row with C targets: of each class 2 c + whether it applies."""
        return Read(question.prompt, 1, tuple(2 * c + (question.label >> c & 1) for c in self.labels))

    def scoring_reads(self, question: Question) -> list[Read]:
        return [Read(question.prompt, 1)]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Logits [M, C] -> log p that a class does not apply and that it does, side by side: [M, 2 C] fp32."""
        logits = logits.float()
        return F.log_softmax(torch.stack([torch.zeros_like(logits), logits], dim=-1), dim=-1).flatten(1)

    def scores(self, log_probs: Tensor, reads: Sequence[Read] = ()) -> Tensor:
        """[questions, C]: the log-odds of each class. Above 0 it is more likely than not."""
        absent, present = log_probs.unflatten(1, (-1, 2)).unbind(-1)
        return present - absent

    def nats(self, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Scores [questions, C] and right answers [questions] -> their binary cross-entropy, averaged over classes."""
        applies = right[:, None] >> np.arange(len(self.labels)) & 1  # [questions, C]
        return np.logaddexp(0, np.where(applies, -scores, scores)).mean(1)


Answerable = LabelSet | Texts | Classes | Tags  # how a base answers a task
