"""Goodput under a replayed trace of ten preemptions, for three strategies of saving.

    python -m tests.bench.goodput [--steps 200] [--strategies periodic,async,adaptive]

The default experiment, shortened. First it runs uninterrupted; then each strategy goes through the same trace: at these
fractions of the uninterrupted wall-clock, counted while an attempt runs, it is sent SIGKILL (the machine is gone) or
SIGTERM (thirty seconds of notice), and started again two seconds later. Where a run is finished before the trace is,
the rest of the trace is not used. What is printed is what `python -m runner goodput` says. About six minutes on two
quiet cores; once each, so differences of a few per cent say nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runner.inspect.goodput_table import read_account
from runner.inspect.time_account import TimeAccount
from runner.rundir import heartbeat
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir

REPO = Path(__file__).resolve().parents[2]
# when (the uninterrupted wall-clock is 1, start-up included), and how; drawn once, for ever the same
TRACE = (
    *((0.16, signal.SIGKILL), (0.11, signal.SIGTERM), (0.20, signal.SIGKILL), (0.09, signal.SIGKILL)),
    *((0.14, signal.SIGTERM), (0.17, signal.SIGKILL), (0.10, signal.SIGTERM), (0.13, signal.SIGKILL)),
    *((0.18, signal.SIGKILL), (0.12, signal.SIGTERM)),
)
PAUSE_SECONDS = 2.0
PERIOD = 0.1  # of the steps between two saves, where a strategy saves by the step
SHORT = ("train.eval_steps=100", "train.eval_batches=10", "log.tensorboard=false")


def words(strategy: str, steps: int, cache: Path) -> list[str]:
    period = [] if strategy == "adaptive" else [f"ckpt.save.periodic.steps={round(steps * PERIOD)}"]
    return [f"train.steps={steps}", *SHORT, f"ckpt={strategy}", *period, f"compile_cache={cache}", f"name={strategy}"]


def start(home: Path, words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(REPO / "run.py"), *words]
    return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def warm(home: Path, words: list[str]) -> None:
    """Fill the compile cache: a run of the same programs, stopped as soon as it trains."""
    process = start(home, words)
    while not any((beat := heartbeat.read_heartbeat(path)) and beat.step for path in home.glob("outputs/*/*/.pulse")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def replay(home: Path, words: list[str], clock: float) -> tuple[RunDir, int]:
    """Go through the trace until the run is finished. Gives the run, and how many of the preemptions landed."""
    landed = 0
    for length, number in TRACE:
        process = start(home, words)
        try:
            process.wait(timeout=length * clock)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        code = process.wait()
        if code == 0:
            break
        assert code in (-signal.SIGKILL, 75), code
        landed += 1
        time.sleep(PAUSE_SECONDS)
    assert start(home, words).wait() == 0
    (config,) = home.glob(f"outputs/{words[-1].partition('=')[2]}/*/config.yaml")
    return RunDir(config.parent), landed


def told(name: str, account: TimeAccount, run: RunDir, landed: int) -> str:
    buckets, lines = account.buckets, read_attempts(run)
    starts = [line["first_step_seconds"] for line in lines[1:] if "first_step_seconds" in line]
    shares = [account.goodput, account.goodput_running]
    seconds = [buckets[name] / 1000 for name in ("lost", "save", "eval", "down")]
    return (
        f"{name:<14}"
        + "".join(f"{100 * share:>8.1f} %" for share in shares)
        + f"{account.clock / 1000:>9.1f}{landed:>8}{account.lost_steps:>8}"
        + "".join(f"{value:>8.1f}" for value in seconds)
        + (f"{statistics.median(starts):>9.2f}" if starts else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strategies", default="periodic,async,adaptive")
    arguments = parser.parse_args()
    head = ("goodput", "running", "seconds", "kills", "lost", "lost s", "save s", "eval s", "down s", "restart s")
    widths = (10, 10, 9, 8, 8, 8, 8, 8, 8, 10)
    print(" " * 14 + "".join(f"{word:>{width}}" for word, width in zip(head, widths, strict=True)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        alone = words("async", arguments.steps, home / "cache")
        warm(home, [*alone[:-1], "name=warm"])
        began = time.time()
        assert start(home, [*alone[:-1], "name=uninterrupted"]).wait() == 0
        clock = time.time() - began
        (config,) = home.glob("outputs/uninterrupted/*/config.yaml")
        run = RunDir(config.parent)
        print(told("uninterrupted", read_account(run), run, 0), flush=True)
        for strategy in arguments.strategies.split(","):
            run, landed = replay(home, words(strategy, arguments.steps, home / "cache"), clock)
            print(told(strategy, read_account(run), run, landed), flush=True)


if __name__ == "__main__":
    main()
