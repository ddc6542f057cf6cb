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
    """Written beside what the task has already; of what the file does not name, anything is right.

    Raises:
        InputError: see `check_settings`.
    """
    check_settings(out, task, settings)
    known = load_settings(out)
    there = known.get(task, {})
    merged = there | {name: value if not isinstance(value, dict) else there.get(name, {}) | value
                      for name, value in _as_written(settings).items()}  # fmt: skip
    if merged != there:
        content = known | {task: merged}
        write_file(out / "settings.json", (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def check_settings(out: Path, task: str, settings: Settings) -> None:
    """Raises InputError if the task's records were made by others; names the first difference."""
    there, settings = load_settings(out).get(task, {}), _as_written(settings)
    differ = [name for name, value in settings.items() if name in there and not _agree(there[name], value)]
    if differ:
        first, more = differ[0], f", and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise InputError(f"{out}: the records of task {task!r} were made by other settings, data or another base: "
                         f"{first} was {there[first]!r} and is {settings[first]!r}{more}; name another folder with "
                         "--out")  # fmt: skip


def _agree(was: Any, now: Any) -> bool:
    """Tables by method need only agree on the methods that both have: a later call may ask for others."""
    if isinstance(was, dict) and isinstance(now, dict) and was and now:
        return all(was[name] == now[name] for name in was.keys() & now.keys())
    return was == now


def _as_written(settings: Settings) -> Settings:
    """As they are read again: JSON has no tuples."""
    return json.loads(json.dumps(settings))


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
