"""The work of one attempt: build → compile while restoring → train → finish."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version

from data.data_errors import UnreadableError
from data.sources import Sources
from runner import hosts
from runner.checkpoint.quarantine import set_newer_aside
from runner.checkpoint.record import find_best, list_records, newest_durable_step
from runner.config import user_code
from runner.config.evaluations import ExternalEvaluation, MetricsEvaluation
from runner.config.metric_names import check_metric_names, warn_of_worst_as_best
from runner.config.remat_policies import AutoRemat, RematPolicy
from runner.config.schema import Config
from runner.errors import STOPPED, DivergedError, HoldfastError, StorageError
from runner.hosts.group import Lead
from runner.hosts.options import Place
from runner.preempt.stop import Stopped, run_in_thread
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.readme import write_readme
from runner.session.moved_devices import describe_move
from runner.session.resume import read_exactly, restore_or_begin
from runner.train import broken_data, dataset
from runner.train.assemble import open_parts
from runner.train.build import build
from runner.train.built import Built, describe_hardware, describe_run
from runner.train.compile import CompiledPrograms, start_compiling
from runner.train.compile_cache import enable_compile_cache
from runner.train.evaluator import EvaluationRun
from runner.train.local_state import bring_here
from runner.train.loop import Progress, name_numbers, train
from runner.train.moved_data import read_moved_data
from runner.train.own_tokenizer import keep_tokenizer, read_with_own_tokenizer
from runner.train.run_context import RunContext
from runner.train.teacher import check_same_teacher, pin_teacher
from runner.types import State
from runner.values import Outcome

# What an attempt knows about itself that may change what a step of a program computes.
DECIDES_TRACE = ("external", "drift", "packages", "python", "code", "hardware")


def run_attempt(context: RunContext, gc_threshold: tuple[int, int, int]) -> tuple[Outcome, str]:
    """Train until the run is finished or stopped. Return the outcome, and why it was stopped.

    `gc_threshold`: how often Python looks for garbage while it trains.
    """
    config, run_dir, attempt = context.config, context.run_dir, context.attempt
    console, stop_flag = context.console, context.stop_flag
    try:
        if context.place is not None:
            _meet_others(context, context.place)
        if context.steps_back:
            _step_back(context)
        cache = enable_compile_cache(config.compile_cache, console.say)
        context, built = _build_and_tell(context)
        config = context.config
        built, remat = _resolve_remat(context, built)
        programs = start_compiling(built, config, remat, attempt, cache)
        # Once; and once more after each rollback: a batch on which the loss was not finite is skipped from then on.
        reached, early, moved = None, "", None
        while reached is None:
            stop_flag.raise_if_stopped()
            built.stream.skip(hosts.agree("skipped", [skipped["batch"] for skipped in attempt.status.skipped]))
            with attempt.time_in("restore"):
                start, best = stop_flag.wait_for(run_in_thread(partial(restore_or_begin, context, built), "restore"))
            with attempt.time_in("compile"):
                stop_flag.wait_for(programs.train)
                # All devices at once: those of a process that still compiles would be given up by the others.
                hosts.barrier("training is compiled")
            attempt.begin_training(start.step, best, describe_hardware(built))
            # What was killed has its line by now. Once: after a rollback it would be the same.
            if moved is None:
                moved = _describe_move(context, built) if start.step else ""
                if moved:
                    console.say(moved)
            write_readme(run_dir)
            try:
                with attempt.time_in("finish"), ExitStack() as opened:
                    with attempt.time_in("startup"):
                        parts = opened.enter_context(open_parts(context, built, programs, start))
                        console.begin(start.step, config.train.num_steps)
                    # What garbage training holds may be large: look for it as often as usual.
                    gc.set_threshold(*gc_threshold)
                    stop_flag.begin_training()
                    with attempt.time_in("step"):
                        reached = train(parts, start, stop_flag)
                    saver = parts.saving.saver
                    if not hosts.agree(
                        "durable", not config.ckpt.last or not reached.step or saver.holds(reached.step)
                    ):
                        why = f": {saver.trouble}" if saver.trouble else ""
                        raise StorageError(
                            f"step {reached.step} could not be made durable in {run_dir}{why}; "
                            "mend that (free space?), then run the same command"
                        )
                    attempt.note(reached.step, {}, saver.newest)
                    early = parts.end_rule.reason if reached.step < config.train.num_steps else ""
            except DivergedError as error:
                _roll_back(context, built, error)
            except UnreadableError as error:
                broken_data.remember_broken(run_dir, built.sources, error)
                raise HoldfastError(f"{broken_data.DATA_BROKE}: {error}; what was saved stands") from error
            finally:
                console.close()
        if reached.owes or (reached.step < config.train.num_steps and not early):
            return _tell_stopped(context, ""), stop_flag.reason or ""
        with attempt.time_in("finish"):
            _finish(context, built, programs, reached)
    except Stopped as stop:
        # Before training began, too late to save, or after the last step: what was durable is what there is.
        return _tell_stopped(context, str(stop)), stop_flag.reason or ""
    if early:
        attempt.status.set_stopped_early()
        console.say(f"stopped early at step {reached.step} of {config.train.num_steps}: {early}")
    return _tell_complete(context, reached.step), early


def _meet_others(context: RunContext, place: Place) -> None:
    """Wait for every process of the run, and have jax join their devices.

    Raises:
        LostProcessError: one did not come in time.
        ConfigError: one of them runs another configuration, or another version.
    """
    group, patience = hosts.current_group(), context.config.hosts
    if isinstance(group, Lead):
        with context.attempt.time_in("startup"):
            group.wait_for_all(context.console.say, context.stop_flag.raise_if_stopped)
    hosts.barrier("all are there")
    # jax is imported here, and not before it is known that all are there.
    from runner.hosts.service import connect_devices

    connect_devices(place, patience.join_seconds)


def _describe_move(context: RunContext, built: Built) -> str:
    """Return a line where what computes this run is not what computed it before; else nothing."""
    return describe_move(
        read_attempts(context.run_dir),
        describe_hardware(built),
        version("jaxlib"),
        in_parts=context.config.train.parts is not None,
    )


def _build_and_tell(context: RunContext) -> tuple[RunContext, Built]:
    """Build the parts of a run, and tell a person what it is; return them, and the context with its number of steps.

    Raises:
        ConfigError: something of the configuration does not go with the data, or with the user's own code.
        RefusedError: the data is not what the run was trained on.
    """
    context = replace(context, config=pin_teacher(context.config, context.run_dir))
    config, run_dir, say = context.config, context.run_dir, context.console.say
    user_code.import_targets(config, for_training=True)
    # Its text is read with the tokenizer that lies in the run; the run's configuration names where that came from.
    reading = keep_tokenizer(config, run_dir)
    sources = read_moved_data(reading, run_dir) or dataset.read_as_before(reading.data, run_dir)
    if config.train.epochs is not None:
        # Before anything is built: how long the run is decides its learning rates.
        sources = sources or _read_sources(reading)
        context = _resolve_epochs(context, len(sources.train))
        config = context.config
    built = build(replace(config, data=reading.data), sources)
    built.evaluator.check_splits()
    check_metric_names(config, built.evaluator.list_metric_names(built.measures))
    if built.traced:
        _compare_traces(context, built)
    if built.teacher is not None:
        context.attempt.record(teacher=check_same_teacher(built.teacher, run_dir))
        say(f"teacher: {built.teacher.source.name}")
    for line in dataset.record_or_compare(run_dir, built.sources):
        say(line)
    broken_data.watch_skipped(run_dir, built.sources, say)
    broken_data.look_at_examples(run_dir, built.sources)
    say(" · ".join(filter(None, [describe_run(built, config), built.evaluator.describe_samples()])))
    for line in [*(f"warning: {warning}" for warning in built.warnings), *warn_of_worst_as_best(config)]:
        say(line)
    return context, built


def _compare_traces(context: RunContext, built: Built) -> None:
    """Warn where the step of a program computes something else than in the attempt before, and nothing says why.

    Its files, its options and the versions are the same, so it read what differs from process to process.
    """
    attempt = context.attempt
    attempt.record(traced=built.traced, hardware=describe_hardware(built))
    before = next((line for line in reversed(read_attempts(context.run_dir)) if "traced" in line), None)
    if before is None or before["traced"] == built.traced:
        return
    if any(before.get(name) != attempt.facts.get(name) for name in DECIDES_TRACE):
        return
    context.console.say(
        f"warning: step computes something else than in attempt {before['attempt']}, though no file and no option of "
        "it has changed: it reads what differs from process to process (a hash of text, a file, the environment, the "
        "clock); what goes on is not what was interrupted"
    )


def _read_sources(config: Config) -> Sources:
    """Read the data before anything is built. Raises ConfigError where it, or the user's own code, does not fit."""
    user_code.import_targets(config)
    with user_code.as_config_error("data", getattr(config.data, "target", None)):
        return dataset.read_sources(config.data)


def _resolve_epochs(context: RunContext, num_examples: int) -> RunContext:
    """Return the context of a run of so many epochs with its number of steps, which its data says; tell it as well."""
    epochs, config = context.config.train.epochs, context.config.with_known_steps(num_examples)
    steps, batch = config.train.num_steps, config.data.batch_size
    context.attempt.status.set_steps(steps)
    context.console.say(f"train.epochs={epochs:g}: {steps:,} steps of {batch} of {num_examples:,} training examples")
    return replace(context, config=config)


def _step_back(context: RunContext) -> None:
    """Set the newest checkpoint aside where there is an older one: perhaps it is the state that makes training fail."""
    checkpoints, say = context.run_dir.checkpoints, context.console.say
    # What is here may have been lost with the machine that had it.
    for step in sorted(context.other_place.list_steps(), reverse=True)[:2]:
        context.other_place.bring(step)
    steps = [record.step for record in list_records(checkpoints) if not record.mark]
    if len(steps) > 1:
        say(f"training failed here several times: going back from step {steps[-1]} to step {steps[-2]}")
        set_newer_aside(checkpoints, context.run_dir.quarantine, steps[-2], say)
        context.other_place.set_newer_aside(steps[-2])
        context.attempt.record(stepped_back=steps[-1])


def _resolve_remat(context: RunContext, built: Built) -> tuple[Built, RematPolicy]:
    """Return the parts with what `remat=auto` stands for in this run. A stop does not wait for the answer."""
    config, attempt, console = context.config, context.attempt, context.console
    if not isinstance(config.remat, AutoRemat):
        return built, config.remat
    reading = read_with_own_tokenizer(config, context.run_dir)
    # The search is for those who ask for it: others do not wait for its import.
    from runner.remat.auto_choice import dump_choice, parse_choice, resolve_auto

    with attempt.time_in("compile"):
        show_life = partial(attempt.heartbeat.set_phase, "compile")
        search = partial(resolve_auto, config, built, context.run_dir.remat, console.say, show_life)
        if not hosts.is_lead():
            option = parse_choice(hosts.hear("remat")).option
            return build(replace(reading, remat=option), built.sources), option
        found = context.stop_flag.wait_for(run_in_thread(search, "remat"))
    attempt.record(remat=found.words)
    hosts.agree("remat", dump_choice(found))
    return build(replace(reading, remat=found.option), built.sources), found.option


def _roll_back(context: RunContext, built: Built, error: DivergedError) -> None:
    """Remember which batch to skip. Raises the error, complete, where that was done often enough."""
    attempt, allowed = context.attempt, context.config.train.max_rollbacks
    batch = built.stream.find_batch_number(error.position, error.behind)
    if len(attempt.status.skipped) >= allowed:
        way_out = "lower optim.lr" if context.config.program.kind == "none" else "lower what the program steps by"
        raise error.complete(
            f"batch {batch}; {len(attempt.status.skipped)} of {allowed} rollbacks are used up; the newest checkpoint "
            f"before it stands: {way_out}, or look at the data; train.max_rollbacks=N allows more"
        ) from error
    attempt.skip_batch(batch, error.step, str(error))
    context.console.say(
        f"warning: {error}: going back to the newest checkpoint before it, and skipping batch {batch} from now on"
    )


def _finish(context: RunContext, built: Built, programs: CompiledPrograms, reached: Progress) -> None:
    """Make of the final weights what a finished run shows. Raises Stopped where a stop is asked for before that."""
    say = context.console.say
    # Long done, unless the run is very short.
    if error := programs.counted.exception():
        say(f"warning: what a step needs is not written down: {type(error).__name__}: {error}")
    state = reached.state
    if context.config.train.final == "best":
        state = _end_on_best(context, built, programs, reached)
    state = bring_here(state)
    # A text is made by one process: the others would only make the same.
    if hosts.is_lead() and (text := built.evaluator.maker.sample_text(state)):
        say("a sample:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))


def _end_on_best(context: RunContext, built: Built, programs: CompiledPrograms, reached: Progress) -> State:
    """Return the state of the best checkpoint, proven and evaluated; else the last one, and say why."""
    config, checkpoints, say = context.config, context.run_dir.checkpoints, context.console.say
    context.other_place.bring_best([config.score])
    found_best, step, state = find_best(list_records(checkpoints), config.score), reached.step, reached.state
    best = hosts.agree("best", None if found_best is None else found_best.step)
    if best is None:
        say(f"warning: train.final=best: no checkpoint has a finite {config.score.metric}; ending on the last")
    else:
        step = best
        state = read_exactly(built, checkpoints / str(step))
        context.attempt.status.set_final_step(step)
    # What is due at the end alone was left for here: a test set is looked at once, with the weights that were chosen.
    numbers = MetricsEvaluation | ExternalEvaluation
    names = [name for name, one in config.eval.items() if isinstance(one, numbers) or one.steps == "last"]
    program = context.stop_flag.wait_for(programs.eval)
    hosts.barrier("evaluation is compiled")
    file, between = f"media/{{}}/{step:08}", partial(_show_life, context)
    how = EvaluationRun(program, context.run_dir.path, file, between, step, say, goes_on=True)
    found = built.evaluator(names, state, how)
    measured = name_numbers(found)
    context.attempt.status.set_final_metrics(measured)
    values = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    say(f"ends on the {'last' if best is None else 'best'} weights, of step {step}: {values}")
    return state


def _show_life(context: RunContext) -> None:
    context.stop_flag.raise_if_stopped()
    context.attempt.heartbeat.set_phase("finish")


def _tell_stopped(context: RunContext, trouble: str) -> Outcome:
    """Say what stands, and what is lost where there was no time to save or saving was not wanted."""
    config, attempt = context.config, context.attempt
    durable = newest_durable_step(context.run_dir.checkpoints)
    lost = attempt.count_lost_steps(durable)
    reasons = [trouble, "" if config.ckpt.last else "ckpt.last=false"]
    reason = f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""
    saved = f"checkpoint {durable} stands" if durable else "nothing is saved"
    fate = f"{saved}, {lost} steps are lost{reason}" if lost else "saved" if durable else "nothing to save yet"
    then = "goes on from here" if durable or not lost else "starts over"
    context.console.say(
        f"stopped by {context.stop_flag.reason} at step {durable + lost} of {config.train.num_steps}, {fate}; "
        f"the same command {then}"
    )
    best = attempt.status.best
    return Outcome("preempted", durable, best["value"] if best else None, STOPPED)


def _tell_complete(context: RunContext, step: int) -> Outcome:
    best = context.attempt.status.best
    score = f" · best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    context.console.say(
        f"finished {step} steps in {context.attempt.seconds:.0f} s{score}\n"
        f"everything is in {context.run_dir}; read its README.md"
    )
    return Outcome("finished", step, best["value"] if best else None, 0)
