"""Folders that appear whole or not at all."""

import fcntl
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from raw_files import BadInput


def write_folder(folder: Path, files: Iterable[tuple[str, Iterable[str]]]) -> None:
    """`files`, (relative path, pieces of text) each, become the whole content of `folder`; or nothing changes.

    Written to a temporary sibling one after the other, as `files` gives them, fsynced, renamed. An earlier version is
    moved aside first and removed afterwards: a reader sees the old folder, for a moment none, then the new one, never a
    mixture. If the machine stops in between, `.<name>.<digits>.new` and `.old` are left beside it. The next run that
    writes this folder removes what nobody writes any more: a writer holds a lock on its `.new`.

    Raises:
        BadInput: `folder` is something these scripts did not write (it has no task.json), or cannot be made or written.
    """
    if folder.is_symlink() or (folder.exists() and not (folder / "task.json").is_file()):
        raise BadInput(f"{folder}: already there, but not a prepared task (no task.json). Choose another --out.")
    token = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{token}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot make this folder ({error.strerror}).") from None
    lock = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
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
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}). Nothing of it is kept.") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)
    shutil.rmtree(old, ignore_errors=True)
    _remove_leftovers(folder)


def tidy_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit, so that a folder half written is removed on the way out."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _remove_leftovers(folder: Path) -> None:
    """Removes what runs that were killed left beside `folder`, which is whole."""
    for leftover in folder.parent.glob(f".{folder.name}.????????.*"):
        if leftover.suffix in (".new", ".old") and not _is_locked(leftover.with_suffix(".new")):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_locked(directory: Path) -> bool:
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
