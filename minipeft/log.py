"""What a long training writes down for whoever watches it: an object a line, and TensorBoard's files if wanted."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from minipeft.errors import InputError


def as_json(value: object) -> str:
    """One line of JSON to the letter: numbers that are not finite, which it has not, are null."""

    def finite(value):
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


class Log:
    """Appends to a file of JSON lines, each with `event` and `time` (seconds since 1970).

    scalar: called with (name, number, time) of every number of an event, see `tensorboard`.

    Raises:
        InputError: there is no writing to it.
    """

    def __init__(self, path: Path, scalar: Callable[[str, float, float], None] | None = None):
        try:
            self._file, self._scalar = open(path, "ab", buffering=0), scalar  # nothing is left for `close` to write
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); move it away") from None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def event(self, name: str, **fields) -> None:
        """Raises OSError if the disk is full."""
        now = time.time()
        line = as_json({"event": name, "time": round(now, 3), **fields}).encode(errors="backslashreplace") + b"\n"
        while line:  # a disk that is all but full takes a part
            line = line[self._file.write(line) :]
        if self._scalar is not None:
            for field, value in fields.items():
                if isinstance(value, (int, float)):
                    self._scalar(f"{name}/{field}", value, now)


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
