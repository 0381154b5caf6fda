"""TODO docstring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax

from runner.checkpoint import store
from runner.checkpoint.checkpointer import Checkpointer, Policy, Saved, preflight
from runner.checkpoint.record import PROGRESS, STATE, save_seconds
from runner.checkpoint.strategy import Failures
from runner.config.evaluations import cadences, due
from runner.config.identity import fingerprint
from runner.config.schema import Config
from runner.log import Fanout, Logger, Wandb, reached
from runner.log.console import Console
from runner.log.jsonl import CutPoint, Jsonl, cut
from runner.preempt.deadline import Grace
from runner.preempt.stop import Watcher, begin
from runner.rundir.attempts import AttemptLog, count_interruptions
from runner.rundir.layout import RunDir
from runner.train import step as steps
from runner.train.built import Built, State, num_bytes
from runner.train.compile import Programs
from runner.train.dataset import advice
from runner.train.loop import Cadence, Parts, Reached
from runner.train.prefetch import Ahead
from runner.train.starvation import Fed
from runner.values import Values


@contextmanager
def live(
    config: Config,
    built: Built,
    programs: Programs,
    run: RunDir,
    attempt: AttemptLog,
    console: Console,
    watcher: Watcher,
    start: Reached,
) -> Iterator[Parts]:
    """Everything the loop works with, open; closed in reverse, the checkpoints durable, whatever happens."""
    until = CutPoint(start.step, start.owes)
    with ExitStack() as opened:
        opened.enter_context(closing(built.stream))  # its workers end last: a save must not wait for that
        timing = opened.enter_context(closing(_jsonl(run.timing, until, attempt.number, console)))
        truth = _jsonl(run.metrics, until, attempt.number, console)
        logger = opened.enter_context(
            closing(Fanout(truth, _mirrors(config, run, attempt, console, until), console.say))
        )
        if warning := preflight(run.checkpoints, num_bytes(built), config.retention, config.train.steps):
            console.say(warning)
        grace = Grace(watcher, config.preempt.shortest_notice, console.say, save_seconds(run.checkpoints))
        saver = opened.enter_context(closing(_checkpointer(config, run, attempt, console, timing, grace)))
        is_finite, kept = jax.jit(steps.is_finite), built.abstract.keys() & {"params", "ema", "extra"}
        waits = built.sources.waits or built.stream.waits
        data = opened.enter_context(closing(Ahead(built.stream, watcher))) if waits else built.stream
        fed = Fed(data, built.train_step.bound(programs.train.result()), console.say, advice(config.data))
        yield Parts(
            cadence=Cadence(config.train.steps, config.train.log_steps, cadences(config.eval, config.train.eval_steps)),
            train_step=fed.train,
            evaluate=partial(_evaluate, built, config, programs, run, attempt, watcher),
            is_finite=lambda state: bool(is_finite({name: state[name] for name in kept})),
            items=partial(_items, built, attempt),
            data=fed,
            epoch_steps=len(built.sources.train) / config.data.batch_size,
            saver=saver,
            last=config.ckpt.last,
            logger=logger,
            timing=timing.write,
            progress=console,
            ledger=attempt,
            time=grace,
        )


def _items(built: Built, attempt: AttemptLog, at: Reached, position: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds."""
    progress = {"position": position, "data": built.sources.fingerprint, "best": attempt.best}
    return {STATE: at.state, PROGRESS: {**progress, "owes_evaluation": at.owes}}


def _evaluate(
    built: Built,
    config: Config,
    programs: Programs,
    run: RunDir,
    attempt: AttemptLog,
    watcher: Watcher,
    state: State,
    step: int,
) -> dict[str, Values]:
    """The evaluations due at a step, with signs of life. A thread does them, for a stop does not wait for one."""

    def between() -> None:
        watcher.check()
        attempt.heartbeat.set_phase("eval")

    names = due(config.eval, config.train.eval_steps, step, config.train.steps)
    program = watcher.wait_for(programs.eval)
    work = partial(built.evaluator, names, state, program, run.path, f"media/{{}}/{step:08}", between)
    return watcher.wait_for(begin(work, "evaluation"))


def _jsonl(path: Path, until: CutPoint, attempt: int, console: Console) -> Jsonl:
    """A log, cut back to the restored step: what is logged from here on comes once."""
    cut(path, until, path.with_name(f"{path.stem}.cut-{attempt}.jsonl"))
    return Jsonl(path, console.say)


def _mirrors(config: Config, run: RunDir, attempt: AttemptLog, console: Console, until: CutPoint) -> list[Logger]:
    """The other sinks that can be had, each with every line that metrics.jsonl has."""
    mirrors: list[Logger] = [console]
    if config.log.tensorboard:
        mirrors += reached("tensorboard", partial(_tensorboard, run, attempt, until), console.say)
    if (option := config.log.wandb) is not None:
        mirrors += reached("wandb", partial(_wandb, config, option, run, attempt, console), console.say)
    return mirrors


def _tensorboard(run: RunDir, attempt: AttemptLog, until: CutPoint) -> Logger:
    from runner.log.tensorboard import TensorBoard

    return TensorBoard(run.tensorboard, run.metrics, until, f"cut-{attempt.number}.events")


def _wandb(config: Config, option: Wandb, run: RunDir, attempt: AttemptLog, console: Console) -> Logger:
    from runner.log import wandb

    # With another learning rate, or without a batch, steps that are done again come out different.
    lineage = f"{fingerprint(config.document)} {attempt.skipped}"
    identity = wandb.Identity(option.project, option.mode, run.path.name, config.document, lineage)
    return wandb.WandbLogger(run.wandb, run.metrics, identity, console.say)


def _checkpointer(
    config: Config, run: RunDir, attempt: AttemptLog, console: Console, timing: Jsonl, grace: Grace
) -> Checkpointer:
    background, verify = config.ckpt.write == "background", config.ckpt.verify
    policy = Policy(config.ckpt.save, config.retention, config.score, background, verify)

    def told(saved: Saved) -> None:
        stall, durable = round(saved.stall_seconds, 6), round(saved.durable_seconds, 6)
        event = {"step": saved.record.step, "event": "save", "stall": stall, "durable": durable}
        grace.learn(saved.durable_seconds)
        timing.write({**event, "bytes": saved.bytes, "reason": saved.record.reason})

    failures = Failures(*count_interruptions(run))
    return Checkpointer(run.checkpoints, policy, store, console.say, told, failures, attempt.heartbeat.set_writer_phase)
