"""Commands in this process, as a law runs thousands of them: what a verb does, and a start without its arrays."""

from __future__ import annotations

import functools
import io
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

# A command that takes longer waits for something that does not come: not a limit on speed.
HANG_SECONDS = 60


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code, None for a traceback; what it printed, and the traceback."""

    code: int | None
    out: str
    err: str
    seconds: float
    trace: str = ""


class HangError(Exception):
    """Raised where a command does not end."""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"did not end within {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_verb(*words: str) -> Ending:
    """Do in this process what `python -m runner` does with these words."""
    from runner.__main__ import main

    return _call(lambda: main(words))


def start_run(*words: str) -> Ending:
    """Do in this process what `python run.py` does, but for the arrays: the logs, the proofs and the records."""
    from runner.errors import HoldfastError
    from runner.session import experiment
    from runner.text import mask_lines

    def start() -> int:
        try:
            request = _compose(words, _read_config(Path(words[0].partition("=")[2])))
            return experiment.run(request.config, request.command.overrides, time.time()).exit_code
        except HoldfastError as error:
            print(mask_lines(f"error: {error}"), file=sys.stderr)
            return error.exit_code

    with _light_attempts():
        return _call(start)


def _read_config(run: Path) -> object:
    """Return what tells one config.yaml from another; what is no plain file is like no other."""
    path = run / "config.yaml"
    return path.read_bytes() if path.is_file() and not path.is_symlink() else object()


@functools.lru_cache(64)
def _compose(words: tuple[str, ...], document: object) -> Any:
    """Return the request of a command. Hydra takes longer than all the rest, and asks only what `document` says."""
    from runner.launch.compose import compose_run

    return compose_run(words)


def _call(command: Any) -> Ending:
    out, err, trace, code = io.StringIO(), io.StringIO(), "", None
    began = time.process_time()
    try:
        with redirect_stdout(out), redirect_stderr(err), _alarm():
            code = command()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # The innermost frame is what says most.
        trace = "".join(traceback.format_exception(error)[-4:])
    return Ending(code, out.getvalue(), err.getvalue(), time.process_time() - began, trace)


@contextmanager
def _light_attempts() -> Iterator[None]:
    """Have attempts do all that they do with files, and compute nothing."""
    import runner.session.attempt as module

    before = module.run_attempt
    module.run_attempt = _attempt_lightly
    try:
        yield
    finally:
        module.run_attempt = before


def _attempt_lightly(context: Any, gc_threshold: Any) -> Any:
    from runner.checkpoint.record import newest_durable_step, read_saved_position
    from runner.checkpoint.restore import restore_newest
    from runner.log.fanout import open_sinks
    from runner.log.sinks import CutPoint, SinkContext
    from runner.train import dataset
    from runner.values import Outcome

    run_dir, attempt, say = context.run_dir, context.attempt, context.console.say
    dataset.record_or_compare(run_dir, dataset.read_sources(context.config.data))
    found = restore_newest(run_dir.checkpoints, run_dir.quarantine, read_saved_position, say)
    step, best = (found[0].step, found[1].best) if found else (0, None)
    attempt.begin_training(step, best, "1 × cpu")
    logs = SinkContext(run_dir.metrics, CutPoint(step), attempt.number, context.config.document, "lineage", say)
    sinks = open_sinks(context.config.log, logs, context.console)
    context.console.begin(step, context.config.train.steps)
    sinks.log(step + 1, "train", {"loss": 1.0})
    attempt.note(step + 1, {"eval/loss": 1.0}, step)
    sinks.flush()
    sinks.close()
    context.console.say(f"stopped at step {step}")
    assert newest_durable_step(run_dir.checkpoints) == step
    return Outcome("preempted", step, None, 75), "the law"
