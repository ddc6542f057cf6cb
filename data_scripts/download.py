"""Raw files from their official addresses: resumed where they were cut off, checked, in place only when whole.

A file grows as `<name>.part` beside its place. When it has ended, its size and checksums are compared with what is
known of the official file; then it is fsynced and renamed. If the connection is cut, the part stays, and the next run
asks for the rest alone. The rest must be of the same version: `<name>.part.version` keeps the server's mark of it (a
strong ETag, or the date) for the header If-Range, so that a server whose file has changed sends all of it; so does one
that knows no ranges. Without such a mark nothing is resumed.

HTTP's ranges: RFC 9110, sections 13.1.5 and 14.
"""

import hashlib
import os
from collections.abc import Iterator
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from raw_files import BadInput, RawFile, Source, forms

TIMEOUT_S = 60                                           # of silence
CHUNK = 1 << 20                                          # bytes


def download_source(source: Source, raw: Path, mirror: str | None = None) -> Iterator[str]:
    """Downloads every file of the source that has an address; yields what is and was done, in lines. See `download`.

    What is there gzipped, as a `.subset`, or unpacked from the archive it comes in, is not fetched.
    """
    folder = raw / source.dataset
    for file in source.files:
        names = [name for official in (file.name, file.holds) if official for name in forms(official)]
        others = [name for name in names if name != file.name and (folder / name).exists()]
        if others and not (folder / file.name).exists():
            yield f"{folder / others[0]}: already there, so {file.name} is not fetched"
        elif file.url:
            if not (folder / file.name).exists():
                yield f"{folder / file.name}: fetching"
            yield download(file, folder, mirror)
        else:
            yield f"{folder / file.name}: no official address to fetch it from. {source.where_to_get(file.name)}"


def download(file: RawFile, folder: Path, mirror: str | None = None) -> str:
    """`file` lies in `folder`, whole and checked; or nothing is there but a part of it. Returns what was done.

    A file that is there is checked and left alone. With `mirror`, the address is MIRROR/<folder's name>/<file's name>.

    Raises:
        BadInput: the address cannot be reached, has no such file or is cut off; the file is not the official one.
    """
    url = f"{mirror.rstrip('/')}/{quote(folder.name)}/{quote(file.name)}" if mirror else file.url
    path = folder / file.name
    if not url.startswith(("https://", "http://")):
        raise BadInput(f"{url}: not an http address.")
    try:
        if path.exists():
            reason = _difference(file, path)
            if reason:
                raise BadInput(f"{path}: not the official file ({reason}). Move it away to download that one.")
            return f"{path}: already there"
        folder.mkdir(parents=True, exist_ok=True)
        part = _fetch(url, path, file.size)
        reason = _difference(file, part)
        if reason:
            _forget(path)
            raise BadInput(f"{url}: not the official file ({reason}). Nothing of it is kept.")
        part.rename(path)
        _forget(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read or written ({error.strerror}).") from None
    known = [name for name in ("size", "sha256", "git_blob") if getattr(file, name) is not None]
    return f"{path}: {path.stat().st_size:,} bytes from {url}; checked: {', '.join(known) or 'nothing is known of it'}"


def _fetch(url: str, path: Path, size: int | None) -> Path:
    """The part of `path`, grown to all that the server has."""
    part, version = _part(path), _version(path)
    start = part.stat().st_size if part.exists() and version.exists() else 0
    request = Request(url, headers={"User-Agent": "minipeft data_scripts"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version.read_text(encoding="latin-1"))
    try:
        response = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and start:                  # the part holds as much as there is, or more: start again
            _forget(path)
            return _fetch(url, path, size)
        raise BadInput(f"{url}: the server says {error.code} {error.reason}.") from None
    except (OSError, HTTPException) as error:
        raise BadInput(f"{url}: cannot be reached ({_cause(error)}).") from None
    with response:
        if response.status != 206:
            start = 0
        total = _total(url, response, start)
        if size is not None and total not in (None, size):
            raise BadInput(f"{url}: not the official file ({total:,} bytes, needed {size:,}).")
        if not start:
            _forget(path)
            mark = _mark(response.headers)
            if mark:
                version.write_text(mark, encoding="latin-1")
        with open(part, "ab") as out:
            cause = _copy(response, out)
            os.fsync(out.fileno())
    num_bytes = part.stat().st_size
    if cause or (total is not None and num_bytes < total):
        raise BadInput(f"{url}: cut off after {num_bytes:,} bytes ({cause or 'connection closed'}). Run the same "
                       "command again for the rest.")
    return part


def _copy(response: HTTPResponse, out) -> str:
    """Writes what comes; returns why it ended before its time, or nothing. HTTP/1.0 may end so without a word."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, HTTPException) as error:
            return _cause(error)
        if not chunk:
            out.flush()
            return ""
        out.write(chunk)


def _total(url: str, response: HTTPResponse, start: int) -> int | None:
    """The size of the whole file as the server has it, if it says."""
    if response.status == 206:
        range_, _, total = response.headers.get("Content-Range", "").partition("/")
        if not range_.startswith(f"bytes {start}-"):
            raise BadInput(f"{url}: the server sent another range than bytes {start} and on.")
        return int(total) if total.isdecimal() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _mark(headers: Message) -> str:
    """What tells this version of the file from others: weak ETags do not, byte by byte."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _difference(file: RawFile, path: Path) -> str:
    """How the bytes of `path` are not those known of `file`; nothing if they are."""
    size = path.stat().st_size
    if file.size not in (None, size):
        return f"{size:,} bytes, needed {file.size:,}"
    sha256, git_blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
    if file.sha256 or file.git_blob:
        with open(path, "rb") as content:
            while chunk := content.read(CHUNK):
                sha256.update(chunk)
                git_blob.update(chunk)
    if file.sha256 not in (None, sha256.hexdigest()):
        return f"sha256 {sha256.hexdigest()}, needed {file.sha256}"
    if file.git_blob not in (None, git_blob.hexdigest()):
        return f"git blob {git_blob.hexdigest()}, needed {file.git_blob}"
    return ""


def _cause(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _version(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.version")


def _forget(path: Path) -> None:
    _part(path).unlink(missing_ok=True)
    _version(path).unlink(missing_ok=True)
