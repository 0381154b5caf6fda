"""A process is killed, or gets an error, at its n-th call that concerns the disk; forks make hundreds of runs cheap.

    python -m tests.laws.faults          the law of machine trouble in full (machine_trouble.py)
    python -m tests.laws.faults serve    serves forks: one JSON request a line on stdin, one exit status on stdout

Each attempt is the real `run.py` in a process of its own, forked from one that has imported the heavy modules and has
started nothing: no backend of JAX, no thread, no open file. That takes half of the time of a new interpreter.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import HANG_SECONDS, REPO

SOURCE = Path(__file__).with_name("faults.c")
# What a run imports sooner or later, and what takes a while.
IMPORTED = ("jaxlib.mlir.dialects.mhlo", "models.mlp", "runner.launch.main", "runner.session.attempt")
# What `forks` sets, and is read when it has imported: not for the test to say.
FOR_THE_SERVER = frozenset({"LD_PRELOAD", "OPENBLAS_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL"})
STILL_RUNS = 1000  # no exit code
LAST = 12
# A run of a second. It saves at 3, 4 (best), 6, 8 (best), 9 and 12 (best).
TINY = (
    *("model=mlp", "model.width=8", "model.num_layers=1", "model.dropout=0.1", "data=synthetic", "data.gives=features"),
    *("data.size=64", "data.num_features=8", "data.batch_size=8", f"train.steps={LAST}", "train.log_steps=1"),
    *("train.eval_steps=4", "train.eval_batches=2", "ckpt=combined", "ckpt.save.periodic.steps=3"),
    "log.tensorboard=false",
)


def missing() -> str | None:
    """What this machine lacks to kill a process at a system call; None where it lacks nothing."""
    if sys.platform != "linux":
        return "LD_PRELOAD is for Linux"
    return None if shutil.which("cc") else "no C compiler (cc)"


def compiled(folder: Path, source: str = "faults.c") -> Path:
    """A shim, as a library to preload."""
    library = (folder / source).with_suffix(".so")
    path = SOURCE.with_name(source)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, path, "-ldl", "-lpthread"], check=True)
    return library


@dataclass(frozen=True)
class Event:
    """One call that concerns the file system, as the shim noted it just before it would have happened."""

    number: int
    kind: str
    path: str


def events_in(log: Path) -> list[Event]:
    """What the shim noted: the fatal event, or every one."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [Event(int(number), kind, path) for number, kind, path in (line.split(" ", 2) for line in lines)]


@dataclass(frozen=True)
class Window:
    """The part of a run that is counted: from the first path that contains `after` to one that contains `until`."""

    after: str = ""
    until: str = ""

    def environment(self, below: Path, log: Path, at: int) -> dict[str, str]:
        """What the shim reads. `at=0` kills nothing and notes every event."""
        bounds = {"FAULT_AFTER": self.after, "FAULT_UNTIL": self.until}
        counted = {"FAULT_BELOW": str(below.resolve()), "FAULT_LOG": str(log), "FAULT_AT": str(at)}
        return {**counted, **{name: part for name, part in bounds.items() if part}}


@dataclass(frozen=True)
class Trouble:
    """An error that a call gets which opens, reads, lists or looks, in the place of an answer.

    Attributes:
        error: its number.
        lasts: every call after the one that meets it first gets it as well.
    """

    error: int
    lasts: bool = False

    def environment(self) -> dict[str, str]:
        """What the shim reads, besides what a window says."""
        return {"FAULT_READS": "1", "FAULT_ERRNO": str(self.error), **({"FAULT_LASTS": "1"} if self.lasts else {})}


@dataclass(frozen=True)
class Forks:
    """`python run.py`, with the shim if there is one, in processes forked from one that has imported what it imports."""

    server: subprocess.Popen[str]

    def run(
        self, cwd: Path, *overrides: str, kill_at: int | None = None, planted: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """To its end, or until it kills itself when a step is complete; `planted` is code that is run before."""
        # Not in the working directory: there lies what the process itself has made, and nothing else.
        said = cwd.with_name(f"{cwd.name}-{self.server.pid}.said")
        request: dict[str, object] = {"cwd": str(cwd), "argv": overrides, "environment": environment}
        request |= {"said": [str(said)] * 2, "kill_at": kill_at, "planted": planted}
        code = self._ask(request)
        words = said.read_text()
        said.unlink()
        return subprocess.CompletedProcess(overrides, code, words, "")

    def run_here(self, cwd: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """To its end, in the environment that this process has now; what it says on stdout and on stderr apart."""
        code = self._ask(self._request_here(cwd, overrides, environment))
        return subprocess.CompletedProcess(overrides, code, *self._hear(cwd))

    def begin_here(self, cwd: Path, *overrides: str, **environment: str) -> Begun:
        """As `run_here`, and not to its end."""
        return Begun(self, self._ask({**self._request_here(cwd, overrides, environment), "begin": True}), cwd)

    def _request_here(self, cwd: Path, overrides: tuple[str, ...], environment: dict[str, str]) -> dict[str, object]:
        now = {name: value for name, value in os.environ.items() if name not in FOR_THE_SERVER}
        request: dict[str, object] = {"cwd": str(cwd), "argv": overrides, "environment": now | environment}
        request["program"] = str(REPO / "run.py")
        # What is set there and not here is unset.
        return request | {
            "only": True,
            "said": [str(one) for one in self._streams(cwd)],
            "kill_at": None,
            "planted": "",
        }

    def _streams(self, cwd: Path) -> list[Path]:
        return [cwd.with_name(f"{cwd.name}-{self.server.pid}.{name}") for name in ("out", "err")]

    def _hear(self, cwd: Path) -> list[str]:
        said = [stream.read_text() for stream in self._streams(cwd)]
        for stream in self._streams(cwd):
            stream.unlink()
        return said

    def _ask(self, request: dict[str, object]) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@dataclass
class Begun:
    """A process that `Forks.begin_here` has begun, as `subprocess.Popen` would have it."""

    forks: Forks
    pid: int
    cwd: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(wait=False)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        self._look(wait=True)
        out, err = self.forks._hear(self.cwd)
        return out, err

    def _look(self, wait: bool) -> int | None:
        if self.returncode is None and (code := self.forks._ask({"begun": self.pid, "wait": wait})) != STILL_RUNS:
            self.returncode = code
        return self.returncode


@contextmanager
def forks(library: Path | None = None) -> Iterator[Forks]:
    """The process to fork from, ended with the block; `library` is the shim."""
    command = [sys.executable, "-m", "tests.laws.faults", "serve"]
    environment = {
        **os.environ,
        **({"LD_PRELOAD": str(library)} if library else {}),
        # A thread would not be forked.
        "OPENBLAS_NUM_THREADS": "1",
        # As jax sets it, too late for what is imported here before it.
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"),
    }
    with subprocess.Popen(
        command, cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Forks(server)
        assert server.stdin is not None
        server.stdin.close()


def serve() -> None:
    """Answer requests until stdin ends."""
    from tests.conftest import composed

    for name in IMPORTED:
        importlib.import_module(name)
    # What Hydra and pydantic import and keep for the whole process: a quarter of the time of each fork.
    composed(*TINY)
    # What is never garbage is not touched by who looks for some, and so not copied for each child.
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not safe to fork"
    while line := sys.stdin.readline():  # no read-ahead: a child must not inherit what comes next
        request = json.loads(line)
        child = request.get("begun") or os.fork()
        if child == 0:
            return _become(request)
        if request.get("begin"):
            print(child, flush=True)
            continue
        ended, status = os.waitpid(child, 0 if request.get("wait", True) else os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if ended else STILL_RUNS, flush=True)
    return None


def _become(request: dict) -> None:
    """In the child: the process that `python run.py` would be, with what it says in a file."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644) for path in request["said"])
    for source, target in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    os.chdir(request["cwd"])
    if request.get("only"):
        for name in os.environ.keys() - request["environment"].keys() - FOR_THE_SERVER:
            del os.environ[name]
    os.environ.update(request["environment"])
    signal.alarm(HANG_SECONDS)
    sys.argv = [request.get("program", "run.py"), *request["argv"]]
    if request["kill_at"] is not None:
        _die_at(request["kill_at"])
    exec(request["planted"], {})
    runpy.run_path(str(REPO / "run.py"), run_name="__main__")


def _die_at(step: int) -> None:
    from runner.rundir.attempt_log import AttemptLog

    beat = AttemptLog.beat

    def beaten(self: AttemptLog, reached: int) -> None:
        beat(self, reached)
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    AttemptLog.beat = beaten  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        from tests.laws.machine_trouble import main

        sys.exit(main(sys.argv[1:]))
