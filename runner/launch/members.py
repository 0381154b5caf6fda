"""The runs of a sweep: which there are, what differs between them, and how each of them stands on disk."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner import files, text
from runner.config.schema import Config
from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.process import name_of
from runner.rundir.layout import RunDir, is_in_use
from runner.session.standing import is_finished
from runner.text import display_path

SWEEP, TABLE = "sweep.json", "results.csv"

State = Literal["waiting", "queued", "running", "finished", "stopped", "failed", "in use"]


@dataclass(frozen=True)
class Member:
    """One run: its configuration, what is typed for it after `python run.py`, where it lives, what is its own."""

    config: Config
    words: tuple[str, ...]
    place: RunDir
    own: tuple[str, ...]  # the overrides that not every run of the sweep has

    @property
    def name(self) -> str:
        """What makes it another run than the others: `ckpt=best remat=full`."""
        return " ".join(self.own) or self.place.path.name

    def status(self) -> dict[str, Any]:
        """Its status.json, or nothing."""
        return self.place.read_status()

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return is_finished(self.config, self.place, self.status())


@dataclass(frozen=True)
class Result:
    """How a member stands, or ended: after so many tries, with which exit code, and why if it is not finished."""

    state: State
    tries: int = 0
    seconds: float = 0.0
    code: int | None = None
    why: str = ""
    job: str = ""  # the Slurm job that has it, and how that stands


def distinct(overrides: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Of each job, the overrides that not every job has, in the order they were typed."""
    shared = {word for word, count in Counter(word for job in overrides for word in set(job)).items()}
    shared = {word for word in shared if all(word in job for job in overrides)}
    return [tuple(word for word in job if word not in shared) for job in overrides]


def admit(members: Sequence[Member]) -> None:
    """Raises ConfigError where two of them are one run, or work on another's directory."""
    seen: dict[Path, Member] = {}
    for member in members:
        before = seen.setdefault(member.place.path, member)
        if before is not member:
            jobs = " and ".join(" ".join(each.words) for each in (before, member))
            raise ConfigError(f"{jobs} are one run, {display_path(member.place.path)}; leave one of them out")


def ending(member: Member, code: int, told: str) -> tuple[State, str]:
    """How a process ended, from its exit code, and from what it wrote down or said last on stderr."""
    status = member.status()
    if code == 0:
        return "finished", ""
    if code == STOPPED:
        return "stopped", status.get("why") or "stopped with its state saved"
    if code < 0:
        return "failed", f"died of {name_of(-code)}"
    if code == CRASHED and status.get("state") == "failed":  # a traceback's last line may be another's
        return "failed", status.get("why") or f"exit code {code}"
    last = told.strip().splitlines()[-1] if told.strip() else ""
    if is_in_use(member.place) or "in use by" in last:  # whoever had it may have let go since
        return "in use", last.removeprefix("error: ")
    return "failed", last.removeprefix("error: ") or f"exit code {code}"


def folder(members: Sequence[Member]) -> Path:
    """Where the sweep of these runs is written down: the same for the same runs, in any order."""
    names = sorted(str(member.place.path) for member in members)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return members[0].place.path.parent / ".sweep" / digest


def write(place: Path, members: Sequence[Member], results: Sequence[Result]) -> None:
    """Both files, each replaced at once."""
    rows = [_row(member, result) for member, result in zip(members, results, strict=True)]
    files.replace_file(place / SWEEP, json.dumps({"runs": rows}, indent=1) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row["own"]))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    facts = ("state", "step", "score", "best_step", "best_value", "seconds", "peak_memory_bytes", "tries", "why")
    table.writerow(["directory", *keys, *facts])
    for row in rows:
        table.writerow([row["directory"], *(row["own"].get(key) for key in keys), *(row[fact] for fact in facts)])
    files.replace_file(place / TABLE, out.getvalue())


def _row(member: Member, result: Result) -> dict[str, Any]:
    status = member.status()
    best = status.get("best") or {}
    own = {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in member.own)}
    return {
        "directory": text.display_path(member.place.path),
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
