"""Store once what no step of a run changes, beside the checkpoints that need it.

    RUN/base/DIGEST/state/            the arrays, as Orbax writes them: `frozen.…`, parameters that do not train;
                                      `reference.…`, the model as it began, where an objective compares with it
    RUN/base/DIGEST/holdfast.json     the seal, as that of a checkpoint at step 0

DIGEST is the SHA-256 of names, types, shapes and values, whichever way they were written. Each checkpoint of the run
has it in its progress, as `base`. A base is written before the first checkpoint that needs it, never changed and never
deleted, so retention has nothing to decide about it. Runs of one name that have the same base share its bytes on disk:
their files are hard links. One that is not what was written condemns no checkpoint; it is brought back or made again,
and taken only where it has the same digest.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from runner import files
from runner.checkpoint.record import REASON, SIDECAR, STATE, Record, list_records, read_progress, read_sidecar
from runner.checkpoint.seal import WrittenArrays, find_problem, seal_checkpoint
from runner.errors import RefusedError
from runner.text import display_path
from runner.types import JsonObject

if TYPE_CHECKING:
    from runner.checkpoint.arrays import LeafSpec

# The folder of a run, and the key of a checkpoint's progress.
BASE = "base"
DIGEST = re.compile("[0-9a-f]{64}")
# Where one is written; a kill leaves it there, and the next start removes it.
FRESH = ".writing"
COPY_BYTES = 1 << 20
# Writes the arrays into a directory that is not there yet, as a checkpoint.
WriteBase = Callable[[Path], WrittenArrays]
# Bases that this process has read, every byte, by their place and the time of their seal.
_proven: set[tuple[str, int]] = set()


class LostBaseError(RefusedError):
    """Raised where a base is missing or not what was written; the checkpoints that need it may be good."""

    def __init__(self, directory: Path, problem: str):
        super().__init__(
            f"{display_path(directory)}: the frozen weights that this run's checkpoints need are not good: {problem}; "
            "bring that folder back from a copy (any run with the same base has it), or start afresh with resume=never "
            "overwrite=true"
        )
        self.directory, self.problem = directory, problem


def find_digest(checkpoint: Path) -> str | None:
    """Return the digest of the base that a checkpoint needs; None where it has everything itself.

    Raises OSError where it cannot be read, RefusedError where it is no digest.
    """
    digest = read_progress(checkpoint).get(BASE)
    if digest is not None and not (isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise RefusedError(f"{display_path(checkpoint)}: names no base that this version knows; choose another step")
    return digest


def locate_base(checkpoint: Path, digest: str) -> Path:
    """Return where the base of a checkpoint lies, in the directory of its run."""
    return checkpoint.parent.parent / BASE / digest


def find_base_problem(directory: Path, digest: str | None = None) -> str | None:
    """Return why a base is not what was written, in a few words; None where every byte is, and its name is its own.

    `digest` is its name where the directory is not called so yet. Raises OSError where it cannot be read now.
    """
    if problem := find_problem(directory, step=0):
        return problem
    # A folder under another's name has a good seal as well.
    reason = read_sidecar(directory, 0).record.reason
    return None if reason == _describe(digest or directory.name) else f"{SIDECAR} is of another base"


def prove_base(directory: Path) -> None:
    """Raise LostBaseError where a base is not what was written. Each is read once in a process."""
    with suppress(OSError):
        key = (str(directory.resolve()), (directory / SIDECAR).stat().st_mtime_ns)
        if key in _proven:
            return
    if problem := find_base_problem(directory):
        raise LostBaseError(directory, problem)
    _proven.add((str(directory.resolve()), (directory / SIDECAR).stat().st_mtime_ns))


def open_base(checkpoint: Path) -> Path | None:
    """Return the base that a checkpoint needs, proven; None where it needs none. Raises LostBaseError."""
    if (digest := find_digest(checkpoint)) is None:
        return None
    directory = locate_base(checkpoint, digest)
    prove_base(directory)
    return directory


def open_tuned_base(checkpoint: Path) -> Path | None:
    """Return the base with what a checkpoint's run did not train, proven; None where it trained all of its weights.

    A run may have a base for another reason: the model that an objective compares with. Raises LostBaseError.
    """
    base = open_base(checkpoint)
    return base if base is not None and list_frozen(base) else None


def list_frozen(base: Path) -> list[str]:
    """Return the names of the parameters in a base that do not train."""
    # Imported here, and below: `python -m runner ls` answers sooner without TensorStore.
    from runner.checkpoint.arrays import read_leaf_specs

    return [name for name in read_leaf_specs(base / STATE) if name.startswith("frozen.")]


def list_arrays_with_base(checkpoint: Path) -> dict[str, tuple[Path, LeafSpec]]:
    """Return by its name where each array of a checkpoint is saved, those of its base included, and what it is."""
    from runner.checkpoint.arrays import read_leaf_specs

    trees = [checkpoint / STATE]
    if (base := open_base(checkpoint)) is not None:
        trees.append(base / STATE)
    return {name: (tree, spec) for tree in trees for name, spec in read_leaf_specs(tree).items()}


def store_base(run: Path, write: WriteBase) -> str:
    """Put the base of a run on disk, durably, and return its digest.

    Where this run, or another one of its name, has the same base already, its bytes are not stored again. Raises
    OSError, StorageError; then no base is there under its name.
    """
    from runner.checkpoint.arrays import compute_logical_digest

    folder = run / BASE
    fresh = folder / FRESH
    files.remove_tree(fresh)
    files.make_folder(folder)
    written = write(fresh)
    digest = compute_logical_digest(fresh / STATE, {})
    place = folder / digest
    if place.is_dir() and find_base_problem(place) is None:
        files.remove_tree(fresh)
        return digest
    seal_checkpoint(fresh, Record(0, _describe(digest), {}, time.time()), written)
    publish_base(fresh, place)
    share_base(run, digest)
    return digest


def share_base(run: Path, digest: str) -> bool:
    """Take the base of another run of the same name in the place of this one's bytes; return whether there was one.

    It is linked where the file system can do it, and copied where this run has no good one itself. Only the files that
    its seal names are taken, and what was taken is proven, down to the digest of its values: the other run is somebody
    else's, who may have changed it.
    """
    from runner.checkpoint.arrays import compute_logical_digest

    place = run / BASE / digest
    fresh = place.with_name(FRESH)
    for other in _iter_others(run, digest):
        # ValueError: of a seal, or of arrays, that are none.
        with suppress(OSError, ValueError, RefusedError):
            files.remove_tree(fresh)
            has_own = place.is_dir()
            # Of a seal that promises more than there is here, nothing is taken, and nothing of it is read.
            if has_own and read_sidecar(other, 0).arrays != read_sidecar(place, 0).arrays:
                continue
            _take_sealed_files(other, fresh, _link if has_own else _link_or_copy)
            if find_base_problem(fresh, digest) is None and compute_logical_digest(fresh / STATE, {}) == digest:
                publish_base(fresh, place)
                return True
    files.remove_tree(fresh)
    return False


def _take_sealed_files(other: Path, fresh: Path, take: Callable[[Path, Path], None]) -> None:
    """Link or copy what the seal of a base names. Raises OSError where one of it is no plain file, or of another size.

    Nothing is followed: a link may lead anywhere, a pipe is waited for, a device has no end.
    """
    # The folder of a run may be a link: it was moved to another disk.
    real = Path(os.path.realpath(other.parent.parent)) / BASE / other.name
    sealed = {name: facts["bytes"] for name, facts in read_sidecar(real, 0).files.items()}
    for name, size in {**sealed, SIDECAR: None}.items():
        source = real / name
        with files.open_folder(source.parent) as folder:
            found = os.stat(source.name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_size != (found.st_size if size is None else size):
            raise OSError(errno.EINVAL, "is not what the seal says", str(source))
        files.make_folder((fresh / name).parent)
        take(source, fresh / name)


def set_base_aside(directory: Path, quarantine: Path, problem: str) -> None:
    """Move a base that is not good out of the way, with the reason beside it; never delete it."""
    if not directory.is_dir():
        return
    files.make_folder(quarantine)
    aside = quarantine / f"{BASE}-{directory.name[:8]}-{time.time_ns()}"
    files.rename_path(directory, aside)
    files.replace_file(aside / REASON, problem + "\n", durable=False)


def find_needed_base(checkpoints: Path) -> Path | None:
    """Return where the base of the newest checkpoint that is gone on from should lie; None where it needs none."""
    for record in reversed(list_records(checkpoints)):
        directory = checkpoints / str(record.step)
        # What is wrong with a checkpoint is told where it is restored.
        with suppress(OSError, RefusedError):
            digest = None if record.mark else find_digest(directory)
            if digest is not None:
                return locate_base(directory, digest)
    return None


def with_digest(progress: JsonObject, digest: str) -> JsonObject:
    """Return the progress of a checkpoint that needs this base."""
    return {**progress, BASE: digest} if digest else progress


def _iter_others(run: Path, digest: str) -> Iterator[Path]:
    """Yield where runs of the same name have a base of this digest."""
    for seal in sorted(run.parent.glob(f"*/{BASE}/{digest}/{SIDECAR}")):
        if seal.parent.parent.parent != run:
            yield seal.parent


def _link(source: Path, target: Path) -> None:
    with files.open_folder(source.parent) as folder:
        os.link(source.name, target, src_dir_fd=folder, follow_symlinks=False)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        _link(source, target)
    # Another file system, or one that knows no links.
    except OSError:
        with os.fdopen(files.open_file(source, os.O_RDONLY), "rb") as read, target.open("xb") as write:
            # No more than it had: a file that grows meanwhile has no end.
            left = os.fstat(read.fileno()).st_size
            while left and (part := read.read(min(left, COPY_BYTES))):
                write.write(part)
                left -= len(part)
        files.sync_path(target)


def publish_base(fresh: Path, place: Path) -> None:
    """Give a base its name, durably; what is under that name goes."""
    for folder in [path for path in fresh.rglob("*") if path.is_dir()] + [fresh]:
        files.sync_path(folder)
    old = place.with_name(f"{FRESH}-old")
    files.remove_tree(old)
    if place.exists():
        files.rename_path(place, old)
    files.rename_path(fresh, place)
    for folder in (place.parent, place.parent.parent):
        files.sync_path(folder)
    files.remove_tree(old)


def _describe(digest: str) -> str:
    return f"base {digest}"
