"""A disk that is really full: training goes on, it is told once, what was kept stays good, and freeing space heals it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runner.checkpoint.record import list_steps
from runner.checkpoint.seal import find_problem
from tests.conftest import Door, assert_same

pytestmark = pytest.mark.forked

COMMAND = (
    *(
        "model=mlp",
        "data=digits",
        "model.dropout=0.1",
        "train.steps=1200",
        "train.eval_steps=400",
        "train.log_steps=20",
    ),
    *("ckpt.save.periodic.steps=40", "retention.last.n=1", "log.tensorboard=false"),
)
SIZE_BYTES = 3_000_000  # one checkpoint takes 0.35 MB; two stay and one is written
LEFT_BYTES = 150_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own below outputs/."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(outputs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield outputs
    subprocess.run(["umount", "-l", str(outputs)], check=True)


def fill(disk: Path, *, leave: int = LEFT_BYTES) -> Path:
    """A file that takes all but a little."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("ab", buffering=0) as out:
        while (room := shutil.disk_usage(disk).free - leave) > 0:
            out.write(b"\0" * room)
    return ballast


class Watched:
    """A running command and what it has said so far."""

    def __init__(self, door: Door):
        self._said = door.cwd / "said.txt"
        self._out = self._said.open("w")
        self.process = subprocess.Popen(
            door.start_arguments(*COMMAND), cwd=door.cwd, stdout=self._out, stderr=subprocess.STDOUT
        )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            assert self.process.poll() is None, self.said
            time.sleep(0.005)


def checkpoints(door: Door) -> Path:
    return door.the_run / "checkpoints"


def has_saved(door: Door) -> bool:
    return any(list_steps(path) for path in door.cwd.glob("outputs/*/*/checkpoints"))


@pytest.fixture(scope="module")
def reference(untouched: Callable[..., Door]) -> Door:
    return untouched(*COMMAND)


@pytest.mark.parametrize("leave", [LEFT_BYTES, 0], ids=["little-left", "nothing-left"])
def test_training_goes_on_and_freeing_space_heals_it(door: Door, disk: Path, reference: Door, leave: int) -> None:
    """With nothing left not even a line of the log can be written: the lines wait, and none is lost."""
    run = Watched(door)
    run.until(lambda: has_saved(door))
    waits = "could not be written: No space" if leave else "metrics.jsonl cannot be written (No space"
    ballast = fill(disk, leave=leave)
    run.until(lambda: waits in run.said or not fill(disk, leave=leave))
    there = list_steps(checkpoints(door))
    assert there
    assert all(find_problem(checkpoints(door) / str(step)) is None for step in there)
    ballast.unlink()
    assert run.process.wait() == 0, run.said
    assert run.said.count("could not be written: No space left on device") <= 1
    assert run.said.count("metrics.jsonl cannot be written") <= 1
    assert "Traceback" not in run.said
    assert not leave or "checkpoints are written again" in run.said
    assert_same(door.the_run, reference.the_run, 1200)


def test_a_state_that_cannot_be_made_durable_is_exit_5_and_the_same_command_goes_on(
    door: Door, disk: Path, reference: Door
) -> None:
    run = Watched(door)
    run.until(lambda: has_saved(door))
    ballast = fill(disk)
    assert run.process.wait() == 5, run.said
    assert run.said.count("could not be written: No space left on device") == 1
    assert "error: step 1200 could not be made durable in outputs/" in run.said
    assert "Traceback" not in run.said
    good = list_steps(checkpoints(door))
    assert good
    assert all(find_problem(checkpoints(door) / str(step)) is None for step in good)
    ballast.unlink()
    again = door.run(*COMMAND)
    assert again.returncode == 0, again.stderr
    assert f"restored step {good[-1]} " in again.stdout
    assert_same(door.the_run, reference.the_run, 1200)
    endings = [json.loads(line)["ending"] for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert endings == ["failed", "finished"]


def test_it_is_told_before_it_happens(door: Door, disk: Path) -> None:
    fill(disk, leave=700_000)
    run = Watched(door)
    run.process.wait()
    assert "kB free for checkpoints of 314 kB: room for 2" in run.said
    assert "but retention keeps up to 2 and one more is being written" in run.said
