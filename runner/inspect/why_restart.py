"""`why`: tell which checkpoint a restart of a run would use, and why not a newer one. Changes nothing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from runner.checkpoint.restore import Verdict, iter_verdicts, list_ignored_names
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from runner.inspect.lookup import find_run, is_in_bucket, read_retention_settings
from runner.inspect.tiers import Tiers, read_tiers
from runner.rundir.layout import RunDir
from runner.types import JsonObject
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run."""
    parser.add_argument("run", metavar="RUN", help="outputs/NAME/RUN")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say why each is passed over, newest first, then which is used. The exit code is 3 where none would be."""
    run_dir = find_run(arguments.run)
    # Of a run in a bucket no byte is here to be proven: a restart does that, and so does `verify`.
    checksums = read_retention_settings(run_dir).verify != "off" and not is_in_bucket(run_dir)
    used, passed = None, []
    for verdict in _judge_as_restored(run_dir, checksums=checksums):
        if verdict.usable:
            used = verdict
            break
        say(f"not {verdict.step}: {_explain_refusal(verdict)}")
        passed.append(_describe_verdict(verdict))
    if ignored := list_ignored_names(run_dir.checkpoints):
        say(f"ignored (not a directory named like a step): {', '.join(ignored)}")
    state = run_dir.read_status().get("state")
    say(_format_conclusion(used, is_refused=any(entry["problem"] for entry in passed)))
    if used and is_in_bucket(run_dir):
        say("its names and sizes were compared; python -m runner verify reads every byte")
    tiers = read_tiers(run_dir)
    if tiers is not None:
        say(_explain_empty_machine(tiers))
    # Such a run restores nothing however good its checkpoints are.
    if used and state == "finished":
        say("the run is finished: the same command does nothing, dir=RUN train.steps=N goes on")
    document = {
        "run": str(run_dir),
        "state": state,
        "step": used.step if used else None,
        "reason": used.record.reason if used and used.record else None,
        "passed": passed,
        "remote": tiers and tiers.describe(),
        "ignored": ignored,
    }
    return VerbResult(document, 0 if used else RefusedError.exit_code)


def _judge_as_restored(run_dir: RunDir, *, checksums: bool) -> Iterator[Verdict]:
    """Yield the verdict of restoring on each checkpoint, newest first."""
    # Restoring passes over what is marked by its sizes alone, and reads every byte only of what it is about to use.
    for verdict in iter_verdicts(run_dir.checkpoints, checksums=False):
        if verdict.usable and checksums and (problem := find_problem(run_dir.checkpoints / str(verdict.step))):
            yield Verdict(verdict.step, verdict.record, problem)
        else:
            yield verdict


def _explain_refusal(verdict: Verdict) -> str:
    if verdict.problem is not None:
        return f"{verdict.problem}; a restart moves it to quarantine/"
    assert verdict.record is not None
    return f"marked {verdict.record.mark} ({verdict.record.reason}); only step={verdict.step} restores it"


def _format_conclusion(used: Verdict | None, *, is_refused: bool) -> str:
    if used is not None:
        assert used.record is not None
        return f"a restart goes on from step {used.step} (saved: {used.record.reason})"
    if is_refused:
        return "nothing to restore: a restart is refused; resume=never overwrite=true starts afresh"
    return "nothing to restore: a restart begins at step 0"


def _explain_empty_machine(tiers: Tiers) -> str:
    if tiers.newest is None:
        return f"on an empty machine it begins at step 0: {tiers.url} has no checkpoint yet"
    return f"on an empty machine it goes on from step {tiers.newest} of {tiers.url}"


def _describe_verdict(verdict: Verdict) -> JsonObject:
    mark = verdict.record.mark if verdict.record else ""
    return {"step": verdict.step, "problem": verdict.problem, "mark": mark, "why": _explain_refusal(verdict)}
