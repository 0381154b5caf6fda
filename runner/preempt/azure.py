"""Notices of Microsoft Azure: scheduled events of this machine. None of them is acknowledged: that is the owner's.

Preempt comes at least 30 s before, Terminate minutes, Reboot and Redeploy from minutes to days: those are acted on
`lead_seconds` before. Freeze is a pause of seconds and needs no stop. The first answer may take two minutes, because
asking turns the service on. Source: learn.microsoft.com, "Azure Metadata Service: Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.preempt.metadata import MetadataClient, NoAnswer, Notice, Poll, parse_json_object, parse_time

if TYPE_CHECKING:
    from runner.preempt.options import Azure

EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
METADATA = {"Metadata": "true"}
ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
AHEAD = ("Scheduled", "Started")


def find_first_end(text: str, machine: str, now: float, lead_seconds: float) -> Notice | None:
    """The first event that ends this machine. Raises Silence where it is no list of events, or one cannot be read."""
    events = parse_json_object(text).get("Events")
    if not isinstance(events, list):
        raise NoAnswer(f"no events: {text[:80]}")
    mine = sorted((at, kind) for kind, at in _ends(events, machine))
    if not mine:
        return None
    at, kind = mine[0]
    return Notice(f"Azure {kind}", at if at > now else None, at - lead_seconds)


def _ends(events: list[Any], machine: str) -> Iterator[tuple[str, float]]:
    """What ends this machine, and when at the earliest; 0 where it has begun."""
    for event in events:
        if not isinstance(event, dict) or not isinstance(resources := event.get("Resources"), list):
            continue
        kind, status, said = event.get("EventType"), event.get("EventStatus"), event.get("NotBefore")
        if kind not in ENDS or status not in AHEAD:
            continue
        if machine.casefold() not in [str(resource).casefold() for resource in resources]:
            continue
        at = 0.0 if said == "" else parse_time(said)
        if at is None:
            raise NoAnswer(f"no time: {said}")
        yield str(kind), at


class ScheduledEvents:
    """The scheduled events, after the name of this machine is known."""

    def __init__(self, line: MetadataClient, machine: str | None, first_timeout_seconds: float):
        self._line, self._machine = line, machine
        self._timeout: float | None = first_timeout_seconds

    def soonest(self, lead_seconds: float) -> Notice | None:
        """What ends this machine first. Raises Silence."""
        self._machine = self._machine or self._get(NAME).strip()
        if not self._machine:
            raise NoAnswer("this machine has no name")
        text = self._get(EVENTS, self._timeout)
        self._timeout = None  # it is on now
        return find_first_end(text, self._machine, time.time(), lead_seconds)

    def _get(self, path: str, timeout_seconds: float | None = None) -> str:
        answer = self._line.ask(path, METADATA, timeout_seconds=timeout_seconds)
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        return answer.text


def poll_azure(option: Azure) -> list[Poll]:
    """One poll: which event comes first."""
    line = MetadataClient(option.url, option.timeout_seconds)
    service = ScheduledEvents(line, option.machine, option.first_timeout_seconds)
    return [Poll(lambda: service.soonest(option.lead_seconds), line.cancel, option.poll_seconds)]
