"""Tell process 0 that another process has ended before it had joined, so that nobody waits for it. No jax.

A process that has joined is known to have ended when its connection is closed. Of one that has not, only whoever has
started it knows: `hosts=local` hears it from the kernel, and says it where the process itself would have come.
"""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from dataclasses import dataclass

from runner.errors import STOPPED, ConfigError, HoldfastError, LostProcessError, RefusedError, StorageError
from runner.hosts.link import receive_line, send_line
from runner.types import JsonObject

# Both are on one machine: an answer that takes longer does not come.
ANSWER_SECONDS = 1.0
_KINDS = {kind.exit_code: kind for kind in (ConfigError, RefusedError, StorageError)}


@dataclass(frozen=True)
class EarlyEnd:
    """Say how a process has ended.

    Attributes:
        index: its number.
        code: its exit code; -N where signal N ended it.
        said: the last line that it printed.
    """

    index: int
    code: int
    said: str = ""

    def build_error(self) -> HoldfastError:
        """Return the error with which the run ends: its own kind of one, where it has failed by itself."""
        if self.code < 0:
            with suppress(ValueError):
                return LostProcessError(
                    f"process {self.index} died of {signal.Signals(-self.code).name} before it had joined the run; "
                    "the same command tries again"
                )
        if self.code <= 0 or self.code == STOPPED:
            return LostProcessError(
                f"process {self.index} left with exit code {self.code} before it had joined the run; the same command "
                "tries again"
            )
        said = f": {self.said.removeprefix('error: ')}" if self.said else f" ended with exit code {self.code}"
        error = _KINDS.get(self.code, HoldfastError)(f"process {self.index}{said}")
        error.exit_code = self.code
        return error


def tell_early_end(host: str, port: int, end: EarlyEnd) -> bool:
    """Tell process 0 how another one has ended; return whether it has taken note, and has not to be told again."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            send_line(connection, {"ended": end.code, "index": end.index, "said": end.said})
            return receive_line(connection, ANSWER_SECONDS).get("noted") is True
    # It does not listen yet, or no more; or somebody else does.
    except (OSError, ValueError):
        return False


def read_early_end(line: JsonObject) -> EarlyEnd:
    """Return what `tell_early_end` has sent. Raises KeyError, ValueError, TypeError."""
    return EarlyEnd(int(line["index"]), int(line["ended"]), str(line["said"]))
