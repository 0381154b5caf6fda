"""The record of an attempt: one process that worked on a run. It gets one line in attempts.jsonl, always. No jax.

While it lives, status.json and the heartbeat say how far it is. A killed process writes no line: the next attempt
writes it, from what those two last said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner import hosts
from runner.checkpoint.record import Score
from runner.files import append_json_line
from runner.rundir.attempt_lines import (
    format_timestamp,
    line_of_killed,
    price_lost_steps,
    read_attempts,
    set_damaged_lines_aside,
)
from runner.rundir.decisions import Decisions, read_decisions, write_decisions
from runner.rundir.heartbeat import HeartbeatWriter, read_heartbeat
from runner.rundir.layout import RunDir
from runner.rundir.provenance import collect_provenance, peak_host_memory
from runner.rundir.side_files import parse_attempt
from runner.rundir.status_file import StatusFile
from runner.rundir.time_buckets import TimeBuckets
from runner.types import JsonObject


class AttemptLog:
    """Record this process's work on a run: how far it is, what it measured, where its seconds go, how it ends.

    `began` is when the process started, in seconds since 1970. `check_held` raises LostRunError where the run is no
    longer this process's; it is called before anything is written. `begin` comes first. Two threads may end it:
    training, and the watchdog that leaves in its place.

    Attributes:
        run_dir: the run's directory.
        status: what is true of the run over all attempts.
        heartbeat: the sign of life that this process gives; there from `begin` on.
        first_step: set when the first step is complete.
    """

    heartbeat: HeartbeatWriter
    _times: TimeBuckets
    _decisions: Decisions
    _found: Decisions

    def __init__(
        self,
        run_dir: RunDir,
        score: Score,
        steps: int | None,
        identity: str,
        began: float | None = None,
        check_held: Callable[[], None] = lambda: None,
    ):
        self.run_dir, self._check_held = run_dir, check_held
        self.status = StatusFile(run_dir, score, steps, identity)
        self.first_step = threading.Event()
        self._began = time.time() if began is None else began
        # What becomes the line of this attempt; until then it is part of status.json, for a kill leaves only that.
        self._record: JsonObject = {}
        # Held again by the same thread: ending an attempt writes the status as well.
        self._writing = threading.RLock()

    @property
    def number(self) -> int:
        """Return 1 for the first attempt at a run."""
        return self._record["attempt"]

    @property
    def facts(self) -> JsonObject:
        """Return what is known of this attempt so far."""
        return dict(self._record)

    @property
    def step(self) -> int:
        """Return the last step that was noted."""
        return self.status.step

    @property
    def seconds(self) -> float:
        """Return the seconds since the process began."""
        return self._times.total

    @property
    def clock_jump(self) -> float:
        """Return by how many seconds the clock of the machine was set since the process began; 0.0 for none."""
        return self._times.clock_jump

    def begin(self, overrides: Sequence[str], drift: Sequence[str], own_files: Iterable[Path] = ()) -> list[str]:
        """Give this attempt its number, and say that it is running. Return a line for each file that is damaged.

        Args:
            overrides: the words of the command.
            drift: what differs from the configuration that the run was begun with.
            own_files: files of the user's that take part.

        Raises OSError where what the run has written about itself cannot be read now, or not be replaced.
        """
        damage, lines = set_damaged_lines_aside(self.run_dir)
        found = read_decisions(self.run_dir, self.run_dir.read_status(), lines)
        previous = self.status.take_over(found.decisions)
        self._found = self._decisions = found.decisions
        damage += [found.trouble] if found.trouble else []
        damage += ["status.json could not be read; it is written anew"] if self.status.is_damaged else []
        # What a killed attempt left behind is read here, before it is written over.
        for killed in self._list_unrecorded(previous, {line["attempt"] for line in lines}):
            self.status.add_missing_line(killed)
        # This takes a while, so it comes before the heartbeat is written over: a kill between that and the new status
        # would be blamed on the attempt before.
        provenance = collect_provenance(own_files)
        self.heartbeat = HeartbeatWriter(self.run_dir.heartbeat)
        self._times = TimeBuckets(self.heartbeat, self._began)
        numbers = [found.decisions.attempt, previous.get("attempt", {}).get("attempt", 0)]
        self._record = {
            "attempt": max([*numbers, *(line["attempt"] for line in lines)]) + 1,
            "started": format_timestamp(self._began),
            "command": ["python", "run.py", *overrides],
            **provenance,
            "drift": list(drift),
        }
        self.write("running", durable=False)
        return damage

    def _list_unrecorded(self, previous: JsonObject, recorded: set[int]) -> list[JsonObject]:
        """Return the lines of the attempts that have none: those that were killed."""
        decisions, heartbeat = self._decisions, read_heartbeat(self.run_dir.heartbeat)
        if previous.get("state") == "running" and "attempt" in previous:
            return [line_of_killed(previous, heartbeat)]
        # After a power loss status.json may be empty, or an older one. Its number says more than no line at all.
        if decisions.attempt and decisions.started and decisions.attempt not in recorded and not previous:
            known = {"attempt": decisions.attempt, "started": decisions.started, "from_step": decisions.from_step}
            return [line_of_killed({"attempt": parse_attempt(known), "step": decisions.from_step}, heartbeat)]
        return []

    @property
    def was_durable(self) -> bool:
        """Return whether a checkpoint of this run was ever durable."""
        return self._decisions.was_durable

    def withdraw(self) -> None:
        """Take this attempt back, as if it had never been: what is written about the run is what it was."""
        self.status.put_back()
        if self._decisions != self._found:
            write_decisions(self.run_dir, self._found)

    def record(self, **facts: Any) -> None:
        """Add facts to this attempt's line: what compiling cost, what a step needs. From any thread."""
        with self._writing:
            self._record |= facts

    def time_in(self, bucket: str) -> AbstractContextManager[None]:
        """Count the time of a block towards a bucket."""
        return self._times.time_in(bucket)

    def move_to(self, bucket: str, seconds: float) -> None:
        """Count seconds of what is counted now towards another bucket."""
        self._times.move_to(bucket, seconds)

    def beat(self, step: int) -> None:
        """Give a sign of life: so many steps are complete. Costs next to nothing: called after each."""
        self.heartbeat.beat(step)
        if "first_step_seconds" not in self._record:
            self._record["first_step_seconds"] = round(self.seconds, 3)
            self.first_step.set()

    def begin_training(self, step: int, best: JsonObject | None, hardware: str) -> None:
        """Note that training goes on from a step: steps after it that an attempt had done are done again.

        Called again after a rollback. `best` is the best score as the checkpoint has it.
        """
        self.write_missing_lines(step)
        # After a rollback: what this very attempt had done since is done again.
        if self._trains:
            self._record["redone_steps"] = self._record.get("redone_steps", 0) + max(self.step - step, 0)
        self._record.setdefault("from_step", step)
        self._record |= {"hardware": hardware}
        self.status.restart_from(step, best)
        self._decide(
            attempt=self.number,
            started=self._record["started"],
            from_step=self._record["from_step"],
            taken_back_to=self.status.taken_back_to,
            skipped=self.status.skipped,
            was_durable=self.was_durable or step > 0,
        )
        self.heartbeat.beat(step)
        self.write("running")

    def skip_batch(self, batch: int, step: int, why: str) -> None:
        """Remember that a batch is skipped; `begin_training` puts it on disk before training goes on."""
        self.status.add_skipped(batch, step, why)
        self._record["rollbacks"] = self._record.get("rollbacks", 0) + 1

    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None:
        """Note how far training is and what it measured; write it down now and then, without waiting for the disk."""
        self.status.note(step, measured, durable_step)
        if durable_step is not None and not self.was_durable:
            # Once in the life of a run. A full disk is told by who needs it; the checkpoint itself says the same.
            with suppress(OSError):
                self._decide(was_durable=True)
        if self.status.is_due():
            # A full disk is told by who needs it; this comes again in a second.
            with suppress(OSError):
                self.write("running", durable=False)

    def write(self, state: str, *, durable: bool = True) -> None:
        """Replace status.json."""
        self._check_held()
        with self._writing:
            # Each time, for a kill leaves only this: without it, the time that an attempt took could not be told.
            self._note_clock_jump()
            self.status.write(state, self._record, self._times.read(), durable=durable)

    def end(self, state: str, reached: int, why: str, durable_step: int | None = None) -> None:
        """Say how this attempt ended, in status.json and in its line of attempts.jsonl; once, whoever is first.

        Args:
            state: how it ended.
            reached: the steps that were completed.
            why: why it ended, for people; empty where there is nothing to say.
            durable_step: the newest step that stands; what was reached past it is done again. None: all of it stands.
        """
        lost = 0 if durable_step is None else self.count_lost_steps(durable_step, reached)
        stands = reached
        # An attempt that has not trained has nothing of its own to lose, but what it found may be gone.
        if durable_step is not None and (lost or not self._trains):
            stands = durable_step
        with self._writing:
            self.write_missing_lines(stands)
            if "ending" in self._record:
                return
            self.status.note_end(stands, why)
            self._record["peak_memory_bytes"] = peak_host_memory()
            self._note_clock_jump()
            seconds = self._times.read()
            line = {**self._record, "ended": format_timestamp(time.time()), "ending": state, "why": why}
            line |= {"to_step": stands + lost, "seconds": seconds}
            self._append({**line, **price_lost_steps(line, seconds, lost)})
            self._record["ending"] = state
            # After the line: a kill between the two is seen by the next attempt, which finds the line and writes none.
            self.write(state)

    def count_lost_steps(self, durable_step: int, reached: int | None = None) -> int:
        """Return how many steps of this attempt are done again where `durable_step` is the newest that stands."""
        return max((self.step if reached is None else reached) - durable_step, 0) if self._trains else 0

    def write_missing_lines(self, step: int) -> None:
        """Write the lines of attempts that were killed, once; training goes on, or failed to, from `step`."""
        with self._writing:
            missing = self.status.pop_missing_lines()
            # A kill after its line was written and before status.json said so.
            known = {line["attempt"] for line in read_attempts(self.run_dir)} if missing else set()
            for line in missing:
                if line["attempt"] not in known:
                    lost = max(line["to_step"] - step, 0) if "from_step" in line else 0
                    self._append({**line, **price_lost_steps(line, line["seconds"], lost)})

    def _note_clock_jump(self) -> None:
        # Also where there was one and it was taken back.
        if (jump := self.clock_jump) or "clock_jump_seconds" in self._record:
            self._record["clock_jump_seconds"] = jump

    def _decide(self, **changes: Any) -> None:
        """Change what a restart must know, durably. Raises OSError."""
        with self._writing:
            decided = replace(self._decisions, **changes)
            if hosts.is_lead():
                self._check_held()
                write_decisions(self.run_dir, decided)
            self._decisions = decided

    def _append(self, line: JsonObject) -> None:
        self._check_held()
        # One process writes for all of them.
        if hosts.is_lead():
            append_json_line(self.run_dir.attempts, line)

    @property
    def _trains(self) -> bool:
        return "from_step" in self._record
