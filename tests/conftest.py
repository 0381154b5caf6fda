"""What tests share: a way to start the door in a directory of its own, to kill it, and to compare what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner.launch.huge_pages import TUNABLES, WANTED, are_offered, are_wanted
from tests.slurm import Slurm, cluster, lacking

if TYPE_CHECKING:
    from runner.config.schema import Config

if TYPE_CHECKING:
    from tests.laws.faults import Begun, Forks

REPO = Path(__file__).resolve().parent.parent
# A run of a few seconds that has what is hard: dropout, several epochs of data, evaluations, saves that overlap.
SMALL = (
    *("data=text", "data.path=corpus.txt", "data.seq_len=16", "data.batch_size=8", "data.eval_fraction=0.2"),
    *("model.num_layers=2", "model.num_heads=2", "model.width=32", "model.hidden=64", "model.dropout=0.2"),
    *("train.steps=60", "train.log_steps=5", "train.eval_steps=10", "train.eval_batches=4", "log.tensorboard=false"),
)
QUICK: Any = {"xla_backend_optimization_level": 0}  # for jax.jit: half the time to compile, for what runs only once
# The same in the environment of a run that takes few steps, and whose bits nobody compares with another's.
QUICK_RUN = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
READ_LATE = frozenset({"XLA_FLAGS"})  # what jax reads when it first looks for devices, and not when it is imported
# As a run would have it, which then need not start once more: hundreds are started here.
if are_wanted(os.environ) and are_offered():
    os.environ[TUNABLES] = WANTED
HANG_SECONDS = 300  # a process that takes longer hangs: not a limit on speed


@dataclass(frozen=True)
class Door:
    """`python run.py` in a working directory of its own.

    Attributes:
        cwd: where it is typed.
        forks: what `run` forks it from where it needs no environment of its own; None: each is a new interpreter.
        quick: compile in half of the time, to other bits.
    """

    cwd: Path
    forks: Forks | None = None
    quick: bool = False

    def start_arguments(self, *overrides: str) -> list[str]:
        return [sys.executable, str(REPO / "run.py"), *overrides]

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.start_arguments(*overrides),
            cwd=self.cwd,
            env={**os.environ, **self._flags(environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def _flags(self, environment: dict[str, str]) -> dict[str, str]:
        if not self.quick:
            return environment
        both = " ".join(flags for flags in (QUICK_RUN["XLA_FLAGS"], environment.get("XLA_FLAGS")) if flags)
        return {**environment, "XLA_FLAGS": both}

    def run(self, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        if self.forks is not None and environment.keys() <= READ_LATE:
            return self.forks.run_here(self.cwd, *overrides, **self._flags(environment))
        process = self.start(*overrides, **environment)
        try:
            out, err = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(overrides, process.returncode, out, err)

    def kill_at(self, step: int, *overrides: str, number: int = signal.SIGKILL, delay: float = 0.0) -> str:
        """Start a run, send a signal `delay` seconds after it has logged `step`, and assert that it landed."""
        process: subprocess.Popen[str] | Begun = (
            self.start(*overrides)
            if self.forks is None
            else self.forks.begin_here(self.cwd, *overrides, **self._flags({}))
        )
        while last_logged(self.cwd) < step:
            assert process.poll() is None, f"ended before the kill: {process.communicate()}"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        out, err = process.communicate()
        expected = -number if number == signal.SIGKILL else 75
        assert process.returncode == expected, (process.returncode, out, err)
        return out + err

    @property
    def the_run(self) -> Path:
        """The only run below outputs/."""
        (config,) = self.cwd.glob("outputs/*/*/config.yaml")
        return config.parent

    def tree(self) -> set[str]:
        return {str(path.relative_to(self.cwd)) for path in self.cwd.rglob("*")}


def composed(*overrides: str) -> Config:
    """The configuration of a command line, from the real files of conf/, in this process."""
    import hydra

    from runner.config.schema import validate_config

    with hydra.initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return validate_config(hydra.compose("config", list(overrides)))


def last_logged(cwd: Path, run: str = "*") -> int:
    """The last step in metrics.jsonl; 0 where there is none yet."""
    for path in cwd.glob(f"outputs/*/{run}/logs/metrics.jsonl"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            return int(json.loads(lines[-1])["step"])
    return 0


def checkpoint(directory: Path) -> dict[str, Any]:
    """Every leaf of a checkpoint by path, read with plain Orbax and no code of ours; JSON items as they are."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointer()
    metadata = handler.metadata(directory / "state").item_metadata.tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    tree = handler.restore(directory / "state", restore_args=args)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    leaves["progress"] = json.loads((directory / "progress/metadata").read_text())
    return leaves


def assert_same(run: Path, reference: Path, step: int) -> None:
    """Bit for bit: every leaf, the position of the data, the best so far, and metrics.jsonl."""
    import numpy as np

    mine, theirs = (checkpoint(path / "checkpoints" / str(step)) for path in (run, reference))
    assert mine.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if isinstance(leaf, np.ndarray):
            assert leaf.dtype == mine[path].dtype
            assert leaf.tobytes() == np.asarray(mine[path]).tobytes(), path
        else:
            assert leaf == mine[path], path
    assert (run / "logs/metrics.jsonl").read_bytes() == (reference / "logs/metrics.jsonl").read_bytes()


# Python only prints what goes wrong in sitecustomize: a fault planted under a name that is gone would test nothing.
PLANTED = """
import os, traceback
try:
    exec(compile({code!r}, "planted", "exec"), globals())
except Exception:
    traceback.print_exc()
    os._exit(97)
"""


def fail_loudly(code: str) -> str:
    """Code for a sitecustomize.py that ends the process where it cannot do what it is planted for."""
    return PLANTED.format(code=code)


def plant(folder: Path, code: str) -> dict[str, str]:
    """The environment in which every Python process first runs this code: a bug, a delay, a fault in our own rooms."""
    planted = folder / "planted"
    planted.mkdir(exist_ok=True)
    (planted / "sitecustomize.py").write_text(fail_loudly(code))
    return {"PYTHONPATH": f"{planted}{os.pathsep}{REPO}"}


def write_corpus(cwd: Path) -> None:
    """About 12 batches of text: 60 steps see it five times."""
    (cwd / "corpus.txt").write_text("".join(f"{n} times {n} is {n * n}, and that is that.\n" for n in range(48)))


@pytest.fixture(autouse=True, scope="session")
def _streams_stay_open() -> None:
    """Hydra, composing in this process, closes the handlers of logging; absl's would close its stream: pytest's own."""
    import logging

    from absl.logging import PythonHandler

    PythonHandler.close = logging.StreamHandler.close  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One compile cache for every process that the session starts; CPU, so that bits can be compared."""
    # Workers of pytest-xdist have one together: whoever writes an entry puts it there in one move, with a digest.
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "compiled"
    shared.mkdir(mode=0o700, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(shared))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ["JAX_PLATFORMS"] = "cpu"
    # What is compiled in this process is kept there as well. A test of a file that needs no jax does not wait for it.
    if "jax" in sys.modules:
        from runner.train.compile_cache import enable_compile_cache

        enable_compile_cache("auto", print)
    # Processes that we start inherit what is ignored, and a run respects it: in a shell's background job that would be
    # Ctrl-C, and under nohup a hang-up. A test that sends one would wait for ever.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A real Slurm, which is gone after the session. Where there can be none, what needs it is skipped, loudly."""
    if reason := lacking():
        pytest.skip(reason)
    with cluster() as running:
        yield running


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not tested for want of Slurm or a browser is said in the last lines, without being asked."""
    skipped = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    if unable := [reason for reason in skipped if "needs Slurm" in reason]:
        terminalreporter.write_line(f"NOT TESTED: {len(unable)} laws on a real Slurm. {unable[0]}", red=True, bold=True)
    if unable := [reason for reason in skipped if "needs Optuna" in reason]:
        terminalreporter.write_line(f"NOT TESTED: {len(unable)} searches. {unable[0]}", red=True, bold=True)
    if unable := [reason for reason in skipped if "needs submitit" in reason]:
        terminalreporter.write_line(f"NOT TESTED: {len(unable)} sweeps. {unable[0]}", red=True, bold=True)
    if unable := [reason for reason in skipped if "needs Chromium" in reason]:
        terminalreporter.write_line(f"NOT TESTED: {len(unable)} pages in a browser. {unable[0]}", red=True, bold=True)


@pytest.fixture(scope="session")
def served() -> Iterator[Forks]:
    """`python run.py` in processes forked from one that has imported everything: a third of the time."""
    from tests.laws.faults import forks

    with forks() as served:
        yield served


@pytest.fixture
def door(tmp_path: Path, request: pytest.FixtureRequest) -> Door:
    """A door beside a corpus. Where the test or its file is marked `forked`, its runs take a third of the time."""
    write_corpus(tmp_path)
    if (mark := request.node.get_closest_marker("forked")) is None:
        return Door(tmp_path)
    return Door(tmp_path, request.getfixturevalue("served"), **mark.kwargs)


@pytest.fixture(scope="session")
def make_door(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Door]:
    def make(name: str, forks: Forks | None = None) -> Door:
        path = tmp_path_factory.mktemp(name)
        write_corpus(path)
        return Door(path, forks)

    return make


@pytest.fixture(scope="session")
def untouched(make_door: Callable[..., Door], served: Forks) -> Callable[..., Door]:
    """The uninterrupted run of a command, once for all who compare theirs with it. It is only read."""
    made: dict[tuple[str, ...], Door] = {}

    def run(*overrides: str) -> Door:
        if overrides not in made:
            door = make_door("untouched", served)
            done = door.run(*overrides)
            assert done.returncode == 0, done.stderr
            made[overrides] = door
        return made[overrides]

    return run
