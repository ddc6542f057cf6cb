"""Adapters on disk: one file per finished user, each whole or absent.

    FOLDER/<user id, percent-encoded>.safetensors      the method's tensors, e.g. LoRA.tensors, and, as metadata,
                                                       user, method and metrics

A file is written under a temporary name, fsynced and renamed, so whoever reads sees all of it or none.
"""

import json
import os
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minipeft.engine import Adapter
from minipeft.errors import InputError
from minipeft.methods.method import method_from
from minipeft.models.hooks import Sites

MAX_NAME = 200  # bytes of a file name before its ending; file systems stop at 255


def adapter_path(folder: Path, user: str) -> Path:
    """Where a user's adapter lies. Any text is a safe user id: everything but letters, digits, _ . - ~ is escaped.

    Raises:
        InputError: the escaped id is too long for a file name.
    """
    name = quote(user, safe="", errors="surrogatepass")
    if name in ("", ".", ".."):
        name = "".join(f"%{byte:02X}" for byte in user.encode()) or "%"
    if len(name) > MAX_NAME:
        raise InputError(f"user id of {len(user)} characters is too long for a file name; use ids of up to 60")
    return Path(folder) / f"{name}.safetensors"


def save_adapter(folder: Path, adapter: Adapter, base: Sites) -> Path:
    """Write one adapter of this base; replaces an earlier one of the same user."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter.method.tensors(adapter.row, base)
    metadata = {"user": adapter.user, "method": json.dumps(adapter.method.described()),
                "metrics": json.dumps(adapter.metrics)}
    path = adapter_path(folder, adapter.user)
    write_file(path, save(tensors, metadata))
    return path


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; replaces an earlier one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def load_adapter(folder: Path, user: str, base: Sites) -> Adapter:
    """Read one adapter back, bit for bit.

    Raises:
        InputError: no adapter of this user here, a damaged file, one that minipeft did not write, or one made for
            another base (names the site).
    """
    path = adapter_path(folder, user)
    if not path.exists():
        raise InputError(f"no adapter of user {user!r} in {folder}")
    metadata, tensors = read_file(path)
    if metadata is None or not metadata.keys() >= {"user", "method", "metrics"}:
        raise InputError(f"{path} is no adapter of minipeft: it does not say user, method and metrics")
    try:
        method = method_from(json.loads(metadata["method"]))
        method.check(base)
        row = method.row(tensors, base)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Adapter(metadata["user"], method, row, json.loads(metadata["metrics"]))


def read_file(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """A safetensors file's metadata and tensors. Raises InputError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None
