"""Does a download end with the official file or with one line, whatever the server and the network do?"""

import hashlib
import random
import socket

import pytest
from download import download
from file_server import Handler, serving
from raw_files import BadInput, RawFile

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GIT_BLOB = "5a3b3e21a7813bfa843f7b478ec655688eb94aed"     # git hash-object of CONTENT
PATH = "/travel/posts.7z"


@pytest.fixture
def server():
    with serving({PATH: CONTENT}) as server:
        yield server


def fetch(server, tmp_path, **known):
    return download(RawFile("posts.7z", **known), tmp_path / "travel", mirror=server.url)


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
    done = fetch(server, tmp_path, **known)
    assert "300,000 bytes from http://127.0.0.1" in done
    assert done.endswith(f"checked: {', '.join(known) or 'nothing is known of it'}")
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert "already there" in fetch(server, tmp_path, **known)
    assert server.asked == [(PATH, None)]                          # what is there is not asked for again


def test_official_address(server, tmp_path):
    download(RawFile("posts.7z", url=f"{server.url}travel/posts.7z"), tmp_path)
    assert files_of(tmp_path) == {"posts.7z": CONTENT}


def test_cut_connection_is_resumed_where_it_ended(server, tmp_path):
    cut(server, tmp_path)
    assert not (tmp_path / "travel/posts.7z").exists()
    fetch(server, tmp_path, sha256=SHA256)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert server.asked == [(PATH, None), (PATH, "bytes=100000-")]


def test_cut_twice(server, tmp_path):
    cut(server, tmp_path, 100_000)
    cut(server, tmp_path, 200_000)
    fetch(server, tmp_path)
    assert files_of(tmp_path / "travel") == {"posts.7z": CONTENT}
    assert server.asked == [(PATH, None), (PATH, "bytes=100000-"), (PATH, "bytes=200000-")]


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
    server.files[PATH], server.etag = CONTENT[::-1], etag
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
                        lambda self, name, value, send=Handler.send_header:
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
        download(RawFile("users.7z"), tmp_path / "travel", mirror=server.url)
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
