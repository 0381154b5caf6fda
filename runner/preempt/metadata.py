"""A client for the metadata service of a cloud machine: plain HTTP without proxy, redirect or retry, always timed out.

Not `urllib`: it asks the proxies of the environment and follows redirects, and either would let somebody else answer
for the machine's own service.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from runner.preempt.notice import NoAnswer

# The service is on the same host. Where nobody listens on its address, connecting may take for ever.
CONNECT_SECONDS = 3.0
LONGEST_BODY = 1 << 20


@dataclass(frozen=True)
class Response:
    """A whole HTTP answer, whatever its status. Names of headers are in small letters."""

    status: int
    headers: Mapping[str, str]
    text: str


class MetadataClient:
    """Requests of one thread to one service. Another thread may cancel the one that is waiting, for good."""

    def __init__(self, url: str, timeout_seconds: float):
        parts = urlsplit(url)
        self._host, self._port, self._prefix = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self._timeout = timeout_seconds
        self._socket: socket.socket | None = None
        self._is_cancelled = False

    def request(
        self, path: str, headers: Mapping[str, str], method: str = "GET", timeout_seconds: float | None = None
    ) -> Response:
        """Return the answer, whatever its status. Raises NoAnswer where none came, or only a part of it."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_seconds or self._timeout)
            # First the socket, then the question whether it is over: `cancel` does the two the other way round, so
            # one of the two threads sees what the other did.
            self._socket = connection.sock
            if self._is_cancelled:
                raise NoAnswer("cancelled")
            connection.request(method, self._prefix + path, headers={**headers, "Connection": "close"})
            response = connection.getresponse()
            body = response.read(LONGEST_BODY)
            # What is left of Content-Length: the connection broke off, or the body is longer than any notice.
            if response.length:
                raise NoAnswer(f"{response.length} bytes of the answer are missing")
            lower_case = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, lower_case, body.decode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(str(error) or type(error).__name__) from None
        finally:
            self._socket = None
            connection.close()

    def cancel(self) -> None:
        """End the request that is waiting now, and refuse every later one."""
        self._is_cancelled = True
        if (waiting := self._socket) is not None:
            # The other thread may have closed it by now.
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)


def parse_json_object(text: str) -> dict[str, Any]:
    """Return a JSON object. Raises NoAnswer where the text is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer(f"no JSON: {text[:80]}") from None
    if not isinstance(document, dict):
        raise NoAnswer(f"no JSON object: {text[:80]}")
    return document


def parse_time(value: object) -> float | None:
    """Return the seconds since 1970 of a time in ISO 8601 or RFC 1123, in UTC where it has no zone; None for others."""
    if not isinstance(value, str):
        return None
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            time = parse(value.strip())
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        # The two parsers do not agree on how they refuse what is no time; IndexError is parsedate's, on odd zones.
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
