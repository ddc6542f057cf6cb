"""Every source whose raw files are there -> tasks with splits; of the others, where to get them.

    python data_scripts/prepare_all.py --raw DIR --out DIR [options of a prepare script] [--only DATASET ...] [--json]

A source is a `prepare_<dataset>.py` in this folder: its SOURCE (or SOURCES) and its `read_tasks`. `--list` prints them
all as a Markdown table, the one in README.md, and does nothing else.
"""

import sys
from importlib import import_module
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from raw_files import RawFile, Source
from several import Job, main


def jobs() -> list[Job]:
    """Every source beside this script, with its reader, in the order of the file names."""
    found = []
    for path in sorted(Path(__file__).parent.glob("prepare_*.py")):
        if path.stem != Path(__file__).stem:
            module = import_module(path.stem)
            sources = module.SOURCES if hasattr(module, "SOURCES") else (module.SOURCE,)
            found += [(source, module.read_tasks) for source in sources]
    return found


def markdown_list(sources: list[Source]) -> str:
    """A table of datasets and their tasks, raw files and where they come from, licence, and what was verified.

    Neighbours of one homepage, licence and note share a row.
    """
    rows = ["| dataset | tasks | raw files | licence | verified |", "|---|---|---|---|---|"]
    shared = attrgetter("homepage", "licence", "note")
    for (homepage, licence, note), group in groupby(sources, shared):
        group = list(group)
        datasets = ", ".join(f"[{source.dataset}]({homepage})" for source in group)
        tasks = ", ".join(task for source in group for task in source.tasks)
        files = "<br>".join(f"{source.dataset}/{_file(file)}" for source in group for file in source.files)
        rows.append(f"| {datasets} | {tasks} | {files} | {licence} | {note} |")
    return "\n".join(rows)


def _file(file: RawFile) -> str:
    """Its name, linked where it can be downloaded, then what is known of it."""
    facts = [f"[`{file.name}`]({file.url})" if file.url else f"`{file.name}`"]
    facts += [f"{file.size:,} bytes"] if file.size else []
    facts += [f"sha256 `{file.sha256[:16]}`"] if file.sha256 else []
    facts += [f"git blob `{file.git_blob[:16]}`"] if file.git_blob else []
    return ", ".join(facts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print(markdown_list([source for source, _ in jobs()]))
    else:
        raise SystemExit(main("prepare_all.py", jobs()))
