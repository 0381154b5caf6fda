"""What a source of stop requests hears, and how it is asked: apart from what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Something will end this process. Times are seconds since 1970."""

    reason: str
    ends: float | None = None  # when; None: nobody knows
    due: float = 0.0  # not to be acted on before
    stops: bool = True  # False: a warning that is not final: save, and go on


class Silence(Exception):
    """No answer, or one that says nothing: refused, late, torn, forbidden, junk. It is never a notice."""


@dataclass(frozen=True)
class Question:
    """One question that a thread asks again and again."""

    ask: Callable[[], Notice | None]  # raises Silence; may wait for long
    hang_up: Callable[[], None]  # ends a wait in `ask` from another thread
    poll_seconds: float


def nothing_to_end() -> None:
    """For questions that never wait long."""
