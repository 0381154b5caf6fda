"""Every way a run can end badly, each with the exit code that is promised for it.

    HoldfastError
    ├── GaveUpError    1   the same step failed again and again; nothing was tried this time
    ├── ConfigError    2   the configuration is wrong; nothing was written
    ├── RefusedError   3   the run belongs to another configuration, is in use, or nothing restorable is left
    │   └── LostRunError   the run was taken away while this process worked on it; nothing more is written
    ├── DivergedError  4   the loss or the gradient is not finite
    ├── StorageError   5   the state could not be made durable
    ├── StoppedEarlyError 75   stopped on request before anything was touched
    └── LostProcessError  75   another process of the run has gone; nothing is wrong with the run

A message says where, what was got, what was expected and the way out, in one or two plain lines.
Anything else that escapes is a bug: exit code 1, with its traceback.
"""

from typing import Any


class HoldfastError(Exception):
    """Raised for what a user can act on; shown without a traceback."""

    exit_code = 1


class ConfigError(HoldfastError):
    """Raised where the configuration is wrong; nothing was written."""

    exit_code = 2


class RefusedError(HoldfastError):
    """Raised where a run belongs to another configuration, is in use, or has nothing left to restore."""

    exit_code = 3


class LostRunError(RefusedError):
    """Raised where this process no longer holds its run: the directory or its lock was moved, removed or replaced.

    Whoever meets it writes nothing more: another process may be at work there.
    """


class DivergedError(HoldfastError):
    """Raised where training left the finite numbers; the last good checkpoint stands.

    Attributes:
        step: the first step that was not finite.
        behind: how many steps were begun after it, before it was known.
        position: that of the data after those.
    """

    exit_code = 4

    def __init__(self, message: str, step: int, behind: int, position: dict[str, Any]):
        super().__init__(message)
        self.step, self.behind, self.position = step, behind, position

    def complete(self, rest: str) -> "DivergedError":
        """Return a copy whose message goes on, with what was done about it and the way out."""
        return DivergedError(f"{self}; {rest}", self.step, self.behind, self.position)


class GaveUpError(HoldfastError):
    """Raised where the same step failed again and again: another try would do the same."""

    exit_code = 1


class StorageError(HoldfastError):
    """Raised where a state could not be made durable."""

    exit_code = 5


class StoppedEarlyError(HoldfastError):
    """Raised where a stop was asked for before anything of the run was touched."""

    exit_code = 75


class LostProcessError(HoldfastError):
    """Raised where another process of the run has gone: without it the others cannot go on, and a restart can."""

    exit_code = 75


CRASHED = 1  # a bug, ours or the user's
# EX_TEMPFAIL of sysexits.h: stopped early on request with the state saved. Schedulers and supervisors take it for "run
# the same command again".
STOPPED = 75
