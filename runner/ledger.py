"""Attempts, and where their seconds went. An attempt is one process that worked on a run; it gets one line, always.

While it lives, status.json says how far it is. A killed process writes no line: the next attempt writes it, from what
status.json last said.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner import rundir
from runner.checkpoint.record import Score
from runner.rundir import Run

STATUS_SECONDS = 1.0  # status.json is replaced at most once in this time
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "hydra-core", "numpy")


class Attempt:
    """This process's work on a run: its status, its best score, and its seconds by bucket."""

    def __init__(self, run: Run, score: Score, steps: int, identity: str):
        self._run, self._score = run, score
        self._status: dict[str, Any] = {"steps": steps, "step": 0, "score": None, "best": None, "identity": identity}
        self._record: dict[str, Any] = {}
        self._previous: dict[str, Any] = {}  # the status of an attempt that was killed and has no line yet
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._start, self._written = time.perf_counter(), -STATUS_SECONDS

    @property
    def number(self) -> int:
        """1 for the first attempt at a run."""
        return self._record["attempt"]

    @property
    def best(self) -> dict[str, Any] | None:
        """The best score so far over all attempts: step, metric, value."""
        return self._status["best"]

    @property
    def taken_back_to(self) -> int | str | None:
        """Where `step=` has taken this run already: the same command typed again goes on from there."""
        return self._status.get("taken_back_to")

    def ends_on(self, step: int) -> None:
        """Remember whose weights a finished run ended on, where they are not the last."""
        self._status["final_step"] = step

    def take_back(self, where: int | str | None) -> None:
        """Remember it, from the next time the status is written."""
        self._status["taken_back_to"] = where

    @property
    def seconds(self) -> float:
        """Since this attempt began."""
        return time.perf_counter() - self._start

    @contextmanager
    def spend(self, bucket: str) -> Iterator[None]:
        """Count the time of a block towards a bucket."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[bucket] += time.perf_counter() - start

    def begin(self, overrides: Sequence[str], drift: Sequence[str]) -> None:
        """Number this attempt, after writing the line of one that was killed."""
        previous = self._run.read_status()
        number = int(previous.get("attempt", {}).get("attempt", 0)) + 1
        self._status["step"] = int(previous.get("step", 0))
        self._status["best"] = previous.get("best")
        self._status["taken_back_to"] = previous.get("taken_back_to")
        self._previous = previous if previous.get("state") == "running" else {}
        self._record = {
            "attempt": number,
            "started": now(),
            "command": ["python", "run.py", *overrides],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "git": _git(),
            "drift": list(drift),
        }

    def restored(self, step: int, best: dict[str, Any] | None, hardware: str) -> None:
        """Training goes on from here: steps after it that a killed attempt had done are done again."""
        self._bury(step)
        self._record |= {"from_step": step, "hardware": hardware}
        self._status |= {"step": step, "best": best}
        self.write("running")

    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None:
        """Remember how far training is and what it measured; write it down now and then, without waiting for disk."""
        self._status["step"] = step
        if durable_step is not None:
            self._status["last_committed_step"] = durable_step
        if measured:
            self._status["last"] = dict(measured)
        value = self._score.of(measured)
        if value is not None and (self.best is None or value < self._rank(self.best)):
            metric = self._score.metric
            self._status["best"] = {"step": step, "metric": metric, "value": measured[metric]}
        if time.perf_counter() - self._written > STATUS_SECONDS:
            with suppress(OSError):  # a full disk is told by who needs it; this comes again in a second
                self.write("running", durable=False)

    def write(self, state: str, *, durable: bool = True) -> None:
        """Replace status.json."""
        self._written = time.perf_counter()
        self._status["score"] = self.best["value"] if self.best else None
        document = {"state": state, **self._status, "attempt": self._record, "updated": now()}
        rundir.replace(self._run.status, json.dumps(document, indent=1) + "\n", durable=durable)

    def end(self, state: str, step: int, why: str) -> None:
        """Say how this attempt ended, in status.json and in its line of attempts.jsonl."""
        self._bury(step)
        self._status |= {"step": step, "why": why}
        seconds = {bucket: round(spent, 3) for bucket, spent in self._seconds.items()}
        seconds["total"] = round(self.seconds, 3)
        line = {**self._record, "ended": now(), "ending": state, "why": why, "to_step": step}
        rundir.append(self._run.attempts, {**line, "lost_steps": 0, "seconds": seconds})
        self.write(state)  # after the line: a kill between the two is seen by the next attempt

    @property
    def step(self) -> int:
        """The last step that was noted."""
        return self._status["step"]

    def _bury(self, step: int) -> None:
        """Write the line of an attempt that was killed, once; training goes on, or failed to, from `step`."""
        previous, self._previous = self._previous, {}
        if not previous or previous["attempt"]["attempt"] in {line["attempt"] for line in attempts(self._run)}:
            return
        last = int(previous.get("step", step))
        line = {**previous["attempt"], "ended": previous.get("updated"), "ending": "killed", "to_step": last}
        rundir.append(self._run.attempts, {**line, "lost_steps": max(last - step, 0), "seconds": {}})

    def _rank(self, best: Mapping[str, Any]) -> float:
        rank = self._score.of({self._score.metric: best["value"]})
        return float("inf") if rank is None or best["metric"] != self._score.metric else rank


def now() -> str:
    """The time of day, for people and records: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def attempts(run: Run) -> list[dict[str, Any]]:
    """Every line of attempts.jsonl; a torn last line (power loss) is left out."""
    if not run.attempts.exists():
        return []
    lines = []
    for line in run.attempts.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def interruptions(run: Run) -> tuple[int, float]:
    """How often this run was killed or crashed, and in how many seconds of work."""
    past = [line for line in attempts(run) if line.get("from_step") is not None and line.get("ended")]
    spans = [datetime.fromisoformat(line["ended"]) - datetime.fromisoformat(line["started"]) for line in past]
    return sum(line["ending"] in ("killed", "failed") for line in past), sum(span.total_seconds() for span in spans)


def _git() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None outside a checkout."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
