"""Preparing several sources in one run: what is found is prepared, what is absent is named with where to get it.

One source's failure does not keep the others from being prepared.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from common import Task, arguments, prepare
from folders import tidy_on_sigterm
from raw_files import Absent, BadInput, RawFile, RawFiles, Source
from task_statistics import markdown_table, read_statistics

Job = tuple[Source, Callable[[RawFiles], Iterable[Task]]]


def main(prog: str, jobs: Iterable[Job], argv: list[str] | None = None) -> int:
    """Prepares the sources that are there as the command line says; returns the exit status.

    What happened to each source comes on stderr as it happens; a table of all prepared tasks follows on stdout, or with
    `--json` one JSON object: {"prepared": [a task's statistics, ...], "absent": {dataset: reason and Source, ...},
    "failed": {dataset: reason, ...}}. The status is 2 if a source failed, or if nothing was there to prepare.
    """
    jobs = list(jobs)
    parser = arguments(prog, "Raw files of several sources -> tasks with splits.")
    parser.add_argument("--only", nargs="+", metavar="DATASET", choices=[source.dataset for source, _ in jobs],
                        help="these alone (default: all that are there)")
    parser.add_argument("--json", action="store_true", help="the closing table as JSON")
    args = parser.parse_args(argv)
    jobs = [(source, read_tasks) for source, read_tasks in jobs if source.dataset in (args.only or source.dataset)]
    if not args.raw.is_dir() and not args.download:
        print(f"{prog}: {args.raw}: no such folder. --raw must hold one folder per dataset.", file=sys.stderr)
        return 2
    tidy_on_sigterm()
    report = _prepare_all(jobs, args)
    if args.json:
        print(json.dumps(report, indent=2))
    elif report["prepared"]:
        print(markdown_table(report["prepared"]))
    return 0 if report["prepared"] and not report["failed"] else 2


def _prepare_all(jobs: list[Job], args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"prepared": [], "absent": {}, "failed": {}}
    for source, read_tasks in jobs:
        dataset = source.dataset
        try:
            for line in prepare(source, read_tasks, args):
                print(line, file=sys.stderr)
            report["prepared"] += [read_statistics(args.out / task) for task in source.tasks]
        except Absent as error:
            report["absent"][dataset] = {"reason": str(error), **asdict(source)}
            print("\n    ".join([f"{dataset}: absent. {error}", *map(_where, source.files)]), file=sys.stderr)
        except BadInput as error:
            report["failed"][dataset] = str(error)
            print(f"{dataset}: failed. {error}", file=sys.stderr)
        except Exception as error:                       # a bug of ours: seen in full, but the others go on
            report["failed"][dataset] = repr(error)
            traceback.print_exc()
    return report


def _where(file: RawFile) -> str:
    """All that is known of a file, in one line."""
    facts = (f"{file.size:,} bytes" if file.size else "", f"sha256 {file.sha256}" if file.sha256 else "",
             f"git blob {file.git_blob}" if file.git_blob else "", file.url or "")
    return ", ".join([file.name, *filter(None, facts)])
