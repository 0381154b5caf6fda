"""One run from beginning to end: place → admit → build → restore → train → finish."""

from __future__ import annotations

import errno
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import rundir
from runner.checkpoint.record import Record, best_of, locate, progress_of, records_in
from runner.checkpoint.restore import exactly, newest_good, take_back
from runner.config import PLACE, Config, Drift, drift, fingerprint, identity, read, write
from runner.errors import CRASHED, STOPPED, ConfigError, DivergedError, HoldfastError, RefusedError, StorageError
from runner.ledger import Attempt
from runner.log.console import Console, choose
from runner.moment import Outcome
from runner.preempt.signals import listening
from runner.preempt.watch import Watcher
from runner.readme import readme
from runner.rundir import Run

if TYPE_CHECKING:
    from runner.build import Built

DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def run(config: Config, overrides: Sequence[str]) -> Outcome:
    """Work on the run of this configuration until it is finished, stopped or broken.

    Raises HoldfastError for what a user can act on; anything else is a bug and becomes an outcome with exit code 1.
    """
    place = _place(config, overrides)
    drifts = _admit(config, place)
    if done := _finished(config, place):
        return done
    watcher = Watcher()
    with listening(watcher, config.preempt.signals):
        if config.overwrite and place.config.exists():
            with rundir.locked(place):
                print(f"{place} was set aside as {rundir.set_aside(place)}")
        with rundir.locked(place):
            return _worked_on(config, place, overrides, drifts, watcher)


def _place(config: Config, overrides: Sequence[str]) -> Run:
    """The directory of this run. Raises RefusedError where `resume` does not allow what is, or is not, there."""
    if config.dir is not None:
        place = Run(Path(config.dir).resolve())
    else:
        parent = (Path(config.root) / config.name).resolve()
        place = rundir.find(parent, rundir.slug(overrides, PLACE), fingerprint(config.document))
    if config.resume == "must" and not place.config.exists():
        raise RefusedError(f"resume=must: nothing is at {place}; check the command, or leave resume out to start it")
    if config.resume == "never" and place.config.exists() and not config.overwrite:
        raise RefusedError(
            f"resume=never: {place} exists; leave resume out to go on with it, or add overwrite=true to set it aside"
        )
    return place


def _admit(config: Config, place: Run) -> list[Drift]:
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


def _finished(config: Config, place: Run) -> Outcome | None:
    """The outcome of a run that has nothing left to do."""
    status = place.read_status()
    step = status.get("step", 0)
    if config.overwrite or status.get("state") != "finished" or step < config.train.steps:
        return None
    if config.step is not None and config.step != status.get("taken_back_to"):
        return None
    if config.ckpt.last and not (place.checkpoints / str(step)).is_dir():
        return None
    best = status.get("best")
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    print(f"{place} is finished: {step} steps{score}\nmore steps: python run.py dir={place} train.steps={2 * step}")
    return Outcome("finished", step, status.get("score"), 0)


def _worked_on(
    config: Config, place: Run, overrides: Sequence[str], drifts: Sequence[Drift], watcher: Watcher
) -> Outcome:
    """One attempt, with its end recorded however it comes."""
    fresh = not place.config.exists()
    console = choose(place.log, wanted=config.log.console)
    attempt = Attempt(place, config.score, config.train.steps, identity(config.document))
    attempt.begin(overrides, [str(change) for change in drifts])
    try:
        _introduce(config, place, drifts, console, fresh=fresh)
        outcome, why = _attempted(config, place, attempt, console, watcher)
    except HoldfastError as error:
        if fresh and isinstance(error, ConfigError | RefusedError) and not place.holds_checkpoints():
            _unmake(place)
        elif not isinstance(error, ConfigError | RefusedError):  # these leave a run as it was
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
        attempt.end("failed", attempt.step, f"{type(error).__name__}: {error}")
        outcome, why = Outcome("failed", attempt.step, None, CRASHED), ""
    else:
        attempt.end(outcome.ending, outcome.step, why)
    finally:
        console.close()
        with suppress(OSError):  # the page is for people; the disk may be what went wrong
            if place.status.exists():
                rundir.replace(place.readme, readme(place))
    return outcome


def _ended(attempt: Attempt, state: str, why: str) -> None:
    """Record how it ended, if the disk lets us; else the next attempt does, as for a killed one."""
    with suppress(OSError):
        attempt.end(state, attempt.step, why)


def _introduce(config: Config, place: Run, drifts: Sequence[Drift], console: Console, *, fresh: bool) -> None:
    """Take the snapshot of a new run, and say where it lives and what is different."""
    if not fresh:
        console.say(f"{place}  (going on)")
        for change in drifts:
            console.say(f"{'warning: ' if change.kind == 'resumable' else ''}changed: {change}")
        return
    rundir.replace(place.config, write(config.document))
    console.say(f"{place}  (new run)")
    mine = identity(config.document)
    for sibling, status in rundir.siblings(place.path.parent):
        if status.get("identity") == mine and sibling.path != place.path:
            changes = ", ".join(str(change) for change in drift(read(sibling.config), config.document))
            console.say(f"differs from {sibling} only in {changes}; to continue that one: add dir={sibling}")
            break


def _attempted(config: Config, place: Run, attempt: Attempt, console: Console, watcher: Watcher) -> tuple[Outcome, str]:
    """Build, restore or begin, train, and make sure that the end is on disk."""
    with attempt.spend("startup"):
        from runner import build as building
        from runner.loop import train

        built = building.build(config)
    console.say(building.describe(built, config))
    with attempt.spend("compile"):
        train_step = building.compile_step(built, config)
    with attempt.spend("restore"):
        state, step, best = _restored(config, built, place, attempt, console)
    attempt.restored(step, best, building.hardware(built))
    rundir.replace(place.readme, readme(place))
    with building.live(config, built, train_step, place, attempt, console, step) as parts:
        console.begin(step, config.train.steps)
        state, step = train(parts, state, step, watcher)
        if config.ckpt.last and step > 0 and not parts.saver.holds(step):
            raise StorageError(
                f"step {step} could not be made durable in {place}; free space, then run the same command"
            )
        attempt.note(step, {}, parts.saver.newest)
    console.close()
    if step < config.train.steps:
        return _stopped(config, attempt, console, step, watcher.notice or "stopped")
    if config.train.final == "best":
        state = _best(config, built, place, attempt, console, state)
    if shown := building.showcase(built, config, state):
        console.say("a sample:\n" + "\n".join(f"  | {line}" for line in shown.splitlines()))
    return _complete(place, attempt, console, step)


def _restored(
    config: Config, built: Built, place: Run, attempt: Attempt, console: Console
) -> tuple[Any, int, dict[str, Any] | None]:
    """State, step and best score to go on from, the data at its position; or a beginning at step 0."""
    found = _chosen(config, built, place, attempt, console)
    if found is None:
        return _begun(config, built, console), 0, None
    record, state = found
    progress = progress_of(place.checkpoints / str(record.step))
    if progress["data"] != built.sources.fingerprint:
        raise RefusedError(
            f"{place}: the data is not what this run was trained on ({built.sources.summary} now); "
            "bring the old data back (for data=stdlib: the same Python), or start a new run"
        )
    built.stream.restore(progress["position"])
    console.say(f"restored step {record.step} (saved: {record.reason})")
    return state, record.step, progress["best"]


def _chosen(config: Config, built: Built, place: Run, attempt: Attempt, console: Console) -> tuple[Record, Any] | None:
    """The checkpoint that `step=` names, or the newest good one, and the state it holds."""
    from runner import build as building

    read, checksums = partial(building.restore, built), config.ckpt.verify != "off"
    if config.step is not None and config.step != attempt.taken_back_to:
        found = exactly(locate(f"{place.path}@{config.step}"), read, checksums=checksums)
        take_back(place.checkpoints, place.quarantine, found[0].step, console.say)
        attempt.take_back(config.step)
        return found
    if config.step is not None:
        console.say(f"was taken back to step {config.step} already: going on from the newest checkpoint")
    attempt.take_back(config.step)
    return newest_good(place.checkpoints, place.quarantine, read, console.say, checksums=checksums)


def _begun(config: Config, built: Built, console: Console) -> Any:
    """A fresh state, with the weights of another run where `init_from` asks for them."""
    from runner import build as building

    if config.init_from.run is None:
        return built.init()
    checkpoint = locate(config.init_from.run)
    state, report = building.warm(built, checkpoint, partial=config.init_from.partial)
    console.say(f"weights from {rundir.shown(checkpoint)}: {len(report.taken)} arrays as they are")
    for line in report.lines():
        console.say(line)
    return state


def _best(config: Config, built: Built, place: Run, attempt: Attempt, console: Console, last: Any) -> Any:
    """The state of the best checkpoint, proven, for what is made of a finished run; else the last one, and why."""
    from runner import build as building

    best = best_of(records_in(place.checkpoints), config.score)
    if best is None:
        console.say(f"warning: train.final=best: no checkpoint has a finite {config.score.metric}; ending on the last")
        return last
    _, state = exactly(place.checkpoints / str(best.step), partial(building.restore, built))
    measured = building.evaluate(built, config, state)
    attempt.ends_on(best.step)
    values = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    console.say(f"ends on the best weights, of step {best.step}: {values}")
    return state


def _stopped(config: Config, attempt: Attempt, console: Console, step: int, notice: str) -> tuple[Outcome, str]:
    if config.ckpt.last:
        console.say(
            f"stopped by {notice} at step {step} of {config.train.steps}, saved; the same command goes on from here"
        )
    else:
        console.say(f"stopped by {notice} at step {step}, not saved (ckpt.last=false); the same command starts over")
    score = attempt.best["value"] if attempt.best else None
    return Outcome("preempted", step, score, STOPPED), notice


def _complete(place: Run, attempt: Attempt, console: Console, step: int) -> tuple[Outcome, str]:
    best = attempt.best
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    console.say(
        f"finished {step} steps in {attempt.seconds:.0f} s{score}\neverything is in {place}; read its README.md"
    )
    return Outcome("finished", step, best["value"] if best else None, 0), ""


def _unmake(place: Run) -> None:
    """Take back a run that turned out wrong before anything was trained: nothing was written."""
    shutil.rmtree(place.path)
    for parent in (place.path.parent, place.path.parent.parent):
        with suppress(OSError):  # not empty: it was there before
            parent.rmdir()
