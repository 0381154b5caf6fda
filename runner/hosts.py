"""Which process of a run this one is, and what the processes of a run decide together.

Today a run is one process: it leads, agrees with itself, waits for nobody. Every decision that several processes would
have to share is asked for here all the same, so that the answer can change in this file alone:

    is_lead    who locks the run, writes its files and prunes its checkpoints
    agree      whether to stop, where to resume: the lead's word counts for everybody
    barrier    nobody goes on before everybody is here: before a checkpoint that others must not read half-written
    publish    what one process tells the others, and `read_published` what it was told

No jax: the answers are needed before it starts.
"""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

_PUBLISHED: dict[str, Any] = {}


def is_lead() -> bool:
    """Return whether this process acts for the whole run."""
    return True


def agree(value: T) -> T:
    """Return the value that the lead has, in every process. `value` must be plain JSON."""
    return value


def barrier(name: str, seconds: float) -> None:
    """Wait until every process has come to the barrier of this name.

    Raises TimeoutError, naming who is missing, after so many seconds. One process never waits.
    """


def publish(key: str, value: Any) -> None:
    """Tell every process of this run a plain JSON value."""
    _PUBLISHED[key] = value


def read_published(key: str) -> Any:
    """Return what was published under a key; None where nothing was."""
    return _PUBLISHED.get(key)
