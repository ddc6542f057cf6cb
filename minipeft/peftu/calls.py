"""Which call of the command made which records, on what, and how long it worked.

    OUT/calls.json   {"calls": [{began, command, versions, seconds: {task: s}, records: {task: [name-seed]}}, ...]}

A run that was killed goes on in another call, perhaps of other code: a report is of all of them. A call is written down
with its first record and after each one more; one that only reads what is there leaves nothing. What a call that was
killed did after its last record is not known: its adapters are there, and the next call makes the record of them.
"""

import json
import time
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.peftu.records import Record, read_object

FIELDS = {"began": str, "command": str, "versions": dict, "seconds": dict, "records": dict}
Call = dict[str, Any]


class Calls:
    """A folder's calls, this one last.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, out: Path, command: str, versions: dict[str, Any]):
        self.out, self.earlier = out, load_calls(out)
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.own: Call = {"began": began, "command": command, "versions": versions, "seconds": {}, "records": {}}
        self._began: dict[str, float] = {}

    def begin(self, task: str) -> None:
        """The call works on this task from now on."""
        self._began[task] = time.perf_counter()

    def made(self, record: Record) -> None:
        """This record is written, and what was spent on its task so far."""
        name = f"{record.name}-s{record.seed}" + (" cold start" if record.cold_start else "")
        records = self.own["records"].setdefault(record.task, [])
        self.own["records"][record.task] = [*(each for each in records if each != name), name]
        self.own["seconds"][record.task] = time.perf_counter() - self._began[record.task]
        content = json.dumps({"calls": [*self.earlier, self.own]}, ensure_ascii=False, indent=1)
        write_file(calls_path(self.out), content.encode() + b"\n")

    def of(self, tasks: set[str]) -> list[Call]:
        """Those that made a record of these tasks."""
        return [call for call in (*self.earlier, self.own) if tasks & call["records"].keys()]


def calls_path(out: Path) -> Path:
    return Path(out) / "calls.json"


def load_calls(out: Path) -> list[Call]:
    """[] where there is no file. InputError if it is damaged."""
    path = calls_path(out)
    calls = read_object(path).get("calls") if path.exists() else []
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise InputError(f"{path} is damaged: needed calls with {', '.join(FIELDS)}; delete it and run again")
    return calls


def _is_call(call: Any) -> bool:
    return (isinstance(call, dict) and all(isinstance(call.get(name), kind) for name, kind in FIELDS.items())
            and all(isinstance(call["seconds"].get(task), float) for task in call["records"]))  # fmt: skip
