"""python -m minipeft.bench: the main job, measured; `kernels`: its ops by themselves (bench_kernels.py); `train`:
beside transformers and peft (bench_train.py); `peftu`: the PEFT-U protocol on prepared tasks (peftu/command.py). The
last two have options of their own.

Suite `quick`, the default: many users' LoRA train together in one fused pass over one frozen base, then the same users
one by one in the same engine. It prints how much faster together is, how good the personal adapters are beside the
baselines, and whether anybody's adapter depends on the company. Without --task it makes synthetic users whose truth is
known, so that the best possible scores can be printed too.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minipeft.bench_kernels import run_kernels
from minipeft.bench_train import run_train
from minipeft.console import POOLING, RECOMPUTE, OneLineParser, add_dtype, check_device, plain_warnings, progress
from minipeft.contenders import Apart
from minipeft.default_base import default_base
from minipeft.engine import Adapter, Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Question
from minipeft.machine import versions
from minipeft.methods.lora import LoRA
from minipeft.models.classifier import POOLINGS, Base
from minipeft.models.loading import load_model
from minipeft.peftu.command import run_peftu
from minipeft.profiling import profiled, region
from minipeft.prompts import Encoded
from minipeft.report import plot_gains, table
from minipeft.running import check_splits, first_users, for_base, open_base, pooled, prompts_of
from minipeft.schedule import Job, PassConfig, TrainConfig
from minipeft.stats import Interval, bootstrap_mean
from minipeft.store import Store, is_store, key_of
from minipeft.tasks.synthetic import (
    SyntheticConfig,
    Truth,
    ceiling_personal,
    ceiling_shared,
    logistic_on_features,
    make_synthetic,
)
from minipeft.tasks.task import Task, load_task, majority_answers, nominal_alpha, user_accuracy
from minipeft.training import EVERYONE, SHARED

PERSONAL = TrainConfig(
    method=LoRA(rank=8, alpha=16, sites=("v", "o", "down")), learning_rate=5e-3, batch_size=4, epochs=3
)
TRIAL_STEPS = 320  # steps of all users together in the speed trial
NUM_ALONE = 2  # users whose whole training is repeated alone
PASSES = PassConfig()
ALONE = PassConfig(slots=1)
PROFILED = 8  # with --profile, every so-many-th user of the speed trial trains once more
OWN_OPTIONS = {  # suites that parse their own -> what runs them, and what is left of one that was interrupted
    "peftu": (run_peftu, "The same command with the same --out continues"),
    "train": (run_train, "What was measured is in result.json"),
}
ACTIVE = 100  # training examples from which a user counts as active in the table


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for bad input and 1 if contenders of `train` trained different adapters
    (one line on stderr), 130 after Ctrl-C."""
    finished: list[str] = []
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in OWN_OPTIONS:
            OWN_OPTIONS[argv[0]][0](argv[1:])
            return 0
        args = parse(argv)
        check_device(args.device)
        check_out(args.out, args.suite)
        with plain_warnings("minipeft.bench"):
            {"quick": run_quick, "kernels": run_kernels}[args.suite](args, finished)
    except InputError as error:
        print(f"minipeft.bench: {error}", file=sys.stderr)
        return 2
    except Apart as error:
        print(f"minipeft.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if argv and argv[0] in OWN_OPTIONS:
            print(f"\nminipeft.bench: interrupted. {OWN_OPTIONS[argv[0]][1]}", file=sys.stderr)
            return 130
        done, where = {"quick": ("users had finished; their adapters are in", "adapters"),
                       "kernels": ("batches were measured; their figures are in", "result.json")}[args.suite]
        print(f"\nminipeft.bench: interrupted. {len(finished)} {done} {args.out / where}", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m minipeft.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("suite", nargs="?", default="quick", choices=["quick", "kernels", "train", "peftu"],
                        help="what to measure (default: quick); train --help and peftu --help list their own options")
    parser.add_argument("--task", type=Path, metavar="DIR", help="a prepared task (default: synthetic users)")
    parser.add_argument("--model", type=Path, metavar="DIR",
                        help="a Hugging Face model folder (default: a small base made from the task's pooled examples)")
    parser.add_argument("--users", type=int, metavar="N", help="how many users (default: 128 synthetic, or all)")
    parser.add_argument("--seed", type=int, default=0, help="of users, base and training (default: 0)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    add_dtype(parser)
    parser.add_argument("--recompute", action="store_true", help=RECOMPUTE)
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help=POOLING)
    parser.add_argument("--op", nargs="+", metavar="NAME", help="kernels: these ops only (default: all)")
    parser.add_argument("--full", action="store_true", help="kernels: all combinations of shapes, users, ranks, rows")
    parser.add_argument("--profile", action="store_true", help="also write trace.json and a table of kernels")
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("%Y%m%d-%H%M%S"), metavar="DIR",
                        help="folder for result.json and the rest (default: runs/<time>)")
    args = parser.parse_args(argv)
    of_quick = ("task", "model", "users", "dtype", "recompute", "pooling")
    for name in {"quick": ("op", "full"), "kernels": of_quick}[args.suite]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is not an option of suite {args.suite}")
    return args


def run_quick(args: argparse.Namespace, finished: list[str]) -> dict:
    """The whole suite. Appends to `finished` each user whose adapter is on disk."""
    began = time.perf_counter()
    task, truth = get_task(args)
    for user in task.users:
        key_of(user)  # an id that cannot be kept is an error now, not after training
    model, encoded, base_name = get_base(args, task)
    if is_store(args.out / "adapters"):  # of an earlier run in this folder
        shutil.rmtree(args.out / "adapters")
    store = Store.make(args.out / "adapters", model, task.header)
    print(describe(args, task, model, base_name, encoded), flush=True)

    def keep(adapter: Adapter) -> None:
        store.add(adapter, model)
        finished.append(adapter.user)

    passes, alone_passes = (replace(passes, recompute=args.recompute) for passes in (PASSES, ALONE))
    plan = plan_for(model, args.seed)
    jobs = [Job(user, encoded.train[user], encoded.val[user], plan) for user in task.users]
    jobs.sort(key=lambda job: -len(job.train))  # longest first: nobody is left to finish alone
    shortened = trial_jobs(jobs)  # first: a process that has trained for long is slower at small passes
    trial = timed_training(model, encoded, shortened, passes, "speed trial, together")
    trial_alone = timed_training(model, encoded, shortened, alone_passes, "speed trial, one by one")
    together = timed_training(model, encoded, jobs, passes, f"{len(jobs)} users together", keep)
    some = jobs[:: -(-len(jobs) // NUM_ALONE)]
    alone = timed_training(model, encoded, some, alone_passes, f"{len(some)} of the users alone")
    everyone = Job(EVERYONE, pooled(encoded.train), pooled(encoded.val), replace(plan, **SHARED))
    shared = timed_training(model, encoded, [everyone], alone_passes, "one shared LoRA")

    correct = {
        "own_majority": per_user(task, majority_answers(task)),
        "shared": per_user(task, answers(task, model, encoded, dict.fromkeys(task.users, shared.adapters[EVERYONE]))),
        "personal": per_user(task, answers(task, model, encoded, together.adapters)),
    }
    if model.causal:  # an encoder alone has no answer
        correct["base"] = per_user(task, answers(task, model, encoded, None))
    apart = [relative_difference(trial.adapters[user], trial_alone.adapters[user]) for user in task.users]
    apart += [relative_difference(together.adapters[user], adapter) for user, adapter in alone.adapters.items()]
    gains = correct["personal"] - correct["shared"]
    accuracy = {name: float(values.mean()) for name, values in correct.items()}
    result = {
        "suite": "quick", "task": task.name, "num_users": len(task.users), "seed": args.seed, "base": base_name,
        "base_numbers": sum(p.numel() for p in model.parameters()),
        "adapter_numbers": plan.method.count(model),
        "training": together.figures(), "trial_steps": trial.steps,
        "fused": trial.figures(), "one_by_one": trial_alone.figures(), "speedup": trial_alone.seconds / trial.seconds,
        "accuracy": {"base": None} | accuracy | {
            **known_truth(task, truth),
            "ci": {name: interval(values) for name, values in correct.items()},
            "personal_minus_shared": interval(gains),
            "users_who_gain": int((gains > 0).sum()), "users_who_lose": int((gains < 0).sum()),
        },
        "active": active_figures(task, truth, correct),
        "alpha": nominal_alpha(task),
        "num_cut_texts": encoded.num_cut,
        "skipped_steps": {user: a.metrics["skipped_steps"] for user, a in together.adapters.items()
                          if a.metrics["skipped_steps"]},
        "independence": {
            "max_relative_difference": max(apart),
            "bitwise_isolated": bitwise_isolated(model, encoded, jobs),
        },
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": versions(args.device, ("numpy",)) | {"dtype": str(args.dtype).removeprefix("torch.")},
        "seconds": time.perf_counter() - began,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if args.profile:
        with profiled(args.out):
            timed_training(model, encoded, shortened[::PROFILED], passes, "some of the trial, profiled")
    print(table(result))
    plot_gains(args.out / "gains.png", gains, result)
    print(f"written: {args.out}/result.json, gains.png, adapters/ ({len(finished)} users)")
    print(json.dumps(result))
    return result


# ---- Inputs --------------------------------------------------------------------------------------------------------


def check_out(out: Path, suite: str) -> None:
    """Make the folder and see that all that will be written can be. Results of an earlier run in it stay."""
    folders, names = {"quick": ((out, out / "adapters"), ("result.json", "gains.png")),
                      "kernels": ((out,), ("result.json",))}[suite]  # fmt: skip
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        for name in names:
            if (out / name).exists():
                (out / name).open("a").close()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


def get_task(args: argparse.Namespace) -> tuple[Task, Truth | None]:
    """The task of --task with its first --users users, or synthetic users and their truth."""
    if args.users is not None and args.users < 1:
        raise InputError(f"--users must be at least 1, got {args.users}")
    if args.task is None:
        return make_synthetic(SyntheticConfig(seed=args.seed, users=args.users or SyntheticConfig.users))
    task = load_task(args.task)
    check_splits(task, ("val", "test"))
    return (task if args.users is None else first_users(task, args.users)), None


def get_base(args: argparse.Namespace, task: Task) -> tuple[Base, Encoded, str]:
    """The base of --model, or the embedded default made for this task; the task in its tokens; and its name."""
    if args.model is None:
        with progress("training the default base") as bar:
            folder = default_base(task, args.seed, on_step=bar)
        name = "default"
    else:
        folder, name = args.model, args.model.name
    model = open_base(load_model(folder, args.dtype, args.device), len(task.labels), args.pooling)
    return model, prompts_of(model, task.header).encode(task), name


def plan_for(model: Base, seed: int) -> TrainConfig:
    """How each user trains; on an encoder with a head of their own."""
    return replace(PERSONAL, seed=seed, method=for_base(PERSONAL.method, model))


# ---- The measurements ----------------------------------------------------------------------------------------------


def trial_jobs(jobs: Sequence[Job]) -> list[Job]:
    """The same users with the first part of their first epoch, the same share for everyone: about TRIAL_STEPS steps.

    One by one, whole trainings would take minutes; a share of each keeps all users and how unequal they are.
    """
    steps = sum(-(-len(job.train) // job.config.batch_size) for job in jobs)
    share = min(1.0, TRIAL_STEPS / steps)
    return [
        replace(job, train=job.train[: max(1, round(share * len(job.train)))],
                val=job.val[: max(1, round(share * len(job.val)))], config=replace(job.config, epochs=1))
        for job in jobs
    ]


class Trained:
    """A finished training run and how long it took."""

    def __init__(self, adapters: dict[str, Adapter], engine: Engine, seconds: float):
        self.adapters, self.totals, self.seconds = adapters, engine.totals, seconds
        self.steps = sum(adapter.metrics["steps"] for adapter in adapters.values())

    def figures(self) -> dict:
        return {
            "seconds": self.seconds,
            "users_per_s": len(self.adapters) / self.seconds,
            "tokens_per_s": self.totals.tokens / self.seconds,
            "passes": self.totals.passes,
            "tokens": self.totals.tokens,
            "filler_share": 1 - self.totals.tokens / self.totals.rows,
        }


def timed_training(
    model: Base, encoded: Encoded, jobs: Sequence[Job], passes: PassConfig, title: str,
    on_finish: Callable[[Adapter], None] | None = None,
) -> Trained:
    engine = Engine(model, encoded.labels, passes)
    total = sum(len(job.train) * job.config.epochs for job in jobs)
    with progress(f"training {title}") as bar:
        done = 0

        def count(examples: int) -> None:
            nonlocal done
            done += examples
            bar(done, total)

        began = time.perf_counter()
        with region(title):
            adapters = engine.train(jobs, on_finish, count)
        seconds = time.perf_counter() - began
    return Trained(adapters, engine, seconds)


def answers(
    task: Task, model: Base, encoded: Encoded, adapters: dict[str, Adapter] | None
) -> dict[str, list[tuple[str, ...]]]:
    """The label each user's model finds most likely for each of their test examples; adapters None: the base alone."""
    if adapters is None:
        silent = LoRA(rank=1, sites=PERSONAL.method.sites)  # at its start value a LoRA changes nothing
        row = silent.initial_row(model, 0, "")
        adapters = {user: Adapter(user, silent, row) for user in encoded.test}
    scores = label_scores(model, encoded.labels, adapters, encoded.test, PASSES)
    return {user: [(task.labels[i],) for i in scores[user].argmax(1)] for user in encoded.test}


def per_user(task: Task, predicted: dict[str, list[tuple[str, ...]]]) -> np.ndarray:
    """[users] accuracy in percent, in the order of task.users."""
    accuracy = user_accuracy(task, predicted)
    return np.array([accuracy[user] for user in task.users])


def relative_difference(a: Adapter, b: Adapter) -> float:
    """|a - b| / |b| over the user's whole row."""
    return float((a.row - b.row).norm() / b.row.norm())


def bitwise_isolated(model: Base, encoded: Encoded, jobs: Sequence[Job], num_users: int = 8) -> bool | None:
    """Rewrite one user's examples, lengths kept: does every other user in the same passes keep every bit?

    None if there is no other user.
    """
    if len(jobs) == 1:
        return None
    few = [replace(job, train=job.train[:16], config=replace(job.config, epochs=2)) for job in jobs[:num_users]]
    rng = np.random.default_rng(0)
    num_labels = len(encoded.labels.labels)
    rewritten = [
        Question(tuple(rng.permutation(q.prompt).tolist()), (q.label + 1) % num_labels) for q in few[0].train
    ]
    changed = [replace(few[0], train=rewritten), *few[1:]]
    rows = [Engine(model, encoded.labels, PassConfig()).train(some) for some in (few, changed)]
    others = [job.user for job in few[1:]]
    if torch.equal(rows[0][few[0].user].row, rows[1][few[0].user].row):
        raise AssertionError("the rewritten user's adapter did not change: the isolation check checked nothing")
    return all(torch.equal(rows[0][user].row, rows[1][user].row) for user in others)


def active_figures(task: Task, truth: Truth | None, correct: dict[str, np.ndarray]) -> dict | None:
    """The accuracies over users with at least ACTIVE training examples; None where there is no such user."""
    some = task.with_training(ACTIVE)
    if not some.users:
        return None
    chosen = np.array([len(task.train[user]) >= ACTIVE for user in task.users])
    return {
        "at_least": ACTIVE,
        "num_users": len(some.users),
        "base": None,
        **{name: float(values[chosen].mean()) for name, values in correct.items()},
        **known_truth(some, truth),
    }


def known_truth(task: Task, truth: Truth | None) -> dict:
    """What can be reached on synthetic users, in percent; null on real ones, whose truth nobody knows."""
    figures = {"ceiling_shared": ceiling_shared, "ceiling_personal": ceiling_personal,
               "logistic_on_features": logistic_on_features}
    return {name: None if truth is None else figure(task, truth) for name, figure in figures.items()}


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of the 95 % bootstrap interval over users."""
    bounds: Interval = bootstrap_mean(values)
    return [bounds.low, bounds.high]


# ---- What is shown on the way ---------------------------------------------------------------------------------------


def describe(args: argparse.Namespace, task: Task, model: Base, base_name: str, encoded: Encoded) -> str:
    sizes = sorted(len(examples) for examples in task.train.values())
    numbers = plan_for(model, args.seed).method.count(model)
    lines = [
        f"task {task.name}: {len(task.users)} users, {sum(sizes)} training examples ({sizes[0]} to {sizes[-1]} a user, "
        f"median {sizes[len(sizes) // 2]}), labels {', '.join(task.labels)}, alpha {nominal_alpha(task):.2f}",
        f"base {base_name}: {sum(p.numel() for p in model.parameters()):,} frozen numbers; LoRA of rank "
        f"{PERSONAL.method.rank}{'' if model.causal else ' and a head'}: {numbers:,} numbers a user",
        f"on {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, the base in "
        f"{str(args.dtype).removeprefix('torch.')}",
    ]
    if encoded.num_cut:
        lines.append(f"{encoded.num_cut} texts were longer than the base's {model.config.max_positions} positions "
                     "and were cut at their end")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
