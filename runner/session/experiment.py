"""One run from beginning to end: find → lock → inspect → work → record how it ended. No jax before the work begins."""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from runner import files, hosts
from runner.checkpoint.record import newest_durable_step
from runner.checkpoint.trouble import PASSING_ERRNOS
from runner.config import code_origins
from runner.config.identity import find_drift, hash_identity
from runner.config.schema import Config, dump_yaml, read_document
from runner.config.trust import trust_flag
from runner.errors import (
    CRASHED,
    STOPPED,
    ConfigError,
    DivergedError,
    HoldfastError,
    LostProcessError,
    LostRunError,
    RefusedError,
    StoppedEarlyError,
    StorageError,
)
from runner.hosts.group import Lead
from runner.log.console import choose_console
from runner.preempt.deadline import Watchdog
from runner.preempt.listen import listen_to_sources
from runner.preempt.shared_stop import SharedStopFlag
from runner.preempt.signals import listen_to_signals
from runner.preempt.stop import StopFlag, Stopped
from runner.remote.options import join_url
from runner.remote.other_place import Choices, OtherPlace, hold_other_place
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.crash_loop import find_repeated_failure, give_up
from runner.rundir.layout import RunDir, iter_runs, set_run_aside
from runner.rundir.numerics import settle_numerics
from runner.rundir.provenance import hash_code
from runner.rundir.readme import write_readme
from runner.rundir.run_lock import RunLock, lock_run
from runner.rundir.time_buckets import describe_clock_jump
from runner.session.base_files import settle_model
from runner.session.follow import follow_run
from runner.session.lead import describe_command, lead_others, record_lost_process
from runner.session.mend import mend_finished
from runner.session.moved_run import find_twin_on_other_data
from runner.session.standing import Standing, find_run, inspect_run, name_in_store
from runner.text import quote_override, quote_words
from runner.train.run_context import RunContext
from runner.values import Outcome


def run(
    config: Config,
    overrides: Sequence[str],
    began: float,
    checked: RunDir | None = None,
    tell_run: Callable[[RunDir], None] = lambda run_dir: None,
) -> Outcome:
    """Work on the run of this configuration until it is finished, stopped or broken.

    Args:
        config: the configuration.
        overrides: what was typed for it.
        began: when this process started, in seconds since 1970.
        checked: the run's directory, where whoever started this process has found it already.
        tell_run: told where the run lives, as soon as that is known.

    Raises HoldfastError for what a user can act on; anything else is a bug and becomes an outcome with exit code 1.
    """
    place = config.hosts.find_place(os.environ)
    if place is not None:
        # Read when jax is imported: of several processes it tells each time that recoverability is experimental.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if place.index:
            return follow_run(config, overrides, began, place)
        # It listens from now on, so that the others hear of whatever becomes of this command.
        hosts.use_group(Lead(place, config.hosts, describe_command(config)))
    # Importing and tracing make a million objects and next to no garbage: looking for some each 700 new ones, as usual,
    # takes a fifth of the processor time of a restart (measured). Training looks as often as usual again.
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    if config.train.steps == 0:
        run_dir = find_run(config, overrides, checked)
        tell_run(run_dir)
        with _as_storage_error(run_dir):
            config = settle_model(config, run_dir)
        return evaluate_run(config, run_dir)
    stop_flag = StopFlag() if place is None else SharedStopFlag()
    if isinstance(stop_flag, SharedStopFlag):
        stop_flag.listen_to_others()
    with listen_to_signals(stop_flag, config.preempt.signals, config.preempt.notice_seconds):
        # Here, because it may read data that has moved.
        run_dir = find_run(config, overrides, checked)
        with _as_storage_error(run_dir):
            is_there = run_dir.config.exists()
            if config.remote.url is None or config.overwrite or is_there:
                # Before anything is made. What a run in a bucket alone has written down is here a little later.
                config = settle_model(config, run_dir)
        tell_run(run_dir)
        if config.overwrite and is_there:
            with lock_run(run_dir), _as_storage_error(run_dir):
                # Before anything is moved: a command that is refused leaves the run where it was.
                inspect_run(run_dir, config)
                print(f"{run_dir} was set aside as {set_run_aside(run_dir)}")
        with _as_storage_error(run_dir):
            is_new = not run_dir.path.exists()
        with lock_run(run_dir) as lock, _hold_other_place(config, run_dir, stop_flag, is_new=is_new) as other_place:
            lock = replace(lock, check_elsewhere=other_place.check)
            with _taking_back(run_dir, is_new=is_new), _as_storage_error(run_dir):
                config = settle_model(config, run_dir)
            with _as_storage_error(run_dir):
                standing = _inspect_locked(run_dir, config, other_place.list_steps(), is_new=is_new)
                if standing.is_finished:
                    mend_finished(config, run_dir, standing, print)
                    other_place.finish(stop_flag.deadline)
                    return _tell_finished(config, run_dir, standing)
            with listen_to_sources(config.preempt, run_dir, stop_flag, began):
                with _as_storage_error(run_dir):
                    context = _begin_attempt(config, lock, standing, overrides, began, stop_flag)
                context = replace(context, place=place, other_place=other_place)
                attempt = context.attempt
                try:
                    _introduce(context, standing)
                    if place is not None:
                        lead_others(context, partial(_record_refusal, context, standing))
                    # Before jax starts: its thread pool is made once.
                    with _as_storage_error(run_dir):
                        attempt.record(threads=settle_numerics(run_dir, context.console.say).threads)
                    other_place.tell(context.console.say)
                    if config.remote.url is not None:
                        context.console.watch_remote(lambda: other_place.newest)
                    watchdog = Watchdog(
                        stop_flag,
                        attempt,
                        run_dir,
                        config.train.hang_seconds,
                        context.console.say,
                        partial(_find_late_code, context),
                    )
                    with watchdog.watch():
                        with attempt.time_in("import"):
                            # Here and not above: a wrong command, or a run that is finished, waits for no jax.
                            from runner.session.attempt import run_attempt

                        outcome, why = run_attempt(context, usual)
                    if jump := attempt.clock_jump:
                        context.console.say(describe_clock_jump(jump))
                    durable = None if outcome.ending == "finished" else newest_durable_step(run_dir.checkpoints)
                    attempt.end(outcome.ending, attempt.step, why, durable)
                    write_readme(run_dir)
                    # Exit 0 and 75 say that it is there: the machine may be gone in a moment.
                    other_place.finish(stop_flag.deadline)
                except LostRunError:
                    # Somebody else may be at work there: nothing more is written, not even how this ended.
                    raise
                except HoldfastError as error:
                    _record_refusal(context, standing, error)
                    raise
                except Exception as error:
                    # What jax says where another process has gone is no crash of this one.
                    if lost := hosts.current_group().find_lost():
                        _record_refusal(context, standing, lost)
                        raise lost from None
                    outcome = _record_crash(context, error)
                finally:
                    context.console.close()
                    # The page is for people; the disk may be what went wrong, or the run may be somebody else's by now.
                    with suppress(LostRunError):
                        lock.prove()
                        write_readme(run_dir)
                        other_place.send_what_there_is()
    return outcome


def _find_late_code(context: RunContext) -> int:
    """Return the exit code of a process whose time is up: 5 where its newest checkpoint is on this disk alone."""
    if context.config.remote.url is None:
        return STOPPED
    is_there = (context.other_place.newest or 0) >= newest_durable_step(context.run_dir.checkpoints)
    return STOPPED if is_there else StorageError.exit_code


def evaluate_run(config: Config, run_dir: RunDir) -> Outcome:
    """Evaluate a run that is there, as this configuration says; it is only read."""
    if config.remote.url is not None and not run_dir.config.exists():
        there = quote_words([join_url(config.remote.url, name_in_store(config, run_dir))])
        raise RefusedError(f"{run_dir}: is not on this disk; python -m runner eval {there} evaluates it where it is")
    inspect_run(run_dir, config)
    from runner.session.evaluate_only import evaluate_checkpoint

    try:
        found = evaluate_checkpoint(config, run_dir, print)
    except OSError as error:
        if _is_machine_trouble(run_dir, error):
            raise _explain_storage(run_dir, error) from error
        raise
    return Outcome("evaluated", found.step, found.score(config.score.metric), 0)


def find_unfinished(config: Config, overrides: Sequence[str]) -> RunDir | None:
    """Return the directory of a run that somebody else is to work on; None, and say so, where nothing is left to do.

    Raises RefusedError where the run may not be worked on like this. Changes nothing.
    """
    run_dir = find_run(config, overrides)
    config = settle_model(config, run_dir)
    standing = inspect_run(run_dir, config)
    if standing.is_finished:
        _tell_finished(config, run_dir, standing)
        return None
    return run_dir


@contextmanager
def _hold_other_place(config: Config, run_dir: RunDir, stop_flag: StopFlag, *, is_new: bool) -> Iterator[OtherPlace]:
    """Hold a run in its bucket while the context lasts; where it is refused and is new, nothing of it stays here."""
    keep = config.retention if config.remote.retention is None else config.remote.retention
    choices, key = Choices(config.remote, keep, config.score, config.overwrite), name_in_store(config, run_dir)
    with ExitStack() as opened:
        with _taking_back(run_dir, is_new=is_new):
            held = hold_other_place(choices, key, run_dir, partial(_raise_if_asked, stop_flag))
            try:
                place = opened.enter_context(held)
            except Stopped:
                raise StoppedEarlyError(
                    f"stopped by {stop_flag.asked} while it waited for the run; nothing was begun"
                ) from None
        yield place


def _raise_if_asked(stop_flag: StopFlag) -> None:
    """Raise Stopped where a stop was asked for, in a process that asks no other one: they wait for it to begin."""
    if stop_flag.asked is not None:
        raise Stopped


@contextmanager
def _taking_back(run_dir: RunDir, *, is_new: bool) -> Iterator[None]:
    """Take back the directory that the lock has made of a new run, where what is done in the context is refused."""
    try:
        yield
    except HoldfastError:
        # Never a directory that was there: one that has lost its configuration may still hold checkpoints.
        if is_new and not run_dir.config.exists():
            _remove_new_run(run_dir)
        raise


def _inspect_locked(run_dir: RunDir, config: Config, elsewhere: Collection[int], *, is_new: bool) -> Standing:
    """Inspect a run whose lock is held; where it is refused and is new, take back the directory that the lock made."""
    with _taking_back(run_dir, is_new=is_new):
        return inspect_run(run_dir, config, elsewhere)


def _tell_finished(config: Config, run_dir: RunDir, standing: Standing) -> Outcome:
    """Say that nothing is left to do, and what could be done."""
    status = standing.status
    step, best = status["step"], status.get("best")
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    early, more = "", f"train.steps={2 * step}"
    # Not where it has gone to its last step since: then the rule decided nothing.
    if status.get("stopped_early") and (config.train.steps is None or step < config.train.steps):
        # Whoever goes on allows the metric more patience, and leaves rules of his own out.
        patience = [f"stop.patience={2 * config.stop.patience}"] if config.stop.metric else []
        more = " ".join([*patience, *(["stop.rules={}"] if config.stop.rules else [])])
        early = f", stopped early ({status.get('why')})"
    print(
        f"{run_dir} is finished: {step} steps{early}{score}\n"
        f"more steps: python run.py {quote_override('dir', str(run_dir))} {more}{trust_flag(config)}"
    )
    return Outcome("finished", step, status.get("score"), 0)


def _begin_attempt(
    config: Config, lock: RunLock, standing: Standing, overrides: Sequence[str], began: float, stop_flag: StopFlag
) -> RunContext:
    """Give this attempt its number and open its console.

    Raises RefusedError where the same failure came too often before.
    """
    run_dir, own = lock.run_dir, code_origins.find_origins(config.document)
    own_files = [path for origin in own for path in origin.files]
    failure = find_repeated_failure(read_attempts(run_dir), hash_code(own_files))
    if failure:
        # Here and not above: who has not failed before does not wait for numpy.
        from runner.train.broken_data import is_mended

        failure = None if is_mended(run_dir, config.data, failure.why) else failure
    move = failure.move(config.train.max_crashes) if failure else "try"
    if failure and move == "give up":
        give_up(run_dir, failure)
    attempt = AttemptLog(run_dir, config.score, config.train.steps, hash_identity(config.document), began, lock.prove)
    files.make_folder(run_dir.logs)
    console = choose_console(run_dir.log, wanted=config.log.console)
    for damage in attempt.begin(overrides, [str(change) for change in standing.drifts], own_files):
        console.say(f"warning: {damage}")
    if mine := code_origins.describe_origins(own):
        attempt.record(external=mine)
    if trust_flag(config):
        attempt.record(needs_trust=True)
    return RunContext(config, run_dir, attempt, console, stop_flag, lock, steps_back=move == "step back")


def _introduce(context: RunContext, standing: Standing) -> None:
    """Say where the run lives and what is different; take the snapshot of a new one."""
    config, run_dir, say = context.config, context.run_dir, context.console.say
    if not standing.exists:
        files.replace_file(run_dir.config, dump_yaml(config.document))
        say(f"{run_dir}  (new run)")
        _tell_sibling(context)
    else:
        say(f"{run_dir}  (going on)")
        for change in standing.drifts:
            compared = " (what is there is compared)" if change.kind == "place" else ""
            say(f"{'warning: ' if change.kind == 'resumable' else ''}changed: {change}{compared}")
    mine = code_origins.describe_origins(code_origins.find_origins(config.document))
    before = standing.status.get("attempt", {}).get("external", {})
    for line in code_origins.list_changed_files(before, mine):
        say(f"warning: {line}")


def _tell_sibling(context: RunContext) -> None:
    """Say how to go on with a run that differs from this new one only in what may change, if there is one."""
    config, run_dir = context.config, context.run_dir
    mine = hash_identity(config.document)
    for sibling, status in iter_runs(run_dir.path.parent):
        if status.get("identity") == mine and sibling.path != run_dir.path:
            changes = ", ".join(str(change) for change in find_drift(read_document(sibling.config), config.document))
            way_out = f"to continue that one: add {quote_override('dir', str(sibling))}"
            context.console.say(f"differs from {sibling} only in {changes}; {way_out}")
            return
    # Its data was compared when this run was looked for: that the places differ is not why it is another run.
    if twin := find_twin_on_other_data(run_dir, config):
        context.console.say(f"differs from {twin} only in its data: what lies there is not what that run recorded")


def _record_refusal(context: RunContext, standing: Standing, error: HoldfastError) -> None:
    """Record how the attempt failed; what is only refused leaves a run as it was."""
    run_dir, attempt = context.run_dir, context.attempt
    if not isinstance(error, ConfigError | RefusedError):
        if isinstance(error, StorageError):
            # It says nothing about the step: trying again is right as often as it is typed.
            attempt.record(machine_trouble=True)
        if isinstance(error, LostProcessError):
            record_lost_process(attempt)
        _record_end(attempt, "diverged" if isinstance(error, DivergedError) else "failed", str(error))
    elif standing.exists or run_dir.holds_checkpoints():
        attempt.withdraw()
    else:
        _remove_new_run(run_dir)


def _record_crash(context: RunContext, error: Exception) -> Outcome:
    """Record a bug, ours or the user's, in full. Raises StorageError where it was the machine."""
    run_dir, attempt = context.run_dir, context.attempt
    if isinstance(error, OSError) and _is_machine_trouble(run_dir, error):
        attempt.record(machine_trouble=True)
        _record_end(attempt, "failed", str(error))
        raise _explain_storage(run_dir, error) from error
    context.console.close()
    trace = "".join(traceback.format_exception(error))
    sys.stderr.write(trace)
    # The traceback was printed; a disk in trouble must not hide it behind another one.
    with suppress(OSError):
        files.append_text(run_dir.log, trace)
    _record_end(attempt, "failed", f"{type(error).__name__}: {error}")
    return Outcome("failed", attempt.step, None, CRASHED)


def _record_end(attempt: AttemptLog, state: str, why: str) -> None:
    """Record how it ended, if the disk lets us; else the next attempt does, as for a killed one."""
    with suppress(OSError, StorageError, LostRunError):
        attempt.end(state, attempt.step, why, newest_durable_step(attempt.run_dir.checkpoints))


@contextmanager
def _as_storage_error(run_dir: RunDir) -> Iterator[None]:
    """Turn an OSError into a StorageError: only files of the run are touched here, so it is the machine's trouble."""
    try:
        yield
    except OSError as error:
        raise _explain_storage(run_dir, error) from error


def _is_machine_trouble(run_dir: RunDir, error: OSError) -> bool:
    """Tell whether an error is about the machine, or about the run's own files, and not what the user's code opens."""
    if error.errno in PASSING_ERRNOS:
        return True
    if not isinstance(error.filename, str):
        return False
    # A folder above the run as well: each is opened on the way.
    place = Path(error.filename)
    return place.is_relative_to(run_dir.path) or run_dir.path.is_relative_to(place)


def _explain_storage(run_dir: RunDir, error: OSError) -> StorageError:
    way_out = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    where = f" ({Path(error.filename).name})" if isinstance(error.filename, str) else ""
    return StorageError(f"{run_dir}: {error.strerror or error}{where}; {way_out}, then run the same command")


def _remove_new_run(run_dir: RunDir) -> None:
    """Take back a run that turned out wrong before anything was trained: nothing was written."""
    files.remove_tree(run_dir.path)
    for parent in (run_dir.path.parent, run_dir.path.parent.parent):
        # Not empty: it was there before.
        with suppress(OSError):
            parent.rmdir()
