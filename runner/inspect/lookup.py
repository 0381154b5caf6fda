"""Find runs and checkpoints by the names people type, and read what their small files say. No array is read."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.checkpoint.frozen_base import open_base
from runner.checkpoint.record import NewerFormatError, Record, Score, is_step_name, locate_checkpoint, read_sidecar
from runner.checkpoint.retention import RetentionRule
from runner.checkpoint.seal import find_odd_file, find_problem
from runner.config.read_yaml import parse_yaml
from runner.config.validation import Retention, validate_saved
from runner.errors import ConfigError, RefusedError
from runner.files import NOT_A_FILE, parse_json, read_file
from runner.remote.options import is_remote_url
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import is_in_use, run_state
from runner.text import display_path, shorten
from runner.types import Document, JsonObject

Proof = Literal["ok", "sizes ok", "not good"]
# The largest configuration of ours has 5 kB.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One step of one run."""

    run_dir: RunDir
    step: int

    @property
    def directory(self) -> Path:
        """Return `checkpoints/STEP` of the run."""
        return self.run_dir.checkpoints / str(self.step)

    def __str__(self) -> str:
        """Return the name that a person would type."""
        return f"{self.run_dir}@{self.step}"


@dataclass(frozen=True)
class CheckpointStatus:
    """The state of a directory that is named like a step.

    Attributes:
        step: the name of the directory.
        record: its sidecar; None where that cannot be believed.
        problem: what is wrong with its files, in words; None where nothing is.
        num_files: how many files the sidecar lists.
        proof: what was compared: checksums (`ok`) or names and sizes only (`sizes ok`).
    """

    step: int
    record: Record | None
    problem: str | None
    num_files: int
    proof: Proof


@dataclass(frozen=True)
class RetentionSettings:
    """The part of a configuration that says which checkpoints stay, what best means and how bytes are proven."""

    keep: Mapping[str, RetentionRule]
    score: Score
    verify: str


def choose_new_folder(verb: str, to: str | None) -> Path:
    """Return the folder for the results of a verb, `to` or `outputs/.VERB/TIME`. It is not made.

    Raises RefusedError where something is in it already.
    """
    default = Path("outputs") / f".{verb}" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(to).expanduser() if to else default
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedError(f"{verb}: {folder} is there already; name a new folder with --to")
    return folder.resolve()


def find_run(path: str) -> RunDir:
    """Return the run in a directory, or of a URL. Raises RefusedError where none is, and what a bucket raises."""
    if is_remote_url(path):
        # Imported here, and below: where no bucket is named its client is not waited for.
        from runner.remote.reading import mirror_run

        return RunDir(mirror_run(path))
    run_dir = name_run(path)
    if not is_run(run_dir):
        what = "no run is there" if run_dir.path.is_dir() else "there is no such directory"
        raise RefusedError(f"{path}: {what}; python -m runner ls outputs lists the runs")
    if run_dir.checkpoints.is_symlink():
        raise RefusedError(f"{run_dir.checkpoints}: is a link, and what is there is of another run; name that one")
    return run_dir


def name_run(path: str | Path) -> RunDir:
    """Return the directory that a person names, whether a run is there or not. Raises RefusedError for no such path."""
    try:
        # A link that leads to a run is the user's own. Within the run none is followed.
        return RunDir(Path(path).expanduser().resolve())
    # Of a `~user` that there is none of, of a loop of links, of a character that no path has.
    except (RuntimeError, OSError, ValueError) as error:
        raise RefusedError(f"{path}: is no path ({error})") from None


def find_runs(path: str) -> list[RunDir]:
    """Return the run in a directory, or the runs below it, or those of a URL. Raises RefusedError where none is."""
    if is_remote_url(path):
        from runner.remote.reading import mirror_runs

        return [RunDir(directory) for directory in mirror_runs(path, brief=False)]
    run_dir = name_run(path)
    if is_run(run_dir):
        return [run_dir]
    # Where nothing is below either, this raises, and its message tells whether the directory is there at all.
    return list_runs(run_dir.path) or [find_run(path)]


def is_in_bucket(run_dir: RunDir) -> bool:
    """Tell whether a directory is a copy of what a run has in a bucket; then it is only read."""
    return is_remote_url(str(run_dir))


def is_at_work(run_dir: RunDir) -> bool:
    """Tell whether a process has the run; in a bucket that may be one which has gone without a word."""
    if not is_in_bucket(run_dir):
        return is_in_use(run_dir)
    from runner.remote.reading import is_held

    return is_held(run_dir.path)


def tell_state(run_dir: RunDir) -> str:
    """Return how a run stands, in one word: as `run_state`, and `held` where its bucket says that somebody has it."""
    state = run_state(run_dir)
    return "held" if state == "killed" and is_in_bucket(run_dir) and is_at_work(run_dir) else state


def refuse_bucket(verb: str, reference: str) -> None:
    """Raise ConfigError where a verb that changes a run is to change one in a bucket."""
    if is_remote_url(reference):
        raise ConfigError(
            f"{verb}: {reference} is in a bucket, which only a command that holds the run changes; say the run's "
            "directory on this machine, and the run's next command sends what has changed"
        )


def list_runs(folder: Path) -> list[RunDir]:
    """Return the runs in `outputs/NAME` or in `outputs`, the one that was touched last at the end."""
    found: dict[Path, float] = {}
    for path in folder.glob("*"):
        if not _add_run(path, found):
            # Not below a run: its files are many.
            for below in path.glob("*"):
                _add_run(below, found)
    return [RunDir(path) for path in sorted(found, key=lambda path: found[path])]


def _add_run(path: Path, found: dict[Path, float]) -> bool:
    """Add a run to what was found, with the time of its last change; return whether it is one, or is put away."""
    # What begins with a dot is put away: runs that were overwritten, results of verbs.
    if path.name.startswith("."):
        return True
    # OSError: nobody else's directory may be looked into, and what is gone again is no run.
    with suppress(OSError, RuntimeError):
        if is_run(run_dir := RunDir(path.resolve())):
            found[run_dir.path] = _find_last_change(run_dir)
            return True
    return False


def _find_last_change(run_dir: RunDir) -> float:
    path = run_dir.status if os.path.lexists(run_dir.status) else run_dir.path
    return path.lstat().st_mtime


def is_run(run_dir: RunDir) -> bool:
    """Return whether a directory was made by a run: it has its configuration, or at least checkpoints."""
    return run_dir.config.is_file() or run_dir.checkpoints.is_dir()


@contextmanager
def refusing_other_kinds() -> Iterator[None]:
    """Raise RefusedError where a link, a folder or a pipe is met in the place of a plain file of a run."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_A_FILE or not error.filename:
            raise
        what = f"{error.strerror[:1].lower()}{error.strerror[1:]}" if error.strerror else "cannot be used"
        raise RefusedError(f"{error.filename}: {what}; expected what a run makes there: remove it") from None


@contextmanager
def refusing_unreadable(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise RefusedError where what is read of a checkpoint is nothing that a run writes; links in it are not read."""
    if odd := find_odd_file(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: is not good: {odd}")
    try:
        yield
    # Sealed it may be, and by somebody else: then anything can be in it.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(f"{checkpoint}: cannot be read: {shorten(problem, 300)}") from None


def find_checkpoint(reference: str) -> Checkpoint:
    """Return what `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names. Raises RefusedError where there is none.

    Of a run in a bucket every byte of the checkpoint is here then.
    """
    if is_remote_url(reference):
        from runner.remote.reading import mirror_checkpoint

        return _as_checkpoint(mirror_checkpoint(reference))
    try:
        directory = locate_checkpoint(reference)
    except (RuntimeError, ValueError) as error:
        raise RefusedError(f"{reference}: is no path ({error})") from None
    # `best` is a link to a step. A copy made without links has a whole directory there, whose step nobody knows.
    if not is_step_name(directory.name):
        raise RefusedError(f"{directory}: is no link to a step (copied without its links?); say {reference[:-4]}STEP")
    checkpoint = Checkpoint(name_run(directory.parent.parent), int(directory.name))
    # Somebody else's run may have links to a third one: that one was not named here.
    if directory.resolve() != checkpoint.directory or checkpoint.run_dir.path != _find_named_run(reference):
        raise RefusedError(f"{reference}: leads out of its run, to {display_path(directory)}; name that one")
    return checkpoint


def _as_checkpoint(directory: Path) -> Checkpoint:
    return Checkpoint(RunDir(directory.parent.parent), int(directory.name))


def _find_named_run(reference: str) -> Path:
    """Return the run that a reference names, with links above it followed."""
    path = Path(reference).expanduser()
    return (path if path.is_dir() else Path(reference.rpartition("@")[0]).expanduser()).resolve()


def find_proven_checkpoint(reference: str) -> tuple[Checkpoint, Record]:
    """Return a checkpoint and its record after every byte was compared with what was written.

    Raises RefusedError where a byte differs, or where there is no such checkpoint.
    """
    checkpoint = find_checkpoint(reference)
    if problem := find_problem(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: is not good: {problem}; choose another step")
    # What does not train lies beside it.
    open_base(checkpoint.directory)
    return checkpoint, read_sidecar(checkpoint.directory)[0]


def read_checkpoint_status(directory: Path, *, checksums: bool) -> CheckpointStatus | None:
    """Return the state of a checkpoint's directory; None where it was deleted meanwhile.

    Args:
        directory: `checkpoints/STEP`.
        checksums: whether every byte is read, or names and sizes are compared only.
    """
    if checksums and is_in_bucket(_as_checkpoint(directory).run_dir):
        from runner.remote.reading import bring_bytes

        bring_bytes(directory)
    try:
        problem = find_problem(directory, checksums=checksums)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    # One run of a later version must not keep a table of all runs from being shown.
    except NewerFormatError as error:
        problem = str(error)
    try:
        record, files, _ = read_sidecar(directory)
    except (OSError, ValueError, NewerFormatError):
        record, files = None, {}
    # Asked last: a run that is training may have deleted it while its files were read, and then it has no fault.
    if not directory.is_dir():
        return None
    proof: Proof = "ok" if checksums and all("xxh3" in file for file in files.values()) else "sizes ok"
    return CheckpointStatus(int(directory.name), record, problem, len(files), "not good" if problem else proof)


def find_attempt(checkpoint: Checkpoint) -> JsonObject:
    """Return the line of the attempt that made a checkpoint, `{}` where none is known.

    It comes from attempts.jsonl, or from status.json while that attempt is at work.
    """
    status = checkpoint.run_dir.read_status()
    current = {**status.get("attempt", {}), "to_step": status.get("step", 0)}
    known = [line for line in (*read_attempts(checkpoint.run_dir), current) if line.get("from_step") is not None]
    began = [attempt for attempt in known if attempt["from_step"] < checkpoint.step]
    reached = [attempt for attempt in began if checkpoint.step <= attempt.get("to_step", 0)]
    # Where none says that it reached the step, the last that began before it did: one that was killed may have come
    # further than it had time to note.
    return (reached or began or [{}])[-1]


def read_retention_settings(run_dir: RunDir) -> RetentionSettings:
    """Return the settings of a run's last attempt. Raises RefusedError where its files do not say them."""
    drift = run_dir.read_status().get("attempt", {}).get("drift", ())
    return parse_retention_settings(read_config_document(run_dir, drift), run_dir)


def parse_retention_settings(document: Document, run_dir: RunDir) -> RetentionSettings:
    """Return the settings that a configuration has. Raises RefusedError where they are none of this version."""
    saving = document.get("ckpt")
    try:
        keep = validate_saved(Retention, document.get("retention") or {})
        score = validate_saved(Score, document.get("score") or {})
        return RetentionSettings(keep, score, saving.get("verify", "bytes") if isinstance(saving, dict) else "bytes")
    # RecursionError, OverflowError: of values that no option takes.
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        problem = ": ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise RefusedError(
            f"{display_path(run_dir.config)}: retention or score is not what this version writes ({problem})"
        ) from None


def read_config_document(run_dir: RunDir, drift: Sequence[str] = ()) -> JsonObject:
    """Return config.yaml with the changes of an attempt, as plain values; no code is run and nothing is resolved.

    Raises RefusedError where it is missing or no configuration.
    """
    try:
        document = parse_yaml(read_file(run_dir.config, MAX_CONFIG_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        # UnicodeDecodeError says the bytes: the place is enough.
        problem = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
        raise RefusedError(f"{display_path(run_dir.config)}: cannot be read ({problem})") from None
    if not isinstance(document, dict):
        raise RefusedError(f"{display_path(run_dir.config)}: is no configuration")
    return apply_drift(document, drift)


def apply_drift(document: Document, drift: Sequence[str]) -> JsonObject:
    """Return a copy of a document with changes as attempts.jsonl records them: `retention.last.n: 2 → 1`.

    Where the new value is null, the key is deleted. What is no change, in a line that somebody else wrote, is left out.
    """
    if not drift:
        return dict(document)
    result = copy.deepcopy(dict(document))
    changes = []
    for line in drift:
        with suppress(ValueError):
            changes.append((line.partition(": ")[0], parse_json(line.rpartition(" → ")[2])))
    # Deletions first: where a mapping replaces a plain value, or the other way round, one key lies below the other.
    for key, new in sorted(changes, key=lambda change: change[1] is not None):
        if new is None:
            _delete_key(result, key.split("."))
        else:
            _set_key(result, key.split("."), new)
    return result


def _set_key(tree: JsonObject, path: Sequence[str], value: Any) -> None:
    *parents, leaf = path
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[leaf] = value


def _delete_key(tree: JsonObject, path: Sequence[str]) -> None:
    name, *below = path
    child = tree.get(name)
    if below and isinstance(child, dict):
        _delete_key(child, below)
    # A mapping that is left empty goes as well: a retention rule without any key is gone, and not one with defaults.
    if not below or not isinstance(child, dict) or not child:
        tree.pop(name, None)
