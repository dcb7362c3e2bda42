"""A web server over a folder, or before another server, that fails as networks and object stores do."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("error", "reset", "cut", "short", "stall")


class FlakyServer(ThreadingHTTPServer):
    """`share` of the answers to GET and HEAD are one of `faults`:

    error: status 503; reset: the connection is reset at once; cut: it ends in the middle of the body; short: a
    proper answer with fewer bytes than asked for; stall: nothing is sent for `stall_s`.
    """

    daemon_threads = True

    def __init__(self, folder: Path | None = None, upstream: str | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.upstream = folder, upstream
        self.share, self.faults, self.stall_s = 0.0, FAULTS, 5.0
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw_fault(self) -> str:
        with self.lock:
            fault = self.random.choice(self.faults) if self.random.random() < self.share else "none"
            self.counts[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this is about."""


@contextlib.contextmanager
def serve(folder: Path | None = None, upstream: str | None = None) -> Iterator[FlakyServer]:
    server = FlakyServer(folder, upstream)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def do_GET(self) -> None:
        fault = self.server.draw_fault()
        with self.server.lock:
            self.server.ranges.append((self.path, self.headers.get("Range", "")))
        if fault == "stall":
            threading.Event().wait(self.server.stall_s)
            fault = "reset"
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        status, headers, body = (503, {}, b"slow down") if fault == "error" else self.answer()
        if fault == "short" and status in (200, 206):
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        status, headers, body = self.answer()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_PUT

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        if self.server.upstream is not None:
            return self.forward(self.server.upstream)
        assert self.server.folder is not None
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return 404, {}, b""
        data, wanted = path.read_bytes(), self.headers.get("Range")
        if wanted is None:
            return 200, {"Accept-Ranges": "bytes"} | self.head_length(data), data
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    def head_length(self, data: bytes) -> dict[str, str]:
        return {"Content-Length": str(len(data))} if self.command == "HEAD" else {}

    def forward(self, upstream: str) -> tuple[int, dict[str, str], bytes]:
        length = int(self.headers.get("Content-Length", 0))
        connection = http.client.HTTPConnection(upstream, timeout=30)
        connection.request(self.command, self.path, self.rfile.read(length) if length else None, dict(self.headers))
        response = connection.getresponse()
        body = response.read()
        skipped = {"transfer-encoding", "connection", "date", "server"}
        if self.command != "HEAD":
            skipped.add("content-length")
        headers = {name: value for name, value in response.getheaders() if name.lower() not in skipped}
        if self.command == "HEAD":
            headers.setdefault("Content-Length", response.getheader("Content-Length", "0"))
        connection.close()
        return response.status, headers, body

    def log_message(self, format: str, *args: object) -> None:
        pass
