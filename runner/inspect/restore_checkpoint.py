"""`restore`: take a checkpoint back that was set aside, after every byte of it is proven."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner import files
from runner.checkpoint.quarantine import SetAside, list_set_aside
from runner.checkpoint.record import REASON, is_step_name
from runner.checkpoint.seal import find_problem
from runner.errors import ConfigError, RefusedError
from runner.inspect.lookup import find_run, refuse_bucket
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN@STEP", help="a step that lies in RUN/quarantine")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Take it back. Raises RefusedError where none of that step is good, or one is in its place already."""
    refuse_bucket("restore", arguments.checkpoint)
    run_name, _, step = arguments.checkpoint.rpartition("@")
    if not run_name or not is_step_name(step):
        raise ConfigError(f"{arguments.checkpoint}: expected RUN@STEP, such as outputs/NAME/RUN@100")
    run_dir = find_run(run_name)
    with lock_run(run_dir):
        chosen = _choose_good(run_dir, int(step))
        put_back(run_dir, chosen)
    say(f"{run_dir}@{step}  is back in place, every byte proven (it was set aside: {chosen.reason or 'no reason'})")
    return VerbResult({"run": str(run_dir), "step": chosen.step, "from": chosen.directory.name})


def put_back(run_dir: RunDir, chosen: SetAside) -> None:
    """Give a checkpoint the name again that it had before it was set aside, durably. Raises OSError."""
    files.make_folder(run_dir.checkpoints)
    place = run_dir.checkpoints / str(chosen.step)
    files.rename_path(chosen.directory, place)
    files.remove_file(place / REASON)
    for folder in (place, run_dir.checkpoints, run_dir.quarantine):
        files.sync_path(folder)


def _choose_good(run_dir: RunDir, step: int) -> SetAside:
    """Return the good checkpoint of this step that was set aside last."""
    there = list_set_aside(run_dir.quarantine)
    candidates = [each for each in there if each.step == step]
    if not candidates:
        steps = sorted({each.step for each in there})
        what = f"it has {', '.join(map(str, steps))}" if steps else "nothing was set aside there"
        raise RefusedError(f"{run_dir}: no checkpoint {step} is in its quarantine; {what}")
    if (run_dir.checkpoints / str(step)).exists():
        raise RefusedError(f"{run_dir}@{step} is in its place already; what was set aside stays where it is")
    problems = []
    for candidate in candidates:
        problem = find_problem(candidate.directory, step=step)
        if problem is None:
            return candidate
        problems.append(f"{candidate.directory.name} ({problem})")
    raise RefusedError(f"{run_dir}: no checkpoint {step} in its quarantine is good: {', '.join(problems)}")
