"""Open everything that the loop works with: data, logs, checkpointer.

Building (build.py) is pure; this touches files and starts threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from runner import hosts
from runner.checkpoint import store
from runner.checkpoint.checkpointer import (
    Checkpointer,
    SavedCheckpoint,
    SaveListeners,
    SavePolicy,
    warn_of_little_space,
)
from runner.checkpoint.following_saver import FollowingSaver
from runner.checkpoint.frozen_base import with_digest
from runner.checkpoint.record import PROGRESS, STATE, Score, list_records, newest_save_seconds
from runner.checkpoint.retention import KeepBest
from runner.checkpoint.shards import SharedStore
from runner.checkpoint.strategy import Failures, NewBest
from runner.config.evaluations import find_cadences, find_due_evaluations
from runner.config.identity import hash_config
from runner.config.metric_names import list_choosable
from runner.config.schema import Config
from runner.log.fanout import open_sinks
from runner.log.jsonl import JsonLinesFile, open_json_lines
from runner.log.sinks import CutPoint, LogDigest, SinkContext
from runner.mesh import is_local
from runner.preempt.deadline import SaveBudget
from runner.preempt.stop import run_in_thread
from runner.profiling.step_profiler import NoProfiler, StepProfiler, Surroundings
from runner.rundir.attempt_lines import count_interruptions
from runner.rundir.attempt_log import AttemptLog
from runner.train.built import Built, count_saved_bytes, describe_hardware
from runner.train.compile import CompiledPrograms, TrainProgram
from runner.train.dataset import suggest_faster_data
from runner.train.early_stopper import EarlyStopper, EndRule, EndRules, UserStopper
from runner.train.evaluator import EvaluationRun
from runner.train.frozen_layers import leave_unchanged_out
from runner.train.loop import BatchStream, Cadence, CompiledStep, Evaluating, LoopParts, Outputs, Progress, Saving
from runner.train.prefetch import Prefetcher
from runner.train.run_context import RunContext
from runner.train.speed import SpeedMeter
from runner.train.starvation import StarvationMonitor
from runner.train.step import is_finite
from runner.train.step_work import describe_batch
from runner.types import Batch, CheckpointItems, JsonObject, Metrics, State
from runner.values import MetricValues


@contextmanager
def open_parts(context: RunContext, built: Built, programs: CompiledPrograms, start: Progress) -> Iterator[LoopParts]:
    """Open what the loop works with; close it in reverse, the checkpoints durable, whatever happens.

    Logs are cut back to where training goes on from: what it logs from here on comes once.
    """
    config, run_dir, attempt, say = context.config, context.run_dir, context.attempt, context.console.say
    sink_context = SinkContext(
        metrics=run_dir.metrics,
        cut_point=CutPoint(start.step, start.owes),
        attempt=attempt.number,
        document=config.document,
        # With another learning rate, or without a batch, steps that are done again come out different.
        lineage=f"{hash_config(config.document)} {attempt.status.skipped}",
        say=say,
        digests=_known_digests(run_dir.checkpoints, start.step),
        check_held=context.lock.check,
    )
    with ExitStack() as opened:
        # The workers that make batches end last: a save must not wait for that.
        opened.enter_context(closing(built.stream))
        timing = opened.enter_context(closing(open_json_lines(run_dir.timing, sink_context)))
        logger = opened.enter_context(closing(open_sinks(config.log, sink_context, context.console)))
        if warning := warn_of_little_space(
            run_dir.checkpoints, count_saved_bytes(built), config.retention, config.train.num_steps
        ):
            say(warning)
        # Rules that look back compare with the best checkpoint, wherever it was made.
        context.other_place.bring_best([config.score, *_list_scores(config)])
        context.other_place.begin()
        budget = SaveBudget(
            context.stop_flag,
            config.preempt.shortest_notice,
            say,
            newest_save_seconds(run_dir.checkpoints),
            lambda: context.other_place.upload_seconds,
        )
        saver = opened.enter_context(closing(_open_saver(context, timing, budget)))
        # A source or a stream that may make training wait is read one batch ahead, in a thread.
        data: BatchStream | Prefetcher = built.stream
        if built.sources.waits or built.stream.waits:
            data = opened.enter_context(closing(Prefetcher(built.stream, context.stop_flag)))
        due = DueEvaluations(context, built, programs)
        meter = SpeedMeter(describe_batch(built, config), programs.counted, say, start.step)
        profiler = opened.enter_context(closing(_open_profiler(context, built, programs, meter, start.step)))
        yield LoopParts(
            cadence=Cadence(
                steps=config.train.num_steps,
                log_steps=config.train.log_steps,
                eval_steps=find_cadences(config.eval, config.train.eval_steps),
                epoch_steps=_count_epoch_steps(config, built),
                save_last=config.ckpt.last,
            ),
            step=CompiledStep(_feed_program(built, programs.train.result()), built.train_step.put_lr()),
            data=data,
            starvation=StarvationMonitor(say, suggest_faster_data(config.data)),
            evaluating=Evaluating(due.evaluate, FiniteCheck(built), due.evaluate_rest),
            saving=Saving(saver, partial(_checkpoint_items, built, attempt, start.base)),
            outputs=Outputs(logger, timing.write, context.console),
            log=attempt,
            deadline=budget,
            meter=meter,
            profiler=profiler,
            # Of the log that was cut back just now: what it holds is what an uninterrupted run would have measured.
            end_rule=_make_end_rule(context),
        )


def _open_profiler(
    context: RunContext, built: Built, programs: CompiledPrograms, meter: SpeedMeter, step: int
) -> StepProfiler | NoProfiler:
    """Return what traces some steps: process 0 of several, its own devices."""
    if not hosts.is_lead():
        return NoProfiler()

    @contextmanager
    def paused() -> Iterator[None]:
        with context.attempt.time_in("profile"), meter.pause():
            yield

    around = Surroundings(
        run_dir=context.run_dir,
        hardware=describe_hardware(built),
        say=context.console.say,
        text=lambda: programs.train.result().as_text() or "",
        paused=paused,
        clock=meter.read_clock,
        is_stopping=lambda: context.stop_flag.asked is not None,
    )
    return StepProfiler(context.config.profile, around, step, context.config.train.num_steps)


def _feed_program(built: Built, program: TrainProgram) -> Callable[[State, Batch, jax.Array], tuple[State, Metrics]]:
    """Return a compiled step that takes a batch as the stream gives it: with the rows that this process makes."""
    # Where all devices are its own, the program itself takes arrays of numpy, in less time than `put`.
    if is_local(built.mesh) and built.teacher is None:
        return program
    return lambda state, batch, lr: program(state, built.put(batch), lr)


def _count_epoch_steps(config: Config, built: Built) -> float:
    """Return how many steps one pass over the training data takes; infinity where there is no data."""
    return math.inf if config.data.kind == "none" else len(built.sources.train) / config.data.batch_size


def _list_scores(config: Config) -> list[Score]:
    """Return by what the rules of saving and of retention rank checkpoints."""
    rules = [*config.ckpt.save.values(), *config.retention.values()]
    return [Score(rule.metric, rule.mode) for rule in rules if isinstance(rule, NewBest | KeepBest)]


def _known_digests(checkpoints: Path, step: int) -> list[tuple[int, LogDigest]]:
    """Return what metrics.jsonl was at each saved step up to this one, oldest first."""
    return [(record.step, record.log) for record in list_records(checkpoints) if record.log and record.step <= step]


def _checkpoint_items(
    built: Built, attempt: AttemptLog, base: str, at: Progress, position: JsonObject
) -> CheckpointItems:
    """Return what a checkpoint holds: the train state, and where training is.

    What does not train is in a place of its own, of which the digest is `base`.
    """
    progress = {
        "position": position,
        "data": built.sources.fingerprint,
        "best": attempt.status.best,
        "owes_evaluation": at.owes,
    }
    return {STATE: leave_unchanged_out(at.state), PROGRESS: with_digest(progress, base)}


def _make_end_rule(context: RunContext) -> EndRule:
    """Return what ends training before its last step; the log must have been cut back."""
    config, metrics = context.config, context.run_dir.metrics
    if not hosts.is_lead():
        # Process 0 has the log, and says it.
        return EndRules()

    def find_due(step: int) -> list[str]:
        return find_due_evaluations(config.eval, config.train.eval_steps, step, config.train.num_steps)

    return EndRules(
        EarlyStopper(config.stop, config.score.mode, metrics),
        UserStopper(config.stop.rules, metrics, list_choosable(config.eval), find_due, context.console.say),
    )


class FiniteCheck:
    """Says whether the parameters of a state are finite, and what lasts beside them."""

    def __init__(self, built: Built):
        self._names = built.abstract.keys() & {"params", "ema", "extra", "weights", "rest"}
        self._is_finite = jax.jit(is_finite)

    def __call__(self, state: State) -> bool:
        """Return whether a state is finite; this waits for the step that computes it."""
        return bool(self._is_finite({name: state[name] for name in self._names}))


@dataclass(frozen=True)
class DueEvaluations:
    """Do the evaluations that are due at a step, with signs of life, in a thread: a stop does not wait for one."""

    context: RunContext
    built: Built
    programs: CompiledPrograms

    def evaluate(self, state: State, step: int) -> Mapping[str, MetricValues]:
        """Return what each that is due measured, by split. Raises Stopped where a stop is asked for before that."""
        return self._evaluate(self._find_due(step), state, step)

    def evaluate_rest(self, state: State, step: int) -> Mapping[str, MetricValues]:
        """Return what those measure that are due at the last step and were not at this one."""
        due, last = self._find_due(step), self._find_due(self.context.config.train.num_steps)
        return self._evaluate([name for name in last if name not in due], state, step)

    def _find_due(self, step: int) -> list[str]:
        train, evaluations = self.context.config.train, self.context.config.eval
        if train.final == "best":
            # What is measured at the end alone is measured of the weights that the run ends on, see attempt.py.
            evaluations = {name: option for name, option in evaluations.items() if option.steps != "last"}
        return find_due_evaluations(evaluations, train.eval_steps, step, train.num_steps)

    def _evaluate(self, names: list[str], state: State, step: int) -> Mapping[str, MetricValues]:
        if not names:
            return {}
        stop_flag = self.context.stop_flag
        program = stop_flag.wait_for(self.programs.eval)
        # Where one of several processes compiles for much longer, the others' devices would give up.
        hosts.barrier("evaluation is compiled")
        how = EvaluationRun(
            program,
            self.context.run_dir.path,
            f"media/{{}}/{step:08}",
            self._between_batches,
            step,
            self.context.console.say,
            goes_on=True,
        )
        work = partial(self.built.evaluator, names, state, how)
        return stop_flag.wait_for(run_in_thread(work, "evaluation"))

    def _between_batches(self) -> None:
        self.context.stop_flag.raise_if_stopped()
        self.context.attempt.heartbeat.set_phase("eval")


def _open_saver(context: RunContext, timing: JsonLinesFile, budget: SaveBudget) -> Checkpointer | FollowingSaver:
    config, run_dir = context.config, context.run_dir
    if not hosts.is_lead():
        return FollowingSaver(context.attempt.heartbeat.set_writer_phase)
    background, verify = config.ckpt.write == "background", config.ckpt.verify
    policy = SavePolicy(config.ckpt.save, config.retention, config.score, background, verify)

    def on_saved(saved: SavedCheckpoint) -> None:
        stall, durable = round(saved.stall_seconds, 6), round(saved.durable_seconds, 6)
        event = {"step": saved.record.step, "event": "save", "stall": stall, "durable": durable}
        budget.record_save(saved.durable_seconds)
        context.other_place.note_saved()
        timing.write({**event, "bytes": saved.bytes, "reason": saved.record.reason})

    failures = Failures(*count_interruptions(run_dir))
    on_phase = context.attempt.heartbeat.set_writer_phase
    listeners = SaveListeners(
        context.console.say, on_saved, on_phase, context.lock.prove, context.other_place.list_held_steps
    )
    how = store if hosts.is_alone() else SharedStore(verify)
    return Checkpointer(run_dir.checkpoints, policy, how, listeners, failures)
