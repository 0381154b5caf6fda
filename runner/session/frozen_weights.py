"""The frozen weights of a run (checkpoint/frozen_base.py): stored when it begins, mended when it goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from runner import files, hosts
from runner.checkpoint import shards, shared_restore, store
from runner.checkpoint.frozen_base import (
    BASE,
    LostBaseError,
    find_needed_base,
    prove_base,
    set_base_aside,
    share_base,
    store_base,
)
from runner.checkpoint.held_state import list_pieces
from runner.checkpoint.record import SAVE_CHANNEL
from runner.checkpoint.shards import SharedStore
from runner.text import display_path
from runner.train.built import Built
from runner.train.frozen_layers import find_unchanged
from runner.train.run_context import RunContext
from runner.types import State

# Where process 0 says which base has been stored.
CHANNEL = "base"


def store_frozen(context: RunContext, state: State) -> str:
    """Store what no step changes of a fresh state, and return its digest; "" where there is nothing of that.

    Every process calls this, and writes its part. Raises OSError, StorageError.
    """
    if not (tree := find_unchanged(state)):
        return ""
    if not hosts.is_lead():
        # Not copied: training has not begun.
        held = list_pieces(tree)
        word = hosts.hear(SAVE_CHANNEL)
        hosts.gather(SAVE_CHANNEL, shards.report_part(Path(word["into"]), held, word["verify"]))
        return str(hosts.hear(CHANNEL))
    write = store.write_checkpoint if hosts.is_alone() else SharedStore("bytes").write_checkpoint
    with context.attempt.time_in("startup"):
        digest = store_base(context.run_dir.path, lambda directory: write(directory, tree, {}))
    return str(hosts.agree(CHANNEL, digest))


def mend_frozen(context: RunContext, built: Built, begin: Callable[[], State]) -> None:
    """Bring back what does not train where it is not what was written, so that checkpoints that need it can be used.

    It is taken from another run of the name, from the bucket, or made again with `begin`: in each case only where it
    has the same digest. What was there is set aside. Raises LostBaseError where it cannot be had.
    """
    run_dir, say = context.run_dir, context.console.say
    if not find_unchanged(built.abstract) or (place := find_needed_base(run_dir.checkpoints)) is None:
        return
    try:
        prove_base(place)
    except LostBaseError as error:
        lost = error
    else:
        return
    say(f"warning: the frozen weights in {display_path(place)} are not good: {lost.problem}")
    set_base_aside(place, run_dir.quarantine, lost.problem)
    ways = {
        "taken from another run of this name": partial(share_base, run_dir.path, place.name),
        "fetched again": partial(context.other_place.bring_base, place.name),
        "made again": partial(_make_again, context, begin, place),
    }
    for done, bring in ways.items():
        if bring():
            say(f"they were {done}, with the same digest")
            return
    raise lost


def _make_again(context: RunContext, begin: Callable[[], State], place: Path) -> bool:
    """Store a fresh state's frozen weights; return whether they are those that lay here."""
    if not hosts.is_alone():
        # They wait to be told what to read (session/resume.py), and make their part of it when they hear this.
        hosts.agree(shared_restore.CHANNEL, {"make": place.name})
    digest = store_frozen(context, begin())
    if digest != place.name:
        files.remove_tree(context.run_dir.path / BASE / digest)
    return digest == place.name
