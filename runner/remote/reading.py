"""Runs in a bucket, as verbs read them: what is asked for comes into a temporary folder of this process. No jax.

The small files of a run and the seals of its checkpoints come at once. Of a checkpoint that is only looked at, every
other file is an outline: as large as it is there, without its bytes, and closed to readers. One that is to be read
comes in full, and is proven by whoever reads it. Nothing is written into a bucket; the folder goes with the process.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runner.checkpoint.frozen_base import find_digest, locate_base
from runner.checkpoint.record import PIN, REASON, SIDECAR, locate_checkpoint
from runner.errors import ConfigError, RefusedError, StorageError
from runner.files import parse_json
from runner.remote.base_copies import download_base
from runner.remote.objects import NoSuchObjectError, Objects, RemoteError, open_objects, run_side_by_side
from runner.remote.options import Remote, check_url
from runner.remote.remote_layout import BEST, QUARANTINE, Listing, group_segments, name_checkpoint_file, sort_listing
from runner.remote.remote_lock import LOCK, read_lock
from runner.remote.run_files import LEFT_OUT
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_count
from runner.text import shorten, show_folder_as

# What tells that a run is there, and all that a table of many runs is made of.
CONFIG, STATUS = "config.yaml", "status.json"
# Of the logs, those that verbs read.
READ_LOGS = ("logs/metrics.jsonl", "logs/timing.jsonl")
MOST_SHOWN_CHARS = 300


@dataclass
class RemoteRun:
    """A run in a bucket, and what of it is here.

    Attributes:
        url: its place.
        objects: its objects.
        listing: their sizes, as they were when it was looked for.
        aside: of what was set aside there, the keys that say why.
        path: its directory here, once it has one.
        whole: the steps whose every byte is here.
    """

    url: str
    objects: Objects
    listing: Listing
    aside: tuple[str, ...]
    path: Path = Path()
    whole: set[int] = field(default_factory=set)


# By the directory here. One lock, as `load` may be called from any thread.
_RUNS: dict[Path, RemoteRun] = {}
_MAKING = threading.Lock()
_ROOT: list[Path] = []


def split_reference(reference: str) -> tuple[str, str]:
    """Return the URL of a run and what is named in it: a step, `best`, or `newest` where nothing is.

    Raises ConfigError where the reference is no URL of a place that a run can live in.
    """
    scheme, _, rest = reference.partition("://")
    # Only the last part may name a step: a folder above may have an @ in its name.
    folder, slash, last = rest.rstrip("/").rpartition("/")
    name, at, which = last.rpartition("@")
    url = f"{scheme}://{folder}{slash}{name if at else last}".rstrip("/")
    try:
        check_url(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return url, which if at else "newest"


def mirror_runs(url: str, *, brief: bool) -> list[Path]:
    """Return directories with what is needed of the runs at or below a URL, the one that was touched last at the end.

    With `brief` several runs have their configuration and their status here, and an empty folder for each checkpoint.
    Raises RefusedError where no run is there, ConfigError where the store takes the command for wrong, StorageError.
    """
    url, which = split_reference(url)
    if which != "newest":
        raise RefusedError(f"{url}@{which}: expected a run, or a prefix that runs lie below, without @{which}")
    with _telling(url):
        found = _find_runs(url, None)
        if not found:
            raise RefusedError(f"{url}: no run is there; python -m runner ls s3://BUCKET/PREFIX lists the runs")
        brief = brief and found[0].url != url
        run_side_by_side(lambda run: _bring_outline(run, brief=brief), found)
    return [run.path for run in sorted(found, key=lambda run: RunDir(run.path).read_status().get("updated", ""))]


def mirror_run(reference: str, endpoint: str | None = None) -> Path:
    """Return a directory with the small files and the seals of the run at a URL. Raises as `mirror_runs`."""
    url, _ = split_reference(reference)
    with _telling(url):
        found = [run for run in _find_runs(url, endpoint) if run.url == url]
        if not found:
            raise RefusedError(f"{url}: no run is there; python -m runner ls {url.rpartition('/')[0]} lists the runs")
        _bring_outline(found[0], brief=False)
    return found[0].path


def locate_remote_checkpoint(reference: str, endpoint: str | None = None) -> Path:
    """Return the directory of what `URL`, `URL@STEP` or `URL@best` names; only its name and its seal are here.

    Raises RefusedError where there is none, and as `mirror_runs`.
    """
    url, which = split_reference(reference)
    path = mirror_run(url, endpoint)
    try:
        directory = locate_checkpoint(f"{path}@{which}")
    except RefusedError as error:
        forget_run(path)
        # Who has named the run knows nothing of the folder.
        raise type(error)(str(error).replace(str(path), url)) from None
    # `best` is a link.
    return path / "checkpoints" / directory.name


def mirror_checkpoint(reference: str, endpoint: str | None = None) -> Path:
    """Return the directory of the checkpoint that a reference names, with every byte. Raises as the look for it."""
    directory = locate_remote_checkpoint(reference, endpoint)
    bring_bytes(directory)
    return directory


@contextmanager
def hold_checkpoint(reference: str, endpoint: str | None = None, *, whole: bool) -> Iterator[Path]:
    """Have the directory of the checkpoint that a reference names while the context lasts.

    With `whole` every byte of it is here, else its name and its seal. Raises as `locate_remote_checkpoint`.
    """
    directory = locate_remote_checkpoint(reference, endpoint)
    try:
        if whole:
            bring_bytes(directory)
        yield directory
    finally:
        forget_run(directory.parent.parent)


def bring_bytes(directory: Path) -> None:
    """Bring every byte of a checkpoint of which the outline is here; nothing is done where they are here.

    What comes is what lies there, good or not. Raises RefusedError where it is gone by now, ConfigError, StorageError.
    """
    run, step = _RUNS[directory.parent.parent], int(directory.name)
    if step in run.whole:
        return
    fresh = directory.parent.parent / ".fresh" / str(step)
    with _telling(run.url):
        names = [name for name in run.listing.checkpoints[step] if _is_inside(name)]
        for name in names:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        run_side_by_side(lambda name: _download(run, step, name, fresh), names)
        if not (fresh / SIDECAR).exists():
            raise RefusedError(f"{run.url}@{step}: was deleted just now; choose another step")
        shutil.rmtree(directory)
        fresh.rename(directory)
        _bring_base(run, directory)
    run.whole.add(step)


def _bring_base(run: RemoteRun, directory: Path) -> None:
    """Bring the frozen weights that a checkpoint needs. What is wrong with them is told by whoever proves them."""
    with suppress(OSError, RefusedError):
        digest = find_digest(directory)
        if digest is not None and not locate_base(directory, digest).is_dir():
            download_base(run.objects, digest, run.path)


def is_held(path: Path) -> bool:
    """Tell whether somebody has the run of which a directory has files: it is at work, or has gone without a word.

    Raises ConfigError, StorageError where the bucket does not say.
    """
    run = _RUNS[path]
    with _telling(run.url), suppress(NoSuchObjectError):
        hold = read_lock(run.objects).hold
        return hold is not None and hold.held
    return False


def forget_run(path: Path) -> None:
    """Delete what is here of a run."""
    with _MAKING:
        if _RUNS.pop(path, None) is None:
            return
        root = _ROOT[0]
        shutil.rmtree(root / path.relative_to(root).parts[0], ignore_errors=True)
        # A run does not end as other processes do: nothing is left for that moment.
        with suppress(OSError):
            root.rmdir()
            _ROOT.clear()


def _find_runs(url: str, endpoint: str | None) -> list[RemoteRun]:
    """Return the run at a URL, or those below it, of which nothing is here yet. One list of names is asked for."""
    remote = Remote(url=url, endpoint=endpoint)
    parts = urlsplit(url)
    # The client would make it.
    if parts.scheme == "file" and not Path(unquote(parts.path)).is_dir():
        raise RefusedError(f"{url}: there is no such folder")
    # A person waits: the first request is not tried for long.
    sizes = open_objects(remote, url, patient=False).list_sizes()
    objects = open_objects(remote, url)
    found = []
    for prefix, own in _group_by_run(sizes).items():
        run_url = f"{url}/{prefix}" if prefix else url
        aside = tuple(key for key in own if key.startswith(f"{QUARANTINE}/") and key.endswith(f"/{REASON}"))
        found.append(RemoteRun(run_url, objects.below(prefix) if prefix else objects, sort_listing(own, LOCK), aside))
    return found


def _group_by_run(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the sizes of the objects of each run by the prefix of the run, which is empty for the place itself.

    A run has its configuration, or a checkpoint with its seal. What begins with a dot is put away.
    """
    prefixes = set()
    for key in sizes:
        folder, _, name = key.rpartition("/")
        if name == SIDECAR and len(parts := folder.split("/")) > 1 and parts[-2] == "checkpoints":
            prefixes.add("/".join(parts[:-2]))
        elif name == CONFIG:
            prefixes.add(folder)
    prefixes = {prefix for prefix in prefixes if not any(part.startswith(".") for part in prefix.split("/"))}
    grouped: dict[str, dict[str, int]] = {}
    for key, size in sizes.items():
        # The outermost: a run has no other one within.
        parts = key.split("/")[:-1]
        above = ("/".join(parts[:count]) for count in range(len(parts) + 1))
        if (prefix := next((one for one in above if one in prefixes), None)) is not None:
            grouped.setdefault(prefix, {})[key[len(prefix) + 1 :] if prefix else key] = size
    return dict(sorted(grouped.items()))


def _bring_outline(run: RemoteRun, *, brief: bool) -> None:
    """Bring the small files of a run, and the outlines of its checkpoints. Raises RemoteError, OSError."""
    run.path = _make_folder(run.url)
    _RUNS[run.path] = run
    checkpoints = run.path / "checkpoints"
    checkpoints.mkdir()
    wanted = (CONFIG, STATUS) if brief else None
    grouped = group_segments(run.listing.files)
    for name in grouped:
        if name in wanted if wanted is not None else _is_read(name):
            _fetch_file(run, name, grouped[name])
    for step in run.listing.sealed_steps:
        if brief:
            (checkpoints / str(step)).mkdir()
    if brief:
        return
    run_side_by_side(lambda step: _draw_outline(run, step), run.listing.sealed_steps)
    for key in run.aside:
        if len(key.split("/")) == 3 and _is_inside(key):
            _fetch_file(run, key, [key])
    with suppress(NoSuchObjectError, ValueError):
        best = parse_json(run.objects.read(BEST))
        named = best.get("step") if isinstance(best, dict) else None
        if is_count(named) and named in run.listing.sealed_steps:
            os.symlink(str(named), checkpoints / "best")


def _fetch_file(run: RemoteRun, name: str, keys: list[str]) -> None:
    """Write a file of a run, which is one object or several. What was deleted meanwhile is left out."""
    path = run.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(NoSuchObjectError):
        path.write_bytes(b"".join([run.objects.read(key) for key in keys]))


def _draw_outline(run: RemoteRun, step: int) -> None:
    """Make the folder of a checkpoint with its seal, and every other file as large as it is there, without bytes."""
    folder = run.path / "checkpoints" / str(step)
    try:
        seal = run.objects.read(name_checkpoint_file(step, SIDECAR))
    except NoSuchObjectError:
        # Deleted since the names were listed: it is not there.
        return
    folder.mkdir()
    (folder / SIDECAR).write_bytes(seal)
    for name, size in run.listing.checkpoints[step].items():
        if name == SIDECAR or not _is_inside(name):
            continue
        # A name that no disk takes: it is missing then, and that is told.
        with suppress(OSError):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # Whoever would read it, but for root, is told that he may not. Its seal would not believe it either.
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644 if name == PIN else 0)
            try:
                os.ftruncate(handle, size)
            finally:
                os.close(handle)


def _download(run: RemoteRun, step: int, name: str, fresh: Path) -> None:
    # What is missing is told by whoever compares it with the seal.
    with suppress(NoSuchObjectError):
        run.objects.download(name_checkpoint_file(step, name), fresh / name, run.listing.checkpoints[step][name])


def _is_read(name: str) -> bool:
    """Tell whether verbs read a file of a run, which is beside its checkpoints."""
    return ("/" not in name or name in READ_LOGS) and name not in LEFT_OUT and _is_inside(name)


def _is_inside(name: str) -> bool:
    """Tell whether a key is the name of a file that stays in its folder: anybody may have written into a bucket."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _make_folder(url: str) -> Path:
    """Return a new folder that is named like a run, and shown to people as its URL."""
    with _MAKING:
        if not _ROOT:
            _ROOT.append(Path(os.path.realpath(tempfile.mkdtemp(prefix="holdfast-"))))
            atexit.register(shutil.rmtree, _ROOT[0], ignore_errors=True)
        # The last two names are those that a run has on a disk: NAME/RUN.
        parts = [shorten(part, 200) for part in urlsplit(url).path.split("/") if part][-2:]
        path = Path(tempfile.mkdtemp(dir=_ROOT[0])).joinpath(*(parts or ["run"]))
        path.mkdir(parents=True)
    show_folder_as(path, url)
    return path


@contextmanager
def _telling(url: str) -> Iterator[None]:
    """Tell trouble of a store, and of the disk on which things are put, in one line each."""
    try:
        yield
    except RemoteError as error:
        if error.is_refusal:
            raise ConfigError(
                f"{error}; check the bucket's name, its region (AWS_REGION) and the credentials in the environment"
            ) from None
        raise StorageError(f"{error}; check the network (or AWS_ENDPOINT_URL), then run the same command") from None
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("remote.url=")) from None
    except OSError as error:
        raise StorageError(
            f"{shorten(url, MOST_SHOWN_CHARS)}: cannot be put into a temporary folder ({error.strerror or error}); "
            "TMPDIR=FOLDER chooses another"
        ) from error
