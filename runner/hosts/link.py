"""Carry what the processes of a run say: lines of JSON over TCP, between process 0 and each of the others.

A connection of our own and not jax's coordination service, for three reasons. It is there before jax is, so a wrong
command is refused at once, everywhere, and who is missing can be named. The kernel closes it when a process dies,
however it dies: the others know within milliseconds, also of process 0, whose death jax answers by aborting them. And
what a process does (its sign of life) is heard while its training thread waits for a device, which jax never notices.

Nothing waits while it sends: what a connection does not take at once is left to a thread of its own.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from runner.types import JsonObject

# A line is a few hundred bytes; the longest holds the checksums of a checkpoint's files.
MAX_LINE_BYTES = 1 << 28


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        step: completed updates.
        phase: what the training thread does, as in the heartbeat.
        writing: what the thread that writes checkpoints does, or "".
        changed: when any of these last changed there, in seconds since the process began.
    """

    step: int = 0
    phase: str = "startup"
    writing: str = ""
    changed: float = 0.0


class Link:
    """One connection to another process of the run.

    Attributes:
        index: the number of that process.
        name: how people are told of it: `process 1 (n2, pid 4711)`.
        sign: its last sign of life.
        heard_at: when it last said anything, in `time.monotonic()` seconds.
        is_leaving: it has said that it ends.
    """

    def __init__(self, connection: socket.socket, index: int, name: str):
        self.index, self.name = index, name
        self.sign, self.heard_at, self.is_leaving = Sign(), time.monotonic(), False
        self._connection = connection
        self._lines = connection.makefile("rb")
        # What the connection did not take at once; a thread sends it.
        self._backlog: deque[bytes] = deque()
        self._sending = threading.Condition()
        self._is_closed = False

    def start(self, on_line: Callable[[Link, JsonObject], None], on_end: Callable[[Link], None]) -> None:
        """Hear what comes, in a thread: `on_line` for each line, then `on_end` once."""
        for work in (lambda: self._read(on_line, on_end), self._send_backlog):
            threading.Thread(target=work, name=f"link to {self.index}", daemon=True).start()

    def send(self, line: JsonObject) -> None:
        """Send a line; never waits, never raises. What is sent to a process that has gone is lost."""
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._sending:
            if self._is_closed:
                return
            sent = 0
            if not self._backlog:
                with suppress(OSError):
                    sent = self._connection.send(content, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            if sent < len(content):
                self._backlog.append(content[sent:])
                self._sending.notify()

    def close(self) -> None:
        """Send what is left, as far as it is taken at once, and end the connection."""
        with self._sending:
            self._is_closed = True
            self._sending.notify()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self, on_line: Callable[[Link, JsonObject], None], on_end: Callable[[Link], None]) -> None:
        # OSError: the connection is gone. ValueError: what comes is no line of ours; then it is gone for us as well.
        with suppress(OSError, ValueError):
            while content := self._lines.readline(MAX_LINE_BYTES):
                line = json.loads(content)
                self.heard_at = time.monotonic()
                on_line(self, line)
        on_end(self)

    def _send_backlog(self) -> None:
        while True:
            with self._sending:
                self._sending.wait_for(lambda: self._backlog or self._is_closed)
                if not self._backlog:
                    return
                content = self._backlog[0]
            try:
                # Outside of the lock: this may wait, and nobody else may.
                self._connection.sendall(content)
            except OSError:
                return
            with self._sending:
                self._backlog.popleft()


def receive_line(connection: socket.socket, seconds: float) -> JsonObject:
    """Return the first line of a connection, which must come within so many seconds, and be short.

    Reads no byte too many: what follows belongs to the link. Raises OSError, ValueError.
    """
    connection.settimeout(seconds)
    content = b""
    while not content.endswith(b"\n"):
        if not (byte := connection.recv(1)) or len(content) > 1 << 16:
            raise ValueError("no greeting of a process of a run")
        content += byte
    connection.settimeout(None)
    line = json.loads(content)
    if not isinstance(line, dict):
        raise ValueError("no greeting of a process of a run")
    return line


def send_line(connection: socket.socket, line: JsonObject) -> None:
    """Send the first line of a connection. Raises OSError."""
    connection.sendall(json.dumps(line).encode() + b"\n")


def describe_missing(missing: list[int], count: int) -> str:
    """Return who is missing: `process 2`, `processes 1, 3 and 5 more`."""
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"{'process' if len(missing) == 1 else 'processes'} {named} of {count}"


def tell_sign(sign: Sign) -> list[Any]:
    """Return a sign of life as plain JSON."""
    return [sign.step, sign.phase, sign.writing, sign.changed]


def read_sign(values: Any) -> Sign:
    """Return the sign of life that `tell_sign` gave. Raises ValueError, TypeError."""
    step, phase, writing, changed = values
    return Sign(int(step), str(phase), str(writing), float(changed))
