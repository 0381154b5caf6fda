"""Call Holdfast from Python: `run` and `sweep` do what the command does, in a process of its own, and wait for it.

A process of its own, because jax keeps state: the memory of a GPU, the size of its thread pool, settings, caches. So a
run computes the same bits whatever the notebook has done before, and a notebook that dies takes no checkpoint with it.
No jax.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from runner import files
from runner.errors import CRASHED, STOPPED, ConfigError, DivergedError
from runner.installation import find_run_program
from runner.launch.child_process import describe_signal
from runner.launch.parent_report import describe_report
from runner.notebook.run_result import RunError, RunResult
from runner.preempt.signals import ECHO_SECONDS
from runner.rundir.layout import RunDir
from runner.rundir.numerics import SET_BY_RUN, THREADS
from runner.types import JsonObject
from runner.values import Ending

# Not from the modules that have them as well: these import Hydra, which a notebook does not wait for.
SWEEP_FLAGS = ("-m", "--multirun")
INTERRUPTED = 128 + signal.SIGINT
# How often it is looked whether the process has ended, though others still hold the pipe.
POLL_MILLISECONDS = 200
# A process that was told twice to stop leaves at once; after so long it is killed.
LEAVE_SECONDS = 5.0
# So many of the last lines are kept to tell of a crash.
TAIL_LINES = 200
SHOWN_TAIL_LINES = 20


def run(overrides: str | Sequence[str] = (), *, cwd: str | Path | None = None, show: bool = True) -> RunResult:
    """Work on one run until it is finished or stopped, as `python run.py` does with these words.

        from holdfast import run
        result = run(["model=mlp", "data=digits"])

    Returns what came of it. Called again it goes on, and when it is finished it returns at once. An interrupt (the
    square in a notebook, Ctrl-C) has the run save and stop; a second one leaves it at once.

    Args:
        overrides: the words, or one text that is split as a shell does.
        cwd: the directory that it is typed in; None: this process's.
        show: whether its lines are printed as they come; logs/run.log has them in any case.

    Raises:
        RunError: it was refused, crashed, diverged or was killed.
        KeyboardInterrupt: interrupted twice, or before there was anything to save.
    """
    words = _read_words(overrides)
    if found := [word for word in words if word in SWEEP_FLAGS]:
        raise RunError(f"run: {found[0]}: is for many runs; call sweep(…)", ConfigError.exit_code)
    call = _work_in_child(words, cwd, show=show)
    _raise_refusal(call)
    results, whys = _read_results(call)
    if len(results) != 1:
        what = f"worked on {len(results)} runs, as a sweep does; call sweep(…)" if results else _describe_silence(call)
        raise RunError(f"run: {what}", call.code, None, results)
    if results[0].ending in ("failed", "diverged"):
        raise RunError(_explain_failure(call, whys[0]), call.code, _find_directory(results), results)
    return results[0]


def sweep(overrides: str | Sequence[str], *, cwd: str | Path | None = None, show: bool = True) -> list[RunResult]:
    """Work on every run of a sweep or a search, as `python run.py -m` does; return what came of each, in its order.

        from holdfast import sweep
        results = sweep(["model=mlp", "data=digits", "seed=0,1"])

    Args:
        overrides: the words, or one text that is split as a shell does; `-m` may be left out.
        cwd: the directory that it is typed in; None: this process's.
        show: whether its lines are printed as they come.

    Raises:
        RunError: the sweep was refused, or some of its runs failed, which stops no other: `results` has them all.
        KeyboardInterrupt: interrupted twice, or before there was anything to save.
    """
    words = _read_words(overrides)
    call = _work_in_child(words if set(words) & set(SWEEP_FLAGS) else [SWEEP_FLAGS[0], *words], cwd, show=show)
    runs = call.report.get("runs", [])
    if not runs or call.report.get("error"):
        _raise_refusal(call)
    results, whys = _read_results(call)
    if not results:
        raise RunError(f"sweep: {_describe_silence(call)}", call.code)
    failed = [number for number, result in enumerate(results) if result.ending in ("failed", "diverged")]
    if failed or call.code not in (0, STOPPED):
        names = [f"{runs[number].get('name') or results[number]}: {whys[number]}" for number in failed]
        # Whoever worked on the sweep died itself, or a search learnt nothing.
        names = names or [_explain_failure(call, "")]
        message = f"{len(failed)} of {len(results)} runs failed: {'; '.join(names)}" if failed else names[0]
        raise RunError(message, call.code, _find_directory([results[number] for number in failed]), results)
    return results


@dataclass
class _Call:
    """One process that works for a caller, and what is known of it.

    Attributes:
        code: its exit code; -N where signal N killed it.
        report: what it said of its runs (runner/launch/parent_report.py).
        tail: the last lines it printed.
        asked: how often it was asked to stop.
        asked_at: when, on the monotonic clock.
    """

    code: int = 0
    report: JsonObject = field(default_factory=dict)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    asked: int = 0
    asked_at: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    def ask_to_stop(self) -> None:
        """Ask it to save and stop. Raises KeyboardInterrupt the second time, for then it leaves without saving."""
        # As the process itself hears it: what comes so fast is one request.
        if self.asked and time.monotonic() - self.asked_at < ECHO_SECONDS:
            return
        self.asked += 1
        self.asked_at = time.monotonic()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        if self.asked > 1:
            raise KeyboardInterrupt

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT in this process."""
        self.ask_to_stop()


def _read_words(overrides: str | Sequence[str]) -> list[str]:
    """Return the words of a call. Raises RunError where they are none that a command could have."""
    try:
        words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    except ValueError as error:
        raise RunError(f"got {overrides!r}: {error}; expected words as in a shell, or a list", 2) from None
    for word in words:
        if not isinstance(word, str) or "\0" in word:
            what = "a NUL" if isinstance(word, str) else type(word).__name__
            raise RunError(f"{word!r}: got {what}; expected words such as 'seed=1'", ConfigError.exit_code)
    return words


def _work_in_child(words: Sequence[str], cwd: str | Path | None, *, show: bool) -> _Call:
    """Start the process, show what it prints, and wait for its end."""
    call = _Call()
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder, _interrupts_ask(call):
        report = Path(folder).resolve() / "report.json"
        call.process = _start_process([sys.executable, *find_run_program(), *words], cwd, describe_report(report))
        try:
            # The signal may have come while it was started.
            if call.asked:
                call.process.send_signal(signal.SIGINT)
            _follow_output(call, show=show)
            call.code = call.process.wait()
        except BaseException:
            _abandon_process(call.process, call.asked)
            raise
        finally:
            # Whom it has started may write on: nobody listens.
            if call.process.stdout:
                call.process.stdout.close()
        call.report = files.read_json_object(report) or {}
    if call.asked and call.code in (INTERRUPTED, -signal.SIGINT):
        # It had nothing to save yet.
        raise KeyboardInterrupt
    return call


def _start_process(
    command: Sequence[str], cwd: str | Path | None, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a command in a group of its own, with both its streams in one pipe. Raises RunError where it cannot."""
    environment = dict(os.environ)
    # What a run of this very process has chosen for XLA is no wish of its user's.
    if environment.get(THREADS) == environment.get(SET_BY_RUN):
        environment.pop(THREADS, None)
    environment.pop(SET_BY_RUN, None)
    # A notebook's way to draw into its cells: the process has none.
    if environment.get("MPLBACKEND", "").startswith("module://"):
        del environment["MPLBACKEND"]
    # Lines come when they are printed, those of both streams in order.
    environment.setdefault("PYTHONUNBUFFERED", "1")
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            # So that a signal to our group (a kernel's interrupt) reaches it from us, and not a second time by itself.
            # No preexec_fn: then nothing of Python runs between fork and exec, and threads of jax here do no harm.
            process_group=0,
        )
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        where = f"cwd={str(cwd)!r}: " if cwd is not None else ""
        raise RunError(f"{where}the run's process cannot be started: {why}", ConfigError.exit_code) from None


@contextmanager
def _interrupts_ask(call: _Call) -> Iterator[None]:
    """Have an interrupt ask for a stop while the context lasts, where it comes to this thread and is not ignored."""
    earlier = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(earlier):
        yield
        return
    signal.signal(signal.SIGINT, call.on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _follow_output(call: _Call, *, show: bool) -> None:
    """Show what the process prints, whole lines as they come, until it has ended."""
    assert call.process is not None
    assert call.process.stdout is not None
    poller = select.poll()
    poller.register(call.process.stdout, select.POLLIN | select.POLLHUP)
    rest = b""
    while True:
        try:
            if poller.poll(POLL_MILLISECONDS):
                chunk = os.read(call.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                # A progress bar ends its lines with a carriage return.
                end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) + 1
                if end:
                    _show_text(call, rest + chunk[:end], show=show)
                    rest = b""
                rest += chunk[end:]
            # Whom it has started may hold the pipe still.
            elif call.process.poll() is not None:
                break
        except KeyboardInterrupt:
            # Of a second request, or raised in a thread by somebody.
            if call.asked > 1:
                raise
            call.ask_to_stop()
    _show_text(call, rest, show=show)


def _show_text(call: _Call, content: bytes, *, show: bool) -> None:
    """Print what came, and keep the end of it."""
    text = content.decode(errors="replace")
    call.tail.extend(text.splitlines())
    # Where it cannot be shown (a notebook that is closed) the run goes on.
    with suppress(OSError, ValueError, AttributeError):
        if show and text:
            sys.stdout.write(text)
            sys.stdout.flush()


def _abandon_process(process: subprocess.Popen[bytes], asked: int) -> None:
    """Have a process leave whose caller leaves before its end."""
    # Not because of an interrupt: it is asked once, and saves if it can in this time.
    if not asked and process.poll() is None:
        process.terminate()
    try:
        process.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read_results(call: _Call) -> tuple[list[RunResult], list[str]]:
    """Return how each run of a call stands, and why; what its process could not say any more is read from its files."""
    results, whys = [], []
    for run in call.report.get("runs", []):
        directory = Path(run["directory"])
        status: dict[str, Any] = RunDir(directory).read_status()
        step = status.get("step", 0) if run["step"] is None or run["ending"] is None else run["step"]
        score = files.parse_nonfinite(run["score"])
        if run["ending"] is None:
            score = status.get("score")
        stopped = call.code == STOPPED and run["ending"] is None
        # A run that was not begun, because its sweep was to stop, is begun by the next call.
        diverged = call.code == DivergedError.exit_code
        ending: Ending = run["ending"] or ("preempted" if stopped else "diverged" if diverged else "failed")
        code = call.code if run["exit_code"] is None else run["exit_code"]
        results.append(RunResult(directory, ending, step, score, code))
        why = run["why"] or (status.get("why") if code == CRASHED else "")
        whys.append(why or f"its process {_describe_end(code)}")
    return results, whys


def _raise_refusal(call: _Call) -> None:
    """Raise RunError where the process has ended with an error of its own, in a plain line."""
    if message := call.report.get("error"):
        results, _ = _read_results(call)
        there = [result for result in results if result.directory.is_dir()]
        raise RunError(message, call.code, _find_directory(there), there)
    if not call.report.get("runs") and call.code != 0:
        raise RunError(_explain_failure(call, ""), call.code)


def _explain_failure(call: _Call, why: str) -> str:
    """Return why a process failed: the end of the traceback it printed, or the signal that killed it."""
    if call.code < 0:
        return f"the run's process {_describe_end(call.code)}; call it again to go on"
    if call.code != CRASHED:
        return why or next(reversed(call.tail), "") or _describe_end(call.code)
    lines = list(call.tail)
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    shown = lines[begins[-1] if begins else 0 :][-SHOWN_TAIL_LINES:]
    # Below a traceback jax prints a note of its own: what was raised must not be lost before it.
    if why and not any(why.partition("\n")[0] in line for line in shown):
        shown.append(why)
    return "\n".join(shown) or _describe_end(call.code)


def _describe_silence(call: _Call) -> str:
    """Return what is to be said where a process ended well and reported no run."""
    said = "only printed something" if call.tail else "said nothing"
    return f"the command {said}, and worked on no run"


def _describe_end(code: int) -> str:
    return f"was killed by {describe_signal(-code)}" if code < 0 else f"ended with exit code {code}"


def _find_directory(results: Sequence[RunResult]) -> Path | None:
    return results[0].directory if results else None
