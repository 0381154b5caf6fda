"""Standard output and error, which are never part of a run: what fails or blocks there changes nothing else. No jax.

A terminal vanishes, the disk behind `> file` fills up, the reader of a pipe leaves or stops reading. A command that
only shows something should end then, and say so by its exit code. A run must not, nor what starts and watches runs:
`decouple_screen` puts streams in the place of `sys.stdout` and `sys.stderr` that take everything, never raise and
never wait for long. That something did not arrive is remembered (`take_screen_losses`), for a log to tell.
"""

from __future__ import annotations

import io
import os
import queue
import select
import sys
import threading
from contextlib import suppress
from typing import Any, Literal, cast

ScreenState = Literal["works", "waits", "failed"]

# A write that takes longer is left to its thread. Nobody who reads along pauses for less: a pager, Ctrl-S, a slow disk.
PATIENCE_SECONDS = 0.5
# So much is kept for a reader who does not read; what comes on top is dropped.
BACKLOG_BYTES = 1 << 16
NAMES = {1: "stdout", 2: "stderr"}
LEFT_OUT = b"\n[left out: nothing was read here; logs/run.log has every line]\n"


class DecoupledOutput(io.RawIOBase):
    """A file descriptor that takes whatever is written and never raises; a thread of its own does the writing.

    A write waits until it is done, so that lines come out in order and at once, but no longer than `PATIENCE_SECONDS`.
    From then on nobody waits, until the thread has caught up: up to `BACKLOG_BYTES` are kept for it, the rest is
    dropped, and the place is marked.
    """

    def __init__(self, handle: int, name: str):
        super().__init__()
        self.name, self._handle = name, handle
        self._loss: str | None = None
        self._is_told = False
        self._begin()
        # Threads do not survive a fork, but a lock that one of them held would.
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._queue: queue.SimpleQueue[tuple[bytes, threading.Event]] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._backlog, self._dropped, self._waits = 0, False, False

    @property
    def state(self) -> ScreenState:
        """Return `waits` while nobody takes what is written, `failed` after a write has failed, else `works`."""
        return "waits" if self._waits else "works" if self._loss is None else "failed"

    def write(self, data: Any, /) -> int:
        """Take all of it; return its length, whatever becomes of it. From any thread."""
        piece = bytes(data)
        if not self._has_thread():
            self._put(piece)
            return len(piece)
        done = threading.Event()
        with self._counting:
            if self._backlog + len(piece) > BACKLOG_BYTES and self._waits:
                self._dropped = True
                return len(piece)
            self._backlog += len(piece)
        self._queue.put((piece, done))
        if not self._waits and not done.wait(PATIENCE_SECONDS):
            with self._counting:
                self._waits = self._backlog > 0
            self.note_loss("nobody takes it")
        return len(piece)

    def drain(self, seconds: float) -> None:
        """Wait until all is written, but not longer than this."""
        if self._thread is not None:
            done = threading.Event()
            self._queue.put((b"", done))
            done.wait(seconds)

    def note_loss(self, why: str) -> None:
        """Remember that something got lost here; only the first reason counts."""
        self._loss = self._loss or why

    def take_loss(self) -> str | None:
        """Return why something got lost here, once; None where nothing did, or where that was taken before."""
        loss = None if self._is_told else self._loss
        self._is_told |= loss is not None
        return loss

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._handle

    def isatty(self) -> bool:
        """Return whether a terminal is there, and still there."""
        return os.isatty(self._handle)

    def _has_thread(self) -> bool:
        """Start the thread where there is none; return whether one writes."""
        # While Python ends no thread runs any more.
        if sys.is_finalizing():
            return False
        if self._thread is None:
            thread = threading.Thread(target=self._write_all, args=(self._queue,), name=self.name, daemon=True)
            # RuntimeError: the system allows no more threads. Then a write may wait, which is better than none.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self._thread is not None

    def _write_all(self, pieces: queue.SimpleQueue[tuple[bytes, threading.Event]]) -> None:
        while True:
            piece, done = pieces.get()
            self._put(piece)
            with self._counting:
                self._backlog -= len(piece)
                caught_up = self._backlog == 0
                marks = caught_up and self._dropped
                if caught_up:
                    self._waits = self._dropped = False
            if marks:
                self._put(LEFT_OUT)
            done.set()

    def _put(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._handle, rest) :]
            except BlockingIOError:
                # Another process that has the same pipe or terminal has made it non-blocking.
                _wait_until_writable(self._handle)
            except OSError as error:
                # Tried again with the next piece: a full disk may have room by then.
                self.note_loss(error.strerror or str(error))
                return


def prepare_screen() -> None:
    """Make 0, 1 and 2 open files, and let no character be one too many for the terminal. The first thing in a process.

    A descriptor that whoever started us has closed would become that of the next file: a log, a checkpoint, into which
    a library then prints.
    """
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            # Always the lowest that is free, so this one: those below are open by now.
            os.open(os.devnull, os.O_RDWR)
            # Processes that we start would else have none again.
            os.set_inheritable(handle, True)  # noqa: FBT003
            _closed.add(handle)
    for handle, name in enumerate(("stdin", *NAMES.values())):
        if getattr(sys, name) is None:
            _set_stream(name, open(handle, "w" if handle else "r", closefd=False))  # noqa: SIM115
    for name in NAMES.values():
        stream = getattr(sys, name)
        # Not what stands in for it in a test. A question mark is better than a traceback.
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def decouple_screen() -> None:
    """See to it that from here on nothing on stdout or stderr raises or waits for long. Once more does nothing."""
    prepare_screen()
    for handle, name in NAMES.items():
        old = getattr(sys, name)
        # Not where something else stands in for it: that of a test, or the proxy of a progress bar.
        if name in _outputs or not isinstance(old, io.TextIOWrapper) or old is not getattr(sys, f"__{name}__"):
            continue
        output = _outputs[name] = DecoupledOutput(handle, name)
        if handle in _closed:
            output.note_loss("it was closed from the beginning")
        # What is in its buffer may not be writable, either.
        try:
            old.flush()
        except (OSError, ValueError) as error:
            output.note_loss(getattr(error, "strerror", None) or str(error))
        new = io.TextIOWrapper(
            cast(Any, io.BufferedWriter(output)),
            encoding=old.encoding,
            errors=old.errors,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        _set_stream(name, new)


def print_line(line: str) -> None:
    """Print on stdout. Where that is not possible, for code of the user's own has closed it, nothing happens."""
    with suppress(OSError, AttributeError, ValueError):
        print(line, flush=True)


def print_error(line: str) -> None:
    """Print on stderr. Where that is not possible nothing happens: an exit code must not depend on it."""
    # AttributeError: there is no stderr. ValueError: it is closed, or an encoding has no such character.
    with suppress(OSError, AttributeError, ValueError):
        # In one piece: other threads and processes print as well.
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


def print_fresh_line(line: str) -> None:
    """Print on stderr, after a process that drew on this terminal was killed."""
    # It left half a progress bar behind, and hid the cursor.
    fresh = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
    print_error(f"{fresh}{line}")


def print_past_locks(line: str) -> None:
    """Print on stderr, on a line of its own, past Python's streams: whoever is inside a print holds their locks."""
    told = f"\n{line}\n".encode(errors="backslashreplace")
    if output := _outputs.get("stderr"):
        output.write(told)
    else:
        with suppress(OSError):
            os.write(2, told)


def flush_screen() -> OSError | None:
    """Write what is still in buffers, for at most a second where decoupled. Return the error where that fails."""
    failed: OSError | None = None
    for stream in (sys.stdout, sys.stderr):
        # AttributeError: there is none. ValueError: it is closed.
        try:
            stream.flush()
        except OSError as error:
            failed = error
        except (AttributeError, ValueError):
            pass
    for output in _outputs.values():
        output.drain(PATIENCE_SECONDS)
    return failed


def stdout_state() -> ScreenState:
    """Return how stdout does: `waits` while nobody takes what is written, `failed` after a write has failed."""
    return _outputs["stdout"].state if "stdout" in _outputs else "works"


def can_draw() -> bool:
    """Return whether stdout is a terminal on which a cursor can be moved: one that calls itself dumb is not."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def fix_unknown_size() -> tuple[int | None, int | None]:
    """Return the width and the height for rich where the environment says 0: nobody knows. Else None: it asks itself.

    Rich would take it for a terminal that has no room for anything.
    """
    width, height = (os.environ.get(name) == "0" for name in ("COLUMNS", "LINES"))
    return 80 if width else None, 25 if height else None


def take_screen_losses() -> list[str]:
    """Return what got lost since it was last asked, each stream once: `stdout (No space left on device)`."""
    found: dict[str, list[str]] = {}
    for name, output in _outputs.items():
        if why := output.take_loss():
            found.setdefault(why, []).append(name)
    return [f"{' and '.join(names)} ({why})" for why, names in found.items()]


def _set_stream(name: str, stream: io.TextIOWrapper) -> None:
    # Both names: `shutil` asks the second one how wide the terminal is.
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _wait_until_writable(handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLOUT)
    poll.poll()


# By name, once decoupled. Of the process, as the streams themselves are.
_outputs: dict[str, DecoupledOutput] = {}
# Descriptors that were closed when the process began.
_closed: set[int] = set()
