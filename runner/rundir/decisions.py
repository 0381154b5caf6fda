"""decisions.json: what a restart must know and cannot see in the checkpoints. Sealed, synced, and there twice.

status.json is replaced each second without a wait for the disk, so a power loss may leave it empty. What it would be
wrong to forget is here: which attempts were made, whether the run was taken back already, which batches are skipped,
and that something was durable once. No jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from runner import files
from runner.rundir.layout import RunDir
from runner.rundir.side_files import ATTEMPT, SKIPPED, is_count, list_of
from runner.types import JsonObject


@dataclass(frozen=True)
class Decisions:
    """Hold what was decided about a run over all its attempts.

    Attributes:
        attempt: the number of the newest attempt that began to train; 0 for none.
        started: when it began, as in its line; empty for none.
        from_step: the step that it went on from.
        taken_back_to: what `step=` was when the run was taken back; None for never.
        skipped: the batches that training skips: batch, step, why.
        was_durable: a checkpoint was durable once.
    """

    attempt: int = 0
    started: str = ""
    from_step: int = 0
    taken_back_to: int | str | None = None
    skipped: Sequence[JsonObject] = ()
    was_durable: bool = False


@dataclass(frozen=True)
class DecisionsFound:
    """The decisions of a run, and what is wrong with the files that hold them: a line for people, or None."""

    decisions: Decisions
    trouble: str | None


def read_decisions(run_dir: RunDir, status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> DecisionsFound:
    """Return the decisions of a run; where no file holds them (an older run), what its other files say.

    Args:
        run_dir: the run.
        status: status.json, as far as it can be believed.
        lines: those of attempts.jsonl.

    Raises OSError where a file is there and cannot be read now.
    """
    paths = _find_paths(run_dir)
    contents = [_read_if_there(path) for path in paths]
    parsed = [None if content is None else _decode(content) for content in contents]
    if (first := next((each for each in parsed if each is not None), None)) is not None:
        return DecisionsFound(first, None)
    damaged = [path.name for path, content in zip(paths, contents, strict=True) if content is not None]
    trouble = f"{' and '.join(damaged)} cannot be believed; going on from status.json and attempts.jsonl"
    return DecisionsFound(_derive_decisions(status, lines), trouble if damaged else None)


def write_decisions(run_dir: RunDir, decisions: Decisions) -> None:
    """Replace the decisions of a run, durably. Raises OSError; then the old ones stand."""
    body = json.dumps(asdict(decisions))
    content = f"{body}\n{xxhash.xxh3_128(body.encode()).hexdigest()}\n"
    own, copy = _find_paths(run_dir)
    files.replace_file(own, content)
    # For damage, not for a power loss, so the disk need not have it yet. Where there is no room, one is enough.
    with suppress(OSError):
        files.replace_file(copy, content, durable=False)


def _find_paths(run_dir: RunDir) -> tuple[Path, Path]:
    return run_dir.decisions, run_dir.decisions.with_name(f".{run_dir.decisions.stem}.copy.json")


def _read_if_there(path: Path) -> bytes | None:
    try:
        return files.read_file(path)
    except FileNotFoundError:
        return None


def _decode(content: bytes) -> Decisions | None:
    """Return what was written; None where the bytes are not those."""
    body, _, checksum = content.rstrip(b"\n").rpartition(b"\n")
    if xxhash.xxh3_128(body).hexdigest().encode() != checksum:
        return None
    with suppress(ValueError, TypeError):
        found = Decisions(**files.parse_json(body))
        # A checksum is no signature: somebody else may have made both.
        is_typed = (
            is_count(found.attempt)
            and (found.started == "" or ATTEMPT["started"](found.started))
            and is_count(found.from_step)
            and (found.taken_back_to in (None, "best") or is_count(found.taken_back_to))
            and list_of(SKIPPED)(found.skipped)
            and isinstance(found.was_durable, bool)
        )
        return found if is_typed else None
    return None


def _derive_decisions(status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Decisions:
    """Return what the other files say: those of a run that is older than this file, or that has lost it."""
    newest = status.get("attempt", {})
    attempts = [newest, *lines]
    # What an attempt went on from was durable; and what stood when one ended: its steps but for those that were lost.
    stood = [line.get("to_step", 0) - line.get("lost_steps", 0) for line in lines if line.get("from_step") is not None]
    return Decisions(
        attempt=max((each.get("attempt", 0) for each in attempts), default=0),
        started=newest.get("started", ""),
        from_step=newest.get("from_step", 0),
        taken_back_to=status.get("taken_back_to"),
        skipped=status.get("skipped", []),
        was_durable=bool(status.get("last_committed_step"))
        or any(each.get("from_step") for each in attempts)
        or any(step > 0 for step in stood),
    )
