"""Have the memory of a run lie in pages of 2 MB where the system has them, by starting Python once more.

XLA takes memory for the temporary arrays of a step from `malloc`, and gives it back after the step. Above 128 kB that
is a new mapping each time, whose pages of 4 kB the kernel hands out one by one: on a CPU half of the time of a step
with 10 M parameters. glibc asks for larger pages if GLIBC_TUNABLES says so when a process starts (glibc 2.35, "Memory
Allocation Tunables"); a process cannot ask for it later. Results are the same, bit for bit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SWITCH = "HOLDFAST_HUGE_PAGES"
TUNABLES, WANTED = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FIRST_GLIBC = (2, 35)
# What `python -m` is given where no run.py lies beside the package.
MODULE = "runner.launch"


def restart_with_huge_pages() -> None:
    """Replace this process by the same command with huge pages; return where they cannot be had, or are not wanted.

    It keeps its number, its files and its terminal. Takes about 20 ms, if nothing was imported before.
    """
    if is_watched() or not is_what_python_was_started_for() or not are_wanted(os.environ) or not are_offered():
        return
    try:
        # Python's own options (`-X`, `-u`) are among its words.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: WANTED})
    # What cannot be started again goes on as it is, only slower.
    except OSError:
        return


def is_watched() -> bool:
    """Return whether a debugger, a profiler or a coverage tool looks into this process: it would lose it."""
    # Python 3.12 has a second way for them, with places for six tools.
    monitoring = getattr(sys, "monitoring", None)
    tools = [] if monitoring is None else [monitoring.get_tool(number) for number in range(6)]
    return sys.gettrace() is not None or sys.getprofile() is not None or any(tools)


def is_what_python_was_started_for() -> bool:
    """Return whether this process is the command that was typed, and not a program that calls it or a fork of one."""
    # Python's own words come before these.
    typed = sys.orig_argv[-len(sys.argv) :]
    return typed[0] in (sys.argv[0], MODULE) and typed[1:] == sys.argv[1:]


def are_wanted(environment: Mapping[str, str]) -> bool:
    """Return whether a command should have huge pages: unless it is told not to, or its memory is managed otherwise."""
    if environment.get(SWITCH, "").lower() in ("0", "off", "no", "false"):
        return False
    # A user who has chosen an allocator, or its settings, has done so for a reason.
    return not any(
        environment.get(name) for name in environment if name in (TUNABLES, "LD_PRELOAD") or name.startswith("MALLOC_")
    )


def are_offered() -> bool:
    """Return whether the kernel gives huge pages to who asks for them, and the C library can ask."""
    try:
        # `always` gives them unasked; `never` to nobody.
        is_on_request = "[madvise]" in KERNEL_SETTING.read_text()
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    # Another system, or another C library.
    except (OSError, ValueError):
        return False
    numbers = version.split(".")[:2]
    return (
        is_on_request
        and name == "glibc"
        and all(number.isdigit() for number in numbers)
        and tuple(map(int, numbers)) >= FIRST_GLIBC
        # Else there is nothing to start again.
        and bool(sys.executable)
    )
