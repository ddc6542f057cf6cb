"""Who is compared in `bench train`: the same users' first steps, trained in four ways, and whether they train the same.

    fused, one_by_one       our engine
    peft, published         transformers and peft (peers.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minipeft.engine import Engine
from minipeft.labels import Answerable, Question
from minipeft.models.classifier import Base
from minipeft.models.t5 import T5
from minipeft.peers import Peft, Published
from minipeft.schedule import Job, PassConfig, Run, choose

FEW = 8  # users of the contenders that go user by user
SAME = 1e-5  # relative difference of rows, ours against one by one
SAME_LOSS = 1e-4  # and of a user's loss, against the peers
# In bf16 a product's rounding depends on how many rows share it, and AdamW's first steps are as long for a gradient
# that is all rounding as for any other: so there this share of what training changed, of a row and of a loss. Of an
# adapter that was not trained all of it differs.
SAME_CHANGE = 0.5
SAME_STEPS = 0.1  # of what training changed of a row, against the peers, in fp32
PASSES = PassConfig(slots=64, token_budget=2048)


@dataclass
class Work:
    """Users to train for a few steps each on one base.

    jobs:  longest first.
    whole: the base all of whose layers run, where `base` starts from kept states; None: `base` is such a one.
    trunk_seconds: what those states took, before any step.
    short: user -> their training questions as the published protocol has them, at most 512 tokens; who is not among
           them has none that is longer.
    num_cut, num_short_cut: training texts that were cut to fit the base, and to fit the published protocol.
    published_steps: of each user, by the published protocol; at most `steps`. None: as many.
    planning: seconds that the last training by our engine planned and packed.
    """

    name: str
    base: Base
    labels: Answerable
    jobs: list[Job]
    steps: int
    passes: PassConfig = PASSES
    whole: Base | None = None
    trunk_seconds: float | None = None
    short: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    num_cut: int = 0
    num_short_cut: int = 0
    published_steps: int | None = None
    planning: float = 0.0

    def __post_init__(self):
        self.published_steps = self.published_steps or self.steps

    @cached_property
    def few(self) -> list[Job]:
        """Some users, of all sizes."""
        return [self.jobs[i] for i in np.linspace(0, len(self.jobs) - 1, min(FEW, len(self.jobs))).round().astype(int)]

    @cached_property
    def shortened(self) -> "Work":
        """The few, as the published protocol trains them, on all layers: cut texts have no kept states."""
        jobs = [replace(job, train=self.short.get(job.user, job.train)) for job in self.few]
        return replace(self, base=self.whole or self.base, whole=None, jobs=jobs, steps=self.published_steps)

    @cached_property
    def peers(self) -> dict[type[Peft], Peft]:
        """Those that are loaded."""
        return {}

    def tokens(self, jobs: Sequence[Job], steps: int) -> int:
        """Real tokens of so many steps of these: what the users' examples have, however it is read."""
        total = 0
        for job in jobs:
            run = Run(job, 0, 0)
            for _ in range(steps):
                reads = [self.labels.training_read(job.train[i]) for i in run.upcoming]
                total += sum(len(read.inputs) + len(read.tokens) for read in reads)
                run.advance()
        return total

    # ---- Contenders: each trains from the start and returns user -> row --------------------------------------------

    def fused(self) -> dict[str, Tensor]:
        return self.train(self.jobs, self.passes)

    def one_by_one(self) -> dict[str, Tensor]:
        return {user: row for job in self.few for user, row in
                self.train([job], replace(self.passes, slots=1)).items()}  # fmt: skip

    def peft(self) -> dict[str, Tensor]:
        return {job.user: self.peer(Peft).train(job, self.steps) for job in self.few}

    def published(self) -> dict[str, Tensor]:
        return {job.user: self.peer(Published).train(job, self.published_steps) for job in self.shortened.jobs}

    def peer(self, kind: type[Peft]) -> Peft:
        """Loaded once. Raises InputError if it cannot run here."""
        if kind not in self.peers:
            self.peers[kind] = kind(self.base, self.labels, self.jobs[0].config.method)
        return self.peers[kind]

    def train(self, jobs: Sequence[Job], passes: PassConfig) -> dict[str, Tensor]:
        """Every job's first steps, without evaluations, for nobody else makes any."""
        engine, waiting, runs, rows = Engine(self.base, self.labels, passes), iter(jobs), [], {}
        while True:
            while len(runs) < passes.slots and (job := next(waiting, None)) is not None:
                runs.append(engine.begin(job))
            if not runs:
                self.planning = engine.totals.planning
                return rows
            with engine.totals.planned():
                chosen = choose(runs, self.labels, passes.token_budget)
            engine.train_step(chosen)
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


def compared(work: Work, contenders: Sequence[str]) -> dict[str, float | None]:
    """Each contender once, which also warms it up, against one by one; of the few users that go one by one.

    Returns:
        max_relative_difference of a row, fused against one by one; max_trunk_difference of a row, one by one from kept
        states against all layers, and max_sharing_difference, with what prompts share read once against each time: None
        where there is no such choice; max_loss_difference and max_step_difference, peft against one by one: of a loss,
        relative, and of a row, as a share of what training changed of it; max_published_loss_difference and
        max_published_step_difference, the same of the published protocol.
    Raises:
        Apart: more than rounding (SAME, SAME_LOSS and SAME_STEPS, in bf16 SAME_CHANGE; there peers' rows are not
            asked to be ours).
    """
    alone = work.one_by_one()
    found = dict.fromkeys(("max_relative_difference", "max_trunk_difference", "max_sharing_difference",
                           "max_loss_difference", "max_step_difference", "max_published_loss_difference",
                           "max_published_step_difference"))  # fmt: skip
    found["max_relative_difference"] = _apart(work, "fused and one by one", work.fused(), alone)
    if work.whole is not None:
        all_layers = replace(work, base=work.whole, whole=None)
        found["max_trunk_difference"] = _apart(work, "kept states and all layers", alone, all_layers.one_by_one())
    if work.base.causal and not isinstance(work.base, T5) and work.passes.share:
        each = replace(work, passes=replace(work.passes, share=False)).one_by_one()
        found["max_sharing_difference"] = _apart(work, "prompts' beginnings read once and each time", alone, each)
    if "peft" in contenders:
        found["max_loss_difference"], found["max_step_difference"] = _peer_apart(work, "peft", work.peft(), alone)
    if "published" in contenders:
        short, who = work.shortened, "the published protocol"
        apart = _peer_apart(short, who, work.published(), short.one_by_one())
        found["max_published_loss_difference"], found["max_published_step_difference"] = apart
    return found


def _apart(work: Work, who: str, rows: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest relative difference of a row of `others` and of the same user's in `rows`."""
    found = {user: _relative(rows[user], row) for user, row in others.items()}
    changes = {user: _relative(start, others[user]) for user, start in _starts(work, others).items()}
    return _largest(work, f"{who} differ in a user's row", found, SAME, changes)


def _peer_apart(work: Work, who: str, rows: dict[str, Tensor], ours: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative difference of a user's loss, under our row and under theirs; and of their rows, as a share
    of how far ours is from its start."""
    starts = _starts(work, ours)
    theirs, before, after = (work.losses(some) for some in (rows, starts, ours))
    losses = {user: abs(theirs[user] - loss) / loss for user, loss in after.items()}
    changes = {user: abs(before[user] - loss) / loss for user, loss in after.items()}
    steps = {user: float((rows[user] - row).norm() / (row - starts[user]).norm()) for user, row in ours.items()}
    loss = _largest(work, f"{who} and one by one differ in a user's loss", losses, SAME_LOSS, changes)
    if work.base.dtype != torch.float32:
        return loss, max(steps.values())
    words = f"{who} and one by one differ in what training changed of a user's row"
    return loss, _largest(work, words, steps, SAME_STEPS, {})


def _largest(work: Work, words: str, found: dict[str, float], same: float, changes: dict[str, float]) -> float:
    """The largest of what was found, by user. Raises Apart if one is more than rounding. changes: by training."""
    for user, differs in found.items():
        allowed = same if work.base.dtype == torch.float32 else SAME_CHANGE * changes[user]
        if not differs <= allowed:
            raise Apart(f"{work.name}: {words} by {differs:.1e}, more than {allowed:.1e}")
    return max(found.values())


def _relative(row: Tensor, other: Tensor) -> float:
    return float((row - other).norm() / other.norm())


def _starts(work: Work, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """What these users' rows were before they were trained."""
    configs = {job.user: job.config for job in work.jobs}
    return {user: configs[user].method.initial_row(work.base, configs[user].seed, user) for user in rows}
