"""A loopback server that fails in the ways that real ones do."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FaultyServer(ThreadingHTTPServer):
    """Serves `content` at every path, with the faults that its attributes name.

    Attributes:
        ranges: whether Range requests are answered with 206.
        statuses: answers to the next requests instead of the content, one each.
        cuts: bytes after which the next answers break off, one each.
        wrong_range: answer a Range request with 206 and the first bytes.
        ranges_asked: the Range header of each request so far, None where there was none.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = b""
        self.ranges = True
        self.statuses: list[int] = []
        self.cuts: list[int] = []
        self.wrong_range = False
        self.redirect_to: str | None = None
        self.silent = threading.Event()
        self.ranges_asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges_asked.append(asked)
        if server.silent.is_set():
            threading.Event().wait(3)
            return
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if server.redirect_to:
            self.send_response(302)
            self.send_header("Location", server.redirect_to)
            self.end_headers()
            server.redirect_to = None
            return
        start = 0
        if asked and server.wrong_range:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 0-{len(server.content) - 1}/{len(server.content)}")
        elif asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer() as faulty:
        threading.Thread(target=faulty.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield faulty
        faulty.shutdown()


@pytest.fixture
def dead_url(monkeypatch):
    """An address that refuses connections."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer() as closed:
        return closed.url
