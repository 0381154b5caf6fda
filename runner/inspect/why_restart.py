"""`why`: which checkpoint a restart of a run would use, and why not a newer one. Changes nothing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from runner.checkpoint.restore import Verdict, iter_verdicts, list_ignored_names
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from runner.inspect.lookup import find_run, read_retention_settings
from runner.rundir.layout import RunDir
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """A run."""
    parser.add_argument("run", metavar="RUN", help="outputs/NAME/RUN")


def run(arguments: Namespace, say: Say) -> Answer:
    """Say it, newest first, down to the one that would be used. Exit code 3 where there is none."""
    run = find_run(arguments.run)
    checksums = read_retention_settings(run).verify != "off"
    used, passed = None, []
    for verdict in _as_restored(run, checksums=checksums):
        if verdict.usable:
            used = verdict
            break
        say(f"not {verdict.step}: {_why_not(verdict)}")
        passed.append(_plain(verdict))
    if strange := list_ignored_names(run.checkpoints):
        say(f"ignored (not a directory named like a step): {', '.join(strange)}")
    state = run.read_status().get("state")
    say(_conclusion(used, refused=any(entry["problem"] for entry in passed)))
    if used and state == "finished":
        say("the run is finished: the same command does nothing, dir=RUN train.steps=N goes on")
    step = used.step if used else None
    reason = used.record.reason if used and used.record else None
    document = {"run": str(run), "state": state, "step": step, "reason": reason, "passed": passed, "ignored": strange}
    return Answer(document, 0 if used else RefusedError.exit_code)


def _as_restored(run: RunDir, *, checksums: bool) -> Iterator[Verdict]:
    """What restoring would make of each: what is marked is passed over by its sizes alone."""
    for verdict in iter_verdicts(run.checkpoints, checksums=False):
        if verdict.usable and checksums and (problem := find_problem(run.checkpoints / str(verdict.step))):
            yield Verdict(verdict.step, verdict.record, problem)
        else:
            yield verdict


def _why_not(verdict: Verdict) -> str:
    if verdict.problem is not None:
        return f"{verdict.problem}; a restart moves it to quarantine/"
    assert verdict.record is not None
    return f"marked {verdict.record.mark} ({verdict.record.reason}); only step={verdict.step} restores it"


def _conclusion(used: Verdict | None, *, refused: bool) -> str:
    if used is None:
        return "nothing to restore: " + (
            "a restart is refused; resume=never overwrite=true starts afresh"
            if refused
            else "a restart begins at step 0"
        )
    assert used.record is not None
    return f"a restart goes on from step {used.step} (saved: {used.record.reason})"


def _plain(verdict: Verdict) -> dict[str, Any]:
    mark = verdict.record.mark if verdict.record else ""
    return {"step": verdict.step, "problem": verdict.problem, "mark": mark, "why": _why_not(verdict)}
