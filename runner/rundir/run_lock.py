"""Hold a run for one process alone: a lock that the kernel gives back, and a lease for storage that shares no locks.

The lock is on a file in the run's directory, and the file can be removed, or the whole directory moved, under a process
that holds it. So the holder compares before each write that matters what lies under the run's path with what it has
locked (`RunLock.check`), and stops where the two differ. No jax.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from runner import files
from runner.errors import LostRunError, RefusedError, StorageError
from runner.rundir.foreign_files import refuse_foreign_files
from runner.rundir.layout import RunDir
from runner.rundir.lease import Lease, take_lease

# What a process has that holds no lock of its own.
NO_HANDLE = -1
# The environment variable that `supervise` sets: the file in which it reads where its command works.
SUPERVISOR = "HOLDFAST_SUPERVISOR"


@dataclass(frozen=True)
class RunLock:
    """The hold of this process on a run.

    Attributes:
        run_dir: the run.
        handle: of the locked file; a child that inherits it holds the run as well, until both have ended.
        lease: what says the same on storage that shares no locks; None in a process that another one locks for.
        check_elsewhere: raises LostRunError where the run is lost in its other place; asks nobody.
    """

    run_dir: RunDir
    handle: int
    lease: Lease | None
    check_elsewhere: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise LostRunError where the run is no longer this process's; from any thread.

        Two system calls: cheap enough for each line of a log. The lease is as the thread that renews it last saw it.
        """
        self.check_elsewhere()
        if self.lease is None:
            return
        try:
            # A link in its place leads to the same lock, but no write of a run goes through one.
            is_link = stat.S_ISLNK(os.stat(self.run_dir.path, follow_symlinks=False).st_mode)
            there = os.stat(self.run_dir.lock, follow_symlinks=False)
            own = os.fstat(self.handle)
        except (FileNotFoundError, NotADirectoryError):
            raise self._lost("its directory or its lock was moved or removed") from None
        except OSError:
            # A disk in trouble is no proof; what is to be written will meet the trouble itself.
            return
        if is_link or not os.path.samestat(there, own):
            raise self._lost("its directory or its lock was replaced")
        if self.lease.taken_by is not None:
            raise self._lost(f"{self.lease.taken_by} has taken it over")

    def prove(self) -> None:
        """Raise LostRunError as `check` does, after a look at the lease itself: before what cannot be taken back."""
        if self.lease is not None:
            self.lease.look()
        self.check()

    def _lost(self, what: str) -> LostRunError:
        return LostRunError(
            f"{self.run_dir}: the run was taken from this process: {what}; nothing more is written; the same command "
            "goes on from what is durable"
        )


def borrow_lock(run_dir: RunDir) -> RunLock:
    """Return the hold of a process for which process 0 of its run holds it: there is nothing to check."""
    return RunLock(run_dir, NO_HANDLE, None)


@contextmanager
def lock_run(run_dir: RunDir) -> Iterator[RunLock]:
    """Hold the run for this process alone while the context lasts; makes the directory.

    The kernel lets go when the process ends, however it ends.

    Raises:
        RefusedError: another process has it (named), or there are links or other foreign things in it.
        StorageError: the directory or the lock cannot be made or read.
    """
    try:
        files.make_folder(run_dir.path)
        refuse_foreign_files(run_dir)
        handle = files.open_file(run_dir.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"{run_dir}: cannot be worked on ({error.filename}: {error.strerror}); nothing was changed; make it "
            "writable, or choose another root=FOLDER"
        ) from error
    try:
        if not _try_lock(handle):
            _tell_supervisor(run_dir, held=False)
            raise RefusedError(f"{run_dir}: in use by {_read_holder(handle)}; wait for it or stop it")
        try:
            # Who holds it is for people only: what counts is the lock, which no stale content can fake.
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            lease = take_lease(run_dir)
        except OSError as error:
            raise StorageError(f"{run_dir}: cannot be worked on ({error.strerror}); nothing was changed") from error
        with lease.keep():
            _tell_supervisor(run_dir, held=True)
            yield RunLock(run_dir, handle, lease)
    finally:
        os.close(handle)


def is_in_use(run_dir: RunDir) -> bool:
    """Tell whether a process holds the run, on this machine or on any that shares its locks."""
    try:
        handle = files.open_file(run_dir.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        # A shared lock, so that two who look at the same time do not see each other.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def run_state(run_dir: RunDir) -> str:
    """Return how a run stands, in one word: what status.json says, and `killed` where that says running and none is."""
    state = run_dir.read_status().get("state", "unknown")
    return "killed" if state == "running" and not is_in_use(run_dir) else state


def _try_lock(handle: int) -> bool:
    # For a moment: whoever only looks (`is_in_use`) has the lock for some microseconds.
    for pause in (0.01, 0.05, 0.0):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(pause)
    return False


def _tell_supervisor(run_dir: RunDir, *, held: bool) -> None:
    """Tell which run this process has, or found in use; nobody where nobody supervises."""
    if file := os.environ.get(SUPERVISOR):
        # The supervisor may have gone, and its file with it.
        with suppress(OSError), open(file, "a") as out:
            out.write(json.dumps({"run": str(run_dir.path.resolve()), "held": held}) + "\n")


def _read_holder(handle: int) -> str:
    try:
        holder = files.parse_json(os.pread(handle, 4096, 0))
        pid, host = holder["pid"], holder["host"]
        # The file may come from anywhere: a terminal must not obey it.
        if isinstance(pid, int) and isinstance(host, str) and host.isprintable():
            return f"pid {pid} on host {host[:64]}"
    except (ValueError, KeyError, TypeError):
        pass
    return "another process"
