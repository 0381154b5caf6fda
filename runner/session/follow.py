"""Work on a run as one of several processes that does not lead: it computes, and writes its part of each checkpoint.

Whatever else an attempt writes goes into a folder of its own, which is thrown away: process 0 writes the run's. So what
is done for a run is the same code in every process, and only one of them can do anything to its directory.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from runner import files, hosts
from runner.config.identity import hash_identity
from runner.config.schema import Config
from runner.errors import CRASHED, STOPPED, HoldfastError, LostProcessError, RefusedError
from runner.hosts.group import Follower, describe_lost, join_lead
from runner.hosts.link import Link
from runner.hosts.options import Place
from runner.log.console import QuietConsole
from runner.preempt.deadline import Watchdog, read_sign_of
from runner.preempt.listen import listen_to_sources
from runner.preempt.shared_stop import SharedStopFlag
from runner.preempt.signals import listen_to_signals
from runner.preempt.stop import Stopped
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.layout import RunDir
from runner.rundir.numerics import settle_numerics
from runner.rundir.run_lock import borrow_lock
from runner.screen import flush_screen, print_error
from runner.session.base_files import apply_settled
from runner.session.lead import describe_command, read_holder
from runner.train.run_context import RunContext
from runner.types import JsonObject
from runner.values import Outcome

# On a network file system what process 0 has just written is seen by the others a little later.
SEEN_SECONDS = 15.0
# Process 0 answers a failure by ending everybody.
ANSWER_SECONDS = 10.0


def follow_run(config: Config, overrides: Sequence[str], began: float, place: Place) -> Outcome:
    """Work on the run that process 0 leads until that one says that it ends.

    Returns an outcome only where the run has ended before this process came. Raises LostProcessError where process 0
    cannot be reached.
    """
    stop_flag = SharedStopFlag()
    with listen_to_signals(stop_flag, config.preempt.signals, config.preempt.notice_seconds):
        try:
            group = join_lead(place, config.hosts, describe_command(config), stop_flag.raise_if_stopped)
        except Stopped:
            return Outcome("preempted", 0, None, STOPPED)
        if isinstance(group, int):
            return Outcome("finished" if group == 0 else "failed", 0, None, group)
        scratch = Path(tempfile.mkdtemp(prefix="holdfast-"))
        try:
            _follow(config, overrides, began, group, place, stop_flag, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    raise AssertionError("a process that follows ends when process 0 says so")


def _follow(
    config: Config,
    overrides: Sequence[str],
    began: float,
    group: Follower,
    place: Place,
    stop_flag: SharedStopFlag,
    scratch: Path,
) -> None:
    hosts.use_group(group)
    stop_flag.listen_to_others()
    group.handlers.on_end = partial(_leave, scratch)
    group.handlers.on_lost = partial(_leave_lost, scratch)
    if group.ended is not None:
        # It was said before anybody listened.
        _leave(scratch, group.ended)
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        told = hosts.hear("begin")
        config = apply_settled(config, told["settled"])
        run_dir = RunDir(scratch, shared=_find_shared_run(told))
        attempt = AttemptLog(run_dir, config.score, config.train.steps, hash_identity(config.document), began)
        files.make_folder(run_dir.logs)
        attempt.begin(overrides, [])
        group.read_own_sign = lambda: read_sign_of(attempt.heartbeat.read())
        # Nobody reads what this process has to say: process 0 says the same.
        console = QuietConsole(run_dir.log)
        # The file STOP is for process 0.
        sources = replace(config.preempt, stop_file=False)
        with listen_to_sources(sources, run_dir, stop_flag, began):
            attempt.record(threads=settle_numerics(run_dir, console.say).threads)
            context = RunContext(config, run_dir, attempt, console, stop_flag, borrow_lock(run_dir), place=place)
            # Whether a process hangs is judged by process 0, which sees all of them.
            with Watchdog(stop_flag, attempt, run_dir, None, console.say).watch():
                with attempt.time_in("import"):
                    from runner.session.attempt import run_attempt

                run_attempt(context, usual)
                # Process 0 is still writing down how it ended.
                hosts.hear("end")
    except LostProcessError as error:
        # The thread that noticed it ends this process; where it cannot, this does.
        time.sleep(ANSWER_SECONDS)
        raise error
    except HoldfastError as error:
        _tell_and_leave(group, scratch, error.exit_code, str(error).replace(str(scratch), "the run"))
    except Exception as error:
        # What jax says where another process has gone is no failure of this one: process 0 ends it meanwhile.
        if group.find_lost():
            time.sleep(ANSWER_SECONDS)
        print_error(f"process {place.index}: {''.join(traceback.format_exception(error))}")
        _tell_and_leave(group, scratch, CRASHED, f"{type(error).__name__}: {error}")


def _find_shared_run(word: JsonObject) -> Path:
    """Return the directory of the run, once it is seen here. Raises RefusedError where it is not the same here."""
    run, until = Path(word["run"]), time.monotonic() + SEEN_SECONDS
    while True:
        try:
            if read_holder(RunDir(run).lock) == word["holder"]:
                return run
        except OSError:
            pass
        if time.monotonic() > until:
            raise RefusedError(
                f"{run} is not here what it is for process 0: every process of a run needs it on a file system that "
                "all of them share; choose another root=FOLDER"
            )
        time.sleep(0.1)


def _tell_and_leave(group: Follower, scratch: Path, code: int, line: str) -> None:
    """Tell process 0 how this process failed, and end as that one answers."""
    group.tell_failure(code, line)
    time.sleep(ANSWER_SECONDS)
    _leave(scratch, code)


def _leave(scratch: Path, code: int) -> None:
    """End this process at once: nothing of it is needed any more."""
    shutil.rmtree(scratch, ignore_errors=True)
    flush_screen()
    os._exit(code)


def _leave_lost(scratch: Path, link: Link, how: str) -> None:
    """End this process because process 0 has gone; say so first, for jax aborts it in a moment."""
    print_error(f"error: {describe_lost(link, how)}; the same command goes on from the newest checkpoint")
    _leave(scratch, STOPPED)
