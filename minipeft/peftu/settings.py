"""What the records of a run were made by, kept beside them so that nothing else is mixed in.

    OUT/settings.json   task -> {option or kind of data: what it was}

How many seeds and which methods are asked for may change from call to call: a smaller request reads what it asked for.
"""

import json
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.peftu.records import read_object

Settings = dict[str, Any]  # of one task
TOLD = ("--mode", "--epochs", "--equal", "--top-layers", "the base (--model)")  # of a run whose rates are carried over


def keep_settings(out: Path, task: str, settings: Settings) -> None:
    """Written where the task has none yet; of what the file does not name, anything is right.

    Raises:
        InputError: the task's records were made by others; names the first difference.
    """
    settings = json.loads(json.dumps(settings))
    known = load_settings(out)
    there = known.get(task, {})
    differ = [name for name, value in settings.items() if there.get(name, value) != value]
    if differ:
        first, more = differ[0], f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise InputError(f"{out}: the records of task {task!r} were made by other settings, data or another base: "
                         f"{first} was {there[first]!r} and is {settings[first]!r}{more}; name another folder with "
                         "--out")  # fmt: skip
    if there.keys() < settings.keys():
        content = known | {task: settings}
        write_file(out / "settings.json", (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def load_settings(out: Path) -> dict[str, Settings]:
    """Task -> settings; {} where there is no file. InputError if it is damaged."""
    path = Path(out) / "settings.json"
    if not path.exists():
        return {}
    known = read_object(path)
    if odd := [task for task, settings in known.items() if not isinstance(settings, dict)]:
        raise InputError(f"{path} is damaged: {odd[0]!r} is no object; delete it and run again")
    return known


def told(settings: Settings) -> str:
    """In words, for a note."""
    return ", ".join(f"{name} {settings[name]}" for name in TOLD if settings.get(name)) or "settings not known"
