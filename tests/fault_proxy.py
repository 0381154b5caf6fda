"""A proxy of S3's protocol on this machine, before a server: it counts requests, and lets things go wrong at some."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """One request: its number, from 1, since `Proxy.count` was set to 0; its method and path."""

    number: int
    method: str
    path: str


# What becomes of a request: a function that may answer by itself, and then returns True.
Trouble = Callable[[Request, "Handler"], bool]


@dataclass
class Proxy:
    """The proxy, from the outside.

    Attributes:
        endpoint: where it listens.
        seen: every request since the last `forget`.
        trouble: asked before a request is passed on.
        after: asked when the server has answered and the client has not heard of it.
        is_offline: connections are closed at once, as where there is no network.
    """

    endpoint: str
    upstream: str
    seen: list[Request] = field(default_factory=list)
    trouble: Trouble = lambda request, handler: False
    after: Trouble = lambda request, handler: False
    is_offline: bool = False

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def forget(self) -> None:
        with self.lock:
            self.seen.clear()
        self.trouble = self.after = lambda request, handler: False

    def kill_at(self, number: int, pid: Callable[[], int], *, before: bool) -> None:
        """Kill a process at a request, before the server hears of it or before the process hears the answer."""

        def strike(request: Request, handler: Handler) -> bool:
            if request.number != number:
                return False
            os.kill(pid(), signal.SIGKILL)
            handler.hang_up()
            return True

        if before:
            self.trouble = strike
        else:
            self.after = strike


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle_any(self) -> None:
        proxy = self.proxy
        if proxy.is_offline:
            self.hang_up()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with proxy.lock:
            request = Request(len(proxy.seen) + 1, self.command, self.path)
            proxy.seen.append(request)
        if proxy.trouble(request, self):
            return
        place = urlsplit(proxy.upstream)
        upstream = http.client.HTTPConnection(place.hostname or "", place.port or 80)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if proxy.after(request, self):
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def answer(self, status: int, code: str = "SlowDown") -> bool:
        """Answer in the place of the server."""
        content = f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return True

    def hang_up(self) -> bool:
        """Close the connection in the middle."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.close()
        return True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """The server of the proxy: a client that goes away is what is tested, and nothing to print."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def proxy_before(upstream: str) -> Iterator[Proxy]:
    """Listen before a server while the context lasts."""
    handler = type("Bound", (Handler,), {})
    server = QuietServer(("127.0.0.1", 0), handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}", upstream)
    handler.proxy = proxy
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that comes; a test that waits for ever would say nothing."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
