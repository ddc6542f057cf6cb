"""How good answers are: scores from 0 to 1, of one user's test examples.

An answer and a truth are tuples of label names: one name, or several where the task is multi-label. In a generative
task they are tuples of the one text that was written.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from minipeft.errors import InputError

Labels = tuple[str, ...]
BINS = 10
WORD = re.compile(r"[^\W_]+")  # of a written answer


def scores(answers: Sequence[Labels], truths: Sequence[Labels]) -> list[float]:
    """Jaccard's |answer & truth| / |answer | truth| of each example: with one label each, 0 or 1.

    An empty answer scores 0, for no truth is empty.
    """
    return [len({*answer} & {*truth}) / len({*answer} | {*truth}) for answer, truth in zip(answers, truths)]


def any_hit(answers: Sequence[Labels], truths: Sequence[Labels]) -> float:
    """Share of examples where any answered label is right. The published measure: answering all labels gives 1."""
    return _mean(bool({*answer} & {*truth}) for answer, truth in zip(answers, truths))


def exact_set(answers: Sequence[Labels], truths: Sequence[Labels]) -> float:
    """Share of examples where all labels are right and none is missing."""
    return _mean({*answer} == {*truth} for answer, truth in zip(answers, truths))


def f1_scores(answers: Sequence[Labels], truths: Sequence[Labels]) -> tuple[float, float]:
    """(micro, macro) F1 = 2 TP / (2 TP + FP + FN): of all labels together, and the mean over labels.

    Macro counts the labels that occur in an answer or a truth, as scikit-learn does for single labels.
    """
    right, wrong, missed = Counter(), Counter(), Counter()
    for answer, truth in zip(answers, truths):
        right.update({*answer} & {*truth})
        wrong.update({*answer} - {*truth})
        missed.update({*truth} - {*answer})
    f1 = lambda tp, others: 2 * tp / (2 * tp + others)  # noqa: E731
    occurring = sorted({*right, *wrong, *missed})
    return (f1(right.total(), wrong.total() + missed.total()),
            _mean(f1(right[label], wrong[label] + missed[label]) for label in occurring))  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """What a user's test examples were scored.

    of_user:     user -> [n, C]: log p of each answer, or the log-odds of independent ones.
    answers:     C, what each column stands for.
    independent: a column is a label that may be right beside others, a question of its own; else one answer is.
    """

    of_user: dict[str, np.ndarray]
    answers: Sequence[Labels]
    independent: bool

    def calibration_error(self, places: dict[str, list[int]], truths: Sequence[Labels]) -> float:
        """Of these examples of these users, whose truths follow one another, together."""
        asked = np.concatenate([self.of_user[user][own] for user, own in places.items()])
        right = np.array([[{*answer} <= {*truth} if self.independent else {*answer} == {*truth}
                           for answer in self.answers] for truth in truths])  # fmt: skip
        if self.independent:
            p = 1 / (1 + np.exp(-asked))
            p, right = (np.stack(both, -1).reshape(-1, 2) for both in ((1 - p, p), (~right, right)))
        else:
            exp = np.exp(asked - asked.max(1, keepdims=True))
            p = exp / exp.sum(1, keepdims=True)
        said = np.arange(len(p)), p.argmax(1)
        return calibration_error(p[said], right[said])


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: weighted mean |confidence - accuracy| of BINS equal bins (arXiv:1706.04599, eq. 3).

    Of many examples: of few, chance alone makes it large, 0.24 of 7 whose confidence is right.

    Args:
        confidence: [n], the probability of the answer. right: [n], whether it is.
    """
    bins = np.ceil(confidence * BINS).astype(int)  # (0, 0.1] is bin 1
    return float(sum(abs(confidence[bins == each].sum() - right[bins == each].sum()) for each in np.unique(bins))
                 / len(right))


def label_metrics(answers: Sequence[Labels], truths: Sequence[Labels], multi_label: bool) -> dict[str, float]:
    """Everything that labels alone tell: macro_f1, and for a multi-label task any_hit, jaccard, micro_f1, exact."""
    micro, macro = f1_scores(answers, truths)
    if not multi_label:
        return {"macro_f1": macro}
    return {"macro_f1": macro, "micro_f1": micro, "jaccard": _mean(scores(answers, truths)),
            "any_hit": any_hit(answers, truths), "exact": exact_set(answers, truths)}  # fmt: skip


# ---- Written-out answers -------------------------------------------------------------------------------------------


def text_scores(answers: Sequence[Labels], truths: Sequence[Labels]) -> list[float]:
    """ROUGE-L of each example."""
    return [rouge_l(answer, truth) for (answer,), (truth,) in zip(answers, truths)]


def text_metrics(answers: Sequence[Labels], truths: Sequence[Labels]) -> dict[str, float]:
    """What texts are measured by: rouge_l and token_f1."""
    return {"rouge_l": _mean(text_scores(answers, truths)),
            "token_f1": _mean(token_f1(answer, truth) for (answer,), (truth,) in zip(answers, truths))}  # fmt: skip


@lru_cache(1 << 14)
def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed words (Lin 2004), by the library rouge-score.

    Words are runs of letters and digits of any script; the library's own are of a-z and 0-9 alone, and a text of others
    would score 0 against itself. Where neither has a word it is whether they are the same.
    """
    if not any(map(WORD.search, (answer, reference))):
        return float(answer.strip() == reference.strip())
    return rouge().score(reference, answer)["rougeL"].fmeasure


@cache
def rouge():
    """What counts ROUGE-L. InputError if rouge-score is not installed."""
    try:
        from nltk.stem.porter import PorterStemmer  # rouge-score's own stemmer
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("generative tasks are scored by rouge-score: pip install 'minipeft[protocol]'") from None
    return RougeScorer(["rougeL"], tokenizer=_Words(PorterStemmer()))


class _Words:
    """A tokenizer for rouge-score. stemmer: of words of more than three characters, as the library has it."""

    def __init__(self, stemmer):
        self.stem = cache(stemmer.stem)

    def tokenize(self, text: str) -> list[str]:
        return [self.stem(word) if len(word) > 3 else word for word in WORD.findall(text.lower())]


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words in common, as SQuAD does it: lower case, no punctuation, no articles (arXiv:1606.05250, 6.1)."""
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _mean(values) -> float:
    return float(np.mean(list(values)))
