"""Restore a state that several processes hold among them: process 0 says which checkpoint, each reads its own part.

Each takes the checksums of some of the files as well, so that all bytes are proven in the time that one part takes.
Process 0 judges: a byte that is wrong is damage, whoever has read it; what keeps a process from reading is trouble.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from runner import hosts
from runner.checkpoint.record import FileTable, read_sidecar
from runner.checkpoint.seal import measure_files
from runner.checkpoint.trouble import find_errno
from runner.errors import HoldfastError, RefusedError
from runner.types import JsonObject

T = TypeVar("T")

# Process 0 says `{"read": …}` for each checkpoint that it tries, and each gives its report; `{"make": …}` where frozen
# weights are made again; then what to go on from.
CHANNEL = "restore"


class SharedReader(Generic[T]):
    """Read checkpoints together with the other processes, as the one that leads them.

    `read` turns the directory of a checkpoint into this process's part of a state.
    """

    def __init__(self, read: Callable[[Path], T], *, checksums: bool):
        self._read, self._checksums = read, checksums
        # Of the checkpoint that was read last: what this process has measured, and what the others have.
        self._own, self._others = Future[FileTable](), Future[FileTable]()

    def read(self, directory: Path) -> T:
        """Return this process's part, once every process has read its own.

        Raises what kept this process, or another one, from it.
        """
        self._own, self._others = Future(), Future()
        try:
            names = list(read_sidecar(directory)[1]) if self._checksums else []
            hosts.agree(CHANNEL, {"read": str(directory), "names": names})
            value, failed = None, None
            with ThreadPoolExecutor(1) as pool:
                self._own = pool.submit(measure_files, directory, _share(names), checksums=True)
                try:
                    value = self._read(directory)
                # Whatever it is: the answers of the others are waited for first.
                except Exception as error:
                    failed = error
            reports: list[JsonObject] = hosts.gather(CHANNEL, {}) or []
            for index, report in enumerate(reports[1:], 1):
                failed = failed or _rebuild_error(index, report)
            if failed is not None:
                raise failed
            self._others.set_result({name: facts for one in reports[1:] for name, facts in one["measured"].items()})
            return value  # type: ignore[return-value]
        except BaseException as error:
            self._others.set_exception(error)
            raise

    def measure(self, directory: Path, names: Sequence[str]) -> FileTable:
        """Return the sizes and checksums of files, of which each process has taken its share; after `read`."""
        all_of_them = {**self._others.result(), **self._own.result()}
        return {name: all_of_them[name] for name in names}


def follow_reading(read: Callable[[Path], T]) -> tuple[JsonObject, T | None]:
    """Read what process 0 says, until it says what to go on from; return that, and this process's part of it."""
    value: T | None = None
    while "read" in (word := hosts.hear(CHANNEL)):
        directory = Path(word["read"])
        # What was read before is not used.
        value = None
        report: JsonObject = {"measured": {}, "error": None, "errno": None, "refused": False}
        try:
            value = read(directory)
            report["measured"] = measure_files(directory, _share(word["names"]), checksums=True)
        # Whatever it is, process 0 judges it.
        except Exception as error:
            report |= {"error": str(error), "errno": find_errno(error), "refused": isinstance(error, HoldfastError)}
        hosts.gather(CHANNEL, report)
    return word, value


def _share(names: Sequence[str]) -> list[str]:
    group = hosts.current_group()
    return list(names[group.index :: group.count])


def _rebuild_error(index: int, report: JsonObject) -> Exception | None:
    """Return what kept a process from reading, as it would have been raised here; None where nothing did."""
    if report["error"] is None:
        return None
    what = f"process {index}: {report['error']}"
    if report["errno"] is not None:
        # What process 0 sees and another does not is no damage: its file system is behind, or in trouble.
        number = errno.EIO if report["errno"] == errno.ENOENT else report["errno"]
        return OSError(number, what)
    # As TensorStore says it, with its code in front.
    return RefusedError(what) if report["refused"] else ValueError(report["error"])
