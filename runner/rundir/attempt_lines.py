"""attempts.jsonl: one line for each process that worked on a run, whatever became of it. No jax.

A line says who worked when on what, how it ended, from which step to which, where its seconds went, and what was lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from runner import files
from runner.rundir.heartbeat import Heartbeat
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_attempt_line, parse_attempt
from runner.types import JsonObject

TRAINING_BUCKETS = ("step", "data", "eval", "save")  # what steps are paid from


def read_attempts(run_dir: RunDir) -> list[JsonObject]:
    """Return every line of attempts.jsonl, oldest first; what is no line of an attempt, whatever it is, is left out."""
    try:
        return parse_attempt_lines(files.read_file(run_dir.attempts))[0]
    except OSError:
        return []


def parse_attempt_lines(content: bytes) -> tuple[list[JsonObject], int]:
    """Return the lines of attempts.jsonl, oldest first, and how many others there are that are none."""
    lines, num_damaged = [], 0
    for line in content.splitlines():
        with suppress(ValueError):
            document = files.parse_json(line)
            if is_attempt_line(document):
                lines.append(parse_attempt(document))
                continue
        num_damaged += bool(line.strip())
    return lines, num_damaged


def set_damaged_lines_aside(run_dir: RunDir) -> tuple[list[str], list[JsonObject]]:
    """Return the lines of attempts.jsonl; where others are between them that are none, keep a copy and drop those.

    The first list has a line for people where that was done. Raises OSError where the file cannot be read now.
    """
    try:
        content = files.read_file(run_dir.attempts)
    except FileNotFoundError:
        return [], []
    lines, num_damaged = parse_attempt_lines(content)
    if not num_damaged:
        return [], lines
    aside = run_dir.attempts.with_name(f"attempts.damaged-{time.time_ns()}.jsonl")
    files.replace_file(aside, content)
    good = [line for line in content.splitlines() if parse_attempt_lines(line)[0]]
    files.replace_file(run_dir.attempts, b"".join(line + b"\n" for line in good))
    return [f"{num_damaged} of the lines in attempts.jsonl cannot be read; a copy is in {aside.name}"], lines


def count_interruptions(run_dir: RunDir) -> tuple[int, float]:
    """Return how often a run was killed or crashed, and in how many seconds of work."""
    past = [line for line in read_attempts(run_dir) if line.get("from_step") is not None and line.get("ended")]
    count = sum(line["ending"] in ("killed", "failed") for line in past)
    return count, sum(map(_measure_work, past))


def _measure_work(line: JsonObject) -> float:
    """Return how many seconds an attempt took: as it measured itself, or else by its two times."""
    # The clock may have been set between the two: by years, and back, which would be less than nothing.
    if (total := line.get("seconds", {}).get("total")) is not None:
        return max(total, 0.0)
    span = datetime.fromisoformat(line["ended"]) - datetime.fromisoformat(line["started"])
    return max(span.total_seconds(), 0.0)


def line_of_killed(status: Mapping[str, Any], heartbeat: Heartbeat | None) -> JsonObject:
    """Return the line of an attempt that was killed and wrote none: what it lost is not in it yet.

    Args:
        status: status.json as that attempt left it.
        heartbeat: its last sign of life; None where there is none.
    """
    line, seconds = dict(status["attempt"]), dict(status.get("seconds", {}))
    last, ended = status.get("step", 0), status.get("updated", line["started"])
    # The sign of life is newer: status.json is written once a second at most.
    if heartbeat is not None:
        last, ended = max(heartbeat.step, last), format_timestamp(heartbeat.changed)
        phase, writing = heartbeat.phase, heartbeat.writing
        line["during"] = f"{phase}, {writing} a checkpoint" if writing else phase
        # The time between the two belongs to what it was doing at the end.
        began = datetime.fromisoformat(line["started"]).timestamp()
        unseen = max(heartbeat.changed - began - seconds.get("total", 0.0), 0.0)
        # Nor more than since status.json, which is told to the second: the clock may have been set before that.
        if "updated" in status:
            unseen = min(unseen, max(heartbeat.changed - datetime.fromisoformat(status["updated"]).timestamp(), 1.0))
        seconds = {**seconds, phase: round(seconds.get(phase, 0.0) + unseen, 3)}
        seconds["total"] = round(seconds.get("total", 0.0) + unseen, 3)
    return {**line, "ended": ended, "ending": "killed", "to_step": last, "seconds": seconds}


def price_lost_steps(line: JsonObject, seconds: Mapping[str, float], steps: int) -> JsonObject:
    """Return how many steps are done again, and the seconds they had cost at the mean of their attempt.

    `line` is the attempt's (`from_step`, where it trained at all, and `to_step`), `seconds` its time by bucket.
    """
    trained = sum(seconds.get(bucket, 0.0) for bucket in TRAINING_BUCKETS)
    done = line["to_step"] - line.get("from_step", line["to_step"])
    return {"lost_steps": steps, "lost_seconds": round(trained * min(steps / done, 1.0), 3) if done > 0 else 0.0}


def format_timestamp(unix_seconds: float) -> str:
    """Return a time of day for arithmetic: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds")
