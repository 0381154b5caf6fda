"""Runs and checkpoints by the names people type, and a look at what is there. Reads files only."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from runner.checkpoint.record import Record, Score, is_step_name, locate_checkpoint, read_sidecar
from runner.checkpoint.retention import RetentionRule
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from runner.rundir.layout import RunDir

KINDS: dict[str, Any] = {option.kind: option for option in get_args(RetentionRule)}

Proof = Literal["ok", "sizes ok", "not good"]


@dataclass(frozen=True)
class Checkpoint:
    """One step of one run."""

    run: RunDir
    step: int

    @property
    def directory(self) -> Path:
        return self.run.checkpoints / str(self.step)

    def __str__(self) -> str:
        """As a person would type it."""
        return f"{self.run}@{self.step}"


@dataclass(frozen=True)
class CheckpointStatus:
    """What a directory that is named like a step holds; `record` is None where its sidecar cannot be believed."""

    step: int
    record: Record | None
    problem: str | None
    num_files: int
    proof: Proof


def choose_new_folder(verb: str, to: str | None) -> Path:
    """Where a verb leaves what it made; not there yet, or empty. Raises RefusedError where there is something in it."""
    default = Path("outputs") / f".{verb}" / time.strftime("%Y-%m-%d_%H-%M-%S")
    place = Path(to).expanduser() if to else default
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RefusedError(f"{verb}: {place} is there already; name a new folder with --to")
    return place.resolve()


def find_run(path: str) -> RunDir:
    """The run in this directory. Raises RefusedError where none is."""
    run = RunDir(Path(path).expanduser())
    if not is_run(run):
        what = "no run is there" if run.path.is_dir() else "there is no such directory"
        raise RefusedError(f"{path}: {what}; python -m runner ls outputs lists the runs")
    return run


def is_run(run: RunDir) -> bool:
    """Whether a directory was made by a run."""
    return run.config.is_file() or run.checkpoints.is_dir()


def find_checkpoint(reference: str) -> Checkpoint:
    """What `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names. Raises RefusedError where there is none."""
    directory = locate_checkpoint(reference)
    if not is_step_name(directory.name):
        raise RefusedError(f"{directory}: is no link to a step (copied without its links?); say {reference[:-4]}STEP")
    return Checkpoint(RunDir(directory.parent.parent), int(directory.name))


def find_proven_checkpoint(reference: str) -> tuple[Checkpoint, Record]:
    """A checkpoint whose every byte is what was written. Raises RefusedError where it is not."""
    checkpoint = find_checkpoint(reference)
    if problem := find_problem(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: is not good: {problem}; choose another step")
    return checkpoint, read_sidecar(checkpoint.directory)[0]


def read_checkpoint_status(directory: Path, *, checksums: bool) -> CheckpointStatus | None:
    """What is in a checkpoint's directory; None where it was deleted while it was looked at: a run may be training."""
    try:
        problem = find_problem(directory, checksums=checksums)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    try:
        record, files = read_sidecar(directory)
    except (OSError, ValueError, TypeError, KeyError):
        record, files = None, {}
    if not directory.is_dir():
        return None
    proof: Proof = "ok" if checksums and all("xxh3" in file for file in files.values()) else "sizes ok"
    return CheckpointStatus(int(directory.name), record, problem, len(files), "not good" if problem else proof)


def find_attempt(checkpoint: Checkpoint) -> dict[str, Any]:
    """The attempt that made a checkpoint, as attempts.jsonl or, while it works, status.json describes it."""
    from runner.rundir.attempts import read_attempts

    status = checkpoint.run.read_status()
    current = {**status.get("attempt", {}), "to_step": status.get("step", 0)}
    known = [line for line in (*read_attempts(checkpoint.run), current) if line.get("from_step") is not None]
    began = [attempt for attempt in known if attempt["from_step"] < checkpoint.step]
    reached = [attempt for attempt in began if checkpoint.step <= attempt.get("to_step", 0)]
    return (reached or began or [{}])[-1]  # one that was killed may have come further than it had time to note


@dataclass(frozen=True)
class RetentionSettings:
    """What looking and pruning need: which checkpoints stay, what best means, how a restart proves bytes."""

    keep: Mapping[str, RetentionRule]
    score: Score
    verify: str


def read_retention_settings(run: RunDir) -> RetentionSettings:
    """What was in force at the last attempt. Raises RefusedError where the run's files do not say."""
    return parse_retention_settings(
        read_config_document(run, run.read_status().get("attempt", {}).get("drift", ())), run
    )


def parse_retention_settings(document: Mapping[str, Any], run: RunDir) -> RetentionSettings:
    """The same, from what was read already."""
    try:
        keep = {name: _rule(option) for name, option in (document.get("retention") or {}).items()}
        score = Score(**document.get("score") or {})
        return RetentionSettings(keep, score, (document.get("ckpt") or {}).get("verify", "bytes"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RefusedError(f"{run.config}: retention or score is not what this version writes ({error})") from None


def read_config_document(run: RunDir, drift: Sequence[str] = ()) -> dict[str, Any]:
    """config.yaml with what an attempt has changed. Raises RefusedError where it is missing or no configuration."""
    try:
        text = run.config.read_bytes()
        document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # data only, either way
    except (OSError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RefusedError(f"{run.config}: cannot be read ({problem})") from None
    if not isinstance(document, dict):
        raise RefusedError(f"{run.config}: is no configuration")
    return apply_drift(document, drift)


def apply_drift(document: Mapping[str, Any], drift: Sequence[str]) -> dict[str, Any]:
    """A document with the changes that attempts.jsonl records as `retention.last.n: 2 → 1`."""
    result = json.loads(json.dumps(document))
    changes = [(key, json.loads(line.rpartition(" → ")[2])) for line in drift for key in [line.partition(": ")[0]]]
    for key, new in sorted(changes, key=lambda change: change[1] is not None):  # first what goes, then what comes
        *path, leaf = key.split(".")
        above = [result]
        for name in path:
            child = above[-1].get(name)
            above[-1][name] = child if isinstance(child, dict) else {}
            above.append(above[-1][name])
        if new is not None:
            above[-1][leaf] = new
            continue
        above[-1].pop(leaf, None)
        for name, node in zip(reversed(path), reversed(above[:-1]), strict=True):
            if not node[name]:
                del node[name]  # a rule of which nothing is left is gone
    return result


def _rule(option: Mapping[str, Any]) -> RetentionRule:
    rule = KINDS[option["kind"]](**option)
    for field in fields(rule):
        value = getattr(rule, field.name)
        if isinstance(field.default, int | float) and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{field.name}={value}")
    return rule
