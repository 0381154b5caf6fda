"""What no other code can do any more: leave when time is up, and end a process that hangs.

A thread that looks ten times a second. Everything else acts at the next boundary; this is for when none comes, because
one compilation, one step or one save takes longer than there is time, or for ever.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol

from runner.checkpoint.record import newest_durable_step
from runner.errors import CRASHED, STOPPED
from runner.preempt.stop import StopFlag, Stopped
from runner.rundir.heartbeat import Heartbeat
from runner.rundir.layout import RunDir

HOPELESS = 2.0  # times as long as there is left: below it a try may succeed, and a try that fails costs nothing

TICK_SECONDS = 0.1
MARGIN_SECONDS = 1.0  # what it takes to write down how it ended
PATIENT = ("import", "startup", "compile", "finish")  # phases whose length says nothing about health


class Ledger(Protocol):
    """What the guard asks of ledger.py."""

    def last_heartbeat(self) -> Heartbeat: ...
    def end(self, state: str, reached: int, why: str, durable: int | None = None) -> None: ...


@dataclass(frozen=True)
class Watchdog:
    """Who is watched over, and how patiently: `hang_seconds` without a sign of life, or None for ever."""

    stop_flag: StopFlag
    ledger: Ledger
    run: RunDir
    hang_seconds: float | None
    say: Callable[[str], None]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch while the context lasts. May end the process."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), name="guard", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        # Ticks are counted, not seconds: a process that was suspended did not hang.
        quiet, last = 0, self.ledger.last_heartbeat()
        while not done.wait(TICK_SECONDS):
            if self.stop_flag.deadline is not None and time.monotonic() > self.stop_flag.deadline - MARGIN_SECONDS:
                self._leave()
            beat = self.ledger.last_heartbeat()
            quiet, last = (0, beat) if beat != last or beat.phase in PATIENT else (quiet + 1, last)
            if self.hang_seconds is not None and quiet * TICK_SECONDS > self.hang_seconds:
                self._abort(beat)

    def _leave(self) -> NoReturn:
        """Time is up: the newest durable checkpoint stands."""
        beat = self.ledger.last_heartbeat()
        durable = newest_durable_step(self.run.checkpoints)
        lost = max(beat.step - durable, 0)
        stands = f"checkpoint {durable} stands" if durable else "nothing was saved yet"
        steps = "no step is lost" if not lost else f"{lost} steps are lost and done again"
        why = f"{self.stop_flag.reason}: time was up during {beat.phase} at step {beat.step}"
        self.say(f"stopped by {why}; {stands}, {steps}; the same command goes on from there")
        self._end("preempted", beat.step, why, durable, STOPPED)

    def _abort(self, beat: Heartbeat) -> NoReturn:
        """Nothing moves: leave the stacks of all threads in run.log."""
        why = f"no sign of life for {self.hang_seconds:g} s during {beat.phase}, after step {beat.step}"
        self.say(f"error: {why}: the process ends; the stacks are in {self.run.log}")
        with self.run.log.open("a") as log:
            faulthandler.dump_traceback(log, all_threads=True)
        self._end("failed", beat.step, why, newest_durable_step(self.run.checkpoints), CRASHED)

    def _end(self, state: str, reached: int, why: str, durable: int, exit_code: int) -> NoReturn:
        try:
            self.ledger.end(state, max(reached, durable), why, durable)
            sys.stdout.flush()
        finally:  # also where the disk does not let us write: time is up
            os._exit(exit_code)


def describe_shortfall(save_seconds: float, notice_seconds: float, source: str) -> str | None:
    """A warning where a save takes longer than a notice leaves, with both numbers and the ways out; else None."""
    if save_seconds <= notice_seconds:
        return None
    return (
        f"warning: a checkpoint takes {save_seconds:.3g} s until it is durable, but {source} leaves "
        f"{notice_seconds:g} s: a stop would lose the steps since the last one; save more often, write to a faster "
        "disk, or, where the machine leaves longer, say so"
    )


def is_hopeless(save_seconds: float | None, seconds_left: float | None) -> bool:
    """Whether a save that is begun now would surely be cut off."""
    return save_seconds is not None and seconds_left is not None and save_seconds > HOPELESS * max(seconds_left, 0.0)


class SaveBudget:
    """Learns what a save takes; warns once where that is too long, and says at a notice whether to begin another."""

    def __init__(
        self, stop_flag: StopFlag, notice: tuple[float, str], tell: Callable[[str], None], seconds: float | None
    ):
        self._stop_flag, self._notice, self._tell = stop_flag, notice, tell
        self._seconds: float | None = None
        self._warned = False
        if seconds is not None:
            self.record_save(seconds)

    def record_save(self, seconds: float) -> None:
        """A save took so long until it was durable."""
        self._seconds = seconds
        warning = describe_shortfall(seconds, *self._notice)
        if warning and not self._warned:
            self._warned = True
            self._tell(warning)

    def raise_if_hopeless(self) -> None:
        """Raises Stopped where there is a deadline that a save begun now could not keep."""
        deadline = self._stop_flag.deadline
        left = None if deadline is None else deadline - time.monotonic()
        if is_hopeless(self._seconds, left):
            raise Stopped(f"a save takes {self._seconds:.3g} s and {left:.3g} s are left")
