"""Find the processes of a run that its command has started (`hosts=local`), to kill one of them. Linux only."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner.hosts.options import HOSTS_VARIABLE, STARTER_VARIABLE

PROCESSES = Path("/proc")


def list_processes(command: int) -> dict[int, int]:
    """Return the pid of each process that this one has started to work on a run, by its number; none elsewhere."""
    found = {}
    # They have gone meanwhile, or are not those processes yet.
    with suppress(OSError):
        for word in (PROCESSES / f"{command}/task/{command}/children").read_text().split():
            with suppress(OSError):
                content = (PROCESSES / word / "environ").read_bytes()
                pairs = (pair.partition(b"=") for pair in content.split(b"\0"))
                variables = {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}
                place = variables.get(HOSTS_VARIABLE, "")
                if variables.get(STARTER_VARIABLE) == f"{command} {place}":
                    found[int(place.rpartition(",")[2])] = int(word)
    return found


class OpenProcesses:
    """Hold processes by handles that mean no other ones later, to know when the last of them has ended."""

    def __init__(self) -> None:
        self._handles: list[int] = []

    def add(self, pids: Sequence[int]) -> None:
        """Hold these as well, as far as they are there."""
        for pid in pids:
            with suppress(OSError):
                self._handles.append(os.pidfd_open(pid))

    def wait(self) -> None:
        """Wait until all have ended: where their command has died they are asked to stop, and save first."""
        while self._handles:
            # Readable when it has ended, also where nobody has asked how.
            select.select(self._handles[:1], [], [])
            os.close(self._handles.pop(0))

    def kill(self) -> None:
        """Kill those that are left."""
        for handle in self._handles:
            with suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
