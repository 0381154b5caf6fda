"""Notices of Microsoft Azure: scheduled events of this machine. None is acknowledged: that is for the owner to do.

Preempt comes at least 30 s before, Terminate minutes, Reboot and Redeploy from minutes to days: those are acted on
`lead_seconds` before. Freeze is a pause of seconds and needs no stop. The first answer may take two minutes, because
asking turns the service on.
Source: learn.microsoft.com, "Azure Metadata Service: Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.preempt.metadata import MetadataClient, parse_json_object, parse_time
from runner.preempt.notice import NoAnswer, Notice, Poll

if TYPE_CHECKING:
    from runner.preempt.preempt_options import Azure

EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
MACHINE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
HEADERS = {"Metadata": "true"}
ENDING_KINDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
PENDING_STATUSES = ("Scheduled", "Started")


def find_first_end(text: str, machine: str, now: float, lead_seconds: float) -> Notice | None:
    """Return the earliest event that ends this machine, to be acted on `lead_seconds` before; None where none does.

    Raises NoAnswer where the text is no list of events, or where an event of this machine cannot be read.
    """
    events = parse_json_object(text).get("Events")
    if not isinstance(events, list):
        raise NoAnswer(f"no events: {text[:80]}")
    ends = sorted((at, kind) for kind, at in _find_ends(events, machine))
    if not ends:
        return None
    at, kind = ends[0]
    return Notice(f"Azure {kind}", at if at > now else None, at - lead_seconds)


def _find_ends(events: list[Any], machine: str) -> Iterator[tuple[str, float]]:
    """Yield the kind and the earliest time of each event that ends this machine; the time is 0 where it has begun."""
    for event in events:
        if not isinstance(event, dict) or not isinstance(resources := event.get("Resources"), list):
            continue
        kind, status, not_before = event.get("EventType"), event.get("EventStatus"), event.get("NotBefore")
        if kind not in ENDING_KINDS or status not in PENDING_STATUSES:
            continue
        # The service tells the machines of an availability set about each other. Names ignore case there.
        if machine.casefold() not in [str(resource).casefold() for resource in resources]:
            continue
        at = 0.0 if not_before == "" else parse_time(not_before)
        if at is None:
            raise NoAnswer(f"no time: {not_before}")
        yield str(kind), at


class ScheduledEvents:
    """The service of scheduled events, which is asked for the name of this machine first."""

    def __init__(self, client: MetadataClient, machine: str | None, first_timeout_seconds: float):
        self._client, self._machine = client, machine
        self._timeout: float | None = first_timeout_seconds

    def find_first_end(self, lead_seconds: float) -> Notice | None:
        """Return the earliest event that ends this machine; None where none does. Raises NoAnswer."""
        self._machine = self._machine or self._read(MACHINE_NAME).strip()
        if not self._machine:
            raise NoAnswer("this machine has no name")
        text = self._read(EVENTS, self._timeout)
        # It has answered, so it is turned on: from here on the usual time limit is enough.
        self._timeout = None
        return find_first_end(text, self._machine, time.time(), lead_seconds)

    def _read(self, path: str, timeout_seconds: float | None = None) -> str:
        response = self._client.request(path, HEADERS, timeout_seconds=timeout_seconds)
        if response.status != 200:
            raise NoAnswer(f"status {response.status}")
        return response.text


def poll_azure(option: Azure) -> list[Poll]:
    """Return one poll, for the event that comes first."""
    client = MetadataClient(option.url, option.timeout_seconds)
    service = ScheduledEvents(client, option.machine, option.first_timeout_seconds)
    return [Poll(lambda: service.find_first_end(option.lead_seconds), option.poll_seconds, client.cancel)]
