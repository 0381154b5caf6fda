"""A checkpoint goes up, comes down, is set aside and is deleted: whole, or not to be seen as one. No jax.

Its files go up side by side, and its seal, holdfast.json, when all of them are there: a step without a seal was never
whole. What comes down is proven before it gets its name. What is deleted loses its seal first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from runner import files
from runner.checkpoint.frozen_base import find_digest, locate_base
from runner.checkpoint.record import PIN, REASON, SIDECAR, WRITING, Record, Sidecar, read_sidecar
from runner.checkpoint.seal import find_problem
from runner.remote.base_copies import upload_base
from runner.remote.objects import NoSuchObjectError, Objects, OtherObjectError, RemoteError, run_side_by_side
from runner.remote.remote_layout import QUARANTINE, name_checkpoint_file

# So long after a download that broke off the next one begins.
RETRY_SECONDS = (0.5, 2.0)


class AbandonedError(Exception):
    """Raised where an upload is left off, because a newer checkpoint is to go up in the time that is left."""


def upload_checkpoint(
    objects: Objects,
    directory: Path,
    present: Mapping[str, int],
    before_seal: Callable[[], None],
    go_on: Callable[[], bool],
) -> Sidecar:
    """Send a sealed checkpoint; return what its seal says.

    Args:
        objects: those of the run.
        directory: the checkpoint on disk.
        present: what is there under its step already: what a kill, or a holder that was asleep, has left.
        before_seal: called when all but the seal is there. It sends the logs, and raises where the run was lost.
        go_on: asked before each file.

    Raises ValueError where the checkpoint on disk is not what was written, OSError where it cannot be read or is gone,
    RemoteError, LostRunError, AbandonedError.
    """
    step = int(directory.name)
    sidecar = read_sidecar(directory)
    delete_remote_checkpoints(objects, {step: present})

    def raise_if_abandoned() -> None:
        if not go_on():
            raise AbandonedError

    if (digest := find_digest(directory)) is not None:
        upload_base(objects, locate_base(directory, digest), raise_if_abandoned)

    def send(name: str) -> None:
        raise_if_abandoned()
        # Every byte that goes up is compared with the seal: a disk may have lost one since.
        facts = sidecar.files[name]
        objects.upload(name_checkpoint_file(step, name), directory / name, facts["bytes"], facts.get("xxh3"))

    # The largest first, so that no large one is left for the end, when nothing else goes up beside it.
    run_side_by_side(send, sorted(sidecar.files, key=lambda name: -sidecar.files[name]["bytes"]))
    before_seal()
    # A seal says that all of it is there: whoever answered may have taken a file and not kept it.
    there = list_checkpoint_files(objects, step)
    for name, facts in sidecar.files.items():
        # Asked for by its name as well: a list may say for a while what was there before.
        if there.get(name) != facts["bytes"] and objects.find_size(name_checkpoint_file(step, name)) != facts["bytes"]:
            raise RemoteError(f"{objects.url}: {name} of step {step} was sent and is not there in its size")
    key, seal = name_checkpoint_file(step, SIDECAR), files.read_file(directory / SIDECAR)
    try:
        objects.create(key, seal)
    except OtherObjectError:
        # The answer to the request before was lost; or a holder that was asleep has sealed what it had sent.
        if objects.read(key) != seal:
            raise RemoteError(f"{objects.url}/{key}: something else was written there meanwhile") from None
    return sidecar


def list_checkpoint_files(objects: Objects, step: int) -> dict[str, int]:
    """Return the size of each file that lies under a step now. Raises RemoteError."""
    folder = name_checkpoint_file(step, "")
    return {key.removeprefix(folder): size for key, size in objects.list_sizes(folder).items()}


def read_remote_record(objects: Objects, step: int, scratch: Path) -> Record:
    """Return the record of a step whose seal is there. `scratch` is an empty folder of this call alone.

    Raises NoSuchObjectError, ValueError where the seal is not what was written, RemoteError.
    """
    folder = scratch / str(step)
    folder.mkdir()
    (folder / SIDECAR).write_bytes(objects.read(name_checkpoint_file(step, SIDECAR)))
    return read_sidecar(folder).record


def download_checkpoint(objects: Objects, step: int, present: Mapping[str, int], checkpoints: Path) -> str | None:
    """Bring a checkpoint onto this disk, proven; return what is wrong with it where it is not what was written.

    Args:
        objects: those of the run.
        step: which one.
        present: the size of each of its files there.
        checkpoints: the folder in which it gets its name.

    Raises RemoteError, OSError; then nothing has the name.
    """
    fresh = checkpoints / WRITING / f"{step}-{os.getpid()}"
    files.make_folder(fresh.parent)
    files.remove_tree(fresh)
    problem = _fetch_and_prove(objects, step, present, fresh)
    if problem is None:
        # Not synced: what a power loss takes of it is found when it is proven again, and is fetched again.
        files.rename_path(fresh, checkpoints / str(step))
    else:
        files.remove_tree(fresh)
    return problem


def _fetch_and_prove(objects: Objects, step: int, present: Mapping[str, int], fresh: Path) -> str | None:
    fresh.mkdir()
    try:
        seal = objects.read(name_checkpoint_file(step, SIDECAR))
    except NoSuchObjectError:
        return f"{SIDECAR} is missing"
    (fresh / SIDECAR).write_bytes(seal)
    try:
        sealed = read_sidecar(fresh, step).files
    except ValueError as error:
        return str(error)
    # What the seal does not name does not belong to the checkpoint: a holder that was asleep may have put it there.
    wanted = [*sealed, *([PIN] if PIN in present else [])]
    for name in wanted:
        files.make_folder((fresh / name).parent)
    missing = []

    def fetch(name: str) -> None:
        try:
            _download_again(objects, name_checkpoint_file(step, name), fresh / name, present.get(name, 0))
        except NoSuchObjectError:
            missing.append(name)

    if absent := sorted(name for name in sealed if name not in present):
        return f"{absent[0]} is missing"
    # A file of another size is not fetched: it may be of any.
    for name, facts in sealed.items():
        if present[name] != facts["bytes"]:
            return f"{name} has {present[name]} bytes instead of {facts['bytes']}"
    run_side_by_side(fetch, wanted)
    if missing:
        return f"{missing[0]} is missing"
    return find_problem(fresh, step=step)


def _download_again(objects: Objects, key: str, path: Path, size: int) -> None:
    """Download an object; once more where a connection breaks in the middle of it, which the client does not mend."""
    for pause in (*RETRY_SECONDS, None):
        try:
            objects.download(key, path, size)
            return
        except RemoteError as error:
            if pause is None or error.is_refusal:
                raise
        files.remove_file(path)
        time.sleep(pause)


def delete_remote_checkpoints(objects: Objects, present: Mapping[int, Iterable[str]]) -> None:
    """Delete what lies under some steps. Raises RemoteError; what is left of one of them then is no checkpoint."""
    keys = [name_checkpoint_file(step, name) for step, names in present.items() for name in names]
    seals = [key for key in keys if key.endswith(f"/{SIDECAR}")]
    # The seals first: a checkpoint without a seal is none.
    objects.delete(seals)
    objects.delete([key for key in keys if key not in seals])


def quarantine_remote_checkpoint(objects: Objects, step: int, present: Mapping[str, int], reason: str) -> str:
    """Set a checkpoint aside: copy it to where nobody restores from, and delete it here. Return where it is now.

    Raises RemoteError; then it is here, or in both places.
    """
    aside = f"{QUARANTINE}/{step}-{time.time_ns()}"

    def copy(name: str) -> None:
        # What is missing may be why it is set aside.
        try:
            objects.copy(name_checkpoint_file(step, name), f"{aside}/{name}")
        except NoSuchObjectError:
            return

    run_side_by_side(copy, list(present))
    objects.write(f"{aside}/{REASON}", f"{reason}\n".encode())
    delete_remote_checkpoints(objects, {step: present})
    return aside
