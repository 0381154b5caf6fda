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

from runner.checkpoint.record import durable_step
from runner.errors import CRASHED, STOPPED
from runner.preempt.watch import Watcher
from runner.pulse import Beat
from runner.rundir import Run

TICK_SECONDS = 0.1
MARGIN_SECONDS = 1.0  # what it takes to write down how it ended
PATIENT = ("import", "startup", "compile", "finish")  # phases whose length says nothing about health


class Ledger(Protocol):
    """What the guard asks of ledger.py."""

    def beat_now(self) -> Beat: ...
    def end(self, state: str, reached: int, why: str, durable: int | None = None) -> None: ...


@dataclass(frozen=True)
class Guard:
    """Who is watched over, and how patiently: `hang_seconds` without a sign of life, or None for ever."""

    watcher: Watcher
    ledger: Ledger
    run: Run
    hang_seconds: float | None
    say: Callable[[str], None]

    @contextmanager
    def watching(self) -> Iterator[None]:
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
        quiet, last = 0, self.ledger.beat_now()
        while not done.wait(TICK_SECONDS):
            if self.watcher.deadline is not None and time.monotonic() > self.watcher.deadline - MARGIN_SECONDS:
                self._leave()
            beat = self.ledger.beat_now()
            quiet, last = (0, beat) if beat != last or beat.phase in PATIENT else (quiet + 1, last)
            if self.hang_seconds is not None and quiet * TICK_SECONDS > self.hang_seconds:
                self._abort(beat)

    def _leave(self) -> NoReturn:
        """Time is up: the newest durable checkpoint stands."""
        beat = self.ledger.beat_now()
        durable = durable_step(self.run.checkpoints)
        lost = max(beat.step - durable, 0)
        stands = f"checkpoint {durable} stands" if durable else "nothing was saved yet"
        steps = "no step is lost" if not lost else f"{lost} steps are lost and done again"
        why = f"{self.watcher.notice}: time was up during {beat.phase} at step {beat.step}"
        self.say(f"stopped by {why}; {stands}, {steps}; the same command goes on from there")
        self._end("preempted", beat.step, why, durable, STOPPED)

    def _abort(self, beat: Beat) -> NoReturn:
        """Nothing moves: leave the stacks of all threads in run.log."""
        why = f"no sign of life for {self.hang_seconds:g} s during {beat.phase}, after step {beat.step}"
        self.say(f"error: {why}: the process ends; the stacks are in {self.run.log}")
        with self.run.log.open("a") as log:
            faulthandler.dump_traceback(log, all_threads=True)
        self._end("failed", beat.step, why, durable_step(self.run.checkpoints), CRASHED)

    def _end(self, state: str, reached: int, why: str, durable: int, exit_code: int) -> NoReturn:
        try:
            self.ledger.end(state, max(reached, durable), why, durable)
            sys.stdout.flush()
        finally:  # also where the disk does not let us write: time is up
            os._exit(exit_code)
