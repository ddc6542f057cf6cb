"""From a task's texts to questions in a base's tokens.

Two forms of prompt. A base of our own (default_base.py) knows one task and has a token of its own for "now answer" and
for each label:

    {text tokens}<|answer|>          ->  <|label:yes|>

Any other base gets the instruction, as PEFT-U's prompts do (arXiv:2407.18078):

    {instruction} Text: {text} Label:  ->  " yes"          after the tokenizer's own first token, if it has one (BOS)

An encoder reads the text alone, between its own special tokens, and its head knows the classes by their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet, Question
from minipeft.tasks.task import SPLITS, Example, Task

ANSWER = "<|answer|>"


def label_token(label: str) -> str:
    """The token by which a base of our own says this label."""
    return f"<|label:{label}|>"


@dataclass(frozen=True)
class Encoded:
    """A task in tokens.

    labels: the label set, in the order of task.labels.
    train, val, test: user -> questions, in the order of the task's examples.
    num_cut: examples whose text was shortened (from its end) to fit the base; the prompt's frame is always whole.
    """

    labels: LabelSet | Classes
    train: dict[str, list[Question]]
    val: dict[str, list[Question]]
    test: dict[str, list[Question]]
    num_cut: int


def encode_task(task: Task, tokenizer: Tokenizer, max_tokens: int, speaks: bool = True) -> Encoded:
    """The task's questions in this tokenizer's tokens.

    Args:
        max_tokens: the most tokens a prompt with its longest label may have: the base's positions.
        speaks:     whether the base answers in tokens; an encoder does not.
    Raises:
        InputError: a multi-label task (scored label by label in a later version), labels that begin alike, or an
            instruction that leaves no room for text.
    """
    if task.multi_label:
        raise InputError(f"task {task.name!r} is multi-label; training takes tasks with one label per example")
    framed = tokenizer.encode("a")
    text = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
    opening, closing = (framed.ids[: text[0]], framed.ids[text[-1] + 1 :]) if text else ([], [])
    if not speaks:
        before, after = opening, closing
        labels = Classes(len(task.labels))
    elif tokenizer.token_to_id(ANSWER) is not None:
        before, after = [], [tokenizer.token_to_id(ANSWER)]
        unknown = [label for label in task.labels if tokenizer.token_to_id(label_token(label)) is None]
        if unknown:
            raise InputError(f"this base was made for another task: it has no token for label {unknown[0]!r}")
        labels = LabelSet([[tokenizer.token_to_id(label_token(label))] for label in task.labels])
    else:
        before = [*opening, *_ids(tokenizer, f"{task.instruction} Text: ")]  # what closes a text would end the prompt
        after = _ids(tokenizer, " Label:")
        labels = LabelSet([_ids(tokenizer, f" {label}") for label in task.labels])
    room = max_tokens - len(before) - len(after) - (int(labels.lengths.max()) if speaks else 0)
    if room < 1:
        raise InputError(f"the instruction of task {task.name!r} leaves no room for text in {max_tokens} positions")

    cut = 0
    text_ids: dict[str, tuple[list[int], bool]] = {}

    def question(example: Example) -> Question:
        nonlocal cut
        if example.text not in text_ids:
            ids = _ids(tokenizer, example.text)
            text_ids[example.text] = (ids[:room], len(ids) > room)
        ids, was_cut = text_ids[example.text]
        cut += was_cut
        return Question((*before, *ids, *after), task.labels.index(example.label[0]))

    splits = {
        name: {user: [question(example) for example in examples] for user, examples in task.split(name).items()}
        for name in SPLITS
    }
    return Encoded(labels, splits["train"], splits["val"], splits["test"], cut)


def _ids(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """The text's tokens; what looks like a special token in it is plain text, for a user may have written it."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids
