"""From a base and a task to questions, and from users' adapters to answers: the Python API and the commands.

    evaluate   a store's users on their own test examples
    predict    (user, text) pairs -> each user's answer, many users in one pass
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from minipeft.engine import label_scores
from minipeft.errors import InputError
from minipeft.labels import Question
from minipeft.methods.head import Head
from minipeft.methods.method import IfThere, Method
from minipeft.methods.stack import Stack
from minipeft.models.bert import Bert
from minipeft.models.classifier import Base, Classifier
from minipeft.models.loading import check_vocabulary, load_model, load_tokenizer
from minipeft.models.t5 import T5
from minipeft.prompts import Prompts
from minipeft.schedule import Adapter, PassConfig
from minipeft.store import Store
from minipeft.tasks.task import Header, Task, load_task, majority_answers, user_accuracy

# ---- A base and its questions --------------------------------------------------------------------------------------


def open_base(model: str | Path | Base | Bert, num_labels: int, pooling: str = "mean") -> Base:
    """What an engine runs on: the base of a folder, or one that load_model gave; an encoder with classes to answer.

    Raises:
        InputError: pooling is not "mean" and the base is no encoder, or has no such pooling.
    """
    if isinstance(model, (str, Path)):
        model = load_model(model)
    if isinstance(model, Bert):
        return Classifier(model, num_labels, pooling)
    if pooling != getattr(model, "pooling", "mean"):
        raise InputError(f"pooling {pooling!r} is for encoders that become classifiers here, not for this "
                         f"{type(model).__name__}")  # fmt: skip
    return model


def prompts_of(base: Base, task: Header) -> Prompts:
    """How this base is asked this task's question, by the tokenizer in the base's own folder."""
    tokenizer, start = tokenizer_of(base)
    return Prompts(task, tokenizer, base.config.max_positions, base.causal, start)


def tokenizer_of(base: Base) -> tuple[Tokenizer, int | None]:
    """The tokenizer in the base's own folder, and an encoder-decoder's start token.

    Raises:
        InputError: the base came from no folder, or another base's tokenizer lies there.
    """
    if base.origin is None:
        raise InputError(f"this {type(base).__name__} came from no folder, so it has no tokenizer; take one from "
                         "load_model")  # fmt: skip
    tokenizer = load_tokenizer(base.origin.folder)
    check_vocabulary(tokenizer, base)
    return tokenizer, base.config.start_token if isinstance(base, T5) else None


def for_base(method: Method, base: Base) -> Method:
    """A method as users of this base train it.

    Default sites that a base has not are left out: GPT-2's MLP has no gate. Chosen ones stay, for `check` to refuse. On
    an encoder there is a head of one's own beside the method.
    """
    sites = getattr(method, "sites", None)
    if isinstance(sites, IfThere):
        method = replace(method, sites=sites.on_base(base.sites))
    return Stack((method, Head())) if isinstance(base, Classifier) and not isinstance(method, (Head, Stack)) else method


def without_head(adapter: Adapter, base: Base) -> Adapter:
    """The adapter without the head that lies beside it on an encoder: other libraries' files have no place for one."""
    if not isinstance(adapter.method, Stack):
        return adapter
    (method,) = (part for part in adapter.method.members if not isinstance(part, Head))
    tensors = adapter.method.tensors(adapter.row, base)
    own = method.tensors(torch.zeros(method.layout(base).row_size), base)  # for their names
    return replace(adapter, method=method, row=method.row({name: tensors[name] for name in own}, base))


def check_splits(task: Task, splits: Sequence[str]) -> None:
    """Raises InputError unless every user has examples in these splits."""
    for split in splits:
        without = [user for user in task.users if not task.split(split)[user]]
        if without:
            raise InputError(f"task {task.name!r}: {len(without)} users have no {split} example, e.g. {without[0]!r}; "
                             "leave them out or split again")


def first_users(task: Task, number: int) -> Task:
    """The task with its first users. Raises InputError if it has not as many."""
    if not 1 <= number <= len(task.users):
        raise InputError(f"--users {number}: task {task.name!r} has {len(task.users)} users")
    return task.subset(task.users[:number])


def pooled(split: dict[str, list[Question]]) -> list[Question]:
    """Everybody's questions, user after user."""
    return [question for questions in split.values() for question in questions]


# ---- Answering -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """How often users' own adapters say what the users said.

    accuracy: user -> percent of their test examples. majority: the same of each user's most frequent training label.
    left_out: users of the task without an adapter in the store, or without a test example.
    num_cut:  test examples whose text lost its end.
    """

    accuracy: dict[str, float]
    majority: dict[str, float]
    left_out: list[str]
    num_cut: int

    @property
    def mean(self) -> float:
        """Mean over users, in percent: everybody counts the same."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def mean_majority(self) -> float:
        return sum(self.majority.values()) / len(self.majority)


def evaluate(
    model: str | Path | Base, store: str | Path | Store, task: str | Path | Task,
    passes: PassConfig | None = None,
) -> Evaluation:
    """Ask each user's adapter for the labels of that user's test examples.

    Raises:
        InputError: the store belongs to another base or task, or no user of the task has an adapter and a test example.
    """
    store = store if isinstance(store, Store) else Store(store)
    task = task if isinstance(task, Task) else load_task(task)
    store.check_task(task.header)
    some = task.subset(user for user in task.users if user in store and task.test[user])
    if not some.users:
        raise InputError(f"no user of task {task.name!r} has both an adapter in {store.folder} and a test example; "
                         "train some first")  # fmt: skip
    asked = [(user, example.text) for user in some.users for example in some.test[user]]
    said = iter(predict(model, store, asked, passes, task.header))
    replies = {user: [next(said) for _ in some.test[user]] for user in some.users}
    return Evaluation(
        user_accuracy(some, {user: [(reply.label,) for reply in own] for user, own in replies.items()}),
        user_accuracy(some, majority_answers(some)),
        [user for user in task.users if user not in some.train],
        sum(reply.was_cut for own in replies.values() for reply in own),
    )


@dataclass(frozen=True)
class Reply:
    """What one user's model says of a text.

    label:   the most likely one. scores: label -> log p(label), nats.
    was_cut: whether the text was too long for the base and lost its end.
    """

    user: str
    label: str
    scores: dict[str, float]
    was_cut: bool = False

    def described(self) -> dict:
        return asdict(self)


def predict(
    model: str | Path | Base, store: str | Path | Store, asked: Iterable[tuple[str, str]],
    passes: PassConfig | None = None, task: Header | None = None,
) -> list[Reply]:
    """One reply to each (user, text), in order: what that user would say, many users in one pass.

    Memory holds passes.slots users' adapters at a time, however many are asked.

    task: what is asked; None: what the store says.

    Raises:
        InputError: the store belongs to another base, or has no adapter of a user.
    """
    store, asked = store if isinstance(store, Store) else Store(store), list(asked)
    task = task or store.known_task()
    base = open_base(model, len(task.labels), store.pooling)
    store.check_base(base)
    prompts, passes = prompts_of(base, task), passes or PassConfig()
    places: dict[str, list[int]] = {}  # user -> where their texts are in `asked`
    for i, (user, _) in enumerate(asked):
        places.setdefault(user, []).append(i)
    for user in places:
        store.about(user)  # before anything is computed
    users, replies = list(places), {}
    for start in range(0, len(users), passes.slots):
        group = users[start : start + passes.slots]
        adapters = dict(zip(group, store.get_many(group, base)))
        virtual = {user: adapter.method.virtual(base)[0] for user, adapter in adapters.items()}
        encoded = {user: [prompts.question(asked[i][1], virtual=virtual[user]) for i in places[user]] for user in group}
        questions = {user: [question for question, _ in own] for user, own in encoded.items()}
        scores = label_scores(base, prompts.labels, adapters, questions, passes)
        for user in group:
            for i, (_, was_cut), row in zip(places[user], encoded[user], scores[user]):  # row: [C]
                own = dict(zip(task.labels, row.tolist()))
                replies[i] = Reply(user, task.labels[row.argmax()], own, was_cut)
    return [replies[i] for i in range(len(asked))]
