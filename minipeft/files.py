"""Files that are there whole or not at all, and names for them that any user's id can have."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.checkpoint import sync

MAX_NAME = 200  # bytes of a file's name; file systems stop at 255
BLOCK = 1 << 16  # bytes read at a time


def folder_name(user: str) -> str:
    """A file name for a user's id, one to one: everything but letters, digits, _ . - ~ is percent-encoded.

    `urllib.parse.unquote` undoes it up to MAX_NAME bytes. A longer one ends in "%~" and a digest instead of its rest;
    no short one has "%~". No name is empty, "." or "..", or begins with "users.", as the list beside the folders does.
    """
    name = quote(user, safe="")
    if not name.strip(".") or name.startswith("users."):
        name = name.replace(".", "%2E") or "%"
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 34]}%~{hashlib.sha256(user.encode()).hexdigest()[:32]}"
    return name


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; replaces an earlier one. Makes its folder."""
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """`write_file` of what is made piece by piece and never there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def cut_torn(path: Path) -> None:
    """Cut a file of lines after its last newline: what follows is of a writer who was killed, or had no room."""
    size = whole = path.stat().st_size if path.is_file() else 0
    if not size:
        return
    with open(path, "r+b") as file:
        while whole:  # a block at a time, from the end
            start = max(0, whole - BLOCK)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            whole = start + newline + 1
            if newline >= 0:
                break
        if whole < size:
            file.truncate(whole)
            os.fsync(file.fileno())


def read_file(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """A safetensors file's metadata and tensors. Raises InputError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
