"""What it takes to go on with a training that was interrupted: the folder `training/` of its store.

    run.json                      what is trained and how; --resume goes on with that and nothing else
    done.jsonl                    who has an adapter in the store or cannot be trained, a line each, in that order
    shared.safetensors            the adapter of all users, once it is trained
    everyone.standings            where it stood before that
    rank-<r>-of-<n>.standings     where the users of a process stood, and their rows and moments
    writer.lock                   which process goes on with it

A file of standings is a row of safetensors, each after its size (8 bytes, little-endian): the first says whose training
it is and how many users follow, each of the others is of one user. So neither writing nor reading it takes more memory
than one user does.

Who waits is no state: they are the users of the task who are neither done nor resident. Every file but done.jsonl is
written whole or not at all; of that one the last line may be torn, and counts as not written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import cut_torn, write_file, write_pieces
from minipeft.index import only_writer
from minipeft.methods.method import method_from
from minipeft.models.checkpoint import sync
from minipeft.schedule import PLACE, Adapter, Fault, Standing

FORMAT = 3  # of these files; another one is refused
LOCK_S = 5.0  # seconds that a training waits for another one's end
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError, SafetensorError)  # reading gives
FIELDS = {"finished": bool, "again": bool, "name": str, "run": dict}  # of run.json
MEANING = {"format": "the files' format", "base": "the base", "task": "the task's examples", "shared": "what is shared",
           "deterministic": "deterministic mode"}  # fmt: skip


def difference(was: dict, now: dict) -> tuple[str, str, str] | None:
    """The first thing in which two trainings, as `Training.described`, differ: its name and both values, cut short."""
    for name in {**was, **now}:
        values = [str(described.get(name)) for described in (was, now)]
        if values[0] != values[1]:
            return MEANING.get(name, name), values[0][:60], values[1][:60]
    return None


class State:
    """A store's folder `training/`.

    begun: what run.json says, None if there is none: `finished`, `again` (whether users who were in the store before
           are trained again), `name`, and `run`, which names all that decides about adapters.
    name:  of this training alone. Standings bear it: on another machine there may be some of an earlier one.

    Raises:
        InputError: run.json is damaged, or `training` is no folder.
    """

    def __init__(self, store: Path):
        self.folder = Path(store) / "training"
        self._run, self._done, self._shared = (self.folder / name for name in
                                               ("run.json", "done.jsonl", "shared.safetensors"))  # fmt: skip
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder; move it away")
        try:
            self.begun = json.loads(self._run.read_bytes()) if self._run.exists() else None
            if self.begun is not None and {name: type(value) for name, value in self.begun.items()} != FIELDS:
                raise ValueError("its fields are not those that this version writes")
        except DAMAGED as error:
            raise InputError(f"{self._run} is damaged ({error}); delete {self.folder} and start over") from None
        self.name = self.begun["name"] if self.begun else ""

    @property
    def unfinished(self) -> bool:
        """Whether a training was begun here that has not come to its end."""
        return self.begun is not None and not self.begun["finished"]

    def check(self, run: dict) -> None:
        """Raises InputError unless it is this training that was begun here; names the first difference."""
        if differs := difference(self.begun["run"], run):
            what, was, now = differs
            raise InputError(f"{self.folder.parent}: {what} was {was} when its training began, now it is {now}; "
                             "--resume with what it began with, or start over with --again")  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains into this store meanwhile. Raises InputError if somebody does, or has since `begun`."""
        self.folder.mkdir(exist_ok=True)
        with only_writer(self.folder, LOCK_S):
            if State(self.folder.parent).begun != self.begun:
                raise InputError(f"{self.folder.parent} was trained into meanwhile; start again")
            yield

    def begin(self, run: dict, again: bool) -> None:
        """Forget an earlier training and begin this one; run.json comes last, so what it says is there."""
        self._remove("run.json", "shared.safetensors", "rank-*", "everyone.*", "*.tmp")
        write_file(self._done, b"")
        self.name = uuid4().hex
        self._write({"finished": False, "again": again, "name": self.name, "run": run})
        sync(self.folder.parent)

    def go_on(self) -> None:
        """With what was begun here, without what a killed process left half written."""
        self._remove("*.tmp")
        cut_torn(self._done)

    def end(self) -> None:
        """The training came to its end: --resume finds nothing to do."""
        self._remove("rank-*", "everyone.*")
        self._write(self.begun | {"finished": True})

    def _write(self, begun: dict) -> None:
        write_file(self._run, json.dumps(begun, indent=1).encode())
        self.begun = begun

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink()

    # ---- Who is done -----------------------------------------------------------------------------------------------

    def note(self, done: Iterable[tuple[str, str]]) -> None:
        """(user, reason): these have adapters in the store, or with a reason, cannot be trained. On disk on return."""
        with open(self._done, "ab") as file:
            for user, reason in done:
                file.write(json.dumps([user, reason]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> dict[str, str]:
        """User -> why they cannot be trained, "" if they are."""
        try:
            lines = self._done.read_bytes().splitlines() if self._done.exists() else []
            return dict(map(_done_line, lines))
        except DAMAGED as error:
            raise InputError(f"{self._done} is damaged ({error}); start over with --again") from None

    # ---- Where users stand -----------------------------------------------------------------------------------------

    def save(self, part: str, number: int, standings: Iterable[tuple[str, Standing]]) -> None:
        """Replace what this part of the training saved before: a rank, or "everyone". Of so many users, drawn one by
        one."""

        def pieces() -> Iterator[bytes]:
            yield _sealed([self.name, number], {})
            for user, standing in standings:
                yield _sealed([user, standing.place], standing.tensors)

        sized = (part for piece in pieces() for part in (len(piece).to_bytes(8, "little"), piece))
        write_pieces(self.folder / f"{part}.standings", sized)

    def standings(self, wanted: set[str], parts: str = "rank-*") -> dict[str, Standing]:
        """Where these users stood, as far as this training saved it here, by any number of ranks.

        Raises:
            InputError: a damaged file.
        """
        found: dict[str, Standing] = {}
        for path in sorted(self.folder.glob(f"{parts}.standings")):
            try:
                with open(path, "rb") as file:
                    (training, number), _ = _opened(_next(file))
                    for _ in range(number if training == self.name else 0):
                        (user, place), tensors = _opened(_next(file))
                        _check_place(place)
                        if user in wanted and (user not in found or found[user].place["step"] < place["step"]):
                            names = ("row", "exp_avg", "exp_avg_sq", *(["best"] if place["epoch"] else []))
                            found[user] = Standing(place, {name: tensors[name] for name in names})
            except DAMAGED as error:
                raise InputError(f"{path} is damaged ({error}); delete it and --resume: its users begin again, nobody "
                                 "else does") from None  # fmt: skip
        return found

    # ---- The adapter of all ------------------------------------------------------------------------------------------

    def keep_shared(self, adapter: Adapter) -> None:
        """From now on nobody asks where it stood."""
        write_file(self._shared, packed(adapter))
        self._remove("everyone.*")

    def shared(self) -> Adapter | None:
        """None: it is not trained yet. Raises InputError if it is damaged."""
        try:
            return unpacked(self._shared.read_bytes()) if self._shared.exists() else None
        except DAMAGED as error:
            raise InputError(f"{self._shared} is damaged ({error}); delete it and --resume: it is trained "
                             "again") from None  # fmt: skip


def _done_line(line: bytes) -> tuple[str, str]:
    user, reason = json.loads(line)
    if not (isinstance(user, str) and isinstance(reason, str)):
        raise ValueError("a line of it is not of a user and a reason")
    return user, reason


def _check_place(place: dict) -> None:
    """Raises ValueError unless it is one of a Run, with values of its types. What they say is judged with the plan."""
    history = place["history"]
    if not (place.keys() == set(PLACE) and isinstance(history, list) and all(type(loss) is float for loss in history)
            and all(type(place[name]) is int for name in PLACE if name != "history")):  # fmt: skip
        raise ValueError("where a user stands is not what this version writes")


def _next(file: BinaryIO) -> bytes:
    """The next of a file's sized pieces. Raises ValueError if it ends before."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError("it ends too early")
    return file.read(size)


# ---- As bytes: for a file, or for another rank ----------------------------------------------------------------------


def _sealed(described: object, tensors: dict[str, Tensor]) -> bytes:
    """Tensors, what JSON says of them, and a digest of both, as safetensors. `_opened` undoes it."""
    tensors = tensors | {"described": _of_bytes(json.dumps(described).encode())}
    return save(tensors | {"digest": _of_bytes(_digest(tensors))})


def _opened(content: bytes) -> tuple[list, dict[str, Tensor]]:
    """Raises one of DAMAGED if it is not what `_sealed` made."""
    tensors = load(content)
    if tensors.pop("digest").numpy().tobytes() != _digest(tensors):
        raise ValueError("its checksum is wrong")
    return json.loads(tensors.pop("described").numpy().tobytes()), tensors


def _of_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _digest(tensors: dict[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.digest()


def packed(news: Adapter | Fault | dict) -> bytes:
    """An adapter without what lies under it, a fault, or counts by name. `unpacked` undoes it."""
    fields, tensors = news, {}
    if isinstance(news, Adapter):
        fields, tensors = [news.user, news.method.described(), news.metrics], {"row": news.row.cpu()}
    elif isinstance(news, Fault):
        fields = [news.user, news.reason]
    return _sealed([type(news).__name__, fields], tensors)


def unpacked(content: bytes) -> Adapter | Fault | dict:
    """Raises one of DAMAGED."""
    (kind, fields), tensors = _opened(content)
    if kind == "Adapter":
        user, method, metrics = fields
        return Adapter(user, method_from(method), tensors["row"], metrics)
    return Fault(*fields) if kind == "Fault" else fields
