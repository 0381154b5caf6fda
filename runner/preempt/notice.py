"""What a source of notices says, and how it is asked. Free of HTTP, so that a run that asks nobody imports none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Something will end this process, or may. Times are seconds since 1970.

    `ends_at` is when it will end, or None where nobody knows; the notice is not acted on before `act_at`. One that is
    not final is a warning: the run saves and goes on.
    """

    reason: str
    ends_at: float | None = None
    act_at: float = 0.0
    is_final: bool = True


class NoAnswer(Exception):
    """Nobody answered, or the answer says nothing: refused, late, torn, forbidden, junk. It is never a notice."""


def cancel_nothing() -> None:
    """Do nothing: the `cancel` of a poll whose `ask` never waits for long."""


@dataclass(frozen=True)
class Poll:
    """One question that a thread asks every `poll_seconds`.

    `ask` returns the notice there is, or None; it raises NoAnswer, and may wait for minutes. `cancel`, called from
    another thread, ends such a wait for good.
    """

    ask: Callable[[], Notice | None]
    poll_seconds: float
    cancel: Callable[[], None] = cancel_nothing
