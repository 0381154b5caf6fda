"""What a sweep leaves behind: sweep.json and results.csv, in a folder named by its runs. Written as it goes on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import rundir
from runner.sweep.members import Member, Result

SWEEP, TABLE = "sweep.json", "results.csv"


def folder(members: Sequence[Member]) -> Path:
    """Where the sweep of these runs is written down: the same for the same runs, in any order."""
    names = sorted(str(member.place.path) for member in members)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return members[0].place.path.parent / ".sweep" / digest


def write(place: Path, members: Sequence[Member], results: Sequence[Result]) -> None:
    """Both files, each replaced at once."""
    rows = [_row(member, result) for member, result in zip(members, results, strict=True)]
    rundir.replace(place / SWEEP, json.dumps({"runs": rows}, indent=1) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row["own"]))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    facts = ("state", "step", "score", "best_step", "best_value", "seconds", "peak_memory_bytes", "tries", "why")
    table.writerow(["directory", *keys, *facts])
    for row in rows:
        table.writerow([row["directory"], *(row["own"].get(key) for key in keys), *(row[fact] for fact in facts)])
    rundir.replace(place / TABLE, out.getvalue())


def _row(member: Member, result: Result) -> dict[str, Any]:
    status = member.status()
    best = status.get("best") or {}
    own = {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in member.own)}
    return {
        "directory": rundir.shown(member.place.path),
        "own": own,
        "state": result.state,
        "step": status.get("step", 0),
        "score": status.get("score"),
        "best_step": best.get("step"),
        "best_value": best.get("value"),
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": status.get("attempt", {}).get("peak_memory_bytes"),
        "tries": result.tries,
        "code": result.code,
        "why": result.why,
        "job": result.job,
    }
