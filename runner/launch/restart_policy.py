"""Decide when a command is run again, after how long, and when not: the rules of `supervise`. Pure.

attempt → ProcessEnding → FailureStreak.after → decide_restart → Restart(wait) or Exit(code)
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import CRASHED, STOPPED, RefusedError
from runner.launch.child_process import describe_signal

# Waits double up to here.
MAX_WAIT_SECONDS = 300.0
# A stop sooner than this with nothing new saved got nowhere: it was a notice that does not go away.
FRUITLESS_SECONDS = 60.0
# A process that dies and still holds the run has 5 + 10 + 20 + 40 + 80 seconds, with the default wait.
MAX_IN_USE_TRIES = 5


@dataclass(frozen=True)
class ProcessEnding:
    """How one attempt ended.

    Attributes:
        code: its exit code; -N where signal N ended it.
        seconds: how long it took.
        saved_more: it left a newer checkpoint than any attempt before.
        in_use: another process had the run.
        gave_up: the run itself says that trying again is no use.
        lost: it stopped because another process of the run has gone.
        stop_file: somebody put the file STOP into the run's directory.
        asked: the last signal that was forwarded to it; None where there was none.
    """

    code: int
    seconds: float = 0.0
    saved_more: bool = False
    in_use: bool = False
    gave_up: bool = False
    lost: bool = False
    stop_file: bool = False
    asked: int | None = None

    @property
    def is_stop(self) -> bool:
        """True where it was asked to stop, and saved: that may happen for ever."""
        return self.code == STOPPED and not self.lost

    @property
    def is_crash(self) -> bool:
        """True where it crashed, or one of its processes did."""
        return is_crash(self.code) or (self.code == STOPPED and self.lost)


@dataclass(frozen=True)
class FailureStreak:
    """How often in a row: crashes without a newer checkpoint, stops that got nowhere, a run found in use."""

    crashes: int = 0
    stops: int = 0
    in_use: int = 0

    def after(self, ending: ProcessEnding) -> FailureStreak:
        """Return the streak with one more attempt counted."""
        crashes = 0 if ending.saved_more else self.crashes
        fruitless = ending.is_stop and not ending.saved_more and ending.seconds < FRUITLESS_SECONDS
        return FailureStreak(
            crashes=crashes + ending.is_crash,
            stops=self.stops + 1 if fruitless else 0,
            in_use=self.in_use + 1 if ending.in_use else 0,
        )


@dataclass(frozen=True)
class Restart:
    """Run the command again after `wait` seconds."""

    wait: float
    why: str


@dataclass(frozen=True)
class Exit:
    """End with this exit code."""

    code: int
    why: str


def decide_restart(
    ending: ProcessEnding, streak: FailureStreak, max_crashes: int, wait: float, chance: float
) -> Restart | Exit:
    """Return what an ending asks for.

    Args:
        ending: of the last attempt.
        streak: with that attempt counted.
        max_crashes: so many in a row without a newer checkpoint are forgiven.
        wait: seconds, the base of the back-off.
        chance: uniform in [0, 1).
    """
    code, what = shell_exit_code(ending.code), describe_ending(ending.code)
    if ending.lost:
        what = "lost one of its processes"
    # A signal means that the machine goes away: whoever sent it runs the command again, on the next.
    if ending.asked is not None:
        # Killed by that very signal, it was not listening yet: nothing was done that could have been lost.
        killed_by_it = ending.code == -ending.asked
        return Exit(STOPPED if killed_by_it else code, f"{what} after {describe_signal(ending.asked)}")
    if ending.is_stop and ending.stop_file:
        return Exit(code, f"{what} by the file STOP: somebody wants the run to rest")
    if ending.is_stop:
        fruitless = f", {streak.stops} times in a row with nothing new saved" if streak.stops > 1 else ""
        # The first such stop is followed at once: most of them are a preemption that is over.
        return Restart(backoff_seconds(streak.stops - 1, wait, chance), f"{what}{fruitless}")
    if ending.code == RefusedError.exit_code and ending.in_use and streak.in_use <= MAX_IN_USE_TRIES:
        why = f"the run is in use (try {streak.in_use} of {MAX_IN_USE_TRIES})"
        return Restart(backoff_seconds(streak.in_use, wait, chance), why)
    if not ending.is_crash:
        return Exit(code, what)
    if ending.gave_up:
        return Exit(code, f"{what}, and gave up: it would crash again")
    if streak.crashes > max_crashes:
        return Exit(code, f"{what}, crash {streak.crashes} in a row without a newer checkpoint")
    so_far = f"{what}, crash {streak.crashes} of {max_crashes} in a row without a newer checkpoint"
    return Restart(backoff_seconds(streak.crashes, wait, chance), so_far)


def backoff_seconds(count: int, base: float, chance: float) -> float:
    """Return how long to wait the `count`-th time in a row: doubled each time, capped, up to a half less at random.

    `chance` is uniform in [0, 1): many runs that were stopped at once must not all come back at once.
    """
    if count < 1:
        return 0.0
    # Bounded, because the power of a long streak would overflow.
    doubled = base * 2.0 ** min(count - 1, 30)
    return float(min(doubled, MAX_WAIT_SECONDS) * (1 - chance / 2))


def has_lost_process(code: int, status: Mapping[str, Any]) -> bool:
    """Return whether a run stopped because one of its processes has gone, by its exit code and its status.json."""
    return code == STOPPED and status.get("attempt", {}).get("lost_process") is True


def is_crash(code: int) -> bool:
    """Return whether it ended with a traceback or was killed by a signal; but Ctrl-C is a person who wants to stop."""
    return code == CRASHED or _signal_of(code) not in (0, signal.SIGINT)


def shell_exit_code(code: int) -> int:
    """Return an exit code as a shell tells it: 128 + N where signal N ended the process."""
    return 128 - code if code < 0 else code


def _signal_of(code: int) -> int:
    """Return the signal that ended a process, told by the system (-N) or by a shell or launcher (128 + N); else 0."""
    number = -code if code < 0 else code - 128
    return number if number in signal.valid_signals() else 0


def describe_ending(code: int) -> str:
    """Return what an exit code means, in words that follow the name of what ended."""
    if number := _signal_of(code):
        return f"died of {describe_signal(number)}" + (" (out of memory?)" if number == signal.SIGKILL else "")
    return {0: "finished", CRASHED: "crashed", STOPPED: "stopped with its state saved"}.get(code, "ended")
