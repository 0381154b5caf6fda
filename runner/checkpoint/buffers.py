"""Ask the system for memory, in large pages where it has them: to touch it is then a fifth of the work. No jax."""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress

# Buffers from here on are in large pages.
LARGE_BYTES = 4 << 20


def allocate_buffer(size: int) -> mmap.mmap:
    """Return a buffer of so many bytes, at least one, that begins at a page of its own. Raises MemoryError."""
    try:
        buffer = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"no memory for a buffer of {size} bytes") from error
    # A kernel without large pages says so with an error, and is used as it is.
    if size >= LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
