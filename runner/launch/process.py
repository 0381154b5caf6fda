"""A process of ours: in a group of its own, and asked to stop when we die, however we die."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def spawn(
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    cores: Collection[int] = (),
    stdin: int | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command, on these cores if any are named. Raises OSError where it cannot be run.

    In its own process group, so that a signal to ours (by Ctrl-C, a shell, `timeout`) reaches it from us and not a
    second time by itself: a second one means "leave without saving".
    """
    return subprocess.Popen(
        words,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env={**os.environ, **environment},
        process_group=0,
        preexec_fn=_before(os.getpid(), cores),
    )


@contextmanager
def hearing(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """While the context lasts, have `handler` hear what is to be handed on to children.

    A hang-up that is ignored stays so: that is what nohup asks for.
    """
    hung_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    numbers = [number for number in HANDED_ON if hung_up or number != signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _before(parent: int, cores: Collection[int]) -> Callable[[], None] | None:
    """For a child, before it becomes the command: its cores, and SIGTERM when its parent dies (both on Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it was asked for
            os._exit(128 + signal.SIGTERM)
        if cores:
            with suppress(OSError):  # they were taken away since: all that are left, then
                os.sched_setaffinity(0, cores)

    return prepare


def name_of(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
