"""Which process of a run this one is, and what the processes of a run decide together. No jax.

A run is one process, or several that hold one state among them. Every decision that they have to share is asked for
here, so that nobody else asks how many there are:

    is_lead     who locks the run, writes its files and prunes its checkpoints
    agree       whether to stop, when to save, where to resume: the word of process 0 counts for everybody
    gather      what each has found, told to process 0
    barrier     nobody goes on before everybody is here

options.py says how processes find each other, link.py is a connection between two, group.py what they all agree on;
service.py has jax join their devices. One process answers itself, at no cost.
"""

from __future__ import annotations

from typing import Any, TypeVar

from runner.hosts.group import Alone, Group

T = TypeVar("T")

# Set once, before anything is asked.
_group: Group = Alone()


def use_group(group: Group) -> None:
    """Answer for this group from now on."""
    global _group
    _group = group


def current_group() -> Group:
    """Return the processes of this run."""
    return _group


def is_lead() -> bool:
    """Return whether this process acts for the whole run."""
    return _group.index == 0


def is_alone() -> bool:
    """Return whether this is the only process of the run."""
    return _group.count == 1


def agree(key: str, value: T) -> T:
    """Return the value that process 0 has under this key, in every process. It must be plain JSON."""
    return _group.agree(key, value)


def hear(key: str) -> Any:
    """Return what process 0 says under this key, in a process that does not lead."""
    return _group.agree(key, None)


def gather(key: str, value: T) -> list[T] | None:
    """Return the value of each process, in their order, to process 0; None to the others. It must be plain JSON."""
    return _group.gather(key, value)


def barrier(key: str) -> None:
    """Wait until every process has come here. Raises LostProcessError where one never will."""
    _group.gather(key, None)
    _group.agree(key, None)


def is_true_for_all(key: str, value: bool) -> bool:  # noqa: FBT001 - the value is what is asked about
    """Return whether every process says True."""
    found = _group.gather(key, value)
    return bool(_group.agree(key, all(found) if found is not None else None))
