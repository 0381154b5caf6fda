"""Keep compiled programs on disk, for every run and every machine of the same kind.

A cached program is code that will be executed: the default place belongs to the user alone. It is divided by processor,
because a program for one may crash, or round differently, on another. Any trouble only costs time. jax writes an entry
in place: what a kill tears would be complained about at each start and never replaced, so it is thrown away here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder(option: str) -> Path | None:
    """Return where compiled programs are kept: `auto` is a folder of the user's cache, `off` none, else a path."""
    if option == "off":
        return None
    if option != "auto":
        return Path(option).expanduser().resolve() / processor_id()
    # The user's word to jax counts.
    if own := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(own)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "holdfast" / "compiled" / processor_id()


def find_trouble(folder: Path) -> str | None:
    """Return why a folder cannot be used, or None. It is made where it is not there."""
    # Programs that lie there are executed: nobody else may write them.
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return error.strerror or str(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


class CacheStats:
    """Count how many programs were found in the cache, and how many had to be compiled."""

    def __init__(self) -> None:
        self.hits, self.misses = 0, 0

    def hear(self, event: str, **_: object) -> None:
        """Count one event of jax's monitoring."""
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def __str__(self) -> str:
        return "off" if self.hits + self.misses == 0 else "hit" if not self.misses else "miss"


def enable_compile_cache(option: str, tell: Callable[[str], None]) -> CacheStats:
    """Have jax keep what it compiles from now on, small programs too; return the counts of what it finds."""
    import jax

    kept, folder = CacheStats(), cache_folder(option)
    jax.monitoring.register_event_listener(kept.hear)
    if folder is not None and (why := find_trouble(folder)):
        tell(f"warning: compile_cache={option}: {folder}: {why}; programs are compiled anew at each start")
        folder = None
    if folder is not None:
        _replace_torn_entries(folder, tell)
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder is not None else None)
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_raise_persistent_cache_errors", False)  # noqa: FBT003
    return kept


def _replace_torn_entries(folder: Path, tell: Callable[[str], None]) -> None:
    """Delete an entry that jax warns it cannot use, before the program is compiled and kept anew.

    jax itself complains at each start and never replaces it (0.10.2); only its warning says which entry it was.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        found = re.search(r"Error (\w+) persistent compilation cache entry for '([^']+)'", str(message))
        if found is None:
            shown(message, *where, **more)
            return
        for entry in folder.glob(f"{found[2]}-*-cache"):
            entry.unlink(missing_ok=True)
        tell(f"compile_cache: {found[2]} is compiled anew: its entry was damaged or could not be written")

    warnings.showwarning = show


def processor_id() -> str:
    """Return eight hex digits over what this processor can do: a program for one may crash on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # Not Linux.
        lines = []
    facts = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *facts]).encode()).hexdigest()[:8]
