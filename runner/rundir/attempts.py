"""Attempts, and where their seconds went. An attempt is one process that worked on a run; it gets one line, always.

While it lives, status.json says how far it is. A killed process writes no line: the next attempt writes it, from what
status.json last said.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner import files
from runner.checkpoint.record import Score
from runner.rundir import heartbeat
from runner.rundir.heartbeat import Heartbeat, HeartbeatWriter, Stopwatch
from runner.rundir.layout import RunDir
from runner.rundir.provenance import collect_provenance, peak_host_memory
from runner.text import utc_now

STATUS_SECONDS = 1.0  # status.json is replaced at most once in this time
TRAINING = ("step", "data", "eval", "save")  # buckets that steps are paid from


class AttemptLog:
    """This process's work on a run: its status, its best score, and its seconds by bucket.

    `began`: when the process started, in seconds since 1970. Two threads may end it: training, and the guard that
    leaves in its place.
    """

    def __init__(self, run: RunDir, score: Score, steps: int, identity: str, began: float | None = None):
        self.run, self._score = run, score
        self._began = time.time() if began is None else began
        self._status: dict[str, Any] = {"steps": steps, "step": 0, "score": None, "best": None, "identity": identity}
        self._record: dict[str, Any] = {}
        self._before: str | None = None  # status.json as it was found
        self._written = -STATUS_SECONDS
        self._writing = threading.RLock()
        self.first_step = threading.Event()  # its first step is complete
        self._watch: Stopwatch

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

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The batches that training skips, because the loss was not finite on them: batch, step, why."""
        return self._status["skipped"]

    @property
    def heartbeat(self) -> HeartbeatWriter:
        """The sign of life that this process gives."""
        return self._heartbeat

    @property
    def step(self) -> int:
        """The last step that was noted."""
        return self._status["step"]

    @property
    def _trains(self) -> bool:
        return "from_step" in self._record

    def lost(self, durable: int, reached: int | None = None) -> int:
        """How many steps of this attempt are done again where `durable` is the newest that stands."""
        return max((self.step if reached is None else reached) - durable, 0) if self._trains else 0

    @property
    def seconds(self) -> float:
        """Since the process began."""
        return time.time() - self._began

    def ends_on(self, step: int) -> None:
        """Remember whose weights a finished run ended on, where they are not the last."""
        self._status["final_step"] = step

    def take_back(self, where: int | str | None) -> None:
        """Remember it, from the next time the status is written."""
        self._status["taken_back_to"] = where

    def skip(self, batch: int, step: int, why: str) -> None:
        """Remember that a batch is skipped; it is on disk before training goes on, with what was restored."""
        self._status["skipped"] = [*self.skipped, {"batch": batch, "step": step, "why": why}]
        self._record["rollbacks"] = self._record.get("rollbacks", 0) + 1

    def record(self, **facts: Any) -> None:
        """Add facts to this attempt's line: what compiling cost, what a step needs. From any thread."""
        with self._writing:
            self._record |= facts

    def time_in(self, bucket: str) -> AbstractContextManager[None]:
        """Count the time of a block towards a bucket."""
        return self._watch.time_in(bucket)

    def beat(self, step: int) -> None:
        """This many steps are complete. Costs next to nothing: called after each."""
        self._heartbeat.beat(step)
        if "first_step_seconds" not in self._record:
            self._record["first_step_seconds"] = round(self.seconds, 3)
            self.first_step.set()

    def last_heartbeat(self) -> Heartbeat:
        """The last sign of life: which step, doing what."""
        return self._heartbeat.read()

    def begin(self, overrides: Sequence[str], drift: Sequence[str], own: Iterable[Path] = ()) -> None:
        """Number this attempt; what a killed one left behind is read before it is written over.

        `own`: files of the user's that take part.
        """
        previous = self.run.read_status()
        if previous:
            self._before = self.run.status.read_text()
        number = int(previous.get("attempt", {}).get("attempt", 0)) + 1
        self._status |= {"step": int(previous.get("step", 0)), "skipped": previous.get("skipped", [])}
        self._status |= {key: previous.get(key) for key in ("best", "taken_back_to", "last_committed_step")}
        last = (
            [line_of_killed(previous, heartbeat.read_heartbeat(self.run.heartbeat))]
            if previous.get("state") == "running"
            else []
        )
        self._status["unburied"] = [*previous.get("unburied", []), *last]
        maker = collect_provenance(
            own
        )  # before the pulse is written over: a kill between the two would blame the one before
        self._heartbeat = HeartbeatWriter(self.run.heartbeat)
        self._watch = Stopwatch(self._heartbeat, self._began)
        self._record = {
            "attempt": number,
            "started": _exactly(self._began),
            "command": ["python", "run.py", *overrides],
            **maker,
            "drift": list(drift),
        }
        self.write("running", durable=False)

    def withdraw(self) -> None:
        """This attempt never was: status.json as it was found."""
        if self._before is not None:
            files.replace_file(self.run.status, self._before)

    def restored(self, step: int, best: dict[str, Any] | None, hardware: str) -> None:
        """Training goes on from here: steps after it that a killed attempt had done are done again."""
        self.bury(step)
        if self._trains:  # a rollback: what this very attempt had done since is done again
            self._record["redone_steps"] = self._record.get("redone_steps", 0) + max(self.step - step, 0)
        self._record.setdefault("from_step", step)
        self._record |= {"hardware": hardware}
        self._status |= {"step": step, "best": best, "last_committed_step": step or None}
        self._heartbeat.beat(step)
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
        with self._writing:
            self._write(state, durable=durable)

    def end(self, state: str, reached: int, why: str, durable: int | None = None) -> None:
        """Say how this attempt ended, in status.json and in its line of attempts.jsonl; once, whoever is first.

        `reached` steps were completed; where `durable` is given and is less, the rest is done again.
        """
        lost = 0 if durable is None else self.lost(durable, reached)
        stands = reached if durable is None else durable if lost or not self._trains else reached
        with self._writing:
            self.bury(stands)
            if "ending" in self._record:
                return
            self._status |= {"step": stands, "why": why}
            self._record["peak_memory_bytes"] = peak_host_memory()
            seconds = self._watch.read()
            line = {**self._record, "ended": _exactly(time.time()), "ending": state, "why": why}
            line |= {"to_step": stands + lost, "seconds": seconds}
            files.append_json_line(self.run.attempts, {**line, **_lost(line, seconds, lost)})
            self._record["ending"] = state
            self._write(state, durable=True)  # after the line: a kill between the two is seen by the next attempt

    def bury(self, step: int) -> None:
        """Write the lines of attempts that were killed, once; training goes on, or failed to, from `step`."""
        with self._writing:
            unburied, self._status["unburied"] = self._status["unburied"], []
            known = {line["attempt"] for line in read_attempts(self.run)} if unburied else set()
            for line in unburied:
                if line["attempt"] not in known:
                    lost = max(line["to_step"] - step, 0) if "from_step" in line else 0
                    files.append_json_line(self.run.attempts, {**line, **_lost(line, line["seconds"], lost)})

    def _write(self, state: str, *, durable: bool) -> None:
        self._written = time.perf_counter()
        self._status["score"] = self.best["value"] if self.best else None
        document = {"state": state, **self._status, "attempt": self._record, "seconds": self._watch.read()}
        document["updated"] = utc_now()
        files.replace_file(self.run.status, json.dumps(document, indent=1) + "\n", durable=durable)

    def _rank(self, best: Mapping[str, Any]) -> float:
        rank = self._score.of({self._score.metric: best["value"]})
        return float("inf") if rank is None or best["metric"] != self._score.metric else rank


def line_of_killed(previous: Mapping[str, Any], beat: Heartbeat | None) -> dict[str, Any]:
    """The line of an attempt that wrote none, from what status.json said and from its last sign of life."""
    line, seconds = dict(previous["attempt"]), dict(previous.get("seconds", {}))
    last, ended = int(previous.get("step", 0)), previous["updated"]
    if beat is not None:  # newer than status.json, which is written once a second
        last, ended = max(beat.step, last), _exactly(beat.changed)
        line["during"] = f"{beat.phase}, {beat.writing} a checkpoint" if beat.writing else beat.phase
        began = datetime.fromisoformat(line["started"]).timestamp()
        unseen = max(beat.changed - began - seconds.get("total", 0.0), 0.0)
        seconds = {**seconds, beat.phase: round(seconds.get(beat.phase, 0.0) + unseen, 3)}
        seconds["total"] = round(seconds.get("total", 0.0) + unseen, 3)
    return {**line, "ended": ended, "ending": "killed", "to_step": last, "seconds": seconds}


def _lost(line: Mapping[str, Any], seconds: Mapping[str, float], steps: int) -> dict[str, Any]:
    """Steps that are done again, and what they had cost at the mean of their attempt."""
    trained = sum(seconds.get(bucket, 0.0) for bucket in TRAINING)
    done = line["to_step"] - line.get("from_step", line["to_step"])
    return {"lost_steps": steps, "lost_seconds": round(trained * min(steps / done, 1.0), 3) if done > 0 else 0.0}


def _exactly(seconds: float) -> str:
    """A time of day for arithmetic: ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def read_attempts(run: RunDir) -> list[dict[str, Any]]:
    """Every line of attempts.jsonl; what is torn (power loss) is left out."""
    if not run.attempts.exists():
        return []
    lines = []
    for line in run.attempts.read_text().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def count_interruptions(run: RunDir) -> tuple[int, float]:
    """How often this run was killed or crashed, and in how many seconds of work."""
    past = [line for line in read_attempts(run) if line.get("from_step") is not None and line.get("ended")]
    spans = [datetime.fromisoformat(line["ended"]) - datetime.fromisoformat(line["started"]) for line in past]
    return sum(line["ending"] in ("killed", "failed") for line in past), sum(span.total_seconds() for span in spans)
