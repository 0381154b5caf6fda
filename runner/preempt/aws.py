"""Notices of Amazon EC2 for spot machines: the end, two minutes before, and a hint that it may come.

The service is asked with a session token (IMDSv2), and says 404 where there is no notice. A hint (rebalance
recommendation) is not final: the state is saved and training goes on.
Source: docs.aws.amazon.com, EC2 user guide, "Spot Instance interruption notices".
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runner.preempt.metadata import MetadataClient, parse_json_object, parse_time
from runner.preempt.notice import NoAnswer, Notice, Poll

if TYPE_CHECKING:
    from runner.preempt.preempt_options import Aws

TOKEN = "/latest/api/token"
# The longest lifetime that the service grants.
TOKEN_SECONDS = 21600
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
ACTIONS = ("terminate", "stop", "hibernate")


def parse_action(text: str, now: float, seconds: float) -> Notice | None:
    """Return the notice in a `spot/instance-action` document. Raises NoAnswer where it is no such document.

    The end is at the time that the document says, but within `seconds`: the clock of this machine may be slow. An end
    that has passed is not known, nor is that of a hibernation, which begins at once and takes nobody says how long.
    """
    document = parse_json_object(text)
    what, at = document.get("action"), parse_time(document.get("time"))
    if what not in ACTIONS or at is None:
        raise NoAnswer(f"no instance action: {text[:80]}")
    is_end_known = what != "hibernate" and at > now
    return Notice(f"EC2 spot {what}", min(at, now + seconds) if is_end_known else None)


def parse_rebalance(text: str) -> Notice | None:
    """Return the warning in a rebalance recommendation. Raises NoAnswer where it is no such document."""
    at = parse_json_object(text).get("noticeTime")
    if parse_time(at) is None:
        raise NoAnswer(f"no recommendation: {text[:80]}")
    return Notice(f"EC2 rebalance recommendation of {at}", is_final=False)


class AwsMetadata:
    """The instance metadata service, with a session token that is renewed when it is refused."""

    def __init__(self, client: MetadataClient):
        self._client = client
        self._token: str | None = None

    def read(self, path: str) -> str | None:
        """Return a document, or None where there is none. Raises NoAnswer."""
        # Twice: a token that was good until now may have expired; one that was made just now has not.
        for _ in range(2):
            self._token = self._token or self._request_token()
            response = self._client.request(path, {"X-aws-ec2-metadata-token": self._token})
            if response.status == 200:
                return response.text
            if response.status == 404:
                return None
            if response.status != 401:
                raise NoAnswer(f"status {response.status}")
            self._token = None
        raise NoAnswer("a fresh token is refused")

    def _request_token(self) -> str:
        response = self._client.request(TOKEN, {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}, "PUT")
        if response.status != 200 or not response.text:
            raise NoAnswer(f"no token: status {response.status}")
        return response.text


def poll_aws(option: Aws) -> list[Poll]:
    """Return one poll, which looks for an end and, where there is none, for a hint."""
    client = MetadataClient(option.url, option.timeout_seconds)
    service = AwsMetadata(client)

    def ask() -> Notice | None:
        action = service.read(ACTION)
        if action is not None:
            return parse_action(action, time.time(), option.notice_seconds)
        hint = service.read(REBALANCE)
        return None if hint is None else parse_rebalance(hint)

    return [Poll(ask, option.poll_seconds, client.cancel)]
