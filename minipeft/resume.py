"""What it takes to go on with a training that was interrupted: the folder `training/` of its store.

    run.json                      what is trained and how; --resume goes on with that and nothing else
    done.jsonl                    who has an adapter in the store or cannot be trained, a line each, in that order
    shared.safetensors            the adapter of all users, once it is trained
    rank-<r>-of-<n>.safetensors   where the resident users of a process stood, and their rows and moments

Who waits is no state: they are the users of the task who are neither done nor resident. Every file but done.jsonl is
written whole or not at all; of that one the last line may be torn, and counts as not written.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from minipeft.errors import InputError
from minipeft.files import read_file, write_file
from minipeft.methods.method import method_from
from minipeft.schedule import PLACE, Adapter, Fault, Standing

FORMAT = 1  # of these files; another one is refused
MEANING = {"format": "the files' format", "base": "the base", "task": "the task's examples", "shared": "what is shared",
           "deterministic": "deterministic mode"}  # fmt: skip


class State:
    """A store's folder `training/`.

    begun: what run.json says, None if there is none: `finished`, `again` (whether users who were in the store before
           are trained again) and `run`, which names all that decides about adapters.

    Raises:
        InputError: run.json is damaged.
    """

    def __init__(self, store: Path):
        self.folder = Path(store) / "training"
        self._run, self._done, self._shared = (self.folder / name for name in
                                               ("run.json", "done.jsonl", "shared.safetensors"))  # fmt: skip
        try:
            self.begun = json.loads(self._run.read_bytes()) if self._run.exists() else None
            if self.begun is not None and self.begun.keys() != {"finished", "again", "run"}:
                raise ValueError("other fields than were written")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{self._run} is damaged ({error}); delete {self.folder} and start over") from None

    @property
    def unfinished(self) -> bool:
        """Whether a training was begun here that has not come to its end."""
        return self.begun is not None and not self.begun["finished"]

    def check(self, run: dict) -> None:
        """Raises InputError unless it is this training that was begun here; names the first difference."""
        for name in {**self.begun["run"], **run}:
            was, now = (str(values.get(name)) for values in (self.begun["run"], run))
            if was != now:
                raise InputError(f"{self.folder.parent}: {MEANING.get(name, name)} was {was[:60]} when its training "
                                 f"began, now it is {now[:60]}; --resume with what it began with, or start over with "
                                 "--again")  # fmt: skip

    def begin(self, run: dict, again: bool) -> None:
        """Forget an earlier training and begin this one."""
        for path in (self._run, self._done, self._shared):
            path.unlink(missing_ok=True)
        self.forget_standings()
        self._write({"finished": False, "again": again, "run": run})
        self._done.write_bytes(b"")

    def go_on(self) -> None:
        """With what was begun here. A torn last line goes: what follows shall not be joined to it."""
        lines = self._done.read_bytes().rpartition(b"\n")
        self._done.write_bytes(lines[0] + lines[1])

    def end(self) -> None:
        """The training came to its end: --resume finds nothing to do."""
        self.forget_standings()
        self._write(self.begun | {"finished": True})

    def _write(self, begun: dict) -> None:
        write_file(self._run, json.dumps(begun, indent=1).encode())
        self.begun = begun

    def forget_standings(self) -> None:
        for path in self.folder.glob("rank-*"):  # and what a full disk left half written
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
            return dict(json.loads(line) for line in self._done.read_bytes().splitlines())
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._done} is damaged ({error}); start over with --again") from None

    # ---- Where users stand -----------------------------------------------------------------------------------------

    def save(self, rank: int, number: int, standings: Iterable[tuple[str, Standing]]) -> None:
        """Replace what this rank of so many saved before."""
        users, tensors = {}, {}
        for i, (user, standing) in enumerate(standings):
            users[user] = standing.place
            tensors |= {f"{i} {name}": tensor for name, tensor in standing.tensors.items()}
        described = json.dumps(users)
        metadata = {"users": described, "digest": _digest(described, tensors)}
        write_file(self.folder / f"rank-{rank}-of-{number}.safetensors", save(tensors, metadata))

    def standings(self, wanted: set[str]) -> dict[str, Standing]:
        """Where these users stood, as far as it was saved here, by any number of ranks.

        Raises:
            InputError: a damaged file.
        """
        found: dict[str, Standing] = {}
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            metadata, tensors = read_file(path)
            try:
                users = json.loads(metadata["users"])
                if metadata["digest"] != _digest(metadata["users"], tensors):
                    raise ValueError("its checksum is wrong")
                for i, (user, place) in enumerate(users.items()):
                    if user in wanted and (user not in found or found[user].place["step"] < place["step"]):
                        names = ("row", "exp_avg", "exp_avg_sq", *(["best"] if place["epoch"] else []))
                        found[user] = Standing({name: place[name] for name in PLACE},
                                               {name: tensors[f"{i} {name}"] for name in names})  # fmt: skip
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path} is damaged ({error}); delete it and --resume: its users begin again, nobody "
                                 "else does") from None  # fmt: skip
        return found

    # ---- The adapter of all ------------------------------------------------------------------------------------------

    def keep_shared(self, adapter: Adapter) -> None:
        write_file(self._shared, packed(adapter))

    def shared(self) -> Adapter | None:
        """None: it is not trained yet."""
        return unpacked(self._shared.read_bytes()) if self._shared.exists() else None


def _digest(described: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


# ---- News as bytes: for a file, or for another rank -----------------------------------------------------------------


def packed(news: Adapter | Fault | dict) -> bytes:
    """An adapter without what lies under it, a fault, or counts by name, as safetensors. `unpacked` undoes it."""
    fields, tensors = news, {}
    if isinstance(news, Adapter):
        fields, tensors = [news.user, news.method.described(), news.metrics], {"row": news.row.cpu()}
    elif isinstance(news, Fault):
        fields = [news.user, news.reason]
    written = json.dumps([type(news).__name__, fields]).encode()
    return save(tensors | {"news": torch.frombuffer(bytearray(written), dtype=torch.uint8)})


def unpacked(content: bytes) -> Adapter | Fault | dict:
    tensors = load(content)
    kind, fields = json.loads(tensors["news"].numpy().tobytes())
    if kind == "Adapter":
        user, method, metrics = fields
        return Adapter(user, method_from(method), tensors["row"], metrics)
    return Fault(*fields) if kind == "Fault" else fields
