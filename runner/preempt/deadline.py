"""What happens when there is no time left: a watchdog that ends the process, and a budget that forbids hopeless saves.

Everything else acts at the next step boundary. The watchdog is for when none comes, because one compilation, one step
or one save takes longer than there is time, or for ever.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from runner import hosts
from runner.checkpoint.record import newest_durable_step
from runner.errors import CRASHED, STOPPED
from runner.files import open_file
from runner.hosts.exit_code import tell_exit_code
from runner.hosts.link import Sign
from runner.preempt.stop import StopFlag, Stopped
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.heartbeat import Heartbeat
from runner.rundir.layout import RunDir
from runner.screen import flush_screen, print_error
from runner.values import Say

TICK_SECONDS = 0.1
# What it takes to write down how the attempt ended.
MARGIN_SECONDS = 1.0
# Phases of the training thread whose length says nothing about its health.
PATIENT_PHASES = ("import", "startup", "compile", "finish")
# Of several processes one may keep the others waiting so long in such a phase: a compilation may take an hour.
PATIENT_SECONDS = 7200.0
# Processes that do not hang answer where their threads are within this time.
STACKS_SECONDS = 2.0
# A save that needs more than so many times what is left is not begun. Below it a try may succeed, and a try that fails
# costs nothing.
HOPELESS_FACTOR = 2.0


@dataclass(frozen=True)
class Watchdog:
    """A thread that ends the process shortly before the deadline, and after `hang_seconds` without a sign of life.

    Process 0 of several judges all of them, for where one hangs the others wait for it. With `hang_seconds=None` a
    process may be silent for ever. `find_late_code` gives the exit code for a process whose time is up: 75, or 5 where
    the newest checkpoint is not where it should be by then.
    """

    stop_flag: StopFlag
    attempt: AttemptLog
    run: RunDir
    hang_seconds: float | None
    say: Say
    find_late_code: Callable[[], int] = lambda: STOPPED

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch while the context lasts. May end the process, with exit code 75 (no time left) or 1 (it hangs)."""
        done = threading.Event()
        thread = threading.Thread(target=self._run, args=(done,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _run(self, done: threading.Event) -> None:
        silences, group = Silences(is_alone=hosts.is_alone()), hosts.current_group()
        while not done.wait(TICK_SECONDS):
            if self.stop_flag.deadline is not None and time.monotonic() > self.stop_flag.deadline - MARGIN_SECONDS:
                end_process(self.find_late_code(), self._record_timeout)
            signs = {"": read_sign_of(self.attempt.heartbeat.read())} | {link.name: link.sign for link in group.links}
            silences.count_tick(signs)
            if self.hang_seconds is not None and silences.are_too_long(self.hang_seconds):
                end_process(CRASHED, partial(self._record_hang, signs))

    def _record_timeout(self) -> None:
        """Write down that time is up: the newest durable checkpoint is what there is."""
        heartbeat = self.attempt.heartbeat.read()
        durable = newest_durable_step(self.run.checkpoints)
        lost = max(heartbeat.step - durable, 0)
        stands = f"checkpoint {durable} stands" if durable else "nothing was saved yet"
        steps = "no step is lost" if not lost else f"{lost} steps are lost and done again"
        why = f"{self.stop_flag.asked}: time was up during {heartbeat.phase} at step {heartbeat.step}"
        self.say(f"stopped by {why}; {stands}, {steps}; the same command goes on from there")
        self.attempt.end("preempted", max(heartbeat.step, durable), why, durable)

    def _record_hang(self, signs: Mapping[str, Sign]) -> None:
        """Write down that nothing moves, and the stacks of all threads of all processes in run.log."""
        name = find_hanging(signs)
        sign, who = signs[name], f" of {name}" if name else ""
        why = f"no sign of life{who} for {self.hang_seconds:g} s during {sign.phase}, after step {sign.step}"
        ends = "the process ends" if len(signs) == 1 else "all processes end"
        self.say(f"error: {why}: {ends}; the stacks are in {self.run.log}")
        # A full disk has no room for them.
        with suppress(OSError), os.fdopen(open_file(self.run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as log:
            faulthandler.dump_traceback(log, all_threads=True)
            for other, stacks in hosts.current_group().collect_stacks(STACKS_SECONDS).items():
                log.write(f"{other}:\n{stacks}")
        durable = newest_durable_step(self.run.checkpoints)
        self.attempt.end("failed", max(sign.step, durable), why, durable)


class Silences:
    """For how long each process of a run has given no sign of life: has not changed its step or its phase."""

    def __init__(self, *, is_alone: bool):
        self._patience = math.inf if is_alone else PATIENT_SECONDS
        # Ticks are counted, not seconds: where this process was suspended, nothing hung.
        self._last: Mapping[str, Sign] = {}
        self._ticks: dict[str, int] = {}

    def count_tick(self, signs: Mapping[str, Sign]) -> None:
        """Count a tick for each process, by its name, whose sign is what it was."""
        self._ticks = {
            name: self._ticks.get(name, 0) + 1 if self._last.get(name) == sign else 0 for name, sign in signs.items()
        }
        self._last = signs

    def are_too_long(self, hang_seconds: float) -> bool:
        """Return whether a process has been silent for too long, and none for which the others may be waiting."""
        seconds = {name: ticks * TICK_SECONDS for name, ticks in self._ticks.items()}
        patient = [seconds[name] for name, sign in self._last.items() if sign.phase in PATIENT_PHASES]
        if patient:
            return max(patient) > max(self._patience, hang_seconds)
        return any(silent > hang_seconds for silent in seconds.values())


def find_hanging(signs: Mapping[str, Sign]) -> str:
    """Return the process for which the others seem to wait: furthest behind, and not in a step, where all wait."""
    # Of those that are equal the first one, which is process 0.
    return min(signs, key=lambda name: (signs[name].step, signs[name].phase == "step"))


def read_sign_of(heartbeat: Heartbeat) -> Sign:
    """Return a heartbeat as other processes are told it."""
    return Sign(heartbeat.step, heartbeat.phase, heartbeat.writing, heartbeat.changed)


def end_process(exit_code: int, record: Callable[[], None]) -> NoReturn:
    """End the process, and the others of its run, once it is written down how, or where that fails.

    A disk may be what went wrong.
    """
    try:
        record()
    except Exception as error:
        print_error(f"error: how the attempt ended could not be written down: {type(error).__name__}: {error}")
    finally:
        hosts.current_group().tell_end(exit_code)
        tell_exit_code(exit_code)
        # `_exit`: an ordinary exit would wait for threads and destructors, one of which may be what hangs.
        flush_screen()
        os._exit(exit_code)


def describe_shortfall(
    save_seconds: float, notice_seconds: float, source: str, upload_seconds: float = 0.0
) -> str | None:
    """Return a warning where a save takes longer than `source` leaves, with the ways out; None where it does not."""
    if save_seconds + upload_seconds <= notice_seconds:
        return None
    sending = f" and {upload_seconds:.3g} s more until it is in the bucket" if upload_seconds else ""
    return (
        f"warning: a checkpoint takes {save_seconds:.3g} s until it is durable{sending}, but {source} leaves "
        f"{notice_seconds:g} s: a stop would lose the steps since the last one; save more often, write to a faster "
        "disk, or, where the machine leaves longer, say so"
    )


def is_hopeless(save_seconds: float | None, seconds_left: float | None) -> bool:
    """Return whether a save that is begun now would surely be cut off; False where either time is unknown."""
    if save_seconds is None or seconds_left is None:
        return False
    return save_seconds > HOPELESS_FACTOR * max(seconds_left, 0.0)


class SaveBudget:
    """Knows what a save takes: warns once where a notice leaves less, and says whether there is time for another one.

    `shortest_notice` is the fewest seconds that any source leaves, and its name; `save_seconds` is what the newest
    checkpoint took, None where there is none; `upload_seconds` gives what it takes to send one to the run's other
    place, None where there is none: a stop is done when it is there.
    """

    def __init__(
        self,
        stop_flag: StopFlag,
        shortest_notice: tuple[float, str],
        say: Say,
        save_seconds: float | None,
        upload_seconds: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._stop_flag, self._shortest_notice, self._say = stop_flag, shortest_notice, say
        self._upload_seconds = upload_seconds
        self._save_seconds: float | None = None
        self._has_warned = False
        if save_seconds is not None:
            self.record_save(save_seconds)

    def record_save(self, seconds: float) -> None:
        """Remember how long a save took until it was durable."""
        self._save_seconds = seconds
        warning = describe_shortfall(seconds, *self._shortest_notice, self._upload_seconds() or 0.0)
        if warning and not self._has_warned:
            self._has_warned = True
            self._say(warning)

    def raise_if_hopeless(self) -> None:
        """Raise Stopped where there is a deadline that a save begun now could not keep, in every process of the run."""
        deadline = self._stop_flag.deadline
        left = None if deadline is None else deadline - time.monotonic()
        upload = self._upload_seconds() or 0.0
        hopeless = is_hopeless(None if self._save_seconds is None else self._save_seconds + upload, left)
        sending = f", sending it {upload:.3g} s" if upload else ""
        trouble = f"a save takes {self._save_seconds:.3g} s{sending} and {left:.3g} s are left" if hopeless else None
        if (trouble := hosts.agree("hopeless", trouble)) is not None:
            raise Stopped(trouble)
