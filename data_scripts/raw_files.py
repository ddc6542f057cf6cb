"""Raw files, read row by row: which file is there, is it whole, and what to do with a row that cannot be used.

A reader asks for a file by its official name `<stem>.<ending>`; where that is missing, `<stem>.subset.<ending>` is
read. Either may also be gzipped, with `.gz` after its name. Files are streamed, so that memory does not grow with them,
and hashed on the way. A byte order mark is dropped; line ends, inside quoted texts too, become "\\n" unless a reader
asks for texts as they are.

What concerns the whole file (absent, cut off, a missing column, the wrong delimiter) always stops with a `BadInput`. A
row that cannot be used stops as well or, with `--skip-bad`, is counted and left out. No message quotes a text.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from xml.etree.ElementTree import Element, ParseError, XMLPullParser
from xml.parsers.expat import ErrorString

_NOT_UTF8 = re.compile("[\udc80-\udcff]")                # what the error handler `surrogateescape` makes of such a byte


_SURROGATE = re.compile("[\ud800-\udfff]")               # half a character, which JSON can spell but no file can hold
LONE_SURROGATE = "a string with half a character (a lone surrogate)"


class BadInput(ValueError):
    """What was given cannot be used. The message is one line for the person who gave it."""


class Absent(BadInput):
    """A raw file is not there. The message says where to get it."""


@dataclass(frozen=True)
class RawFile:
    """An official raw file, as far as it is known: bytes, a checksum, and where it can be had."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None                          # as `git hash-object` prints it
    url: str | None = None
    holds: str | None = None                             # of an archive: the file that is needed of it, and the
    unpack: str | None = None                            # command that takes it out; a .tar.gz is read as it is


@dataclass(frozen=True)
class Source:
    """Where tasks come from. `dataset` is the folder of the raw files, `tasks` the names of the tasks made of them."""

    dataset: str
    tasks: tuple[str, ...]
    files: tuple[RawFile, ...]
    licence: str
    homepage: str
    citation: str
    note: str = ""

    def where_to_get(self, name: str) -> str:
        """One sentence for the person who lacks this file."""
        files = [file for file in self.files if name in (file.name, file.name.removesuffix(".gz"), file.holds)]
        place = next((file.url for file in files if file.url), self.homepage)
        unpack = next((f", to be unpacked with `{file.unpack}`" for file in files if file.unpack), "")
        return f"It comes from {place}{unpack} (licence: {self.licence})."


def subset_name(name: str) -> str:
    """What a file of the same layout and fewer rows is called: "data.csv" -> "data.subset.csv"."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.subset.{ending}"


def forms(name: str) -> tuple[str, ...]:
    """The names under which a raw file is looked for, the official one first."""
    return name, f"{name}.gz", subset_name(name), f"{subset_name(name)}.gz"


class RawFiles:
    """The raw files of one source in the folder RAW/<dataset>. What was read, and how, is kept for task.json.

    `sha256` is {"dataset/file": hex digest} of the files as they lie there, complete once a file is read to its end;
    `subset` says whether a `.subset` file was among them; `bad_rows` counts rows left out, by reason.
    """

    def __init__(self, raw: Path, source: Source, skip_bad: bool = False):
        self.source = source
        self.folder = raw / source.dataset
        self.skip_bad = skip_bad
        self.sha256: dict[str, str] = {}
        self.subset = False
        self.bad_rows: Counter[str] = Counter()
        if not self.folder.is_dir():
            raise Absent(f"{self.folder}: no such folder. --raw must be the folder that holds '{source.dataset}'. "
                         f"{source.where_to_get('')}")

    def bad(self, where: str, reason: str) -> None:
        """Stops, or with `--skip-bad` counts the row at `where` and returns: the reader goes on to the next row.

        `reason` must not name the row or quote it: rows are counted by it.
        """
        if not self.skip_bad:
            self._stop(where, reason)
        self.bad_rows[reason] += 1

    @staticmethod
    def _stop(where: str, reason: str) -> None:
        raise BadInput(f"{where}: {reason}.")

    def read_csv(self, name: str, columns: Iterable[str], delimiter: str = ",",
                 filled: Collection[str] = (), line_ends_as_they_are: bool = False,
                 ) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, {column: value}) of every row; `where` is for `bad`.

        Args:
            columns: those that will be used; there may be others.
            filled:  those of them that must hold more than blanks, or the row is bad.
            line_ends_as_they_are: inside quoted texts "\\r\\n" and "\\r" stay, as pandas leaves them.
        Raises:
            BadInput: one of `columns` is missing, a column comes twice, or there is no row that can be used.
        """
        path = self._find(name)
        rows = self._rows(path, delimiter, newline="" if line_ends_as_they_are else None)
        where, header = next(rows, (f"{path}, line 1", []))
        self._check_header(where, header, columns, delimiter)
        if len(set(header)) < len(header):
            raise BadInput(f"{where}: two columns have the same name.")
        for where, row in self._whole_rows(path, header, rows, [header.index(column) for column in filled]):
            yield where, dict(zip(header, row))

    def read_rows(self, name: str, columns: Mapping[int, str], delimiter: str,
                  filled: Collection[int] = ()) -> Iterator[tuple[str, list[str]]]:
        """(where, fields) of every row of a file that is read by position.

        `columns` is {position: name} of the fields that will be used: the header must have these names there. `filled`
        are positions; they and errors are as in `read_csv`, but other columns may share a name.
        """
        path = self._find(name)
        rows = self._rows(path, delimiter)
        where, header = next(rows, (f"{path}, line 1", []))
        self._check_header(where, header, columns.values(), delimiter)
        for position, name in columns.items():
            if position >= len(header) or header[position] != name:
                raise BadInput(f"{where}: column {position} must be {name!r}, which is column "
                               f"{header.index(name)} here (counted from 0).")
        yield from self._whole_rows(path, header, rows, filled)

    def read_json(self, name: str) -> tuple[str, Any]:
        """(where, value) of a JSON file. Of a key that comes twice in an object, the first is a bad row."""
        path = self._find(name)
        with self._open(path) as file:
            text = file.read()
        try:
            value, num_repeated = _parse_json(text)
        except _NotJSON as error:
            raise BadInput(f"{path}, line {error.line}: {error.reason}.") from None
        for _ in range(num_repeated):
            self.bad(str(path), "a key comes twice in an object, so that only the last counts")
        return str(path), value

    def read_json_lines(self, name: str) -> Iterator[tuple[str, Any]]:
        """(where, value) of every line of a file of JSON lines."""
        path = self._find(name)
        num_rows = 0
        with self._open(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                try:
                    value, num_repeated = _parse_json(line)
                except _NotJSON as error:
                    self.bad(where, error.reason)
                    continue
                if num_repeated:
                    self.bad(where, "a key comes twice in an object")
                    continue
                if "\\u" in line and has_lone_surrogate(value):
                    self.bad(where, LONE_SURROGATE)
                    continue
                num_rows += 1
                yield where, value
        if not num_rows:
            raise BadInput(f"{path}: no line that can be used.")

    def read_xml(self, name: str, root: str, tag: str) -> Iterator[tuple[str, dict[str, str]]]:
        """(where, attributes) of every element <tag> in an XML file whose outermost element is <root>."""
        path = self._find(name)
        number = 0
        with self._open(path) as file:
            for number, element in enumerate(_xml_elements(path, file, root, tag), start=1):
                yield f"{path}, <{tag}> {number}", {
                    name: value.replace("\r\n", "\n").replace("\r", "\n") for name, value in element.items()
                }
        if not number:
            raise BadInput(f"{path}: no <{tag}>.")

    def read_parquet(self, name: str, columns: Collection[str],
                     filled: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, {column: value}) of every row of a Parquet file; values have the types that they have there.

        Needs pyarrow, which the scripts do without otherwise. `filled` and errors are as in `read_csv`.
        """
        path = self._find(name)
        try:                                             # the only thing here that the standard library cannot read
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise BadInput(f"{path}: Parquet needs pyarrow. Run `pip install pyarrow`.") from None
        try:
            with open(path, "rb") as file, parquet.ParquetFile(file) as table:
                missing = [column for column in columns if column not in table.schema_arrow.names]
                if missing:
                    raise BadInput(f"{path}: missing column {', '.join(map(repr, missing))}.")
                rows = (row for batch in table.iter_batches(columns=list(columns)) for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    blank = [column for column in filled if row[column] is None or not str(row[column]).strip()]
                    if blank:
                        self.bad(f"{path}, row {number}", f"column {blank[0]!r} is empty")
                        continue
                    yield f"{path}, row {number}", row
                file.seek(0)
                self.sha256[f"{self.folder.name}/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
        except pyarrow.ArrowException as error:
            raise BadInput(f"{path}: not a whole Parquet file ({type(error).__name__}). Copy it again.") from None

    def has(self, name: str) -> bool:
        """Whether this file is there, in any of its `forms`."""
        return any((self.folder / form).exists() for form in forms(name))

    def _find(self, name: str) -> Path:
        """The first of its `forms` that is there, or the .tar.gz that holds it."""
        archives = [file.name for file in self.source.files if file.holds == name and file.name.endswith(".tar.gz")]
        for path in (self.folder / form for form in (*forms(name), *archives)):
            if path.exists():
                self.subset |= path.name in forms(name)[2:]
                return path
        raise Absent(f"{self.folder / name}: No such file nor {subset_name(name)!r}, plain or with .gz. "
                     f"{self.source.where_to_get(name)}")

    @contextmanager
    def _open(self, path: Path, newline: str | None = None) -> Iterator[TextIO]:
        """The file as text. A byte that is not UTF-8 becomes a character of `_NOT_UTF8`, for the reader to find.

        `newline` is that of `open`.
        """
        try:
            with open(path, "rb", buffering=0) as file:
                hashed = _Hashed(file)
                content = io.BufferedReader(hashed, 1 << 20)
                if path.suffix == ".gz":
                    content = gzip.GzipFile(fileobj=content)
                if path.name.endswith(".tar.gz"):
                    content = self._member(path, content)
                yield io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
                self.sha256[f"{self.folder.name}/{path.name}"] = hashed.sha256.hexdigest()
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise BadInput(f"{path}: not a whole gzip file. Copy it again.") from None
        except tarfile.TarError:
            raise BadInput(f"{path}: not a whole tar archive. Copy it again.") from None
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}.") from None

    def _member(self, path: Path, content: BinaryIO) -> BinaryIO:
        """The file that is needed of this tar archive, in whatever folder it lies there. All of it is in memory."""
        wanted = next(file.holds for file in self.source.files if file.name == path.name)
        archive = tarfile.open(fileobj=content, mode="r|")
        for member in archive:
            if member.isfile() and Path(member.name).name == wanted:
                found = io.BytesIO(archive.extractfile(member).read())
                while content.read(1 << 20):             # to the archive's end, for its sha256
                    pass
                return found
        raise BadInput(f"{path}: holds no {wanted!r}.")

    def _rows(self, path: Path, delimiter: str, newline: str | None = None) -> Iterator[tuple[str, list[str]]]:
        """(where, fields) of the header and every row. A quoted text may span lines: a row is named by its first.

        Strict about quotes: after a closing one must come a delimiter or the line's end, for otherwise a stray quote
        would swallow all rows up to the next quote. After such a row the next line is tried as a row.
        """
        with self._open(path, newline) as file:
            lines = _Lines(file)
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            bad = self._stop                             # for the header; of a row, `self.bad` says what to do
            while True:
                where = f"{path}, line {lines.start_row()}"
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    bad(where, "a quote is opened and never closed" if lines.ended else
                        f"not readable as CSV ({error})")
                    lines.read_again()
                    continue
                if _NOT_UTF8.search(delimiter.join(row)):
                    bad(where, "not UTF-8")
                    continue
                yield where, row
                bad = self.bad

    def _whole_rows(self, path: Path, header: list[str], rows: Iterable[tuple[str, list[str]]],
                    filled: Collection[int]) -> Iterator[tuple[str, list[str]]]:
        """The rows that have as many fields as the header. Empty lines at the file's end are no rows."""
        num_rows = 0
        empty = []                                       # where lines were empty since the last row
        for where, row in rows:
            if not row:
                empty.append(where)
                continue
            for line in empty:
                self.bad(line, f"a row of 0 fields, but the header has {len(header)}")
            empty.clear()
            if len(row) != len(header):
                self.bad(where, f"a row of {len(row)} fields, but the header has {len(header)}")
                continue
            blank = [header[position] for position in filled if not row[position].strip()]
            if blank:
                self.bad(where, f"column {blank[0]!r} is empty")
                continue
            num_rows += 1
            yield where, row
        if not num_rows:
            raise BadInput(f"{path}: no rows below the header that can be used.")

    def _check_header(self, where: str, header: list[str], columns: Iterable[str], delimiter: str) -> None:
        missing = [column for column in columns if column not in header]
        if not missing:
            return
        message = f"{where}: missing column {', '.join(map(repr, missing))}"
        others = [other for other in ",\t;|" if len(header) == 1 and other in header[0]]
        if others:
            message += f"; needed columns separated by {delimiter!r}, but the only one there seems to be several "\
                       f"separated by {others[0]!r}"
        raise BadInput(message + ".")


class _Hashed(io.RawIOBase):
    """A file read from front to end, with the sha256 of what was read so far."""

    def __init__(self, file: io.FileIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self.file.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:size])
        return size


class _Lines:
    """A file's lines for a CSV reader; those of a row that cannot be read can be read again, but for its first."""

    def __init__(self, file: TextIO):
        self.file = file
        self.row: list[str] = []                         # the lines of the row that is being read
        self.again: deque[str] = deque()
        self.number = 0                                  # of the last line read, counted from 1
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.file, "")
        self.ended = not line
        if self.ended:
            raise StopIteration
        self.row.append(line)
        self.number += 1
        return line

    def start_row(self) -> int:
        """The number of the line that comes next, the first of a row."""
        self.row.clear()
        return self.number + 1

    def read_again(self) -> None:
        rest = self.row[1:]
        self.again.extendleft(reversed(rest))
        self.number -= len(rest)


def _xml_elements(path: Path, file: TextIO, root: str, tag: str) -> Iterator[Element]:
    """Every element <tag> inside the outermost element <root>, each forgotten when the next is asked for."""
    parser = XMLPullParser(("start", "end"))
    outermost = None
    try:
        while chunk := file.read(1 << 16):
            if _NOT_UTF8.search(chunk):
                raise BadInput(f"{path}: not UTF-8.")
            parser.feed(chunk)
            for event, element in parser.read_events():
                if outermost is None:
                    outermost = element
                    if element.tag != root:
                        raise BadInput(f"{path}: needed <{root}> as the outermost element.")
                if event == "end" and element.tag == tag:
                    yield element
                    outermost.clear()
        parser.close()
    except ParseError as error:                          # its message may quote the text
        reason = ErrorString(error.code)
        raise BadInput(f"{path}, line {error.position[0]}: not well-formed XML ({reason}).") from None


def has_lone_surrogate(value: Any) -> bool:
    """Whether any string in this JSON value cannot be written as UTF-8."""
    return bool(_SURROGATE.search(json.dumps(value, ensure_ascii=False)))


class _NotJSON(ValueError):
    """A text that is not one JSON value: why, and on which of its lines."""

    def __init__(self, reason: str, line: int = 1):
        self.reason, self.line = reason, line


def _parse_json(text: str) -> tuple[Any, int]:
    """The value, and how many of its objects' keys a later equal one replaced."""
    num_repeated = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_repeated
        own = dict(pairs)
        num_repeated += len(pairs) - len(own)
        return own

    undecoded = _NOT_UTF8.search(text)
    if undecoded:
        raise _NotJSON("not UTF-8", text.count("\n", 0, undecoded.start()) + 1)
    try:
        return json.loads(text, object_pairs_hook=once), num_repeated
    except json.JSONDecodeError as error:                # its msg does not quote the text
        raise _NotJSON(f"not JSON ({error.msg})", error.lineno) from None
    except (RecursionError, ValueError):
        raise _NotJSON("JSON that is too deep or holds too large a number") from None
