"""Cold start: accuracy on users whom nothing shared has seen, against the number of their own examples.

    k = 0        `shared` and `shared_user`: a shared adapter trained on the other users; `own_majority`: the others'
    k = 1, 2, 4...   every method trains on the user's first k training examples, all methods and k in one fused pass

New users are those whom the task's split `new_users` names, or a fifth of the users, drawn. Which examples come first
that split says too; else it is drawn, for most files have a user's examples label by label. The k examples are all that
is known of a user, in prompts too, so nothing is left to stop early by: everybody trains for all epochs. Learning rates
are the run's own: new users' validation examples were among those that chose them, and the records say so.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minipeft.errors import InputError
from minipeft.peftu.asking import Asking
from minipeft.peftu.baselines import own_majority
from minipeft.peftu.cells import Cell, Learner
from minipeft.peftu.metrics import Labels, any_hit
from minipeft.peftu.records import load_record, record_path
from minipeft.peftu.runner import SHARED, SHARED_USER, Plan, TaskRun
from minipeft.peftu.tidy import Tidied
from minipeft.randomness import generator
from minipeft.running import pooled
from minipeft.schedule import Adapter
from minipeft.tasks.task import Example, Task
from minipeft.training import EVERYONE

NEW_USERS_SHARE = 0.2  # drawn where the task does not say who is new
MAJORITY = "own_majority"
CHOSEN_WITH = "cold start: new users whose validation examples were among those that chose the learning rate"

Curve = dict[int, dict[str, float]]  # number of own examples -> user -> accuracy, 0 .. 1
Own = dict[str, list[Example]]  # new user -> training examples, in the order in which they become known


def new_users(given: Tidied) -> list[str]:
    """Who is new. InputError if nobody is, or everybody."""
    task = given.task
    new = [user for user in given.new_users or drawn_users(task) if task.test[user]]
    if not new or len(new) == len(task.users):
        raise InputError(f"task {task.name!r}: --cold-start needs new users with test examples, and others")
    return new


def planned_examples(plan: Plan, task: Task, new: Sequence[str]) -> int:
    """Of all of a cold start's training, if every method applies and has the plan's epochs."""
    own = [len(task.train[user]) for user in new]
    of_each = sum(k for k in _sizes(task, new) for number in own if number >= k)
    others = sum(len(task.train[user]) for user in task.users) - sum(own)
    return plan.epochs * (others + of_each * (len(plan.methods) + 1))


def cold_start(run: TaskRun, new: Sequence[str]) -> None:
    """Into the first seed's records of a run that is done: `cold_start`, what has it already left as it is."""
    task, seed = run.task, run.plan.seeds[0]
    every = (*run.methods, SHARED, SHARED_USER, *(() if task.generative else (MAJORITY,)))
    paths = {name: record_path(run.out, task.name, name, seed) for name in every}
    names = [name for name, path in paths.items() if load_record(path).cold_start is None]
    if not names:
        return
    for name, curve in _curves(run, names, new).items():
        record = load_record(paths[name])
        by_user = {k: [values.get(user) for user in record.users] for k, values in curve.items()}
        notes = record.notes if record.chosen_lr is None else record.notes | {CHOSEN_WITH: len(new)}
        run.save(replace(record, cold_start=by_user, notes=notes))
        run.show(f"{task.name}: {name}: cold start done")


def drawn_users(task: Task) -> list[str]:
    """The new users of a task that does not name them."""
    order = generator(0, "", "new users").permutation(len(task.users))
    return [task.users[i] for i in sorted(order[: max(1, round(NEW_USERS_SHARE * len(order)))])]


def in_turn(given: Tidied, new: Sequence[str]) -> Own:
    """In the order of the split `new_users`, which is drawn and says so; else drawn by (0, user)."""
    train = given.task.train
    if given.new_users:
        return {user: train[user] for user in new}
    drawn = {user: generator(0, user, "known first").permutation(len(train[user])) for user in new}
    return {user: [train[user][i] for i in order] for user, order in drawn.items()}


def _curves(run: TaskRun, names: Sequence[str], new: Sequence[str]) -> dict[str, Curve]:
    sizes, own = _sizes(run.task, new), in_turn(run.tidied, new)
    known = {k: _knowing(run, own, k) for k in (0, *sizes)}
    shared = _shared_by_others(run, new)
    tried = [(name, k) for name in names if name not in (SHARED, MAJORITY) for k in sizes]
    found: dict[str, Curve] = {name: {} for name in names}
    if {SHARED, SHARED_USER} & {*names}:
        nothing = _accuracy(run, SHARED, dict.fromkeys(new, run.shared_adapter(shared, planned=True)), known[0])
        found |= {name: {0: nothing} for name in (SHARED, SHARED_USER) if name in names}
    trained = run.train([_cell(run, name, known[k], shared) for name, k in tried])
    for (name, k), each in zip(tried, trained):
        found[name][k] = _accuracy(run, name, each.adapters, known[k])
    if MAJORITY in names:
        found[MAJORITY] = {k: _majority(run, own, k) for k in (0, *sizes)}
    return found


def _sizes(task: Task, new: Sequence[str]) -> list[int]:
    return [2**i for i in range(max(len(task.train[user]) for user in new).bit_length())]


def _knowing(run: TaskRun, own: Own, k: int) -> Asking:
    """How the new users who have as many are asked while only their first k examples are known."""
    task = run.task.subset(user for user in own if len(own[user]) >= k)
    first = {user: own[user][:k] for user in task.users}
    few = replace(task, train=first, val={user: [] for user in task.users})
    return Asking(run.asking.base, few, run.protocol, run.audit, run.asking.prompts)


def _shared_by_others(run: TaskRun, new: Sequence[str]) -> Cell:
    cell, questions = run.cell(SHARED, run.chosen[SHARED], run.plan.seeds[0]), run.questions(SHARED)
    others = ({user: own for user, own in questions[split].items() if user not in new} for split in ("train", "val"))
    return replace(cell, learners=(Learner(EVERYONE, *map(pooled, others)),))


def _cell(run: TaskRun, name: str, known: Asking, shared: Cell) -> Cell:
    cell = run.cell(name, run.chosen[name], run.plan.seeds[0])
    learners = tuple(Learner(user, own, own) for user, own in run.questions(name, known)["train"].items())
    config = replace(cell.config, patience=cell.config.epochs)
    return Cell(name, config, learners, shared if name == SHARED_USER else None)


def _accuracy(run: TaskRun, name: str, adapters: dict[str, Adapter], known: Asking) -> dict[str, float]:
    asked = run.questions(name, known)["test"]
    answers = run.written(adapters, asked)[0] if run.task.generative else run.answers(run.score(adapters, asked))
    return {user: _mean_score(run, user, own) for user, own in answers.items()}


def _mean_score(run: TaskRun, user: str, answers: Sequence[Labels]) -> float:
    truths = [example.label for example in run.task.test[user]]
    return any_hit(answers, truths) if run.protocol.any_hit else float(np.mean(run.graded(answers, truths)))


def _majority(run: TaskRun, own: Own, k: int) -> dict[str, float]:
    """Of a user's first k examples; for k = 0 of everybody who is not new."""
    task = run.task
    others = [example for user in task.users if user not in own for example in task.train[user]]
    known = {user: own[user][:k] if k else others for user in own if len(own[user]) >= k}
    few = replace(task.subset(known), train=known)
    return {user: _mean_score(run, user, answers) for user, answers in own_majority(few, run.audit).items()}
