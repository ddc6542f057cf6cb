"""python -m minipeft.bench train: training, ours beside what one would run without it, taking turns in one run.

    fused       all users together in packed passes: minipeft
    one_by_one  the same engine, a user at a time
    peft        transformers and peft, a user at a time, tuned (peers.py)
    published   the same as PEFT-U's code does it: every text padded to 512 tokens

The same base, LoRA, users, minibatches, learning rates and steps, fp32. A contender that goes user by user is timed on
a few of them. Before a time counts, every contender's adapters are compared with those of one by one, and the losses
that they reach. Then the curves: who wins where, over tokens per user and step, and over users.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from minipeft.console import OneLineParser, check_device
from minipeft.contenders import PASSES, PUBLISHED_STEPS, Work, compared
from minipeft.default_base import SHAPE, default_base, initialise
from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.labels import LabelSet, Question
from minipeft.methods.lora import LoRA
from minipeft.models.classifier import Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import load_model, load_tokenizer, save_model
from minipeft.models.trunk import Trunk, keep_top
from minipeft.peers import Peft
from minipeft.profiling import profiled
from minipeft.running import first_users, for_base, open_base, prompts_of
from minipeft.schedule import Job, TrainConfig
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task

METHOD = LoRA(rank=8, alpha=16, sites=("q", "v"))
STEPS = 5  # of each user in one turn
TURNS = 5  # of each contender, in alternating order
CONTENDERS = ("fused", "one_by_one", "peft", "published")
CURVE_TOKENS = {False: (16, 64, 256, 1024), True: (16, 32, 64, 128, 256, 512, 1024)}  # per user and step; by --full
CURVE_USERS = {False: (1, 8, 64, 512), True: (1, 4, 16, 64, 256, 1024, 4096)}
CURVE_AT = (64, 64)  # users of the curve over tokens, tokens of the curve over users
CURVE_STEPS = 2
CURVE_LONGEST = 64  # tokens of one text of the curves
BASES = {"1M": {}, "8M": dict(width=320, num_layers=6, num_heads=10, num_kv_heads=10, mlp_width=1024),
         "25M": dict(width=512, num_layers=8, num_heads=16, num_kv_heads=16, mlp_width=1536)}  # fmt: skip


def measured(work: Work, contenders: Sequence[str]) -> dict:
    """Compare, then time all contenders in turns. Returns an entry of result.json's `runs`, without memory."""
    found = compared(work, contenders)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS):
        for name in contenders if turn % 2 else reversed(contenders):
            began = time.perf_counter()
            getattr(work, name)()
            seconds[name].append(time.perf_counter() - began)
    entry = {
        "base": work.name, "device": str(work.base.device), "users": len(work.jobs), "steps": work.steps,
        "method": work.jobs[0].config.method.described(), "numbers": work.jobs[0].config.method.count(work.base),
        "tokens_per_user_step": work.tokens(work.jobs, work.steps) / work.steps / len(work.jobs),
        "tokens_per_user_step_few": work.tokens(work.few, work.steps) / work.steps / len(work.few),
        "frozen_trunk": work.trunk_seconds is not None, "trunk_seconds": work.trunk_seconds,
    }  # fmt: skip
    for name in CONTENDERS:
        users = len(work.jobs) if name == "fused" else len(work.few)
        steps = PUBLISHED_STEPS if name == "published" else work.steps
        per_user = median(seconds[name]) / users * work.steps / steps if name in contenders else None
        entry[f"{name}_users_per_s"] = None if per_user is None else 1 / per_user
        entry[f"{name}_seconds"] = seconds.get(name)
    tokens = entry["tokens_per_user_step"] * work.steps
    return entry | found | {
        "tokens_per_s": entry["fused_users_per_s"] * tokens,
        "updates_per_s": entry["fused_users_per_s"] * work.steps,
        "fused_peak_mb": None, "peft_peak_mb": None, "fused_grown_mb": None, "peft_grown_mb": None, "resident_mb": None,
    }  # fmt: skip


# ---- What is trained -----------------------------------------------------------------------------------------------


def main_work(args: argparse.Namespace) -> Work:
    """The users of --task on --model, or synthetic users on the default base."""
    task = load_task(args.task) if args.task else make_synthetic(SyntheticConfig(users=args.users or 128))[0]
    if args.task and args.users:
        task = first_users(task, args.users)
    folder = args.model or default_base(task, 0)
    base = open_base(load_model(folder, device=args.device), len(task.labels))
    encoded = prompts_of(base, task.header).encode(task)
    seconds = None
    if args.top_layers is not None:
        keep_top(base, args.top_layers)
        if isinstance(base, Classifier):
            began = time.perf_counter()
            base = Trunk(base, (q.prompt for own in encoded.train.values() for q in own))
            seconds = time.perf_counter() - began
    config = TrainConfig(for_base(args.method, base))
    config.method.check(base)
    jobs = [Job(user, encoded.train[user], encoded.train[user][:1], config) for user in task.users]
    jobs.sort(key=lambda job: -sum(len(question.prompt) for question in job.train) / len(job.train))
    name = args.model.name if args.model else "default"
    return Work(name, base, encoded.labels, jobs, STEPS, args.passes, seconds)


def curve_work(name: str, base: Decoder, users: int, tokens: int) -> Work:
    """Made-up texts: so many users, so many tokens each in every step."""
    number = max(1, tokens // CURVE_LONGEST)
    config = TrainConfig(for_base(METHOD, base), batch_size=number)

    def questions(user: int) -> list[Question]:
        words = np.random.default_rng(user).integers(3, base.config.vocab_size, (2 * number, tokens // number))
        return [Question(tuple(text), i % 2) for i, text in enumerate(words.tolist())]

    jobs = [Job(f"user {u}", own := questions(u), own[:1], config) for u in range(users)]
    return Work(name, base, LabelSet([[1], [2]]), jobs, CURVE_STEPS)


def curve_works(work: Work, full: bool) -> Iterator[Work]:
    """Every point of the curves on a decoder of the default shape; with `full` on larger ones too."""
    users, tokens = CURVE_AT
    points = dict.fromkeys([*((users, t) for t in CURVE_TOKENS[full]), *((u, tokens) for u in CURVE_USERS[full])])
    tokenizer = load_tokenizer(work.base.origin.folder)
    for name, shape in BASES.items() if full else [("1M", {})]:
        with tempfile.TemporaryDirectory() as folder:
            config = DecoderConfig(**{**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "tied_head": True, **shape})
            save_model(initialise(Decoder(config), seed=0), tokenizer, folder)
            base = load_model(folder, device=work.base.device)
            for point in points:
                yield curve_work(f"random {name}", base, *point)


# ---- Memory --------------------------------------------------------------------------------------------------------


def memory_of(contender: str, argv: Sequence[str]) -> dict[str, float]:
    """A contender's memory in a process of its own, that imports what it needs.

    Returns:
        peak_mb: of the process. grown_mb: by how much training alone, and the base, make it grow.
    """
    command = [sys.executable, "-m", "minipeft.bench", "train", *argv, "--memory-of", contender]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise InputError(f"measuring the memory of {contender} failed: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def print_memory(contender: str, args: argparse.Namespace) -> None:
    work = replace(main_work(args), steps=1)
    if contender == "peft":  # which has a base of its own, and nothing of ours
        work.peer(Peft)
        work.base.to("meta")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    getattr(work, contender)()
    peak = _status("VmHWM")
    base = sum(weight.nbytes for weight in work.base.parameters())
    print(json.dumps({"peak_mb": peak / 2**20, "grown_mb": (peak - before + base) / 2**20}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident_mb(work: Work) -> float:
    """What the resident users' rows take: weights, gradients and two moments, fp32."""
    users = min(len(work.jobs), work.passes.slots)
    return 16 * users * work.jobs[0].config.method.layout(work.base).row_size / 2**20


# ---- The suite -----------------------------------------------------------------------------------------------------


def run_train(argv: Sequence[str]) -> dict:
    """The whole suite: prints as it goes, leaves result.json, train.png and with --profile a trace in OUT."""
    args = parse(argv)
    check_device(args.device)
    if args.memory_of:
        print_memory(args.memory_of, args)
        return {}
    began = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror}); choose another folder") from None
    work = main_work(args)
    peers, why = contenders_of(work)
    print(f"{work.name}: {len(work.jobs)} users, {work.steps} steps each; {args.device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}, fp32" + (f"; without peers: {why}" if why else ""), flush=True)
    result = {
        "suite": "train", "command": "python -m minipeft.bench train " + " ".join(map(str, argv)), "full": args.full,
        "versions": versions(args.device), "peers": why or "measured", "runs": [],
    }  # fmt: skip

    def note(entry: dict) -> None:
        print(line(entry), flush=True)
        result["runs"].append(entry)
        result["seconds"] = time.perf_counter() - began
        write_file(args.out / "result.json", json.dumps(result, indent=1).encode() + b"\n")

    print(HEADING, flush=True)
    entry = measured(work, ["fused", "one_by_one", *peers])
    if peers and work.base.device.type == "cpu":
        for name in ("fused", "peft"):
            entry |= {f"{name}_{what}": value for what, value in memory_of(name, argv).items()}
        entry["resident_mb"] = resident_mb(work)
    note(entry)
    if not args.no_curves:
        for each in curve_works(work, args.full):
            note(measured(each, ["fused", "one_by_one", *(name for name in peers if name == "peft")]))
        plot(args.out / "train.png", result["runs"][1:])
    if args.profile:
        with profiled(args.out):
            work.fused()
    print(json.dumps(result))
    return result


def contenders_of(work: Work) -> tuple[list[str], str]:
    """Which peers can run, or why none can."""
    try:
        work.peer(Peft)
    except InputError as error:
        return [], str(error)
    return ["peft", "published"], ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m minipeft.bench train", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--task", type=Path, metavar="DIR", help="a prepared task (default: synthetic users)")
    parser.add_argument("--model", type=Path, metavar="DIR",
                        help="a Hugging Face model folder (default: a small base made from the task)")
    parser.add_argument("--users", type=int, metavar="N", help="how many (default: 128 synthetic, or all)")
    parser.add_argument("--sites", type=lambda text: tuple(text.split(",")), default=METHOD.sites, metavar="NAME,...",
                        help="where LoRA of rank 8 acts (default: q,v)")
    parser.add_argument("--top-layers", type=int, metavar="N",
                        help="act in the last N layers only; an encoder's lower ones run once per distinct text")
    parser.add_argument("--token-budget", type=int, default=PASSES.token_budget, metavar="N",
                        help=f"rows of a fused pass at most (default: {PASSES.token_budget}); fewer take less memory")
    parser.add_argument("--full", action="store_true", help="every point of the curves, larger bases too: an hour")
    parser.add_argument("--no-curves", action="store_true", help="the users alone, no curves")
    parser.add_argument("--profile", action="store_true", help="also write trace.json and a table of kernels")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--memory-of", choices=["fused", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("%Y%m%d-%H%M%S"), metavar="DIR",
                        help="folder for result.json and the rest (default: runs/<time>)")
    args = parser.parse_args(argv)
    if args.users is not None and args.users < 1:
        parser.error(f"--users must be at least 1, got {args.users}")
    args.method = replace(METHOD, sites=args.sites)
    args.passes = replace(PASSES, token_budget=args.token_budget)
    args.passes.check()
    return args


def versions(device: str) -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device,
             "cpu": platform.machine(), "threads": torch.get_num_threads()}  # fmt: skip
    for name in ("transformers", "peft"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


# ---- What is shown -------------------------------------------------------------------------------------------------

HEADING = (f"\n{'base':<22}{'users':>6}{'tokens':>8}{'users/s':>10}{'tokens/s':>10}{'one by one':>12}{'peft':>8}"
           f"{'published':>11}{'same':>9}\n{'':<22}{'':>6}{'a step':>8}{'':>10}{'':>10}"
           f"{'times as fast as':>20}")  # fmt: skip


def faster(entry: dict, than: str) -> float | None:
    other = entry[f"{than}_users_per_s"]
    return None if other is None else entry["fused_users_per_s"] / other


def line(entry: dict) -> str:
    ratios = "".join(f"{'-' if (ratio := faster(entry, than)) is None else f'{ratio:.2f}x':>{width}}"
                     for than, width in (("one_by_one", 12), ("peft", 8), ("published", 11)))  # fmt: skip
    name = entry["base"] + (", trunk" if entry["frozen_trunk"] else "")
    text = (f"{name:<22}{entry['users']:>6}{entry['tokens_per_user_step']:>8.0f}{entry['fused_users_per_s']:>10.2f}"
            f"{entry['tokens_per_s']:>10,.0f}{ratios}{entry['max_relative_difference']:>9.0e}")
    if entry["fused_peak_mb"] is not None:
        peak, grown = ((entry[f"fused_{what}_mb"], entry[f"peft_{what}_mb"]) for what in ("peak", "grown"))
        text += (f"\n  peak memory: fused {peak[0]:.0f} MB, peft {peak[1]:.0f} MB; without code: fused {grown[0]:.0f} "
                 f"MB, {entry['resident_mb']:.0f} of them resident users' rows, peft {grown[1]:.0f} MB")
    return text


def plot(path: Path, runs: Sequence[dict]) -> None:
    """Who wins where: how many times as fast as peft fused training is, over tokens and over users. 1 is a draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no train.png: matplotlib is not installed (pip install 'minipeft[report]')", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    users, tokens = CURVE_AT
    panels: list[tuple[str, str, Callable[[dict], bool]]] = [
        ("tokens_per_user_step", f"tokens per user and step, {users} users", lambda run: run["users"] == users),
        ("users", f"users, {tokens} tokens per user and step", lambda run: run["tokens_per_user_step"] == tokens)]
    for axes, (x, title, belongs) in zip(figure.subplots(1, 2, sharey=True), panels):
        for base in dict.fromkeys(run["base"] for run in runs):
            some = sorted((run for run in runs if run["base"] == base and belongs(run)), key=lambda run: run[x])
            for than, dashes in (("peft", "-"), ("one_by_one", ":")):
                points = [(run[x], ratio) for run in some if (ratio := faster(run, than)) is not None]
                axes.plot(*zip(*points) if points else ([], []), dashes, marker="o", markersize=4,
                          label=f"{base} against {than.replace('_', ' ')}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("fused is so many times as fast")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
