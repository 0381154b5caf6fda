"""The lease of a run: who holds it, in a file that is renewed every few seconds.

A kernel's lock is the better proof where it is shared. On storage that does not share locks between machines, two
processes would both be given it: there the lease decides. It carries the owner's token; whoever finds another token in
it has lost the run. How old a lease is, is judged by the clock of the file system that holds it, never by two clocks.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from runner import files
from runner.errors import RefusedError
from runner.rundir.layout import RunDir
from runner.types import JsonObject

RENEW_SECONDS = 5.0
# A lease that was not renewed for so long belongs to nobody. Four chances to renew it, on storage that stalls.
EXPIRED_SECONDS = 20.0
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Owner:
    """Say which process has a lease.

    Attributes:
        token: random, of this hold alone.
        pid: the process, as its own machine numbers it.
        born: when that process began, in ticks since the boot: a number that was given again is another process.
        host: the name of the machine, for people.
        machine: which boot of which machine, and which namespace of processes; empty where that is not known.
    """

    token: str
    pid: int
    born: int
    host: str
    machine: str

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host}"

    def is_alive_here(self) -> bool:
        """Tell whether the process is certainly at work on this very machine."""
        return self.machine == read_machine() != "" and self.born == _read_birth(self.pid) != 0

    def has_ended_here(self) -> bool:
        """Tell whether the process was certainly one of this machine, as it runs now, and has ended."""
        return self.machine == read_machine() != "" and self.born != _read_birth(self.pid)

    @staticmethod
    def parse(document: JsonObject) -> Owner | None:
        """Return the owner that a document names; None where it names nobody, whatever it is."""
        token, pid, born, host, machine = (document.get(name) for name in ("token", "pid", "born", "host", "machine"))
        texts = all(isinstance(text, str) and text.isprintable() and len(text) < 256 for text in (token, host, machine))
        numbers = all(type(number) is int and 0 <= number < 1 << 62 for number in (pid, born))
        return Owner(token, pid, born, host, machine) if texts and numbers else None  # type: ignore[arg-type]


class Lease:
    """The lease of this process on a run. `keep` renews it while a context lasts, and gives it back.

    Attributes:
        taken_by: who has taken the run over, once that was seen; else None.
    """

    def __init__(self, path: Path, owner: Owner):
        self._path, self._owner = path, owner
        self.taken_by: str | None = None

    def look(self) -> None:
        """See whether somebody else has the lease now; what cannot be read at this moment says nothing."""
        with suppress(OSError):
            owner = _read_owner(self._path)
            # Removed or damaged: nobody else has put his name there.
            if owner is not None and owner.token != self._owner.token:
                self.taken_by = str(owner)

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Renew the lease from a thread of its own while the context lasts; then give it back."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            # Where storage does not answer, the thread ends with the process.
            thread.join(POLL_SECONDS)
            with suppress(OSError):
                self.look()
                if self.taken_by is None:
                    files.remove_file(self._path)

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(RENEW_SECONDS):
            # What cannot be renewed now is tried again; what another has taken is not touched any more.
            with suppress(OSError):
                self.look()
                if self.taken_by is None:
                    os.utime(self._path, follow_symlinks=False)


def take_lease(run_dir: RunDir) -> Lease:
    """Put this process's name on a run whose lock it has.

    Where the last holder was another machine and may still be at work, this waits until its lease has expired.
    Raises RefusedError where another process holds the run all the same, OSError where the lease cannot be written.
    """
    path = run_dir.lease
    previous = _read_owner(path)
    if previous is not None:
        _refuse_live_owner(run_dir, previous)
    owner = identify_process(secrets.token_hex(8))
    # Not durable: after a power loss nobody is at work.
    files.replace_file(path, json.dumps(asdict(owner)), durable=False)
    return Lease(path, owner)


def _refuse_live_owner(run_dir: RunDir, owner: Owner) -> None:
    """Raise RefusedError where the owner of a lease is at work; return where it is not, or has stopped renewing."""
    if owner.is_alive_here():
        raise RefusedError(f"{run_dir}: in use by {owner} (its lock was removed or is not shared); stop it first")
    # On this machine the lock has decided: it is given back when a process ends.
    if owner.machine == "" or _boot_of(owner.machine) == _boot_of(read_machine()):
        return
    renewed = os.stat(run_dir.lease, follow_symlinks=False).st_mtime
    age = _read_file_system_clock(run_dir) - renewed
    # A lease from the future tells nothing: then it is watched for the whole time.
    left = EXPIRED_SECONDS - max(age, 0.0)
    if left > 0:
        what = f"{run_dir}: was held by {owner} until a moment ago"
        print(f"{what}; waiting up to {left:.0f} s to be sure it is gone", flush=True)
    began = time.monotonic()
    while time.monotonic() - began < left:
        time.sleep(POLL_SECONDS)
        with suppress(FileNotFoundError):
            if os.stat(run_dir.lease, follow_symlinks=False).st_mtime != renewed:
                raise RefusedError(f"{run_dir}: in use by {owner}; wait for it or stop it")
            continue
        # Given back in the meantime.
        return


def _read_owner(path: Path) -> Owner | None:
    """Return whose lease it is; None where there is none, or where its bytes name nobody. Raises OSError."""
    document = files.read_json_object(path)
    return None if document is None else Owner.parse(document)


def identify_process(token: str) -> Owner:
    """Return this process as the owner of something, under a token of that hold alone."""
    return Owner(token, os.getpid(), _read_birth(os.getpid()), socket.gethostname(), read_machine())


def _read_file_system_clock(run_dir: RunDir) -> float:
    """Return the time by which the file system that holds the run stamps its files, in seconds since 1970."""
    probe = run_dir.path / ".lease-clock"
    files.remove_file(probe)
    os.close(files.open_file(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        return os.stat(probe, follow_symlinks=False).st_mtime
    finally:
        files.remove_file(probe)


def read_machine() -> str:
    """Return what tells this machine, its boot and its namespace of processes from all others; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    # Not Linux.
    except OSError:
        return ""


def _boot_of(machine: str) -> str:
    return machine.partition(" ")[0]


def _read_birth(pid: int) -> int:
    """Return when a process of this machine began, in ticks since the boot; 0 where there is none, or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        # A zombie holds nothing any more.
        return int(fields[19]) if fields[0] not in "ZX" else 0
    except (OSError, ValueError, IndexError):
        return 0
