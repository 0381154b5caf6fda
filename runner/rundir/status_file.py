"""status.json: how far a run is, for people, for supervisors, and for the next attempt. No jax."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from runner import files, hosts
from runner.checkpoint.record import Score
from runner.rundir.decisions import Decisions
from runner.rundir.layout import RunDir
from runner.text import utc_now
from runner.types import JsonObject

WRITE_SECONDS = 1.0  # it is replaced at most once in this time while training goes on


class StatusFile:
    """Hold what is true of a run over all its attempts, and write it down.

    Nothing here is locked: `AttemptLog` sees to it that one thread writes at a time.
    """

    def __init__(self, run_dir: RunDir, score: Score, steps: int | None, identity: str):
        self._run_dir, self._score = run_dir, score
        self._fields: JsonObject = {"steps": steps, "step": 0, "score": None, "best": None, "identity": identity}
        self._as_found: bytes | None = None
        self._written = -WRITE_SECONDS

    @property
    def step(self) -> int:
        """Return the last step that was noted."""
        return self._fields["step"]

    @property
    def best(self) -> JsonObject | None:
        """Return the best score so far over all attempts: step, metric, value."""
        return self._fields["best"]

    @property
    def skipped(self) -> list[JsonObject]:
        """Return the batches that training skips, because the loss was not finite on them: batch, step, why."""
        return self._fields["skipped"]

    @property
    def taken_back_to(self) -> int | str | None:
        """Return where `step=` has taken this run already: the same command typed again goes on from there."""
        return self._fields.get("taken_back_to")

    def set_taken_back_to(self, where: int | str | None) -> None:
        """Remember where the run was taken back to; on disk the next time the status is written."""
        self._fields["taken_back_to"] = where

    def set_final_step(self, step: int) -> None:
        """Remember whose weights a finished run ended on, where they are not the last."""
        self._fields["final_step"] = step

    def set_steps(self, steps: int) -> None:
        """Note how long the run is, where that was not known before its data was read."""
        self._fields["steps"] = steps

    def set_stopped_early(self) -> None:
        """Note that training ended before its last step, because a metric got no better."""
        self._fields["stopped_early"] = True

    def set_final_metrics(self, measured: Mapping[str, float]) -> None:
        """Note what was measured of the weights that a finished run ends on, where they are not the last."""
        self._fields["final"] = dict(measured)

    def add_skipped(self, batch: int, step: int, why: str) -> None:
        """Remember that a batch is skipped from now on."""
        self._fields["skipped"] = [*self.skipped, {"batch": batch, "step": step, "why": why}]

    def take_over(self, decisions: Decisions) -> JsonObject:
        """Go on from what the attempt before has left, and return that; empty where there is nothing.

        What the decisions say counts, whatever stands in status.json. Raises OSError where it cannot be read now.
        """
        # As bytes, so that `put_back` gives back every one of them.
        with suppress(FileNotFoundError):
            self._as_found = files.read_file(self._run_dir.status)
        previous = self._run_dir.read_status()
        self._fields |= {key: previous.get(key) for key in ("best", "last_committed_step")}
        self._fields |= {"step": previous.get("step", 0), "unburied": list(previous.get("unburied", []))}
        self._fields |= {"skipped": list(decisions.skipped), "taken_back_to": decisions.taken_back_to}
        return previous

    @property
    def is_damaged(self) -> bool:
        """Tell whether there was a status.json of which nothing could be read."""
        return self._as_found is not None and not self._run_dir.read_status()

    def put_back(self) -> None:
        """Write status.json as it was found."""
        if self._as_found is not None:
            files.replace_file(self._run_dir.status, self._as_found)

    def add_missing_line(self, line: JsonObject) -> None:
        """Keep the line of a killed attempt, until it is known from where training goes on and so what was lost."""
        self._fields["unburied"] = [*self._fields["unburied"], line]

    def pop_missing_lines(self) -> list[JsonObject]:
        """Return the lines of killed attempts that are still to be written, and forget them."""
        lines, self._fields["unburied"] = self._fields["unburied"], []
        return lines

    def restart_from(self, step: int, best: JsonObject | None) -> None:
        """Note that training goes on from a durable step, with the best score as it was then; 0 for a beginning."""
        self._fields |= {"step": step, "best": best, "last_committed_step": step or None}

    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None:
        """Note how far training is, what it measured at this step, and the newest durable step."""
        self._fields["step"] = step
        if durable_step is not None:
            self._fields["last_committed_step"] = durable_step
        if measured:
            self._fields["last"] = dict(measured)
        value = self._score.of(measured)
        if value is not None and (self.best is None or value < self._rank(self.best)):
            metric = self._score.metric
            self._fields["best"] = {"step": step, "metric": metric, "value": measured[metric]}

    def note_end(self, step: int, why: str) -> None:
        """Note the step that stands after the attempt, and why it ended."""
        self._fields |= {"step": step, "why": why}

    def is_due(self) -> bool:
        """Tell whether it is time to write again."""
        return time.perf_counter() - self._written > WRITE_SECONDS

    def write(self, state: str, attempt: JsonObject, seconds: Mapping[str, float], *, durable: bool) -> None:
        """Replace status.json. `durable` waits for the disk. Raises OSError."""
        self._written = time.perf_counter()
        # Once more by itself: a search reads it here without knowing what `best` looks like.
        self._fields["score"] = self.best["value"] if self.best else None
        # One process writes for all of them.
        if not hosts.is_lead():
            return
        document = {"state": state, **self._fields, "attempt": attempt, "seconds": seconds, "updated": utc_now()}
        files.replace_file(self._run_dir.status, files.format_json(document, indent=1) + "\n", durable=durable)

    def _rank(self, best: JsonObject) -> float:
        # A run may be continued under another score: what was best by the old one does not rank by the new one.
        if best["metric"] != self._score.metric:
            return float("inf")
        rank = self._score.of({self._score.metric: best["value"]})
        return float("inf") if rank is None else rank
