"""The work of one attempt: build → compile while restoring → train → finish."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from data.sources import UnreadableError
from runner import files, text
from runner.checkpoint.record import Record, best_of, durable_step, locate, progress_of, records_in
from runner.checkpoint.restore import exactly, newest_good, take_back
from runner.config.evaluations import Metrics
from runner.config.remat import Auto, Remat
from runner.config.schema import Config
from runner.errors import STOPPED, DivergedError, HoldfastError, RefusedError, StorageError
from runner.log.console import Console
from runner.preempt.stop import Stopped, Watcher, begin
from runner.rundir.attempts import AttemptLog
from runner.rundir.layout import RunDir
from runner.rundir.readme import render_readme
from runner.train import assemble, dataset
from runner.train.compile_cache import keep
from runner.values import Outcome

if TYPE_CHECKING:
    from runner.train.built import Built
    from runner.train.compile import Programs
    from runner.train.loop import Reached

USUAL = gc.get_threshold()
SELDOM = (100_000, *USUAL[1:])  # still bounded; and nothing large is overdue when it is as usual again


@dataclass(frozen=True)
class Session:
    """Who works on what: configuration, directory, ledger, a person's terminal, and the flag that asks for a stop."""

    config: Config
    run: RunDir
    attempt: AttemptLog
    console: Console
    watcher: Watcher


def work(session: Session) -> tuple[Outcome, str]:
    """Train until the run is finished or stopped. Gives the outcome, and why it was stopped."""
    with session.attempt.time_in("import"):
        from runner.train import build as building
        from runner.train import compile as compiling
        from runner.train.built import describe

    config, watcher = session.config, session.watcher
    try:
        kept = keep(config.compile_cache, session.console.say)
        built = building.build(config)
        dataset.admit(session.run, built.sources)
        session.console.say(describe(built, config))
        remat = config.remat
        if isinstance(remat, Auto):
            built, remat = _with_remat(session, built)
        programs = compiling.compile_all(built, config, remat, session.attempt, kept)
        reached = _trained(session, built, programs)
    except Stopped as stop:  # before training began, or too late to save: what was durable is what there is
        return _stopped(session, str(stop)), watcher.notice or ""
    if reached.step < config.train.steps or reached.owes:
        return _stopped(session, ""), watcher.notice or ""
    with session.attempt.time_in("finish"):
        if error := programs.counted.exception():  # long done, unless the run is very short
            session.console.say(f"warning: what a step needs is not written down: {type(error).__name__}: {error}")
        state = _best(session, built, programs, reached.state) if config.train.final == "best" else reached.state
        if shown := building.showcase(built, state):
            session.console.say("a sample:\n" + "\n".join(f"  | {line}" for line in shown.splitlines()))
    return _complete(session, reached.step), ""


def _with_remat(session: Session, built: Built) -> tuple[Built, Remat]:
    """The same with what `remat=auto` stands for in this run. A stop does not wait for the answer."""
    from runner.remat.choice import settled
    from runner.train import build as building

    config, attempt, console = session.config, session.attempt, session.console
    with attempt.time_in("compile"):
        alive = partial(attempt.heartbeat.set_phase, "compile")
        work = partial(settled, config, built, session.run.remat, console.say, alive)
        found = session.watcher.wait_for(begin(work, "remat"))
    attempt.record(remat=found.words)
    return building.build(replace(config, remat=found.option), built.sources), found.option


def step_back(session: Session) -> None:
    """Set the newest checkpoint aside where there is an older one: perhaps it is the state that makes training fail."""
    checkpoints, say = session.run.checkpoints, session.console.say
    steps = [record.step for record in records_in(checkpoints) if not record.mark]
    if len(steps) > 1:
        say(f"training failed here several times: going back from step {steps[-1]} to step {steps[-2]}")
        take_back(checkpoints, session.run.quarantine, steps[-2], say)
        session.attempt.record(stepped_back=steps[-1])


def _trained(session: Session, built: Built, programs: Programs) -> Reached:
    """Train from the newest good checkpoint; where the loss leaves the finite numbers, go back and skip the batch.

    Raises Stopped where a stop is asked for before training begins, DivergedError where no rollback is left.
    """
    from runner.train.built import hardware
    from runner.train.loop import train

    config, run, attempt, console, watcher = (
        *(session.config, session.run, session.attempt, session.console, session.watcher),
    )
    while True:
        watcher.check()
        built.stream.skip([skipped["batch"] for skipped in attempt.skipped])
        with attempt.time_in("restore"):
            start, best = watcher.wait_for(begin(partial(_restored, session, built), "restore"))
        with attempt.time_in("compile"):
            watcher.wait_for(programs.train)
        attempt.restored(start.step, best, hardware(built))
        files.replace(run.readme, render_readme(run))
        try:
            with attempt.time_in("finish"), ExitStack() as opened:
                with attempt.time_in("startup"):
                    living = assemble.live(config, built, programs, run, attempt, console, watcher, start)
                    parts = opened.enter_context(living)
                    console.begin(start.step, config.train.steps)
                collect_garbage_as_usual()
                with attempt.time_in("step"):
                    reached = train(parts, start, watcher)
                if config.ckpt.last and reached.step > 0 and not parts.saver.holds(reached.step):
                    raise StorageError(
                        f"step {reached.step} could not be made durable in {run}; free space, then run the same command"
                    )
                attempt.note(reached.step, {}, parts.saver.newest)
            return reached
        except DivergedError as error:
            _roll_back(session, built, error)
        except UnreadableError as error:
            raise HoldfastError(f"the data broke while training: {error}; what was saved stands") from error
        finally:
            console.close()


def _roll_back(session: Session, built: Built, error: DivergedError) -> None:
    """Remember which batch to skip. Raises the error, complete, where that was done often enough."""
    attempt, allowed = session.attempt, session.config.train.max_rollbacks
    batch = built.stream.number(error.position, error.behind)
    if len(attempt.skipped) >= allowed:
        raise error.complete(
            f"batch {batch}; {len(attempt.skipped)} of {allowed} rollbacks are used up; the newest checkpoint before "
            "it stands: lower optim.lr, or look at the data; train.max_rollbacks=N allows more"
        ) from error
    attempt.skip(batch, error.step, str(error))
    session.console.say(
        f"warning: {error}: going back to the newest checkpoint before it, and skipping batch {batch} from now on"
    )


def _restored(session: Session, built: Built) -> tuple[Reached, dict[str, Any] | None]:
    """What to go on from, and the best score so far, with the data at its position; or a beginning at step 0."""
    from runner.train.loop import Reached

    found = _chosen(session, built)
    if found is None:
        built.stream.restore(dict(built.beginning))
        return Reached(_begun(session, built), 0), None
    record, state = found
    progress = progress_of(session.run.checkpoints / str(record.step))
    if progress["data"] != built.sources.fingerprint:
        raise RefusedError(dataset.refusal(session.run, built.sources.summary, ""))
    built.stream.restore(progress["position"])
    session.console.say(f"restored step {record.step} (saved: {record.reason})")
    return Reached(state, record.step, progress.get("owes_evaluation", False)), progress["best"]


def _chosen(session: Session, built: Built) -> tuple[Record, Any] | None:
    """The checkpoint that `step=` names, or the newest good one, and the state it holds."""
    from runner.train import build as building

    config, run, attempt, say = session.config, session.run, session.attempt, session.console.say
    read, checksums = partial(building.restore, built), config.ckpt.verify != "off"
    if config.step is not None and config.step != attempt.taken_back_to:
        found = exactly(locate(f"{run.path}@{config.step}"), read, checksums=checksums)
        take_back(run.checkpoints, run.quarantine, found[0].step, say)
        attempt.take_back(config.step)
        return found
    if config.step is not None:
        say(f"was taken back to step {config.step} already: going on from the newest checkpoint")
    attempt.take_back(config.step)
    return newest_good(run.checkpoints, run.quarantine, read, say, checksums=checksums)


def _begun(session: Session, built: Built) -> Any:
    """A fresh state, with the weights of another run where `init_from` asks for them."""
    from runner.train import build as building

    init_from, say = session.config.init_from, session.console.say
    if init_from.run is None:
        return built.init()
    checkpoint = locate(init_from.run)
    state, report = building.warm(built, checkpoint, partial=init_from.partial)
    say(f"weights from {text.display_path(checkpoint)}: {len(report.taken)} arrays as they are")
    for line in report.lines():
        say(line)
    return state


def _best(session: Session, built: Built, programs: Programs, last: Any) -> Any:
    """The state of the best checkpoint, proven, for what is made of a finished run; else the last one, and why."""
    from runner.train import build as building

    config, checkpoints, say = session.config, session.run.checkpoints, session.console.say
    best = best_of(records_in(checkpoints), config.score)
    if best is None:
        say(f"warning: train.final=best: no checkpoint has a finite {config.score.metric}; ending on the last")
        return last
    _, state = exactly(checkpoints / str(best.step), partial(building.restore, built))
    names = [name for name, option in config.eval.items() if isinstance(option, Metrics)]
    found = built.evaluator(names, state, programs.eval.result(), session.run.path, "", lambda: None)
    session.attempt.ends_on(best.step)
    values = ", ".join(f"{split}/{name} {value:.4f}" for split in names for name, value in found[split].items())
    say(f"ends on the best weights, of step {best.step}: {values}")
    return state


def _stopped(session: Session, trouble: str) -> Outcome:
    """Say what stands, and what is lost where there was no time to save or saving was not wanted."""
    notice, attempt, durable = session.watcher.notice, session.attempt, durable_step(session.run.checkpoints)
    lost = attempt.lost(durable)
    reasons = [trouble, "" if session.config.ckpt.last else "ckpt.last=false"]
    reason = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
    saved = f"checkpoint {durable} stands" if durable else "nothing is saved"
    fate = f"{saved}, {lost} steps are lost{reason}" if lost else "saved" if durable else "nothing to save yet"
    then = "goes on from here" if durable or not lost else "starts over"
    session.console.say(
        f"stopped by {notice} at step {durable + lost} of {session.config.train.steps}, {fate}; the same command {then}"
    )
    best = attempt.best
    return Outcome("preempted", durable, best["value"] if best else None, STOPPED)


def _complete(session: Session, step: int) -> Outcome:
    best = session.attempt.best
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    session.console.say(
        f"finished {step} steps in {session.attempt.seconds:.0f} s{score}\n"
        f"everything is in {session.run}; read its README.md"
    )
    return Outcome("finished", step, best["value"] if best else None, 0)


def collect_garbage_seldom() -> None:
    """While a process starts."""
    gc.set_threshold(*SELDOM)


def collect_garbage_as_usual() -> None:
    """While it trains: what garbage holds there may be large."""
    gc.set_threshold(*USUAL)
