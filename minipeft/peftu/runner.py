"""One task through the whole protocol: baselines, methods, learning rates and seeds; a record for each.

    baselines               each its record
    first seed              every method at every learning rate, the shared adapter too: one fused training; those
                            beyond a grid's end where the best lies there, all methods' together, until no grid goes on;
                            then personal adapters on top of the best shared one, likewise
    further seeds           every method at its best learning rate, all seeds in one fused training; then those on top

A learning rate is chosen by the validation loss, averaged over users, of the first seed. What has a record is not done
again.
"""

import resource
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Question, Tags
from minipeft.methods.method import Method
from minipeft.models.classifier import Base, Classifier
from minipeft.models.t5 import T5
from minipeft.models.trunk import Trunk, keep_top
from minipeft.peftu.asking import Asking, Questions
from minipeft.peftu.audit import Audit
from minipeft.peftu.cells import (
    Cell,
    Learner,
    RowCost,
    Trained,
    asked_rows,
    cost_per_row,
    digest_of,
    movement,
    rows_trained,
    text_rows,
    train_cells,
)
from minipeft.peftu.decoding import decode
from minipeft.peftu.grading import Grading
from minipeft.peftu.metrics import Labels, Scored, rouge
from minipeft.peftu.probes import chosen_labels
from minipeft.peftu.protocol import MOST_RATES, PROTOCOLS, SIZES, Protocol, answer_tokens, equal_size
from minipeft.peftu.records import Record, file_name, load_record, record_path, save_record
from minipeft.peftu.settings import Settings, check_settings, keep_settings
from minipeft.peftu.tidy import Tidied
from minipeft.peftu.untrained import Untrained
from minipeft.prompts import ANSWER_TOKENS
from minipeft.running import for_base, pooled
from minipeft.schedule import Adapter, Job, PassConfig
from minipeft.tasks.task import SPLITS, Task
from minipeft.training import EVERYONE

SHARED, SHARED_USER = "shared", "shared_user"
SHARED_BATCH = 32  # examples per step of the one adapter of all users
MOST_TIMES = 20  # the epochs of the first method: what an equal-time comparison gives another at most
COUNTED = 8  # questions, of lengths evenly drawn, of whose training step operations are counted; a shared one's batch
FEW = 4  # users who are trained for a profile


@dataclass(frozen=True)
class Plan:
    """What to do, for every task.

    rates:   the learning rates to try of every method, in place of its own grid, and none beyond them.
    carried: name -> the one to take; of every method, and of the shared adapters. origin: where those were chosen.
    equal:   "parameters": every method at the size whose trained numbers come nearest to those of a LoRA of rank 1,
             an encoder's head not counted; "time": as many epochs as cost what `epochs` of the first method cost,
             counted in floating-point operations, but at most 20 times as many; the shared adapters, `epochs`;
             "": neither.
    top_layers: methods act in that many last layers only; None: in all.
    """

    protocol: Protocol
    methods: dict[str, Method]
    seeds: tuple[int, ...] = (0,)
    epochs: int = 8
    rates: tuple[float, ...] | None = None
    carried: tuple[tuple[str, float], ...] = ()
    origin: str = ""
    equal: str = ""
    top_layers: int | None = None
    passes: PassConfig = field(default_factory=PassConfig)

    @property
    def mode(self) -> str:
        return next((name for name, each in PROTOCOLS.items() if each == self.protocol), "neither")

    def examples(self, task: Task, name: str, epochs: int) -> int:
        """Planned training examples of a method over all its cells. People may stop early; grids may go on."""
        own = sum(len(task.train[user]) for user in task.users if name == SHARED or task.test[user])
        return epochs * own * (len(self.grid(name, True, {})) + len(self.seeds) - 1)

    def all_examples(self, task: Task) -> int:
        """The same of all methods, before it is known which of them apply and whether some get more epochs."""
        return sum(self.examples(task, name, self.epochs) for name in (*self.methods, SHARED, SHARED_USER))

    def grid(self, name: str, first: bool, chosen: dict[str, float]) -> list[float]:
        """The learning rates of a method on its first or a further seed."""
        if not first:
            return [chosen[name]]
        carried = dict(self.carried)
        return [carried[name]] if name in carried else list(self.rates or self.protocol.rates(name))

    def goes_on(self, name: str, seed: int) -> bool:
        """Whether a grid may go on beyond its ends: the protocol's own, on the first seed."""
        return seed == self.seeds[0] and not (self.rates or self.protocol.one_rate or name in dict(self.carried))

    def beyond(self, name: str, seed: int, losses: Mapping[float, float]) -> float | None:
        """The learning rate to try next, given the validation losses so far; None: enough."""
        return self.protocol.beyond(name, losses) if self.goes_on(name, seed) else None


class TaskRun:
    """One task on one base.

    Args:
        tidied: the task as it is trained, and what was done to it.
        base:   its sites are cut down to the top layers where the plan says so.
        show:   called with a line at a time; update: with (done, planned) training examples; made: with each record
                that has been written.
    Raises:
        InputError: what can be known before anything is trained: labels that cannot be told apart, no method that
            applies, no learning rate carried over, records by other settings in OUT.
    """

    def __init__(
        self, plan: Plan, tidied: Tidied, base: Base, out: Path, show: Callable[[str], None],
        update: Callable[[int, int], None], made: Callable[[Record], None] = lambda record: None,
    ):  # fmt: skip
        self.plan, self.task, self.tidied, self.out = plan, tidied.task, tidied, out
        self.protocol, self.show, self.update, self.made = plan.protocol, show, update, made
        self.audit = audit_of(self.task, out)
        self.asking = Asking(base, self.task, self.protocol, self.audit)
        self.grading = Grading(tidied, self.protocol)
        self.users = self.grading.users  # who can be scored
        if plan.top_layers is not None:
            keep_top(base, plan.top_layers)
        self.base = base
        if self.task.generative and plan.mode == "paper":
            raise InputError(f"task {self.task.name!r} is generative; --mode paper is for labels: leave it out")
        if self.task.generative:
            rouge()  # is it there?
        self.methods, self.left_out = self._methods()
        check_settings(out, self.task.name, self._settings)
        self.chosen: dict[str, float] = {}
        self.lower_seconds = 0.0  # of frozen lower layers, which ran on the training texts beforehand
        self.num_unkept = 0  # training texts whose states found no room: lower layers run on them in every pass
        self._done = self._planned = 0

    def _methods(self) -> tuple[dict[str, Method], dict[str, str]]:
        """Name -> method as users of this base train it; and of those that do not apply, why."""
        found, left_out = {}, {}
        for name, method in self.plan.methods.items():
            method = for_base(self.protocol.for_base(method, self.base), self.base)
            try:
                method.check(self.base)
                if self.plan.top_layers is not None and any(method.virtual(self.base)):
                    raise InputError(f"{name} puts virtual tokens before a text, which all layers read; it cannot act "
                                     "in the top layers only")  # fmt: skip
                found[name] = method
            except InputError as error:
                left_out[name] = str(error)
        if not found:
            raise InputError(f"no method applies to this base: {'; '.join(left_out.values())}")
        carried = dict(self.plan.carried)
        if carried and (missing := [name for name in (*found, SHARED, SHARED_USER) if name not in carried]):
            raise InputError(f"--lrs-from: that run has chosen no learning rate of {', '.join(missing)}; each method "
                             "needs its own, or comparisons are not fair: run them there, or leave them out")
        return {name: self._sized(method) for name, method in found.items()}, left_out

    def _sized(self, method: Method) -> Method:
        """The method at the size that makes it equal to the others, where the plan says so."""
        if self.plan.equal != "parameters":
            return method
        anchor = for_base(replace(self.protocol.methods()["lora"], rank=1), self.base).parts[0].count(self.base)
        return for_base(equal_size(method.parts[0], self.base, anchor), self.base)

    @cached_property
    def shared_method(self) -> Method:
        return self._sized(for_base(self.plan.methods.get("lora", self.protocol.methods()["lora"]), self.base))

    # ---- The whole task --------------------------------------------------------------------------------------------

    def run(self, later: int = 0) -> None:
        """Leaves every record in OUT. later: training examples that are planned for afterwards.

        Raises:
            InputError: other settings made the records that are there.
        """
        keep_settings(self.out, self.task.name, self._settings)
        for line in self.left_out.values():
            self.show(f"{self.task.name}: left out: {line}")
        names = (*self.methods, SHARED, SHARED_USER)
        if later or not self._all_recorded(names):
            self._run_lower_layers()
        Untrained(self).save_all()
        self._planned = later + sum(self.plan.examples(self.task, name, self._epochs(name)) for name in names)
        for first, seeds in ((True, self.plan.seeds[:1]), (False, self.plan.seeds[1:])):
            for stage in ([*self.methods, SHARED], [SHARED_USER]):
                self._stage(stage, seeds, first)

    def _all_recorded(self, names: Iterable[str]) -> bool:
        """Whether a run before this one has trained everything; it began with the baselines."""
        return all(record_path(self.out, self.task.name, name, seed).exists()
                   for name in names for seed in self.plan.seeds)  # fmt: skip

    def _run_lower_layers(self) -> None:
        """Those of an encoder in which no method acts: from here on passes start above them, see Trunk."""
        if self.plan.top_layers is None or not isinstance(self.base, Classifier):
            return
        questions = self.asking.questions()
        began = time.perf_counter()
        self.base = Trunk(self.base, (each.prompt for split in questions.values() for each in pooled(split)))
        texts = {each.prompt for each in pooled(questions["train"])}
        kept = texts & self.base.starts.keys()
        self.num_unkept = len(texts) - len(kept)
        self.lower_seconds = (time.perf_counter() - began) * sum(map(len, kept)) / self.base.num_rows

    def train_a_little(self) -> None:
        """A few users by every method for an epoch, all at once, of which nothing is kept: for --profile."""
        cells = [self.cell(name, self.chosen[name], self.plan.seeds[0]) for name in self.methods]
        jobs = [Job(user.user, user.train, user.val, replace(cell.config, epochs=1), f"{cell.name} {user.user}")
                for cell in cells for user in cell.learners[:FEW]]  # fmt: skip
        Engine(self.base, self.asking.prompts.labels, self.plan.passes).train(jobs)

    def finish(self) -> None:
        """Nothing more is planned, and records are all that is kept: adapters are deleted."""
        self._planned = self._done
        self.update(self._done, self._planned)
        if self._adapters_folder.exists():
            shutil.rmtree(self._adapters_folder)

    def save(self, record: Record) -> None:
        """Beside what had to be fitted for it."""
        self.audit.keep()
        save_record(self.out, record)
        self.made(record)

    def _count(self, examples: int) -> None:
        self._done += examples
        self.update(self._done, self._planned)

    def _found(self, examples: int) -> None:
        """An earlier run did these: they are no longer planned."""
        self._planned = max(self._done, self._planned - examples)

    @property
    def _adapters_folder(self) -> Path:
        return self.out / "adapters" / file_name(self.task.name)

    def _stage(self, names: Sequence[str], seeds: Sequence[int], first: bool) -> None:
        """Train what of these has no record yet, all in one fused training, and write the records."""
        todo: list[tuple[str, int, list[Cell]]] = []
        for seed in seeds:
            for name in names:
                rates = self.plan.grid(name, first, self.chosen)
                cells = [self.cell(name, rate, seed) for rate in rates]
                record = self.existing(name, seed, self._digest(cells))
                if record is None:
                    todo.append((name, seed, cells))
                else:
                    self._found(sum(cell.examples for cell in cells))
                    if first:
                        self.chosen[name] = record.chosen_lr
        for (name, seed, cells), tried in zip(todo, self._tried([cells for _, _, cells in todo])):
            losses = losses_of(tried)
            best = min(tried, key=Trained.validation)
            if not np.isfinite(best.validation()):
                self.show(f"{self.task.name}: {name}, seed {seed}: at every learning rate somebody could not be "
                          "trained")  # fmt: skip
            for each in tried:
                if reasons := list(each.failed.values()):
                    self.show(f"{self.task.name}: {each.cell.label}: {len(reasons)} users could not be trained, e.g. "
                              f"{reasons[0]}")  # fmt: skip
            if first:
                self.chosen[name] = best.cell.config.learning_rate
            self.save(self._record_of(name, seed, self._digest(cells), best, losses))
            for each in tried:
                if each is not best or name != SHARED:
                    each.forget()
            self.show(f"{self.task.name}: {name}, seed {seed}, learning rate {best.cell.config.learning_rate:g}: done")

    def _tried(self, grids: Sequence[Sequence[Cell]]) -> list[list[Trained]]:
        """Of each method the cells of its learning rates, trained; and of those beyond, as long as a grid goes on."""
        found: list[list[Trained]] = [[] for _ in grids]
        while any(grids):
            trained = iter(self.train([cell for cells in grids for cell in cells]))
            for own, cells in zip(found, grids):
                own += [next(trained) for _ in cells]
            grids = [self._beyond(own) if cells else [] for own, cells in zip(found, grids)]
        return found

    def _beyond(self, tried: Sequence[Trained]) -> list[Cell]:
        """The cell of the next learning rate, now planned; none if that is enough."""
        first = tried[0].cell
        rate = self.plan.beyond(first.name, first.config.seed, losses_of(tried))
        if rate is None:
            return []
        cell = replace(first, config=replace(first.config, learning_rate=rate), under=None)
        self._planned += cell.examples
        self.show(f"{self.task.name}: {cell.name}: the best learning rate lies at the grid's end; next {rate:g}")
        return [cell]

    def train(self, cells: Sequence[Cell], planned: bool = True) -> list[Trained]:
        """planned: whether the examples of these cells are among the planned ones."""
        cells = [cell if cell.upon is None else replace(cell, under=self.shared_adapter(cell.upon)) for cell in cells]
        callbacks = (self._count, self._found) if planned else (lambda examples: None,) * 2
        return train_cells(self.base, self.asking.prompts.labels, cells, self.audit, self._adapters_folder,
                           self.plan.passes, *callbacks)  # fmt: skip

    def shared_adapter(self, cell: Cell, planned: bool = False) -> Adapter:
        """A shared cell's adapter, one object for all who have it under theirs; trained again if its file is gone."""
        digest = cell.digest()
        if digest not in self._kept:
            self._kept[digest] = self.train([cell], planned)[0].adapters[EVERYONE]
        return self._kept[digest]

    @cached_property
    def _kept(self) -> dict[str, Adapter]:
        return {}

    # ---- What is trained -------------------------------------------------------------------------------------------

    def _method(self, name: str) -> Method:
        return self.shared_method if name in (SHARED, SHARED_USER) else self.methods[name]

    def _epochs(self, name: str) -> int:
        if self.plan.equal != "time" or name in (SHARED, SHARED_USER):
            return self.plan.epochs
        first, most = next(iter(self.methods)), MOST_TIMES * self.plan.epochs
        return min(most, max(1, round(self.plan.epochs * self._step_cost(first) / self._step_cost(name))))

    def _step_cost(self, name: str) -> float:
        """Operations of a training pass over a text of mean length, by this method."""
        labels, questions = self.asking.prompts.labels, pooled(self.questions(name)["train"])
        mean = sum(asked_rows(labels, question) for question in questions) / len(questions)
        return self._cost(name).flops * (mean + sum(self._method(name).virtual(self.base)))

    def _cost(self, name: str) -> RowCost:
        """Of a training step; the adapter that lies under it acts in it."""
        if name not in self._counted:
            labels, method = self.asking.prompts.labels, self._method(name)
            by_length = sorted(pooled(self.questions(name)["train"]), key=lambda each: asked_rows(labels, each))
            number = SHARED_BATCH if name == SHARED else COUNTED
            questions = [by_length[(2 * i + 1) * len(by_length) // (2 * number)] for i in range(number)]
            start = method.initial_row(self.base, 0, EVERYONE) if name == SHARED_USER else None
            under = None if start is None else Adapter(EVERYONE, method, start)  # its numbers do not matter
            self._counted[name] = cost_per_row(self.base, labels, method, questions, under)
        return self._counted[name]

    @cached_property
    def _counted(self) -> dict[str, RowCost]:
        return {}

    def questions(self, name: str, asking: Asking | None = None) -> Questions:
        """As users of this method are asked; by another asking than this run's, about fewer examples."""
        return (asking or self.asking).questions(self._method(name), self.protocol.examples)

    def cell(self, name: str, rate: float, seed: int) -> Cell:
        config = self.protocol.config(self._method(name), rate, seed, self._epochs(name))
        questions = self.questions(name)
        if name == SHARED:
            everyone = Learner(EVERYONE, pooled(questions["train"]), pooled(questions["val"]))
            return Cell(name, replace(config, batch_size=SHARED_BATCH), (everyone,))
        learners = tuple(Learner(user, questions["train"][user], questions["val"][user],
                                 i if self.protocol.start_by_place else None)
                         for i, user in enumerate(self.users))  # fmt: skip
        upon = self.cell(SHARED, self.chosen[SHARED], seed) if name == SHARED_USER else None
        return Cell(name, config, learners, upon)

    # ---- Answers ---------------------------------------------------------------------------------------------------

    def score(self, adapters: dict[str, Adapter], questions: dict[str, list[Question]]) -> dict[str, np.ndarray]:
        """User -> label scores of their questions [n, C]."""
        asked = {user: questions[user] for user in self.users if user in adapters}
        return label_scores(self.base, self.asking.prompts.labels, adapters, asked, self.plan.passes)

    def scored(self, scored: dict[str, np.ndarray]) -> Scored:
        prompts, independent = self.asking.prompts, isinstance(self.asking.prompts.labels, Tags)
        return Scored(scored, [(label,) for label in self.task.labels] if independent else prompts.sets, independent)

    def answers(self, scored: dict[str, np.ndarray]) -> dict[str, list[Labels]]:
        """The answer of the highest likelihood; of tags those more likely than not."""
        prompts = self.asking.prompts
        if isinstance(prompts.labels, Tags):
            return {user: chosen_labels(self.task.labels, own, True) for user, own in scored.items()}
        return {user: [prompts.sets[i] for i in own.argmax(1)] for user, own in scored.items()}

    def replies(self, adapters: dict[str, Adapter], questions: dict[str, list[Question]]) -> dict[str, Any]:
        """`answers`, and what `Grading.record` wants beside them: `scored` where labels are, `decoded` of a T5."""
        if self.task.generative:
            return dict(zip(("answers", "silent"), self.written(adapters, questions)))
        scored = self.score(adapters, questions)
        found = {"answers": self.answers(scored), "scored": self.scored(scored)}
        said = self.decoded(adapters, questions) if isinstance(self.base, T5) else ()
        return found | dict(zip(("decoded", "silent"), said))

    def written(
        self, adapters: dict[str, Adapter], questions: dict[str, list[Question]]
    ) -> tuple[dict[str, list[Labels]], int]:
        """The answers of a generative task, and how many of them could not be written."""
        said, silent = self.decoded(adapters, questions)
        return {user: [(text.strip(),) for text in own] for user, own in said.items()}, silent

    def decoded(
        self, adapters: dict[str, Adapter], questions: dict[str, list[Question]]
    ) -> tuple[dict[str, list[str]], int]:
        """See `decode`; of a task with labels, as many tokens as were published."""
        most = ANSWER_TOKENS if self.task.generative else answer_tokens(next(iter(adapters.values())).method)
        return decode(self.base, self.asking.prompts, self.plan.passes, adapters, questions, most)

    def _record_of(self, name: str, seed: int, digest: str, best: Trained, losses: dict[float, float]) -> Record:
        """The record of trained adapters, at the best learning rate."""
        questions, method = self.questions(name), best.cell.config.method
        own = best.adapters
        adapters, cost = dict.fromkeys(self.users, own[EVERYONE]) if name == SHARED else own, self._cost(name)
        replies = self.replies(adapters, questions["test"])
        rows = rows_trained(best, self.asking.prompts.labels, sum(method.virtual(self.base)))
        flops, seconds = cost.flops * sum(rows.values()), best.seconds
        if name != SHARED_USER:  # it stands on shared, whose cost has the lower layers'
            flops += cost.frozen_flops * text_rows(best, self.asking.prompts.labels)
            seconds += self.lower_seconds
        failed = len(self.users) if name == SHARED and best.failed else len(best.failed)
        given_up = sum(not np.isfinite(loss) for loss in losses.values())
        skipped = sum(adapter.metrics["skipped_steps"] for adapter in own.values())
        unmatched = self.plan.equal == "parameters" and method.parts[0].name not in SIZES
        more = {"no size to set, so not matched: numbers it trains": unmatched * method.parts[0].count(self.base),
                "learning rates given up, for somebody could not be trained at them": given_up,
                "steps skipped, gradient not finite": skipped,
                "users who could not be trained, answered by the start value": failed,
                "training texts whose lower layers ran in every pass, for there was no room for their states":
                    self.num_unkept,
                f"learning rate carried over from {self.plan.origin}": int(bool(self.plan.carried))}  # fmt: skip
        return self.grading.record(
            name, "shared" if name == SHARED else "personal", seed, digest, **replies,
            method=method.described(), trainable=method.count(self.base), bytes_per_user=4 * method.count(self.base),
            train_flops_per_user=flops / len(self.users), train_seconds=seconds,
            kept_bytes_per_row=cost.kept_bytes, peak_memory_mb=peak_memory_mb(self.base),
            val_loss=self._curves(name, best), movement=movement(best, self.base),
            chosen_lr=best.cell.config.learning_rate,
            lr_grid={rate: loss for rate, loss in losses.items() if np.isfinite(loss)},
            more_notes=self.asking.notes_of(method, self.protocol.examples)
            | {what: number for what, number in more.items() if number},
        )  # fmt: skip

    def _curves(self, name: str, best: Trained) -> list[list[float | None]]:
        curves = [[loss if np.isfinite(loss) else None for loss in curve] for curve in best.curves]
        return curves * len(self.users) if name == SHARED else curves

    # ---- What is there already -------------------------------------------------------------------------------------

    @property
    def _settings(self) -> Settings:
        """What a user chooses, by the options, of what determines the records. Digests speak for the rest."""
        plan, names = self.plan, (*self.methods, SHARED, SHARED_USER)
        carried = {name: rate for name, rate in plan.carried if name in names}  # an origin may gain others later
        grids = {name: [*plan.grid(name, True, {}), f"up to {MOST_RATES}"] for name in names
                 if plan.goes_on(name, plan.seeds[0])}  # fmt: skip
        return {
            "--mode": plan.mode, "--epochs": plan.epochs, "--top-layers": plan.top_layers,
            "--equal": f"time of {next(iter(self.methods))}" if plan.equal == "time" else plan.equal,
            "--lrs": plan.rates, "the grids of learning rates": grids, "--lrs-from": carried,
            "--device": self.base.device.type, "the base (--model)": self.base_digest[:12],
            "the data (--tasks, --split, --users, --instructions)": self.task_digest,
        }  # fmt: skip

    def _digest(self, cells: Sequence[Cell]) -> str:
        further = [MOST_RATES] if self.plan.goes_on(cells[0].name, cells[0].config.seed) else []
        return digest_of([[cell.digest() for cell in cells], asdict(self.protocol), self.task_digest,
                          self.base_digest, self.plan.top_layers, *further])  # fmt: skip

    @cached_property
    def task_digest(self) -> str:
        return digest_of([asdict(self.task.header), *(asdict(e) for split in SPLITS for e in self.task.pooled(split))])

    @cached_property
    def base_digest(self) -> str:
        return self.base.origin.fingerprint

    def existing(self, name: str, seed: int, digest: str) -> Record | None:
        """The record of an earlier run. InputError if other settings made it."""
        path = record_path(self.out, self.task.name, name, seed)
        if not path.exists():
            return None
        record = load_record(path)
        if record.digest != digest:
            raise InputError(f"{path} was made by other settings, data or another base; name another folder with --out")
        return record


def losses_of(tried: Iterable[Trained]) -> dict[float, float]:
    """Learning rate -> validation loss."""
    return {each.cell.config.learning_rate: each.validation() for each in tried}


def audit_of(task: Task, out: Path) -> Audit:
    return Audit(task, out / "audit" / f"{file_name(task.name)}.json")


def peak_memory_mb(base: Base) -> float:
    """Of the process so far: everything that shares the fused passes."""
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated(base.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
