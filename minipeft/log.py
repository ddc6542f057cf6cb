"""What a long training writes down for whoever watches it: an object a line, and TensorBoard's files if wanted."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from minipeft.errors import InputError


class Log:
    """Appends to a file of JSON lines, each with `event` and `time` (seconds since 1970).

    scalar: called with (name, number, time) of every number of an event, see `tensorboard`.
    """

    def __init__(self, path: Path, scalar: Callable[[str, float, float], None] | None = None):
        self._file, self._scalar = open(path, "a", encoding="utf-8"), scalar

    def event(self, name: str, **fields) -> None:
        now = time.time()
        line = {"event": name, "time": round(now, 3), **fields}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._scalar is not None:
            for field, value in fields.items():
                if isinstance(value, (int, float)):
                    self._scalar(f"{name}/{field}", value, now)

    def close(self) -> None:
        self._file.close()


def tensorboard(folder: Path) -> Callable[[str, float, float], None]:
    """A `scalar` that writes for TensorBoard. Raises InputError if its writer is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs TensorBoard's writer: pip install 'minipeft[tensorboard]'") from None
    writer, began = SummaryWriter(str(folder)), time.time()

    def scalar(name: str, number: float, now: float) -> None:
        writer.add_scalar(name, number, round(now - began), walltime=now)
        writer.flush()  # it would keep them for two minutes, and a killed training with them

    return scalar
