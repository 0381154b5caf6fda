"""Tell how long this process has been there, whatever was done to the clock of the machine since. No jax.

The clock of a machine is set: when it has just booted, when it wakes up, by a person who was wrong. The kernel counts
the time since the boot beside it, which nobody can set, and has noted there when each process started.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from runner.text import CLOCK_SLACK_SECONDS


def measure_process_age() -> float | None:
    """Return for how many seconds this process has been there, by a clock that nobody can set; None where unknown."""
    # The kernel counts from the boot, in ticks; the name of the program, which may hold anything, ends with a bracket.
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    # Not Linux.
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def seconds_since_start(began: float) -> float:
    """Return how many seconds ago this process started; `began` is what the clock said then, in seconds since 1970.

    The clock may have been set since. So it is never less than nothing, nor more than the process is old.
    """
    passed, age = max(time.time() - began, 0.0), measure_process_age()
    return passed if age is None or passed < age + CLOCK_SLACK_SECONDS else age
