"""The fused pass: many users' forward, backward and AdamW step over one read of the frozen weights.

    loss      = sum over users of (mean over the user's own target tokens of -log p(token))
    gradient  : each user's is what they would have had alone, because nobody else's loss depends on their row
    step      : one AdamW launch over the rows in the pass, each with its own step count and learning rate

On a CPU a pass may run in lanes (lanes.py): users side by side, those of a lane in a pass of their own.

`run` takes many users to the end of their own plans (schedule.py), a pass at a time; `train` is that in one call.
`score` asks trained users' models questions. Where memory does not hold a pass, its halves go one after the other.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from minipeft.acting import Acting
from minipeft.batch import Batch, Group, Part, groups_of, pack, shared_tokens
from minipeft.errors import InputError
from minipeft.labels import Answerable, Question
from minipeft.lanes import LEAST_ROWS, Lanes
from minipeft.methods.method import Method, Residents, Share
from minipeft.models.classifier import Base
from minipeft.models.generate import GREEDY, Sampling, generate, generate_from
from minipeft.models.hooks import Hooks
from minipeft.models.t5 import T5
from minipeft.models.top import Top
from minipeft.profiling import region
from minipeft.randomness import key_of
from minipeft.schedule import Adapter, Fault, Job, PassConfig, Run, Standing, choose
from minipeft_kernels.adamw import AdamWSettings, adamw_
from minipeft_kernels.backend import backend
from minipeft_kernels.segments import TILE, Segments

COUNTING = Lock()  # of all Totals: lanes count in the same
LEAST_SHARED = 8  # first tokens of prompts: for fewer, splitting sequences does not pay
# What PyTorch says on a CPU; CUDA to PyTorch and to Triton; cuBLAS, of its workspace.
NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
             "CUBLAS_STATUS_ALLOC_FAILED")  # fmt: skip


@dataclass
class Totals:
    """What a call did: passes run, rows in them (training and evaluation) and how many of those were real tokens.

    splits: passes that memory did not hold. planning: seconds of training passes before anything is computed.
    """

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    splits: int = 0
    planning: float = 0.0

    @contextmanager
    def planned(self, lanes: int = 1) -> Iterator[None]:
        """What runs inside is planning, beside that of so many lanes."""
        began = time.perf_counter()
        with region("plan"):
            yield
        with COUNTING:
            self.planning += (time.perf_counter() - began) / lanes

    def count(self, batch: Batch) -> None:
        with COUNTING:
            self.passes += 1
            self.rows += batch.num_rows
            self.tokens += batch.num_real_rows


class DoesNotFit(InputError):
    """What one user asks for at a time does not fit into memory, even alone. place: (bank, slot)."""

    def __init__(self, user: str, place: tuple[int, int]):
        super().__init__(f"user {user!r}: one question or minibatch of theirs alone does not fit into memory; shorten "
                         "their texts or lower the batch size")  # fmt: skip
        self.place = place


class NoRoom(InputError):
    """The rows of all slots do not fit into memory."""


@dataclass(frozen=True)
class Pass:
    """What has happened since the last one: one pass, and who left and why.

    finished:   runs at the end of their plans; `adapter` is what came of each.
    faults:     users who cannot be trained.
    runs:       who is resident now.
    worked_off: training examples of the plan that are behind us, those of users who left early included.
    """

    finished: list[Run]
    faults: list[Fault]
    runs: list[Run]
    worked_off: int


class Engine:
    """One frozen base, and the banks of the users who are resident on it.

    Args:
        model:  the frozen base. Its weights are never written.
        labels: the task's labels.
        passes: how users share passes.
    Raises:
        InputError: passes make no sense, or not on the base's device.
        ValueError: nothing runs on that device, or it is a GPU other than the current one.
    """

    def __init__(self, model: Base, labels: Answerable, passes: PassConfig | None = None):
        passes = passes or PassConfig()
        passes.check(model.device)
        if model.device.type != "meta":  # a base without numbers is for checking jobs
            backend(model.device)
        self.model, self.labels, self.passes = model, labels, passes
        self.totals = Totals()
        self._token_budget = passes.token_budget  # of a pass; less once memory did not hold one
        self._bank_of: dict[tuple, int] = {}  # (method's kind, the shared adapter under it) -> bank number
        self._banks: list[Residents] = []
        self._under: list[Residents | None] = []  # of each bank: the shared adapter under its users'
        self._shared: dict[int, tuple[Adapter, Residents]] = {}  # id of a shared adapter -> it, and it alone in a bank
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)

    # ---- Residents -------------------------------------------------------------------------------------------------

    def admit(
        self, user: str, method: Method, row: Tensor | None = None, seed: int = 0, under: Adapter | None = None,
        name: str = "",
    ) -> tuple[int, int]:  # fmt: skip
        """Make a user resident, at their start value or at `row` [P]. Returns (bank number, slot).

        under: an adapter that acts under the user's own. name: what the slot is known by; "": the user's id.

        Raises:
            NoRoom: the user is the first of their kind, and memory does not hold a bank.
        """
        key = (method.kind(self.model), id(under) if under else None)
        if key not in self._bank_of:
            residents = self._residents(method, self.passes.slots), self._shared_residents(under) if under else None
            self._bank_of[key] = len(self._banks)
            self._banks.append(residents[0])
            self._under.append(residents[1])
        number = self._bank_of[key]
        if row is None:
            row = method.initial_row(self.model, seed, user)
        return number, self._banks[number].admit(name or user, method, row,
                                                 key_of(seed, user, method.name, "dropout"))

    def _residents(self, method: Method, num_slots: int) -> Residents:
        try:
            return Residents(method, self.model, num_slots, self.model.device, self.model.dtype)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise NoRoom(f"memory does not hold {num_slots} slots of {method.layout(self.model).row_size} numbers, "
                         "each four times; lower --slots") from None  # fmt: skip

    def _shared_residents(self, adapter: Adapter) -> Residents:
        if id(adapter) not in self._shared:
            residents = self._residents(adapter.method, 1)
            residents.admit(adapter.user, adapter.method, adapter.row, 0)
            self._shared[id(adapter)] = adapter, residents
        return self._shared[id(adapter)][1]

    def evict(self, bank: int, slot: int) -> None:
        self._banks[bank].bank.evict(slot)

    def begin(self, job: Job) -> Run:
        """Make a job's user resident, where they stand; of the standing the run keeps no more than it needs.

        Raises:
            InputError: the job makes no sense for this base. NoRoom: see `admit`.
        """
        self.check(job)
        row = job.start if job.standing is None else job.standing.tensors["row"]
        place = self.admit(job.user, job.config.method, row, job.config.seed, job.under, job.key)
        if job.standing is not None:
            bank, slot = self._banks[place[0]].bank, place[1]
            bank.exp_avg[slot], bank.exp_avg_sq[slot] = (job.standing.tensors[n] for n in ("exp_avg", "exp_avg_sq"))
        run = Run(job, *place, self.virtual(place[0]), self._shared_tokens(job))
        run.job = replace(job, standing=None)
        return run

    def _shared_tokens(self, job: Job) -> int:
        """First tokens of the job's prompts that a minibatch reads once: none with dropout, which each example has its
        own of."""
        once = self.passes.share and self.model.causal and not isinstance(self.model, T5)
        if not once or any(getattr(part, "dropout", 0) for part in job.config.method.parts):
            return 0
        shared = shared_tokens([question.prompt for question in job.train])
        return shared if shared >= LEAST_SHARED else 0

    def standing(self, run: Run) -> Standing:
        """Where a run stands and its numbers: as its job's `standing` it goes on from there, to the bit."""
        bank = self._banks[run.bank].bank
        return run.standing(bank.weights[run.slot], bank.exp_avg[run.slot], bank.exp_avg_sq[run.slot])

    def row(self, run: Run) -> Tensor:
        """The run's numbers as they are now: [P] fp32, a copy on the CPU."""
        return self._banks[run.bank].bank.weights[run.slot].to("cpu", copy=True)

    def gradients(self, runs: Sequence[Run]) -> Tensor:
        """What the last step left of these residents of one bank: [runs, P] fp32, before clipping."""
        (bank,) = {run.bank for run in runs}
        return self._banks[bank].bank.grads[[run.slot for run in runs]]

    def virtual(self, bank: int) -> tuple[int, int]:
        """Virtual tokens of this bank's users (Method.virtual)."""
        return self._banks[bank].virtual

    # ---- One pass --------------------------------------------------------------------------------------------------

    def _hooks(self, groups: Sequence[Group], steps: dict[tuple[int, int], int] | None = None) -> Hooks:
        """What a pass does at the sites of the base, on rows of these groups: each row's own adapter.

        steps: steps so far of each (bank, slot); None where nobody trains.
        """
        tile, shares, under = TILE if self.passes.deterministic else None, [], []
        for group in groups:
            residents, slots = self._banks[group.bank], group.segments.slots
            so_far = None if steps is None else np.array([steps[group.bank, slot] for slot in slots.tolist()])
            shares.append(Share(residents, group.first_row, group.segments, group.prompts, residents.keys[slots],
                                so_far, tile, self._anchor))  # fmt: skip
            if (shared := self._under[group.bank]) is not None:
                whole = Segments.build([0], [group.segments.num_rows], self.model.device)
                under.append(Share(shared, group.first_row, whole, None, shared.keys, None, tile, self._anchor))
        return Acting(shares, under, self._anchor, tile)

    def _begin(self, groups: Sequence[Group], training: bool) -> None:
        for group in groups:
            self._banks[group.bank].begin(group.segments.slots, training)
            if (shared := self._under[group.bank]) is not None:
                shared.begin(np.zeros(1, dtype=np.int64), training=False)

    def _log_probs(self, batch: Batch, steps: dict[tuple[int, int], int] | None = None, lanes: int = 1) -> Tensor:
        """Log-probabilities of what a target may be at the rows that were asked for: [M, vocab].

        lanes: see Totals.planned.
        """
        if self.model.lockstep is not None:
            self.model.lockstep.before(steps is not None)
        self.totals.count(batch)
        self.model.recompute = self.passes.recompute
        self._begin(batch.groups, steps is not None)
        with self.totals.planned(lanes):
            hooks = self._hooks(batch.groups, steps)
            acting = [table[group.bank] for group in batch.groups for table in (self._banks, self._under)]
            acts = batch.head_attend is not None or any(each.at_head for each in acting if each is not None)
            top = Top(batch.head_rows, batch.head_attend, self._hooks(batch.head_groups() if acts else (), steps))
            reading = None if batch.inputs is None else self._hooks(batch.inputs.groups, steps)
        if batch.inputs is None:
            read = self.model.read(batch.rows, top, hooks)  # [M', width]
        else:
            keys = self.model.cross_keys(self.model.encode_rows(batch.inputs.rows, reading), reading)
            read = self.model.decode_rows(batch.rows, keys, batch.cross, hooks).index_select(0, batch.head_rows)
        logits = self.model.head(read, top.hooks)  # [M', vocab]
        return self.labels.log_probs(logits).index_select(0, batch.read)

    def train_step(self, chosen: Sequence[Run]) -> None:
        """One optimizer step of every chosen user on their next minibatch, in one pass. Sorted by bank and slot."""
        with self.totals.planned():
            lanes = self._lanes_of(chosen)
        if len(lanes) == 1:
            self._train_lane(chosen)
            return
        self._threads.run([partial(self._train_lane, lane, len(lanes)) for lane in lanes])

    def _lanes_of(self, chosen: Sequence[Run]) -> list[Sequence[Run]]:
        """Of about as many rows each, and sorted as these are. One lane where they would be in each other's way: ranks
        agree on each pass, parameters are derived for a pass; and under the profiler, which watches one thread. No more
        than the rows of this pass fill."""
        most = min(self.passes.lanes, len(chosen))
        acting = {table[run.bank] for run in chosen for table in (self._banks, self._under)} - {None}
        derived = any(actor.derived for residents in acting for actor in residents.actors)
        together = derived or self.model.lockstep is not None or torch.autograd._profiler_enabled()
        if most == 1 or together or backend(self.model.device) != "torch":
            return [chosen]
        rows = {run.job.key: run.minibatch(self.labels).num_rows for run in chosen}
        most = min(most, max(1, round(sum(rows.values()) / LEAST_ROWS)))
        lanes: list[list[Run]] = [[] for _ in range(most)]
        loads = [0] * most
        for run in sorted(chosen, key=lambda run: -rows[run.job.key]):  # the largest first, each to who has least
            least = loads.index(min(loads))
            lanes[least].append(run)
            loads[least] += rows[run.job.key]
        return [sorted(lane, key=lambda run: (run.bank, run.slot)) for lane in lanes]

    @cached_property
    def _threads(self) -> Lanes:
        return Lanes(self.passes.lanes)

    def _train_lane(self, chosen: Sequence[Run], lanes: int = 1) -> None:
        with self.totals.planned(lanes):
            parts = [run.minibatch(self.labels) for run in chosen]
            batch = pack(parts, self.model.device, self.model.causal)
            targets, weights = [], []
            for part in parts:
                tokens = [token for read in part.reads for token in read.targets]
                targets += tokens
                weights += [1 / len(tokens)] * len(tokens)
        with region("forward"):
            log_probs = self._log_probs(batch, {(run.bank, run.slot): run.step for run in chosen}, lanes)
            of_rows = torch.tensor(targets, device=log_probs.device).view(len(log_probs), -1)  # a tag's row: C targets
            losses = -log_probs.gather(1, of_rows).flatten()
            loss = (losses * torch.tensor(weights, device=log_probs.device)).sum()
        with region("backward"):
            loss.backward()
        with region("step"):
            self._step(batch.groups, chosen)

    def _step(self, groups: Sequence[Group], chosen: Sequence[Run]) -> None:
        """The optimizer step of a pass whose gradients are there."""
        for group in groups:
            runs = [run for run in chosen if run.bank == group.bank]
            residents, slots = self._banks[group.bank], group.segments.slots
            residents.end(slots)
            bank = residents.bank
            rounded = torch.empty_like(bank.weights[0], dtype=torch.bfloat16)  # from the step on nothing is allocated
            norms = adamw_(bank.weights, bank.grads, bank.exp_avg, bank.exp_avg_sq,
                           torch.from_numpy(slots).to(bank.weights.device), _settings(runs),
                           squares=residents.squares, compute=bank.copy)
            for run, norm in zip(runs, norms.tolist()):
                run.skipped_steps += not np.isfinite(norm)
                run.advance()  # at once: who has stepped shall not step again if memory runs out in the next bank
            for run in runs:
                if run.job.config.bf16_weights:
                    bank.weights[run.slot].copy_(rounded.copy_(bank.weights[run.slot]))

    def _step_in_parts(self, chosen: Sequence[Run]) -> None:
        """`train_step` of each of these, in halves where memory does not hold the pass. Raises DoesNotFit."""
        if not self._fits(lambda: self.train_step(chosen)):
            left = [run for run in chosen if run.part is not None]  # who has not stepped
            if len(chosen) == 1:
                raise DoesNotFit(chosen[0].job.key, (chosen[0].bank, chosen[0].slot))
            self._lower_budget(sum(run.part.num_rows for run in left))
            for half in _halves(left):
                self._step_in_parts(half)

    def _fits(self, step: Callable[[], None]) -> bool:
        """Whether memory held this step. What it had allocated is free again when this returns."""
        try:
            step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or self.model.lockstep is not None:  # other ranks are in the midst of it
                raise
            return False
        return True

    def _lower_budget(self, num_rows: int) -> None:
        """Remember that memory does not hold a pass of so many rows."""
        self.totals.splits += 1
        self._token_budget = max(1, min(self._token_budget, num_rows) // 2)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def score(self, asked: Iterable[tuple[int, int, Sequence[Question]]]) -> Iterator[tuple[int, np.ndarray]]:
        """Label scores of residents' questions, in as few passes as the token budget allows.

        Args:
            asked: (bank, slot, questions) of residents.
        Yields:
            (position in asked, scores [questions, C] fp32, log p), a user's questions possibly in several pieces, in
            order. A piece's size depends on the user alone.
        """
        pieces: list[tuple[int, Part]] = []
        for position, (bank, slot, questions) in enumerate(asked):
            start = 0
            while start < len(questions):
                reads, used = [], 0
                while start < len(questions):
                    more = self.labels.scoring_reads(questions[start])
                    size = sum(len(read.tokens) for read in more)
                    if reads and used + size > self.passes.token_budget // 4:
                        break
                    reads += more
                    used += size
                    start += 1
                pieces.append((position, Part(bank, slot, reads, self.virtual(bank))))
        while pieces:
            taken, left, used, owners = [], [], 0, set()
            for position, part in pieces:  # at most one piece of a user in a pass
                owner = (part.bank, part.slot)
                if owner not in owners and (not taken or used + part.num_rows <= self._token_budget):
                    taken.append((position, part))
                    used += part.num_rows
                else:
                    left.append((position, part))
                owners.add(owner)
            taken.sort(key=lambda piece: (piece[1].bank, piece[1].slot))
            yield from self._score_in_parts(taken)
            pieces = left

    def _score_in_parts(self, pieces: list[tuple[int, Part]]) -> Iterator[tuple[int, np.ndarray]]:
        """The scores of these pieces, in halves where memory does not hold the pass; of one user, half the questions.

        Raises:
            DoesNotFit: not even one question of a user.
        """
        found: list[tuple[int, np.ndarray]] = []
        sizes = [len(part.reads) // self.labels.reads_per_question for _, part in pieces]

        def score() -> None:
            with torch.no_grad():
                batch = pack([part for _, part in pieces], self.model.device, self.model.causal)
                scores = self.labels.scores(self._log_probs(batch), [read for _, part in pieces for read in part.reads])
            found.extend((position, own.cpu().numpy()) for (position, _), own in zip(pieces, scores.split(sizes)))

        if self._fits(score):
            yield from found
            return
        position, part = pieces[0]
        if len(pieces) > 1:
            self._lower_budget(sum(part.num_rows for _, part in pieces))
            halves = _halves(pieces)
        elif sizes[0] > 1:
            middle = sizes[0] // 2 * self.labels.reads_per_question
            halves = [[(position, replace(part, reads=reads))] for reads in (part.reads[:middle], part.reads[middle:])]
        else:
            raise DoesNotFit(self._banks[part.bank].bank.users[part.slot], (part.bank, part.slot))
        for half in halves:
            yield from self._score_in_parts(half)

    def generate(
        self, asked: Sequence[tuple[int, int, Sequence[Sequence[int]]]], max_new_tokens: int,
        stop: Sequence[int] | None = None, sampling: Sampling = GREEDY,
    ) -> list[list[list[int]]]:  # fmt: skip
        """What residents' models say after their prompts, all users in one batch, see models/generate.py.

        Args:
            asked: (bank, slot, prompts) of residents, each resident once.
        Returns:
            for each of asked, in order, the new tokens of each of its prompts.
        """
        order = sorted(range(len(asked)), key=lambda i: asked[i][:2])
        places = [asked[i][:2] for i in order]
        owners = np.repeat(np.arange(len(order)), [len(asked[i][2]) for i in order])  # [n], of each prompt
        virtual = [[self.virtual(bank)[whose] for bank, _ in places] for whose in (0, 1)]
        virtual = [np.array(numbers, dtype=np.int64)[owners] for numbers in virtual]  # [n] each
        self._begin(groups_of(places, [0] * len(places), self.model.device), training=False)

        def hooks_of(lengths: np.ndarray, whose: int | None) -> Hooks:
            rows = np.bincount(owners, weights=lengths, minlength=len(order)).astype(np.int64)
            starts = None if whose is None else (owners, np.cumsum(lengths) - lengths, virtual[whose])
            return self._hooks(groups_of(places, rows, self.model.device, starts))

        prompts = [prompt for i in order for prompt in asked[i][2]]
        if isinstance(self.model, T5):
            new = generate_from(self.model, prompts, max_new_tokens, stop, sampling, hooks_of, *virtual)
        else:
            new = generate(self.model, prompts, max_new_tokens, stop, sampling, hooks_of, virtual[0])
        answers = [[] for _ in asked]
        for owner, tokens in zip(owners, new):
            answers[order[owner]].append(tokens)
        return answers

    # ---- Whole runs ------------------------------------------------------------------------------------------------

    def train(
        self,
        jobs: Sequence[Job],
        on_finish: Callable[[Adapter], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> dict[str, Adapter]:
        """Train every job to the end of its own plan, many in each pass. Returns job key -> best adapter by validation.

        Args:
            on_finish:   called with each adapter the moment its user is done.
            on_progress: called with the number of training examples just worked off (all planned ones of a user who
                         leaves early count as worked off).
            on_fault:    called with each user who cannot be trained; everybody else is.
        Raises:
            InputError: a user twice. Without on_fault: a user who cannot be trained, before anybody else is if that can
                be seen: no training or validation questions, an empty prompt, an unknown label, a configuration that
                makes no sense for this base; or else when it is seen: the user diverges.
        """
        seen = set()
        for job in jobs:
            if job.key in seen:
                raise InputError(f"user {job.key!r} is listed twice; join the user's examples into one job, or give "
                                 "jobs by several methods names of their own")
            seen.add(job.key)
            if on_fault is None:
                self.check(job)
        adapters = {}
        for done in self.run(jobs):
            for run in done.finished:
                adapters[run.job.key] = adapter = run.adapter
                if on_finish is not None:
                    on_finish(adapter)
            for fault in done.faults:
                if on_fault is None:
                    raise InputError(fault.reason)
                on_fault(fault)
            if on_progress is not None:
                on_progress(done.worked_off)
        return adapters

    def run(self, jobs: Iterable[Job]) -> Iterator[Pass]:
        """Train every job to the end of its own plan, many in each pass, and report after each pass.

        Jobs are drawn one by one as slots come free, and nothing is kept of who has left: memory does not grow with
        their number. Neither their order nor the company changes anybody's adapter: in fp32 beyond rounding, with
        passes.deterministic not in a single bit. Who cannot be trained leaves; nobody else notices. Between two passes
        a caller may ask for `standing`, or stop; until the next pass also of who has finished. Whose standing is at the
        end of their plan finishes without a pass.

        Raises:
            NoRoom: memory does not hold the rows of so many slots.
            ValueError: a user who is resident already.
        """
        waiting, runs = iter(jobs), []
        while True:
            faults, finished, worked_off = [], [], 0
            while len(runs) < self.passes.slots and (job := next(waiting, None)) is not None:
                try:
                    runs.append(self.begin(job))
                except NoRoom:  # nobody's own fault
                    raise
                except InputError as error:
                    faults.append(Fault(job.key, str(error)))
                    worked_off += job.planned_examples
            if not (runs or faults):
                return
            left, leaving = sum(run.examples_left for run in runs), {}
            at_end = [run for run in runs if run.done]
            try:
                for run in at_end or (self._pass(runs) if runs else ()):
                    if run.fault:
                        faults.append(Fault(run.job.key, run.fault))
                    elif run.done:
                        finished.append(run)
                    else:
                        continue
                    leaving[run.job.key] = run
            except DoesNotFit as error:
                leaving = {run.job.key: run for run in runs if (run.bank, run.slot) == error.place}
                faults += [Fault(user, str(error)) for user in leaving]
            for run in leaving.values():
                self.evict(run.bank, run.slot)
            runs = [run for run in runs if run.job.key not in leaving]
            yield Pass(finished, faults, runs, worked_off + left - sum(run.examples_left for run in runs))

    def _pass(self, runs: Sequence[Run]) -> list[Run]:
        """A training step of some of these or the evaluation of some. Returns those whose epoch was closed."""
        training = [run for run in runs if not run.wants_evaluation]
        # Evaluations wait until they fill a pass or nobody can train.
        if len(training) > len(runs) // 2:
            with self.totals.planned():
                chosen = choose(training, self.labels, self._token_budget)
            self._step_in_parts(chosen)
            return []
        evaluating = [run for run in runs if run.wants_evaluation]
        self._evaluate(evaluating)
        return evaluating

    def _evaluate(self, runs: Sequence[Run]) -> None:
        """Close the epoch of these runs."""
        nats: list[list[np.ndarray]] = [[] for _ in runs]
        for position, scores in self.score((run.bank, run.slot, run.job.val) for run in runs):
            done = sum(len(piece) for piece in nats[position])
            right = np.array([q.label for q in runs[position].job.val[done : done + len(scores)]])
            nats[position].append(self.labels.nats(scores, right))
        for run, pieces in zip(runs, nats):
            loss = float(np.concatenate(pieces).astype(np.float64).mean())
            run.evaluated(loss, self._banks[run.bank].bank.weights[run.slot])

    def check(self, job: Job) -> None:
        """Raises InputError for a job that makes no sense for this base: see `train`."""
        for name, questions in (("training", job.train), ("validation", job.val)):
            if not questions:
                raise InputError(f"user {job.user!r} has no {name} example; leave the user out or add one")
            for question in questions:
                if not question.prompt:
                    raise InputError(f"user {job.user!r} has a {name} example without a token; leave it out")
                if not 0 <= question.label < self.labels.num_answers:
                    raise InputError(f"user {job.user!r} has a {name} example with label number {question.label}; "
                                     f"this task's labels are 0 to {self.labels.num_answers - 1}")
        job.config.check()
        job.config.method.check(self.model)
        size = job.config.method.layout(self.model).row_size
        if job.start is not None and len(job.start) != size:
            raise InputError(f"user {job.key!r}: start has {len(job.start)} numbers, a row by this method has "
                             f"{size}; start from a row of the same method and base")
        if job.standing is not None:
            job.check_standing()
            if any(tensor.shape != (size,) for tensor in job.standing.tensors.values()):
                raise InputError(f"user {job.key!r}: the saved state has no rows of {size} numbers; was it saved for "
                                 "another method or base?")  # fmt: skip
        if job.under is not None:
            self._check_under(job)

    def _check_under(self, job: Job) -> None:
        """A shared adapter acts first, the personal one on what it makes: some methods cannot be put so."""
        if job.under.under is not None:
            raise InputError(f"user {job.key!r}: the adapter under theirs has one under itself; only one can lie there")
        if (came := len(job.under.row)) != (size := job.under.method.layout(self.model).row_size):
            raise InputError(f"user {job.key!r}: the adapter under theirs has {came} numbers, this base needs {size}; "
                             "was it trained on another base?")
        shared, own = ({part.name for part in method.parts} for method in (job.under.method, job.config.method))
        if any(job.under.method.virtual(self.model)):
            reason = "it has virtual tokens"
        elif shared & {"dora", "ia3"} and own & {"lora", "dora", "vera"}:
            reason = f"it would rescale what {', '.join(sorted(own))} adds"
        elif "layernorm" in shared & own:
            reason = "the upper one replaces the same weights"
        else:
            return
        under, upper = ", ".join(sorted(shared)), ", ".join(sorted(own))
        raise InputError(f"user {job.key!r}: {under} cannot lie under {upper}: {reason}; share a LoRA, say")


def label_scores(
    model: Base, labels: Answerable, adapters: dict[str, Adapter],
    questions: dict[str, Sequence[Question]], passes: PassConfig | None = None,
) -> dict[str, np.ndarray]:
    """Label scores [questions, C] (log p) of every user's questions, each user with their own adapter.

    Users are resident in groups of passes.slots; a pass holds many users' questions.

    Raises:
        InputError: a user without an adapter.
    """
    passes = passes or PassConfig()
    engine = Engine(model, labels, passes)
    users, answers = list(questions), {user: [] for user in questions}
    unknown = [user for user in users if user not in adapters]
    if unknown:
        raise InputError(f"no adapter of user {unknown[0]!r}; train the user first or leave the user's questions out")
    for start in range(0, len(users), passes.slots):
        group = users[start : start + passes.slots]
        owned = [(user, adapters[user]) for user in group]
        places = [engine.admit(a.user, a.method, a.row, under=a.under, name=user) for user, a in owned]
        for position, scores in engine.score((*place, questions[user]) for place, user in zip(places, group)):
            answers[group[position]].append(scores)
        for place in places:
            engine.evict(*place)
    none = np.zeros((0, labels.num_scores), np.float32)  # of a user without questions
    return {user: np.concatenate([none, *pieces]) for user, pieces in answers.items()}


def _settings(runs: Sequence[Run]) -> AdamWSettings:
    """The runs' optimizer settings for their next step, one entry each."""
    configs = [run.job.config for run in runs]
    column = lambda values: torch.tensor(list(values), dtype=torch.float64)  # noqa: E731
    return AdamWSettings(
        lr=column(run.learning_rate for run in runs),
        weight_decay=column(c.weight_decay for c in configs),
        beta1=column(c.beta1 for c in configs),
        beta2=column(c.beta2 for c in configs),
        eps=column(c.eps for c in configs),
        max_norm=column(c.max_grad_norm for c in configs),
        step=column(run.step + 1 - run.skipped_steps for run in runs),
    )


def _halves(items: Sequence) -> list[Sequence]:
    middle = (len(items) + 1) // 2
    return [half for half in (items[:middle], items[middle:]) if half]


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA's, NumPy's, or one that has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in NO_MEMORY)
