"""What the side files of a run may say: whatever their bytes are, what is read has the types that readers expect.

A power loss, another program or another person may have written anything there. A value of the wrong type is left out
as if it had never been written; what then lacks what makes it a line of an attempt is left out as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from runner.files import parse_nonfinite
from runner.types import JsonObject

Check = Callable[[Any], bool]

LARGEST_COUNT = 1 << 53  # every step and every number of bytes is far below, and a float holds it exactly


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number that a step, a size or a number of something could be."""
    return type(value) is int and 0 <= value < LARGEST_COUNT


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that arithmetic cannot overflow with."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def is_measured(value: Any) -> bool:
    """Tell whether a value is what a metric may be: a finite number, or one that is not, also as a text."""
    number = parse_nonfinite(value)
    return is_number(number) or (isinstance(number, float) and not math.isfinite(number))


def is_true_or_false(value: Any) -> bool:
    """Tell whether a value is True or False."""
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Tell whether a value is a text."""
    return isinstance(value, str)


def is_timestamp(value: Any) -> bool:
    """Tell whether a value is a time of day with its zone, as ISO 8601, that can be calculated with."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).timestamp() >= 0
    # Without a zone, in the year 1 or 9999: not what was written here.
    except (ValueError, OverflowError):
        return False


def _is_aware_timestamp(value: Any) -> bool:
    return is_timestamp(value) and datetime.fromisoformat(value).tzinfo is not None


def list_of(check: Check) -> Check:
    """Return a check for a list whose every entry passes another check."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def object_of(check: Check) -> Check:
    """Return a check for an object whose every value passes another check."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def or_null(check: Check) -> Check:
    """Return a check that null passes as well."""
    return lambda value: value is None or check(value)


def with_keys(**checks: Check) -> Check:
    """Return a check for an object that has these keys, each passing its own check; further keys are allowed."""
    return lambda value: (
        isinstance(value, dict) and all(key in value and check(value[key]) for key, check in checks.items())
    )


def keep_typed(document: Mapping[str, Any], checks: Mapping[str, Check]) -> JsonObject:
    """Return the entries of a document that pass their check; keys that have no check are kept as they are."""
    return {key: value for key, value in document.items() if key not in checks or checks[key](value)}


# A line of attempts.jsonl, and the running attempt in status.json.
ATTEMPT: Mapping[str, Check] = {
    "attempt": is_count,
    "started": _is_aware_timestamp,
    "ended": _is_aware_timestamp,
    "ending": is_text,
    "why": is_text,
    "during": is_text,
    "command": list_of(is_text),
    "drift": list_of(is_text),
    "host": is_text,
    "pid": is_count,
    "python": is_text,
    "packages": object_of(is_text),
    "git": or_null(is_text),
    "code": is_text,
    "hardware": is_text,
    "remat": is_text,
    "traced": is_text,
    "external": object_of(with_keys(target=is_text, file=is_text, hash=is_text)),
    "slurm": object_of(is_count),
    "lost_process": is_true_or_false,
    "seconds": object_of(is_number),
    **dict.fromkeys(
        ("from_step", "to_step", "redone_steps", "lost_steps", "rollbacks", "stepped_back", "threads"), is_count
    ),
    **dict.fromkeys(("peak_memory_bytes",), or_null(is_count)),
    **dict.fromkeys(("lost_seconds", "first_step_seconds", "compile_seconds", "clock_jump_seconds"), is_number),
}
# Without these it is no line of an attempt.
REQUIRED_OF_LINE = ("attempt", "started", "ending", "to_step")
# What readers may index without asking.
DEFAULTS_OF_ATTEMPT = {"command": ["python", "run.py"], "drift": [], "host": "unknown", "seconds": {}, "why": ""}


def parse_attempt(document: Mapping[str, Any]) -> JsonObject:
    """Return an attempt with values of the right types only, and the defaults of what readers expect."""
    return {**DEFAULTS_OF_ATTEMPT, **keep_typed(document, ATTEMPT)}


def is_attempt_line(document: Any) -> bool:
    """Tell whether a value can stand as a line of attempts.jsonl."""
    return isinstance(document, dict) and all(
        key in document and ATTEMPT[key](document[key]) for key in REQUIRED_OF_LINE
    )


SKIPPED = with_keys(batch=is_count, step=is_count, why=is_text)

STATUS: Mapping[str, Check] = {
    "state": is_text,
    "why": is_text,
    "identity": is_text,
    **dict.fromkeys(("step", "steps", "final_step"), is_count),
    "score": or_null(is_number),
    "best": or_null(with_keys(step=is_count, metric=is_text, value=is_number)),
    "skipped": list_of(SKIPPED),
    "taken_back_to": lambda value: value is None or is_count(value) or value == "best",
    "last_committed_step": or_null(is_count),
    "unburied": list_of(is_attempt_line),
    **dict.fromkeys(("last", "final"), object_of(is_measured)),
    "attempt": with_keys(attempt=is_count, started=_is_aware_timestamp),
    "seconds": object_of(is_number),
    "updated": _is_aware_timestamp,
    **dict.fromkeys(("gave_up", "stopped_early"), is_true_or_false),
}


def parse_status(document: Mapping[str, Any] | None) -> JsonObject:
    """Return status.json with values of the right types only; empty where it is none."""
    if document is None:
        return {}
    status = keep_typed(document, STATUS)
    if "attempt" in status:
        status["attempt"] = parse_attempt(status["attempt"])
    for key in status.keys() & {"last", "final"}:
        status[key] = {name: parse_nonfinite(value) for name, value in status[key].items()}
    if "unburied" in status:
        status["unburied"] = [parse_attempt(line) for line in status["unburied"]]
    return status
