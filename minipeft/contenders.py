"""Who is compared in `bench train`: the same users' first steps, trained in four ways, and whether they train the same.

    fused, one_by_one       our engine
    peft, published         transformers and peft (peers.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from minipeft.engine import Engine
from minipeft.labels import Answerable
from minipeft.models.classifier import Base
from minipeft.peers import Peft, Published
from minipeft.schedule import Job, PassConfig, Run, choose

PUBLISHED_STEPS = 1  # it is slow
FEW = 8  # users of the contenders that go user by user
SAME = 1e-5  # relative difference of rows, fused against one by one
SAME_LOSS = 1e-4  # and of a user's loss, against the peers
PASSES = PassConfig(slots=64, token_budget=2048)


@dataclass
class Work:
    """Users to train for a few steps each on one base.

    jobs: longest first. trunk_seconds: what the states of frozen layers took, before any step; None: there are none.
    """

    name: str
    base: Base
    labels: Answerable
    jobs: list[Job]
    steps: int
    passes: PassConfig = PASSES
    trunk_seconds: float | None = None

    @cached_property
    def few(self) -> list[Job]:
        """Some users, of all sizes."""
        return [self.jobs[i] for i in np.linspace(0, len(self.jobs) - 1, min(FEW, len(self.jobs))).round().astype(int)]

    @cached_property
    def _peers(self) -> dict[str, Peft]:
        return {}

    def tokens(self, jobs: Sequence[Job], steps: int) -> int:
        """Real tokens of so many steps of these."""
        total = 0
        for job in jobs:
            run = Run(job, 0, 0)
            for _ in range(steps):
                total += sum(len(read.tokens) for read in run.minibatch(self.labels).reads)
                run.advance()
        return total

    # ---- Contenders: each trains from the start and returns user -> row --------------------------------------------

    def fused(self) -> dict[str, Tensor]:
        return self.train(self.jobs, self.passes)

    def one_by_one(self) -> dict[str, Tensor]:
        return {user: row for job in self.few for user, row in
                self.train([job], replace(self.passes, slots=1)).items()}  # fmt: skip

    def peft(self, steps: int | None = None, kind: type[Peft] = Peft) -> dict[str, Tensor]:
        return {job.user: self.peer(kind).train(job, steps or self.steps) for job in self.few}

    def peer(self, kind: type[Peft]) -> Peft:
        """Loaded once. Raises InputError if it cannot run here."""
        if kind.__name__ not in self._peers:
            self._peers[kind.__name__] = kind(self.base, self.labels, self.jobs[0].config.method)
        return self._peers[kind.__name__]

    def published(self) -> dict[str, Tensor]:
        return self.peft(PUBLISHED_STEPS, Published)

    def train(self, jobs: Sequence[Job], passes: PassConfig) -> dict[str, Tensor]:
        """Every job's first steps, without evaluations, for nobody else makes any."""
        engine, waiting, runs, rows = Engine(self.base, self.labels, passes), iter(jobs), [], {}
        while True:
            while len(runs) < passes.slots and (job := next(waiting, None)) is not None:
                runs.append(engine.begin(job))
            if not runs:
                return rows
            engine.train_step(choose(runs, self.labels, passes.token_budget))
            for run in [run for run in runs if run.step == self.steps]:
                rows[run.job.user] = engine.row(run)
                engine.evict(run.bank, run.slot)
                runs.remove(run)

    # ---- Are they the same? ----------------------------------------------------------------------------------------

    def losses(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """User -> mean -log p of their own training examples under this row."""
        engine, found = Engine(self.base, self.labels, replace(self.passes, slots=1)), {}
        jobs = {job.user: job for job in self.jobs}
        for user, row in rows.items():
            job = jobs[user]
            place = engine.admit(user, job.config.method, row)
            scores = np.concatenate([piece for _, piece in engine.score([(*place, job.train)])])
            nats = self.labels.nats(scores, np.array([q.label for q in job.train]))
            found[user] = float(nats.mean(dtype=np.float64))
            engine.evict(*place)
        return found


class Apart(AssertionError):
    """A contender did not train the same adapters: its time would mean nothing."""


def compared(work: Work, contenders: Sequence[str]) -> dict[str, float]:
    """Each contender once, which also warms it up, against one by one.

    Returns:
        max_relative_difference of a row, fused against one by one; max_loss_difference, relative, peft against it.
    Raises:
        Apart: more than rounding.
    """
    alone = work.one_by_one()
    together = work.fused()
    rows = max(float((together[user] - row).norm() / row.norm()) for user, row in alone.items())
    if not rows <= SAME:
        raise Apart(f"{work.name}: fused and one by one differ by {rows:.1e}")
    found = {"max_relative_difference": rows, "max_loss_difference": None}
    if "peft" in contenders:
        ours, theirs = work.losses(alone), work.losses(work.peft())
        worst = max(abs(theirs[user] - loss) / loss for user, loss in ours.items())
        if not worst <= SAME_LOSS:
            raise Apart(f"{work.name}: a user's loss differs by {worst:.1e} from peft's")
        found["max_loss_difference"] = worst
    if "published" in contenders:
        short = replace(work, steps=PUBLISHED_STEPS)
        ours, theirs = work.losses(short.one_by_one()), work.losses(work.published())
        worst = max(abs(theirs[user] - loss) / loss for user, loss in ours.items())
        if not worst <= SAME_LOSS:
            raise Apart(f"{work.name}: a user's loss differs by {worst:.1e} from the published protocol's")
    return found
