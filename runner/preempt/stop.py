"""One flag that says: stop at the next step boundary, why, and until when. Sources raise it; ordinary code looks at it.

Whatever may take long waits through the flag (`wait_for`), in the training thread, while another thread does the work:
so a stop is seen while a program is compiled, a checkpoint read or data awaited, and not only between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """A wait ended because a stop was asked for. The reason is in the flag."""


class StopFlag:
    """The flag. Any thread may raise it; `reason` is None until the first source does, and the first reason stays."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.deadline: float | None = None  # in time.monotonic(); None: nobody knows how long there is
        self._wish: str | None = None
        self._changed = threading.Condition()

    def request_stop(self, reason: str, seconds: float | None = None) -> None:
        """Ask for a stop; the process has `seconds` from now if that is known. The nearest deadline counts."""
        with self._changed:
            self.reason = self.reason or reason
            if seconds is not None:
                deadline = time.monotonic() + seconds
                self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)
            self._changed.notify_all()

    def request_save(self, reason: str) -> None:
        """Ask for a save at the next step boundary, and to go on after it: a warning that is not final."""
        self._wish = reason

    def pop_save_request(self) -> str | None:
        """The reason to save now that a source gave, once."""
        if self._wish is None:  # asked at every step
            return None
        wish, self._wish = self._wish, None
        return wish

    def raise_if_stopped(self) -> None:
        """Raises Stopped where a stop was asked for."""
        if self.reason is not None:
            raise Stopped

    def wait_for(self, future: Future[T]) -> T:
        """The result of work that another thread does. Raises Stopped where a stop is asked for before it is there."""
        if not future.done():
            future.add_done_callback(self._wake)
            with self._changed:
                self._changed.wait_for(lambda: future.done() or self.reason is not None)
        if not future.done():
            raise Stopped
        return future.result()

    def _wake(self, _: Future[T]) -> None:
        with self._changed:
            self._changed.notify_all()


def run_in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Work in a thread of its own that the process does not wait for when it ends: it may be abandoned by a stop."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
