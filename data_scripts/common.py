"""What every prepare script shares: arguments, tasks, statistics, and the two layouts in which a task is written.

    python data_scripts/prepare_<dataset>.py --raw DIR --out DIR
        [--layout jsonl|original] [--users N --seed S] [--skip-bad] [--download [--mirror URL]]

A prepare script holds only what is particular to its source: its `Source`, a `read_tasks(raw)` that turns raw files
into `Task`s, and a call of `main`. DIR of `--raw` holds one folder per dataset. `--layout jsonl` writes, under
OUT/<task>/,

    {train,val,test}.jsonl                  the `leaked` split, one example a line:
                                            {"user": str, "id": str, "text": str, "label": [str, ...]}
                                            and "target": str for "label" if the task is generative
    splits/<kind>/{train,val,test}.jsonl    the other kinds of split, see splits.py: no_leak, strict, new_users
    splits/new_users/new_users.json         which users are new there, [user, ...]
    task.json                               labels, instruction, statistics, sha256 of the raw files, versions

and `--layout original` the published code's files, byte for byte, beside the same task.json:

    user_data_leaked.json                   {user: {"train": {text id: {"text": str, "label": [str, ...]}}, "val": ..,
    user_data_no_leak.json                  "test": ..}}, an example with whatever further fields the reader keeps
    users-with-empty-dataset-splits.json    {"leaked": {user: {"train": n, "val": n, "test": n}}, "no_leak": ..}

(of a generative task only `no_leak`, as published). The same raw files and arguments give the same bytes on every run.
Bad input ends with one line on stderr, naming file and line, and exit status 2; it never quotes a raw text. Anything
unexpected keeps its traceback.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import Any

from agreement import krippendorff_alpha
from download import download_source
from folders import tidy_on_sigterm, write_folder
from raw_files import BadInput, RawFiles, Source
from splits import (
    KINDS,
    MIN_EXAMPLES,
    PUBLISHED_KINDS,
    SEED,
    SPLIT_NAMES,
    TRAIN_RATIO,
    Examples,
    Splits,
    drop_small_users,
    empty_splits,
    is_new_user,
    sample_users,
)

TASK_FORMAT = 2                                          # raised when task.json or the jsonl lines change their meaning


@dataclass(frozen=True)
class Task:
    """One task as read from the raw files, before splitting.

    `examples` is {user: {text id: {"text": str, "label": [str, ...]}}}, users and texts in the order of the file: the
    splits depend on it. A generative task has "target": str for "label", no `labels`, and in the original layout the
    names of `published_fields` for these two. `skipped` counts the raw rows that gave no example though nothing is
    wrong with them, by reason; `replaced` the annotations that a later one of the same user and text replaced.
    """

    name: str
    instruction: str
    labels: tuple[str, ...]
    multi_label: bool
    examples: Examples
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    generative: bool = False
    published_fields: tuple[str, str] = ("text", "target")


class Collector:
    """Gathers `examples`, {user: {text id: example}}. Users and texts stay in the order in which they first came.

    A second annotation of a text by the same user replaces the first and keeps its place, as in the published code's
    dicts; `replaced` counts them. (Where that code keeps the first one, ask `(user, text_id) in collect` before.)

    What is equal is stored once, be it an id or a whole example that many users share: so nobody may change an example.
    """

    def __init__(self):
        self.examples: Examples = {}
        self.replaced = 0
        self._once: dict[Hashable, Any] = {}

    def __contains__(self, user_and_text_id: tuple) -> bool:
        user, text_id = user_and_text_id
        return text_id in self.examples.get(user, ())

    def add(self, user: Hashable, text_id: Hashable, text: str, labels: list[str]) -> None:
        """One user's labels of one text."""
        key = (text, *labels)
        example = self._once.get(key) or self._once.setdefault(key, {"text": text, "label": labels})
        self.add_example(user, text_id, example)

    def add_target(self, user: Hashable, text_id: Hashable, text: str, target: str) -> None:
        """What one user wrote in answer to one text."""
        self.add_example(user, text_id, {"text": text, "target": target})

    def add_example(self, user: Hashable, text_id: Hashable, example: dict[str, Any]) -> None:
        """An example with further fields, which are written in the original layout only, in the order given."""
        own = self.examples.setdefault(user, {})
        self.replaced += text_id in own
        own[self._once.setdefault(text_id, text_id)] = example


def main(source: Source, read_tasks: Callable[[RawFiles], Iterable[Task]], argv: list[str] | None = None) -> int:
    """Prepares the tasks of one source as the command line says; returns the exit status."""
    dataset = source.dataset
    args = arguments(f"prepare_{dataset}.py", f"Raw {dataset} files -> tasks with splits.").parse_args(argv)
    tidy_on_sigterm()
    try:
        for line in prepare(source, read_tasks, args):
            print(line)
    except BadInput as error:
        print(f"prepare_{dataset}: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(
    source: Source, read_tasks: Callable[[RawFiles], Iterable[Task]], args: argparse.Namespace
) -> Iterator[str]:
    """Downloads, if asked to, and prepares the tasks of one source; yields a line for each file and task.

    Each task's folder is written when all of it is known.

    Raises:
        BadInput: what was given cannot be used; Absent: a raw file is not there.
    """
    if args.download:
        yield from download_source(source, args.raw, args.mirror)
    raw = RawFiles(args.raw, source, args.skip_bad)
    for task in read_tasks(raw):
        yield _prepare(task, raw, args)


def statistics(task: Task, raw: RawFiles) -> dict[str, Any]:
    """What a task holds, before small users are dropped, as in the paper.

    `krippendorff_alpha_masi` is None where no text was labelled twice. A generative task has no alpha and no
    `label_counts`.
    """
    counts = {user: len(own) for user, own in task.examples.items()}
    num_texts = len({text_id for own in task.examples.values() for text_id in own})
    num_pairs = sum(counts.values())
    dropped = {user: num for user, num in counts.items() if num < MIN_EXAMPLES}
    return {
        "users": len(counts),
        "texts": num_texts,
        "pairs": num_pairs,
        "examples_per_user": num_pairs / len(counts),
        "users_per_text": num_pairs / num_texts,
        **({} if task.generative else _label_statistics(task)),
        "rows_skipped": task.skipped,
        "bad_rows": dict(raw.bad_rows),
        "annotations_replaced": task.replaced,
        "users_kept": len(counts) - len(dropped),
        "users_dropped": {f"fewer than {MIN_EXAMPLES} examples": dropped},
    }


def _label_statistics(task: Task) -> dict[str, Any]:
    label_counts = Counter(label for _, labels in _labellings(task) for label in labels)
    alpha = krippendorff_alpha(_labellings(task))
    return {
        "krippendorff_alpha_masi": alpha if alpha == alpha else None,
        "label_counts": {label: label_counts[label] for label in task.labels},
    }


def _labellings(task: Task) -> Iterator[tuple[Hashable, list[str]]]:
    return ((text_id, example["label"]) for own in task.examples.values() for text_id, example in own.items())


def _prepare(task: Task, raw: RawFiles, args: argparse.Namespace) -> str:
    """Samples, checks and writes one task; returns the line that says what was written."""
    if not task.generative:
        for _, labels in _labellings(task):
            assert set(labels) <= set(task.labels), f"{task.name}: a label that the script does not declare"
            assert task.multi_label or len(labels) == 1, f"{task.name}: not one label each"
    names = Counter(map(str, task.examples))
    if len(names) < len(task.examples):                  # either layout writes ids as strings
        name = names.most_common(1)[0][0]
        raise BadInput(f"{raw.folder}: user {name!r} of {task.name} is there both as a number and as a string. Keep to "
                       "one of them.")
    if args.users is not None:
        if args.users > len(task.examples):
            raise BadInput(f"--users {args.users}: {task.name} has only {len(task.examples)} users.")
        task = replace(task, examples=sample_users(task.examples, args.users, args.seed))
    if not any(len(own) >= MIN_EXAMPLES for own in task.examples.values()):
        raise BadInput(f"{raw.folder}: no user of {task.name} has {MIN_EXAMPLES} examples, so nothing can be trained.")
    facts = statistics(task, raw)
    facts["split_sizes"], facts["users_with_empty_split"] = {}, {}
    description = {
        "name": task.name,
        "labels": sorted(task.labels),
        "multi_label": task.multi_label,
        "generative": task.generative,
        "instruction": task.instruction,
        "subset": raw.subset,
        "layout": args.layout,
        "split": {"train_ratio": TRAIN_RATIO, "seed": SEED, "min_examples": MIN_EXAMPLES},
        "sample": {"users": args.users, "seed": args.seed} if args.users is not None else None,
        "statistics": facts,
        "raw_sha256": raw.sha256,
        "versions": {"task_format": TASK_FORMAT, "python": platform.python_version()},
    }
    folder = args.out / task.name
    write_folder(folder, _files(task, description))
    alpha = facts.get("krippendorff_alpha_masi")
    empty = ", ".join(f"{len(users)} {kind}" for kind, users in facts["users_with_empty_split"].items())
    return (
        f"{task.name}: {facts['users']} users, {facts['texts']} texts, {facts['pairs']} examples, "
        f"alpha {'undefined' if alpha is None else f'{alpha:.3f}'}; rows skipped: {sum(task.skipped.values())}; "
        f"bad rows: {raw.bad_rows.total()}; annotations replaced: {task.replaced}; "
        f"users dropped (fewer than {MIN_EXAMPLES} examples): {facts['users'] - facts['users_kept']}; "
        f"users with an empty split: {empty}; wrote {folder}"
    )


def _files(task: Task, description: dict[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
    """(relative path, pieces of text) of every file of the task, one kind of split after the other.

    What the splits turn out to hold is added to `description`, which is the last file.
    """
    facts = description["statistics"]
    original = description["layout"] == "original"
    kinds = KINDS if not original else PUBLISHED_KINDS if not task.generative else ("no_leak",)
    for kind in kinds:
        splits = drop_small_users(KINDS[kind](task.examples))
        facts["split_sizes"][kind] = {name: sum(len(own[name]) for own in splits.values()) for name in SPLIT_NAMES}
        facts["users_with_empty_split"][kind] = empty_splits(splits)
        if original:
            yield f"user_data_{kind}.json", _original_pieces(splits, task)
            continue
        folder = "" if kind == "leaked" else f"splits/{kind}/"
        for name in SPLIT_NAMES:
            yield f"{folder}{name}.jsonl", _jsonl_lines(splits, name)
        if kind == "new_users":
            new = [str(user) for user in splits if is_new_user(user)]
            yield f"{folder}new_users.json", [json.dumps(new, indent=0) + "\n"]
            facts["new_users"] = len(new)
            for user in filter(is_new_user, splits):                 # they have no `val` by design
                del facts["users_with_empty_split"][kind][user]
    if original:
        yield "users-with-empty-dataset-splits.json", [json.dumps(facts["users_with_empty_split"], indent=2)]
    yield "task.json", [json.dumps(description, indent=2) + "\n"]


def _jsonl_lines(splits: Splits, name: str) -> Iterator[str]:
    """One line per example, users and examples in the order of the split. Pure ASCII: no reader can split a line.

    Written piece by piece, for `json.dumps` of each line would take most of the time that preparing a task takes.
    """
    for user, own in splits.items():
        start = f'{{"user": {quote(str(user))}, "id": '
        for text_id, example in own[name].items():
            if "label" in example:
                answer = f'"label": [{", ".join(map(quote, example["label"]))}]'
            else:
                answer = f'"target": {quote(example["target"])}'
            yield f'{start}{quote(str(text_id))}, "text": {quote(example["text"])}, {answer}}}\n'


def _original_pieces(splits: Splits, task: Task) -> Iterator[str]:
    """`json.dumps(splits)`, user by user: all of it at once would be the largest thing in memory."""
    separator = "{"
    for user, own in splits.items():
        if task.generative:
            text, target = task.published_fields
            own = {name: {text_id: {text: example["text"], target: [example["target"]]}
                          for text_id, example in part.items()} for name, part in own.items()}
        yield separator + json.dumps({user: own})[1:-1]
        separator = ", "
    yield "}"


def arguments(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that every prepare script has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--raw", type=Path, required=True, metavar="DIR", help="the folder that holds one per dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="tasks are written to DIR/<task>")
    parser.add_argument("--layout", choices=("jsonl", "original"), default="jsonl",
                        help="jsonl (default), or the files of the published PEFT-U code")
    parser.add_argument("--users", type=_positive_number, metavar="N",
                        help="only N users, drawn before splitting (default: all)")
    parser.add_argument("--seed", type=int, default=42, metavar="S",
                        help="of that draw (default: 42); the splits' own seed is fixed")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out and count rows that cannot be used (default: stop at the first)")
    parser.add_argument("--download", action="store_true",
                        help="first fetch the raw files that are not there, from their official addresses")
    parser.add_argument("--mirror", metavar="URL", help="fetch them from URL/<dataset>/<file> instead")
    return parser


def _positive_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number above 0, got {text!r}")
    return int(text)
