"""Keep compiled programs on disk, for every run and every machine of the same kind.

A cached program is code that will be executed: its place belongs to the user alone, and every entry is proven before
it is loaded (program_store.py). It is divided by processor, because a program for one may crash, or round differently,
on another; and by the size of XLA's thread pool, for which a program is divided when it is compiled. Any trouble only
costs time.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import hosts
from runner.rundir.numerics import count_threads_to_come
from runner.train.program_store import ProgramStore, find_trouble
from runner.values import Say


def cache_folder(option: str) -> Path | None:
    """Return where compiled programs are kept: `auto` is a folder of the user's cache, `off` none, else a path."""
    if option == "off":
        return None
    if option != "auto":
        return Path(option).expanduser().resolve() / processor_id()
    # The user's word to jax counts.
    if own := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(own).resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "holdfast" / "compiled" / processor_id()


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


def enable_compile_cache(option: str, tell: Say) -> CacheStats:
    """Have jax keep what it compiles from now on, small programs too; return the counts of what it finds."""
    import jax

    kept, folder = CacheStats(), cache_folder(option)
    jax.monitoring.register_event_listener(kept.hear)
    if folder is not None and (why := _replace_disk_cache(folder, tell)):
        tell(f"warning: compile_cache={option}: {folder}: {why}; programs are compiled anew at each start")
        folder = None
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder is not None else None)
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_raise_persistent_cache_errors", False)  # noqa: FBT003
    return kept


def _replace_disk_cache(folder: Path, tell: Say) -> str | None:
    """Have jax keep its programs in a store that proves them. Return why it cannot be, or None.

    jax has no public way to bring a cache of one's own. These two names are those of jax 0.4.31 to 0.12: the class of
    its cache on disk, and the function that gets an entry and loads it.
    """
    if why := find_trouble(folder):
        return why
    try:
        # A program may depend on both, and its key does not: seen in what XLA made of the same key.
        store = ProgramStore(folder, f"{processor_id()}-{count_threads_to_come()}", tell)
        store.remove_fatal_entries()
        if folder.name == processor_id():
            store.remove_unproven()
    except OSError as error:
        return error.strerror or str(error)
    try:
        from jax._src import compilation_cache

        compilation_cache.reset_cache()
        # Not wrapped again where a process does this twice.
        load = inspect.unwrap(compilation_cache.get_executable_and_time)
        has_cache = callable(compilation_cache.LRUCache)
    except (ImportError, AttributeError):
        has_cache = False
    if not has_cache:
        return "this version of jax keeps its programs in another way, without proof"

    def open_store(path: str, *, max_size: int = -1, **_: Any) -> ProgramStore:
        store.max_size = max_size
        return store

    @functools.wraps(load)
    def load_proven(cache_key: str, *words: Any, **more: Any) -> Any:
        try:
            with store.mark_loading(cache_key):
                return load(cache_key, *words, **more)
        # Native code that refuses an entry, in whatever way: as if there were none.
        except Exception as error:
            store.discard(cache_key, f"its entry cannot be loaded ({type(error).__name__})")
            return None, None

    vars(compilation_cache).update(LRUCache=open_store, get_executable_and_time=load_proven)
    if not hosts.is_lead():
        _write_from_this_process()
    return None


def _write_from_this_process() -> None:
    """Have jax keep what this process compiles, though it is not process 0 of its run.

    Without it every other machine, whose cache is its own, compiles anew at each restart; and on a CPU each process has
    entries of its own. jax leaves it out for storage where two writers meet; ours puts each entry there in one move.
    """
    from jax._src import compilation_cache, compiler

    def write(
        key: str, seconds: float, name: str, backend: Any, executable: Any, host_callbacks: Sequence[Any], **_: Any
    ) -> None:
        # One with callbacks refers to this process's memory.
        if not host_callbacks:
            compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

    # A private name of jax 0.10 to 0.12. Under another one nothing is kept, and only time is lost.
    if callable(getattr(compiler, "_cache_write", None)):
        vars(compiler).update(_cache_write=write)


@functools.cache
def processor_id() -> str:
    """Return eight hex digits over what this processor can do: a program for one may crash on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # Not Linux.
        lines = []
    facts = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    return hashlib.sha256("\n".join([platform.machine(), platform.processor(), *facts]).encode()).hexdigest()[:8]
