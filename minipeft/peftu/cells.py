"""Training of many adapters in as few fused passes as there can be, each kept on disk the moment it is done.

A cell is one way to train (name, method, learning rate, seed) of all users. The jobs of many cells, whatever their
methods, go through one engine together. A killed run continues: whoever's adapter is there is not trained again.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minipeft import flops
from minipeft.engine import Engine
from minipeft.labels import Answerable, Question, Texts
from minipeft.memory import kept_bytes
from minipeft.methods.method import Method
from minipeft.models.classifier import Base
from minipeft.models.rows import Rows
from minipeft.models.trunk import Trunk, above_frozen, start_layer
from minipeft.peftu.asking import Asked
from minipeft.peftu.audit import Audit
from minipeft.schedule import Adapter, Fault, Job, PassConfig, Run, TrainConfig
from minipeft.store import Store


@dataclass(frozen=True)
class Learner:
    """Whose examples a job trains on. place: among the users, for starts that depend on it; None: they do not."""

    user: str
    train: Sequence[Asked]
    val: Sequence[Asked]
    place: int | None = None


@dataclass(frozen=True)
class Cell:
    """One way to train, of some learners.

    upon:  the cell of the shared adapter that acts under everybody's own; under: that adapter, once it is there.
    """

    name: str
    config: TrainConfig
    learners: tuple[Learner, ...]
    upon: "Cell | None" = None
    under: Adapter | None = None

    @property
    def label(self) -> str:
        return f"{self.name}-s{self.config.seed}-lr{self.config.learning_rate:g}"

    @property
    def examples(self) -> int:
        """Planned: an upper bound where people may stop early."""
        return self.config.epochs * sum(len(learner.train) for learner in self.learners)

    def digest(self) -> str:
        """Of everything that determines its adapters, except the base."""
        config = asdict(self.config) | {"method": self.config.method.described()}
        asked = lambda questions: [{"prompt": each.prompt, "label": each.label} for each in questions]  # noqa: E731
        learners = [(each.user, each.place, asked(each.train), asked(each.val)) for each in self.learners]
        return digest_of([self.name, config, self.upon and self.upon.digest(), learners])


def digest_of(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Trained:
    """A cell's adapters by user, and where they are kept. Metrics hold `seconds` beside the engine's.

    Who could not be trained has the start value, an infinite loss, and the reason in `failed`.
    """

    cell: Cell
    adapters: dict[str, Adapter]
    store: Store

    @property
    def failed(self) -> dict[str, str]:
        """User -> why nothing came of them."""
        return {user: adapter.metrics["failed"] for user, adapter in self.adapters.items()
                if "failed" in adapter.metrics}  # fmt: skip

    @property
    def seconds(self) -> float:
        return sum(adapter.metrics["seconds"] for adapter in self.adapters.values())

    def forget(self) -> None:
        """Remove what is kept on disk."""
        self.store.close()
        shutil.rmtree(self.store.folder)

    @property
    def curves(self) -> list[list[float]]:
        return [self.adapters[learner.user].metrics["val_loss"] for learner in self.cell.learners]

    def validation(self) -> float:
        """Mean over users of the best epoch's validation loss; infinite if anybody has none."""
        best = [adapter.metrics["val_loss"][adapter.metrics["best_epoch"] - 1] for adapter in self.adapters.values()]
        mean = sum(best) / len(best)
        return mean if math.isfinite(mean) else math.inf


class Timed(Engine):
    """An engine that notes in `seconds` how long each job took: a pass's are shared out by rows."""

    def __init__(self, model: Base, labels: Answerable, passes: PassConfig, seconds: dict[str, float]):
        super().__init__(model, labels, passes)
        self.seconds = seconds

    def train_step(self, chosen: Sequence[Run]) -> None:
        rows = {run.job.key: run.minibatch(self.labels).num_rows for run in chosen}
        began = time.perf_counter()
        super().train_step(chosen)
        per_row = (time.perf_counter() - began) / sum(rows.values())
        for key, number in rows.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + per_row * number


def train_cells(
    base: Base, labels: Answerable, cells: Sequence[Cell], audit: Audit, folder: Path, passes: PassConfig,
    on_progress: Callable[[int], None], on_found: Callable[[int], None],
) -> list[Trained]:  # fmt: skip
    """Every cell's adapters, all in one fused training; those that are in the folder are read.

    On an encoder those whose method leaves the lowest layers alone, as a head does, are trained by themselves, above
    them (trunk.py).

    Args:
        audit:       is shown every question that anybody trains on or stops by.
        folder:      where adapters are kept, one store per cell, named by its digest.
        on_progress, on_found: called with the number of planned examples just worked off, or found to be done.
    Raises:
        InputError: a learner or a configuration that makes no sense, before anybody is trained. Who diverges or does
            not fit into memory is in `Trained.failed`.
    """
    for learner in (learner for cell in cells for learner in cell.learners):
        audit.fitting("adapters", (*learner.train, *learner.val))
    seconds: dict[str, float] = {}
    found: list[dict[str, Adapter]] = [{} for _ in cells]
    stores = [Store.make(folder / f"{cell.label}-{cell.digest()[:8]}", base) for cell in cells]
    jobs, owners = [], {}
    for number, (cell, store) in enumerate(zip(cells, stores)):
        for learner in cell.learners:
            if learner.user in store:
                found[number][learner.user] = replace(store.get(learner.user, base), under=cell.under)
                on_found(cell.config.epochs * len(learner.train))
                continue
            key = f"{number} {learner.user}"
            owners[key] = number
            jobs.append(Job(learner.user, learner.train, learner.val, cell.config, key, start_of(cell, learner, base),
                            cell.under))  # fmt: skip
    jobs.sort(key=lambda job: -len(job.train) * job.config.epochs)  # nobody is left to finish alone

    def keep(adapter: Adapter) -> None:
        number, metrics = owners[adapter.job], adapter.metrics | {"seconds": seconds[adapter.job]}
        alone = replace(adapter, under=None, metrics=metrics)
        stores[number].add(alone, base)
        found[number][adapter.user] = replace(alone, under=cells[number].under)

    def give_up(fault: Fault) -> None:
        job = by_key[fault.user]
        row = job.config.method.initial_row(base, job.config.seed, job.user) if job.start is None else job.start
        metrics = {"best_epoch": 1, "epochs": 0, "steps": 0, "val_loss": [math.inf], "stopped_early": False,
                   "skipped_steps": 0, "seconds": seconds.get(job.key, 0.0), "failed": fault.reason}  # fmt: skip
        found[owners[job.key]][job.user] = Adapter(job.user, job.config.method, row, metrics, job.under, job.key)

    by_key, checks = {job.key: job for job in jobs}, Engine(base, labels, passes)
    together: dict[int, list[Job]] = {}  # by the layer where their passes start
    for job in jobs:
        checks.check(job)
        alone = job.under is None and not passes.deterministic
        together.setdefault(start_layer(base, job.config.method if alone else None), []).append(job)
    for first, some in together.items():
        own = base
        if first > start_layer(base):
            began = time.perf_counter()
            own = above_frozen(base, some[0].config.method, texts_of(some))
            spent = time.perf_counter() - began  # each of these cells would have to spend it, were it alone
            seconds |= {job.key: spent / len(cells[owners[job.key]].learners) for job in some}
        Timed(own, labels, passes, seconds).train(some, keep, on_progress, give_up)
    return [Trained(*each) for each in zip(cells, found, stores)]


def texts_of(jobs: Sequence[Job]) -> list[tuple[int, ...]]:
    """The different prompts that these train on."""
    return list(dict.fromkeys(question.prompt for job in jobs for question in job.train))


def start_of(cell: Cell, learner: Learner, base: Base) -> torch.Tensor | None:
    """None: the method's own start, a function of (seed, user)."""
    if learner.place is None:
        return None
    return cell.config.method.initial_row(base, cell.config.seed, f"user number {learner.place}")


@dataclass(frozen=True)
class RowCost:
    """What a row (`asked_rows`) costs.

    flops:        of a training step, forward and backward; floating-point operations, counted.
    kept_bytes:   of that step, kept for the backward pass; measured.
    frozen_flops: of the lower layers that run beforehand, forward, once for each text.
    """

    flops: float
    kept_bytes: float
    frozen_flops: float


def cost_per_row(
    base: Base, labels: Answerable, method: Method, questions: Sequence[Question], under: Adapter | None = None,
) -> RowCost:  # fmt: skip
    """Of a step on these questions, and of frozen layers that run beforehand, as all under a head.

    What is read beside those rows, as a T5's labels, is in the count and not among them. Matrix products and attention
    are counted (flops.py). On a GPU the adapters' own kernels are Triton's, which it does not see: theirs are taken as
    three forward passes', and as two of an adapter under them, whose weights have no gradient.
    """
    own = base if under is not None else above_frozen(base, method, [question.prompt for question in questions])
    engine = Engine(own, labels, PassConfig(slots=1))
    config = TrainConfig(method, batch_size=len(questions), epochs=2)
    run = engine.begin(Job("counted", questions, questions, config, under=under))
    rows = sum(asked_rows(labels, question) + sum(method.virtual(base)) for question in questions)
    engine.train_step([run])  # after which the states are kept of what fills a user's rows up, too
    with flops.counter() as counter, kept_bytes(base) as kept:
        engine.train_step([run])
    frozen = frozen_flops(own, questions) / sum(len(question.prompt) for question in questions)
    unseen = 3 * row_flops(base, method) + (2 * row_flops(base, under.method) if under else 0)
    counted = counter.get_total_flops() / rows + (unseen if base.device.type == "cuda" else 0)
    return RowCost(counted, sum(kept.values()) / rows, frozen)


def row_flops(base: Base, method: Method) -> int:
    """What a method's own kernels compute for a row in a forward pass; on a T5 as if the row were one of each side. An
    encoder's head is none of them: one product of PyTorch's for a text."""
    return sum(part.flops(base) for part in method.parts if part.name != "head" or base.head_size is None)


def frozen_flops(base: Base, questions: Sequence[Question]) -> int:
    """Counted operations of the layers below where passes on this base start, on these questions; 0 if none are."""
    if not isinstance(base, Trunk):
        return 0
    rows = Rows.pack([question.prompt for question in questions], base.device, causal=False)
    with flops.counter() as counter:
        base.frozen(rows, anew=True)
    return counter.get_total_flops()


def movement(trained: Trained, base: Base) -> dict[str, dict[str, float]]:
    """How far each tensor moved: |w - w0| / |w0|, or the RMS of the change where w0 is zero ("from_zero": 1); median
    and least of users.

    Tensors of one kind in many layers are taken together: "layers.3.attn.q.A" and "layers.5.attn.q.A" are "attn.q.A".
    """
    cell, of, from_zero = trained.cell, {}, {}
    method = cell.config.method
    for learner in cell.learners:
        start = start_of(cell, learner, base)
        row = method.initial_row(base, cell.config.seed, learner.user) if start is None else start
        row = row.bfloat16().float() if cell.config.bf16_weights else row  # to be rounded is not to learn
        before, after = method.tensors(row, base), method.tensors(trained.adapters[learner.user].row.cpu(), base)
        joined: dict[str, list[str]] = {}
        for name in before:
            words = [word for word in name.split(".") if word != "layers" and not word.isdigit()]
            joined.setdefault(".".join(words), []).append(name)
        for kind, names in joined.items():
            w0, w = (torch.cat([tensors[name].flatten() for name in names]).float() for tensors in (before, after))
            change, size = (w - w0).norm(), w0.norm()
            of.setdefault(kind, []).append(float(change / size if size else change / len(w) ** 0.5))
            from_zero[kind] = float(not size)
    return {kind: {"median": float(torch.tensor(moved).median()), "min": min(moved), "from_zero": from_zero[kind]}
            for kind, moved in of.items()}  # fmt: skip


def asked_rows(labels: Answerable, question: Question) -> int:
    """A question's rows, by which operations are shared out: its prompt's, and its answer's where users write."""
    if isinstance(labels, Texts):
        read = labels.training_read(question)
        return len(read.tokens) + len(read.inputs)
    return len(question.prompt)


def rows_trained(trained: Trained, labels: Answerable, virtual: int) -> Mapping[str, int]:
    """User -> rows of all of the user's training steps, virtual tokens included."""
    return {learner.user: trained.adapters[learner.user].metrics["epochs"]
            * sum(asked_rows(labels, question) + virtual for question in learner.train)
            for learner in trained.cell.learners}  # fmt: skip


def text_rows(trained: Trained, labels: Answerable) -> int:
    """Rows of the training texts, each counted once for each learner."""
    return sum(sum({question.prompt: asked_rows(labels, question) for question in learner.train}.values())
               for learner in trained.cell.learners)  # fmt: skip
