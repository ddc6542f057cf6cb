"""A web server on 127.0.0.1 for tests, of files in memory, which can misbehave as servers and networks do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files`, {path: content}. `asked` holds (path, Range or None) of every request."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.etag = files, '"first"'
        self.ranges, self.says_length = True, True
        self.cut_after: int | None = None                # bytes after which the connection is closed
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, range_ = self.server, self.headers["Range"]
        server.asked.append((self.path, range_))
        if self.path not in server.files:
            return self.send_error(404)
        content = server.files[self.path]
        start = int(range_.removeprefix("bytes=").removesuffix("-")) if range_ and server.ranges else 0
        if self.headers["If-Range"] not in (None, server.etag):
            start = 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:server.cut_after])
        self.close_connection = True

    def log_message(self, *args):
        """Nothing: the test's output is the test's."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    with Server(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
