"""A finished run gets right what failed at its end, when its command is typed again: link, page, mirrors of the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Door, plant
from tests.curves import concatenated, metrics

pytestmark = pytest.mark.forked

TINY = ("model=mlp", "data=digits", "model.width=16", "train.steps=20", "train.eval_steps=10", "train.log_steps=2")

# From step 12 on the file of TensorBoard takes nothing more; at the end the link to the best step cannot be made.
FAILING = """
import builtins, os
from runner.log import tensorboard_sink
write = tensorboard_sink.TensorBoardSink._write
def fail(self, event):
    if event.step >= 12 and event.summary.value:
        raise OSError(28, "No space left on device")
    write(self, event)
tensorboard_sink.TensorBoardSink._write = fail
from runner.checkpoint import checkpointer
def no_link(*arguments):
    raise OSError(28, "No space left on device")
checkpointer.link_best = no_link
"""


def test_what_failed_at_the_end_is_mended_when_the_command_is_typed_again(door: Door, tmp_path: Path) -> None:
    broken = door.run(*TINY, **plant(tmp_path, FAILING))
    assert broken.returncode == 0, broken.stderr
    assert "tensorboard stopped logging at step 12" in broken.stdout
    run = door.the_run
    assert concatenated(run / "logs")["train/loss"][-1][0] == 10
    assert not (run / "checkpoints/best").is_symlink()
    (run / "README.md").unlink()
    again = door.run(*TINY)
    assert (again.returncode, "is finished: 20 steps" in again.stdout) == (0, True), again.stderr
    assert "tensorboard has every line now" in again.stdout
    assert concatenated(run / "logs").keys() == metrics(run / "logs").keys()
    assert concatenated(run / "logs")["train/loss"][-1][0] == 20
    assert (run / "checkpoints/best").readlink() == Path("20")
    assert (run / "README.md").read_text().startswith("# default/")
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert door.run(*TINY).returncode == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == kept
