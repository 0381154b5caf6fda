"""`pin` and `unpin`: an empty file says that retention keeps a checkpoint, whatever the rules are and become."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

from runner.checkpoint.record import PIN, read_sidecar
from runner.errors import RefusedError
from runner.files import open_file, open_folder, remove_file
from runner.inspect.lookup import Checkpoint, find_checkpoint, refuse_bucket, refusing_other_kinds
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="or RUN@best: the one that is the best now")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Pin or unpin, durably; done twice it is as done once. Raises RefusedError where there is no checkpoint."""
    refuse_bucket(arguments.verb, arguments.checkpoint)
    checkpoint, is_wanted = find_checkpoint(arguments.checkpoint), arguments.verb == "pin"
    was_pinned = _is_pinned(checkpoint)
    # Not under the run's lock: retention reads the file again at every save, so a run may be training meanwhile.
    try:
        with refusing_other_kinds():
            if is_wanted:
                os.close(open_file(checkpoint.directory / PIN, os.O_WRONLY | os.O_CREAT))
            else:
                remove_file(checkpoint.directory / PIN)
            # The name is all there is of it.
            with open_folder(checkpoint.directory) as folder:
                os.fsync(folder)
    except FileNotFoundError:
        raise RefusedError(f"{checkpoint}: was deleted just now; choose another step") from None
    if is_wanted:
        change = "was pinned already" if was_pinned else "pinned: retention keeps it"
    else:
        change = "no longer pinned: the next save or prune may delete it" if was_pinned else "was not pinned"
    say(f"{checkpoint}  {change}")
    return VerbResult(
        {
            "run": str(checkpoint.run_dir),
            "step": checkpoint.step,
            "pinned": is_wanted,
            "changed": was_pinned != is_wanted,
        }
    )


def _is_pinned(checkpoint: Checkpoint) -> bool:
    try:
        return read_sidecar(checkpoint.directory)[0].pinned
    except (OSError, ValueError) as error:
        raise RefusedError(f"{checkpoint}: is not a checkpoint ({error})") from None
