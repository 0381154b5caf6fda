"""Asks a metadata service one thing over plain HTTP: no proxy, no redirect, no retry, always a time limit."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0  # the service is on the same host; where nobody listens it may take for ever
LONGEST_BODY = 1 << 20


@dataclass(frozen=True)
class Response:
    """What came back. Names of headers in small letters."""

    status: int
    headers: Mapping[str, str]
    text: str


class MetadataClient:
    """One thread's way to one service. Another thread may hang up, for good."""

    def __init__(self, url: str, timeout_seconds: float):
        parts = urlsplit(url)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self._timeout = timeout_seconds
        self._socket: socket.socket | None = None
        self._over = False

    def ask(
        self, path: str, headers: Mapping[str, str], method: str = "GET", timeout_seconds: float | None = None
    ) -> Response:
        """The answer, whatever its status. Raises Silence where none came, or only a part of it."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_seconds or self._timeout)
            self._socket = connection.sock
            if self._over:
                raise NoAnswer("hung up")
            connection.request(method, self._prefix + path, headers={**headers, "Connection": "close"})
            response = connection.getresponse()
            body = response.read(LONGEST_BODY)
            if response.length:
                raise NoAnswer(f"{response.length} bytes of the answer are missing")
            return Response(
                response.status, {name.lower(): value for name, value in response.getheaders()}, body.decode()
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(str(error) or type(error).__name__) from None
        finally:
            self._socket = None
            connection.close()

    def cancel(self) -> None:
        """End the answer that is awaited now, and every later one."""
        self._over = True
        if (waiting := self._socket) is not None:
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Notice:
    """Something will end this process. Times are seconds since 1970."""

    reason: str
    ends_at: float | None = None  # when; None: nobody knows
    act_at: float = 0.0  # not to be acted on before
    is_final: bool = True  # False: a warning that is not final: save, and go on


class NoAnswer(Exception):
    """No answer, or one that says nothing: refused, late, torn, forbidden, junk. It is never a notice."""


@dataclass(frozen=True)
class Poll:
    """One question that a thread asks again and again."""

    ask: Callable[[], Notice | None]  # raises Silence; may wait for long
    cancel: Callable[[], None]  # ends a wait in `ask` from another thread
    poll_seconds: float


def cancel_nothing() -> None:
    """For questions that never wait long."""


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises Silence where it is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer(f"no JSON: {text[:80]}") from None
    if not isinstance(document, dict):
        raise NoAnswer(f"no JSON object: {text[:80]}")
    return document


def parse_time(said: object) -> float | None:
    """Seconds since 1970 of a time in ISO 8601 or RFC 1123, UTC where no zone is said; None where it is no time."""
    if not isinstance(said, str):
        return None
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            time = read(said.strip())
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
