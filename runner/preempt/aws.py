"""Notices of Amazon EC2 for spot machines: the end, two minutes before, and a hint that it may come.

Asked for with a session token (IMDSv2). No notice is a 404. A hint (rebalance recommendation) is not final: the state
is saved and training goes on. Source: docs.aws.amazon.com, EC2 user guide, "Spot Instance interruption notices".
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runner.preempt.metadata import MetadataClient, NoAnswer, Notice, Poll, parse_json_object, parse_time

if TYPE_CHECKING:
    from runner.preempt.options import Aws

TOKEN = "/latest/api/token"
TOKEN_SECONDS = 21600  # the longest there is
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
ACTIONS = ("terminate", "stop", "hibernate")


def parse_action(text: str, now: float, seconds: float) -> Notice | None:
    """The machine is taken at the time that is said, within `seconds`. Raises Silence where it is no such document.

    Hibernation begins at once: how long that takes, nobody says.
    """
    document = parse_json_object(text)
    what, at = document.get("action"), parse_time(document.get("time"))
    if what not in ACTIONS or at is None:
        raise NoAnswer(f"no instance action: {text[:80]}")
    known = what != "hibernate" and at > now
    return Notice(f"EC2 spot {what}", min(at, now + seconds) if known else None)


def parse_rebalance(text: str) -> Notice | None:
    """The machine is more likely than others to be taken. Raises Silence where it is no such document."""
    at = parse_json_object(text).get("noticeTime")
    if parse_time(at) is None:
        raise NoAnswer(f"no recommendation: {text[:80]}")
    return Notice(f"EC2 rebalance recommendation of {at}", is_final=False)


class AwsMetadata:
    """The instance metadata service, with a token that is renewed when it is refused."""

    def __init__(self, line: MetadataClient):
        self._line = line
        self._token: str | None = None

    def get(self, path: str) -> str | None:
        """A document, or None where there is none. Raises Silence."""
        for _ in range(2):
            self._token = self._token or self._fresh()
            answer = self._line.ask(path, {"X-aws-ec2-metadata-token": self._token})
            if answer.status == 200:
                return answer.text
            if answer.status == 404:
                return None
            if answer.status != 401:
                raise NoAnswer(f"status {answer.status}")
            self._token = None
        raise NoAnswer("a fresh token is refused")

    def _fresh(self) -> str:
        answer = self._line.ask(TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}, "PUT")
        if answer.status != 200 or not answer.text:
            raise NoAnswer(f"no token: status {answer.status}")
        return answer.text


def poll_aws(option: Aws) -> list[Poll]:
    """One poll: whether the end is near; if not, whether it may be."""
    line = MetadataClient(option.url, option.timeout_seconds)
    service = AwsMetadata(line)

    def ask() -> Notice | None:
        found = service.get(ACTION)
        if found is not None:
            return parse_action(found, time.time(), option.notice_seconds)
        hint = service.get(REBALANCE)
        return None if hint is None else parse_rebalance(hint)

    return [Poll(ask, line.cancel, option.poll_seconds)]
