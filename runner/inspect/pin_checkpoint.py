"""`pin` and `unpin`: an empty file says that retention keeps a checkpoint, whatever the rules are and become."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.checkpoint.record import PIN, read_sidecar
from runner.errors import RefusedError
from runner.files import sync_path
from runner.inspect.lookup import Checkpoint, find_checkpoint
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """One checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="or RUN@best: the one that is the best now")


def run(arguments: Namespace, say: Say) -> Answer:
    """Pin or unpin, durably; done twice it is as done once. Raises RefusedError where there is no checkpoint."""
    checkpoint, wanted = find_checkpoint(arguments.checkpoint), arguments.verb == "pin"
    was = _is_pinned(checkpoint)
    try:
        if wanted:
            (checkpoint.directory / PIN).touch()
        else:
            (checkpoint.directory / PIN).unlink(missing_ok=True)
        sync_path(checkpoint.directory)
    except FileNotFoundError:
        raise RefusedError(f"{checkpoint}: was deleted just now; choose another step") from None
    told = {
        (True, False): "pinned: retention keeps it",
        (True, True): "was pinned already",
        (False, True): "no longer pinned: the next save or prune may delete it",
        (False, False): "was not pinned",
    }
    say(f"{checkpoint}  {told[wanted, was]}")
    document = {"run": str(checkpoint.run), "step": checkpoint.step, "pinned": wanted, "changed": was != wanted}
    return Answer(document)


def _is_pinned(checkpoint: Checkpoint) -> bool:
    try:
        return read_sidecar(checkpoint.directory)[0].pinned
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RefusedError(f"{checkpoint}: is not a checkpoint ({error})") from None
