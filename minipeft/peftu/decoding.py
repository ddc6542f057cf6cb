"""What a language model says, greedily, to each user's questions through the user's own adapter.

Many users' answers are written at a time, in groups that fit a few training passes' rows. Where the logits of one are
not finite, the users of its group are asked one by one, so that nobody else falls silent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minipeft.engine import Engine
from minipeft.labels import Question
from minipeft.models.classifier import Base
from minipeft.models.generate import NotFinite
from minipeft.prompts import Prompts
from minipeft.schedule import Adapter, PassConfig

WRITTEN_AT_ONCE = 4  # times a training pass's rows: no activations are kept

Group = list[tuple[str, list[Question]]]  # users with some of their questions: what is answered at a time


def decode(
    base: Base,
    prompts: Prompts,
    passes: PassConfig,
    adapters: dict[str, Adapter],
    questions: dict[str, list[Question]],
    max_tokens: int,
) -> tuple[dict[str, list[str]], int]:
    """User -> a text for each question; and to how many nothing was said, for logits were not finite ("" there).

    adapters: user -> adapter, all of one method. questions: of these users at least. max_tokens: of an answer.
    """
    method = next(iter(adapters.values())).method
    speaker = Speaker(base, prompts, Engine(base, prompts.labels, passes), adapters, max_tokens)
    beside, silent = sum(method.virtual(base)) + max_tokens, 0
    found = {user: [] for user in adapters}
    for group in groups({user: questions[user] for user in adapters}, beside, passes):
        for user, said in speaker.said(group):
            silent += said is None
            found[user].append("" if said is None else speaker.text(said))
    return found, silent


def groups(questions: dict[str, list[Question]], beside: int, passes: PassConfig) -> Iterator[Group]:
    """beside: rows of each question but its prompt's."""
    group, used = [], 0
    for user, own in questions.items():
        for question in own:
            rows, new = len(question.prompt) + beside, not group or group[-1][0] != user
            full = new and len(group) == passes.slots
            if group and (full or used + rows > WRITTEN_AT_ONCE * passes.token_budget):
                yield group
                group, used, new = [], 0, True
            if new:
                group.append((user, []))
            group[-1][1].append(question)
            used += rows
    if group:
        yield group


@dataclass(frozen=True)
class Speaker:
    base: Base
    prompts: Prompts
    engine: Engine
    adapters: dict[str, Adapter]
    max_tokens: int

    def said(self, group: Group) -> list[tuple[str, list[int] | None]]:
        """User and tokens of each answer, in order; None where the user's logits are not finite."""
        own = {user: self.adapters[user] for user, _ in group}
        places = [self.engine.admit(user, a.method, a.row, under=a.under, name=user) for user, a in own.items()]
        try:
            asked = [(*place, [q.prompt for q in questions]) for place, (_, questions) in zip(places, group)]
            new = self.engine.generate(asked, self.max_tokens)
            return [(user, tokens) for (user, _), said in zip(group, new) for tokens in said]
        except NotFinite:
            if len(group) == 1:
                return [(group[0][0], None) for _ in group[0][1]]
        finally:
            for place in places:
                self.engine.evict(*place)
        return [each for one in group for each in self.said([one])]

    def text(self, tokens: list[int]) -> str:
        ended = bool(tokens) and tokens[-1] in self.base.stop_tokens
        return self.prompts.tokenizer.decode(tokens[: len(tokens) - ended])
