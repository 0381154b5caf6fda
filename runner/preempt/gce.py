"""Notices of Google Compute Engine: two values of the metadata server, each of which is awaited until it changes.

Spot machines: `instance/preempted` turns TRUE up to 30 s before the end. Host maintenance:
`instance/maintenance-event` turns TERMINATE_ON_HOST_MAINTENANCE a minute before (an hour, on machines with GPUs); a
live migration needs no stop.
Source: cloud.google.com/compute/docs, "Spot VMs", "GPU host maintenance", "Querying metadata".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

from runner.preempt.metadata import MetadataClient
from runner.preempt.notice import NoAnswer, Notice, Poll

if TYPE_CHECKING:
    from runner.preempt.preempt_options import Gce

INSTANCE = "/computeMetadata/v1/instance/"
# The service refuses requests without this header and sends it back itself; a stranger who answers does not.
FLAVOR = {"Metadata-Flavor": "Google"}


def parse_preempted(value: str, now: float, seconds: float) -> Notice | None:
    """Return a notice where `instance/preempted` says that a spot machine is taken back, within `seconds`."""
    return Notice("GCE preemption", now + seconds) if value == "TRUE" else None


def parse_maintenance(value: str, now: float, seconds: float) -> Notice | None:
    """Return a notice where the host goes down within `seconds` and does not move the machine to another one."""
    return Notice("GCE host maintenance", now + seconds) if value == "TERMINATE_ON_HOST_MAINTENANCE" else None


class WatchedValue:
    """One value of the metadata server: the first read returns at once, later ones when it has changed."""

    def __init__(self, client: MetadataClient, name: str, wait_seconds: float, timeout_seconds: float):
        self._client, self._name, self._wait, self._timeout = client, name, wait_seconds, timeout_seconds
        self._etag: str | None = None

    def read(self) -> str:
        """Return the value, after at most `wait_seconds`. Raises NoAnswer."""
        path, timeout = INSTANCE + self._name, self._timeout
        # With the tag of the value that was seen last, a change between two requests is not missed.
        if self._etag is not None:
            path += f"?wait_for_change=true&timeout_sec={self._wait:.0f}&last_etag={quote(self._etag)}"
            timeout = self._wait + self._timeout
        response = self._client.request(path, FLAVOR, timeout_seconds=timeout)
        if response.status != 200 or response.headers.get("metadata-flavor") != FLAVOR["Metadata-Flavor"]:
            raise NoAnswer(f"status {response.status}")
        self._etag = response.headers.get("etag")
        return response.text.strip()


def poll_gce(option: Gce) -> list[Poll]:
    """Return a poll for each of the two values, each with a connection of its own: both may wait at the same time."""

    def poll_value(name: str, parse: Callable[[str, float, float], Notice | None], seconds: float) -> Poll:
        client = MetadataClient(option.url, option.timeout_seconds)
        value = WatchedValue(client, name, option.wait_seconds, option.timeout_seconds)
        return Poll(lambda: parse(value.read(), time.time(), seconds), option.poll_seconds, client.cancel)

    return [
        poll_value("preempted", parse_preempted, option.preempted_seconds),
        poll_value("maintenance-event", parse_maintenance, option.maintenance_seconds),
    ]
