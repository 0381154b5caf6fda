"""The law for several processes: whichever of them is killed, whenever, the others end, and the run goes on as it was.

One device a process: with several in one, XLA on a CPU was seen to stall (measured, seldom).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoint.arrays import read_leaves
from runner.checkpoint.record import STATE, list_steps
from runner.checkpoint.seal import find_problem
from runner.rundir.heartbeat import Heartbeat, read_heartbeat
from tests.conftest import HANG_SECONDS, REPO, assert_same
from tests.laws.restore_bits import digest_values
from tests.ranks import Ranks, find_free_port, find_only_run, run_ranks

STEPS = 60
WORDS = (
    *("model=mlp", "data=digits", "model.dropout=0.2", "optim.ema=0.9", "root=outputs", "mesh=fsdp"),
    *(f"train.steps={STEPS}", "train.log_steps=5", "train.eval_steps=20", "train.eval_batches=2"),
    *("ckpt=async", "ckpt.save.periodic.steps=7", "log.tensorboard=false"),
)
# When to kill: told by what the run says of itself.
Moment = Callable[[Heartbeat], bool]


def in_phase(phase: str) -> Moment:
    return lambda heartbeat: heartbeat.phase == phase


def at_step(step: int) -> Moment:
    return lambda heartbeat: heartbeat.step >= step


def writing(phase: str, after: int) -> Moment:
    return lambda heartbeat: heartbeat.writing == phase and heartbeat.step > after


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody has touched."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_ranks(folder, 2, *WORDS) == [0, 0], (folder / "out.0").read_text()
    run = find_only_run(folder / "outputs")
    assert run is not None
    return run.path


def kill(folder: Path, victim: int, moment: Moment, count: int = 2) -> None:
    """Start a run, SIGKILL one of its processes at a moment, and see that all have ended as they should."""
    ranks = Ranks(folder, count, WORDS).start()
    since = time.time()

    def is_due() -> bool:
        run = find_only_run(folder / "outputs")
        heartbeat = None if run is None else read_heartbeat(run.heartbeat)
        # That of the attempt before says nothing about this one.
        if heartbeat is None or heartbeat.changed <= since:
            return False
        # A short phase may pass unseen: then before the run ends.
        return moment(heartbeat) or heartbeat.step >= STEPS - 8

    ranks.wait_until(is_due)
    ranks.send(victim, signal.SIGKILL)
    codes = ranks.wait()
    said = [ranks.read(index) for index in range(count)]
    assert codes[victim] == -signal.SIGKILL, (codes, said)
    # 75, and no abort of jax's: each of the others has seen it, and said so where nobody else does.
    assert [code for index, code in enumerate(codes) if index != victim] == [75] * (count - 1), (codes, said)
    if victim == 0:
        assert all("process 0" in text and "is gone" in text for text in said[1:]), said
    else:
        assert f"process {victim} (" in said[0], said
        assert "is gone" in said[0], said
    run = find_only_run(folder / "outputs")
    if run is not None and run.checkpoints.is_dir():
        # What has a name is whole.
        for path in run.checkpoints.iterdir():
            if path.name.isdecimal():
                assert find_problem(path) is None


def finish(folder: Path, reference: Path, count: int = 2) -> list[str]:
    """Run to the end, compare every bit, and return how each attempt ended."""
    assert run_ranks(folder, count, *WORDS) == [0] * count, (folder / "out.0").read_text()
    run = find_only_run(folder / "outputs")
    assert run is not None
    assert_same(run.path, reference, STEPS)
    return [json.loads(line)["ending"] for line in run.attempts.read_text().splitlines()]


def test_any_process_killed_at_any_moment_changes_no_bit(tmp_path: Path, reference: Path) -> None:
    kill(tmp_path, 1, writing("write", after=20))
    kill(tmp_path, 0, at_step(30))
    assert finish(tmp_path, reference) == ["failed", "killed", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_killed_many_times_changes_no_bit(seed: int, tmp_path: Path, reference: Path) -> None:
    """Five kills each: in every phase of a start, of a step, of a save."""
    rng = random.Random(f"ranks {seed}")
    moments = [
        *map(in_phase, ("startup", "import", "compile", "restore", "eval", "save")),
        *map(at_step, (3, 17, 25, 38, 44)),
        *(writing(phase, after) for phase in ("write", "seal", "publish", "prune") for after in (0, 20)),
    ]
    for _ in range(5):
        kill(tmp_path, rng.randrange(2), rng.choice(moments))
    finish(tmp_path, reference)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_any_process_stops_all_at_one_step(victim: int, tmp_path: Path, reference: Path) -> None:
    ranks = Ranks(tmp_path, 2, WORDS).start()
    ranks.wait_for_step(lambda: find_only_run(tmp_path / "outputs"), 11)
    ranks.send(victim, signal.SIGTERM)
    assert ranks.wait() == [75, 75], (ranks.read(0), ranks.read(1))
    assert "stopped by SIGTERM" in ranks.read(0)
    assert ", saved; the same command goes on from here" in ranks.read(0)
    assert finish(tmp_path, reference) == ["preempted", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["startup", "import", "compile", "eval", "save", "finish"])
def test_a_signal_in_any_phase_loses_nothing(phase: str, victim: int, tmp_path: Path, reference: Path) -> None:
    ranks = Ranks(tmp_path, 2, WORDS).start()

    def is_there() -> bool:
        run = find_only_run(tmp_path / "outputs")
        heartbeat = None if run is None else read_heartbeat(run.heartbeat)
        return heartbeat is not None and heartbeat.phase == phase and (phase != "finish" or heartbeat.step > 0)

    ranks.wait_until(is_there)
    ranks.send(victim, signal.SIGTERM)
    codes = ranks.wait()
    # At the very end there may be nothing left to stop.
    assert codes in ([75, 75], [0, 0]), (codes, ranks.read(0), ranks.read(1))
    finish(tmp_path, reference)


@pytest.mark.slow
def test_what_one_process_can_several_can(tmp_path: Path, reference: Path) -> None:
    """End on the best weights, go back to a step, begin with another run's weights, choose what is recomputed."""
    more = (*WORDS, "retention=all", f"train.steps={STEPS + 20}")
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    earlier = list_steps(run / "checkpoints")[0]
    assert earlier < STEPS
    assert run_ranks(tmp_path, 2, *more, f"dir={run}", f"step={earlier}", "train.final=best") == [0, 0], (
        tmp_path / "out.0"
    ).read_text()
    said = (tmp_path / "out.0").read_text()
    assert f"restored step {earlier}" in said
    assert "ends on the best weights" in said
    assert run_ranks(tmp_path, 2, *WORDS, f"init_from={run}", "name=tuned", "train.steps=5") == [0, 0]
    assert "6 arrays as they are" in (tmp_path / "out.0").read_text()
    assert run_ranks(tmp_path, 2, *WORDS, "remat=auto", "remat.budget_bytes=20MB", "name=auto", "train.steps=5") == [
        0,
        0,
    ]
    assert "remat=auto: " in (tmp_path / "out.0").read_text()


PARTS = (*WORDS, "mesh=data", "train.parts=4")


@pytest.fixture(scope="module")
def reference_in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in parts of one process, with one device, that nobody has touched."""
    folder = tmp_path_factory.mktemp("parts")
    assert run_ranks(folder, 1, *PARTS) == [0], (folder / "out.0").read_text()
    run = find_only_run(folder / "outputs")
    assert run is not None
    return run.path


@pytest.mark.parametrize(
    "counts", [(2, 1), *(pytest.param(each, marks=pytest.mark.slow) for each in ((1, 2, 4), (4, 1, 2), (2, 4, 1)))]
)
def test_in_parts_a_run_moves_between_processes_and_no_bit_changes(
    counts: tuple[int, ...], tmp_path: Path, reference_in_parts: Path
) -> None:
    """SIGKILLed with one number of processes, it goes on with another."""
    for step, count in zip((15, 33), counts[:-1], strict=False):
        ranks = Ranks(tmp_path, count, PARTS).start()
        ranks.wait_for_step(lambda: find_only_run(tmp_path / "outputs"), step)
        ranks.send(count - 1, signal.SIGKILL)
        assert -signal.SIGKILL in ranks.wait()
    assert run_ranks(tmp_path, counts[-1], *PARTS) == [0] * counts[-1], (tmp_path / "out.0").read_text()
    run = find_only_run(tmp_path / "outputs")
    assert run is not None
    assert_same(run.path, reference_in_parts, STEPS)


def test_a_bit_flipped_in_any_process_s_part_is_noticed(reference: Path, tmp_path: Path) -> None:
    checkpoint, rng = tmp_path / str(STEPS), random.Random(0)
    shutil.copytree(reference / "checkpoints" / str(STEPS), checkpoint)
    parts = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {path.relative_to(checkpoint / "state").parts[0] for path in parts if "ocdbt.process" in str(path)} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    for path in parts:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert find_problem(checkpoint) is not None, path
        path.write_bytes(content)
    assert find_problem(checkpoint) is None


@pytest.mark.parametrize(
    ("count", "devices"),
    [
        (3, 1),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in ((1, 1), (2, 1), (2, 2), (1, 3), (1, 4), (1, 8), (3, 2))
        ),
    ],
)
@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_what_two_processes_saved_any_layout_restores(mesh: str, count: int, devices: int, reference: Path) -> None:
    """Every bit of it: what each device has, put together, is what lies on disk as TensorStore reads it."""
    checkpoint = reference / "checkpoints" / str(STEPS)
    # Of a batch that divides among three.
    words = [*WORDS, f"mesh={mesh}", "data.batch_size=48"]
    flags = f"--xla_force_host_platform_device_count={devices}"
    address = f"127.0.0.1:{find_free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.laws.restore_bits", str(checkpoint), address, str(count), str(index), *words],
            cwd=REPO,
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    assert said[0][0].split()[-1] == digest_values(read_leaves(checkpoint / STATE))


OWN_PROGRAM = """
import jax
import jax.numpy as jnp


class Program:
    def init(self, key, example):
        return {"params": jax.random.normal(key, (128, 64))}

    def step(self, state, batch, key):
        noise = jax.random.normal(key, (8, 128, 64))
        costs = jnp.abs(state["params"] + 0.1 * noise).max((1, 2))
        params = state["params"] - 0.01 * noise[jnp.argmax(costs)]
        return {"params": params}, {"loss": costs.max()}

    def evaluate(self, state, batch):
        return {"loss": jnp.abs(state["params"]).max()}
"""


def test_a_program_that_makes_its_own_data_may_be_killed_in_several_processes(tmp_path: Path) -> None:
    """Its state is divided; what it computes is not, unless it says so itself."""
    (tmp_path / "mine.py").write_text(OWN_PROGRAM)
    words = (
        *("program=mine:Program", "data=none", "mesh=fsdp", "train.steps=60", "train.log_steps=5"),
        *("train.eval_steps=20", "ckpt.save.periodic.steps=7", "log.tensorboard=false"),
    )
    assert run_ranks(tmp_path, 2, *words, "root=untouched") == [0, 0], (tmp_path / "out.0").read_text()
    ranks = Ranks(tmp_path, 2, (*words, "root=killed")).start()
    ranks.wait_for_step(lambda: find_only_run(tmp_path / "killed"), 20)
    ranks.send(1, signal.SIGKILL)
    assert ranks.wait() == [75, -signal.SIGKILL], (ranks.read(0), ranks.read(1))
    assert run_ranks(tmp_path, 2, *words, "root=killed") == [0, 0], (tmp_path / "out.0").read_text()
    runs = [find_only_run(tmp_path / root) for root in ("killed", "untouched")]
    assert runs[0] is not None
    assert runs[1] is not None
    assert_same(runs[0].path, runs[1].path, 60)


# What a user brings may hang, or fail, on one machine alone: a disk, a server, a bug.
OWN_DATA = """
import os, time
import numpy as np
from data.sources import Sources

INDEX = os.environ["HOLDFAST_HOSTS"][-1]


class Digits:
    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.inputs = rng.normal(size=(count, 4, 4, 1)).astype(np.float32)
        self.label = rng.integers(0, 3, count).astype(np.int32)

    def __len__(self):
        return len(self.label)

    def take(self, indices):
        if INDEX == "1" and os.path.exists("hang"):
            time.sleep(10_000)
        if INDEX == "1" and os.path.exists("fail"):
            raise RuntimeError("the disk of this machine is odd")
        return {"inputs": self.inputs[indices], "label": self.label[indices]}


def make():
    return Sources(Digits(200), Digits(40), (4, 4, 1), 3, "digits", "made up")
"""
OWN_WORDS = (
    *("model=mlp", "data=mine:make", "data.batch_size=8", "mesh=data", "root=outputs", "train.steps=1000000"),
    *("train.log_steps=5", "train.eval_steps=1000000", "ckpt=none", "log.tensorboard=false"),
)


@pytest.mark.parametrize(
    ("file", "extra", "code", "said"),
    [
        ("hang", ("train.hang_seconds=15",), 1, "no sign of life of process 1 ("),
        ("fail", (), 1, "the disk of this machine is odd"),
    ],
)
def test_the_process_that_hangs_or_fails_is_named(
    file: str, extra: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN_DATA)
    ranks = Ranks(tmp_path, 2, (*OWN_WORDS, *extra)).start()
    ranks.wait_for_step(lambda: find_only_run(tmp_path / "outputs"), 10)
    (tmp_path / file).touch()
    assert ranks.wait() == [code, code], (ranks.read(0), ranks.read(1))
    assert "error: " in ranks.read(0)
    assert said in ranks.read(0)
    assert "process 1 (" in ranks.read(0)
    run = find_only_run(tmp_path / "outputs")
    assert run is not None
    assert said in json.loads(run.attempts.read_text().splitlines()[-1])["why"]
    if file == "hang":
        # Where each of them was: the one that sleeps, and the one that waits for it.
        log = run.log.read_text()
        assert "mine.py" in log
        assert log.count("in run_attempt") >= 2
