"""A store: many users' adapters of one base and one task, in a folder.

    FOLDER/index.sqlite, shards/, writer.lock      an archive (archive.py): rows by user, and what they are

    add, add_many      keep adapters; they are on disk when the call returns, and replace the users' earlier ones
    get, get_many      read them back, bit for bit, each checked against its checksum
    delete, compact    forget a user; remove from disk what was forgotten and replaced
    users, about       who is there, by which method, with which metrics
    verify             read everything

Adapters of another base are refused: the index has the digest of the base's weights. An adapter that lies under users'
own is kept once, however many they are.

Several processes may read while one writes; a second writer waits. Nothing is ever unpickled: rows are numbers,
descriptions are JSON, and all of it is checked as it is read.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from minipeft.archive import Archive, Compacted, Item, Read
from minipeft.errors import InputError
from minipeft.index import DIGEST, LOCK, MAX_SMALL, MAX_TEXT, NAME, SHARED, Entry, named
from minipeft.methods.method import Method, method_from
from minipeft.models.fields import shown
from minipeft.models.hooks import Sites
from minipeft.packing import Packing, put_together, take_apart
from minipeft.schedule import Adapter
from minipeft.shards import KINDS, Exhausted, decoded, encoded, width_of
from minipeft.tasks.task import Header

TIMEOUT = 60.0  # seconds that a write waits for another writer
OWN = ("shards", LOCK, *(NAME + ending for ending in ("", "-wal", "-shm", "-journal")))
WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


class About(NamedTuple):
    """What a user has. version: 1, and 1 more each time it was replaced."""

    method: Method
    metrics: dict
    version: int


class Damage(NamedTuple):
    """An adapter that cannot be read. shard: 0 if its row waits in the index. what: all of it in one line."""

    user: str
    shard: int
    row: int
    what: str


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


def key_of(user: str) -> bytes:
    """A user's id in the index. Any text is a safe id: it is no path, and no part of a statement.

    Raises:
        InputError: it is too long, or holds half a character.
    """
    try:
        key = user.encode()
    except UnicodeEncodeError:
        raise InputError(f"user id {shown(user)} holds half a character; needed text that UTF-8 can write") from None
    if len(key) > MAX_SMALL:
        raise InputError(f"user id {shown(user)} has {len(key)} bytes; needed at most {MAX_SMALL}")
    return key


def is_store(folder: str | Path) -> bool:
    return (Path(folder) / NAME).exists()


class Store:
    """Many users' adapters of one base in a folder. It belongs to the thread that opened it.

    base: which base. task: which task, with its labels and instruction; None: adapters were imported and nobody said.
    pooling: how an encoder's text became one vector (models/classifier.py).
    rows: how numbers lie (shards.py): "float32", or "bfloat16" or "int8", which are smaller and not exact.

    Args:
        timeout: seconds that a write waits for another writer.

    Raises:
        InputError: the folder is no store, or it is damaged; so says every method that meets it.
    """

    def __init__(self, folder: str | Path, timeout: float = TIMEOUT):
        self.folder = Path(folder)
        if not is_store(folder):
            if (self.folder / "store.json").exists():
                raise InputError(f"{folder} is a store of an earlier minipeft, one file for each user; train or import "
                                 "its users into a new folder")  # fmt: skip
            raise InputError(f"{folder} is no store: it has no {NAME}; `python -m minipeft train` makes one")
        self._archive = Archive(self.folder, timeout)
        self.rows = self._archive.kind
        try:
            base, task = (json.loads(self._archive.about[name]) for name in ("base", "task"))
            self.base = BaseId(base["name"], base["folder"], base["fingerprint"])
            self.pooling = self._archive.about.get("pooling", "mean")
            self.task = Header(task["name"], task["instruction"], tuple(task["labels"])) if task else None
            texts = [*asdict(self.base).values()]
            texts += [self.task.name, self.task.instruction, *self.task.labels] if self.task else []
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("a name that is no text")
        except WRONG as error:
            raise InputError(f"{self.folder / NAME}: not written by minipeft ({shown(error)}); name another "
                             "folder") from None  # fmt: skip
        self._under: dict[bytes, Adapter] = {}  # what lies under several is one object, so that they share passes
        self._keys: dict[int, tuple[Adapter, bytes]] = {}  # id of such an adapter -> itself and its key
        self._methods: dict[int, Method] = {}  # configuration -> its method
        self._on: Sites | None = None  # the base that was used last
        self._packings: dict[Method, Packing] = {}  # on that base
        self._checked: dict[int, Packing] = {}  # configuration -> the same, found to fit

    @classmethod
    def make(
        cls, folder: str | Path, base: Sites, task: Header | None = None, rows: str | None = None,
        timeout: float = TIMEOUT,
    ) -> "Store":  # fmt: skip
        """The store of this base and task in this folder, made if there is none.

        A store that knows no task yet takes the first one it is given; without a task, any store of the base serves.

        Args:
            rows: how numbers shall lie in a new store; None: "float32", or as they do.

        Raises:
            InputError: the folder holds other things, cannot be written, or is a store of another base or task, or of
                other rows.
        """
        folder = Path(folder)
        if rows not in (None, *KINDS):
            raise InputError(f"rows {shown(rows)} are unknown; choose one of {', '.join(KINDS)}")
        about = {"base": json.dumps(asdict(BaseId.of(base))), "task": json.dumps(asdict(task) if task else None),
                 "rows": rows or "float32", "pooling": getattr(base, "pooling", "mean")}  # fmt: skip
        try:
            strangers = {path.name for path in folder.iterdir()} - {*OWN} if folder.exists() else set()
            if strangers and not is_store(folder) and "store.json" not in strangers:
                raise InputError(f"{folder} is no store and not empty; name a new folder")
            if "store.json" not in strangers:
                Archive.make(folder, about, timeout)
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}); name another folder") from None
        store = cls(folder, timeout)
        store.check_base(base)
        if rows not in (None, store.rows):
            raise InputError(f"{folder} keeps rows as {store.rows}, not {rows}; name another store")
        if task is not None:
            store.check_task(task)
            if store.task is None:
                with store._archive.writing():
                    store._archive.index.set_about({"task": about["task"]})
                store.task = task
        return store

    def close(self) -> None:
        self._archive.close()

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

    # ---- Keeping

    def add(self, adapter: Adapter, base: Sites) -> None:
        """Keep a user's adapter and what lies under it; replaces the user's earlier one. As `add_many` of one."""
        self.add_many([adapter], base)

    def add_many(self, adapters: Iterable[Adapter], base: Sites) -> None:
        """Keep adapters and what lies under them; they replace their users' earlier ones. All are on disk afterwards.

        Raises:
            InputError: another base, a user who comes twice, an id that is too long, a disk that is full, another
                writer who does not end: none of them is kept then, and what was there before still is.
        """
        self.check_base(base)
        with self._archive.writing():
            groups: dict[tuple[Method, bytes], list[tuple[bytes, Adapter]]] = defaultdict(list)
            keys: set[bytes] = set()
            for adapter in adapters:
                key, under = key_of(adapter.user), self._put_under(adapter.under, base)
                if key in keys:
                    raise InputError(f"user {shown(adapter.user)} is twice in one batch; add one adapter of each")
                keys.add(key)
                groups[adapter.method, under].append((key, adapter))
            for (method, under), group in groups.items():
                self._put(method, under, group, base)

    def _put_under(self, adapter: Adapter | None, base: Sites) -> bytes:
        """Keep an adapter that lies under others, if it is not there. Returns its key, b"" for None."""
        if adapter is None:
            return b""
        if adapter.under is not None:
            raise InputError(f"the adapter {shown(adapter.user)} lies under another and on a third; one level is kept")
        if id(adapter) not in self._keys:
            description = json.dumps([adapter.method.described(), adapter.metrics]).encode()
            digest = hashlib.sha256(description + adapter.row.cpu().numpy().tobytes()).digest()[:DIGEST]
            self._keys[id(adapter)] = adapter, SHARED + digest + key_of(adapter.user)
        key = self._keys[id(adapter)][1]
        if self._archive.index.entry(key) is None:
            self._put(adapter.method, b"", [(key, adapter)], base)
        return key

    def _put(self, method: Method, under: bytes, adapters: Sequence[tuple[bytes, Adapter]], base: Sites) -> None:
        packing, items = self._packing(method, base), []
        number = self._archive.configuration_number(json.dumps(method.described()), packing.layout, under,
                                                    self._width(packing))  # fmt: skip
        forms: dict[tuple[str, str], int] = {}
        for key, adapter in adapters:
            skeleton, codes, numbers = take_apart(adapter.metrics)
            for part, most in ((skeleton, MAX_TEXT), (numbers, MAX_SMALL)):
                if len(part) > most:
                    raise InputError(f"the metrics of {named(key)} have {len(part)} bytes; needed at most {most}")
            if (skeleton, codes) not in forms:
                forms[skeleton, codes] = self._archive.form_number(skeleton, codes)
            data = encoded(packing.packed(adapter.row), self.rows, packing.spans)
            items.append(Item(key, data, forms[skeleton, codes], numbers))
        self._archive.put(number, items)

    def _packing(self, method: Method, base: Sites) -> Packing:
        if base is not self._on:
            self._on, self._packings, self._checked = base, {}, {}
        if method not in self._packings:
            self._packings[method] = Packing(method, base)
        return self._packings[method]

    def _width(self, packing: Packing) -> int:
        return width_of(self.rows, packing.num_numbers, len(packing.shapes))

    def delete(self, user: str) -> None:
        """Forget a user: nobody can read the adapter any more, and `compact` removes its numbers from disk.

        What lay under it stays for the others. InputError if there is none.
        """
        with self._archive.writing():
            self._archive.delete(self._entry(user).key)

    def compact(self) -> Compacted:
        """Remove from disk what was deleted and replaced, and make few full shards of many small ones."""
        return self._archive.compact()

    # ---- Reading

    def get(self, user: str, base: Sites) -> Adapter:
        """A user's adapter, as `get_many` of one."""
        return self.get_many([user], base)[0]

    def get_many(self, users: Sequence[str], base: Sites) -> list[Adapter]:
        """Users' adapters, in the order asked; read in the order in which they lie.

        What lies under several is read once and is one object, so that they share passes.

        Raises:
            InputError: another base, a user who has none, or one that is damaged.
        """
        self.check_base(base)
        entries = [self._entry(user) for user in users]
        adapters = {i: self._read(entries[i], users[i], base)
                    for i in sorted(range(len(users)), key=lambda i: (entries[i].shard, entries[i].row))}  # fmt: skip
        return [adapters[i] for i in range(len(users))]

    def _entry(self, user: str) -> Entry:
        entry = self._archive.index.entry(key_of(user))
        if entry is None:
            raise InputError(f"no adapter of user {shown(user)} in {self.folder}")
        return entry

    def _read(self, entry: Entry, user: str, base: Sites) -> Adapter:
        return self._current(entry, lambda entry: self._adapter(entry, user, base))

    def _current(self, entry: Entry, what: Callable[[Entry], Read]) -> Read:
        """`Archive.read`. InputError if the user is deleted meanwhile."""
        try:
            return self._archive.read(entry, what)
        except KeyError:
            raise InputError(f"no adapter of user {shown(_name(entry))} in {self.folder}") from None

    def _adapter(self, entry: Entry, user: str, base: Sites) -> Adapter:
        packing = self._packing_of(entry, base)  # so long must the row be: before it is copied
        row = packing.row(decoded(self._archive.row(entry).copy(), self.rows, packing.spans))
        under = self._archive.configuration(entry.configuration).under
        return Adapter(user, packing.method, row, self._metrics(entry), self._lies_under(entry, under, base))

    def _packing_of(self, entry: Entry, base: Sites) -> Packing:
        """How the user's row is kept. InputError if it is not of this base, or its description makes no sense."""
        if base is self._on and entry.configuration in self._checked:
            return self._checked[entry.configuration]
        configuration, method = self._archive.configuration(entry.configuration), self._method(entry)
        try:
            method.check(base)
            packing = self._packing(method, base)
            if packing.layout != configuration.layout or self._width(packing) != configuration.width:
                raise InputError(f"its row has {configuration.width} numbers, this base needs {self._width(packing)}, "
                                 "or others; was it trained on another base?")  # fmt: skip
        except InputError as error:
            raise InputError(f"{self.folder}: {named(entry.key)}: {error}") from None
        except WRONG as error:
            raise self._damaged(entry, error) from None
        self._checked[entry.configuration] = packing
        return packing

    def _lies_under(self, entry: Entry, key: bytes, base: Sites) -> Adapter | None:
        if key and key not in self._under:
            below = self._archive.index.entry(key)
            if below is None or not key.startswith(SHARED) or self._archive.configuration(below.configuration).under:
                raise self._damaged(entry, f"{named(key)} is gone, or is none that can lie under another")
            self._under[key] = self._read(below, _name(below), base)
        return self._under.get(key)

    def _method(self, entry: Entry) -> Method:
        if entry.configuration not in self._methods:
            described = self._archive.configuration(entry.configuration).method
            try:
                self._methods[entry.configuration] = method_from(json.loads(described))
                hash(self._methods[entry.configuration])
            except WRONG as error:
                raise self._damaged(entry, error) from None
        return self._methods[entry.configuration]

    def _metrics(self, entry: Entry) -> dict:
        form = self._archive.form(entry.form)
        try:
            return put_together(form.skeleton, form.codes, entry.numbers)
        except ValueError as error:
            raise self._damaged(entry, error) from None

    def _damaged(self, entry: Entry, what: object) -> InputError:
        return InputError(f"{self.folder}: {named(entry.key)} is damaged: {shown(what)}; train or import it again, or "
                          "delete it")  # fmt: skip

    def about(self, user: str) -> About:
        """A user's method, metrics and version; no base is needed. InputError if there is none."""
        return self._current(self._entry(user), self._about)

    def _about(self, entry: Entry) -> About:
        return About(self._method(entry), self._metrics(entry), entry.version)

    def everybody(self) -> Iterator[tuple[str, About]]:
        """Everybody who has an adapter here, in alphabetical order, and what they have. Takes no memory."""
        for entry in self._archive.index.entries():
            try:
                yield _name(entry), self._archive.read(entry, self._about)
            except KeyError:
                continue  # deleted meanwhile

    def users(self) -> list[str]:
        """Everybody who has an adapter here, in alphabetical order."""
        return [_name(entry) for entry in self._archive.index.entries()]

    def __contains__(self, user: str) -> bool:
        return self._archive.index.entry(key_of(user)) is not None

    def verify(self) -> list[Damage]:
        """Read every adapter, compare its checksum, and put its method and metrics together.

        Raises:
            InputError: the index itself is damaged, or the system lets this process open no file (`Exhausted`).
        """
        damaged = []
        self._archive.index.check()
        for entry in self._archive.index.located():
            try:
                self._archive.read(entry, self._verify)
            except KeyError:
                continue  # deleted meanwhile
            except Exhausted:
                raise
            except InputError as error:
                damaged.append(Damage(_name(entry), entry.shard, entry.row, str(error)))
        return damaged

    def _verify(self, entry: Entry) -> None:
        """Raises InputError if its row, its description or what lies under it is damaged or gone."""
        self._archive.row(entry)
        self._about(entry)
        under = self._archive.configuration(entry.configuration).under
        if under and self._archive.index.entry(under) is None:
            raise self._damaged(entry, f"{named(under)} is gone")


def _name(entry: Entry) -> str:
    """Whose it is."""
    try:
        return (entry.key[1 + DIGEST :] if entry.key.startswith(SHARED) else entry.key).decode()
    except UnicodeDecodeError:
        raise InputError(f"the index is damaged: a user's id is not UTF-8, {entry.key[:40]!r}") from None
