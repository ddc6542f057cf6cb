"""Is a label's score the log-probability of its tokens, whatever labels share with each other?"""

import pytest
import torch
from test_recompute import make_decoder

from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.labels import LabelSet, Question
from minipeft.methods.lora import LoRA

LABELS = {
    "one token each": ([[5], [6], [7]], 1, 1),  # label tokens, reads per question, rows per question
    "different lengths": ([[5], [6, 7], [8, 9, 3]], 3, 4),
    "shared stems": ([[5, 6, 7], [5, 6, 8], [5, 9], [4]], 2, 3),
    "one label": ([[5, 6]], 2, 2),
}


@pytest.mark.parametrize("labels, num_reads, num_rows", LABELS.values(), ids=LABELS.keys())
def test_scores_are_sums_of_the_tokens_log_probabilities(labels, num_reads, num_rows):
    """A made-up language model: log p of the next token is a fixed function of all tokens before it."""

    def log_probs(tokens):
        draw = torch.Generator().manual_seed(hash(tokens) % 2**31)
        return torch.log_softmax(torch.randn(10, generator=draw), 0)  # [vocab]

    label_set = LabelSet(labels)
    questions = [Question((1, 2, 3), 0), Question((4,), 0)]
    rows = []
    for question in questions:
        reads = label_set.scoring_reads(question)
        assert len(reads) == num_reads == label_set.reads_per_question
        assert reads[0].tokens == question.prompt and reads[0].num_read == 1
        for number, read in enumerate(reads):
            assert number == read.after  # the prompt, or goes on from it
            tokens = read.tokens if number == 0 else question.prompt + read.tokens
            rows += [log_probs(tokens[: i + 1]) for i in range(len(tokens) - read.num_read, len(tokens))]
    assert len(rows) == 2 * num_rows == 2 * label_set.rows_per_question
    scores = label_set.scores(torch.stack(rows))
    assert scores.shape == (2, len(labels))
    for question, mine in zip(questions, scores):
        for label, score in zip(labels, mine):
            before = [question.prompt + tuple(label[:i]) for i in range(len(label))]
            expected = sum(log_probs(tokens)[token] for tokens, token in zip(before, label))
            torch.testing.assert_close(score, expected)


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: x[i] takes an index from the CPU, ops that want one device for all do not."""

    ONE_DEVICE = ("index_add", "index_copy", "index_select", "index_fill", "gather", "scatter")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "cpu":
            return args[0].as_subclass(torch.Tensor)
        if func.__name__.startswith(cls.ONE_DEVICE) and any(type(arg) is torch.Tensor for arg in args):
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_log_probabilities_on_a_gpu_are_scored_as_on_the_cpu():
    label_set = LabelSet([(5, 6), (5, 7), (8, 7, 6)])
    log_probs = torch.randn(2 * label_set.rows_per_question, 9, generator=torch.Generator().manual_seed(0))
    there = log_probs.as_subclass(OnDevice)
    with pytest.raises(RuntimeError, match="same device"):
        there.index_add_(1, torch.zeros(9, dtype=torch.int64), there)
    scores = label_set.scores(there)
    assert type(scores) is torch.Tensor and torch.equal(scores, label_set.scores(log_probs))


def test_training_reads_the_rows_that_predict_the_right_label():
    labels = LabelSet([[5], [6, 7], [8, 9, 3]])
    assert labels.lengths.tolist() == [1, 2, 3]
    for number, tokens, targets in [(0, (1, 2), (5,)), (1, (1, 2, 6), (6, 7)), (2, (1, 2, 8, 9), (8, 9, 3))]:
        read = labels.training_read(Question((1, 2), number))
        assert (read.tokens, read.num_read, read.targets) == (tokens, len(targets), targets)


@pytest.mark.parametrize("labels", [[[5], [5, 6]], [[5, 6], [5]], [[4], [5, 6], [5, 6]], [[], [5]]])
def test_labels_that_begin_alike_are_refused(labels):
    with pytest.raises(InputError, match="cannot be told apart: the tokens of one begin the other's"):
        LabelSet(labels)


def test_an_engine_scores_labels_as_the_base_would_word_by_word():
    """Labels that go on from one prompt's shared rows, against each label after its whole prompt."""
    labels = LabelSet([[5], [6, 7], [8, 9, 3], [8, 9, 4], [8, 2]])
    draw, model = torch.Generator().manual_seed(0), make_decoder()
    questions = [Question(tuple(torch.randint(60, (n,), generator=draw).tolist()), 0) for n in (1, 7, 30, 16)]
    engine = Engine(model, labels)
    place = engine.admit("a", LoRA(rank=2, sites=("q",)))  # at its start value it changes nothing
    scores = torch.cat([torch.from_numpy(piece) for _, piece in engine.score([(*place, questions)])])
    for question, mine in zip(questions, scores):
        for label, score in zip(labels.labels, mine):
            (logits,) = model.logits([question.prompt + label])
            rows = logits.log_softmax(-1)[len(question.prompt) - 1 : -1]
            expected = sum(row[token] for row, token in zip(rows, label))
            torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)
    rows_of_prompts = sum(len(question.prompt) for question in questions)
    assert engine.totals.tokens == rows_of_prompts + len(questions) * sum(len(stem) for stem in labels.stems)
