"""Buckets for tests: one in memory with faults at chosen requests, and a real server of S3's protocol on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import obstore
import pytest
from obstore import exceptions
from obstore.store import MemoryStore

from runner.remote import objects
from runner.remote.objects import Objects
from runner.rundir.lease import Owner, read_machine

# What may go wrong with a request: it is not done, it is done and the answer is lost, the process ends before or after.
Fault = Literal["refused", "answer lost", "killed before", "killed after"]
FAULTS: tuple[Fault, ...] = ("refused", "answer lost", "killed before", "killed after")
URL = "s3://test/team"
BUCKET = "runs"


class Killed(BaseException):
    """The process has ended: nothing of it asks for anything any more."""


@dataclass
class FaultyClient:
    """The client's own functions, but for one request, at which something goes wrong. From any thread.

    Attributes:
        at: the number of that request, from 1; 0 for none.
        fault: what goes wrong.
        count: how many were made.
    """

    at: int = 0
    fault: Fault = "refused"
    count: int = 0
    is_dead: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(obstore, name)
        if name not in ("put", "get", "get_range", "delete", "copy", "list", "list_with_delimiter"):
            return real
        return lambda *arguments, **options: self._ask(real, *arguments, **options)

    def _ask(self, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with self._lock:
            if self.is_dead:
                raise Killed
            self.count += 1
            strikes = self.count == self.at
            if strikes and self.fault == "killed before":
                self.is_dead = True
                raise Killed
            if strikes and self.fault == "refused":
                raise exceptions.GenericError("Server returned non-2xx status code: 503 Slow Down")
            answer = real(*arguments, **options)
            if strikes and self.fault == "killed after":
                self.is_dead = True
                raise Killed
            if strikes:
                raise exceptions.GenericError("error sending request: connection reset")
            return answer


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A bucket in memory, which is what every URL leads to; trouble is tried again at once."""
    store = MemoryStore()
    monkeypatch.setattr("runner.remote.bucket.open_objects", lambda remote, url: Objects(store, url))
    monkeypatch.setattr("runner.remote.uploader.RETRY_SECONDS", (0.001,))
    monkeypatch.setattr("runner.remote.uploader.TICK_SECONDS", 0.002)
    # Whoever was killed in the test's own process has ended.
    monkeypatch.setattr("runner.remote.remote_lock.identify_process", name_ended_process)
    return store


def name_ended_process(token: str) -> Owner:
    """Return a process of this machine that has ended."""
    return Owner(token, 1 << 40, 1, "here", read_machine())


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, fault: Fault) -> Iterator[FaultyClient]:
    """Let something go wrong at a request while the context lasts."""
    client = FaultyClient(at, fault)
    with monkeypatch.context() as patched:
        patched.setattr(objects, "obstore", client)
        yield client
        client.is_dead = True


def find_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A server of S3's protocol on this machine. `environment` is what a client of it needs."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        # The address as well: a client that is left to itself asks the cloud's.
        return {**keys, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def serve_bucket() -> Iterator[Server]:
    """Serve an empty bucket, `runs`, from this machine while the context lasts."""
    port = find_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        import boto3

        before = {key: os.environ.get(key) for key in server.environment}
        os.environ.update(server.environment)
        try:
            boto3.client("s3", endpoint_url=server.endpoint).create_bucket(Bucket=BUCKET)
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        yield server
    finally:
        process.kill()
        process.wait()
