"""From a model folder and a task to users' adapters, and from adapters to answers: the Python API and the commands.

    train      every user of a task -> a store with an adapter for each
    evaluate   a store's users on their own test examples
    predict    (user, text) pairs -> each user's answer, many users in one pass
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods.head import Head
from minipeft.methods.lora import LoRA
from minipeft.methods.method import IfThere, Method
from minipeft.methods.stack import Stack
from minipeft.models.bert import Bert
from minipeft.models.classifier import Base, Classifier
from minipeft.models.loading import check_vocabulary, load_model, load_tokenizer
from minipeft.models.t5 import T5
from minipeft.prompts import Prompts
from minipeft.schedule import Adapter, Job, PassConfig, TrainConfig
from minipeft.store import Store, adapter_path
from minipeft.tasks.task import Header, Task, load_task, majority_answers, user_accuracy

EVERYONE = "(everyone)"  # the one "user" of a shared adapter
SHARED = {"epochs": 1, "batch_size": 64}  # what is different in training for the one adapter of everybody

Show = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # a title -> a function of (done, total)


def silent(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A `Show` that shows nothing."""
    return nullcontext(lambda done, total: None)


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
    if base.origin is None:
        raise InputError(f"this {type(base).__name__} came from no folder, so it has no tokenizer; take one from "
                         "load_model")  # fmt: skip
    tokenizer = load_tokenizer(base.origin.folder)
    check_vocabulary(tokenizer, base)
    start = base.config.start_token if isinstance(base, T5) else None
    return Prompts(task, tokenizer, base.config.max_positions, base.causal, start)


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
    return [question for questions in split.values() for question in questions]


# ---- Training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training that was checked and can begin: `run` it.

    jobs:    one for each user, those with the most examples first: nobody is left to finish alone.
    shared:  "on": one adapter of all users is trained first and lies under everybody's own; "from": everybody's own
             starts from it; "": neither.
    num_cut: examples whose text did not fit the base and lost its end.
    """

    task: Task
    base: Base
    labels: LabelSet | Classes
    config: TrainConfig
    jobs: list[Job]
    store: Store
    shared: str
    num_cut: int
    passes: PassConfig

    @property
    def method(self) -> Method:
        return self.config.method

    @classmethod
    def plan(
        cls, model: str | Path | Base, task: str | Path | Task, config: TrainConfig, store: str | Path,
        shared: str = "", again: bool = False, passes: PassConfig | None = None, pooling: str = "mean",
    ) -> "Training":  # fmt: skip
        """Everything that can be wrong with the input is found out here; see `train`."""
        if shared not in ("", "on", "from"):
            raise InputError(f"shared is {shared!r}; needed \"on\", \"from\" or \"\"")
        task = task if isinstance(task, Task) else load_task(task)
        check_splits(task, ("val",))
        base = open_base(model, len(task.labels), pooling)
        prompts = prompts_of(base, task.header)
        config = replace(config, method=for_base(config.method, base))
        config.check()
        config.method.check(base)
        virtual = config.method.virtual(base)
        if shared == "on" and any(virtual):
            raise InputError(f"{config.method.title} cannot lie under another adapter, for it has virtual tokens; "
                             "start from a shared one instead, or take a method without")  # fmt: skip
        encoded = prompts.encode(task, virtual[0])
        jobs = [Job(user, encoded.train[user], encoded.val[user], config) for user in task.users]
        jobs.sort(key=lambda job: -len(job.train))
        for user in task.users:
            adapter_path(store, user)  # an id that is too long for a file name is an error now, not after training
        made = Store.make(store, base, task.header)
        there = [user for user in task.users if user in made]
        if there and not again:
            raise InputError(f"{store} has an adapter of {len(there)} of these users already, e.g. {there[0]!r}; name "
                             "another store, or train them --again")  # fmt: skip
        return cls(task, base, encoded.labels, config, jobs, made, shared, encoded.num_cut, passes or PassConfig())

    def run(self, on_finish: Callable[[Adapter], None] | None = None, show: Show = silent) -> None:
        """Train everybody. Each adapter is in the store, and on_finish called with it, as soon as its user is done."""

        def keep(adapter: Adapter) -> None:
            self.store.add(adapter, self.base)
            if on_finish is not None:
                on_finish(adapter)

        jobs = self.jobs
        if self.shared:
            everyone = self.train_shared(show)
            jobs = [replace(job, under=everyone) if self.shared == "on" else replace(job, start=everyone.row)
                    for job in jobs]  # fmt: skip
        self._train(jobs, show, f"training {len(jobs)} users", keep)

    def train_shared(self, show: Show) -> Adapter:
        """The one adapter of all users, on their pooled examples."""
        train, val = (pooled({job.user: split(job) for job in self.jobs})
                      for split in (lambda job: job.train, lambda job: job.val))  # fmt: skip
        job = Job(EVERYONE, train, val, replace(self.config, **SHARED))
        return self._train([job], show, "training one adapter for all")[EVERYONE]

    def _train(self, jobs, show, title, on_finish=None) -> dict[str, Adapter]:
        total, done = sum(len(job.train) * job.config.epochs for job in jobs), 0
        with show(title) as update:

            def count(examples: int) -> None:
                nonlocal done
                done += examples
                update(done, total)

            return Engine(self.base, self.labels, self.passes).train(jobs, on_finish, count)


def train(
    model: str | Path | Base, task: str | Path | Task, method: Method = LoRA(), *, store: str | Path,  # noqa: B008
    shared: str = "", again: bool = False, passes: PassConfig | None = None, pooling: str = "mean",
    on_finish: Callable[[Adapter], None] | None = None, **settings: float,
) -> Store:  # fmt: skip
    """Every user of the task gets an adapter of their own, all trained together in fused passes.

    Args:
        model:     a model folder, a hub id, or what load_model gave.
        task:      a prepared task's folder, or what load_task gave.
        method:    what a user trains, of minipeft.methods; on an encoder a head comes with it.
        store:     the folder where each adapter is kept as its user is done; made if it is not there.
        shared:    "on": first one adapter for all users together, then each user's own on top; "from": each user's own
                   starts from it.
        again:     replace adapters of users who are in the store already.
        pooling:   on an encoder, what a head reads of a text: the "mean" of its hidden states, or the base's "pooler".
        on_finish: called with each adapter once it is in the store.
        settings:  fields of TrainConfig: learning_rate, epochs, batch_size, seed...
    Returns:
        the store.
    Raises:
        InputError: a folder, the task or a setting cannot be used, the store belongs to another base or task, or a user
            is in it already.
    """
    training = Training.plan(model, task, TrainConfig(method=method, **settings), store, shared, again, passes,
                             pooling)  # fmt: skip
    training.run(on_finish)
    return training.store


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

    task: what is asked; None: what the store says.

    Raises:
        InputError: the store belongs to another base, or has no adapter of a user.
    """
    store, asked = store if isinstance(store, Store) else Store(store), list(asked)
    task = task or store.known_task()
    base = open_base(model, len(task.labels), store.pooling)
    adapters = {user: store.get(user, base) for user in dict.fromkeys(user for user, _ in asked)}
    prompts = prompts_of(base, task)
    virtual = {user: adapter.method.virtual(base)[0] for user, adapter in adapters.items()}
    encoded = [prompts.question(text, virtual=virtual[user]) for user, text in asked]
    questions: dict[str, list[Question]] = {user: [] for user in adapters}
    for (user, _), (question, _) in zip(asked, encoded):
        questions[user].append(question)
    scores = label_scores(base, prompts.labels, adapters, questions, passes)
    rows = {user: iter(own) for user, own in scores.items()}

    def reply(user: str, was_cut: bool) -> Reply:
        own = next(rows[user])  # [C]
        return Reply(user, task.labels[own.argmax()], dict(zip(task.labels, own.tolist())), was_cut)

    return [reply(user, was_cut) for (user, _), (_, was_cut) in zip(asked, encoded)]
