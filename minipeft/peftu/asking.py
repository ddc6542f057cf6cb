"""How users' examples become questions under a protocol: with the user's own examples in the prompt, and how long.

    {instruction} Text: {example} Label: {its label}. ... Text: {text} Label:

In a generative task "Answer:" stands for "Label:" and no full stop follows.
Only for bases that are told in words what to do; an encoder reads the text alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from minipeft.labels import Question
from minipeft.methods.method import Method
from minipeft.models.classifier import Base
from minipeft.peftu.audit import Audit
from minipeft.peftu.protocol import Protocol
from minipeft.prompts import ANSWER_TOKENS, JOINED_BY, Prompts, token_ids
from minipeft.randomness import generator
from minipeft.running import tokenizer_of
from minipeft.tasks.task import SPLITS, Example, Task

PUBLISHED_LENGTH = 512  # tokens of a prompt, where the base has no limit of its own
PUBLISHED_SEED = 42
ANSWERS_CUT = f"different answers of training and validation cut after {ANSWER_TOKENS} tokens"

Shot = tuple[str, str]  # a text and its label, as a prompt shows them


@dataclass(frozen=True)
class Asked(Question):
    """A question that says which example of the task it asks about, for whoever trains on it to show to an Audit."""

    user: str
    id: str


Questions = dict[str, dict[str, list[Asked]]]  # split -> user -> questions, in the order of the task's examples


class Asking:
    """How one base is asked one task's questions under a protocol.

    task:  examples whose labels are in the task's order.
    prompts: of an Asking whose task had all the examples; then this one's task may have fewer, and answers as there.
    notes: (virtual tokens, examples in the prompt) -> what was cut: reason -> how many examples.
    """

    def __init__(self, base: Base, task: Task, protocol: Protocol, audit: Audit, prompts: Prompts | None = None):
        self.base, self.task, self.protocol, self.audit = base, task, protocol, audit
        self.prompts = prompts or self._prompts()
        self.notes: dict[tuple[int, int], dict[str, int]] = {}
        self._asked: dict[tuple[int, int], Questions] = {}

    def _prompts(self) -> Prompts:
        base, task = self.base, self.task
        known = [*task.pooled("train"), *task.pooled("val")]
        order = None if task.generative else lambda label: [task.labels.index(name) for name in label]
        sets = sorted({example.label for example in self.audit.fitting("answers", known)}, key=order)
        tokenizer, start = tokenizer_of(base)
        stops = (token for token in getattr(base, "stop_tokens", ()) if token < base.config.vocab_size)
        stop = next(stops, None)
        return Prompts(task.header, tokenizer, base.config.max_positions, base.causal, start, sets, stop)

    def questions(self, method: Method | None = None, shots: int = 0) -> Questions:
        """Every example's question, for users who train by this method, with this many examples in the prompt.

        Computed once for each number of virtual tokens and of examples.
        """
        virtual, shots = way = self._way(method, shots)
        if way not in self._asked:
            self._cut = self.notes[way] = {}
            self._asked[way] = {name: self._split(name, virtual, shots) for name in SPLITS}
        return self._asked[way]

    def notes_of(self, method: Method | None = None, shots: int = 0) -> dict[str, int]:
        """What was cut of the questions that are asked in this way."""
        self.questions(method, shots)
        cut = self.prompts.num_cut_answers
        return self.notes[self._way(method, shots)] | ({ANSWERS_CUT: cut} if cut else {})

    def _way(self, method: Method | None, shots: int) -> tuple[int, int]:
        """Virtual tokens that take positions from the prompt, where the base has only so many; and examples."""
        virtual = method.virtual(self.base)[0] if method and self.prompts.max_tokens else 0
        return virtual, shots if self.prompts.instructed else 0

    def _split(self, name: str, virtual: int, shots: int) -> dict[str, list[Question]]:
        found = {}
        for user, examples in self.task.split(name).items():
            known = self.audit.fitting("prompts", self.task.train[user]) if shots else []
            drawn = self._drawn(user, known, examples, shots)
            found[user] = [self._question(example, own, name, virtual) for example, own in zip(examples, drawn)]
        return found

    def _drawn(self, user: str, known: Sequence[Example], asked: Sequence[Example], shots: int) -> list[list[Shot]]:
        """The examples in each prompt."""
        if not shots:
            return [[] for _ in asked]
        if self.protocol.first_labels_only:
            return published_examples(known, asked, shots, self.protocol.own_example)
        return [balanced_examples(user, known, None if self.protocol.own_example else example, shots)
                for example in asked]  # fmt: skip

    def _question(self, example: Example, shots: Sequence[Shot], split: str, virtual: int) -> Asked:
        label = 0 if split == "test" else self.prompts.number(example.label)  # what nobody may read is not there
        if not shots and not (self.protocol.cut_query and self.prompts.instructed):
            question, was_cut = self.prompts.question(example.text, label, virtual)
            self._note("texts shortened", was_cut)
            prompt = question.prompt
        else:
            prompt = self._prompt(example.text, shots, virtual)
        return Asked(prompt, label, example.user, example.id)

    def _prompt(self, text: str, shots: Sequence[Shot], virtual: int) -> tuple[int, ...]:
        prompts, protocol = self.prompts, self.protocol
        limit = prompts.max_tokens or PUBLISHED_LENGTH
        room = limit - virtual - (prompts.spoken if prompts.labels.start is None else 0) - len(prompts.opening)
        ids = lambda text: token_ids(prompts.tokenizer, text)  # noqa: E731
        frame = f"{self.task.instruction} "
        if protocol.cut_query:
            closing = [] if prompts.labels.start is None else prompts.closing
            whole = ids(f"{frame}{self._shown(shots)}Text: {text} Label:")
            self._note("queries cut", len(whole) > room - len(closing))
            return (*prompts.opening, *whole[: room - len(closing)], *closing)
        room -= len(prompts.after)
        query, used = ids(text), len(shots)
        while used and len(ids(f"{frame}{self._shown(shots[:used])}Text: ")) + len(query) > room:
            used -= 1
        self._note("prompts with fewer examples", used < len(shots))
        if not used:
            question, was_cut = prompts.question(text, 0, virtual)
            self._note("texts shortened", was_cut)
            return question.prompt
        return (*prompts.opening, *ids(f"{frame}{self._shown(shots[:used])}Text: "), *query, *prompts.after)

    def _shown(self, shots: Sequence[Shot]) -> str:
        form = "Text: {} Answer: {} " if self.task.generative else "Text: {} Label: {}. "
        return "".join(form.format(*shot) for shot in shots)

    def _note(self, what: str, happened: bool) -> None:
        if happened:
            self._cut[what] = self._cut.get(what, 0) + 1


def balanced_examples(user: str, known: Sequence[Example], asked: Example | None, shots: int) -> list[Shot]:
    """As many of each label set as of any other, in rounds over the sets, each round in an order of its own.

    A fixed order would say which label comes next. A function of the user and the training examples alone, but for the
    example that is asked about: it is never shown.
    """
    draw, by_label = generator(0, user, "examples in prompts"), {}
    for i in draw.permutation(len(known)):
        if asked is None or known[i].id != asked.id:
            by_label.setdefault(known[i].label, []).append((known[i].text, JOINED_BY.join(known[i].label)))
    rounds = [[own[i] for own in by_label.values() if i < len(own)]
              for i in range(max(map(len, by_label.values()), default=0))]  # fmt: skip
    return [each[i] for each in rounds for i in draw.permutation(len(each))][:shots]


def published_examples(
    known: Sequence[Example], asked: Sequence[Example], shots: int, own_example: bool
) -> list[list[Shot]]:
    """As preprocess/load_dataset.py draws them: one of every label in alphabetical order, of which `shots` stay.

    So it did when the paper came out; its last commit, of December 2024, draws `shots` of every label instead. A
    training example may be drawn for its own prompt there, because a list is compared with a string.
    """
    draw, labels = random.Random(PUBLISHED_SEED), sorted({label for example in known for label in example.label})
    found = []
    for query in asked:
        own: list[Shot] = []
        for label in labels:
            having = [e.text for e in known if label in e.label and (own_example or e.id != query.id)]
            own += [(text, label) for text in draw.sample(having, min(1, len(having)))]
        found.append(own[:shots])
    return found
