"""When a command is run again, after how long, and when not: what `supervise` does with each ending. Pure.

attempt → Ending → Streak.after → next_move → Rerun(wait) or Leave(code)
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace

from runner.errors import CRASHED, STOPPED, RefusedError
from runner.launch.process import name_of

LONGEST_WAIT = 300.0  # seconds: waits double up to here
FRUITLESS_SECONDS = 60.0  # a stop sooner than this with nothing new saved got nowhere: a notice that does not go away
IN_USE_TRIES = 5  # whoever dies and still holds the run has 5 + 10 + 20 + 40 + 80 seconds, with the default wait


@dataclass(frozen=True)
class Ending:
    """How one attempt ended. `code` is -N where signal N ended it; `asked` is the last signal that was handed on."""

    code: int
    seconds: float = 0.0
    saved_more: bool = False  # a newer checkpoint than any attempt before
    in_use: bool = False  # another process had the run
    gave_up: bool = False  # the run itself says that trying again is no use
    stop_file: bool = False  # somebody put the file STOP into its directory
    asked: int | None = None


@dataclass(frozen=True)
class Streak:
    """How often in a row: crashes without a newer checkpoint, stops that got nowhere, a run found in use."""

    crashes: int = 0
    stops: int = 0
    in_use: int = 0

    def after(self, ending: Ending) -> Streak:
        """With one more attempt counted."""
        before = replace(self, crashes=0) if ending.saved_more else self
        nowhere = ending.code == STOPPED and not ending.saved_more and ending.seconds < FRUITLESS_SECONDS
        return Streak(
            crashes=before.crashes + is_crash(ending.code),
            stops=self.stops + 1 if nowhere else 0,
            in_use=self.in_use + 1 if ending.in_use else 0,
        )


@dataclass(frozen=True)
class Rerun:
    """Run the command again after so many seconds."""

    wait: float
    why: str


@dataclass(frozen=True)
class Leave:
    """End with this exit code."""

    code: int
    why: str


def next_move(ending: Ending, streak: Streak, budget: int, wait: float, chance: float) -> Rerun | Leave:
    """What an ending asks for, `streak` counting it already. `wait` seconds is the base of the back-off.

    A signal that was handed on means that the machine goes away: whoever sent it runs the command again, on the next.
    """
    code, said = exit_code(ending.code), _said(ending.code)
    if ending.asked is not None:
        # Killed by that very signal: it was not listening yet, so nothing was done that could have been lost.
        return Leave(STOPPED if ending.code == -ending.asked else code, f"{said} after {name_of(ending.asked)}")
    if ending.code == STOPPED and ending.stop_file:
        return Leave(code, f"{said} by the file STOP: somebody wants the run to rest")
    if ending.code == STOPPED:
        nowhere = f", {streak.stops} times in a row with nothing new saved" if streak.stops > 1 else ""
        return Rerun(pause(streak.stops - 1, wait, chance), f"{said}{nowhere}")
    if ending.code == RefusedError.exit_code and ending.in_use and streak.in_use <= IN_USE_TRIES:
        return Rerun(pause(streak.in_use, wait, chance), f"the run is in use (try {streak.in_use} of {IN_USE_TRIES})")
    if not is_crash(ending.code):
        return Leave(code, said)
    if ending.gave_up:
        return Leave(code, f"{said}, and gave up: it would crash again")
    if streak.crashes > budget:
        return Leave(code, f"{said}, crash {streak.crashes} in a row without a newer checkpoint")
    so_far = f"{said}, crash {streak.crashes} of {budget} in a row without a newer checkpoint"
    return Rerun(pause(streak.crashes, wait, chance), so_far)


def pause(count: int, base: float, chance: float) -> float:
    """Seconds to wait the `count`-th time in a row: doubled each time, capped, and a random part of up to a half less.

    `chance` is uniform in [0, 1): many that were stopped at once must not all come back at once.
    """
    if count < 1:
        return 0.0
    return float(min(base * 2.0 ** min(count - 1, 30), LONGEST_WAIT) * (1 - chance / 2))


def is_crash(code: int) -> bool:
    """A traceback, or death by a signal; but Ctrl-C is a person who wants to stop."""
    return code == CRASHED or _signal(code) not in (0, signal.SIGINT)


def _signal(code: int) -> int:
    """The signal that ended it, told by the system (-N) or by a shell or launcher (128 + N); 0 where none did."""
    number = -code if code < 0 else code - 128
    return number if number in signal.valid_signals() else 0


def exit_code(code: int) -> int:
    """As a shell tells it."""
    return 128 - code if code < 0 else code


def _said(code: int) -> str:
    if number := _signal(code):
        return f"died of {name_of(number)}" + (" (out of memory?)" if number == signal.SIGKILL else "")
    return {0: "finished", CRASHED: "crashed", STOPPED: "stopped with its state saved"}.get(code, "ended")
