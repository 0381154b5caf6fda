"""Notices of Google Compute Engine: two values of the metadata server, each awaited until it changes.

Spot machines: `instance/preempted` turns TRUE, up to 30 s before the end. Host maintenance:
`instance/maintenance-event` turns TERMINATE_ON_HOST_MAINTENANCE a minute before (an hour, on machines with GPUs); a
live migration needs no stop.
Source: cloud.google.com/compute/docs, "Spot VMs", "GPU host maintenance", "Querying metadata".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from runner.preempt.metadata import MetadataClient, NoAnswer, Notice, Poll

if TYPE_CHECKING:
    from runner.preempt.options import Gce

INSTANCE = "/computeMetadata/v1/instance/"
FLAVOR = {"Metadata-Flavor": "Google"}  # asked for by the service; it sends the same, and whoever else answers does not

Read = Callable[[str, float, float], Notice | None]


def parse_preempted(value: str, now: float, seconds: float) -> Notice | None:
    """A spot machine is taken back within `seconds`."""
    return Notice("GCE preemption", now + seconds) if value == "TRUE" else None


def parse_maintenance(value: str, now: float, seconds: float) -> Notice | None:
    """The host goes down within `seconds` and does not take the machine with it to another."""
    return Notice("GCE host maintenance", now + seconds) if value == "TERMINATE_ON_HOST_MAINTENANCE" else None


class WatchedValue:
    """One value of the metadata server. After the first look it is awaited until it is another one."""

    def __init__(self, line: MetadataClient, name: str, wait_seconds: float, timeout_seconds: float):
        self._line, self._name, self._wait, self._timeout = line, name, wait_seconds, timeout_seconds
        self._etag: str | None = None

    def read(self) -> str:
        """The value. Raises Silence."""
        path, timeout = INSTANCE + self._name, self._timeout
        if self._etag is not None:
            path += f"?wait_for_change=true&timeout_sec={self._wait:.0f}&last_etag={quote(self._etag)}"
            timeout = self._wait + self._timeout
        answer = self._line.ask(path, FLAVOR, timeout_seconds=timeout)
        if answer.status != 200 or answer.headers.get("metadata-flavor") != FLAVOR["Metadata-Flavor"]:
            raise NoAnswer(f"status {answer.status}")
        self._etag = answer.headers.get("etag")
        return answer.text.strip()


def poll_gce(option: Gce) -> list[Poll]:
    """Both values, each with a connection of its own."""

    def about(name: str, read: Read, seconds: float) -> Poll:
        line = MetadataClient(option.url, option.timeout_seconds)
        value = WatchedValue(line, name, option.wait_seconds, option.timeout_seconds)
        return Poll(lambda: read(value.read(), time.time(), seconds), line.cancel, option.poll_seconds)

    return [
        about("preempted", parse_preempted, option.preempted_seconds),
        about("maintenance-event", parse_maintenance, option.maintenance_seconds),
    ]
