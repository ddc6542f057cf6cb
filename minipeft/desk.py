"""What comes of a training's users, and where it goes: the store, the list of who is done, the log, the summary."""

import fcntl
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from minipeft.index import LOCK
from minipeft.models.classifier import Base
from minipeft.ranks import Ranks
from minipeft.resume import State, packed, unpacked
from minipeft.schedule import Adapter, Fault
from minipeft.sharding import Stopped
from minipeft.stopping import Stop
from minipeft.store import Store

LOOK_S = 0.05  # seconds between two looks at what one waits for
SAID_S = 5.0  # seconds after which it is said that one waits for the store
LAST_NEWS_S = 10.0  # that process 0 waits for the others' last news when all are to stop; torchrun gives them 30


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

    store:      None at ranks other than 0. base: the one that adapters are for.
    stop:       whether to give up waiting for the store.
    log:        takes an event's name and fields, see log.py.
    under:      the adapter that lies under all users', if one does.
    worked_off: training examples of the plan that are behind this rank, those of who left early included.
    """

    def __init__(
        self, store: Store | None, base: Base, state: State, ranks: Ranks, stop: Stop,
        on_finish: Callable[[Adapter], None] | None = None, on_fault: Callable[[Fault], None] | None = None,
    ):  # fmt: skip
        self._store, self._base, self._state, self._ranks, self._stop = store, base, state, ranks, stop
        self._has_waited = False
        self._heard: list[Adapter | Fault | dict] = []  # of other ranks, and not taken yet
        self._on_finish, self._on_fault = on_finish, on_fault
        self.log: Callable[..., None] = lambda event, **fields: None
        self.summary, self.under, self.worked_off = Summary(), None, 0

    def take(self, news: Iterable[Adapter | Fault | dict]) -> None:
        """Whoever is in the news is done when this returns; on disk, at rank 0.

        Raises:
            Stopped: somebody else writes the store for long, and this rank is to stop: nothing of the news is kept.
        """
        if not self._ranks.writes:
            for each in news:
                self._ranks.send(packed(each))
            return
        news = list(news)
        finished = [each for each in news if isinstance(each, Adapter)]
        faults = [each for each in news if isinstance(each, Fault)]
        if finished:
            self._wait_for_others()
            self._store.add_many([replace(adapter, under=self.under) for adapter in finished], self._base)
        if finished or faults:
            self._state.note([*((a.user, "") for a in finished), *((f.user, f.reason) for f in faults)])
        for adapter in finished:
            self._count_finished(adapter)
        for fault in faults:
            self._quarantine(fault)
        for counts in (each for each in news if isinstance(each, dict)):
            self.count(counts["num_cut"], counts["splits"])

    def _wait_for_others(self) -> None:
        """Until nobody else writes the store: a `compact` may take hours."""
        began = time.monotonic()
        while self._others_write():
            if self._stop.signum:
                raise Stopped
            if not self._has_waited and time.monotonic() - began > SAID_S:
                warnings.warn(f"somebody else writes {self._store.folder}; waiting until that is done", stacklevel=2)
                self._has_waited = True
            time.sleep(LOOK_S)

    def _others_write(self) -> bool:
        with open(self._store.folder / LOCK, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

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
        """At rank 0: the other ranks' news. Raises what broke the connection, once all that had come is kept."""
        if self._ranks.writes:
            self._hear()
            self._ranks.check()

    def _hear(self) -> None:
        self._heard += map(unpacked, self._ranks.arrived())
        self.take(self._heard)
        self._heard = []

    def leave(self) -> None:
        """This rank stops before its users are done. Rank 0 hears what the others have to say, for LAST_NEWS_S."""
        if not self._ranks.writes:
            self._ranks.leave()
            return
        deadline = time.monotonic() + LAST_NEWS_S
        while time.monotonic() < deadline:
            if not self._others_write():
                self._hear()
            if self._ranks.all_ended:
                return
            time.sleep(LOOK_S)

    def count(self, num_cut: int = 0, splits: int = 0) -> None:
        self.summary.num_cut += num_cut
        self.summary.splits += splits
