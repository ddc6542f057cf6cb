"""What every prepare script shares: arguments, raw files, statistics, task folders that appear whole or not at all.

    python data_scripts/prepare_<dataset>.py --raw DIR --out DIR [--layout jsonl|original] [--users N --seed S]

A prepare script holds only what is particular to its source: a `read_tasks(raw)` that turns raw files into `Task`s, and
a call of `main`. DIR of `--raw` holds one folder per dataset. `--layout jsonl` writes, under OUT/<task>/,

    {train,val,test}.jsonl                  the `leaked` split, one example a line:
                                            {"user": str, "id": str, "text": str, "label": [str, ...]}
    splits/no_leak/{train,val,test}.jsonl   the `no_leak` split
    task.json                               labels, instruction, statistics, sha256 of the raw files, versions

and `--layout original` the published code's files, byte for byte, beside the same task.json:

    user_data_leaked.json                   {user: {"train": {text id: {"text": str, "label": [str, ...]}}, "val": ..,
    user_data_no_leak.json                  "test": ..}}, an example with whatever further fields the reader keeps
    users-with-empty-dataset-splits.json    {"leaked": {user: {"train": n, "val": n, "test": n}}, "no_leak": ..}

The same raw files and arguments give the same bytes on every run. Bad input ends with one line on stderr, naming file
and line, and exit status 2; it never quotes a raw text. Anything unexpected keeps its traceback.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import platform
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agreement import krippendorff_alpha
from splits import (
    MIN_EXAMPLES,
    SEED,
    SPLIT_NAMES,
    TRAIN_RATIO,
    Examples,
    Splits,
    drop_small_users,
    empty_splits,
    sample_users,
    split_leaked,
    split_no_leak,
)

TASK_FORMAT = 1                                          # raised when task.json or the jsonl lines change their meaning


class BadInput(ValueError):
    """What was given cannot be used. The message is one line for the person who gave it."""


@dataclass(frozen=True)
class Task:
    """One task as read from the raw files, before splitting.

    `examples` is {user: {text id: {"text": str, "label": [str, ...]}}}, users and texts in the order of the file: the
    splits depend on it. `skipped` counts the raw rows that gave no example, by reason.
    """

    name: str
    instruction: str
    labels: tuple[str, ...]
    multi_label: bool
    examples: Examples
    skipped: dict[str, int] = field(default_factory=dict)


class RawFiles:
    """The raw files of one dataset, read whole; `sha256` remembers what was read, {"dataset/file": hex digest}."""

    def __init__(self, raw: Path, dataset: str):
        self.folder = raw / dataset
        self.sha256: dict[str, str] = {}
        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: no such folder. --raw must be the folder that holds '{dataset}'.")

    def read_text(self, name: str) -> str:
        """The file as text: UTF-8, with or without a byte order mark."""
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}.") from None
        self.sha256[f"{self.folder.name}/{name}"] = hashlib.sha256(content).hexdigest()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[:error.start].count(b"\n") + 1
            raise BadInput(f"{path}, line {line}: not UTF-8.") from None

    def read_csv(self, name: str, columns: Iterable[str], delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
        """(where, {column: value}) of every row; `where` names file and line, for messages.

        Line ends inside a quoted text become "\\n", as in the published reader, which opens files in text mode.

        Raises:
            BadInput: one of `columns` is missing, a column comes twice, a row is broken, or there is no row.
        """
        path = self.folder / name
        rows = _csv_rows(path, self.read_text(name), delimiter)
        where, header = next(rows, (path, []))
        missing = [column for column in columns if column not in header]
        if missing:
            raise BadInput(f"{where}: missing column {', '.join(map(repr, missing))}.")
        if len(set(header)) < len(header):
            raise BadInput(f"{where}: two columns have the same name.")
        num_rows = 0
        for where, row in rows:
            if len(row) != len(header):
                raise BadInput(f"{where}: a row of {len(row)} fields, but the header has {len(header)}.")
            num_rows += 1
            yield where, dict(zip(header, row))
        if not num_rows:
            raise BadInput(f"{path}: no rows below the header.")


def main(dataset: str, read_tasks: Callable[[RawFiles], Iterable[Task]], argv: list[str] | None = None) -> int:
    """Prepares the tasks of one dataset as the command line says; returns the exit status.

    Each task's folder is written when all of it is known; one line per task, on stdout, says what it holds.
    """
    args = _parse(dataset, argv)
    try:
        raw = RawFiles(args.raw, dataset)
        for task in read_tasks(raw):
            print(_prepare(task, raw, args))
    except BadInput as error:
        print(f"prepare_{dataset}: {error}", file=sys.stderr)
        return 2
    return 0


def statistics(task: Task, leaked: Splits, no_leak: Splits) -> dict[str, Any]:
    """What a task holds. Counts are of all users, as in the paper; the splits are given after dropping small users.

    `krippendorff_alpha_masi` is None where no text was labelled twice.
    """
    counts = {user: len(own) for user, own in task.examples.items()}
    pairs = [(text_id, example["label"]) for own in task.examples.values() for text_id, example in own.items()]
    num_texts = len({text_id for text_id, _ in pairs})
    alpha = krippendorff_alpha(pairs)
    label_counts = Counter(label for _, labels in pairs for label in labels)
    kinds = {"leaked": leaked, "no_leak": no_leak}
    return {
        "users": len(counts),
        "texts": num_texts,
        "pairs": len(pairs),
        "examples_per_user": len(pairs) / len(counts),
        "users_per_text": len(pairs) / num_texts,
        "krippendorff_alpha_masi": alpha if alpha == alpha else None,
        "label_counts": {label: label_counts[label] for label in task.labels},
        "rows_skipped": task.skipped,
        "users_kept": len(leaked),
        "users_dropped": {
            f"fewer than {MIN_EXAMPLES} examples": {user: num for user, num in counts.items() if user not in leaked},
        },
        "split_sizes": {
            kind: {name: sum(len(own[name]) for own in splits.values()) for name in SPLIT_NAMES}
            for kind, splits in kinds.items()
        },
        "users_with_empty_split": {kind: empty_splits(splits) for kind, splits in kinds.items()},
    }


def write_folder(folder: Path, files: dict[str, Iterable[str]]) -> None:
    """`files`, {relative path: pieces of text}, become the whole content of `folder`; or nothing changes.

    Written to a temporary sibling, fsynced, renamed. An earlier version is moved aside first and removed afterwards: a
    reader sees the old folder, for a moment none, then the new one, never a mixture. If the machine stops in between,
    the old one is left beside it as `.<name>.<digits>.old`.

    Raises:
        BadInput: `folder` is something these scripts did not write (it has no task.json), or cannot be made.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / "task.json").is_file()):
        raise BadInput(f"{folder}: already there, but not a prepared task (no task.json). Choose another --out.")
    token = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{token}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder ({error.strerror}).") from None
    try:
        for name, pieces in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        for directory in (new, *(path for path in new.rglob("*") if path.is_dir())):
            _fsync_directory(directory)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _fsync_directory(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of every row. A quoted text may span lines: a row is named by its first."""
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadInput(f"{where}: not readable as CSV ({error}).") from None
        yield where, row


def _prepare(task: Task, raw: RawFiles, args: argparse.Namespace) -> str:
    """Samples, splits, checks and writes one task; returns the line that says what was written."""
    label_lists = [example["label"] for own in task.examples.values() for example in own.values()]
    assert set().union(*label_lists) <= set(task.labels), f"{task.name}: a label that the script does not declare"
    assert task.multi_label or all(len(labels) == 1 for labels in label_lists), f"{task.name}: not one label each"
    if args.users is not None:
        if args.users > len(task.examples):
            raise BadInput(f"--users {args.users}: {task.name} has only {len(task.examples)} users.")
        task = replace(task, examples=sample_users(task.examples, args.users, args.seed))
    leaked, no_leak = (drop_small_users(split(task.examples)) for split in (split_leaked, split_no_leak))
    if not leaked:
        raise BadInput(f"{raw.folder}: no user of {task.name} has {MIN_EXAMPLES} examples, so nothing can be trained.")
    facts = statistics(task, leaked, no_leak)
    files = _jsonl_files(leaked, no_leak) if args.layout == "jsonl" else _original_files(leaked, no_leak)
    description = {
        "name": task.name,
        "labels": sorted(task.labels),
        "multi_label": task.multi_label,
        "instruction": task.instruction,
        "layout": args.layout,
        "split": {"train_ratio": TRAIN_RATIO, "seed": SEED, "min_examples": MIN_EXAMPLES},
        "sample": {"users": args.users, "seed": args.seed} if args.users is not None else None,
        "statistics": facts,
        "raw_sha256": raw.sha256,
        "versions": {"task_format": TASK_FORMAT, "python": platform.python_version()},
    }
    folder = args.out / task.name
    write_folder(folder, files | {"task.json": [json.dumps(description, indent=2) + "\n"]})
    alpha = facts["krippendorff_alpha_masi"]
    empty = ", ".join(f"{len(users)} {kind}" for kind, users in facts["users_with_empty_split"].items())
    return (
        f"{task.name}: {facts['users']} users, {facts['texts']} texts, {facts['pairs']} examples, "
        f"alpha {'undefined' if alpha is None else f'{alpha:.3f}'}; rows skipped: {sum(task.skipped.values())}; "
        f"users dropped (fewer than {MIN_EXAMPLES} examples): {facts['users'] - facts['users_kept']}; "
        f"users with an empty split: {empty}; wrote {folder}"
    )


def _jsonl_files(leaked: Splits, no_leak: Splits) -> dict[str, Iterable[str]]:
    return {
        f"{folder}{name}.jsonl": _jsonl_lines(splits, name)
        for folder, splits in (("", leaked), ("splits/no_leak/", no_leak)) for name in SPLIT_NAMES
    }


def _jsonl_lines(splits: Splits, name: str) -> Iterator[str]:
    """One line per example, users and examples in the order of the split. Pure ASCII: no reader can split a line."""
    for user, own in splits.items():
        for text_id, example in own[name].items():
            line = {"user": str(user), "id": str(text_id), "text": example["text"], "label": example["label"]}
            yield json.dumps(line) + "\n"


def _original_files(leaked: Splits, no_leak: Splits) -> dict[str, Iterable[str]]:
    empty = {"leaked": empty_splits(leaked), "no_leak": empty_splits(no_leak)}
    return {
        "user_data_leaked.json": [json.dumps(leaked)],
        "user_data_no_leak.json": [json.dumps(no_leak)],
        "users-with-empty-dataset-splits.json": [json.dumps(empty, indent=2)],
    }


def _parse(dataset: str, argv: list[str] | None) -> argparse.Namespace:
    description = f"Raw {dataset} files -> tasks with splits."
    parser = argparse.ArgumentParser(prog=f"prepare_{dataset}.py", description=description)
    parser.add_argument("--raw", type=Path, required=True, metavar="DIR", help=f"the folder that holds '{dataset}'")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="tasks are written to DIR/<task>")
    parser.add_argument("--layout", choices=("jsonl", "original"), default="jsonl",
                        help="jsonl (default), or the files of the published PEFT-U code")
    parser.add_argument("--users", type=int, metavar="N", help="only N users, drawn before splitting (default: all)")
    parser.add_argument("--seed", type=int, default=42, metavar="S",
                        help="of that draw (default: 42); the splits' own seed is fixed")
    args = parser.parse_args(argv)
    if args.users is not None and args.users < 1:
        parser.error("--users must be at least 1")
    return args


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
