"""The index of a store: who has an adapter, and where its row lies. One SQLite file, in WAL mode.

    about            name -> JSON: which base and task the store belongs to, how numbers lie in its shards
    configurations   what users have in common: the method, how its row is laid out, what lies under the adapter
    forms            what users' metrics have in common: all of them but the numbers
    shards           which shards there are
    adapters         id -> configuration, shard, row, checksum, version, form and numbers of the metrics
    waiting          rows that are not yet in a shard: single ones, until there are enough for one

Adapters lie as they came, their ids in an index apart (SQLite makes it for the primary key): it has a quarter of the
pages, so a batch of users from all over changes that much fewer than if whole entries lay in the order of ids.

Readers see the index as it was before or after a write, and neither wait for the writer nor hold it up. Commits wait
for the disk (synchronous=FULL).

The file is data, not trusted: its schema must be the text below to the letter, so there are no views, triggers or other
code; every value that is read is checked; nothing is read without a limit on how much.
"""

import fcntl
import math
import os
import re
import socket
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from minipeft.errors import InputError
from minipeft.models.checkpoint import one_line
from minipeft.models.fields import shown

NAME = "index.sqlite"
LOCK = "writer.lock"
SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE configurations (number INTEGER PRIMARY KEY AUTOINCREMENT, method TEXT, layout TEXT, under BLOB,
    width INTEGER, UNIQUE (method, layout, under));
CREATE TABLE forms (number INTEGER PRIMARY KEY AUTOINCREMENT, skeleton TEXT, codes TEXT, UNIQUE (skeleton, codes));
CREATE TABLE shards (number INTEGER PRIMARY KEY AUTOINCREMENT, configuration INTEGER, n INTEGER);
CREATE TABLE adapters (id BLOB PRIMARY KEY, configuration INTEGER, shard INTEGER, row INTEGER, checksum INTEGER,
    version INTEGER, form INTEGER, numbers BLOB);
CREATE TABLE waiting (id BLOB PRIMARY KEY, configuration INTEGER, row BLOB);
CREATE INDEX waiting_of ON waiting (configuration);
"""
STATEMENTS = [" ".join(sql.split()) for sql in SCHEMA.split(";") if sql.strip()]
PRAGMAS = ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL", "secure_delete=ON", "cache_size=-8000",
           "wal_autocheckpoint=8000")  # 32 MB of log: batches of users all over the index change the same pages
MAX_VALUE = 16 << 20  # bytes of a single value; the largest that is written is a row that waits
MAX_TEXT = 1 << 20  # characters of a description: JSON, which takes 25 times as much when it is parsed
MAX_WIDTH = 1 << 30  # numbers of a row
MAX_SMALL = 64 << 10  # bytes of a user's id, and of the numbers of their metrics
PAGE = 256  # rows fetched at a time
PATIENCE = 30.0  # seconds that SQLite waits for another process
SHARED = b"\xff"  # a byte that UTF-8 has not: keys of adapters that lie under others' begin with it, and a digest
DIGEST = 16  # bytes of that digest; the rest of the key is the adapter's name
MAX_KEY = len(SHARED) + DIGEST + MAX_SMALL


class Configuration(NamedTuple):
    """What adapters of equal kind have in common.

    method: `Method.described` as JSON. layout: parameter -> shape, as JSON, in the order of a row. under: the key of
    the adapter that lies under them, b"" for none. width: elements of a stored row.
    """

    number: int
    method: str
    layout: str
    under: bytes
    width: int


class Form(NamedTuple):
    """Metrics without their numbers. skeleton: JSON, 0 for each number. codes: of each, as `struct` spells it."""

    number: int
    skeleton: str
    codes: str


class ShardEntry(NamedTuple):
    number: int
    configuration: int
    n: int


class Entry(NamedTuple):
    """Where an adapter lies. shard: 0 if its row is `waiting`. version: 1, and 1 more with each replacement."""

    key: bytes
    configuration: int
    shard: int
    row: int
    checksum: int
    version: int
    form: int
    numbers: bytes


# ---- One writer ----------------------------------------------------------------------------------------------------


@contextmanager
def only_writer(folder: Path, timeout: float) -> Iterator[None]:
    """Holds the store's lock. It is the system's: it goes with the process, however that ends.

    Raises:
        InputError: another writer still has it after `timeout` seconds; says who.
    """
    path, deadline = folder / LOCK, time.monotonic() + timeout
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror}); is the folder yours to write?") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path} is no plain file; remove it")
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = one_line(os.pread(descriptor, 200, 0).decode(errors="replace"))
                    raise InputError(f"{folder} is being written by {holder} and was for {timeout:g} s; try again "
                                     "when that is done") from None  # fmt: skip
                time.sleep(min(0.01, timeout))
        holder = f"process {os.getpid()} on {socket.gethostname()}".encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder, 0)
        yield
    finally:
        os.close(descriptor)


# ---- The file ------------------------------------------------------------------------------------------------------


class _Stamp(NamedTuple):
    """Of a file; another once somebody has written."""

    changed_ns: int
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> "_Stamp | None":
        """None: there is no such file."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_mtime_ns, status.st_size)


class Index:
    """A connection to a store's index. It belongs to the thread that made it.

    create: make the file, its tables and `about`, if they are not there.

    Raises:
        InputError: no index, or a file that is damaged or not an index of minipeft.
    """

    def __init__(self, folder: Path, create: dict[str, str] | None = None):
        self.path = folder / NAME
        for suffix in ("", "-wal", "-shm", "-journal"):
            path = self.path.with_name(NAME + suffix)
            if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
                raise InputError(f"{path} is no plain file; a store's index is one, and no link")
        self._as_it_lay: tuple[_Stamp | None, _Stamp | None] | None = None  # of index and log, if they are taken so
        with self._errors():
            self._open("mode=rwc" if create is not None else "mode=rw")
            if create is not None:
                self._create(create)
        found = self.rows("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence' LIMIT 99")
        right = sorted(found) == sorted((sql,) for sql in STATEMENTS)
        if not right or (self.rows("PRAGMA journal_mode") != [("wal",)] and self._as_it_lay is None):
            raise InputError(f"{self.path} is no index of this version of minipeft; name another folder")

    def _open(self, mode: str) -> None:
        """Connect. Who may not write the folder cannot make the files that readers and a writer share, beside the log:
        where they are, a writer is at it, or died, and they are read too; where not, the index is read as it lies.
        """
        as_it_lay = None
        if not os.access(self.path.parent, os.W_OK):
            _, log = stamps = self._stamps()
            if log is not None and self.path.with_name(NAME + "-shm").exists():
                mode = "mode=ro&readonly_shm=1"
            elif log is not None and log.num_bytes:
                raise InputError(f"{self.path.parent} may not be written, but {NAME}-wal holds changes; open it once "
                                 "as somebody who may write there")  # fmt: skip
            else:
                mode, as_it_lay = "immutable=1", stamps
        self._db, self._mode, self._as_it_lay = self._connect(mode), mode, as_it_lay

    def _stamps(self) -> tuple[_Stamp | None, _Stamp | None]:
        return _Stamp.of(self.path), _Stamp.of(self.path.with_name(NAME + "-wal"))

    def _is_outdated(self) -> bool:
        """Whether the index was taken as it lay, and somebody has begun to write: SQLite does not look."""
        return self._as_it_lay is not None and self._as_it_lay != self._stamps()

    def _current(self) -> sqlite3.Connection:
        """The connection; another one if it is outdated."""
        if self._is_outdated():
            outdated = self._db
            self._open("mode=rw")
            outdated.close()
        return self._db

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self.path.absolute()))}?{mode}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=PATIENCE)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
        for pragma in PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        return db

    def _create(self, about: dict[str, str]) -> None:
        if self.rows("SELECT 1 FROM sqlite_master LIMIT 1"):
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        with self.transaction():
            for sql in STATEMENTS:
                self._db.execute(sql)
            self.set_about(about)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as bad input."""
        try:
            yield
        except sqlite3.ProgrammingError:  # a closed store, another thread: the caller's mistake
            raise
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of a message that quotes the file
            name = getattr(error, "sqlite_errorname", "")
            if re.match("SQLITE_(FULL|IOERR|CANTOPEN|READONLY|BUSY|LOCKED)", name):
                raise InputError(f"{self.path} cannot be used ({error}); is the disk full, or the folder not yours to "
                                 "write?") from None  # fmt: skip
            if self._is_outdated():
                raise InputError(f"{self.path} is being written ({error}), and you may not write its folder; try "
                                 "again") from None  # fmt: skip
            raise InputError(f"{self.path} is damaged: {one_line(error)}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the writes inside, on disk when it ends, or none of them."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself has ended it when the disk was full
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: object) -> list[tuple]:
        """What a query finds, at once: for queries that find little."""
        with self._errors():
            return self._current().execute(sql, values).fetchall()

    def write(self, sql: str, values: Iterable[tuple]) -> None:
        """Within a transaction: one statement for each of these."""
        with self._errors():
            self._db.executemany(sql, values)

    # ---- What there is

    def about(self) -> dict[str, str]:
        with self._errors():
            found = self._current().execute("SELECT * FROM about LIMIT 99")  # never all at once: they may be too long
            return dict(self._typed("about", values, (str, str)) for values in found)

    def entry(self, key: bytes) -> Entry | None:
        found = self.rows("SELECT * FROM adapters WHERE id = ?", key)
        return self._entry(found[0]) if found else None

    def entries(self) -> Iterator[Entry]:
        """Every user's, by id. Fetched in pages, so a slow caller holds up nobody; each page is as of its time."""
        for values in self._scan("SELECT * FROM adapters WHERE id > ? AND id < x'ff' ORDER BY id LIMIT ?", "", bytes):
            yield self._entry(values)

    def located(self) -> Iterator[Entry]:
        """All entries, shared adapters' too, in the order in which they lie, as of now: by a connection of its own, so
        that the caller may write meanwhile. Reads the index whole, so `check` it first.
        """
        with self._errors():
            self._current()
            reader = self._connect(self._mode)
            try:
                for values in reader.execute("SELECT * FROM adapters ORDER BY configuration, shard, row"):
                    yield self._entry(values)
            finally:
                reader.close()

    def _entry(self, values: tuple) -> Entry:
        entry = Entry(*values)
        whole = (entry.configuration, entry.shard, entry.row, entry.checksum, entry.version, entry.form)
        if type(entry.key) is not bytes or type(entry.numbers) is not bytes or any(type(x) is not int for x in whole):
            raise InputError(f"{self.path} is damaged: an adapter's entry has values of the wrong type")
        return entry

    def configuration(self, number: int) -> Configuration:
        found = Configuration(*self._one("configurations", number, (int, str, str, bytes, int)))
        if not 1 <= found.width <= MAX_WIDTH:
            raise InputError(f"{self.path} is damaged: rows of {found.width} numbers")
        return found

    def form(self, number: int) -> Form:
        return Form(*self._one("forms", number, (int, str, str)))

    def shard(self, number: int) -> ShardEntry | None:
        found = self.rows("SELECT * FROM shards WHERE number = ?", number)
        return self._shard(found[0]) if found else None

    def shards(self) -> Iterator[ShardEntry]:
        for values in self._scan("SELECT * FROM shards WHERE number > ? ORDER BY number LIMIT ?", 0, int):
            yield self._shard(values)

    def _shard(self, values: tuple) -> ShardEntry:
        shard = ShardEntry(*self._typed("shards", values, (int, int, int)))
        if shard.n < 1:
            raise InputError(f"{self.path} is damaged: a shard of {shard.n} rows")
        return shard

    def waiting_row(self, key: bytes) -> bytes | None:
        found = self.rows("SELECT row FROM waiting WHERE id = ?", key)
        return self._typed("waiting", found[0], (bytes,))[0] if found else None

    def num_waiting(self, configuration: int, at_most: int) -> int:
        sql = "SELECT count(*) FROM (SELECT 1 FROM waiting WHERE configuration = ? LIMIT ?)"
        ((number,),) = self.rows(sql, configuration, at_most)
        return number

    def waiting_rows(self, configuration: int, row_bytes: int, at_most: int) -> list[tuple[bytes, bytes]]:
        """(key, row) of a configuration's rows that wait: those that came first, if there are more than at_most."""
        sql = """SELECT rowid, iif(length(id) <= ?, id, NULL), iif(length(row) = ?, row, NULL) FROM waiting
                 WHERE configuration = ? ORDER BY rowid LIMIT ?"""
        waiting, last = [], -math.inf
        with self._errors():
            for number, key, row in self._current().execute(sql, (MAX_KEY, row_bytes, configuration, at_most)):
                if type(key) is not bytes or type(row) is not bytes or number <= last:
                    raise InputError(f"{self.path} is damaged: rows that wait have not {row_bytes} bytes each, or are "
                                     "out of order")  # fmt: skip
                waiting.append((key, row))
                last = number
        return waiting

    def num_live(self) -> dict[int, int]:
        """Shard -> how many of its rows somebody has. `check` first: it reads the index whole."""
        return dict(self.rows("SELECT shard, count(*) FROM adapters GROUP BY shard"))

    def _one(self, table: str, number: int, types: tuple[type, ...]) -> tuple:
        found = self.rows(f"SELECT * FROM {table} WHERE number = ?", number)
        if not found:
            raise InputError(f"{self.path} is damaged: {table} has no number {number}")
        return self._typed(table, found[0], types)

    def _typed(self, table: str, values: tuple, types: tuple[type, ...]) -> tuple:
        if tuple(map(type, values)) != types or any(type(x) is str and len(x) > MAX_TEXT for x in values):
            raise InputError(f"{self.path} is damaged: {table} has values of the wrong type, or too long")
        return values

    def _scan(self, sql: str, after: str | int, kind: type) -> Iterator[tuple]:
        """A query's rows, page by page, each beginning after the last one's key.

        Keys are of this kind and rise: so a file whose pages go round in circles comes to an end too.
        """
        page, last = [()], None
        while page:
            with self._errors():
                page = []
                for values in self._current().execute(sql, (after, PAGE)):
                    in_order = type(values[0]) is kind and (last is None or values[0] > last)
                    if not in_order or any(type(x) is bytes and len(x) > MAX_SMALL for x in values):
                        raise InputError(f"{self.path} is damaged: its entries are out of order, or too long")
                    page.append(values)
                    after = last = values[0]
            yield from page

    def check(self) -> None:
        """Raises InputError if the file's own structure is damaged. Reads all of it."""
        ((said,),) = self.rows("PRAGMA integrity_check(1)")
        if said != "ok":
            raise InputError(f"{self.path} is damaged: {one_line(said)}")

    # ---- Writing, within a transaction

    def set_about(self, values: dict[str, str]) -> None:
        """InputError: a text is too long."""
        check_texts(values)
        self.write("INSERT OR REPLACE INTO about VALUES (?, ?)", values.items())

    def number_of(self, table: str, **values: str | bytes | int) -> int:
        """The number of a configuration or form with these values, which is made if there is none."""
        where = " AND ".join(f"{name} = ?" for name in values)
        found = self.rows(f"SELECT number FROM {table} WHERE {where}", *values.values())
        return found[0][0] if found else self.insert(table, **values)

    def insert(self, table: str, **values: str | bytes | int) -> int:
        """Returns the number that the new row got; none is ever given twice. InputError: a text is too long."""
        check_texts(values)
        names, places = ", ".join(values), ", ".join("?" * len(values))
        with self._errors():
            return self._db.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", (*values.values(),)).lastrowid

    def delete_adapters_under_none(self) -> None:
        """Shared ones that nobody's lies on any more. `check` first: it reads the index whole."""
        used = "SELECT under FROM configurations WHERE number IN (SELECT configuration FROM adapters WHERE id < x'ff')"
        for table in ("adapters", "waiting"):
            self.rows(f"DELETE FROM {table} WHERE id >= x'ff' AND id NOT IN ({used})")

    def delete_descriptions_of_none(self) -> None:
        """Configurations and forms that nobody has. `check` first: it reads the index whole."""
        for table, column in (("configurations", "configuration"), ("forms", "form")):
            self.rows(f"DELETE FROM {table} WHERE number NOT IN (SELECT {column} FROM adapters)")

    def rewrite(self) -> bool:
        """Write the file anew, so that nothing that was deleted is left in it.

        Returns:
            False if a reader is at it, who keeps the old pages alive.
        """
        self.rows("VACUUM")
        ((busy, _, _),) = self.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        return not busy


def check_texts(values: dict[str, str | bytes | int]) -> None:
    """Raises InputError for a text that would be refused when it is read."""
    for name, value in values.items():
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise InputError(f"{name!r} has {len(value):,} characters; a store keeps at most {MAX_TEXT:,}")


def named(key: bytes) -> str:
    """A key, for messages."""
    if key.startswith(SHARED):
        return f"the adapter {shown(key[1 + DIGEST :].decode(errors='replace'))} that lies under others"
    return f"the adapter of user {shown(key.decode(errors='replace'))}"
