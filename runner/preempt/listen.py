"""Listen to what asks for a stop beside signals: the file RUN/STOP, a time limit, and notices of the machine.

Each question has a thread of its own, and all that a thread can do is to request a stop or a save. Whatever goes wrong
there counts as no answer, never as a notice: a run must not stop because a service is away.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from runner.files import append_text
from runner.preempt.notice import NoAnswer, Notice, Poll
from runner.preempt.preempt_options import STOP_FILE, NoticeSource, Preempt, parse_walltime
from runner.preempt.stop import StopFlag
from runner.rundir.layout import RunDir
from runner.rundir.process_age import seconds_since_start
from runner.screen import print_past_locks
from runner.text import utc_now

STOP_FILE_SECONDS = 1.0
# Between two tries where nobody answers. A notice may leave no more than 30 s, so the pause stays below that.
LONGEST_PAUSE = 15.0
SHORTEST_PAUSE = 0.1
# So many polls in a row without an answer are worth a line.
MANY_UNANSWERED = 5


@contextmanager
def listen_to_sources(preempt: Preempt, run: RunDir, stop_flag: StopFlag, began: float) -> Iterator[None]:
    """Listen while the context lasts; `began` is when the process started, in seconds since 1970.

    The caller holds the run's lock. RUN/STOP is removed at the end, when what it asks for has happened; a kill before
    that must not lose the request. One that is there at the beginning counts: somebody put it there while nobody
    listened, to keep the run from going on.
    """
    listener = Listener(stop_flag, run)
    if preempt.stop_file or preempt.walltime is not None:
        _start_daemon("stop file and walltime", listener.watch_file_and_clock, preempt, began)
    for name, source in preempt.notices.items():
        _start_daemon(name, listener.poll_source, name, source)
    try:
        yield
    finally:
        listener.over.set()
        # Copied: a source that was slow to begin may be adding its polls right now.
        for poll in list(listener.polls):
            poll.cancel()
        if preempt.stop_file:
            with suppress(OSError):
                run.stop.unlink(missing_ok=True)


def _start_daemon(name: str, work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name=name, daemon=True).start()


@dataclass(frozen=True)
class Listener:
    """What the listening threads share: the flag they set, the run, whether it is over, the polls, what was logged."""

    stop_flag: StopFlag
    run: RunDir
    over: threading.Event = field(default_factory=threading.Event)
    polls: list[Poll] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)

    def watch_file_and_clock(self, preempt: Preempt, began: float) -> None:
        """Request a stop when RUN/STOP appears, and when the process is older than `preempt.walltime`."""
        # Measured by the monotonic clock: the other one may be set while training.
        ends = None
        if preempt.walltime is not None:
            ends = time.monotonic() + parse_walltime(preempt.walltime) - seconds_since_start(began)
        wants_file = preempt.stop_file
        while wants_file or ends is not None:
            # `os.path.isfile` is False for every trouble of the file system; `Path.is_file` raises for some. A folder
            # of that name asks for nothing: it could not be removed afterwards, and would stop every attempt.
            if wants_file and os.path.isfile(self.run.stop):
                self._act_on(Notice(STOP_FILE), time.time())
                wants_file = False
            if ends is not None and time.monotonic() >= ends:
                self._act_on(Notice(f"walltime {preempt.walltime}"), time.time())
                ends = None
            pauses = [STOP_FILE_SECONDS] if wants_file else []
            if ends is not None:
                pauses.append(max(ends - time.monotonic(), 0.0))
            if pauses and self.over.wait(min(pauses)):
                return

    def poll_source(self, name: str, source: NoticeSource) -> None:
        """Start a thread for each poll of one source. In a thread itself: finding out where we are reads files."""
        polls = source.polls()
        self.polls.extend(polls)
        for poll in polls:
            _start_daemon(name, self._poll, name, poll)

    def _poll(self, name: str, poll: Poll) -> None:
        """Ask one question until the run is over, ever more seldom while there is no answer."""
        unanswered, pause = 0, 0.0
        # Of each notice, how far a clock that nobody can set was behind the machine's when it was first heard.
        offsets: dict[Notice, float] = {}
        while not self.over.wait(pause):
            try:
                notice = poll.ask()
            except NoAnswer as why:
                unanswered += 1
                backoff = poll.poll_seconds * 2 ** min(unanswered, 10)
                pause = min(backoff, max(LONGEST_PAUSE, poll.poll_seconds))
                if unanswered >= MANY_UNANSWERED:
                    line = f"preempt.notices.{name} says nothing ({str(why)[:80]!r}); it is asked again, quietly"
                    self._log_once(name, line)
                continue
            unanswered, pause = 0, poll.poll_seconds
            if notice is None:
                continue
            # The later of two clocks: one that is set back while training must not have the machine go away first.
            offset = offsets.setdefault(notice, time.time() - time.monotonic())
            now = max(time.time(), time.monotonic() + offset)
            if (early := notice.act_at - now) > 0:
                # Not yet: look again when it is due, even if the next poll would be later.
                pause = max(min(pause, early), SHORTEST_PAUSE)
            else:
                self._act_on(notice, now)

    def _act_on(self, notice: Notice, now: float) -> None:
        """Request a stop, or a save for a notice that is not final; what is heard again and again is told once.

        `now` in seconds since 1970, as the times of the notice are.
        """
        left = None if notice.ends_at is None else notice.ends_at - now
        if notice.is_final:
            # At every poll, for the deadline may have moved; the flag keeps the first reason and the nearest deadline.
            self.stop_flag.request_stop(notice.reason, left)
            then = "saving at the next step boundary, then stopping" + (f"; {left:.0f} s are left" if left else "")
        else:
            then = "saving at the next step boundary, then going on"
        if self._log_once(notice.reason, f"{notice.reason}: {then}"):
            if not notice.is_final:
                self.stop_flag.request_save(notice.reason)
            print_past_locks(f"{notice.reason}: {then}")

    def _log_once(self, topic: str, line: str) -> bool:
        """Write a line to run.log if it is the first about its topic, and return whether it was."""
        if topic in self.logged:
            return False
        self.logged.add(topic)
        with suppress(OSError):
            append_text(self.run.log, f"{utc_now()} {line}\n")
        return True
