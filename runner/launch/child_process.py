"""Start a child process in a group of its own, that is asked to stop when this process dies, however it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Of linux/prctl.h: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


def spawn_child(
    words: Sequence[str],
    environment: Mapping[str, str],
    *,
    cores: Collection[int] = (),
    stdin: int | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command and return its process.

    Args:
        words: the command.
        environment: variables that it has beside ours.
        cores: the CPU cores it may use; none: all of ours.
        stdin: as `subprocess` takes it.
        output: what it prints on stdout and stderr goes here; None: where ours goes.

    Raises:
        OSError: it cannot be run.
    """
    return subprocess.Popen(
        words,
        stdin=stdin,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env={**os.environ, **environment},
        # A group of its own, so that a signal to ours (by Ctrl-C, a shell, `timeout`) reaches it from us and not a
        # second time by itself: a second one means "leave without saving".
        process_group=0,
        preexec_fn=_make_preexec(os.getpid(), cores),
    )


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for the signals that are to be forwarded to children, while the context lasts."""
    # A hang-up that is ignored stays so: that is what nohup asks for.
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in FORWARDED_SIGNALS if number != signal.SIGHUP or not ignores_hangup]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def describe_signal(number: int) -> str:
    """Return the name of a signal, `SIGTERM`; `signal 99` where it has none."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def _make_preexec(parent: int, cores: Collection[int]) -> Callable[[], None] | None:
    """Return what a child does before it becomes the command: take its cores, ask for SIGTERM when its parent dies.

    Both are possible on Linux only.
    """
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec nothing may be loaded.
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # The parent died before the child asked to be told of it.
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
        if cores:
            # They were taken away since: it has all that are left, then.
            with suppress(OSError):
                os.sched_setaffinity(0, cores)

    return prepare
