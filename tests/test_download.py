"""Does a download end with the official file or with one line, whatever the server and the network do?"""

import hashlib
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from download import download
from raw_files import BadInput, RawFile

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GIT_BLOB = "5a3b3e21a7813bfa843f7b478ec655688eb94aed"     # git hash-object of CONTENT


class Server(ThreadingHTTPServer):
    """Serves CONTENT at /travel/posts.7z, on 127.0.0.1 alone. `asked` holds the Range of every request, or None."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"first"'
        self.ranges, self.says_length = True, True
        self.cut_after = None                              # bytes after which the connection is closed
        self.asked = []
        self.mirror = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, range_ = self.server, self.headers["Range"]
        server.asked.append(range_)
        if self.path != "/travel/posts.7z":
            return self.send_error(404)
        start = int(range_.removeprefix("bytes=").removesuffix("-")) if range_ and server.ranges else 0
        if self.headers["If-Range"] not in (None, server.etag):
            start = 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.says_length:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:server.cut_after])
        self.close_connection = True

    def log_message(self, *args):
        """Nothing: the test's output is the test's."""


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, tmp_path, **known):
    return download(RawFile("posts.7z", **known), tmp_path / "travel", mirror=server.mirror)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(server, tmp_path, after=100_000, **known):
    """A first run whose connection is closed after so many bytes."""
    server.cut_after = after
    with pytest.raises(BadInput, match=f"cut off after {after:,} bytes"):
        fetch(server, tmp_path, **known)
    server.cut_after = None


@pytest.mark.parametrize("known", [{}, {"size": len(CONTENT)}, {"sha256": SHA256}, {"git_blob": GIT_BLOB}])
def test_whole_file_and_nothing_else(server, tmp_path, known):
    assert "300,000 bytes from http://127.0.0.1" in fetch(server, tmp_path, **known)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert "already there" in fetch(server, tmp_path, **known)
    assert server.asked == [None]                          # what is there is not asked for again


def test_official_address(server, tmp_path):
    download(RawFile("posts.7z", url=f"{server.mirror}travel/posts.7z"), tmp_path)
    assert files_of(tmp_path) == {"posts.7z": CONTENT}


def test_cut_connection_is_resumed_where_it_ended(server, tmp_path):
    cut(server, tmp_path)
    assert not (tmp_path / "travel/posts.7z").exists()
    fetch(server, tmp_path, sha256=SHA256)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert server.asked == [None, "bytes=100000-"]


def test_cut_twice(server, tmp_path):
    cut(server, tmp_path, 100_000)
    cut(server, tmp_path, 200_000)
    fetch(server, tmp_path)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    cut(server, tmp_path)
    fetch(server, tmp_path)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}


@pytest.mark.parametrize("etag", ['"second"', None, 'W/"weak"'])
def test_parts_of_two_versions_are_never_joined(server, tmp_path, etag):
    """The file changes between two runs. Without a mark of the version nothing is resumed at all."""
    if etag != '"second"':
        server.etag = etag
    cut(server, tmp_path)
    server.content, server.etag = CONTENT[::-1], etag
    fetch(server, tmp_path)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT[::-1]}


def test_part_that_was_whole_already(server, tmp_path):
    cut(server, tmp_path)
    part = tmp_path / "travel/posts.7z.part"
    part.write_bytes(CONTENT)                              # as if the machine had stopped before the renaming
    fetch(server, tmp_path, sha256=SHA256)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}


def test_server_that_sends_another_range(server, tmp_path, monkeypatch):
    cut(server, tmp_path)
    monkeypatch.setattr(Handler, "send_header",
                        lambda self, name, value, send=BaseHTTPRequestHandler.send_header:
                        send(self, name, "bytes 7-9/10" if name == "Content-Range" else value))
    with pytest.raises(BadInput, match="another range than bytes 100000"):
        fetch(server, tmp_path)


WRONG = {"sha256": "0" * 64, "git_blob": "0" * 40, "size": 5}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("says_length", [True, False])
def test_another_file_than_the_official_one_is_not_kept(server, tmp_path, what, says_length):
    server.says_length = says_length
    with pytest.raises(BadInput, match="not the official file"):
        fetch(server, tmp_path, **{what: WRONG[what]})
    assert files_of(tmp_path / "travel") == {}


@pytest.mark.parametrize("what", WRONG)
def test_another_file_that_is_there_is_left_alone(server, tmp_path, what):
    fetch(server, tmp_path)
    with pytest.raises(BadInput, match=r"not the official file .* Move it away"):
        fetch(server, tmp_path, **{what: WRONG[what]})
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}


def test_missing_at_the_server(server, tmp_path):
    with pytest.raises(BadInput, match="404 Not Found"):
        download(RawFile("users.7z"), tmp_path / "travel", mirror=server.mirror)
    assert files_of(tmp_path / "travel") == {}


def test_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(BadInput, match=r"cannot be reached .*Connection refused") as error:
        download(RawFile("x", url=f"http://127.0.0.1:{port}/x"), tmp_path)
    assert "\n" not in str(error.value)


def test_addresses_other_than_http_are_refused(tmp_path):
    with pytest.raises(BadInput, match="not an http address"):
        download(RawFile("x", url="file:///etc/hostname"), tmp_path)


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "travel").write_text("a file")
    with pytest.raises(BadInput, match="cannot be read or written"):
        fetch(server, tmp_path)
