"""python -m minipeft: train many users' adapters in one fused pass, ask them, keep them.

    train     every user of a task gets an adapter of their own, in a store
    eval      how often a store's adapters say what their users said
    predict   what a user would say of a text; many users in one pass
    users     who is in a store
    methods   what can be trained on a model, how many numbers that is, and what it costs
    export    one user's adapter for other libraries
    import    an adapter that another library trained
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from minipeft.console import (
    POOLING,
    RECOMPUTE,
    OneLineParser,
    add_dtype,
    check_device,
    plain_warnings,
    progress,
)
from minipeft.errors import InputError
from minipeft.methods import Method, PromptTuning
from minipeft.models.classifier import POOLINGS, Base, Classifier
from minipeft.models.loading import load_model, load_shape, load_tokenizer
from minipeft.options import add_options, counted, described_methods, method_of, settings_of, sites_of
from minipeft.running import SHARED, Training, evaluate, first_users, open_base, predict, without_head
from minipeft.schedule import PassConfig, TrainConfig
from minipeft.store import Store
from minipeft.tasks.task import load_task

MIN_LABELS = 2  # what `methods` supposes: no task has fewer
FORMATS = ("peft", "adapterhub")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C, 141 if whoever
    read the output went away."""
    args, finished = None, []
    try:
        args = parse(argv)
        with plain_warnings("minipeft"):
            result = COMMANDS[args.command](args, finished)
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
        sys.stdout.flush()
    except InputError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f" {len(finished)} users had finished; their adapters are in {args.store}" if finished else ""
        print(f"\nminipeft: interrupted.{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush again, and fail
        return 141
    return 0


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
    own.add_argument("--recompute", action="store_true", help=RECOMPUTE)
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
    command("methods", "model", about=(
        "What can be trained on a model: each method's numbers per user, the FLOPs that it adds to a token's forward\n"
        "pass, and where it acts."
    ))  # fmt: skip
    own = command("export", "store", "user", "model?", about="Write one user's adapter for other libraries.")
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


def run_train(args: argparse.Namespace, finished: list[str]) -> dict:
    """Appends to `finished` each user whose adapter is on disk."""
    method = method_of(args)
    if args.start_text is not None:
        if not isinstance(method, PromptTuning):
            raise InputError(f"--start-text is an option of --method prompt, not of {method.name}")
        tokens = load_tokenizer(args.model).encode(args.start_text, add_special_tokens=False).ids
        method = replace(method, start_from="text", text=tuple(tokens))
    config = TrainConfig(method=method, **settings_of(args))
    config.check()
    task = load_task(args.task)
    task = task if args.users is None else first_users(task, args.users)
    training = Training.plan(load(args), task, config, args.store, args.shared, args.again,
                             PassConfig(recompute=args.recompute), args.pooling)  # fmt: skip
    method, base = training.method, training.base
    acts = "; ".join(f"{part.name} at {', '.join(sites_of(part, base))}" for part in method.parts)
    print(f"task {task.name}: {len(task.users)} users, {len(task.pooled('train'))} training examples, labels "
          f"{', '.join(task.labels)}\nbase {base.origin.name}: {sum(p.numel() for p in base.parameters()):,} frozen "
          f"numbers; each user trains {method.count(base):,} ({acts})", flush=True)  # fmt: skip
    if training.num_cut:
        print(f"{training.num_cut} texts were too long for the base and were cut at their end")
    skipped = {}

    def keep(adapter) -> None:
        finished.append(adapter.user)
        if adapter.metrics["skipped_steps"]:
            skipped[adapter.user] = adapter.metrics["skipped_steps"]

    training.run(keep, progress)
    if skipped:
        print(f"{len(skipped)} users skipped steps whose gradient was not finite, e.g. {next(iter(skipped))!r}")
    print(f"{len(finished)} users' adapters are in {args.store}")
    return {"store": str(args.store), "base": base.origin.name, "task": task.name, "method": told(method),
            "num_users": len(finished), "adapter_numbers": method.count(base), "num_cut_texts": training.num_cut,
            "skipped_steps": skipped}  # fmt: skip


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
            print(json.dumps(reply.described(), ensure_ascii=False))
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
    about = {user: store.about(user) for user in store.users()}
    print(f"{len(about)} users of base {store.base.name}, task {store.task.name if store.task else 'unknown'}")
    for user, (method, metrics) in about.items():
        losses = metrics.get("val_loss", [])
        best = f", validation loss {losses[metrics['best_epoch'] - 1]:.4f}" if losses else ""
        print(f"{user}: {method.title}{best}")
    return {"users": [{"user": user, "method": told(method), "metrics": metrics}
                      for user, (method, metrics) in about.items()]}  # fmt: skip


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
        places = ", ".join(line["sites"])
        print(f"{line['name']:<10} {line['count']:>12,} {line['flops_per_token']:>14,}  {places}{rows}")
    return {"base": base.origin.name, "methods": methods}


def run_export(args: argparse.Namespace, _) -> dict:
    from minipeft import interop  # other libraries' formats, which no other command needs

    store = Store(args.store)
    if args.user not in store:
        raise InputError(f"no adapter of user {args.user!r} in {store.folder}")
    model = load_model(args.model or store.base.folder, args.dtype)
    base = open_base(model, len(store.task.labels) if store.task else MIN_LABELS, store.pooling)
    whole = store.get(args.user, base)
    adapter = without_head(whole, base)
    {"peft": interop.export_peft, "adapterhub": interop.export_adapterhub}[args.format](adapter, base, args.to)
    left = "" if adapter is whole else " without the head, for which these files have no place"
    print(f"{args.user}'s adapter is in {args.to}{left}")
    return {"user": args.user, "to": str(args.to), "format": args.format, "method": told(adapter.method)}


def run_import(args: argparse.Namespace, _) -> dict:
    from minipeft import interop

    task = load_task(args.task).header if args.task else None
    model = load(args)
    there = Store(args.store) if (Path(args.store) / "store.json").exists() else None
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


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], dict]] = {
    "train": run_train, "eval": run_eval, "predict": run_predict, "users": run_users, "methods": run_methods,
    "export": run_export, "import": run_import,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
