"""Every user of a task gets an adapter of their own: trainings that may be long, interrupted, on several processes.

    Training.plan    everything that can be wrong with the input is found out, nothing is trained
    Training.run     users wait, are resident, leave into the store; what is under way is saved now and then
    train            both, from Python

Memory holds the base, the resident users and the examples of those alone; a user who cannot be trained leaves with a
reason, and nobody else's adapter is another for it.
"""

import errno
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.log import Log
from minipeft.memory import fitted
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.models.classifier import Base
from minipeft.prompts import Prompts
from minipeft.ranks import Ranks, share_out
from minipeft.resume import FORMAT, State, packed, unpacked
from minipeft.running import for_base, open_base, prompts_of
from minipeft.schedule import Adapter, Fault, Job, PassConfig, Standing, TrainConfig
from minipeft.store import Store, key_of
from minipeft.tasks.folder import TaskFolder
from minipeft.tasks.task import Task

EVERYONE = "(everyone)"  # the one "user" of a shared adapter
SHARED = {"epochs": 1, "batch_size": 64}  # what is different in training for the one adapter of everybody
SAVE_MINUTES = 10.0  # between two savings of what is under way
PROBED = 8  # users whose first minibatches tell how much memory a pass takes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a full disk, quota or file
MINUTE = 60.0  # seconds between two lines of statistics in the log

Show = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # a title -> a function of (done, total)


def silent(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A `Show` that shows nothing."""
    return nullcontext(lambda done, total: None)


# ---- Stopping in order ---------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and what was under way is saved. signum: which of the two."""

    def __init__(self, signum: int):
        super().__init__()
        self.signum = signum


class Stop:
    """Whether somebody asked to stop: signum, 0 if nobody did."""

    signum = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM only make a note, for the next pass boundary; the second one acts as ever.

    Signals that are ignored stay so (a command in the background), and threads other than the main one get none.
    """
    stop, before = Stop(), {}

    def note(signum, frame) -> None:
        stop.signum = signum
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ---- What came of users --------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """How a training ended.

    trained:       users whose adapters came into the store. skipped: users who were done before: see --resume.
    stopped_early: of those trained, who had no better epoch for `patience` epochs.
    skipped_steps: of those trained, user -> steps whose gradient was not finite.
    quarantined:   users who cannot be trained -> why.
    num_cut:       texts that did not fit the base and lost their end. splits: passes that memory did not hold.
    """

    trained: int = 0
    skipped: int = 0
    stopped_early: int = 0
    skipped_steps: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    num_cut: int = 0
    splits: int = 0


class Desk:
    """Where news of users go. At rank 0: into the store, the list of who is done, the log and the summary; from any
    other rank: to rank 0.

    under: the adapter that lies under all users', if one does.
    """

    def __init__(self, training: "Training", log: Log | None, on_finish, on_fault):
        self._ranks, self._store, self._state = training.ranks, training.store, training.state
        self._base, self._log, self._on_finish, self._on_fault = training.base, log, on_finish, on_fault
        self.summary, self.under = Summary(), None

    def take(self, news: Iterable[Adapter | Fault | dict]) -> None:
        """Whoever is in the news is done when this returns; on disk, at rank 0."""
        if not self._ranks.writes:
            for each in news:
                self._ranks.send(packed(each))
            return
        news = list(news)
        finished = [each for each in news if isinstance(each, Adapter)]
        faults = [each for each in news if isinstance(each, Fault)]
        if finished:
            self._store.add_many([replace(adapter, under=self.under) for adapter in finished], self._base)
        if finished or faults:
            self._state.note([*((a.user, "") for a in finished), *((f.user, f.reason) for f in faults)])
        for adapter in finished:
            self._count_finished(adapter)
        for fault in faults:
            self._quarantine(fault)
        for counts in (each for each in news if isinstance(each, dict)):
            self.count(counts["num_cut"], counts["splits"])

    def _quarantine(self, fault: Fault) -> None:
        self.summary.quarantined[fault.user] = fault.reason
        self.log("quarantined", user=fault.user, reason=fault.reason)
        if self._on_fault is not None:
            self._on_fault(fault)

    def _count_finished(self, adapter: Adapter) -> None:
        self.summary.trained += 1
        self.summary.stopped_early += adapter.metrics["stopped_early"]
        if adapter.metrics["skipped_steps"]:
            self.summary.skipped_steps[adapter.user] = adapter.metrics["skipped_steps"]
        self.log("finished", user=adapter.user, **adapter.metrics)
        if self._on_finish is not None:
            self._on_finish(adapter)

    def take_arrived(self) -> None:
        """At rank 0: the other ranks' news."""
        if self._ranks.writes:
            self.take(map(unpacked, self._ranks.arrived()))

    def count(self, num_cut: int = 0, splits: int = 0) -> None:
        self.summary.num_cut += num_cut
        self.summary.splits += splits

    def log(self, event: str, **fields) -> None:
        if self._log is not None:
            self._log.event(event, **fields)


# ---- A training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training that was checked and can begin: `run` it.

    users:   all of the task, those with the most examples first: nobody is left to finish alone.
    shared:  "on": one adapter of all users is trained first and lies under everybody's own; "from": everybody's own
             starts from it; "": neither.
    store:   None at ranks other than 0, which do not touch it.
    goes_on: whether it continues what `state` says was begun.
    strict:  a user who cannot be trained is an error, not left out.
    """

    source: Task | TaskFolder
    base: Base
    prompts: Prompts
    config: TrainConfig
    users: list[str]
    store: Store | None
    state: State
    shared: str
    again: bool
    goes_on: bool
    strict: bool
    passes: PassConfig
    ranks: Ranks
    save_minutes: float

    @property
    def method(self) -> Method:
        return self.config.method

    @classmethod
    def plan(
        cls, model: str | Path | Base, task: str | Path | Task | TaskFolder, config: TrainConfig, store: str | Path,
        shared: str = "", again: bool = False, passes: PassConfig | None = None, *, resume: bool = False,
        strict: bool = False, ranks: Ranks | None = None, save_minutes: float = SAVE_MINUTES, rows: str | None = None,
        pooling: str = "mean",
    ) -> "Training":  # fmt: skip
        """Everything that can be wrong with the input is found out here; see `train`."""
        if shared not in ("", "on", "from"):
            raise InputError(f"shared is {shared!r}; needed \"on\", \"from\" or \"\"")
        if not save_minutes > 0:
            raise InputError(f"save_minutes must be above 0, got {save_minutes}")
        source = task if isinstance(task, (Task, TaskFolder)) else TaskFolder(task)
        base = open_base(model, len(source.header.labels), pooling)
        prompts = prompts_of(base, source.header)
        config = replace(config, method=for_base(config.method, base))
        config.check()
        config.method.check(base)
        passes = passes or PassConfig()
        replace(passes, slots=1 if passes.slots == "auto" else passes.slots).check()
        virtual = config.method.virtual(base)
        prompts.question("", virtual=virtual[0])
        if shared == "on" and any(virtual):
            raise InputError(f"{config.method.title} cannot lie under another adapter, for it has virtual tokens; "
                             "start from a shared one instead, or take a method without")  # fmt: skip
        users, ranks = sorted(source.users, key=lambda user: -source.num_train(user)), ranks or Ranks()
        training = cls(source, base, prompts, config, users, None, State(Path(store)), shared, again, False, strict,
                       passes, ranks, save_minutes)  # fmt: skip
        if strict:
            training.check_users()
        if passes.slots == "auto":
            some = list(islice(training.readable(), PROBED))
            if not some:
                training.check_users()
            training = replace(training, passes=fitted(passes, base, prompts.labels, some))
        if not ranks.writes:
            return training
        begun = training.state.begun
        goes_on = resume and begun is not None and (training.state.unfinished or begun["run"] == training.described())
        if goes_on:
            training.state.check(training.described())
        elif training.state.unfinished and not again:
            raise InputError(f"{store} holds a training that was interrupted; go on with --resume, or start over with "
                             "--again")  # fmt: skip
        made = Store.make(store, base, source.header, rows)
        there = set() if goes_on or again else set(made.users()) & set(users)
        if there:
            raise InputError(f"{store} has an adapter of {len(there)} of these users already, e.g. {min(there)!r}; "
                             "name another store, or train them --again")  # fmt: skip
        return replace(training, store=made, goes_on=goes_on)

    def described(self) -> dict:
        """All that decides about anybody's adapter, by name."""
        settings = {name: value for name, value in asdict(self.config).items() if name != "method"}
        return {"format": FORMAT, "base": self.base.origin.fingerprint, "task": self.source.digest,
                "method": json.loads(json.dumps(self.method.described())), **settings, "shared": self.shared,
                "pooling": getattr(self.base, "pooling", "mean"),
                "deterministic": self.passes.deterministic}  # fmt: skip

    def job(self, user: str) -> tuple[Job, int]:
        """A user's job, how many of their texts were cut. Raises InputError for a broken example or too long an id."""
        key_of(user)
        virtual = self.method.virtual(self.base)[0]
        (train, num_cut), (val, num_val_cut) = (self.prompts.questions(examples, virtual)
                                                for examples in self.source.examples(user))  # fmt: skip
        return Job(user, train, val, self.config), num_cut + num_val_cut

    def readable(self) -> Iterator[Job]:
        """The jobs of users who can be trained, as far as can be seen; the others are reported in their own turn."""
        check = Engine(self.base, self.prompts.labels, PassConfig()).check
        for user in self.users:
            try:
                job, _ = self.job(user)
                check(job)
            except InputError:
                continue
            yield job

    def check_users(self) -> None:
        """Raises InputError for the first user who cannot be trained, as far as that can be seen."""
        check = Engine(self.base, self.prompts.labels, PassConfig()).check
        for user in self.users:
            check(self.job(user)[0])

    # ---- Running -----------------------------------------------------------------------------------------------------

    def run(
        self, on_finish: Callable[[Adapter], None] | None = None, show: Show = silent,
        on_fault: Callable[[Fault], None] | None = None, scalar: Callable[[str, float, float], None] | None = None,
    ) -> Summary:  # fmt: skip
        """Train everybody. Each adapter is in the store, and on_finish called with it, as soon as its user is done.

        Args:
            on_fault: called with each user who cannot be trained.
            scalar:   where numbers of the log go as well, see log.py.
        Raises:
            InputError: nobody could be trained; or strict, and somebody could not: everybody else is in the store.
            Interrupted: Ctrl-C or SIGTERM; what was under way is saved.
        """
        with stoppable() as stop, ExitStack() as opened:
            try:
                log = Log(self.store.folder / "log.jsonl", scalar) if self.ranks.writes else None
                if log is not None:
                    opened.callback(log.close)
                desk = Desk(self, log, on_finish, on_fault)
                self._run(desk, stop, show)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise InputError(f"{self.state.folder.parent}: the disk is full; who was reported is there, make room "
                                 "and go on with --resume") from None  # fmt: skip
        if desk.summary.quarantined and (self.strict or not desk.summary.trained + desk.summary.skipped):
            user, reason = next(iter(desk.summary.quarantined.items()))
            raise InputError(f"{len(desk.summary.quarantined)} of {len(self.users)} users could not be trained, e.g. "
                             f"{user!r}: {reason}")  # fmt: skip
        return desk.summary

    def _run(self, desk: Desk, stop: Stop, show: Show) -> None:
        mine = self._begin(desk)
        everyone = self._everyone(desk, stop, show) if self.shared else None
        desk.under = everyone if self.shared == "on" else None
        self.ranks.listen()
        standings = self.state.standings(set(mine))
        behind = sum(standing.examples(self.source.num_train(user)) for user, standing in standings.items())
        planned = sum(map(self.source.num_train, mine)) * self.config.epochs - behind
        jobs = self._jobs(mine, standings, everyone, desk)
        self._train(jobs, desk.take, desk, stop, show, f"training {len(mine)} users", planned)
        self._end(desk, stop)

    def _begin(self, desk: Desk) -> list[str]:
        """Note on disk what begins. Returns this rank's users who are not done."""
        left = b""
        if self.ranks.writes:
            if self.goes_on:
                self.state.go_on()
            else:
                self.state.begin(self.described(), self.again)
            done = self.state.done()
            desk.summary.quarantined = {user: reason for user, reason in done.items() if reason}
            kept = set(self.store.users())
            if self.state.begun["again"]:
                kept &= done.keys()
            desk.summary.skipped = len(kept.intersection(self.users))
            kept |= desk.summary.quarantined.keys()
            desk.log("start", users=len(self.users), skipped=desk.summary.skipped, ranks=self.ranks.number,
                     slots=self.passes.slots, token_budget=self.passes.token_budget, **self.described())  # fmt: skip
            left = bytes([self.goes_on, *(user not in kept for user in self.users)])
        goes_on, *wanted = self.ranks.tell(left)
        if not (goes_on or self.ranks.writes):
            self.state.forget_standings()
        todo = [user for user, wanted in zip(self.users, wanted) if wanted]
        return share_out(todo, [self.source.size(user) for user in todo], self.ranks.number)[self.ranks.rank]

    def _everyone(self, desk: Desk, stop: Stop, show: Show) -> Adapter:
        """The one adapter of all users: what was kept of it, or trained now, at rank 0; told to every rank."""
        content = b""
        if self.ranks.writes:
            if (adapter := self.state.shared()) is None:
                adapter = self.train_shared(show, desk, stop)
                self.state.keep_shared(adapter)
            content = packed(adapter)
        return unpacked(self.ranks.tell(content))

    def train_shared(self, show: Show, desk: Desk, stop: Stop) -> Adapter:
        """The one adapter of all users, on their pooled examples: of those whose examples can be read."""
        train, val = [], []
        for job in self.readable():
            train += job.train
            val += job.val
        standing = self.state.standings({EVERYONE}).get(EVERYONE)
        job = Job(EVERYONE, train, val, replace(self.config, **SHARED), standing=standing)
        came: list[Adapter | Fault] = []
        self._train([job], came.extend, desk, stop, show, "training one adapter for all", job.planned_examples)
        if isinstance(came[0], Fault):
            raise InputError(f"the shared adapter: {came[0].reason}")
        return came[0]

    def _jobs(
        self, users: Sequence[str], standings: dict[str, Standing], everyone: Adapter | None, desk: Desk
    ) -> Iterator[Job]:
        """These users' jobs, made when they are drawn; first of those who were interrupted."""
        for user in [*standings, *(user for user in users if user not in standings)]:
            try:
                job, num_cut = self.job(user)
            except InputError as error:
                desk.take([Fault(user, str(error))])
                continue
            desk.count(num_cut=num_cut)
            if self.shared == "on":
                job = replace(job, under=everyone)
            elif self.shared == "from":
                job = replace(job, start=everyone.row)
            yield replace(job, standing=standings.get(user))

    def _train(
        self, jobs: Iterable[Job], take: Callable[[Iterable[Adapter | Fault]], None], desk: Desk, stop: Stop,
        show: Show, title: str, planned: int,
    ) -> None:  # fmt: skip
        """Run these jobs; hand who is done to `take`; save who is resident now and then, and when it is to stop."""
        engine, ranks = Engine(self.base, self.prompts.labels, self.passes), self.ranks
        totals, worked_off, splits = engine.totals, 0, 0
        saved = minute = time.monotonic()
        with show(title) as update:
            for done in engine.run(jobs):
                take([run.adapter for run in done.finished] + done.faults)
                desk.take_arrived()
                now = time.monotonic()
                if stop.signum or now - saved > 60 * self.save_minutes:
                    standings = ((run.job.key, engine.standing(run)) for run in done.runs)
                    self.state.save(ranks.rank, ranks.number, standings)
                    desk.log("saved", resident=len(done.runs))
                    saved = now
                if stop.signum:
                    raise Interrupted(stop.signum)
                if totals.splits > splits:
                    if not desk.summary.splits:
                        desk.log("out of memory", passes=totals.passes)
                    desk.count(splits=totals.splits - splits)
                    splits = totals.splits
                worked_off += done.worked_off
                update(min(worked_off, planned), planned)
                if now - minute > MINUTE:
                    desk.log("passes", passes=totals.passes, rows=totals.rows, tokens=totals.tokens,
                             resident=len(done.runs), trained=desk.summary.trained, planned=planned,
                             worked_off=worked_off)  # fmt: skip
                    minute = now

    def _end(self, desk: Desk, stop: Stop) -> None:
        """This rank has nobody left. Rank 0 waits for the others' last news."""
        if not self.ranks.writes:
            desk.take([{"num_cut": desk.summary.num_cut, "splits": desk.summary.splits}])
            self.ranks.send(b"")
            return
        while not self.ranks.all_ended:
            desk.take_arrived()
            if stop.signum:
                raise Interrupted(stop.signum)
            time.sleep(0.05)
        desk.take_arrived()
        self.state.end()
        desk.log("end", **asdict(desk.summary))


def train(
    model: str | Path | Base, task: str | Path | Task, method: Method = LoRA(), *, store: str | Path,  # noqa: B008
    shared: str = "", again: bool = False, resume: bool = False, passes: PassConfig | None = None,
    rows: str | None = None, pooling: str = "mean", on_finish: Callable[[Adapter], None] | None = None,
    on_fault: Callable[[Fault], None] | None = None, **settings: float,
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
        resume:    go on with the same training where it was interrupted; begin it if there is none.
        rows:      how a new store keeps numbers: "float32", "bfloat16" or "int8"; None: "float32", or as it does.
        pooling:   on an encoder, what a head reads of a text: the "mean" of its hidden states, or the base's "pooler".
        on_finish: called with each adapter once it is in the store.
        on_fault:  called with each user who cannot be trained, and everybody else is. None: such a user is an error,
                   before anybody is trained if it can be seen then, or else in the end.
        settings:  fields of TrainConfig: learning_rate, epochs, batch_size, seed...
    Returns:
        the store.
    Raises:
        InputError: a folder, the task or a setting cannot be used, the store belongs to another base or task, or a user
            is in it already; a user cannot be trained, without on_fault.
        Interrupted: Ctrl-C or SIGTERM; what was under way is saved, for `resume`.
    """
    config = TrainConfig(method=method, **settings)
    training = Training.plan(model, task, config, store, shared, again, passes, resume=resume, rows=rows,
                             pooling=pooling, strict=on_fault is None)  # fmt: skip
    training.run(on_finish, on_fault=on_fault)
    return training.store
