"""One flag that asks a run to stop at the next step boundary: why, and until when.

Signals, a file, a time limit and the notices of a machine only set the flag; the training thread looks at it. Whatever
may take long (compiling, restoring, waiting for data) runs in another thread while the training thread waits through
`StopFlag.wait_for`, so a stop is seen at once there too, and not only between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """A wait ended because a stop was requested; the flag has the reason."""


class StopFlag:
    """A request to stop that any thread may make, and a request to save and go on.

    `reason` is None until the first request; later ones do not replace it. `deadline`, in `time.monotonic()` seconds,
    is when the process will be killed, or None where nobody knows.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None
        self._save_request: str | None = None
        self._changed = threading.Condition()

    def request_stop(self, reason: str, seconds: float | None = None) -> None:
        """Ask for a stop; the process is killed `seconds` from now, if that is known. The nearest deadline counts."""
        with self._changed:
            self.reason = self.reason or reason
            if seconds is not None:
                self._keep_nearest(time.monotonic() + seconds)
            self._changed.notify_all()

    def _keep_nearest(self, deadline: float) -> None:
        self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)

    def begin_training(self) -> None:
        """Take note that training begins."""

    def request_save(self, reason: str) -> None:
        """Ask for a save at the next step boundary, after which training goes on."""
        self._save_request = reason

    def pop_save_request(self) -> str | None:
        """Return the reason of a requested save and forget it; None where no save was requested."""
        # Called at every step, so the usual case is one comparison. No lock: assigning a name is atomic, and a request
        # that replaces another at this very moment asks for the same save.
        if self._save_request is None:
            return None
        reason, self._save_request = self._save_request, None
        return reason

    @property
    def asked(self) -> str | None:
        """Return why a stop was requested, also where it is not yet acted on; None where none was."""
        return self.reason

    def agree_to_stop(self) -> str | None:
        """Return why to stop here, at a boundary to which every process of the run comes; None where to go on."""
        return self.reason

    def raise_if_stopped(self) -> None:
        """Raise Stopped where a stop was requested; every process of the run comes here."""
        if self.agree_to_stop() is not None:
            raise Stopped

    def wait_for(self, future: Future[T]) -> T:
        """Return the result of work in another thread. Raises Stopped where a stop is requested before it is done."""
        if not future.done():
            future.add_done_callback(self._wake)
            with self._changed:
                self._changed.wait_for(lambda: future.done() or self.reason is not None)
        # Both may have happened: work that is done is not thrown away.
        if not future.done():
            raise Stopped
        return future.result()

    def _wake(self, _: Future[T]) -> None:
        with self._changed:
            self._changed.notify_all()


def run_in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Start `work` in a daemon thread of this name and return its future.

    Unlike the threads of an executor, a daemon thread does not keep the process alive: after a stop, a compilation that
    is still under way is simply abandoned.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        # Whatever it is, KeyboardInterrupt included: the thread that waits has to hear of it.
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
