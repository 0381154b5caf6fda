"""Tell trouble of the machine, which may pass, from what can never work. No jax, no TensorStore: only their texts.

A disk that is full has room again later, and a machine without memory has some. A name that the file system does not
take, or a state that Orbax cannot write, is the same the next time.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from runner.text import shorten

PASSING_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS),  # the disk
        *(errno.ESTALE, errno.ETIMEDOUT),  # the network below it
        *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN),  # memory, open files, threads
    }
)
SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


def find_errno(error: BaseException) -> int | None:
    """Return the number of what the operating system said; None where it said nothing.

    Orbax wraps errors, and TensorStore puts the number into a text of three lines.
    """
    return next((number for one in _iter_causes(error) if (number := _read_errno(one)) is not None), None)


def may_pass(error: BaseException) -> bool:
    """Tell whether the same may work later without anybody changing the command."""
    return find_errno(error) in PASSING_ERRNOS


def short_reason(error: BaseException) -> str:
    """Return the reason of an error in one line: what the operating system said, where it did."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = _read_errno(error)
    lines = str(error).strip().splitlines()
    # A library may print all of its objects into one line.
    return os.strerror(number) if number is not None else shorten(lines[0], 200) if lines else type(error).__name__


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and each that it came from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _read_errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        return int(code[1])
    # jax says this of the memory of a device or of the host.
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        return errno.ENOMEM
    return errno.EAGAIN if text == "can't start new thread" else None
