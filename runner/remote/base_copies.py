"""The frozen weights of a run in a bucket: sent once, before the first checkpoint that needs them; proven when fetched.

As with a checkpoint the seal goes up last: a base without one was never whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runner import files
from runner.checkpoint.frozen_base import BASE, FRESH, find_base_problem, publish_base
from runner.checkpoint.record import SIDECAR, read_sidecar
from runner.remote.objects import NoSuchObjectError, Objects, RemoteError, run_side_by_side

NOT_THERE = "nothing is there"


def name_base_file(digest: str, name: str) -> str:
    """Return the key of a file of a base."""
    return f"{BASE}/{digest}/{name}"


def list_base_files(objects: Objects, digest: str) -> dict[str, int]:
    """Return the size of each file of a base that is there now. Raises RemoteError."""
    folder = name_base_file(digest, "")
    return {key.removeprefix(folder): size for key, size in objects.list_sizes(folder).items()}


def upload_base(objects: Objects, base: Path, go_on: Callable[[], None]) -> None:
    """Send a base, unless it is there. `go_on` is called before each file, and raises where the upload is left off.

    Raises ValueError where it is not what was written, OSError where it cannot be read, RemoteError.
    """
    there = list_base_files(objects, base.name)
    if SIDECAR in there:
        return
    sealed = read_sidecar(base, 0).files

    def send(name: str) -> None:
        go_on()
        facts = sealed[name]
        objects.upload(name_base_file(base.name, name), base / name, facts["bytes"], facts.get("xxh3"))

    run_side_by_side(send, sorted(sealed, key=lambda name: -sealed[name]["bytes"]))
    for name, facts in sealed.items():
        if objects.find_size(name_base_file(base.name, name)) != facts["bytes"]:
            raise RemoteError(f"{objects.url}: {name} of the frozen weights was sent and is not there in its size")
    objects.write(name_base_file(base.name, SIDECAR), files.read_file(base / SIDECAR))


def download_base(objects: Objects, digest: str, run: Path) -> str | None:
    """Bring a base onto this disk, proven; return what is wrong where it is not there, or not what was written.

    Raises RemoteError, OSError.
    """
    sizes = list_base_files(objects, digest)
    if SIDECAR not in sizes:
        return NOT_THERE
    fresh = run / BASE / FRESH
    files.remove_tree(fresh)
    files.make_folder(fresh)
    if problem := _fetch(objects, digest, sizes, fresh):
        files.remove_tree(fresh)
        return problem
    publish_base(fresh, run / BASE / digest)
    return None


def _fetch(objects: Objects, digest: str, sizes: dict[str, int], fresh: Path) -> str | None:
    (fresh / SIDECAR).write_bytes(objects.read(name_base_file(digest, SIDECAR)))
    try:
        # Only what the seal names belongs to it.
        names = list(read_sidecar(fresh, 0).files)
    except ValueError as error:
        return str(error)
    for name in names:
        files.make_folder((fresh / name).parent)
    if absent := sorted(name for name in names if name not in sizes):
        return f"{absent[0]} is missing"
    try:
        run_side_by_side(lambda name: objects.download(name_base_file(digest, name), fresh / name, sizes[name]), names)
    except NoSuchObjectError:
        return "a file of it is missing"
    return find_base_problem(fresh, digest)
