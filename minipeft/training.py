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
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path

from minipeft.desk import LOOK_S, Desk, Summary
from minipeft.engine import Engine, out_of_memory
from minipeft.errors import InputError, SaidElsewhere
from minipeft.index import MAX_SMALL
from minipeft.log import Log
from minipeft.memory import fitted
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.models.classifier import Base
from minipeft.models.trunk import Trunk, above_frozen
from minipeft.prompts import Prompts
from minipeft.ranks import Gone, Ranks, share_out
from minipeft.resume import FORMAT, State, difference, packed, unpacked
from minipeft.running import for_base, open_base, prompts_of
from minipeft.schedule import Adapter, Fault, Job, PassConfig, Run, Standing, TrainConfig
from minipeft.sharding import Stopped, check_sharded
from minipeft.stopping import Interrupted, Stop, stoppable
from minipeft.store import Store, key_of
from minipeft.tasks.folder import TaskFolder
from minipeft.tasks.task import Task

EVERYONE = "(everyone)"  # the one "user" of a shared adapter
SHARED = {"epochs": 1, "batch_size": 64}  # what is different in training for the one adapter of everybody
SAVE_MINUTES = 10.0  # between two savings of what is under way
PROBED = 8  # users whose first minibatches tell how much memory a pass takes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a full disk, quota or file
MINUTE = 60.0  # seconds between two lines of statistics in the log
MOST_EPOCHS = MAX_SMALL // 8 - 8  # a store keeps the validation loss after each, and a few numbers more

Show = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # a title -> a function of (done, total)


def silent(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A `Show` that shows nothing."""
    return nullcontext(lambda done, total: None)


@contextmanager
def lack_of_room_is_said(store: Path) -> Iterator[None]:
    """Inside, a disk without room is an InputError, and so is memory without."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"{store}: out of memory; lower --slots or --token-budget and go on with --resume") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(f"{store}: the disk is full; who was reported is there, make room and go on with "
                         "--resume") from None  # fmt: skip


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
        if config.epochs > MOST_EPOCHS:
            raise InputError(f"epochs must be at most {MOST_EPOCHS} where a store keeps what came of each, got "
                             f"{config.epochs}")  # fmt: skip
        config.method.check(base)
        passes = passes or PassConfig()
        if not passes.deterministic:  # a kept state's last bits depend on whose texts it was computed with
            base = above_frozen(base, config.method)
        if base.lockstep is not None:
            check_sharded(config.method, passes)
        replace(passes, slots=1 if passes.slots == "auto" else passes.slots).check(base.device)
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
        with ranks.first_alone():
            return training._with_store(resume, rows)

    def _with_store(self, resume: bool, rows: str | None) -> "Training":
        """With the store, made if there is none. Raises InputError if what is there must be asked for."""
        state, folder = self.state, self.state.folder.parent
        is_same = state.begun is not None and state.begun["run"] == self.described()
        goes_on = resume and (is_same or (state.unfinished and not self.again))
        if goes_on:
            state.check(self.described())
        elif state.unfinished and not self.again:
            raise InputError(f"{folder} holds a training that was interrupted; go on with --resume, or start over with "
                             "--again")  # fmt: skip
        made = Store.make(folder, self.base, self.source.header, rows)
        there = set() if goes_on or self.again else set(made.users()) & set(self.users)
        if there:
            raise InputError(f"{folder} has an adapter of {len(there)} of these users already, e.g. {min(there)!r}; "
                             "name another store, or train them --again")  # fmt: skip
        return replace(self, store=made, goes_on=goes_on)

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
            InputError: nobody could be trained; or strict, and somebody could not: everybody else is in the store. Or
                there is no room on the disk or in memory.
            Interrupted: Ctrl-C or SIGTERM.
            Gone: another rank went away.
        Whatever ends it but a second Ctrl-C, what was under way is saved.
        """
        with lack_of_room_is_said(self.state.folder.parent), stoppable() as stop, ExitStack() as opened:
            desk = Desk(self.store, self.base, self.state, self.ranks, stop, on_finish, on_fault)
            if self.ranks.writes:
                with self.ranks.first_alone():
                    opened.enter_context(self.state.locked())
                    desk.log = opened.enter_context(Log(self.store.folder / "log.jsonl", scalar)).event
            try:
                self._run(desk, stop, show)
            except (Stopped, Gone) as ended:
                if isinstance(ended, Gone) and not stop.signum:
                    raise
                desk.leave()
                raise Interrupted(stop.signum or signal.SIGTERM) from None
        if desk.summary.quarantined and (self.strict or not desk.summary.trained + desk.summary.skipped):
            user, reason = next(iter(desk.summary.quarantined.items()))
            raise InputError(f"{len(desk.summary.quarantined)} of {len(self.users)} users could not be trained, e.g. "
                             f"{user!r}: {reason}")  # fmt: skip
        return desk.summary

    def _run(self, desk: Desk, stop: Stop, show: Show) -> None:
        lockstep = self.base.lockstep
        if lockstep is not None:
            lockstep.stopping = lambda: bool(stop.signum)
        mine = self._begin(desk)
        everyone = self._everyone(desk, stop, show) if self.shared else None
        desk.under = everyone if self.shared == "on" else None
        self.ranks.listen()
        standings = self.state.standings(set(mine))
        planned = sum(self._examples_left(user, standings) for user in mine)
        jobs = self._jobs(mine, standings, everyone, desk)
        part = f"rank-{self.ranks.rank}-of-{self.ranks.number}"
        self._train(jobs, desk.take, desk, stop, show, f"training {len(mine)} users", planned, part, standings)
        self._keep_company()
        self._end(desk, stop, show)

    def _keep_company(self) -> None:
        """Of a base that the ranks share: until nobody has a pass left. Raises Stopped."""
        if self.base.lockstep is not None:
            self.base.lockstep.finish()

    def _examples_left(self, user: str, standings: dict[str, Standing]) -> int:
        """Training examples of the user's plan that are not behind them."""
        num_train = self.source.num_train(user)
        behind = standings[user].examples(num_train) if user in standings else 0
        return num_train * self.config.epochs - behind

    def _agree(self) -> None:
        """Raises InputError at every rank unless all were given the same base, task and settings, or if rank 0 did."""
        told = []
        for teller in range(self.ranks.number):
            said = self.ranks.tell(json.dumps(self.described()).encode(), teller)
            if not said:  # see Ranks.first_alone
                raise SaidElsewhere("process 0 has said what is wrong")
            told.append(json.loads(said))
        for rank, described in enumerate(told):
            if differs := difference(told[0], described):
                what, first, own = differs
                raise InputError(f"processes of one training need the same base, task and settings: {what} is {first} "
                                 f"at process 0, {own} at process {rank}")  # fmt: skip

    def _begin(self, desk: Desk) -> list[str]:
        """Note on disk what begins. Returns this rank's users who are not done."""
        self._agree()
        left = b""
        if self.ranks.writes:
            if self.goes_on:
                self.state.go_on()
            else:
                self.state.begin(self.described(), self.again)
            done = self.state.done()
            desk.summary.quarantined = {user: reason for user, reason in done.items() if reason}
            kept = set(done)  # also who was deleted from the store since
            if not self.state.begun["again"]:
                kept.update(self.store.users())
            desk.summary.skipped = len(kept.intersection(self.users) - desk.summary.quarantined.keys())
            frozen_layers = self.base.first if isinstance(self.base, Trunk) else 0
            desk.log("start", users=len(self.users), skipped=desk.summary.skipped, ranks=self.ranks.number,
                     slots=self.passes.slots, token_budget=self.passes.token_budget, frozen_layers=frozen_layers,
                     **self.described())  # fmt: skip
            left = bytes(user not in kept for user in self.users)
        self.state.name = self.ranks.tell(self.state.name.encode()).decode()
        todo = [user for user, wanted in zip(self.users, self.ranks.tell(left)) if wanted]
        return share_out(todo, [self.source.size(user) for user in todo], self.ranks.number)[self.ranks.rank]

    def _everyone(self, desk: Desk, stop: Stop, show: Show) -> Adapter:
        """The one adapter of all users: what was kept of it, or trained now, at rank 0; told to every rank."""
        content = b""
        if self.ranks.writes:
            if (adapter := self.state.shared()) is None:
                adapter = self.train_shared(show, desk, stop)
                self.state.keep_shared(adapter)
            content = packed(adapter)
        self._keep_company()
        return unpacked(self.ranks.tell(content))

    def train_shared(self, show: Show, desk: Desk, stop: Stop) -> Adapter:
        """The one adapter of all users, on their pooled examples: of those whose examples can be read."""
        train, val = [], []
        for job in self.readable():
            train += job.train
            val += job.val
        standings = self.state.standings({EVERYONE}, "everyone")
        job = Job(EVERYONE, train, val, replace(self.config, **SHARED), standing=standings.get(EVERYONE))
        came: list[Adapter | Fault] = []
        self._train([job], came.extend, desk, stop, show, "training one adapter for all", job.planned_examples,
                    "everyone", standings)  # fmt: skip
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
                desk.worked_off += self._examples_left(user, standings)
                standings.pop(user, None)
                continue
            desk.count(num_cut=num_cut)
            if self.shared == "on":
                job = replace(job, under=everyone)
            elif self.shared == "from":
                job = replace(job, start=everyone.row)
            yield replace(job, standing=standings.get(user))

    def _train(
        self, jobs: Iterable[Job], take: Callable[[Iterable[Adapter | Fault]], None], desk: Desk, stop: Stop,
        show: Show, title: str, planned: int, part: str, waiting: dict[str, Standing],
    ) -> None:  # fmt: skip
        """Run these jobs; hand who is done to `take`; save who is resident now and then, and whatever ends it.

        planned: training examples of theirs. part: under which name `state` saves them. waiting: where those stand who
        were interrupted; they are saved too, and taken out once they are resident.

        Raises:
            Stopped: it is to stop.
        """
        engine = Engine(self.base, self.prompts.labels, self.passes)
        totals, splits, desk.worked_off = engine.totals, 0, 0
        saved = minute = time.monotonic()
        runs: list[Run] = []

        def save() -> None:
            standings = chain(((run.job.key, engine.standing(run)) for run in runs), waiting.items())
            self.state.save(part, len(runs) + len(waiting), standings)
            desk.log("saved", resident=len(runs))

        with show(title) as update:
            try:
                for done in engine.run(jobs):
                    runs = done.runs + done.finished  # who has finished too, until somebody has taken it
                    for key in [*(run.job.key for run in runs), *(fault.user for fault in done.faults)]:
                        waiting.pop(key, None)
                    if stop.signum and self.base.lockstep is None:  # else all ranks stop before the same pass
                        raise Stopped
                    take([run.adapter for run in done.finished] + done.faults)
                    runs, now = done.runs, time.monotonic()
                    desk.take_arrived()
                    if now - saved > 60 * self.save_minutes:
                        save()
                        saved = now
                    if totals.splits > splits:
                        if not desk.summary.splits:
                            desk.log("out of memory", passes=totals.passes)
                        desk.count(splits=totals.splits - splits)
                        splits = totals.splits
                    desk.worked_off += done.worked_off
                    update(min(desk.worked_off, planned), planned)
                    if now - minute > MINUTE:
                        desk.log("passes", passes=totals.passes, rows=totals.rows, tokens=totals.tokens,
                                 resident=len(done.runs), trained=desk.summary.trained, planned=planned,
                                 worked_off=desk.worked_off)  # fmt: skip
                        minute = now
            except Stopped:
                save()
                raise
            except Exception:
                try:
                    save()
                except (OSError, RuntimeError, MemoryError) as error:
                    warnings.warn(f"where users stand could not be saved: {error}", stacklevel=2)
                raise

    def _end(self, desk: Desk, stop: Stop, show: Show) -> None:
        """This rank has nobody left. Rank 0 waits for the others' last news."""
        if not self.ranks.writes:
            desk.take([{"num_cut": desk.summary.num_cut, "splits": desk.summary.splits}])
            self.ranks.send(b"")
            return
        if not self.ranks.all_ended:
            self._wait(desk, stop, show)
        desk.take_arrived()
        self.state.end()
        desk.log("end", **asdict(desk.summary))

    def _wait(self, desk: Desk, stop: Stop, show: Show) -> None:
        """Until the other ranks have ended. Raises Stopped, or Gone."""
        summary = desk.summary

        def left() -> int:
            return len(self.users) - summary.skipped - summary.trained - len(summary.quarantined)

        with show("waiting for the other processes") as update:
            total = left()
            while not self.ranks.all_ended:
                desk.take_arrived()
                if stop.signum:
                    raise Stopped
                update(total - left(), total)
                time.sleep(LOOK_S)


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
