"""Listens to what asks for a stop beside signals: the file RUN/STOP, a time limit, and notices of the machine.

Threads ask, each one thing; all they can do is to raise the flag, or to ask for a save. Whatever goes wrong there is
silence, never a notice: a run must not stop because a service is away.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from runner.preempt.metadata import NoAnswer, Notice, Poll
from runner.preempt.options import STOP_FILE, NoticeSource, Preempt, parse_duration
from runner.preempt.stop import StopFlag
from runner.rundir.layout import RunDir

FILE_SECONDS = 1.0  # how often RUN/STOP is looked for
LONGEST_PAUSE = 15.0  # between two tries where nobody answers: a notice may leave no more than 30 s
SHORTEST_PAUSE = 0.1
SILENT = 5  # so many answers that say nothing, in a row, are worth a line


@dataclass(frozen=True)
class Listener:
    """What the threads share: the flag, the run, whether it is over, what is being asked, and what was told already."""

    stop_flag: StopFlag
    run: RunDir
    over: threading.Event = field(default_factory=threading.Event)
    polls: list[Poll] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def log(self, what: str, line: str) -> bool:
        """Write a line to run.log, once for each `what`. Whether this was the first time."""
        if what in self.told:
            return False
        self.told.add(what)
        with suppress(OSError), self.run.log.open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")
        return True


@contextmanager
def listen_to_sources(preempt: Preempt, run: RunDir, stop_flag: StopFlag, began: float) -> Iterator[None]:
    """Listen while the context lasts; `began`: when the process started, in seconds since 1970.

    The caller holds the run: RUN/STOP is taken away at the end, when what it asks for has happened. One that is there
    at the beginning counts: it was put there while nobody listened, by somebody who wants the run to rest.
    """
    ear = Listener(stop_flag, run)
    if preempt.stop_file or preempt.walltime is not None:
        _begin("stop file and walltime", _look, ear, preempt, began)
    for name, source in preempt.notices.items():
        _begin(name, _ask_about, ear, name, source)
    try:
        yield
    finally:
        ear.over.set()
        for poll in list(ear.polls):
            poll.cancel()
        if preempt.stop_file:
            with suppress(OSError):
                run.stop.unlink(missing_ok=True)


def _begin(name: str, work: Callable[..., None], *words: Any) -> None:
    """A thread that the process does not wait for when it ends."""
    threading.Thread(target=work, args=words, name=name, daemon=True).start()


def _look(ear: Listener, preempt: Preempt, began: float) -> None:
    """Look for RUN/STOP, and at the clock."""
    left = None if preempt.walltime is None else began + parse_duration(preempt.walltime) - time.time()
    ends = None if left is None else time.monotonic() + left
    wants_file = preempt.stop_file
    while wants_file or ends is not None:
        if wants_file and os.path.exists(ear.run.stop):  # which takes every trouble for a no
            _act(ear, Notice(STOP_FILE))
            wants_file = False
        if ends is not None and time.monotonic() >= ends:
            _act(ear, Notice(f"walltime {preempt.walltime}"))
            ends = None
        pauses = [FILE_SECONDS] if wants_file else []
        pauses += [max(ends - time.monotonic(), 0.0)] if ends is not None else []
        if pauses and ear.over.wait(min(pauses)):
            return


def _ask_about(ear: Listener, name: str, source: NoticeSource) -> None:
    """Ask the polls of one source, each in a thread of its own."""
    polls = source.polls()
    ear.polls.extend(polls)
    for poll in polls:
        _begin(name, _ask, ear, name, poll)


def _ask(ear: Listener, name: str, poll: Poll) -> None:
    """Ask one poll until the run is over: seldom, and ever more seldom where there is no answer."""
    silent, pause = 0, 0.0
    while not ear.over.wait(pause):
        try:
            notice = poll.ask()
        except NoAnswer as why:
            silent += 1
            pause = min(poll.poll_seconds * 2 ** min(silent, 10), max(LONGEST_PAUSE, poll.poll_seconds))
            if silent >= SILENT:
                ear.log(name, f"preempt.notices.{name} says nothing ({str(why)[:80]!r}); it is asked again, quietly")
            continue
        silent, pause = 0, poll.poll_seconds
        if notice and (early := notice.act_at - time.time()) > 0:
            pause = max(min(pause, early), SHORTEST_PAUSE)
        elif notice:
            _act(ear, notice)


def _act(ear: Listener, notice: Notice) -> None:
    """Raise the flag, or ask for a save and go on; what is said again and again is told once."""
    left = None if notice.ends_at is None else notice.ends_at - time.time()
    if notice.is_final:
        ear.stop_flag.request_stop(notice.reason, left)
        then = "saving at the next step boundary, then stopping" + (f"; {left:.0f} s are left" if left else "")
    else:
        then = "saving at the next step boundary, then going on"
    if ear.log(notice.reason, f"{notice.reason}: {then}"):
        os.write(2, f"\n{notice.reason}: {then}\n".encode())  # the main thread may be inside a print
        if not notice.is_final:
            ear.stop_flag.request_save(notice.reason)
