"""Folders that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from raw_files import BadInput


def write_folder(folder: Path, files: Iterable[tuple[str, Iterable[str]]]) -> None:
    """`files`, (relative path, pieces of text) each, become the whole content of `folder`; or nothing changes.

    Written to a temporary sibling one after the other, as `files` gives them, fsynced, renamed. An earlier version is
    moved aside first and removed afterwards: a reader sees the old folder, for a moment none, then the new one, never a
    mixture. If the machine stops in between, the old one is left beside it as `.<name>.<digits>.old`.

    Raises:
        BadInput: `folder` is something these scripts did not write (it has no task.json), or cannot be made.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / "task.json").is_file()):
        raise BadInput(f"{folder}: already there, but not a prepared task (no task.json). Choose another --out.")
    token = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{token}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder ({error.strerror}).") from None
    try:
        for name, pieces in files:
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        for directory in (new, *(path for path in new.rglob("*") if path.is_dir())):
            _fsync_directory(directory)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _fsync_directory(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
