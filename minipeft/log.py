"""What a long training writes down for whoever watches it: an object a line, and TensorBoard's files if wanted."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from minipeft.errors import InputError
from minipeft.files import cut_torn


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
    """Appends to a file of JSON lines, each with `event` and `time` (seconds since 1970). A torn last line is cut.

    scalar: called with (name, number, time) of every number of an event, see `tensorboard`.

    Raises:
        InputError: there is no writing to it.
    """

    def __init__(self, path: Path, scalar: Callable[[str, float, float], None] | None = None):
        self._path, self._scalar = path, scalar
        try:
            cut_torn(path)
            self._file = open(path, "ab", buffering=0)  # nothing is left for `close` to write
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
        try:
            while line:  # a disk that is all but full takes a part
                line = line[self._file.write(line) :]
        except OSError:
            cut_torn(self._path)
            raise
        if self._scalar is not None:
            for field, value in fields.items():
                if isinstance(value, (int, float)):
                    self._scalar(f"{name}/{field}", value, now)


def tensorboard(folder: Path) -> Callable[[str, float, float], None]:
    """A `scalar` that writes for TensorBoard. Raises InputError without its writer, or where there is no writing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs TensorBoard's writer: pip install 'minipeft[tensorboard]'") from None
    try:
        writer, began = SummaryWriter(str(folder)), time.time()
    except OSError as error:
        raise InputError(f"--tensorboard {folder} cannot be written ({error.strerror}); name a folder") from None

    def scalar(name: str, number: float, now: float) -> None:
        writer.add_scalar(name, number, round(now - began), walltime=now)
        writer.flush()  # it would keep them for two minutes, and a killed training with them

    return scalar
