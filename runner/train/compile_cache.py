"""Programs that were compiled once are kept on disk, for every run and every machine of the same kind.

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


def place(option: str) -> Path | None:
    """Where compiled programs are kept: `auto` is a folder of the user's cache, `off` none, anything else a path."""
    if option == "off":
        return None
    if option != "auto":
        return Path(option).expanduser().resolve() / _processor()
    if own := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # the user's word to jax counts
        return Path(own)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "holdfast" / "compiled" / _processor()


def trouble(folder: Path) -> str | None:
    """Why a folder cannot be used, or None. It is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return error.strerror or str(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


class Kept:
    """Counts how many programs were found in the cache, and how many had to be compiled."""

    def __init__(self) -> None:
        self.hits, self.misses = 0, 0

    def hear(self, event: str, **_: object) -> None:
        """Called by jax."""
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def __str__(self) -> str:
        return "off" if self.hits + self.misses == 0 else "hit" if not self.misses else "miss"


def keep(option: str, tell: Callable[[str], None]) -> Kept:
    """Keep what jax compiles from now on, small programs too; count what was found."""
    import jax

    kept, folder = Kept(), place(option)
    jax.monitoring.register_event_listener(kept.hear)
    if folder is not None and (why := trouble(folder)):
        tell(f"warning: compile_cache={option}: {folder}: {why}; programs are compiled anew at each start")
        folder = None
    if folder is not None:
        _throw_away_what_is_torn(folder, tell)
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder is not None else None)
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_raise_persistent_cache_errors", False)  # noqa: FBT003
    return kept


def _throw_away_what_is_torn(folder: Path, tell: Callable[[str], None]) -> None:
    """Hear jax's warning that an entry cannot be used, and delete it before the program is compiled and kept anew."""
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


def _processor() -> str:
    """Eight hex digits over what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    facts = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *facts]).encode()).hexdigest()[:8]
