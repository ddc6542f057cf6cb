"""Who goes into the next pass.

Every user has a fixed plan of their own: epochs, each a shuffled round of minibatches, then an evaluation. The
schedule only decides when a user's next minibatch runs, never what is in it, so it cannot change anybody's adapter. It
works as a serving engine admits requests: users wait, occupy a slot while they train, and leave when they are done.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minipeft.batch import Part, after_shared
from minipeft.errors import InputError
from minipeft.labels import Answerable, Question
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.randomness import generator

MIN_IMPROVEMENT = 1e-4  # relative: a later epoch must beat the best validation loss by this to count as better
LARGEST = 1e18  # a number beyond it cannot be squared in fp32: whatever a row holds it for, it is no adapter


@dataclass(frozen=True)
class Adapter:
    """What a user gets: their row and how it came about.

    row:     [P] fp32, laid out as `method.layout(base)` says.
    metrics: best_epoch, epochs, steps, val_loss (after each epoch, nats per label token), stopped_early, skipped_steps.
    under:   the adapter that acts under it, None for most.
    job:     the name of the job that made it, "" for most.
    """

    user: str
    method: Method
    row: Tensor
    metrics: dict = field(default_factory=dict)
    under: "Adapter | None" = None
    job: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """How one user trains. Users in the same run may differ in every field."""

    method: Method = field(default_factory=LoRA)
    learning_rate: float = 2e-3  # peak, per step
    weight_decay: float = 0.01  # per step, times the learning rate
    warmup: float = 0.1  # share of the planned steps over which the learning rate rises linearly; then it falls to 0
    epochs: int = 8  # at most
    batch_size: int = 8  # examples per step
    max_grad_norm: float = 1.0  # the user's whole gradient is scaled down to this norm; inf: never
    patience: int = 2  # epochs without a better validation loss before the user stops
    beta1: float = 0.9  # decay of AdamW's first moment per step
    beta2: float = 0.999  # and of its second
    eps: float = 1e-8  # added to AdamW's denominator
    seed: int = 0
    bf16_weights: bool = False  # rounded to bf16 after every step, as PEFT-U's code does: small steps are lost

    def check(self) -> None:
        """Raises InputError if a field makes no sense."""
        for name in ("learning_rate", "max_grad_norm", "eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay}")


@dataclass(frozen=True)
class PassConfig:
    """How users share passes. None of this changes anybody's adapter beyond the last bits of fp32."""

    slots: int | str = 32  # users resident at a time; "auto", where a store is trained: see memory.py
    token_budget: int = 2048  # rows in a pass, at least one user's minibatch whatever its size
    deterministic: bool = False  # also the last bits, on a CPU alone: products in fixed tiles of one user's rows
    recompute: bool = False  # activation checkpointing: less memory, a third more work, on a CPU the same bits
    share: bool = True  # what all of a user's prompts begin with is read once a minibatch, where the base is a decoder
    lanes: int = 1  # on a CPU: parts of a training pass that run side by side, each on its share of the cores

    def check(self, device: torch.device | None = None) -> None:
        """Raises InputError if a field makes no sense, or not on this device."""
        for name in ("slots", "token_budget", "lanes"):
            if not (isinstance(value := getattr(self, name), int) and value >= 1):
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.deterministic and device is not None and device.type == "cuda":
            raise InputError("deterministic mode is not built for a GPU; leave it out, or take a CPU")
        if self.lanes > 1 and device is not None and device.type == "cuda":
            raise InputError(f"lanes must be 1 on a GPU, which runs a pass as a whole; got {self.lanes}")


@dataclass(frozen=True)
class Fault:
    """A user who cannot be trained, and why: one line that quotes no text."""

    user: str
    reason: str


@dataclass(frozen=True)
class Standing:
    """Where a user stands in the middle of their plan: all that it takes to go on as if nothing had happened.

    Shuffles and dropout are functions of (seed, user, place), so no generator has a state.

    place:   the fields of PLACE.
    tensors: row, exp_avg, exp_avg_sq [P] fp32 on the CPU, and best [P] once an epoch was evaluated.
    """

    place: dict
    tensors: dict[str, Tensor]

    def examples(self, num_train: int) -> int:
        """Training examples that are behind the user, who has so many."""
        return self.place["epoch"] * num_train + self.place["next_example"]


PLACE = ("epoch", "step", "next_example", "skipped_steps", "skipped_before", "history", "best_epoch")  # of a Run


@dataclass(frozen=True)
class Job:
    """A user who wants an adapter: training and validation questions, and how to train.

    name:     what the result is called; "": the user's id. One user may have several jobs, one for each method say.
    start:    a row [P] to start from, e.g. of an adapter that all users share; None: the method's own start.
    under:    an adapter that acts under this one and is not trained: shared + personal.
    standing: where the user stood when training was interrupted; None: at the beginning.
    """

    user: str
    train: Sequence[Question]
    val: Sequence[Question]
    config: TrainConfig = TrainConfig()
    name: str = ""
    start: Tensor | None = None
    under: Adapter | None = None
    standing: Standing | None = None

    @property
    def key(self) -> str:
        return self.name or self.user

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.config.batch_size)

    @property
    def planned_examples(self) -> int:
        """Training examples to work off, if nobody stops early."""
        return len(self.train) * self.config.epochs

    def check_standing(self) -> None:
        """Raises InputError if no user with this plan can stand where `standing` says."""
        place, spe = self.standing.place, self.steps_per_epoch
        begun = place["step"] - place["epoch"] * spe  # steps of this epoch
        expected = min(begun * self.config.batch_size, len(self.train)) % len(self.train)
        most = spe if place["epoch"] < self.config.epochs else 0  # at the end of the plan nothing is begun
        if not (0 <= place["epoch"] <= self.config.epochs and 0 <= begun <= most and place["next_example"] == expected
                and len(place["history"]) == place["epoch"] and 0 <= place["best_epoch"] <= place["epoch"]
                and (place["best_epoch"] > 0) == ("best" in self.standing.tensors) == (place["epoch"] > 0)
                and 0 <= place["skipped_before"] <= place["skipped_steps"] <= place["step"]):  # fmt: skip
            raise InputError(f"user {self.key!r} cannot stand at step {place['step']} of epoch {place['epoch'] + 1} "
                             f"with {len(self.train)} examples; was the state saved for other examples or settings?")


@dataclass
class Run:
    """A job under way: where the user stands in their own plan.

    history: validation loss (mean over questions of nats per label token) after each epoch.
    best:    the row [P] after the best epoch so far, None before the first evaluation.
    """

    job: Job
    bank: int
    slot: int
    virtual: tuple[int, int] = (0, 0)  # of the user's method
    shared: int = 0  # first tokens of the prompts that a minibatch reads once for all of its examples
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished
    next_example: int = 0  # of this epoch's order
    skipped_steps: int = 0  # steps whose gradient was not finite
    skipped_before: int = 0  # as many of them before this epoch
    history: list[float] = field(default_factory=list)
    best: Tensor | None = None
    best_epoch: int = 0
    order: list[int] = field(default_factory=list)
    part: Part | None = None  # the next minibatch, once it was asked for
    idle_epoch: bool = False  # whether not one step of the epoch evaluated last was finite

    def __post_init__(self):
        if self.job.standing is not None:
            for name in PLACE:
                setattr(self, name, copy(self.job.standing.place[name]))
            self.best = self.job.standing.tensors.get("best")

    def standing(self, row: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Standing:
        """Where the user stands now, with these numbers; copies on the CPU."""
        tensors = {"row": row, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        tensors |= {"best": self.best} if self.best is not None else {}
        place = {name: copy(getattr(self, name)) for name in PLACE}
        return Standing(place, {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()})

    @property
    def steps_per_epoch(self) -> int:
        return self.job.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.job.config.epochs

    @property
    def examples_left(self) -> int:
        """Of the planned ones."""
        epochs = self.step // self.steps_per_epoch  # whose steps are all taken
        return self.job.planned_examples - epochs * len(self.job.train) - self.next_example

    @property
    def wants_evaluation(self) -> bool:
        return self.step == (self.epoch + 1) * self.steps_per_epoch

    @property
    def upcoming(self) -> list[int]:
        """The next minibatch's examples: a slice of this epoch's order, which is a function of (seed, user, epoch)."""
        if not self.order:
            shuffle = generator(self.job.config.seed, self.job.user, "shuffle", self.epoch)
            self.order = shuffle.permutation(len(self.job.train)).tolist()
        return self.order[self.next_example : self.next_example + self.job.config.batch_size]

    def minibatch(self, labels: Answerable) -> Part:
        """The user's next step."""
        if self.part is None:
            reads = [labels.training_read(self.job.train[i]) for i in self.upcoming]
            self.part = Part(self.bank, self.slot, after_shared(reads, self.shared), self.virtual)
        return self.part

    def advance(self) -> None:
        """The step of the minibatch was taken."""
        self.step += 1
        self.next_example += len(self.upcoming)
        if self.next_example == len(self.job.train):
            self.next_example, self.order = 0, []
        self.part = None

    @property
    def learning_rate(self) -> float:
        """Of the next step: rises linearly to the peak over the warm-up, then falls linearly; above 0 at every step."""
        t, N = self.step + 1, self.total_steps
        W = min(math.ceil(self.job.config.warmup * N), N - 1)
        return self.job.config.learning_rate * min(t / (W + 1), (N + 1 - t) / (N - W))

    def evaluated(self, loss: float, row: Tensor) -> None:
        """An epoch ended with this validation loss and this row: keep the row if it is the best."""
        best_loss = self.history[self.best_epoch - 1] if self.best_epoch else math.inf
        best_loss = best_loss if math.isfinite(best_loss) else math.inf
        is_best = loss < best_loss * (1 - MIN_IMPROVEMENT) or self.best is None
        best = row.clone() if is_best else None  # first of all: memory may not hold it
        self.epoch += 1
        self.idle_epoch = self.skipped_steps - self.skipped_before == self.steps_per_epoch
        self.skipped_before = self.skipped_steps
        self.history.append(loss)
        if is_best:
            self.best, self.best_epoch = best, self.epoch

    @property
    def stopped_early(self) -> bool:
        return self.epoch < self.job.config.epochs and self.epoch - self.best_epoch >= self.job.config.patience

    @property
    def done(self) -> bool:
        return self.epoch == self.job.config.epochs or self.stopped_early

    @property
    def fault(self) -> str:
        """Asked after an evaluation: why nothing will come of this user; "": nothing is wrong."""
        if self.idle_epoch:
            what = f"not one step of epoch {self.epoch} had a finite gradient"
        elif self.done and not math.isfinite(self.history[self.best_epoch - 1]):
            what = "the validation loss was never finite"
        elif self.done and not (largest := float(self.best.abs().max())) < LARGEST:
            what = f"the adapter holds numbers of {largest:.0e}"
        else:
            return ""
        return f"user {self.job.key!r} diverged: {what}; lower the learning rate"

    @property
    def adapter(self) -> Adapter:
        """What the user gets: the best row so far."""
        metrics = {
            "best_epoch": self.best_epoch,
            "epochs": self.epoch,
            "steps": self.step,
            "val_loss": self.history,
            "stopped_early": self.stopped_early,
            "skipped_steps": self.skipped_steps,
        }
        return Adapter(self.job.user, self.job.config.method, self.best, metrics, self.job.under, self.job.name)


def choose(runs: Sequence[Run], labels: Answerable, token_budget: int) -> list[Run]:
    """The runs whose next minibatches go into the next pass, sorted by bank and slot.

    Users with the most steps left come first, so that the longest plans do not trail behind alone; the first is taken
    whatever its size.
    """
    chosen, used = [], 0
    for run in sorted(runs, key=lambda run: run.step - run.total_steps):
        num_rows = run.minibatch(labels).num_rows
        if not chosen or used + num_rows <= token_budget:
            chosen.append(run)
            used += num_rows
    return sorted(chosen, key=lambda run: (run.bank, run.slot))
