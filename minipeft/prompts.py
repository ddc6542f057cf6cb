"""From a task's texts to questions in a base's tokens.

Three forms of prompt. A base of our own (default_base.py) knows one task and has a token of its own for "now answer"
and for each label:

    {text tokens}<|answer|>          ->  <|label:yes|>

Any other base gets the instruction, as PEFT-U's prompts do (arXiv:2407.18078):

    {instruction} Text: {text} Label:  ->  " yes"          after the tokenizer's own first token, if it has one (BOS)

A T5 reads the same as its input, and both that and the label it writes end with the tokenizer's last token. An encoder
reads the text alone, between its own special tokens, and its head knows the classes by their number.

Where an example has several labels an encoder's head says of each whether it applies, and a language model writes them
as PEFT-U's targets do, "anger, fear": its answers are the label sets it is given, each scored as one text. A decoder's
end with a full stop, as labels do in a prompt's examples, so that no set begins another; single
labels do too where one of them begins another.

In a generative task a language model writes: "Answer:" stands for "Label:", and what users wrote ends with the base's
own end of text, so that the base learns to stop. Of what is longer than ANSWER_TOKENS tokens, the end included, that
many are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from minipeft.errors import InputError
from minipeft.labels import Answerable, Classes, LabelSet, Question, Tags, Texts, begun
from minipeft.tasks.task import SPLITS, Example, Header, Task

ANSWER = "<|answer|>"
REMEMBERED = 4096  # texts in tokens: users share texts
JOINED_BY = ", "  # the labels of one answer
ANSWER_TOKENS = 128  # at most, of an answer that is written


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

    labels: Answerable
    train: dict[str, list[Question]]
    val: dict[str, list[Question]]
    test: dict[str, list[Question]]
    num_cut: int


class Prompts:
    """How one base is asked one task's question: what stands around a text, and the labels in tokens.

    Args:
        task:       its name, instruction and labels.
        max_tokens: the most tokens a prompt with its longest label may have: the base's positions; None: any number.
        speaks:     whether the base answers in tokens; an encoder does not.
        start:      an encoder-decoder's start token; None for other bases.
        sets:       the label sets that can be answered, of a multi-label task; an encoder can answer any. Of a
                    generative one what users wrote, all that a question is asked about.
        stop:       the token by which a decoder ends a text, where answers are written.
    Raises:
        InputError: a multi-label task without sets, labels that begin alike, or a base that cannot write.
    """

    def __init__(
        self, task: Header, tokenizer: Tokenizer, max_tokens: int | None, speaks: bool = True,
        start: int | None = None, sets: Sequence[tuple[str, ...]] | None = None, stop: int | None = None,
    ):  # fmt: skip
        if task.multi_label and sets is None:
            raise InputError(f"task {task.name!r} is multi-label; training takes tasks with one label per example")
        if task.generative and sets is None:
            raise InputError(f"task {task.name!r} is generative; only `minipeft.bench peftu` takes such tasks")
        self.task, self.tokenizer, self.max_tokens = task, tokenizer, max_tokens
        self._ask = lru_cache(REMEMBERED)(self.question)
        self.sets = list(sets) if task.multi_label or task.generative else [(label,) for label in task.labels]
        self._numbers = {labels: i for i, labels in enumerate(self.sets)}
        self.num_cut_answers = 0
        framed = tokenizer.encode("a")
        text = [i for i, special in enumerate(framed.special_tokens_mask) if not special]
        opening, closing = (framed.ids[: text[0]], framed.ids[text[-1] + 1 :]) if text else ([], [])
        self.opening, self.closing = opening, closing
        if task.generative and (not speaks or tokenizer.token_to_id(ANSWER) is not None):
            raise InputError(f"task {task.name!r} is generative; an encoder, or a base of our own, cannot write its "
                             "answers: take a decoder or a T5")  # fmt: skip
        if task.generative:
            self.before = [*opening, *token_ids(tokenizer, f"{task.instruction} Text: ")]
            self.after = [*token_ids(tokenizer, " Answer:"), *(() if start is None else closing)]
            self.labels = Texts([self._answer(text, start, stop) for (text,) in self.sets], start)
        elif not speaks:
            self.before, self.after = opening, closing
            self.labels = (Tags if task.multi_label else Classes)(len(task.labels))
        elif tokenizer.token_to_id(ANSWER) is not None:
            if task.multi_label:
                raise InputError(f"task {task.name!r} is multi-label; a base of our own says one label, take another")
            self.before, self.after = [], [tokenizer.token_to_id(ANSWER)]
            unknown = [label for label in task.labels if tokenizer.token_to_id(label_token(label)) is None]
            if unknown:
                raise InputError(f"this base was made for another task: it has no token for label {unknown[0]!r}")
            self.labels = LabelSet([[tokenizer.token_to_id(label_token(label))] for label in task.labels], start)
        else:
            self.before = [*opening, *token_ids(tokenizer, f"{task.instruction} Text: ")]
            self.after = token_ids(tokenizer, " Label:")
            texts = [JOINED_BY.join(labels) for labels in self.sets]
            if start is None:  # what closes a text would end the prompt
                spoken = [token_ids(tokenizer, f" {text}") for text in texts]
                if task.multi_label or begun(spoken):
                    spoken = [token_ids(tokenizer, f" {text}.") for text in texts]
                self.labels = LabelSet(spoken)
            else:
                self.after = [*self.after, *closing]
                self.labels = LabelSet([[*token_ids(tokenizer, text), *closing] for text in texts], start)

    def _answer(self, text: str, start: int | None, stop: int | None) -> Sequence[int]:
        """What is written, and its end unless it was cut. InputError where the base knows none."""
        end = [stop] if start is None else self.closing
        if end in ([None], []):
            raise InputError(f"task {self.task.name!r} is generative, and this base's folder names no end of text: add "
                             "eos_token_id to a decoder's config.json, an end to a T5's tokenizer")  # fmt: skip
        ids = [*token_ids(self.tokenizer, f" {text}" if text and start is None else text), *end]
        self.num_cut_answers += len(ids) > ANSWER_TOKENS
        return ids[:ANSWER_TOKENS]

    @property
    def instructed(self) -> bool:
        """Whether the base is told in words what to do, as a base that many tasks share is."""
        return isinstance(self.labels, (LabelSet, Texts)) and self.tokenizer.token_to_id(ANSWER) is None

    @property
    def spoken(self) -> int:
        """Tokens that an answer may have, beside its prompt."""
        if isinstance(self.labels, Texts):
            return ANSWER_TOKENS
        return int(self.labels.lengths.max()) if isinstance(self.labels, LabelSet) else 0

    def number(self, labels: tuple[str, ...]) -> int:
        """The number of an answer, as Question has it. InputError if it is none of the sets that can be answered."""
        if isinstance(self.labels, Tags):
            return Tags.number([self.task.labels.index(label) for label in labels])
        try:
            return self._numbers[labels]
        except KeyError:
            raise InputError(f"task {self.task.name!r}: the label set {', '.join(labels)} is none of those that can be "
                             "answered") from None  # fmt: skip

    def question(self, text: str, label: int = 0, virtual: int = 0) -> tuple[Question, bool]:
        """The question about a text, and whether the text was cut.

        Args:
            label:   number of the right label, where it is known: scoring does not read it.
            virtual: virtual tokens that the user's method puts before the prompt: they need positions too.
        Raises:
            InputError: the instruction leaves no room for text.
        """
        ids, room = token_ids(self.tokenizer, text), None
        if self.max_tokens is not None:
            room = self.max_tokens - virtual - len(self.before) - len(self.after) - self.spoken
            if room < 1:
                beside = f" beside {virtual} virtual tokens" if virtual else ""
                raise InputError(f"the instruction of task {self.task.name!r} leaves no room for text in "
                                 f"{self.max_tokens} positions{beside}")  # fmt: skip
        return Question((*self.before, *ids[:room], *self.after), label), len(ids) > len(ids[:room])

    def encode(self, task: Task, virtual: int = 0) -> Encoded:
        """All questions of a task with these labels. virtual: see `question`."""
        asked = [{user: self.questions(examples, virtual) for user, examples in task.split(name).items()}
                 for name in SPLITS]  # fmt: skip
        num_cut = sum(was_cut for split in asked for _, was_cut in split.values())
        return Encoded(self.labels, *({user: own for user, (own, _) in split.items()} for split in asked), num_cut)

    def questions(self, examples: Sequence[Example], virtual: int = 0) -> tuple[list[Question], int]:
        """The questions of some examples with these labels, and how many texts were cut. virtual: see `question`."""
        asked = [self._ask(example.text, self.number(example.label), virtual) for example in examples]
        return [question for question, _ in asked], sum(was_cut for _, was_cut in asked)


def encode_task(task: Task, tokenizer: Tokenizer, max_tokens: int | None, speaks: bool = True) -> Encoded:
    """The task's questions in the tokens of a decoder or, if it does not speak, an encoder; see `Prompts`."""
    return Prompts(task.header, tokenizer, max_tokens, speaks).encode(task)


def token_ids(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """The text's tokens; what looks like a special token in it is plain text, for a user may have written it."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids
