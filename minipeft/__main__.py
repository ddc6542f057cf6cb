"""python -m minipeft: train many users' adapters in one fused pass, ask them, keep them.

    train     every user of a task gets an adapter of their own, in a store
    eval      how often a store's adapters say what their users said
    predict   what a user would say of a text; many users in one pass
    users     who is in a store
    store     verify, compact a store, or delete a user from it
    methods   what can be trained on a model, how many numbers that is, and what it costs
    export    adapters for other libraries
    import    an adapter that another library trained
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from minipeft.console import (
    POOLING,
    OneLineParser,
    add_dtype,
    check_device,
    plain_warnings,
    progress,
)
from minipeft.errors import InputError, SaidElsewhere
from minipeft.files import folder_name, write_file
from minipeft.log import as_json, tensorboard
from minipeft.methods import Method, PromptTuning
from minipeft.models.checkpoint import one_line
from minipeft.models.classifier import POOLINGS, Base, Classifier
from minipeft.models.fields import shown
from minipeft.models.loading import load_model, load_shape, load_tokenizer
from minipeft.options import (
    add_options,
    add_pass_options,
    counted,
    described_methods,
    method_of,
    passes_of,
    settings_of,
    sites_of,
)
from minipeft.ranks import Ranks, joined, own_device
from minipeft.running import evaluate, open_base, predict, without_head
from minipeft.schedule import TrainConfig
from minipeft.sharding import shard
from minipeft.shards import KINDS
from minipeft.store import Store, is_store
from minipeft.tasks.folder import TaskFolder
from minipeft.tasks.task import load_task
from minipeft.training import SAVE_MINUTES, SHARED, Interrupted, Summary, Training, silent

SHOWN = 20  # users left out whose reasons are printed
MIN_LABELS = 2  # what `methods` supposes: no task has fewer
FORMATS = ("peft", "adapterhub")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 if `store verify` found damage, 2 for bad input (one line on stderr),
    130 after Ctrl-C, 143 after SIGTERM, 141 if whoever read the output went away. `train` is 0 if anybody has an
    adapter, whoever was left out."""
    args, finished = None, []
    try:
        args = parse(argv)
        with plain_warnings("minipeft"):
            result = COMMANDS[args.command](args, finished)
        if args.json and result is not None:
            print(as_json(result))
        sys.stdout.flush()
    except SaidElsewhere:
        return 2
    except InputError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        kept = f" {len(finished)} users had finished; their adapters are in {args.store}." if finished else ""
        saved = " Go on with --resume." if isinstance(stopped, Interrupted) else ""
        print(f"\nminipeft: interrupted.{kept}{saved}", file=sys.stderr)
        return 128 + (stopped.signum if isinstance(stopped, Interrupted) else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush again, and fail
        return 141
    return 1 if result is not None and result.get("damaged") else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m minipeft", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)

    def command(name: str, *needed: str, about: str, after: str = "") -> argparse.ArgumentParser:
        """A command with the options that several have, --model and so on; those with "?" may be left out."""
        own = commands.add_parser(name, description=about, epilog=after, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        for option in needed:
            what = {"model": "a Hugging Face model folder or hub id", "task": "a prepared task",
                    "store": "a folder of adapters", "user": "the user's id"}[option.rstrip("?")]
            own.add_argument(f"--{option.rstrip('?')}", required=not option.endswith("?"), help=what,
                             metavar={"model": "FOLDER", "user": "ID"}.get(option.rstrip("?"), "DIR"))  # fmt: skip
        if "model" in needed:
            own.add_argument("--device", default="cpu", help="where to run (default: cpu)")
        if {"model", "model?"} & set(needed):
            add_dtype(own)
        own.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return own

    shape = shape_on_line(argv)
    counts = "with --model FOLDER on the line, how many numbers each is" if shape is None else "numbers of one user"
    own = command("train", "model", "task", "store", about="Every user of a task gets an adapter of their own.",
                  after=f"methods ({counts}):\n{described_methods(shape)}")  # fmt: skip
    own.add_argument("--users", type=int, metavar="N", help="the task's first N users only")
    own.add_argument("--again", action="store_true", help="replace the adapters of users who are in the store already")
    own.add_argument("--rows", choices=list(KINDS), help="how a new store keeps numbers (default: float32); the others "
                                                         "are smaller, and not exact")  # fmt: skip
    own.add_argument("--resume", action="store_true",
                     help="go on with the same training where it was interrupted; begin it if there is none")
    own.add_argument("--shard-base", action="store_true",
                     help="under torchrun: each process keeps a part of each layer's matrices, for a base that one GPU "
                     "does not hold")  # fmt: skip
    own.add_argument("--save-minutes", type=float, default=SAVE_MINUTES, metavar="X",
                     help=f"how often what is under way is saved (default: {SAVE_MINUTES:g}; and when interrupted)")
    own.add_argument("--on-bad", choices=["quarantine", "stop"], default="quarantine",
                     help="leave users out who cannot be trained (default), or stop")
    own.add_argument("--tensorboard", type=Path, metavar="DIR", help="write the log's numbers for TensorBoard, too")
    add_pass_options(own)
    own.add_argument("--pooling", choices=POOLINGS, default="mean", help=POOLING)
    own.add_argument("--start-text", metavar="TEXT", help="prompt: start from this text's tokens, as the base reads it")
    both = own.add_mutually_exclusive_group()
    both.add_argument("--on-shared", dest="shared", action="store_const", const="on", default="",
                      help="train one adapter for all users first ({epochs} epoch, {batch_size} examples per step), "
                           "and each user's own on top of it".format(**SHARED))  # fmt: skip
    both.add_argument("--from-shared", dest="shared", action="store_const", const="from",
                      help="train one adapter for all users first, and start each user's own from it")
    add_options(own)
    command("eval", "store", "model", "task", about="How often users' adapters say what the users said, on their test "
                                                    "examples.")  # fmt: skip
    own = command("predict", "store", "model", "user?", about=(
        "What a user would say of a text: of --text, or of the whole standard input.\n"
        'Without --user, standard input is lines of JSON, {"user": ..., "text": ...}, and each is answered\n'
        "by one line, in order, many users in one pass."
    ))  # fmt: skip
    own.add_argument("--text", help="the text (default: standard input)")
    command("users", "store", about="Who is in a store.")
    own = command("store", "store", "user?", about=(
        "verify    read every adapter of a store and compare its checksum; exit code 1 if one is damaged\n"
        "compact   remove from disk what was deleted and replaced, and make few large files of many small ones\n"
        "delete    forget a user; the numbers stay on disk until `compact`"
    ))  # fmt: skip
    own.add_argument("action", choices=list(ACTIONS), metavar="ACTION", help=" or ".join(ACTIONS))
    command("methods", "model", about=(
        "What can be trained on a model: each method's numbers per user, the FLOPs that it adds to a token's forward\n"
        "pass, and where it acts."
    ))  # fmt: skip
    own = command("export", "store", "user?", "model?", about=(
        "Write adapters for other libraries: a user's into a folder, or, without --user, everybody's into folders in\n"
        'it. Those are named by the users\' ids, percent-encoded; users.jsonl says whose each is.'
    ))  # fmt: skip
    own.add_argument("--to", required=True, type=Path, metavar="DIR", help="where to")
    own.add_argument("--format", required=True, choices=FORMATS, help="whose format")
    own = command("import", "store", "user", "model", "task?", about="Read an adapter that Hugging Face PEFT or "
                                                                     "AdapterHub trained.")  # fmt: skip
    own.add_argument("--from", required=True, type=Path, dest="folder", metavar="DIR", help="the adapter's folder")
    own.add_argument("--format", default="peft", choices=FORMATS, help="whose format (default: peft)")
    own.add_argument("--again", action="store_true", help="replace an adapter that the user has already")
    return parser.parse_args(argv)


def shape_on_line(argv: Sequence[str] | None) -> Base | None:
    """The base of `train --model FOLDER --help`, by its config.json alone; None: the line is another."""
    finder = OneLineParser(add_help=False, allow_abbrev=False)
    finder.add_argument("command", nargs="?")
    finder.add_argument("--model", nargs="?")
    finder.add_argument("-h", "--help", action="store_true")
    args, _ = finder.parse_known_args(argv)
    wanted = args.command == "train" and args.help and args.model
    return open_base(load_shape(args.model), MIN_LABELS) if wanted else None


def load(args: argparse.Namespace) -> nn.Module:
    check_device(args.device)
    return load_model(args.model, args.dtype, args.device)


def told(method: Method) -> dict:
    """A method as --json has it: its options under the name that people know."""
    return method.described() | {"name": method.title}


# ---- The commands: each prints for people, and returns what --json prints -------------------------------------------


def run_train(args: argparse.Namespace, finished: list[str]) -> dict | None:
    """Appends to `finished` each user whose adapter is on disk."""
    method = method_of(args)
    if args.start_text is not None:
        if not isinstance(method, PromptTuning):
            raise InputError(f"--start-text is an option of --method prompt, not of {method.name}")
        tokens = load_tokenizer(args.model).encode(args.start_text, add_special_tokens=False).ids
        method = replace(method, start_from="text", text=tuple(tokens))
    config = TrainConfig(method=method, **settings_of(args))
    config.check()
    with joined() as ranks:
        return train_users(args, config, finished, ranks)


def train_users(args: argparse.Namespace, config: TrainConfig, finished: list[str], ranks: Ranks) -> dict | None:
    """One rank's part. None at ranks other than 0, which print nothing."""
    task = TaskFolder(args.task, args.users)
    device = own_device(args.device)
    check_device(device)
    model = load_model(args.model, args.dtype, "cpu" if args.shard_base else device)
    if args.shard_base:
        shard(model, device, ranks)
    with ranks.first_alone():
        scalar = tensorboard(args.tensorboard) if args.tensorboard and ranks.writes else None
    training = Training.plan(model, task, config, args.store, args.shared, args.again, passes_of(args),
                             resume=args.resume, strict=args.on_bad == "stop", ranks=ranks,
                             save_minutes=args.save_minutes, rows=args.rows, pooling=args.pooling)  # fmt: skip
    method, base = training.method, training.base
    acts = "; ".join(f"{part.name} at {', '.join(sites_of(part, base))}" for part in method.parts)
    if ranks.writes:
        print(f"task {task.header.name}: {len(task.users)} users, {sum(map(task.num_train, task.users))} training "
              f"examples, labels {', '.join(task.header.labels)}\nbase {base.origin.name}: "
              f"{sum(p.numel() for p in base.parameters()):,} frozen numbers; each user trains "
              f"{method.count(base):,} ({acts})", flush=True)  # fmt: skip
    with closing(training.store) if ranks.writes else nullcontext():
        summary = training.run(lambda adapter: finished.append(adapter.user), progress if ranks.writes else silent,
                               scalar=scalar)  # fmt: skip
    if not ranks.writes:
        return None
    show_summary(summary, args.store)
    quarantined = [{"user": user, "reason": reason} for user, reason in summary.quarantined.items()]
    return {"store": str(args.store), "base": base.origin.name, "task": task.header.name, "method": told(method),
            "num_users": summary.trained, "adapter_numbers": method.count(base), "num_cut_texts": summary.num_cut,
            "skipped_steps": summary.skipped_steps, "skipped": summary.skipped, "quarantined": quarantined,
            "stopped_early": summary.stopped_early}  # fmt: skip


def show_summary(summary: Summary, store: str) -> None:
    if summary.num_cut:
        print(f"{summary.num_cut} texts were too long for the base and were cut at their end")
    if summary.splits:
        print(f"memory did not hold {summary.splits} passes, which went in parts; a smaller --token-budget spares that")
    if summary.skipped_steps:
        print(f"{len(summary.skipped_steps)} users skipped steps whose gradient was not finite, e.g. "
              f"{next(iter(summary.skipped_steps))!r}")  # fmt: skip
    for user, reason in list(summary.quarantined.items())[:SHOWN]:
        print(f"left out: {shown(user)}: {reason}")
    if len(summary.quarantined) > SHOWN:
        print(f"and {len(summary.quarantined) - SHOWN} more, see --json or log.jsonl in {store}")
    print(f"trained {summary.trained} users ({summary.stopped_early} stopped early), left out "
          f"{len(summary.quarantined)}, {summary.skipped} were done before; their adapters are in {store}")  # fmt: skip


def run_eval(args: argparse.Namespace, _) -> dict:
    store, task = Store(args.store), load_task(args.task)
    store.check_task(task.header)
    result = evaluate(load(args), store, task)
    print(f"personal {result.mean:.1f} %, own majority {result.mean_majority:.1f} %: mean accuracy of "
          f"{len(result.accuracy)} users on their test examples")  # fmt: skip
    if result.left_out:
        print(f"{len(result.left_out)} users of the task are left out: no adapter here, or no test example")
    if result.num_cut:
        print(f"{result.num_cut} texts were too long for the base and were cut at their end")
    return {"task": task.name, "num_users": len(result.accuracy), "left_out": result.left_out,
            "num_cut_texts": result.num_cut, "users": result.accuracy,
            "accuracy": {"personal": result.mean, "own_majority": result.mean_majority}}  # fmt: skip


def run_predict(args: argparse.Namespace, _) -> dict:
    store = Store(args.store)
    if args.user is None:
        if args.text is not None:
            raise InputError("--text needs --user: whose answer?")
        replies = predict(load(args), store, read_lines(sys.stdin.buffer, store))
        for reply in replies:
            print(as_json(reply.described()))
        return {"replies": len(replies), "num_cut_texts": sum(reply.was_cut for reply in replies)}
    if args.user not in store:
        raise InputError(f"no adapter of user {args.user!r} in {store.folder}")
    try:
        text = sys.stdin.buffer.read().decode().rstrip("\n") if args.text is None else args.text
        text.encode()
    except UnicodeError:
        raise InputError("the text is not UTF-8") from None
    if not text.strip():
        raise InputError("the text is empty; give one with --text or on standard input")
    (reply,) = predict(load(args), store, [(args.user, text)])
    print(reply.label)
    if reply.was_cut:
        print("minipeft: the text is too long for the base; its end was not read", file=sys.stderr)
    return reply.described()


def read_lines(lines: Iterable[bytes], store: Store) -> list[tuple[str, str]]:
    """(user, text) of lines of JSON. Raises InputError that names the line; no text is ever quoted."""
    asked = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            json.dumps(fields, ensure_ascii=False).encode()  # half a character is no text
        except (ValueError, RecursionError):
            raise InputError(f'line {number} is not JSON in UTF-8; needed {{"user": ..., "text": ...}}') from None
        for name in ("user", "text"):
            if not isinstance(fields, dict) or not isinstance(fields.get(name), str) or not fields[name].strip():
                raise InputError(f'line {number} has no "{name}" with at least one visible character')
        if fields["user"] not in store:
            raise InputError(f"line {number}: no adapter of user {fields['user']!r} in {store.folder}")
        asked.append((fields["user"], fields["text"]))
    return asked


def run_users(args: argparse.Namespace, _) -> dict:
    store = Store(args.store)
    number = sum(1 for _ in store.users())
    print(f"{number} users of base {store.base.name}, task {store.task.name if store.task else 'unknown'}")
    users = []
    for user, (method, metrics, version) in store.everybody():
        print(f"{one_line(user)}: {method.title}{best_loss(metrics)}")
        if args.json:
            users.append({"user": user, "method": told(method), "metrics": metrics, "version": version})
    return {"users": users}


def best_loss(metrics: dict) -> str:
    """Nothing of an adapter that was not trained here."""
    losses, best = metrics.get("val_loss"), metrics.get("best_epoch")
    known = isinstance(losses, list) and type(best) is int and 0 < best <= len(losses)
    return f", validation loss {losses[best - 1]:.4f}" if known and isinstance(losses[best - 1], float) else ""


def run_store(args: argparse.Namespace, _) -> dict:
    if (args.action == "delete") != (args.user is not None):
        raise InputError(f"store {args.action} takes {'a' if args.action == 'delete' else 'no'} --user")
    return ACTIONS[args.action](Store(args.store), args)


def verify(store: Store, args: argparse.Namespace) -> dict:
    damaged = store.verify()
    for damage in damaged:
        print(damage.what)
    number = len(store.users())
    print(f"{number} users, {len(damaged)} damaged")
    return {"num_users": number, "damaged": [damage._asdict() for damage in damaged]}


def compact(store: Store, args: argparse.Namespace) -> dict:
    done = store.compact()
    print(f"{done.rows_removed} rows of deleted and replaced users removed; {done.shards_before} shards are now "
          f"{done.shards_after}")  # fmt: skip
    if not done.erased:
        print("somebody reads the store: ids and metrics of deleted users stay in the index until you compact it again")
    return done._asdict()


def delete(store: Store, args: argparse.Namespace) -> dict:
    store.delete(args.user)
    print(f"{one_line(args.user)} is forgotten; the numbers stay on disk until `store compact`")
    return {"user": args.user}


ACTIONS: dict[str, Callable[[Store, argparse.Namespace], dict]] = {
    "verify": verify, "compact": compact, "delete": delete,
}  # fmt: skip


def run_methods(args: argparse.Namespace, _) -> dict:
    base = open_base(load(args), MIN_LABELS)
    if isinstance(base, Classifier):
        print(f"an encoder: beside every method each user trains a head, counted here for {MIN_LABELS} labels")
    methods = counted(base)
    print(f"{'method':<10} {'numbers':>12} {'FLOPs/token':>14}  acts at")
    for line in methods:
        if line["why_not"]:
            print(f"{line['name']:<10} {'-':>12} {'-':>14}  {line['why_not']}")
            continue
        rows = f"; {line['virtual_tokens']} more rows for each text" if line["virtual_tokens"] else ""
        rows += f"; {line['flops_per_text']:,} FLOPs once for each text" if line["flops_per_text"] else ""
        places = ", ".join(line["sites"])
        print(f"{line['name']:<10} {line['count']:>12,} {line['flops_per_token']:>14,}  {places}{rows}")
    return {"base": base.origin.name, "methods": methods}


def run_export(args: argparse.Namespace, _) -> dict:
    from minipeft import interop  # other libraries' formats, which no other command needs

    store = Store(args.store)
    if args.user is not None and args.user not in store:
        raise InputError(f"no adapter of user {args.user!r} in {store.folder}")
    if args.model is None and not os.path.isdir(store.base.folder):  # nor is what a store names ever downloaded
        raise InputError(f"{store.folder} belongs to base {shown(store.base.name)}, which is not in "
                         f"{shown(store.base.folder)} any more; name its folder with --model")  # fmt: skip
    model = load_model(args.model or store.base.folder, args.dtype)
    base = open_base(model, len(store.task.labels) if store.task else MIN_LABELS, store.pooling)
    write = {"peft": interop.export_peft, "adapterhub": interop.export_adapterhub}[args.format]

    def export(user: str, folder: Path) -> Method:
        adapter = without_head(store.get(user, base), base)
        write(adapter, base, folder)
        return adapter.method

    left = " without the head, for which these files have no place" if isinstance(base, Classifier) else ""
    if args.user is not None:
        method = export(args.user, args.to)
        print(f"{one_line(args.user)}'s adapter is in {args.to}{left}")
        return {"user": args.user, "to": str(args.to), "format": args.format, "method": told(method)}
    folders = {user: folder_name(user) for user in store.users()}
    for user, name in folders.items():
        export(user, args.to / name)
    lines = (json.dumps({"user": user, "folder": name}) + "\n" for user, name in folders.items())
    write_file(args.to / "users.jsonl", "".join(lines).encode())
    print(f"{len(folders)} users' adapters are in {args.to}{left}")
    return {"num_users": len(folders), "to": str(args.to), "format": args.format}


def run_import(args: argparse.Namespace, _) -> dict:
    from minipeft import interop

    task = load_task(args.task).header if args.task else None
    model = load(args)
    there = Store(args.store) if is_store(args.store) else None
    known = task or (there.task if there else None)
    base = open_base(model, len(known.labels) if known else MIN_LABELS, there.pooling if there else "mean")
    adapter = {"peft": interop.import_peft, "adapterhub": interop.import_adapterhub}[args.format](
        args.folder, base, args.user)  # read first: a folder that is refused leaves no store behind  # fmt: skip
    store = Store.make(args.store, model, task)
    if args.user in store and not args.again:
        raise InputError(f"{args.store} has an adapter of user {args.user!r} already; name another user, or import it "
                         "--again")  # fmt: skip
    store.add(adapter, base)
    silent = "; it has no head, so every label is as likely" if isinstance(base, Classifier) else ""
    print(f"{args.user}'s adapter is in {args.store}{silent}")
    return {"user": args.user, "store": str(args.store), "method": told(adapter.method),
            "adapter_numbers": adapter.method.count(base)}  # fmt: skip


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], dict | None]] = {
    "train": run_train, "eval": run_eval, "predict": run_predict, "users": run_users, "store": run_store,
    "methods": run_methods,
    "export": run_export, "import": run_import,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
