"""Reads documents and times that services send. What they send may be anything."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from runner.preempt.notice import Silence


def fields(text: str) -> dict[str, Any]:
    """A JSON object. Raises Silence where it is none."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise Silence(f"no JSON: {text[:80]}") from None
    if not isinstance(document, dict):
        raise Silence(f"no JSON object: {text[:80]}")
    return document


def moment(said: object) -> float | None:
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
