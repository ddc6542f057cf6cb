"""Cold start: accuracy on users whom nothing shared has seen, against the number of their own examples.

    k = 0        `shared` and `shared_user`: a shared adapter trained on the other users; `own_majority`: the others'
    k = 1, 2, 4...   every method trains on the user's first k training examples, all methods and k in one fused pass;
                     beside them what needs no training: `own_majority`, `retrieval` and `probe_user` of these k

New users are those whom the task's split `new_users` names, or a fifth of the users, drawn. Which examples come first
that split says too; else it is drawn, for most files have a user's examples label by label. The k examples are all that
is known of a user, in prompts too, so nothing is left to stop early by: everybody trains for all epochs. Learning rates
are the run's own: new users' validation examples were among those that chose them, and the records say so.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minipeft.errors import InputError
from minipeft.models.t5 import T5
from minipeft.peftu.asking import Asking
from minipeft.peftu.baselines import Answers, own_majority, retrieval
from minipeft.peftu.cells import Cell, Learner
from minipeft.peftu.probes import chosen_labels, probe
from minipeft.peftu.records import load_record, record_path
from minipeft.peftu.runner import SHARED, SHARED_USER, Plan, TaskRun
from minipeft.peftu.tidy import Tidied
from minipeft.peftu.untrained import Untrained
from minipeft.randomness import generator
from minipeft.running import pooled
from minipeft.schedule import Adapter
from minipeft.tasks.task import Example, Task
from minipeft.training import EVERYONE

NEW_USERS_SHARE = 0.2  # drawn where the task does not say who is new
MAJORITY, RETRIEVAL, PROBE = "own_majority", "retrieval", "probe_user"
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
    every = (*run.methods, SHARED, SHARED_USER, RETRIEVAL, *(() if task.generative else (MAJORITY, PROBE)))
    paths = {name: record_path(run.out, task.name, name, seed) for name in every}
    names = [name for name, path in paths.items() if load_record(path).cold_start is None]
    if not names:
        return
    for name, curve in _curves(run, names, new).items():
        record = load_record(paths[name])
        by_user = {k: [values.get(user) for user in record.users] for k, values in curve.items()}
        chosen = name in run.chosen and len(run.plan.grid(name, True, {})) > 1
        notes = record.notes | ({CHOSEN_WITH: len(new)} if chosen else {})
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
    untrained = [name for name in (MAJORITY, RETRIEVAL, PROBE) if name in names]
    tried = [(name, k) for name in names if name not in (SHARED, *untrained) for k in sizes]
    found: dict[str, Curve] = {name: {} for name in names}
    if {SHARED, SHARED_USER} & {*names}:
        nothing = _accuracy(run, SHARED, dict.fromkeys(new, run.shared_adapter(shared, planned=True)), known[0])
        found |= {name: {0: nothing} for name in (SHARED, SHARED_USER) if name in names}
    trained = run.train([_cell(run, name, known[k], shared) for name, k in tried])
    for (name, k), each in zip(tried, trained):
        found[name][k] = _accuracy(run, name, each.adapters, known[k])
    feature = Untrained(run).features if PROBE in untrained else {}
    for name in untrained:
        found[name] = {k: _untrained(run, name, known[k].task, feature) for k in sizes}
    if MAJORITY in untrained:
        found[MAJORITY] |= {0: _others_majority(run, new)}
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
    place = {learner.user: learner.place for learner in cell.learners}
    learners = tuple(Learner(user, own, own, place[user])
                     for user, own in run.questions(name, known)["train"].items())  # fmt: skip
    config = replace(cell.config, patience=cell.config.epochs)
    return Cell(name, config, learners, shared if name == SHARED_USER else None)


def _accuracy(run: TaskRun, name: str, adapters: dict[str, Adapter], known: Asking) -> dict[str, float]:
    asked, decoded = run.questions(name, known)["test"], {}
    if run.task.generative:
        answers = run.written(adapters, asked)[0]
    else:
        answers = run.answers(run.score(adapters, asked))
        if run.protocol.decoded and isinstance(run.base, T5):
            decoded = run.decoded(adapters, asked)[0]
    return _judged(run, answers, decoded)


def _judged(run: TaskRun, answers: Answers, decoded: dict[str, list[str]] | None = None) -> dict[str, float]:
    """User -> mean score of the answers to the test examples."""
    truths = {user: [example.label for example in run.task.test[user]] for user in answers}
    return {user: float(np.mean(run.grading.judged([*own], truths[user], (decoded or {}).get(user))[1]))
            for user, own in answers.items()}  # fmt: skip


def _untrained(run: TaskRun, name: str, few: Task, feature: dict[str, np.ndarray]) -> dict[str, float]:
    """few: users with those of their training examples that are known. feature: of each text, for the probe."""
    if name != PROBE:
        return _judged(run, (own_majority if name == MAJORITY else retrieval)(few, run.audit))
    answers = {}
    for user, known in few.train.items():
        x, asked = (np.stack([feature[example.text] for example in some]) for some in (known, few.test[user]))
        scores = probe(few, run.audit.fitting(PROBE, known), x).scores(asked)
        answers[user] = chosen_labels(few.labels, scores, few.multi_label)
    return _judged(run, answers)


def _others_majority(run: TaskRun, new: Sequence[str]) -> dict[str, float]:
    """Of everybody who is not new, for who is."""
    task = run.task
    others = [example for user in task.users if user not in new for example in task.train[user]]
    return _judged(run, own_majority(replace(task.subset(new), train=dict.fromkeys(new, others)), run.audit))
