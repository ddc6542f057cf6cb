"""python -m minipeft.bench peftu: the protocol on prepared tasks, from options to result.json and the report."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minipeft.console import MINUTE, OneLineParser, check_device
from minipeft.default_base import default_base
from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.lanes import lanes_on
from minipeft.machine import versions
from minipeft.models.checkpoint import read_json
from minipeft.models.classifier import Base
from minipeft.models.loading import load_model
from minipeft.options import NAMES
from minipeft.peftu.calls import Calls
from minipeft.peftu.cold_start import cold_start, new_users
from minipeft.peftu.cold_start import planned_examples as cold_examples
from minipeft.peftu.protocol import PROTOCOLS
from minipeft.peftu.records import BASELINES, load_records
from minipeft.peftu.runner import SHARED, SHARED_USER, Plan, TaskRun, audit_of
from minipeft.peftu.settings import load_settings, told
from minipeft.peftu.summary import summarise
from minipeft.peftu.tidy import Tidied, load_tidied, tidied
from minipeft.peftu.untrained import BASE_MADE
from minipeft.profiling import profiled
from minipeft.running import open_base
from minipeft.schedule import PassConfig
from minipeft.tasks.synthetic import SyntheticConfig, ceiling_personal, ceiling_shared, make_synthetic
from minipeft.tasks.task import KINDS, Task

METHODS = ("lora", "houlsby", "ia3", "prefix", "head")  # if none are named; what does not apply is left out and said
LIBRARIES = ("numpy", "scipy", "scikit-learn", "bm25s", "triton", "rouge-score")
RESULT = "result.json"  # in OUT, once a task is done
PASSES = PassConfig(slots=64, token_budget=4096)


def run_peftu(argv: Sequence[str]) -> None:
    """The suite. Leaves records/, result.json and the report in OUT; result.json is also the last line on stdout.

    Every task's run is made before the first is trained, so that what is wrong with one is said at once. Result and
    report are written after each, of those that are done.
    """
    args = parse(argv)
    write_report = report_writer()
    if args.report is not None:
        print(f"written: {write_report(args.report)}")
        return
    check_device(args.device)
    plan = plan_of(args)
    tasks = [load_tidied(folder, args.split, args.users) for folder in args.tasks]
    ceilings = {}
    if not args.tasks:
        task, truth = make_synthetic(SyntheticConfig(users=args.users or SyntheticConfig.users))
        tasks = [tidied(task)]
        ceilings[task.name] = {"shared": ceiling_shared(task, truth), "personal": ceiling_personal(task, truth)}
    if len(names := [each.task.name for each in tasks]) != len(set(names)):
        raise InputError(f"--tasks: two are called {max(names, key=names.count)!r}; run them into two folders")
    if args.instructions is not None:
        tasks = [with_instruction(each, args.instructions) for each in tasks]
    new = {each.task.name: new_users(each) for each in tasks} if args.cold_start else {}
    later = {each.task.name: cold_examples(plan, each.task, new[each.task.name]) if new else 0 for each in tasks}
    other = {each.task.name: "multi-label" if each.task.multi_label else "generative" for each in tasks
             if each.task.multi_label or each.task.generative}  # fmt: skip
    if args.model is None and other:
        name, kind = next(iter(other.items()))
        raise InputError(f"task {name!r} is {kind}; the default base says one label, name another with --model")
    check_out(args.out)
    there = {name: what for name, what in versions(args.device, LIBRARIES).items() if what is not None}
    calls = Calls(args.out, shlex.join(["python", "-m", "minipeft.bench", "peftu", *map(str, argv)]), there)
    bases = bases_of(args, [each.task for each in tasks], new)
    planned = {each.task.name: later[each.task.name] + plan.all_examples(each.task) for each in tasks}
    with progress(planned, {each.task.name: mean_length(each.task) for each in tasks}) as bar:
        show, update = bar
        runs = [TaskRun(plan, each, base, args.out, show, partial(update, each.task.name), calls.made)
                for each, base in zip(tasks, bases)]  # fmt: skip
        first = runs[0].task.name
        facts: dict[str, dict] = {"ceilings": ceilings, "audit": {}, "left_out": {}}
        names: dict[str, set[str]] = {}
        while runs:
            run = runs.pop(0)  # what it keeps in memory goes with it
            name = run.task.name
            calls.begin(name)
            run.run(later[name])
            if new:
                cold_start(run, new[name])
            if args.profile and name == first:
                with profiled(args.out):
                    run.train_a_little()
            run.finish()
            facts["audit"][name], facts["left_out"][name] = run.audit.report(), run.left_out
            names[name] = {*BASELINES, *run.methods, SHARED, SHARED_USER}
            result = result_of(args, plan, names, calls) | facts | {"to_come": [each.task.name for each in runs]}
            write_file(args.out / RESULT, json.dumps(result, indent=1).encode() + b"\n")
            report = write_report(args.out)
    print(f"written: {report} and {RESULT}")
    print(json.dumps(result))


def bases_of(args: argparse.Namespace, tasks: Sequence[Task], new: dict[str, list[str]]) -> list[Base]:
    """What each task runs on; of a named model all share the weights.

    The default base is fitted to its task, so its task's audit sees what it is fitted on, and cold start's new users
    are left out.
    """
    if args.model is not None:
        model = load_model(args.model, device=args.device)
        return [open_base(model, len(task.labels)) for task in tasks]
    bases = []
    for task in tasks:
        known = task.subset(user for user in task.users if user not in new.get(task.name, ()))
        audit = audit_of(task, args.out)
        audit.fitting(BASE_MADE, known.pooled("train"))
        folder = default_base(known, 0)
        audit.keep()
        bases.append(open_base(load_model(folder, device=args.device), len(task.labels)))
    return bases


def result_of(args: argparse.Namespace, plan: Plan, names: dict[str, set[str]], calls: Calls) -> dict:
    """What the records say and what made them. names: of each task that is done, what was asked for."""
    records = [record for record in load_records(args.out)
               if record.name in names.get(record.task, ()) and record.seed in plan.seeds]  # fmt: skip
    return summarise(records) | {
        "suite": "peftu", "mode": args.mode, "model": str(args.model or "default"), "seeds": list(plan.seeds),
        "command": calls.own["command"], "versions": calls.own["versions"], "calls": calls.of({*names}),
        "options": {"epochs at most": args.epochs, "equal": args.equal or "neither parameters nor time",
                    "top layers": args.top_layers or "all", "split": args.split, "users": args.users or "all"},
    }  # fmt: skip


def report_writer() -> Callable[[Path], Path]:
    """Found before anything is trained. InputError where its libraries are missing."""
    try:
        from minipeft.peftu.report import write_report
    except ImportError as error:
        raise InputError(f"the report needs {error.name}: pip install 'minipeft[report]'") from None
    return write_report


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m minipeft.bench peftu", description="The PEFT-U protocol: every method, user "
                           "and seed, beside the baselines that must be beaten.")  # fmt: skip
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="DIR",
                        help="prepared tasks (default: synthetic users whose truth is known)")
    parser.add_argument("--model", type=Path, metavar="DIR",
                        help="a Hugging Face model folder (default: a small base made from each task)")
    parser.add_argument("--methods", type=names, metavar="NAME,...", default=METHODS,
                        help=f"of {', '.join(NAMES)} (default: {','.join(METHODS)})")
    parser.add_argument("--mode", choices=list(PROTOCOLS), default="fixed",
                        help="paper: published prompts, hyper-parameters and scoring (default: fixed)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--users", type=positive, metavar="N", help="the first N of every task (default: all)")
    parser.add_argument("--epochs", type=positive, default=8, metavar="N", help="at most (default: 8)")
    parser.add_argument("--lrs", type=rates, metavar="X,...",
                        help="learning rates to try of every method (default: each method's own grid)")
    parser.add_argument("--lrs-from", type=Path, metavar="OUT",
                        help="take the learning rates that another run has chosen, on its only task")
    parser.add_argument("--top-layers", type=positive, metavar="N", help="act in the last N layers only")
    parser.add_argument("--equal", choices=["parameters", "time"], default="", help="compare at equal size or cost")
    parser.add_argument("--cold-start", action="store_true", help="also: new users after 0, 1, 2, 4... examples")
    parser.add_argument("--split", choices=KINDS, default="leaked", help="which split of the tasks (default: leaked)")
    parser.add_argument("--instructions", type=Path, metavar="FILE", help="the published repository's config.json")
    parser.add_argument("--report", type=Path, metavar="OUT", help="only write the report of a finished run again")
    parser.add_argument("--profile", action="store_true",
                        help="also train a few users of the first task under the profiler: trace.json, kernels.txt")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("%Y%m%d-%H%M%S"), metavar="DIR",
                        help="folder for records and result; a run that was killed continues (default: runs/<time>)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needed a number of at least 1, got {text!r}")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in found if name not in NAMES]
    if unknown or not found:
        raise argparse.ArgumentTypeError(f"no method is called {(unknown or [text])[0]!r}; it is one of "
                                         f"{', '.join(NAMES)}")  # fmt: skip
    return found


def rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise argparse.ArgumentTypeError(f"needed learning rates above 0 like 1e-3,1e-2, got {text!r}")
    return found


def plan_of(args: argparse.Namespace) -> Plan:
    protocol = PROTOCOLS[args.mode]
    if args.mode == "paper" and (args.lrs or args.lrs_from):
        raise InputError("--mode paper has one learning rate for all methods; leave out --lrs and --lrs-from")
    if args.lrs and args.lrs_from:
        raise InputError("--lrs says which learning rates to try and --lrs-from that none are tried; leave one out")
    methods = {name: protocol.methods()[name] for name in args.methods}
    first = 42 if args.mode == "paper" else 0
    carried, origin = carried_from(args.lrs_from) if args.lrs_from else ((), "")
    passes = replace(PASSES, lanes=lanes_on(args.device, PASSES.token_budget))
    return Plan(protocol, methods, tuple(range(first, first + args.seeds)), args.epochs, args.lrs, carried, origin,
                args.equal, args.top_layers, passes)  # fmt: skip


def carried_from(out: Path) -> tuple[tuple[tuple[str, float], ...], str]:
    """Name -> the learning rate that was chosen there, if there was one at which all could be trained; and where that
    was, in words.

    Another base, other layers or sizes are for the user to choose, and are told; so is a run that is not finished.

    Raises:
        InputError: that run had several tasks, one learning rate for all, as published, or none that would do.
    """
    records = load_records(out)
    if len(tasks := {record.task for record in records}) != 1:
        raise InputError(f"--lrs-from {out}: it has {len(tasks)} tasks; needed a run on one")
    (task,) = tasks
    settings = load_settings(out).get(task, {})
    if settings.get("--mode") == "paper":
        raise InputError(f"--lrs-from {out}: it was run in --mode paper, which chooses no learning rates")
    rates = {record.name: record.chosen_lr for record in records if record.lr_grid}
    if not rates:
        raise InputError(f"--lrs-from {out}: that run has chosen no learning rate")
    finished = "" if (out / RESULT).exists() else ", not finished then"
    return tuple(rates.items()), f"{out}: task {task}, {told(settings)}{finished}"


def with_instruction(given: Tidied, path: Path) -> Tidied:
    """The task with the instruction that the published configuration has for it, word for word."""
    fields, name = read_json(path, prefix=f"{path}: "), given.task.name
    try:
        instruction = fields["datasets"][name]["instruction"]
    except (KeyError, TypeError):
        raise InputError(f"--instructions {path}: no datasets.{name}.instruction in it; needed the published "
                         "repository's config.json") from None  # fmt: skip
    return replace(given, task=replace(given.task, instruction=instruction))


def check_out(out: Path) -> None:
    """Make the folder. Records in it are continued from. InputError where there are a stranger's files alone."""
    try:
        if out.exists() and not (out / "records").is_dir() and any(out.iterdir()):
            raise InputError(f"--out {out}: it is not empty and has no records of a run; choose another folder")
        (out / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


def mean_length(task: Task) -> float:
    """Characters of a training text, mean over examples: what a task's examples cost, beside another task's."""
    lengths = [len(example.text) for example in task.pooled("train")]
    return sum(lengths) / max(1, len(lengths))


@contextmanager
def progress(
    planned: dict[str, int], lengths: dict[str, float],
) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:  # fmt: skip
    """A bar over the training examples that are planned of each task, cold start included; or a line a minute where
    there is no terminal.

    Yields what shows a line, with the time that all tasks have left, and what is told (task, worked off, planned). The
    time left takes it that an example costs what it did so far, in proportion to its task's mean length, and that as
    many stop early; what an earlier run did counts for nothing.
    """
    began = shown = time.perf_counter()
    planned, done = dict(planned), dict.fromkeys(planned, 0)
    with tqdm(disable=None, leave=False) as bar:

        def update(task: str, now: int, of: int) -> None:
            done[task], planned[task] = now, of
            bar.total = sum(planned.values())
            bar.update(sum(done.values()) - bar.n)
            if bar.disable and time.perf_counter() - shown > MINUTE:
                show(f"{task}: {100 * now / max(1, of):.0f} %")

        def show(line: str) -> None:
            nonlocal shown
            shown = time.perf_counter()
            spent = time.perf_counter() - began
            worked, whole = (sum(number * lengths[task] for task, number in each.items()) for each in (done, planned))
            left = spent * (whole / worked - 1) / 60 if worked else None
            left = "" if left is None else f", about {left:.0f} min left"
            tqdm.write(f"{line} ({spent / 60:.1f} min{left})", file=sys.stdout)
            sys.stdout.flush()

        yield show, update
