"""How long a restart takes: from the start of the process until the first new step is complete, in seconds.

    python -m tests.bench.restart [--rounds 9] [--models gpt,mlp] [--code FOLDER]

    warm   `python run.py …` in a run that was preempted, its programs in the compile cache
    off    the same with compile_cache=off
    bare   a script by hand (tests/bench/bare_restart.py): the same model on the same data, plain Orbax, a warm cache
    batch  the same script, with a stored batch in place of reading the data

Ours is seen from outside: its pulse says when the first step after the restored one was complete; then it is killed.
A round runs each once, one after the other; the ratios are medians over the rounds, for the machine is shared. Others
only ever add to a time: `best` is the shortest of the rounds, which is nearest to a machine of one's own. `cpu` is what
the processor did (the process until it was killed, which for ours is a step or so later). With --code another checkout
is measured as well, in the same rounds: before and after.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.rundir import heartbeat

REPO = Path(__file__).resolve().parents[2]
BARE = REPO / "tests/bench/bare_restart.py"
MODELS = {"gpt": (), "mlp": ("model=mlp", "data=digits")}  # the default experiment, and the small one
FIRST_STEP, POLL_SECONDS = 10, 0.002

Cost = tuple[float, float]  # seconds by the wall, and by the processor


def prepare(folder: Path, words: Sequence[str]) -> Path:
    """A run that was preempted after a few steps."""
    home = folder / "prepared"
    home.mkdir(parents=True)
    process = _start(REPO, home, words)
    while _step(home) < FIRST_STEP:
        if process.poll() is not None:
            sys.exit("the run to be restarted did not come to training")
        time.sleep(POLL_SECONDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.returncode
    return home


def ours(code: Path, home: Path, words: Sequence[str]) -> Cost:
    """A restart of a copy of the run."""
    copy = home.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy, symlinks=True)
    (path,) = copy.glob("outputs/*/*/.pulse")
    path.unlink()
    restored = max(int(found.name) for found in copy.glob("outputs/*/*/checkpoints/[0-9]*"))
    began = time.time()
    process = _start(code, copy, words)
    while (beat := heartbeat.read_heartbeat(path)) is None or beat.step <= restored:
        if process.poll() is not None:
            sys.exit(f"ended before its first step: {words}")
        time.sleep(POLL_SECONDS)
    process.kill()
    return beat.changed - began, _processor(process)


def bare(kind: str, folder: Path, *extra: str) -> Cost:
    """A restart by hand."""
    began = time.time()
    process = subprocess.Popen([sys.executable, BARE, "go", kind, folder, *extra], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    complete = float(process.stdout.readline())
    process.kill()
    return complete - began, _processor(process)


def _start(code: Path, home: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, str(code / "run.py"), *words]
    return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _step(home: Path) -> int:
    return max(
        (beat.step for path in home.glob("outputs/*/*/.pulse") if (beat := heartbeat.read_heartbeat(path))), default=0
    )


def _processor(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> float:
    """User and system seconds of a process that was killed."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    return used.ru_utime + used.ru_stime


def measure(kind: str, folder: Path, rounds: int, other: Path | None) -> None:
    cache = f"compile_cache={folder / 'cache'}"
    words = (*MODELS[kind], cache)
    home, by_hand = prepare(folder, words), folder / "bare"
    subprocess.run([sys.executable, BARE, "save", kind, by_hand], check=True, stdout=subprocess.DEVNULL)
    ways: dict[str, Callable[[], Cost]] = {
        "warm": lambda: ours(REPO, home, words),
        **({"before": lambda: ours(other, home, words)} if other else {}),
        "off": lambda: ours(REPO, home, (*MODELS[kind], "compile_cache=off")),
        "bare": lambda: bare(kind, by_hand),
        "batch": lambda: bare(kind, by_hand, "batch"),
    }
    for name, way in ways.items():
        if name != "off":
            way()  # fills caches
    costs = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    for name in ways:
        line = f"{kind:<6}{name:<8}"
        ratios = sorted(cost["warm"][0] / cost[name][0] for cost in costs)
        line += f"{statistics.median(cost[name][0] for cost in costs):>9.2f}"
        line += f"{statistics.median(ratios):>9.2f}{f'[{ratios[0]:.2f} - {ratios[-1]:.2f}]':>16}"
        for which in (0, 1):
            best, own = (min(cost[way][which] for cost in costs) for way in (name, "warm"))
            line += f"{best:>10.2f}{own / best:>9.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--code", type=Path)
    arguments = parser.parse_args()
    columns = f"{'best':>10}{'warm ÷':>9}{'best cpu':>10}{'warm ÷':>9}"
    print(f"{'':<14}{'seconds':>9}{'warm ÷':>9}{'[min - max]':>16}{columns}", flush=True)
    for kind in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            other = arguments.code.resolve() if arguments.code else None
            measure(kind, Path(folder), arguments.rounds, other)


if __name__ == "__main__":
    main()
