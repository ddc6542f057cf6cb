"""Shards: files of many users' rows, written once, never changed, read through a memory map.

    FOLDER/00000007.safetensors      one tensor, "rows" [n, width]: n users' rows of one configuration

Any library that reads safetensors reads a shard. Here its header is never parsed: it is a function of n, width and how
numbers lie, all of which the index knows, so a file is right if it begins with those bytes and has that size. Nothing
that a file says of itself is believed, and nothing is allocated for it.

How numbers lie (`KINDS`), chosen once for a store:

    float32     as they were trained
    bfloat16    rounded to nearest, ties to even: relative error up to 2^-8
    int8        x ~ scale * q with one fp32 scale per tensor, max|x| / 127: error up to scale / 2. A row is its scales'
                bytes, then q
"""

import errno
import json
import mmap
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # too many open files, no room to map one
MAX_BYTES = 64 << 20  # of a shard's rows, unless one row alone is larger
KINDS = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "int8": ("U8", 1)}  # name in safetensors, bytes of an element


# ---- A row ---------------------------------------------------------------------------------------------------------


def width_of(kind: str, num_numbers: int, num_tensors: int) -> int:
    """Elements of a stored row of so many numbers in so many tensors."""
    return num_numbers + (4 * num_tensors if kind == "int8" else 0)


def encoded(row: Tensor, kind: str, spans: Sequence[int]) -> np.ndarray:
    """A row's numbers [sum(spans)] fp32, on the CPU, as they lie in a shard.

    Raises:
        InputError: int8, and a number is NaN or infinite: no scale fits it.
    """
    if kind == "float32":
        return row.numpy()
    if kind == "bfloat16":
        return row.bfloat16().view(torch.int16).numpy()
    scales = torch.stack([part.abs().max() for part in row.split(list(spans))]) / 127
    if not scales.isfinite().all():
        raise InputError("a row with NaN or infinite numbers has no int8 form; keep it in a store of float32 rows")
    q = (row / _each(scales.where(scales > 0, 1.0), spans)).round()
    q = q.clamp(-127, 127).to(torch.int8)  # the scale of the smallest numbers there are is itself rounded
    return torch.cat([scales.view(torch.int8), q]).numpy()


def decoded(data: np.ndarray, kind: str, spans: Sequence[int]) -> Tensor:
    """Undoes `encoded`, as far as it can be. data: the row's bytes, uint8; the result may share its memory."""
    if kind == "float32":
        return torch.from_numpy(data.view(np.float32))
    if kind == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float()
    scales, q = torch.from_numpy(data[: 4 * len(spans)].view(np.float32)), torch.from_numpy(data.view(np.int8))
    return _each(scales, spans) * q[4 * len(spans) :]


def _each(scales: Tensor, spans: Sequence[int]) -> Tensor:
    """Every tensor's scale for each of its numbers."""
    return scales.repeat_interleave(torch.tensor(spans))


# ---- A file --------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _header(n: int, width: int, kind: str) -> bytes:
    """The bytes before the rows; a multiple of 64, so that rows lie as aligned as they are long."""
    dtype, itemsize = KINDS[kind]
    text = json.dumps({"rows": {"dtype": dtype, "shape": [n, width], "data_offsets": [0, n * width * itemsize]}})
    text += " " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text.encode()


def write_shard(path: Path, n: int, width: int, kind: str, rows: Iterable[bytes | np.ndarray]) -> None:
    """Write n rows under a temporary name, wait until they are on disk, and rename. The caller syncs the folder."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(_header(n, width, kind))
        file.writelines(rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


class Exhausted(InputError):
    """The system lets this process open or map no more files; nothing is known to be damaged."""


class Shard:
    """A shard's rows, mapped into memory. A file that was removed meanwhile can still be read.

    It takes one of the process's open files: Python's `mmap` keeps a descriptor of its own.

    Raises:
        FileNotFoundError: no such file.
        Exhausted: it cannot be opened or mapped now.
        InputError: it is no shard of n rows of this width.
    """

    def __init__(self, path: Path, n: int, width: int, kind: str):
        header = _header(n, width, kind)
        self.n, self.row_bytes, self._start = n, width * KINDS[kind][1], len(header)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no link, no wait for a pipe
            try:
                status, needed = os.fstat(descriptor), self._start + n * self.row_bytes
                if not stat.S_ISREG(status.st_mode) or status.st_size != needed:
                    raise InputError(f"{path} is damaged: {status.st_size} bytes, needed {needed}")
                self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in SCARCE:
                raise Exhausted(f"{path} cannot be opened ({error.strerror}); close other stores or files, or raise "
                                "the limit (ulimit -n for open files, -v for memory)") from None  # fmt: skip
            raise InputError(f"{path} is damaged: {error.strerror}") from None
        if self._map[: self._start] != header:
            raise InputError(f"{path} is damaged: its header is not that of {n} rows of {width} numbers")

    def row(self, i: int) -> np.ndarray:
        """Row i, 0 <= i < n: its bytes, uint8, in the file itself. Nothing is read yet."""
        assert 0 <= i < self.n
        return np.frombuffer(self._map, np.uint8, self.row_bytes, self._start + i * self.row_bytes)

    def forget(self) -> None:
        """What was read no longer counts as this process's memory: it stays in the system's cache of the file."""
        self._map.madvise(mmap.MADV_DONTNEED)


def remove_others(folder: Path, numbers: set[int]) -> None:
    """Remove shards that are in no index, and temporary files: what a writer left that was killed."""
    check_folder(folder)
    mine = {shard_path(folder, number).name for number in numbers}
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".tmp") and path.stem.isdecimal() and path.name not in mine:
            path.unlink()


def check_folder(folder: Path) -> None:
    """Raises InputError if it is a link or a file: what lies elsewhere is not ours to clean up."""
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is not a folder of its own; remove what is there")
