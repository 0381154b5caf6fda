"""Keep compiled programs in a folder, each with a digest: what is executed is what was written. No jax.

A program is loaded by native code that believes every byte: a flipped bit may crash the process, at each start, or
compute something else. So an entry is proven before it is handed out. What kills a process all the same while it loads
is thrown away by the next one: a marker says which entries are being loaded, and a lock on it that somebody still is.
Everything here may be lost or removed at any time, by another process as well: that only costs time.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from runner.values import Say

MAGIC = b"holdfast program 1\n"
DIGEST_BYTES = 16
ENTRY, LOADING, WRITING = ".program", ".loading", ".writing"
# Where markers lie, and entries that are not complete yet.
PENDING = "pending"
# What jax alone calls its entries: they have no digest of ours.
UNPROVEN = ("-cache", "-atime")
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def find_trouble(folder: Path) -> str | None:
    """Return why programs cannot be kept in a folder, or None. It is made where it is not there."""
    if any(part.endswith(":") for part in folder.parts):
        return "it is no folder of this machine"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = os.stat(folder, follow_symlinks=False)
    except OSError as error:
        return error.strerror or str(error)
    # Programs that lie there are executed: nobody else may write them.
    if not stat.S_ISDIR(found.st_mode):
        return "it is no folder"
    if found.st_uid != os.geteuid():
        return f"it belongs to another user (uid {found.st_uid})"
    if found.st_mode & 0o022:
        return f"others may write in it (chmod go-w {folder})"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


class ProgramStore:
    """Get and put compiled programs by key, from any thread and beside any number of processes.

    It stands in for jax's own cache on disk (`jax._src.lru_cache.LRUCache`), which believes what it reads.

    Attributes:
        max_size: the bytes that all entries may have together, else the longest unused are removed; -1 for no limit.
    """

    def __init__(self, folder: Path, circumstances: str, tell: Say):
        """Open a folder that `find_trouble` finds none with.

        Args:
            folder: where the entries lie.
            circumstances: what a program depends on besides its key; becomes part of file names.
            tell: takes a line for people.

        Raises:
            OSError: it cannot be opened.
        """
        # jax logs it under this name.
        self._path = folder
        self.max_size = -1
        self._circumstances, self._tell, self._told = circumstances, tell, False
        self._folder = os.open(folder, _FOLDER)
        with suppress(FileExistsError):
            os.mkdir(PENDING, 0o700, dir_fd=self._folder)
        self._pending = os.open(PENDING, _FOLDER, dir_fd=self._folder)

    def get(self, key: str) -> bytes | None:
        """Return a program as it was put; None where there is none, or none that can be proven."""
        name = self._name(key)
        try:
            content = _read_entry(name, self._folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._throw_away(name, f"its entry cannot be read ({error.strerror})")
            return None
        program = _prove(name, content)
        if program is None:
            self._throw_away(name, "its entry was damaged")
            return None
        if self.max_size >= 0:
            # When it was last used.
            with suppress(OSError):
                os.utime(name, dir_fd=self._folder, follow_symlinks=False)
        return program

    def put(self, key: str, program: bytes) -> None:
        """Keep a program, in the place of what was kept under its key. Where that cannot be done it is told, once."""
        if 0 <= self.max_size < len(program):
            return
        name = self._name(key)
        fresh = f"{name}~{_who()}{WRITING}"
        try:
            with os.fdopen(self._open_pending(fresh), "wb") as out:
                out.write(_seal(name, program))
                out.flush()
                # Not synced: what a power loss tears has no right digest.
                os.rename(fresh, name, src_dir_fd=self._pending, dst_dir_fd=self._folder)
            self._remove_longest_unused()
        except OSError as error:
            with suppress(OSError):
                os.unlink(fresh, dir_fd=self._pending)
            if not self._told:
                self._tell(f"compile_cache: {self._path}: {error.strerror}; some programs are compiled anew next time")
            self._told = True

    @contextmanager
    def mark_loading(self, key: str) -> Iterator[None]:
        """Leave a marker while this thread loads an entry: a process that dies meanwhile leaves it for good."""
        name = self._name(key)
        marker, handle = f"{name}~{_who()}{LOADING}", None
        # Without one it is loaded all the same: only a crash would come again. Nothing is loaded that is not there.
        with suppress(OSError):
            os.stat(name, dir_fd=self._folder, follow_symlinks=False)
            handle = self._open_pending(marker)
        try:
            yield
        finally:
            if handle is not None:
                # First the name: a marker without a lock condemns its entry.
                with suppress(OSError):
                    os.unlink(marker, dir_fd=self._pending)
                os.close(handle)

    def discard(self, key: str, why: str) -> None:
        """Throw an entry away that could not be loaded."""
        self._throw_away(self._name(key), why)

    def remove_fatal_entries(self) -> None:
        """Throw away what was being loaded by processes that have died meanwhile, and what they had not written."""
        for pending in os.listdir(self._pending):
            name, _, how = pending.rpartition("~")
            with suppress(OSError):
                handle = os.open(pending, os.O_RDONLY | _PLAIN, dir_fd=self._pending)
                try:
                    # Held by a process that is at it: BlockingIOError. The kernel gives it back, however one ends.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                finally:
                    os.close(handle)
                # Of several that start now, one finds it here.
                os.unlink(pending, dir_fd=self._pending)
                if how.endswith(LOADING):
                    self._throw_away(name, "the process that loaded it last has died of it, or meanwhile")

    def remove_unproven(self) -> None:
        """Remove what jax alone, or an older version, has left: it is not used any more."""
        for name in os.listdir(self._folder):
            if name.endswith(UNPROVEN):
                with suppress(OSError):
                    os.unlink(name, dir_fd=self._folder)

    def _name(self, key: str) -> str:
        return f"{key}-{self._circumstances}{ENTRY}"

    def _open_pending(self, name: str) -> int:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _PLAIN, 0o600, dir_fd=self._pending)
        # Not every file system has locks; without one it counts as nobody's, and is compiled anew.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle

    def _throw_away(self, name: str, why: str) -> None:
        """Remove an entry, or what lies in its place, and say so."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._folder)
        self._tell(f"compile_cache: {name.rsplit('-', 3)[0]} is compiled anew: {why}")

    def _remove_longest_unused(self) -> None:
        if self.max_size < 0:
            return
        found = []
        for name in os.listdir(self._folder):
            # Another process may do the same now.
            with suppress(FileNotFoundError):
                if name.endswith(ENTRY):
                    facts = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                    found.append((facts.st_mtime_ns, facts.st_size, name))
        excess = sum(size for _, size, _ in found) - self.max_size
        for _, size, name in sorted(found):
            if excess <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._folder)
            excess -= size


def _who() -> str:
    return f"{os.getpid()}-{threading.get_native_id()}"


def _seal(name: str, program: bytes) -> bytes:
    return MAGIC + _digest(name, program) + program


def _prove(name: str, content: bytes) -> bytes | None:
    """Return the program of an entry; None where its bytes are not those that were put under this name."""
    start = len(MAGIC) + DIGEST_BYTES
    # Megabytes: copied once.
    program = memoryview(content)[start:]
    return bytes(program) if content[:start] == MAGIC + _digest(name, program) else None


def _digest(name: str, program: bytes | memoryview) -> bytes:
    # With the name: an entry that was moved to another name is another program.
    digest = xxhash.xxh3_128(name.encode())
    digest.update(program)
    return digest.digest()


def _read_entry(name: str, folder: int) -> bytes:
    """Return the content of a plain file of our own in a folder. Raises OSError."""
    handle = os.open(name, os.O_RDONLY | _PLAIN, dir_fd=folder)
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise OSError(0, "is no file of this user's")
        return file.read()
