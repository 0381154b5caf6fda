"""A stand-in for the services that tell machines in a cloud what will happen to them: strict, and noisy where asked.

Strict: a request that lacks a header, a token or a version, or that came through a proxy, gets what the real one says.
Noisy: whatever may be wrong with an answer, and each wrong answer holds the words of a notice, so that whoever is not
careful takes it for one.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MACHINE = "vm-7"
GCE, AWS, AZURE = "/computeMetadata/v1/instance/", "/latest/", "/metadata/"
# A notice of each service, as it stands in a body.
NOTICES = {
    GCE: "TRUE",
    AWS: json.dumps(
        {"action": "terminate", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 90))}
    ),
    AZURE: json.dumps(
        {
            "Events": [
                {
                    "EventType": "Preempt",
                    "EventStatus": "Scheduled",
                    "Resources": [MACHINE],
                    "NotBefore": formatdate(time.time() + 60, usegmt=True),
                }
            ]
        }
    ),
}
STATUSES = ("403", "404", "429", "500", "503")
NOISE = (*STATUSES, "late", "reset", "torn", "redirect", "page", "junk", "wrong words", "bytes", "empty", "expired")


@dataclass
class Clouds:
    """What the services say now. Change it with `say`; `noise` is what happens to some answers of each, in turn."""

    preempted: str = "FALSE"
    maintenance: str = "NONE"
    action: dict[str, Any] | None = None
    rebalance: dict[str, Any] | None = None
    events: list[Any] = field(default_factory=list)
    flavor: str = "Google"
    token_uses: int = 5
    noise: tuple[str, ...] = ()
    quiet: int = 2  # so many answers between two that are wrong
    seconds: float = 0.0  # how long the first answer of Azure takes
    longest_wait: float = 600.0  # for a change, whatever was asked for
    made: Counter[tuple[str, str]] = field(default_factory=Counter)  # noise that was made: by whom, and what
    seen: Counter[str] = field(default_factory=Counter)  # paths that were asked for
    url: str = ""

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.tokens: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.closing = False

    def say(self, **news: Any) -> None:
        """Something happens."""
        with self.changed:
            for name, value in news.items():
                assert hasattr(self, name)
                setattr(self, name, value)
            self.changed.notify_all()

    def next_noise(self, room: str) -> str | None:
        """What is wrong with this answer."""
        with self.changed:
            self.asked[room] += 1
            if not self.noise or self.asked[room] % (self.quiet + 1):
                return None
            made = sum(count for (by, _), count in self.made.items() if by == room)
            fault = self.noise[made % len(self.noise)]
            self.made[room, fault] += 1
            return fault


@contextmanager
def clouds(**state: Any) -> Iterator[Clouds]:
    """The services, on a port of this machine."""
    world = Clouds(**state)

    class Handler(Answering):
        clouds = world

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    world.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield world
    finally:
        world.say(closing=True)
        server.shutdown()
        server.server_close()


class Answering(BaseHTTPRequestHandler):
    """One request."""

    clouds: Clouds
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.clouds.seen[address.path] += 1
        rooms = {GCE: self._gce, AWS: self._aws, AZURE: self._azure, "/escaped/": self._escaped}
        room = next((room for room in rooms if address.path.startswith(room)), None)
        if room is None:
            return self._send(404)
        fault = self.clouds.next_noise(room)
        if fault and fault != "expired":
            self._fail(fault, room)
        else:
            if fault:
                self.clouds.tokens.clear()
            rooms[room](address.path, {key: values[0] for key, values in parse_qs(address.query).items()})
        return None

    def _gce(self, path: str, query: dict[str, str]) -> None:
        if self.headers.get("Metadata-Flavor") != "Google" or self.headers.get("X-Forwarded-For"):
            return self._send(403)
        name = {"preempted": "preempted", "maintenance-event": "maintenance"}.get(path.removeprefix(GCE))
        if name is None or self.command != "GET":
            return self._send(404)
        if query.get("wait_for_change") == "true":
            self._wait(name, query.get("last_etag"), float(query.get("timeout_sec", "600")))
        value = getattr(self.clouds, name)
        return self._send(200, value, {"Metadata-Flavor": self.clouds.flavor, "ETag": _etag(value)})

    def _wait(self, name: str, known: str | None, seconds: float) -> None:
        before = known if known is not None else _etag(getattr(self.clouds, name))
        with self.clouds.changed:
            self.clouds.changed.wait_for(
                lambda: self.clouds.closing or _etag(getattr(self.clouds, name)) != before,
                min(seconds, self.clouds.longest_wait),
            )

    def _aws(self, path: str, _: dict[str, str]) -> None:
        if path == "/latest/api/token":
            return self._token()
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        if self.command != "GET" or self.clouds.tokens[token] <= 0:
            return self._send(401)
        self.clouds.tokens[token] -= 1
        document = {
            "/latest/meta-data/spot/instance-action": self.clouds.action,
            "/latest/meta-data/events/recommendations/rebalance": self.clouds.rebalance,
        }.get(path)
        return self._send(404, "<html>no</html>") if document is None else self._send(200, json.dumps(document))

    def _token(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.command != "PUT" or self.headers.get("X-Forwarded-For"):
            return self._send(403)
        if not seconds.isdecimal() or not 1 <= int(seconds) <= 21600:
            return self._send(400)
        token = f"t-{self.clouds.asked[AWS]}=="
        self.clouds.tokens[token] = self.clouds.token_uses
        return self._send(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": seconds})

    def _azure(self, path: str, query: dict[str, str]) -> None:
        if self.headers.get("Metadata") != "true" or self.headers.get("X-Forwarded-For") or self.command != "GET":
            return self._send(400)
        if not query.get("api-version", "").startswith("20"):
            return self._send(400)
        if path == "/metadata/instance/compute/name":
            return self._send(200, MACHINE) if query.get("format") == "text" else self._send(400)
        if path != "/metadata/scheduledevents":
            return self._send(404)
        slow, self.clouds.seconds = self.clouds.seconds, 0.0
        time.sleep(slow)
        return self._send(200, json.dumps({"DocumentIncarnation": 1, "Events": self.clouds.events}))

    def _escaped(self, path: str, _: dict[str, str]) -> None:
        """Where a redirect leads: a perfect notice."""
        self._send(200, NOTICES[f"/{path.removeprefix('/escaped/').partition('/')[0]}/"], {"Metadata-Flavor": "Google"})

    def _fail(self, fault: str, room: str) -> None:
        text, flavor = NOTICES[room], {"Metadata-Flavor": "Google"}
        body = text.encode()
        if fault in STATUSES:
            self._send(int(fault), text, flavor)
        elif fault == "late":
            with self.clouds.changed:
                self.clouds.changed.wait_for(lambda: self.clouds.closing, 60.0)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
        elif fault == "torn":  # a whole notice, and less than was promised
            self._raw(
                b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: %d\r\n\r\n" % (len(body) + 9) + body
            )
        elif fault == "redirect":
            self._send(302, text, {**flavor, "Location": f"{self.clouds.url}/escaped{room}"})
        elif fault == "page":  # a login page in between, which does not know what it answers
            self._send(200, f"<html>{text}</html>")
        elif fault == "junk":
            self._raw(b"\x00\xff" + body + b"\r\n\r\n")
        elif fault == "wrong words":
            self._send(
                200, json.dumps({"action": 1, "time": [], "Events": {"EventType": "Preempt"}, "was": text}), flavor
            )
        elif fault == "bytes":
            self._raw(b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00\x80")
        else:
            assert fault == "empty"
            self._send(200, "", flavor)

    def _raw(self, content: bytes) -> None:
        self.wfile.write(content)
        self.close_connection = True

    def _send(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # nobody waits for it any more
            self.close_connection = True


def _etag(value: str) -> str:
    return f"{sum(value.encode()):x}"
