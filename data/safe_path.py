"""Have processes that multiprocessing starts find no module in the working directory: it may be somebody else's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Python takes it for its flag -P.
VARIABLE = "PYTHONSAFEPATH"


@contextmanager
def safe_path_for_children() -> Iterator[None]:
    """Keep the working directory off the path of Python processes that are started while the context lasts.

    They are begun with `python -c`, which puts it first; only then they take over the path of this process.
    """
    before = {name: os.environ.get(name) for name in (VARIABLE, "PYTHONPATH")}
    here = os.path.realpath(os.getcwd())
    # An empty part stands for the working directory as well.
    parts = [part for part in (before["PYTHONPATH"] or "").split(os.pathsep) if os.path.realpath(part) != here]
    os.environ |= {VARIABLE: "1", "PYTHONPATH": os.pathsep.join(parts)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def leave_safe_path() -> None:
    """Let programs that code of the user's starts in this child process find what lies beside them."""
    # Where the parent was told so by its user, Python hands it on as a flag as well.
    if "-P" not in sys.orig_argv:
        os.environ.pop(VARIABLE, None)
