"""Files that are there whole or not at all, and names for them that any user's id can have."""

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipeft.errors import InputError
from minipeft.models.checkpoint import sync

MAX_NAME = 200  # bytes of a file's name; file systems stop at 255


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def read_file(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """A safetensors file's metadata and tensors. Raises InputError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
