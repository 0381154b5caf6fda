"""One run from beginning to end: place → admit → lock → work → record how it ended."""

from __future__ import annotations

import errno
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner import files
from runner.checkpoint.record import durable_step, locate
from runner.config import user_code
from runner.config.identity import PLACE, Drift, drift, fingerprint, identity
from runner.config.schema import Config, read, write
from runner.errors import CRASHED, ConfigError, DivergedError, HoldfastError, RefusedError, StorageError
from runner.log.console import Console, choose
from runner.preempt.deadline import Guard
from runner.preempt.listen import watching
from runner.preempt.signals import listening
from runner.preempt.stop import Watcher
from runner.rundir import layout
from runner.rundir.attempts import AttemptLog, read_attempts
from runner.rundir.crash_loop import find_repeated_failure, give_up
from runner.rundir.layout import RunDir
from runner.rundir.provenance import hash_code
from runner.rundir.readme import render_readme
from runner.session.attempt import Session, step_back, work
from runner.values import Outcome

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def run(config: Config, overrides: Sequence[str], began: float) -> Outcome:
    """Work on the run of this configuration until it is finished, stopped or broken; `began` in seconds since 1970.

    Raises HoldfastError for what a user can act on; anything else is a bug and becomes an outcome with exit code 1.
    """
    if config.train.steps == 0:
        return evaluated(config, overrides)
    place, drifts, done = standing(config, overrides)
    if done:
        return done
    watcher = Watcher()
    with listening(watcher, config.preempt.signals, config.preempt.notice_seconds):
        if config.overwrite and place.config.exists():
            with layout.lock_run(place):
                print(f"{place} was set aside as {layout.set_run_aside(place)}")
        with layout.lock_run(place), watching(config.preempt, place, watcher, began):
            attempt = AttemptLog(place, config.score, config.train.steps, identity(config.document), began)
            return _worked_on(config, place, overrides, drifts, attempt, watcher)


def evaluated(config: Config, overrides: Sequence[str]) -> Outcome:
    """A run that is there, evaluated as this configuration says; it is only read."""
    place = _place(config, overrides)
    _admit(config, place)
    from runner.session.evaluate_only import again

    found = again(config, place, print)
    return Outcome("evaluated", found.step, found.score(config.score.metric), 0)


def admitted(config: Config, overrides: Sequence[str]) -> RunDir:
    """Where the run is. Raises RefusedError where it may not be worked on like this. Changes and says nothing."""
    place = _place(config, overrides)
    _admit(config, place)
    return place


def standing(config: Config, overrides: Sequence[str]) -> tuple[RunDir, list[Drift], Outcome | None]:
    """Where the run is, what differs from how it was started, its outcome if nothing is left to do. Changes nothing."""
    place = _place(config, overrides)
    return place, _admit(config, place), _finished(config, place)


def _place(config: Config, overrides: Sequence[str]) -> RunDir:
    """The directory of this run. Raises RefusedError where `resume` does not allow what is, or is not, there."""
    if config.dir is not None:
        place = RunDir(Path(config.dir).resolve())
    else:
        parent = (Path(config.root) / config.name).resolve()
        place = layout.find_run_dir(parent, layout.slug_from_overrides(overrides, PLACE), fingerprint(config.document))
    if config.resume == "must" and not place.config.exists():
        raise RefusedError(f"resume=must: nothing is at {place}; check the command, or leave resume out to start it")
    if config.resume == "never" and place.config.exists() and not config.overwrite:
        raise RefusedError(
            f"resume=never: {place} exists; leave resume out to go on with it, or add overwrite=true to set it aside"
        )
    return place


def _admit(config: Config, place: RunDir) -> list[Drift]:
    """What differs from the configuration the run was started with.

    Raises RefusedError where it is another run, or where a checkpoint that the command names is not there.
    """
    if not place.config.exists() or config.overwrite:
        if config.init_from.run is not None:
            locate(config.init_from.run)
        return []
    if config.step is not None and config.step != place.read_status().get("taken_back_to"):
        locate(f"{place}@{config.step}")
    drifts = drift(read(place.config), config.document)
    if others := [str(change) for change in drifts if change.kind == "identity"]:
        raise RefusedError(
            f"{place} is another run: {', '.join(others)}; change these back, or start a new run by leaving dir out"
        )
    return drifts


def is_finished(config: Config, place: RunDir) -> bool:
    """Whether nothing is left to do: all its steps are done, and the last is on disk where that is wanted."""
    status = place.read_status()
    step = status.get("step", 0)
    if config.overwrite or status.get("state") != "finished" or step < config.train.steps:
        return False
    if config.step is not None and config.step != status.get("taken_back_to"):
        return False
    return not config.ckpt.last or (place.checkpoints / str(step)).is_dir()


def _finished(config: Config, place: RunDir) -> Outcome | None:
    """The outcome of a run that has nothing left to do, and a word about it."""
    if not is_finished(config, place):
        return None
    status = place.read_status()
    step, best = status["step"], status.get("best")
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    print(
        f"{place} is finished: {step} steps{score}\nmore steps: python run.py dir={place} train.steps={2 * step}"
        f"{user_code.flag(config.document)}"
    )
    return Outcome("finished", step, status.get("score"), 0)


def _worked_on(
    config: Config,
    place: RunDir,
    overrides: Sequence[str],
    drifts: Sequence[Drift],
    attempt: AttemptLog,
    watcher: Watcher,
) -> Outcome:
    """One attempt, with its end recorded however it comes."""
    fresh = not place.config.exists()
    own = user_code.origins(config.document)
    own_files = [path for origin in own for path in origin.files]
    again = find_repeated_failure(read_attempts(place), hash_code(own_files))
    move = again.move(config.train.max_crashes) if again else "try"
    if again and move == "give up":
        give_up(place, again)
    console = choose(place.log, wanted=config.log.console)
    session = Session(config, place, attempt, console, watcher)
    mine, theirs = user_code.record(own), place.read_status().get("attempt", {}).get("external", {})
    attempt.begin(overrides, [str(change) for change in drifts], own_files)
    attempt.record(**({"external": mine} if mine else {}))
    try:
        _introduce(config, place, drifts, console, fresh=fresh)
        for line in user_code.changed(theirs, mine):
            console.say(f"warning: {line}")
        if move == "step back":
            step_back(session)
        with Guard(watcher, attempt, place, config.train.hang_seconds, console.say).watching():
            outcome, why = work(session)
    except HoldfastError as error:
        if isinstance(error, ConfigError | RefusedError):  # these leave a run as it was
            _unmake(place) if fresh and not place.holds_checkpoints() else attempt.withdraw()
        else:
            _ended(attempt, "diverged" if isinstance(error, DivergedError) else "failed", str(error))
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            _ended(attempt, "failed", str(error))
            raise StorageError(f"{place}: {error.strerror}; free space, then run the same command") from error
        console.close()  # a bug, ours or the user's: told in full and recorded
        sys.stderr.write(traceback.format_exc())
        with place.log.open("a") as log:
            log.write(traceback.format_exc())
        _ended(attempt, "failed", f"{type(error).__name__}: {error}")
        outcome = Outcome("failed", attempt.step, None, CRASHED)
    else:
        finished = outcome.ending == "finished"
        attempt.end(outcome.ending, attempt.step, why, None if finished else durable_step(place.checkpoints))
    finally:
        console.close()
        with suppress(OSError):  # the page is for people; the disk may be what went wrong
            if place.status.exists():
                files.replace(place.readme, render_readme(place))
    return outcome


def _ended(attempt: AttemptLog, state: str, why: str) -> None:
    """Record how it ended, if the disk lets us; else the next attempt does, as for a killed one."""
    with suppress(OSError):
        attempt.end(state, attempt.step, why, durable_step(attempt.run.checkpoints))


def _introduce(config: Config, place: RunDir, drifts: Sequence[Drift], console: Console, *, fresh: bool) -> None:
    """Take the snapshot of a new run, and say where it lives and what is different."""
    if not fresh:
        console.say(f"{place}  (going on)")
        for change in drifts:
            console.say(f"{'warning: ' if change.kind == 'resumable' else ''}changed: {change}")
        return
    files.replace(place.config, write(config.document))
    console.say(f"{place}  (new run)")
    mine = identity(config.document)
    for sibling, status in layout.iter_runs(place.path.parent):
        if status.get("identity") == mine and sibling.path != place.path:
            changes = ", ".join(str(change) for change in drift(read(sibling.config), config.document))
            console.say(f"differs from {sibling} only in {changes}; to continue that one: add dir={sibling}")
            break


def _unmake(place: RunDir) -> None:
    """Take back a run that turned out wrong before anything was trained: nothing was written."""
    shutil.rmtree(place.path)
    for parent in (place.path.parent, place.path.parent.parent):
        with suppress(OSError):  # not empty: it was there before
            parent.rmdir()
