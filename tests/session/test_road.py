"""The road from the command to the gradient is short: frames of ours are counted in real stacks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPO, SMALL, Door, plant

LIMIT = 5

# Where the loop calls the compiled step, the real stack of the main thread is written down.
AT_THE_STEP = """
import json, threading, traceback
import runner.train.loop as loop
class CompiledStep(loop.CompiledStep):
    def __init__(self, program, lr):
        def recorded(state, batch, lr):
            stack = [frame.filename for frame in traceback.extract_stack()[:-1]]
            with open({path!r}, "a") as out:
                out.write(json.dumps([threading.current_thread().name, stack]) + "\\n")
            return program(state, batch, lr)
        super().__init__(recorded, lr)
import runner.train.assemble as assemble
assemble.CompiledStep = CompiledStep
"""

BREAKS = """
import threading
from flax import nnx
from models import Mlp
class Breaks(nnx.Module):
    scopes = ()
    def __init__(self, inputs, num_outputs, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
    def __call__(self, x):
        if threading.current_thread() is threading.main_thread():
            return x.reshape(len(x), -1)[:, :10]
        raise RuntimeError("in the forward pass")
"""


def ours(files: Sequence[str]) -> list[str]:
    """Of the files of a stack, those of the product."""
    rooms = [str(REPO / name) for name in ("run.py", "runner/")]
    return [str(Path(file).relative_to(REPO)) for file in files if file.startswith(tuple(rooms))]


def frames_at_the_step(door: Door, tmp_path: Path) -> list[list[str]]:
    """For each of three steps: our files on the stack where the loop calls the compiled step, outermost first."""
    stacks = tmp_path / "stacks.jsonl"
    done = door.run(*SMALL, "train.steps=3", **plant(tmp_path, AT_THE_STEP.format(path=str(stacks))))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in stacks.read_text().splitlines()]
    assert [thread for thread, _ in found] == ["MainThread"] * 3
    return [ours(files) for _, files in found]


def frames_above_the_step(door: Door) -> list[str]:
    """Our files on the stack of the compile thread above `train_step`: from the error of a model's forward pass."""
    (door.cwd / "breaks.py").write_text(BREAKS)
    # Building calls a user's model on shapes alone, in the main thread; then the thread that compiles the step does.
    done = door.run("model=breaks:Breaks", "data=digits", "train.steps=3", "log.tensorboard=false")
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: in the forward pass" in done.stderr
    frames = re.findall(r'File "(.+)", line \d+, in (\w+)', done.stderr)
    # The error came through the thread's own `run` last; before that are the frames that waited for it.
    begin = max(at for at, (file, _) in enumerate(frames) if file.endswith("preempt/stop.py"))
    end = next(at for at, (_, name) in enumerate(frames) if name == "train_step")
    return ours([file for file, _ in frames[begin:end]])


def test_five_frames_from_the_door_to_the_compiled_step(door: Door, tmp_path: Path) -> None:
    for files in frames_at_the_step(door, tmp_path):
        assert files == [
            "run.py",
            "runner/launch/main.py",
            "runner/session/experiment.py",
            "runner/session/attempt.py",
            "runner/train/loop.py",
        ]
        assert len(files) <= LIMIT


def test_five_frames_from_the_compile_thread_to_the_train_step(door: Door) -> None:
    files = frames_above_the_step(door)
    assert files == ["runner/preempt/stop.py", *["runner/train/compile.py"] * 3, "runner/train/step.py"]
    assert len(files) <= LIMIT
