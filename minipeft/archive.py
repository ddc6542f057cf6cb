"""An archive: rows of bytes by key, in shards with an index, safe from whatever happens to the writer.

    FOLDER/index.sqlite        who has a row, and where (index.py)
    FOLDER/shards/             the rows (shards.py)
    FOLDER/writer.lock         who writes; held for each write

**Writing.** Rows of one configuration that come together become a shard: written under a temporary name, fsynced,
renamed, the folder fsynced. Then one transaction enters them into the index. A row is there when that has ended, and
not before, so a reader sees it whole or not at all. Rows that are too few for a shard wait in the index itself, by
the same transaction, until there are MAX_WAITING bytes of them: a million single rows make no million files.

**A writer that dies** leaves at most shards that no index names; the next one removes them. Deleted and replaced rows
stay in their shards until `compact`.

**Readers** take no lock. A shard never changes, and the index names it until its rows have moved. A reader that finds a
shard or a description gone looks the row up again; one that has the shard mapped reads on.
"""

import resource
import sys
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from minipeft.errors import InputError
from minipeft.index import MAX_WIDTH, Configuration, Entry, Form, Index, ShardEntry, named, only_writer
from minipeft.models.checkpoint import sync
from minipeft.models.fields import shown
from minipeft.shards import KINDS, MAX_BYTES, Exhausted, Shard, check_folder, remove_others, shard_path, write_shard

MAX_WAITING = 4 << 20  # bytes of a configuration's rows that wait for a shard
MAX_MAPPED = 1024  # shards that a reader keeps open: addresses, no memory. Fewer where few files may be open
FAULT = 64 << 10  # bytes of a file that become memory of the process when one of them is read
MAX_TOUCHED = 16 << 20  # bytes that do so before they are given back
Read = TypeVar("Read")  # what is made of an entry
MOVE = "UPDATE adapters SET shard = ?, row = ? WHERE id = ?"
PUT = """INSERT INTO adapters VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (id) DO UPDATE SET
         configuration = excluded.configuration, shard = excluded.shard, row = excluded.row,
         checksum = excluded.checksum, version = version + 1, form = excluded.form, numbers = excluded.numbers"""


class Item(NamedTuple):
    """A row to be put. data: its bytes. form: the number of the metrics' form, and `numbers` those of the metrics."""

    key: bytes
    data: bytes | np.ndarray
    form: int
    numbers: bytes


class Compacted(NamedTuple):
    """What `compact` did.

    shards_before, shards_after: how many there were, and are. rows_removed: of deleted and replaced users. erased:
    whether the index, too, holds nothing of them any more; a reader that is at it keeps its old pages.
    """

    shards_before: int
    shards_after: int
    rows_removed: int
    erased: bool


def may_map() -> int:
    """How many shards a reader may keep open: a quarter of the files that the process may have open, at most
    MAX_MAPPED."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_MAPPED if limit == resource.RLIM_INFINITY else min(MAX_MAPPED, max(1, limit // 4))


class Archive:
    """The rows of a folder. timeout: seconds to wait for another writer.

    about: what the caller wrote when it was made. kind: how its numbers lie (shards.KINDS), which is about["rows"].

    Raises:
        InputError: from every method, if the folder is not what this file says.
    """

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        self.index = Index(folder)
        self.about = self.index.about()
        self.kind = self.about.get("rows")
        if self.kind not in KINDS:
            raise InputError(f"{self.index.path} is damaged: its rows are {shown(self.kind)}, needed one of "
                             f"{', '.join(KINDS)}")  # fmt: skip
        self._shards = folder / "shards"
        self._mapped: OrderedDict[int, tuple[int, Shard]] = OrderedDict()
        self._may_map = may_map()
        self._touched = 0
        self._configurations: dict[int, Configuration] = {}  # numbers are never given twice
        self._forms: dict[int, Form] = {}
        self._seeds: dict[tuple[int, int], int] = {}
        self._is_clean = False

    @staticmethod
    def make(folder: Path, about: dict[str, str], timeout: float) -> None:
        """The folder and its files, if they are not there."""
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder, timeout):
            (folder / "shards").mkdir(exist_ok=True)
            check_folder(folder / "shards")
            Index(folder, create=about).close()
            sync(folder)
            sync(folder.absolute().parent)

    def close(self) -> None:
        self.index.close()
        self._mapped.clear()

    # ---- Reading

    def configuration(self, number: int) -> Configuration:
        if number not in self._configurations:
            self._configurations[number] = self.index.configuration(number)
        return self._configurations[number]

    def form(self, number: int) -> Form:
        if number not in self._forms:
            self._forms[number] = self.index.form(number)
        return self._forms[number]

    def read(self, entry: Entry, what: Callable[[Entry], Read]) -> Read:
        """what(entry), which reads what the index says of a row; what(its new entry) if somebody has moved or replaced
        the row meanwhile, so that something was not there any more.

        Raises:
            KeyError: somebody has deleted it meanwhile.
            InputError: what `what` raises.
        """
        while True:
            try:
                return what(entry)
            except InputError:
                now = self.index.entry(entry.key)
                if now is None:
                    raise KeyError(entry.key) from None
                if now == entry:
                    raise
                entry = now

    def row(self, entry: Entry) -> np.ndarray:
        """A row's bytes, uint8, read-only: no copy, however long a row the index says it is.

        Raises:
            InputError: it is damaged, or not there any more; names shard and row.
        """
        data = self._bytes(entry)
        if data is None or self._checksum(entry.configuration, entry, self._pieces(data)) != entry.checksum:
            where = f"shard {entry.shard}, row {entry.row}" if entry.shard else "waiting in the index"
            what = "its row is gone" if data is None else "its checksum is not that of the index"
            raise InputError(f"{self.folder}: {named(entry.key)} is damaged ({where}): {what}; train or import it "
                             "again, or delete it")  # fmt: skip
        return data

    def _bytes(self, entry: Entry) -> np.ndarray | None:
        """None: the row is not where the entry says, or not any more."""
        if entry.shard == 0:
            data = self.index.waiting_row(entry.key)
            fits = data is not None and len(data) == self._row_bytes(entry.configuration)
            return np.frombuffer(data, np.uint8) if fits else None
        configuration, shard = self._shard(entry.shard)
        if shard is None or configuration != entry.configuration or not 0 <= entry.row < shard.n:
            return None
        return shard.row(entry.row)

    def _pieces(self, row: np.ndarray) -> Iterator[np.ndarray]:
        """A row, piece by piece. What of shards becomes memory as they are read is given back now and then."""
        for start in range(0, len(row), MAX_TOUCHED):
            piece = row[start : start + MAX_TOUCHED]
            yield piece
            self._touched += max(len(piece), FAULT)
            if self._touched >= MAX_TOUCHED:
                for _, shard in self._mapped.values():
                    shard.forget()
                self._touched = 0

    def _row_bytes(self, configuration: int) -> int:
        return self.configuration(configuration).width * KINDS[self.kind][1]

    def _shard(self, number: int) -> tuple[int, Shard | None]:
        """Its configuration's number, and None if there is no such shard, or not any more."""
        if number not in self._mapped:
            listed = self.index.shard(number)
            if listed is None:
                return 0, None
            width = self.configuration(listed.configuration).width
            while len(self._mapped) >= self._may_map:
                self._mapped.popitem(last=False)
            try:
                shard = self._map(shard_path(self._shards, number), listed.n, width)
            except FileNotFoundError:
                return 0, None
            self._mapped[number] = listed.configuration, shard
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _map(self, path: Path, n: int, width: int) -> Shard:
        """`Shard`; if the system has no room for it, once more without all the others."""
        try:
            return Shard(path, n, width, self.kind)
        except Exhausted:
            self._mapped.clear()
            return Shard(path, n, width, self.kind)

    def _checksum(self, configuration: int, of: Entry | Item, row: Iterable[bytes | np.ndarray]) -> int:
        """crc32 of all that makes an adapter: configuration, metrics, id and the row's pieces.

        Every error of up to 32 bits in a row is found, and all but one in 4 * 10^9 of the others. It keeps no enemy
        away, who could write the index as well.
        """
        if (configuration, of.form) not in self._seeds:
            parts = (*self.configuration(configuration)[1:], *self.form(of.form)[1:])
            self._seeds[configuration, of.form] = zlib.crc32(repr(parts).encode())
        checksum = zlib.crc32(of.key + of.numbers, self._seeds[configuration, of.form])
        for piece in row:
            checksum = zlib.crc32(piece, checksum)
        return checksum - (1 << 31)  # signed: SQLite keeps it in 4 bytes

    # ---- Writing

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The only writer, in a folder without what a dead one left."""
        with only_writer(self.folder, self.timeout):
            try:
                if not self._is_clean:
                    remove_others(self._shards, {shard.number for shard in self.index.shards()})
                self._is_clean = False  # unless all of this ends well
                yield
                self._is_clean = True
            except OSError as error:
                raise InputError(f"{self.folder} cannot be written ({error.strerror}); what was stored before is "
                                 "whole") from None  # fmt: skip
            finally:
                if not self._is_clean:  # numbers that were taken back are given again
                    for known in (self._configurations, self._forms, self._seeds):
                        known.clear()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything put and deleted inside is on disk when it ends, or nothing is."""
        with self._locked(), self.index.transaction():
            yield

    def configuration_number(self, method: str, layout: str, under: bytes, width: int) -> int:
        """InputError: rows that are too long, which `configuration` would refuse."""
        if width > MAX_WIDTH:
            raise InputError(f"an adapter has {width:,} numbers; a store keeps at most {MAX_WIDTH:,} of each")
        return self.index.number_of("configurations", method=method, layout=layout, under=under, width=width)

    def form_number(self, skeleton: str, codes: str) -> int:
        return self.index.number_of("forms", skeleton=skeleton, codes=codes)

    def put(self, configuration: int, items: Sequence[Item]) -> None:
        """Enter rows of one configuration; they replace earlier ones of the same keys. Inside `writing`."""
        items = sorted(items, key=lambda item: item.key)  # neighbours in the index, written together
        if self.index.rows("SELECT 1 FROM waiting LIMIT 1"):
            self.index.write("DELETE FROM waiting WHERE id = ?", [(item.key,) for item in items])
        may_wait = MAX_WAITING // self._row_bytes(configuration)
        if self.index.num_waiting(configuration, at_most=may_wait) + len(items) <= may_wait:
            places = [(0, 0)] * len(items)
            self.index.write("INSERT OR REPLACE INTO waiting VALUES (?, ?, ?)",
                             [(item.key, configuration, item.data) for item in items])  # fmt: skip
        else:
            waiting = self.index.waiting_rows(configuration, self._row_bytes(configuration), at_most=may_wait + 1)
            rows = [row for _, row in waiting] + [item.data for item in items]
            places = self._write_shards(configuration, len(rows), rows)
            self.index.write(MOVE, [(*place, key) for place, (key, _) in zip(places, waiting)])
            self.index.write("DELETE FROM waiting WHERE id = ?", [(key,) for key, _ in waiting])
            places = places[len(waiting) :]
        self.index.write(PUT, ((item.key, configuration, *place, self._checksum(configuration, item, [item.data]),
                                item.form, item.numbers) for item, place in zip(items, places)))  # fmt: skip

    def _write_shards(
        self, configuration: int, num_rows: int, rows: Iterable[bytes | np.ndarray]
    ) -> list[tuple[int, int]]:
        """New shards of these rows, on disk. Returns each row's (shard, row)."""
        width, capacity, places = self.configuration(configuration).width, self._capacity(configuration), []
        rows = iter(rows)
        for first in range(0, num_rows, capacity):
            n = min(capacity, num_rows - first)
            number = self.index.insert("shards", configuration=configuration, n=n)
            write_shard(shard_path(self._shards, number), n, width, self.kind, islice(rows, n))
            places += [(number, i) for i in range(n)]
        sync(self._shards)
        return places

    def _capacity(self, configuration: int) -> int:
        """Rows of a full shard."""
        return max(1, MAX_BYTES // self._row_bytes(configuration))

    def delete(self, key: bytes) -> None:
        """Forget a row; its bytes stay until `compact`. Inside `writing`."""
        for table in ("adapters", "waiting"):
            self.index.write(f"DELETE FROM {table} WHERE id = ?", [(key,)])

    # ---- Tidying up

    def compact(self) -> Compacted:
        """Remove what was deleted and replaced, and make few full shards of many small ones.

        A shard's live rows are copied to a new one, which the index names from then on; then the old one is removed. So
        wherever this is stopped the archive is whole. It needs room for one shard more, and then for the index, with
        the rows that wait, once more, and once in the system's folder for temporary files. Readers may go on.

        Raises:
            InputError: the index, or a row that would be copied, is damaged.
        """
        self._is_clean = False  # another writer may have been killed as it removed shards
        with self._locked():
            self.index.check()
            with self.index.transaction():
                self.index.delete_adapters_under_none()
            before = list(self.index.shards())
            live = self.index.num_live()
            sources = self._to_rewrite(before, live)
            numbers = {shard.number for shard in sources}
            moving = (entry for entry in self.index.located() if entry.shard in numbers)
            for configuration, entries in groupby(moving, key=lambda entry: entry.configuration):
                while chunk := list(islice(entries, self._capacity(configuration))):
                    with self.index.transaction():
                        places = self._write_shards(configuration, len(chunk), map(self.row, chunk))
                        self.index.write(MOVE, [(*place, entry.key) for place, entry in zip(places, chunk)])
                    self._remove(sources, up_to=(configuration, chunk[-1].shard))
            self._remove(sources)
            with self.index.transaction():
                self.index.delete_descriptions_of_none()
            sync(self._shards)  # what was removed stays so
            rows_removed = sum(shard.n - live.get(shard.number, 0) for shard in before)
            return Compacted(len(before), len(list(self.index.shards())), rows_removed, self.index.rewrite())

    def _to_rewrite(self, shards: Sequence[ShardEntry], live: dict[int, int]) -> deque[ShardEntry]:
        """Those with rows that nobody has any more, and those that are not full if a configuration has several."""
        sources = []
        for configuration, group in groupby(sorted(shards, key=itemgetter(1, 0)), key=itemgetter(1)):
            capacity, own = self._capacity(configuration), list(group)
            partial = [shard for shard in own if live.get(shard.number, 0) < capacity]
            dead = [shard for shard in own if live.get(shard.number, 0) < shard.n]
            sources += partial if len(partial) > 1 else dead
        return deque(sources)

    def _remove(self, shards: deque[ShardEntry], up_to: tuple[int, int] = (sys.maxsize, 0)) -> None:
        """Remove the first of these, up to a configuration and shard: their rows have moved."""
        gone = []
        while shards and (shards[0].configuration, shards[0].number) < up_to:
            gone.append(shards.popleft().number)
        with self.index.transaction():
            self.index.write("DELETE FROM shards WHERE number = ?", [(number,) for number in gone])
        for number in gone:
            shard_path(self._shards, number).unlink(missing_ok=True)
            self._mapped.pop(number, None)
