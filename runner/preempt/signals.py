"""Signals as a source of stop requests. The handler only raises the flag; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from runner.preempt.watch import Watcher


@contextmanager
def listening(watcher: Watcher, names: Sequence[str]) -> Iterator[None]:
    """Turn these signals into a raised flag while the context lasts; handlers that were there before come back."""

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if watcher.notice is not None:
            _write(f"{name} again: leaving at once, without saving")
            os._exit(128 + number)
        watcher.raise_flag(name)
        _write(f"{name}: saving at the next step boundary, then stopping; once more to leave at once")

    before = {name: signal.signal(getattr(signal, f"SIG{name}"), handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, f"SIG{name}"), handler)


def _write(line: str) -> None:
    """Straight to the descriptor: a handler may interrupt a print, which must not be entered twice."""
    os.write(2, f"\n{line}\n".encode())
