"""Holdfast from Python: `from holdfast import run, sweep, load`. Importing it imports nothing else; a call does.

run      work on one run in a process of its own, and return what came of it
sweep    the same for every run of a sweep or a search
load     a checkpoint as a live model
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner import RunError as RunError
    from runner import RunResult as RunResult
    from runner import load as load
    from runner import run as run
    from runner import sweep as sweep

__all__ = ["RunError", "RunResult", "load", "run", "sweep"]


def __getattr__(name: str) -> Any:
    """Hand on what `runner` exports."""
    if name in __all__:
        # A folder `runner` where it is called comes first on the search path, and is not meant.
        beside = os.path.dirname(os.path.realpath(__file__))
        sys.path.insert(0, beside)
        try:
            import runner
        finally:
            sys.path.remove(beside)
        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what there is, for completion."""
    return [*globals(), *__all__]


if __name__ == "__main__":
    from runner.__main__ import run_console_script

    run_console_script()
