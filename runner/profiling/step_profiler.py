"""Start and end a trace between two steps, and make of it what a person reads, in a thread.

Nothing here changes what a step computes: no program is compiled or called otherwise while it is traced. Before a trace
begins, and before it ends, training waits until the steps that were dispatched are complete, so that the trace holds
these steps and no others. Whatever goes wrong is told in a line, and training goes on.

Of several processes, process 0 traces its own devices; the others do the same steps as always.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from runner import hosts
from runner.files import remove_file, remove_tree
from runner.preempt.stop import run_in_thread
from runner.profiling.operations import classify_operations
from runner.profiling.options import Profile
from runner.profiling.profile_record import (
    ProfileRecord,
    begin_record,
    list_profiles,
    publish_record,
    remove_cut_short,
)
from runner.profiling.trace_summary import summarize_trace
from runner.profiling.window import Window, plan_window
from runner.rundir.layout import RunDir
from runner.text import display_path
from runner.values import Say

REQUEST_SECONDS = 1.0
# Reading a trace is worth so much of a person's time at the end of a run, and none where the process is to stop.
PATIENCE_SECONDS = 60.0


class NoProfiler:
    """Trace nothing."""

    def before_step(self, step: int, drain: Callable[[], None]) -> None:
        """Do nothing."""

    def after_step(self, step: int, drain: Callable[[], None]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Surroundings:
    """What a profiler needs of its run.

    Attributes:
        run_dir: where traces and the file PROFILE lie.
        hardware: the devices of the run.
        say: tells a person a line. From any thread.
        text: gives the text of the compiled step (HLO), and takes a while.
        paused: counts the time of a block as that of tracing, and not of steps.
        clock: tells the seconds of steps so far: without those of evaluations, of saves, and of tracing.
        is_stopping: tells whether the process is to stop. From any thread.
    """

    run_dir: RunDir
    hardware: str
    say: Say
    text: Callable[[], str]
    paused: Callable[[], AbstractContextManager[None]]
    clock: Callable[[], float]
    is_stopping: Callable[[], bool]


class StepProfiler:
    """Trace the steps that `profile=` names, and the next ones whenever somebody makes the file RUN/PROFILE.

    Training goes on from `step`, towards `last_step`. `close` comes at the end, whatever happened.
    """

    def __init__(self, options: Profile, around: Surroundings, step: int, last_step: int):
        self._options, self._around, self._last_step = options, around, last_step
        profiles = around.run_dir.profile
        if remove_cut_short(profiles):
            around.say("profile: a trace that was cut short is removed")
        done = {record.window.asked for record in list_profiles(profiles)} - {None}
        self._window, line = plan_window(options, step, last_step, {asked for asked in done if asked is not None})
        if line:
            around.say(line)
        self._folder: Path | None = None  # into which is traced now
        self._began = 0.0
        self._reading: threading.Event | None = None
        # The usual case at every step is one comparison with each of these.
        self._begins = self._window.first if self._window else 0
        self._ends = 0
        self._is_asked, self._over = False, threading.Event()
        threading.Thread(target=self._watch_request, name="profile request", daemon=True).start()

    def before_step(self, step: int, drain: Callable[[], None]) -> None:
        """Begin a trace where this step is to be its first; `drain` waits for the steps that were dispatched."""
        if self._is_asked and self._folder is None and not self._is_reading():
            self._is_asked = False
            self._window = Window(step, min(step + self._options.steps - 1, self._last_step), None)
            self._begins = step
        if step == self._begins:
            drain()
            with self._around.paused():
                self._begin()
            self._began = self._around.clock()

    def after_step(self, step: int, drain: Callable[[], None]) -> None:
        """End the trace where this step was its last; `drain` waits for the steps that were dispatched."""
        if step == self._ends:
            drain()
            seconds = self._around.clock() - self._began
            with self._around.paused():
                self._end(seconds)

    def close(self) -> None:
        """Wait for what is being read; drop a trace whose steps did not all come."""
        self._over.set()
        # Most runs trace nothing, and have nothing to say of the time it took.
        if self._folder is not None or self._is_reading():
            with self._around.paused():
                if self._folder is not None:
                    self._drop()
                gives_up = time.monotonic() + PATIENCE_SECONDS
                while self._is_reading() and time.monotonic() < gives_up and not self._around.is_stopping():
                    self._reading.wait(0.1)  # type: ignore[union-attr]
        if self._is_asked or self._take_request():
            self._around.say("PROFILE: training ended before it; nothing is traced")

    def _begin(self) -> None:
        # Imported where something is traced.
        import jax

        say, self._begins = self._around.say, 0
        assert self._window is not None
        try:
            folder = begin_record(self._around.run_dir.profile)
            options = jax.profiler.ProfileOptions()
            # What Python does is in no share, and to write it down would make it slow.
            options.python_tracer_level = 0
            jax.profiler.start_trace(folder, profiler_options=options)
        # No room on the disk, no permission, a trace that the user's own code has begun.
        except Exception as error:
            say(f"warning: profile: not traced: {self._window}: {type(error).__name__}: {error}")
            return
        self._folder, self._ends = folder, self._window.last
        say(f"profile: tracing {self._window}{'' if hosts.is_alone() else ', on the devices of process 0'}")

    def _end(self, seconds: float) -> None:
        folder, window = self._folder, self._window
        assert folder is not None
        assert window is not None
        if self._stop_trace():
            self._reading = done = threading.Event()

            def read() -> None:
                try:
                    _publish(folder, window, seconds, self._around)
                finally:
                    done.set()

            # Beside the steps that follow: a long trace takes seconds to read.
            run_in_thread(read, "read profile")

    def _stop_trace(self) -> bool:
        """Write the trace down; return whether it is there."""
        import jax

        self._folder, self._ends = None, 0
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._around.say(f"warning: profile: the trace is lost: {type(error).__name__}: {error}")
            return False
        return True

    def _drop(self) -> None:
        folder, window = self._folder, self._window
        self._stop_trace()
        assert folder is not None
        remove_tree(folder)
        self._around.say(f"profile: training did not come to the end of {window}; nothing is kept")

    def _is_reading(self) -> bool:
        return self._reading is not None and not self._reading.is_set()

    def _watch_request(self) -> None:
        while not self._over.wait(REQUEST_SECONDS):
            if not self._is_asked and self._take_request():
                self._is_asked = True

    def _take_request(self) -> bool:
        """Take the file PROFILE away; return whether it was there. What cannot be taken away asks for nothing."""
        # As with STOP: a folder of that name is no request.
        request = self._around.run_dir.profile_request
        if not request.is_file():
            return False
        with suppress(OSError):
            remove_file(request)
            return True
        return False


def _publish(folder: Path, window: Window, seconds: float, around: Surroundings) -> None:
    """Read a trace that is whole, write down what it says, and tell it."""
    summary, problem = None, ""
    try:
        (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
        summary = summarize_trace(trace, classify_operations(around.text()), seconds)
    # A trace that cannot be summed up can still be looked at.
    except Exception as error:
        problem = f"the trace cannot be summed up: {type(error).__name__}: {error}"
    try:
        record = ProfileRecord(window, around.hardware, summary, problem, folder)
        target = publish_record(record)
    except OSError as error:
        around.say(f"warning: profile: the trace of {window} is not kept: {error}")
        remove_tree(folder)
        return
    warning = "warning: " if problem else ""
    around.say(
        f"{warning}profile: {record.describe()}\nprofile: {display_path(target)} has the trace, for XProf or Perfetto"
    )
