"""Adapters on disk: one file per finished user, each whole or absent.

    FOLDER/store.json                                  which base and which task the adapters belong to
    FOLDER/<user id, percent-encoded>.safetensors      the method's tensors, e.g. LoRA.tensors, and, as metadata,
                                                       user, method, metrics and what lies under it
    FOLDER/shared/<digest>.safetensors                 an adapter that lies under users' own, written once

A file is written under a temporary name, fsynced and renamed, so whoever reads sees all of it or none. `save_adapter`
and `load_adapter` need no store.json; `Store` is a folder that says whose it is, and refuses any other base.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minipeft.errors import InputError
from minipeft.methods.method import Method, method_from
from minipeft.models.checkpoint import read_json
from minipeft.models.hooks import Sites
from minipeft.schedule import Adapter
from minipeft.tasks.task import Header

MAX_NAME = 200  # bytes of a file name before its ending; file systems stop at 255
ENDING = ".safetensors"


# ---- One file ------------------------------------------------------------------------------------------------------


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
    return Path(folder) / f"{name}{ENDING}"


def user_of(path: Path) -> str:
    """Undoes `adapter_path`."""
    name = path.name.removesuffix(ENDING)
    return "" if name == "%" else unquote(name, errors="surrogatepass")


def save_adapter(folder: Path, adapter: Adapter, base: Sites) -> Path:
    """Write one adapter of this base, and what lies under it; replaces an earlier one of the same user."""
    metadata = _metadata(adapter)
    if adapter.under is not None:
        metadata["under"] = _save_shared(folder, adapter.under, base)
    path = adapter_path(folder, adapter.user)
    write_file(path, save(adapter.method.tensors(adapter.row, base), metadata))
    return path


def _save_shared(folder: Path, adapter: Adapter, base: Sites) -> str:
    """Write an adapter that lies under others, if it is not there. Returns its digest, which is its name."""
    metadata = _metadata(adapter)
    digest = hashlib.sha256(json.dumps(metadata).encode() + adapter.row.cpu().numpy().tobytes()).hexdigest()[:32]
    if not _shared_path(folder, digest).exists():
        write_file(_shared_path(folder, digest), save(adapter.method.tensors(adapter.row, base), metadata))
    return digest


def load_adapter(folder: Path, user: str, base: Sites) -> Adapter:
    """Read one adapter back, bit for bit, with what lies under it.

    Raises:
        InputError: no adapter of this user here, a damaged file, one that minipeft did not write, or one made for
            another base (names the site).
    """
    adapter, under = _read(_path_of(folder, user), base)
    return replace(adapter, under=_read(_shared_path(folder, under), base)[0] if under else None)


def _metadata(adapter: Adapter) -> dict[str, str]:
    return {"user": adapter.user, "method": json.dumps(adapter.method.described()),
            "metrics": json.dumps(adapter.metrics)}  # fmt: skip


def _shared_path(folder: Path, digest: str) -> Path:
    return Path(folder) / "shared" / f"{digest}{ENDING}"


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; replaces an earlier one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_file(path: Path) -> tuple[dict[str, str] | None, dict[str, Tensor]]:
    """A safetensors file's metadata and tensors. Raises InputError if it is damaged."""
    with _opened(path) as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _path_of(folder: Path, user: str) -> Path:
    """`adapter_path` of a user who has an adapter. Raises InputError if there is none."""
    path = adapter_path(folder, user)
    if not path.exists():
        raise InputError(f"no adapter of user {user!r} in {folder}")
    return path


def _read(path: Path, base: Sites) -> tuple[Adapter, str]:
    """The adapter of a file, without what lies under it, and the digest of that or ""."""
    metadata, tensors = read_file(path)
    user, method, metrics, under = _described(path, metadata)
    try:
        method.check(base)
        return Adapter(user, method, method.row(tensors, base), metrics), under
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _described(path: Path, metadata: dict[str, str] | None) -> tuple[str, Method, dict, str]:
    """User, method, metrics, and the digest of what lies under the adapter or ""."""
    if metadata is None or not metadata.keys() >= {"user", "method", "metrics"}:
        raise InputError(f"{path} is no adapter of minipeft: it does not say user, method and metrics")
    try:
        method, metrics = method_from(json.loads(metadata["method"])), json.loads(metadata["metrics"])
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged: its method and metrics cannot be read ({error})") from None
    if not isinstance(metrics, dict):
        raise InputError(f"{path} is damaged: its metrics are {type(metrics).__name__}, needed an object")
    return metadata["user"], method, metrics, metadata.get("under", "")


# ---- A folder of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseId:
    """Which base a store belongs to. folder: where it was when the store was made."""

    name: str
    folder: str
    fingerprint: str

    @classmethod
    def of(cls, base: Sites) -> "BaseId":
        """Raises InputError for a base that came from no folder."""
        if base.origin is None:
            raise InputError(f"this {type(base).__name__} came from no folder, so a store cannot name it; take one "
                             "from load_model")  # fmt: skip
        return cls(base.origin.name, str(base.origin.folder), base.origin.fingerprint)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.fingerprint[:12]})"


class Store:
    """Many users' adapters of one base in a folder: `add`, `get`, `users`, `delete`.

    base: which base. task: which task, with its labels and instruction; None: adapters were imported and nobody said.
    pooling: how an encoder's text became one vector (models/classifier.py).

    Raises:
        InputError: the folder is no store.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._shared = Path(folder), {}
        path = self.folder / "store.json"
        if not path.is_file():
            raise InputError(f"{folder} is no store: it has no store.json; `python -m minipeft train` makes one")
        fields = read_json(path, prefix=f"{path}: ")
        try:
            self.base, task = BaseId(**fields["base"]), fields["task"]
            self.pooling = fields.get("pooling", "mean")
            self.task = Header(task["name"], task["instruction"], tuple(task["labels"])) if task else None
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not written by minipeft ({error!r}); name another folder") from None

    @classmethod
    def make(cls, folder: str | Path, base: Sites, task: Header | None = None) -> "Store":
        """The store of this base and task in this folder, made if there is none.

        A store that knows no task yet takes the first one it is given; without a task, any store of the base serves.

        Raises:
            InputError: the folder holds other things, cannot be written, or is a store of another base or task.
        """
        folder = Path(folder)
        mine = folder / "store.json"
        try:
            if not mine.exists() and folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is no store and not empty; name a new folder")
            store = cls(folder) if mine.exists() else None
            if store is not None:
                store.check_base(base)
                if task is not None and store.task is not None:
                    store.check_task(task)
            if store is None or (store.task is None and task is not None):
                fields = {"base": asdict(BaseId.of(base)), "task": asdict(task) if task else None,
                          "pooling": getattr(base, "pooling", "mean") if store is None else store.pooling}
                write_file(mine, json.dumps(fields, ensure_ascii=False, indent=1).encode() + b"\n")
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}); name another folder") from None
        return cls(folder)

    def check_base(self, base: Sites) -> None:
        """Raises InputError unless it is this store's base, and an encoder pools as the store's did."""
        came = BaseId.of(base)
        if came.fingerprint != self.base.fingerprint:
            raise InputError(f"{self.folder} belongs to base {self.base}, not to {came}; name the one that was in "
                             f"{self.base.folder}, in the dtype that it had, or another store")
        if (pooling := getattr(base, "pooling", self.pooling)) != self.pooling:
            raise InputError(f"{self.folder} belongs to pooling {self.pooling!r}, not {pooling!r}; give the store's or "
                             "name another store")

    def check_task(self, task: Header) -> None:
        """Raises InputError unless users are asked the store's question and answer with its labels.

        A store of imported adapters may know no task: it takes any.
        """
        own = self.task or task
        for name in ("labels", "instruction"):
            if getattr(own, name) != getattr(task, name):
                raise InputError(f"{self.folder} belongs to task {own.name!r}; {task.name!r} has other {name}: name "
                                 "another store or the store's own task")  # fmt: skip

    def known_task(self) -> Header:
        """Raises InputError if nobody said what the imported adapters are for."""
        if self.task is None:
            raise InputError(f"{self.folder} does not say for which task its adapters are; import one with --task DIR")
        return self.task

    def add(self, adapter: Adapter, base: Sites) -> None:
        """Keep a user's adapter and what lies under it; replaces the user's earlier one."""
        self.check_base(base)
        save_adapter(self.folder, adapter, base)

    def get(self, user: str, base: Sites) -> Adapter:
        """A user's adapter. What lies under several is read once and is one object, so that they share passes.

        Raises:
            InputError: as `load_adapter`, or another base.
        """
        self.check_base(base)
        adapter, under = _read(_path_of(self.folder, user), base)
        if under and under not in self._shared:
            self._shared[under] = _read(_shared_path(self.folder, under), base)[0]
        return replace(adapter, under=self._shared.get(under))

    def about(self, user: str) -> tuple[Method, dict]:
        """A user's method and metrics; no base is needed. InputError as `load_adapter`."""
        path = _path_of(self.folder, user)
        with _opened(path) as file:
            return _described(path, file.metadata())[1:3]

    def users(self) -> list[str]:
        """Everybody who has an adapter here, in alphabetical order."""
        return sorted(user_of(path) for path in self.folder.glob(f"*{ENDING}"))

    def __contains__(self, user: str) -> bool:
        return adapter_path(self.folder, user).exists()

    def delete(self, user: str) -> None:
        """Forget a user; an adapter that lay under theirs stays for the others. InputError if there is none."""
        _path_of(self.folder, user).unlink()
