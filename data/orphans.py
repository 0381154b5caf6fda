"""A process that helps another one ends with it, however that ends: SIGKILL too."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Watch the process that started this one, from a thread, and end with it: leave no orphan."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def watch() -> None:
        # The sentinel is the end of a pipe that the parent holds: the kernel closes it, however the parent ends.
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
