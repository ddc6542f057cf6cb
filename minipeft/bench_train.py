"""python -m minipeft.bench train: training, ours beside what one would run without it, taking turns in one run.

    fused       all users together in packed passes: minipeft
    one_by_one  the same engine, a user at a time
    peft        transformers and peft, a user at a time, tuned (peers.py)
    published   the same as PEFT-U's code does it: every text padded to 512 tokens

The same base, LoRA, users, minibatches, learning rates and precision. Contenders that go user by user are timed on 8 of
the users, the published protocol on fewer steps; who was timed on what is printed. Before a time counts, those users'
adapters are compared: fused with one by one, kept states with all layers, and with the peers', losses too. Then the
curves: who wins where, over tokens per user and step, over users, and over the base's size; and what the model of cost
says of them (docs/performance.md).
"""

import argparse
import json
import os
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
from torch import nn

from minipeft.console import OneLineParser, add_dtype, check_device
from minipeft.contenders import FEW, PASSES, Apart, Work, compared
from minipeft.default_base import SHAPE, default_base, initialise
from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.labels import LabelSet, Question
from minipeft.lanes import lanes_on
from minipeft.machine import versions
from minipeft.methods.lora import LoRA
from minipeft.models.classifier import Base, Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin, load_model, load_shape, load_tokenizer, read_config, save_model
from minipeft.models.t5 import T5
from minipeft.models.trunk import Trunk, keep_top
from minipeft.peers import PUBLISHED_LENGTH, Peft, Published
from minipeft.profiling import profiled
from minipeft.prompts import Prompts
from minipeft.running import first_users, for_base, open_base, prompts_of, tokenizer_of
from minipeft.schedule import Job, PassConfig, TrainConfig
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import Task, load_task
from minipeft_kernels.segments import TILE

METHOD = LoRA(rank=8, alpha=16, sites=("q", "v"))
STEPS = 5  # of each user in one turn
TURNS = 5  # of each contender, in alternating order
CONTENDERS = ("fused", "one_by_one", "peft", "published")
CURVE_TOKENS = {False: (16, 64, 256, 1024), True: (16, 32, 64, 128, 256, 512, 1024)}  # per user and step; by --full
CURVE_USERS = {False: (1, 8, 64, 512), True: (1, 4, 16, 64, 256, 1024)}
CURVE_AT = (64, 64)  # users of the curve over tokens, tokens of the curve over users; both of the one over bases
CURVE_STEPS = 2
SMALL_BASE = 5120  # rows of a pass on the default base
MEMORY_LIMIT = 1.5  # times peft's, beside the resident users' rows
CURVE_LONGEST = 64  # tokens of one text of the curves
BASES = {"1M": {}, "8M": dict(width=320, num_layers=6, num_heads=10, num_kv_heads=10, mlp_width=1024),
         "25M": dict(width=512, num_layers=8, num_heads=16, num_kv_heads=16, mlp_width=1536)}  # fmt: skip


def measured(work: Work, contenders: Sequence[str]) -> dict:
    """Compare, then time all contenders in turns. Returns an entry of result.json's `runs`, without memory."""
    found = compared(work, contenders)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    planning = []
    for turn in range(TURNS):
        for name in contenders if turn % 2 else reversed(contenders):
            began = time.perf_counter()
            getattr(work, name)()
            seconds[name].append(time.perf_counter() - began)
            planning += [work.planning / seconds[name][-1]] if name == "fused" else []
    timed = {name: {"users": len(work.jobs if name == "fused" else work.few),
                    "steps": work.published_steps if name == "published" else work.steps}
             for name in contenders}  # fmt: skip
    entry = {
        "base": work.name, "device": str(work.base.device), "dtype": str(work.base.dtype).removeprefix("torch."),
        "users": len(work.jobs), "steps": work.steps, "timed": timed, "num_cut": work.num_cut,
        "num_cut_published": work.num_short_cut,
        "published_reload_seconds": work.peer(Published).load_seconds if "published" in contenders else None,
        "base_numbers": sum(weight.numel() for weight in work.base.parameters()),
        "method": work.jobs[0].config.method.described(), "numbers": work.jobs[0].config.method.count(work.base),
        "tokens_per_user_step": work.tokens(work.jobs, work.steps) / work.steps / len(work.jobs),
        "tokens_per_user_step_few": work.tokens(work.few, work.steps) / work.steps / len(work.few),
        "planned_steps": sum(job.steps_per_epoch * job.config.epochs for job in work.jobs) / len(work.jobs),
        "frozen_trunk": work.trunk_seconds is not None, "trunk_seconds": work.trunk_seconds,
        "fused_with_states_users_per_s": None, "fused_over_plan_users_per_s": None,
        "planning_share": median(planning), "model_times_one_by_one": None,
    }  # fmt: skip
    for name in CONTENDERS:
        entry[f"{name}_users_per_s"], entry[f"{name}_seconds"] = None, seconds.get(name)
        if name in contenders:
            users, steps = timed[name]["users"], timed[name]["steps"]
            entry[f"{name}_users_per_s"] = users * steps / work.steps / median(seconds[name])
    if work.trunk_seconds is not None:  # all at these steps' charge, and their share of it
        per_user, states = 1 / entry["fused_users_per_s"], work.trunk_seconds / len(work.jobs)
        entry["fused_with_states_users_per_s"] = 1 / (per_user + states)
        entry["fused_over_plan_users_per_s"] = 1 / (per_user + states * work.steps / entry["planned_steps"])
    tokens = entry["tokens_per_user_step"] * work.steps
    return entry | found | {
        "tokens_per_s": entry["fused_users_per_s"] * tokens,
        "updates_per_s": entry["fused_users_per_s"] * work.steps,
        "fused_peak_mb": None, "peft_peak_mb": None, "fused_grown_mb": None, "peft_grown_mb": None,
        "resident_mb": None, "peak_within_limit": None, "grown_within_limit": None,
    }  # fmt: skip


# ---- What is trained -----------------------------------------------------------------------------------------------


def main_work(args: argparse.Namespace, weights: bool = True) -> Work:
    """The users of --task on --model, or synthetic users on the default base.

    weights: False for a process of the peers, which load their own: our base is on the meta device, nothing is kept.
    """
    task = load_task(args.task) if args.task else make_synthetic(SyntheticConfig(users=args.users or 128))[0]
    if args.task and args.users:
        task = first_users(task, args.users)
    folder = args.model or default_base(task, 0)
    model = load_model(folder, args.dtype, args.device) if weights else unloaded(folder)
    base, whole, seconds = open_base(model, len(task.labels)), None, None
    prompts = prompts_of(base, task.header)
    train, num_cut = training_questions(prompts, task)
    short, num_short_cut = training_questions(shortened(prompts, base), task)
    if args.top_layers is not None:
        keep_top(base, args.top_layers)
        if isinstance(base, Classifier) and weights:
            began, whole = time.perf_counter(), base
            base = Trunk(whole, (q.prompt for own in train.values() for q in own))
            base.states[0][0, 0].item()  # a GPU has computed them by then
            seconds = time.perf_counter() - began
    config = TrainConfig(for_base(args.method, base))
    config.method.check(base)
    jobs = [Job(user, train[user], train[user][:1], config) for user in task.users]
    jobs.sort(key=lambda job: -sum(len(question.prompt) for question in job.train) / len(job.train))
    return Work(base_name(args.model), base, prompts.labels, jobs, STEPS, args.passes, whole, seconds, short, num_cut,
                num_short_cut, args.published_steps)  # fmt: skip


def unloaded(folder: str | Path) -> nn.Module:
    """As load_model gives it, but on the meta device, without weights."""
    base, folder = load_shape(folder), Path(folder).absolute()
    base.family, base.origin = read_config(folder)[0], Origin(folder, folder.name, base)
    return base


def training_questions(prompts: Prompts, task: Task) -> tuple[dict[str, list[Question]], int]:
    """User -> their training questions; and how many texts were cut."""
    asked = {user: prompts.questions(examples) for user, examples in task.train.items()}
    return {user: own for user, (own, _) in asked.items()}, sum(num_cut for _, num_cut in asked.values())


def shortened(prompts: Prompts, base: Base) -> Prompts:
    """These prompts, answers included, in what the published protocol pads to."""
    tokenizer, start = tokenizer_of(base)
    longest = min(PUBLISHED_LENGTH, base.config.max_positions or PUBLISHED_LENGTH)
    return Prompts(prompts.task, tokenizer, longest, base.causal, start)


def base_name(folder: Path | None) -> str:
    """What result.json calls a base: all-MiniLM-L6-v2 is "minilm", "." is the folder we are in, and a link goes by its
    own name."""
    name = "default" if folder is None else os.path.basename(os.path.abspath(folder))
    return "minilm" if "minilm" in name.lower() else name


def curve_work(name: str, base: Decoder | T5, users: int, tokens: int, passes: PassConfig = PASSES) -> Work:
    """Made-up texts: so many users, so many tokens each in every step."""
    number = max(1, tokens // CURVE_LONGEST)
    config = TrainConfig(for_base(METHOD, base), batch_size=number)

    def questions(user: int) -> list[Question]:
        words = np.random.default_rng(user).integers(3, base.config.vocab_size, (2 * number, tokens // number))
        return [Question(tuple(text), i % 2) for i, text in enumerate(words.tolist())]

    jobs = [Job(f"user {u}", own := questions(u), own[:1], config) for u in range(users)]
    labels = LabelSet([[1], [2]], base.config.start_token if isinstance(base, T5) else None)
    return Work(name, base, labels, jobs, CURVE_STEPS, passes)


def curve_works(work: Work, full: bool, bases: dict[str, bool]) -> Iterator[Work]:
    """The points of the curves, on decoders of these sizes: all, or the one where all sizes are measured."""
    users, tokens = CURVE_AT
    points = dict.fromkeys([*((users, t) for t in CURVE_TOKENS[full]), *((u, tokens) for u in CURVE_USERS[full])])
    tokenizer = load_tokenizer(work.base.origin.folder)
    for name, every in bases.items():
        with tempfile.TemporaryDirectory() as folder:
            shape = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "tied_head": True, **BASES[name]}
            config = DecoderConfig(**shape)
            save_model(initialise(Decoder(config), seed=0), tokenizer, folder)
            base = load_model(folder, work.base.dtype, work.base.device)
            for point in points if every else [CURVE_AT]:
                yield curve_work(f"random {name}", base, *point, work.passes)


def model_of_cost(runs: Sequence[dict], passes: PassConfig) -> dict[str, float] | None:
    """Seconds that a pass takes whatever is in it, that each user adds, and each token: what fits the runs' times best,
    fused and one by one, by least relative squares. Fills in what that says of each run:

        s(U users of T tokens in P passes) = pass P + user U + token U T
        times one by one                   = U s(1, T, 1) / s(U, T, P)

    runs: of one base. None where there are too few to tell the three apart.
    """
    def parts(users: int, tokens: float) -> list[float]:
        rows = TILE * -(-int(tokens) // TILE)
        together = min(users, passes.slots, max(1, passes.token_budget // rows))
        return [-(-users // together), users, users * tokens]

    step = [(run["users"], run["tokens_per_user_step"], run["fused_users_per_s"] * run["steps"]) for run in runs]
    alone = [(1, run["tokens_per_user_step"], run["one_by_one_users_per_s"] * run["steps"]) for run in runs]
    shares = np.array([np.array(parts(users, tokens)) * per_s / users for users, tokens, per_s in (*step, *alone)])
    if np.linalg.matrix_rank(shares) < 3:
        return None
    kept, found = [0, 1, 2], np.zeros(3)
    while (some := np.linalg.lstsq(shares[:, kept], np.ones(len(shares)), rcond=None)[0]).min() < 0:
        del kept[int(some.argmin())]  # noise: it is taken as nothing
    found[kept] = some
    for run in runs:
        users, tokens = run["users"], run["tokens_per_user_step"]
        one, all_ = (float(found @ parts(number, tokens)) for number in (1, users))
        run["model_times_one_by_one"] = users * one / all_
    return dict(zip(("pass_s", "user_s", "token_s"), map(float, found)))


# ---- Memory --------------------------------------------------------------------------------------------------------


def memory(work: Work, argv: Sequence[str]) -> dict:
    """The fields of an entry that are about memory, of ours fused and of peft, in MB."""
    found = {"resident_mb": resident_mb(work)}
    for name in ("fused", "peft"):
        own = memory_on_gpu(work, name) if work.base.device.type == "cuda" else memory_of(name, argv)
        found |= {f"{name}_{what}": value for what, value in own.items()}
    for what in ("peak", "grown"):
        found[f"{what}_within_limit"] = found[f"fused_{what}_mb"] <= memory_limit(found, what)
    return found


def memory_limit(entry: dict, what: str) -> float:
    """What ours may take, in MB: MEMORY_LIMIT times peft's, and the resident users' rows. what: "peak" or "grown"."""
    return MEMORY_LIMIT * entry[f"peft_{what}_mb"] + entry["resident_mb"]


def memory_of(contender: str, argv: Sequence[str]) -> dict[str, float]:
    """A contender's memory in a process of its own, that imports and loads what it needs and nothing else.

    Returns:
        peak_mb: of the process, from its start. grown_mb: by how much training makes it grow, the base and states that
        are kept included.
    """
    command = [sys.executable, "-m", "minipeft.bench", "train", *argv, "--memory-of", contender]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip().splitlines() or [f"its process ended with code {run.returncode}, without a word"]
        raise InputError(f"measuring the memory of {contender} failed: {said[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def print_memory(contender: str, args: argparse.Namespace) -> None:
    work = replace(main_work(args, weights=contender == "fused"), steps=1)
    if contender == "peft":
        work.peers[Peft] = Peft(work.base, work.labels, work.jobs[0].config.method, args.device, args.dtype)
    for weight in base_of(work, contender).parameters():
        weight.sum()  # a mapped file's pages count once they were read
    before, peak_before = _status("VmRSS"), _status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    getattr(work, contender)()
    peak = _status("VmHWM")
    grown = peak - before + held(work, contender)
    print(json.dumps({"peak_mb": max(peak, peak_before) / 2**20, "grown_mb": grown / 2**20}))


def memory_on_gpu(work: Work, contender: str) -> dict[str, float]:
    """As memory_of, of what is allocated on the GPU, in this process: there is no code in it, so both are the same."""
    torch.cuda.reset_peak_memory_stats(work.base.device)
    before = torch.cuda.memory_allocated(work.base.device)
    getattr(work, contender)()
    grown = torch.cuda.max_memory_allocated(work.base.device) - before + held(work, contender)
    return {"peak_mb": grown / 2**20, "grown_mb": grown / 2**20}


def base_of(work: Work, contender: str) -> nn.Module:
    return work.base if contender == "fused" else work.peer(Peft).model


def held(work: Work, contender: str) -> int:
    """Bytes that a contender holds before it trains: the base, and what a Trunk keeps."""
    base = base_of(work, contender)
    states = sum(kept.nbytes for kept in base.states) if isinstance(base, Trunk) else 0
    return states + sum(weight.nbytes for weight in base.parameters())


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
          f"threads, torch {torch.__version__}, {str(args.dtype).removeprefix('torch.')}"
          + (f"; without peers: {why}" if why else ""), flush=True)  # fmt: skip
    if work.num_cut or work.num_short_cut:
        print(f"texts cut at their end: {work.num_cut} to fit the base, {work.num_short_cut} to fit the published "
              f"protocol's {PUBLISHED_LENGTH} tokens", flush=True)  # fmt: skip
    result = {
        "suite": "train", "command": "python -m minipeft.bench train " + " ".join(map(str, argv)), "full": args.full,
        "versions": versions(args.device, ("transformers", "peft")), "peers": why or "measured", "runs": [],
    }  # fmt: skip

    def note(entry: dict) -> None:
        print(line(entry), flush=True)
        result["runs"].append(entry)
        result["seconds"] = time.perf_counter() - began
        write_file(args.out / "result.json", json.dumps(result, indent=1).encode() + b"\n")

    print(HEADING, flush=True)
    entry = measured(work, ["fused", "one_by_one", *peers])
    if peers:
        entry |= memory(work, argv)
    note(entry)
    print(*details(entry), sep="\n", flush=True)
    if not args.no_curves:
        print(f"curves: {CURVE_STEPS} steps of each user; one by one and peft of {FEW} users at most", flush=True)
        apart = []
        for each in curve_works(work, args.full, args.bases):
            try:
                note(measured(each, ["fused", "one_by_one", *(name for name in peers if name == "peft")]))
            except Apart as error:  # one point; the others are measured all the same
                apart.append(str(error))
                print(f"left out: {error}", flush=True)
        curves = result["runs"][1:]
        result["model"] = {name: model_of_cost([run for run in curves if run["base"] == name], work.passes)
                           for name in dict.fromkeys(run["base"] for run in curves)}  # fmt: skip
        write_file(args.out / "result.json", json.dumps(result, indent=1).encode() + b"\n")
        print(*model_lines(result), sep="\n", flush=True)
        plot(args.out / "train.png", curves)
        if apart:
            raise Apart(apart[0])
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
    parser.add_argument("--token-budget", type=int, metavar="N",
                        help=f"rows of a fused pass at most; fewer take less memory (default: {PASSES.token_budget}, "
                             "twice as many with --top-layers, where few layers keep something for a row; "
                             f"{SMALL_BASE} on the default base, whose operations are short)")
    parser.add_argument("--lanes", type=int, metavar="N",
                        help="parts of a fused pass that run side by side on a CPU (default: one for each core and "
                             "1,024 rows)")
    parser.add_argument("--published-steps", type=int, default=STEPS, metavar="N",
                        help=f"steps of each user by the published protocol, which is slow; 1 to {STEPS}, the default")
    add_dtype(parser)
    parser.add_argument("--full", action="store_true",
                        help="more points of the curves, and all of them on larger bases too: an hour and a half")
    parser.add_argument("--bases", type=lambda text: tuple(text.split(",")), metavar="NAME,...",
                        help=f"sizes of bases, of {', '.join(BASES)}, on which all points of the curves are measured "
                             "(default: 1M, with --full all; of the others one point)")
    parser.add_argument("--no-curves", action="store_true", help="the users alone, no curves")
    parser.add_argument("--profile", action="store_true", help="also write trace.json and a table of kernels")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--memory-of", choices=["fused", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs") / time.strftime("%Y%m%d-%H%M%S"), metavar="DIR",
                        help="folder for result.json and the rest (default: runs/<time>)")
    args = parser.parse_args(argv)
    if args.users is not None and args.users < 1:
        parser.error(f"--users must be at least 1, got {args.users}")
    if not 1 <= args.published_steps <= STEPS:
        parser.error(f"--published-steps must be 1 to {STEPS}, got {args.published_steps}")
    if unknown := [name for name in args.bases or () if name not in BASES]:
        parser.error(f"--bases: there is no {unknown[0]!r}; choose of {', '.join(BASES)}")
    args.bases = dict.fromkeys(args.bases, True) if args.bases else {name: args.full or name == "1M" for name in BASES}
    args.method = replace(METHOD, sites=args.sites)
    check_device(args.device)
    budget = args.token_budget
    if budget is None:
        budget = SMALL_BASE if args.model is None else PASSES.token_budget * (1 if args.top_layers is None else 2)
    lanes = lanes_on(args.device, budget) if args.lanes is None else args.lanes
    args.passes = replace(PASSES, token_budget=budget, lanes=lanes)
    args.passes.check()
    return args


# ---- What is shown -------------------------------------------------------------------------------------------------

HEADING = (f"\n{'base':<22}{'users':>6}{'tokens':>8}{'users/s':>10}{'tokens/s':>10}{'one by one':>12}{'peft':>8}"
           f"{'published':>11}{'same':>9}{'plan':>7}\n{'':<22}{'':>6}{'a step':>8}{'':>10}{'':>10}"
           f"{'times as fast as':>20}")  # fmt: skip


def faster(entry: dict, than: str, ours: str = "fused") -> float | None:
    other = entry[f"{than}_users_per_s"]
    return None if other is None else entry[f"{ours}_users_per_s"] / other


def line(entry: dict) -> str:
    ratios = "".join(f"{'-' if (ratio := faster(entry, than)) is None else f'{ratio:.2f}x':>{width}}"
                     for than, width in (("one_by_one", 12), ("peft", 8), ("published", 11)))  # fmt: skip
    name = entry["base"] + (", trunk" if entry["frozen_trunk"] else "")
    return (f"{name:<22}{entry['users']:>6}{entry['tokens_per_user_step']:>8.0f}{entry['fused_users_per_s']:>10.2f}"
            f"{entry['tokens_per_s']:>10,.0f}{ratios}{entry['max_relative_difference']:>9.0e}"
            f"{entry['planning_share']:>7.1%}")


def details(entry: dict) -> list[str]:
    """Lines below the main one: what its figures leave out, and memory."""
    timed = ", ".join(f"{name.replace('_', ' ')} {on['users']} users x {on['steps']} steps"
                      for name, on in entry["timed"].items())  # fmt: skip
    lines = [f"timed: {timed}; {entry['tokens_per_user_step']:.0f} tokens a user and step, "
             f"{entry['tokens_per_user_step_few']:.0f} of those who go one by one"]  # fmt: skip
    if entry["published_reload_seconds"] is not None:
        lines.append("left out: the published protocol loads the base anew for each user, here "
                     f"{entry['published_reload_seconds']:.2f} s, timed once")  # fmt: skip
    if entry["frozen_trunk"]:
        for what, over in (("with_states", f"these {entry['steps']} steps"),
                           ("over_plan", f"the plan's {entry['planned_steps']:.0f} steps")):  # fmt: skip
            ratios = [f"{ratio:.2f}x {than.replace('_', ' ')}" for than in CONTENDERS[1:]
                      if (ratio := faster(entry, than, f"fused_{what}")) is not None]
            lines.append(f"kept states' own {entry['trunk_seconds']:.2f} s included, spread over {over}: "
                         + ", ".join(ratios))  # fmt: skip
    if entry["fused_peak_mb"] is not None:
        for what, title in (("peak", "peak memory"), ("grown", "memory without code")):
            ours, theirs, limit = entry[f"fused_{what}_mb"], entry[f"peft_{what}_mb"], memory_limit(entry, what)
            lines.append(f"{title}: fused {ours:.0f} MB, peft {theirs:.0f} MB; {MEMORY_LIMIT} x peft's and "
                         f"{entry['resident_mb']:.0f} MB of resident users' rows are {limit:.0f} MB: "
                         f"{'within' if entry[f'{what}_within_limit'] else 'ABOVE'}")  # fmt: skip
    return [f"  {text}" for text in lines]


def model_lines(result: dict) -> list[str]:
    """What the model of cost says, beside what was measured."""
    lines = []
    for name, model in result["model"].items():
        if model is None:
            continue
        costs = (f"{1e3 * model['pass_s']:.1f} ms a pass, {1e3 * model['user_s']:.2f} ms a user, "
                 f"{1e6 * model['token_s']:.0f} us a token")  # fmt: skip
        lines.append(f"model of {name}: {costs}; times one by one, by the model and measured:")
        lines += [f"{run['users']:>8} users {run['tokens_per_user_step']:>6.0f} tokens"
                  f"{run['model_times_one_by_one']:>8.2f}{faster(run, 'one_by_one'):>8.2f}"
                  for run in result["runs"] if run["base"] == name]  # fmt: skip
    return lines


def plot(path: Path, runs: Sequence[dict]) -> None:
    """Who wins where: how many times as fast as peft fused training is, over tokens, users and bases. 1 is a draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no train.png: matplotlib is not installed (pip install 'minipeft[report]')", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    users, tokens = CURVE_AT
    panels: list[tuple[str, str, Callable[[dict], bool]]] = [
        ("tokens_per_user_step", f"tokens per user and step, {users} users", lambda run: run["users"] == users),
        ("users", f"users, {tokens} tokens per user and step", lambda run: run["tokens_per_user_step"] == tokens)]
    bases = list(dict.fromkeys(run["base"] for run in runs))
    *pairs, sizes = figure.subplots(1, 3, sharey=True)
    for axes, (x, title, belongs) in zip(pairs, panels):
        for color, base in enumerate(bases):
            some = sorted((run for run in runs if run["base"] == base and belongs(run)), key=lambda run: run[x])
            if len(some) > 1:
                draw(axes, some, x, base, f"C{color}")
        axes.set(xscale="log", xlabel=title)
    draw(sizes, [run for run in runs if (run["users"], run["tokens_per_user_step"]) == CURVE_AT], "base_numbers",
         "all", "black")  # fmt: skip
    sizes.set(xscale="log", xlabel=f"numbers of the base, {users} users, {tokens} tokens")
    for axes in figure.axes:
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(yscale="log")
        axes.legend(fontsize=7, frameon=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("fused is so many times as fast")
    figure.savefig(path, dpi=150)


def draw(axes, runs: Sequence[dict], x: str, base: str, color: str) -> None:
    """One base's lines: against peft and against one by one, as measured, and as the model of cost has the latter."""
    for than, dashes in (("peft", "-"), ("one_by_one", ":")):
        points = [(run[x], ratio) for run in runs if (ratio := faster(run, than)) is not None]
        axes.plot(*zip(*points) if points else ([], []), dashes, marker="o", markersize=4, color=color,
                  label=f"{base} against {than.replace('_', ' ')}")  # fmt: skip
    points = [(run[x], run["model_times_one_by_one"]) for run in runs if run["model_times_one_by_one"] is not None]
    if len(points) > 1:
        axes.plot(*zip(*points), "x--", markersize=4, linewidth=0.8, color=color, label=f"{base}, model of one by one")
