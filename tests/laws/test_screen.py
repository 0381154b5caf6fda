"""The law: what stdout and stderr do never ends a run, changes it or holds it up, and is told once in run.log.

Real terminals that vanish, full disks, closed descriptors, readers who stop reading; each run ends bit for bit as the
one whose lines arrived. What a single stream does is in tests/test_screen.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.preempt.signals import ECHO_SECONDS
from tests.conftest import HANG_SECONDS, REPO, Door, assert_same, plant

STEPS = 40
RUN = (
    *("model=mlp", "data=digits", "model.width=16", f"train.steps={STEPS}", "train.eval_steps=10", "train.log_steps=2"),
    *("ckpt=combined", "ckpt.save.periodic.steps=5", "retention=last_n", "retention.last.n=2", "log.tensorboard=false"),
)
# What is told in run.log, before and after the name of a stream.
TOLD, EVERY_LINE = "warning: what goes to ", "does not arrive; every line is in this file"
# At step 12 it waits for whoever waits for it.
WAIT_AT_12 = """
import os, time
import runner.train.loop as module
original = module.PendingSteps.add
def slow(self, step, metrics):
    original(self, step, metrics)
    if step == 12 and not os.path.exists('go'):
        open('there', 'w').close()
        while not os.path.exists('go'):
            time.sleep(0.01)
module.PendingSteps.add = slow
"""
TELL_DESCRIPTORS = """
import os
ends = os._exit
def tell(code):
    found = [os.readlink(f"/proc/self/fd/{n}") for n in range(3)]
    with open("descriptors", "w") as out:
        out.write(" ".join(found))
    ends(code)
os._exit = tell
"""


@pytest.fixture(scope="session")
def undisturbed(untouched: Callable[..., Door]) -> Path:
    """The run whose lines all arrived; and run.log says nothing of them."""
    door = untouched(*RUN)
    assert TOLD not in (door.the_run / "logs/run.log").read_text()
    return door.the_run


def run_with(door: Door, *words: str, **streams: Any) -> int:
    """The exit code of a run whose streams are these."""
    environment = streams.pop("env", {})
    process = subprocess.Popen(
        door.start_arguments(*RUN, *words), cwd=door.cwd, env={**os.environ, **environment}, **streams
    )
    return process.wait(HANG_SECONDS)


def told(door: Door) -> list[str]:
    """What run.log says of streams, without the times."""
    lines = (door.the_run / "logs/run.log").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if TOLD in line]


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal; the test may close the first one before."""
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not there():
        assert process.poll() is None, process.returncode
        time.sleep(0.01)


def test_a_full_disk_behind_both(door: Door, undisturbed: Path) -> None:
    with open("/dev/full", "wb") as full:
        assert run_with(door, stdout=full, stderr=full) == 0
    assert told(door) == [f"{TOLD}stdout (No space left on device) {EVERY_LINE}"]
    assert_same(door.the_run, undisturbed, STEPS)


def test_closed_descriptors_are_nobody_elses(door: Door, undisturbed: Path, tmp_path: Path) -> None:
    """The next file that is opened, a log or a checkpoint, would be where a C library prints."""

    def close_all() -> None:
        for handle in range(3):
            os.close(handle)

    assert run_with(door, preexec_fn=close_all, env=plant(tmp_path, TELL_DESCRIPTORS)) == 0
    assert (door.cwd / "descriptors").read_text() == "/dev/null /dev/null /dev/null"
    assert told(door) == [f"{TOLD}stdout and stderr (it was closed from the beginning) {EVERY_LINE}"]
    assert_same(door.the_run, undisturbed, STEPS)


def test_a_terminal_without_the_characters(door: Door, undisturbed: Path) -> None:
    done = door.run(*RUN, PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1482 parameters ? digits" in done.stdout
    assert told(door) == []
    assert_same(door.the_run, undisturbed, STEPS)


def test_a_pipe_that_nobody_reads(door: Door, undisturbed: Path) -> None:
    """It is full before the run begins, and stays so: the run has no more patience with it than half a second."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"." * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ))
    assert run_with(door, stdout=write_end, stderr=write_end) == 0
    assert told(door) == [f"{TOLD}stdout (nobody takes it) {EVERY_LINE}"]
    assert_same(door.the_run, undisturbed, STEPS)
    os.close(write_end)
    os.close(read_end)


def test_a_terminal_that_vanishes_under_nohup(door: Door, undisturbed: Path) -> None:
    with terminal() as (master, slave):

        def ignore_hangup() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        process = subprocess.Popen(
            door.start_arguments(*RUN),
            cwd=door.cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=ignore_hangup,
        )
        shown = b""
        while b"parameters" not in shown:
            shown += os.read(master, 4096)
        os.close(master)
        assert process.wait(HANG_SECONDS) == 0
    assert told(door) == [f"{TOLD}stdout (Input/output error) {EVERY_LINE}"]
    assert_same(door.the_run, undisturbed, STEPS)


def test_a_hang_up_saves_and_stops(door: Door, undisturbed: Path, tmp_path: Path) -> None:
    """The terminal has gone by the time that the run says so: exit code 75 all the same, and nothing is lost."""
    with terminal() as (master, slave):

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            door.start_arguments(*RUN),
            cwd=door.cwd,
            env={**os.environ, **plant(tmp_path, WAIT_AT_12)},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=take_terminal,
        )
        wait_until((door.cwd / "there").exists, process)
        os.close(master)
        # It comes a second time, from the shell: that is nobody who cannot wait.
        time.sleep(2 * ECHO_SECONDS)
        process.send_signal(signal.SIGHUP)
        (door.cwd / "go").touch()
        assert process.wait(HANG_SECONDS) == 75
    status = json.loads((door.the_run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("preempted", "SIGHUP")
    assert 12 <= status["step"] < STEPS
    assert status["last_committed_step"] == status["step"]
    assert sorted(line.split(" (")[0] for line in told(door)) == [f"{TOLD}stderr", f"{TOLD}stdout"]
    done = door.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, undisturbed, STEPS)


@pytest.mark.parametrize(
    "environment",
    [{"TERM": "dumb"}, {"COLUMNS": "0", "LINES": "0"}, {"COLUMNS": "1", "LINES": "1", "NO_COLOR": "1"}],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
@pytest.mark.slow
def test_terminals_of_any_kind(environment: dict[str, str], door: Door) -> None:
    """Each line is shown, and no traceback."""
    with terminal() as (master, slave):
        process = subprocess.Popen(
            door.start_arguments(*RUN),
            cwd=door.cwd,
            env={**os.environ, **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        shown = b""
        while b"README" not in shown:
            shown += os.read(master, 65536)
        assert process.wait(HANG_SECONDS) == 0
        os.close(master)
    assert b"Traceback" not in shown
    for step in (10, 20, 30, 40):
        assert f"step{step:>7}  eval".encode() in shown
    assert told(door) == []


@pytest.mark.slow
def test_a_sweep_on_a_full_disk(door: Door) -> None:
    """Its own lines are lost, and neither its runs nor its exit code."""
    with open("/dev/full", "wb") as full:
        assert run_with(door, "-m", "seed=1,2", stdout=full, stderr=full) == 0
    found = [json.loads(path.read_text())["state"] for path in door.cwd.glob("outputs/*/*/status.json")]
    assert found == ["finished"] * 2


@pytest.mark.parametrize("closed", [False, True], ids=["full", "closed"])
def test_supervise_has_no_need_of_a_terminal(tmp_path: Path, *, closed: bool) -> None:
    """It starts again what crashed, and ends with the exit code of what it started."""
    command = f"import pathlib, sys; n = pathlib.Path({str(tmp_path)!r}, 'n'); n.exists() and sys.exit(4); n.touch(); sys.exit(1)"
    words = ["-m", "runner", "supervise", "--wait", "0", "--", sys.executable, "-c", command]
    with open("/dev/full", "wb") as full:
        close = (lambda: os.close(2)) if closed else None
        process = subprocess.Popen([sys.executable, *words], cwd=REPO, stdout=full, stderr=full, preexec_fn=close)
        assert process.wait(HANG_SECONDS) == 4
    assert (tmp_path / "n").exists()


@pytest.mark.parametrize("word", ["--help", "--cfg=job"])
def test_an_answer_that_cannot_be_printed_is_none(word: str, door: Door) -> None:
    """Where the screen is all that was asked for, its failure is the command's."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(door.start_arguments(word), cwd=door.cwd, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "error: stdout: No space left on device; what was asked for could not be printed\n"
    assert (done.returncode, done.stderr) == (5, said)


def test_an_error_that_cannot_be_said_keeps_its_exit_code(door: Door) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(door.start_arguments("mdel=mlp"), cwd=door.cwd, stdout=full, stderr=full)
    assert done.returncode == 2
    assert door.tree() == {"corpus.txt"}
