"""A request to stop that all processes of a run follow at the same place.

A request may come to any of them: a signal, a notice, a time limit. Before training begins all are told at once, and
leave what they do. From then on one must not leave alone: the others would wait for it in a computation. So a request
only waits, with process 0, for the next boundary to which all of them come; there all learn of it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TypeVar

from runner import hosts
from runner.preempt.stop import StopFlag

T = TypeVar("T")


class SharedStopFlag(StopFlag):
    """The flag of one of several processes. `reason` is what all have agreed on."""

    def __init__(self) -> None:
        super().__init__()
        self._asked: str | None = None
        self._trains = False

    def listen_to_others(self) -> None:
        """Take the requests of the other processes from now on; the group must have been joined."""
        handlers = hosts.current_group().handlers
        handlers.on_save = self.request_save
        handlers.on_stop = self.request_stop if hosts.is_lead() else super().request_stop

    @property
    def asked(self) -> str | None:
        """Return why a stop was requested, also where it is not yet acted on; None where none was."""
        return self.reason or self._asked

    def request_stop(self, reason: str, seconds: float | None = None) -> None:
        """Ask for a stop; this process is killed `seconds` from now, if that is known."""
        with self._changed:
            self._asked = self._asked or reason
            if seconds is not None:
                self._keep_nearest(time.monotonic() + seconds)
            trains = self._trains
        if hosts.is_alone():
            # Not joined yet: there is nobody to agree with.
            super().request_stop(reason, seconds)
        elif not (hosts.is_lead() and trains):
            # To process 0, which decides; or from it to all, where there is no step yet to agree on.
            hosts.current_group().ask_to_stop(reason, seconds)
            if hosts.is_lead():
                super().request_stop(reason, seconds)

    def request_save(self, reason: str) -> None:
        """Ask for a save at the next step boundary: process 0 decides."""
        if hosts.is_lead():
            super().request_save(reason)
        else:
            hosts.current_group().ask_to_save(reason)

    def begin_training(self) -> None:
        """Have requests wait for boundaries from now on. Every process comes here, and stops here where one was."""
        with self._changed:
            self._trains = True
        self.raise_if_stopped()

    def agree_to_stop(self) -> str | None:
        """Return why to stop here, in every process; None where to go on."""
        if not self._trains:
            return self.reason
        left = None if self.deadline is None else self.deadline - time.monotonic()
        why, seconds = hosts.agree("stop", (self.asked, left))
        if why is not None and self.reason is None:
            super().request_stop(why, seconds)
        return self.reason

    def wait_for(self, future: Future[T]) -> T:
        """Return the result of work in another thread. While training, nothing ends this wait but the work itself."""
        return future.result() if self._trains else super().wait_for(future)
