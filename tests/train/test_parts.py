"""`train.parts`: the bits of a run do not depend on how many devices computed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.errors import ConfigError
from runner.launch.compose import compose_run
from runner.train.build import build
from runner.train.compile import compile_step
from runner.train.parts import PartialSums, add_trees
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door

# The same pool of threads on every machine, as a run keeps its own.
THREADS = {"NPROC": "4", "JAX_PLATFORMS": "cpu"}
OWN = """
import jax
from flax import nnx
class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, rngs):
        self.out = nnx.Linear(64, num_outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(num_outputs, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.seen = nnx.BatchStat(jax.numpy.zeros((), int))
    def __call__(self, x):
        self.seen[...] += 1
        return self.norm(self.out(self.drop(x.reshape(len(x), -1))))
"""
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from runner.launch.compose import compose_run
from runner.train.build import build
from runner.train.compile import compile_eval, compile_step
from runner.train.evaluator import EvaluationRun
words = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
steps = int(sys.argv[2])
for line in sys.argv[3:]:
    config = compose_run([*line.split(), "train.parts=8", "mesh=data", "data.batch_size=32", "train.eval_batches=2"]).config
    built = build(config)
    program, evaluate, state, lr = compile_step(built, config), compile_eval(built, config), built.init(), built.train_step.put_lr()
    losses = []
    for _ in range(steps):
        state, metrics = program(state, next(built.stream), lr)
        losses.append(float(metrics["loss"]))
    measured = built.evaluator(["eval"], state, EvaluationRun(evaluate, Path("."), "x"))
    every = b"".join(np.asarray(words(leaf)).tobytes() for leaf in jax.tree.leaves(state))
    print(json.dumps([line.split()[0], built.mesh.size, hashlib.sha256(every).hexdigest(), losses, measured]))
"""
MODELS = (
    "model=mlp data=digits optim.ema=0.9",
    "model=resnet data=digits model.stages=[1,1] optim=sgd optim.lr=0.05",
    "model=cnn data=digits model.widths=[4] train.precision=bf16",
    "data=stdlib data.seq_len=16 model.num_layers=2 model.width=32 model.num_heads=2 model.dropout=0.1 remat=full",
    "model=own:Net data=digits",
)


def run_on(count: int, folder: Path, steps: int, models: tuple[str, ...]) -> list[list[object]]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(steps), *models],
        env={**os.environ, **THREADS, **flags},
        cwd=str(folder),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each[1] for each in found} == {count}
    return [[each[0], *each[2:]] for each in found]


def test_one_and_four_devices_have_the_same_bits(tmp_path: Path) -> None:
    """With batch statistics, and with dropout and recomputation."""
    one, four = (run_on(count, tmp_path, 6, (MODELS[1], MODELS[3])) for count in (1, 4))
    assert one == four
    assert all(losses[0] != losses[-1] for _, _, losses, _ in one)  # type: ignore[misc, index]


@pytest.mark.slow
def test_one_two_and_four_devices_have_the_same_bits(tmp_path: Path) -> None:
    """Also with an average of the weights, bfloat16, and a model of one's own."""
    (tmp_path / "own.py").write_text(OWN)
    one, two, four = (run_on(count, tmp_path, 6, MODELS) for count in (1, 2, 4))
    assert one == two == four


@pytest.mark.slow
def test_a_hundred_steps_on_eight_devices_have_the_bits_of_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    assert run_on(1, tmp_path, 100, MODELS) == run_on(8, tmp_path, 100, MODELS)


def test_a_run_that_moves_is_the_one_that_stayed(door: Door) -> None:
    """Killed on one device, killed again on two, ended on four: the log, to the byte, of a run on one."""
    words = (*SMALL, "ckpt=combined", "ckpt.save.periodic.steps=10", "train.parts=4", "mesh=data", "seed=3")
    on = {count: {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", **THREADS} for count in (1, 2, 4)}
    stayed = door.run(*words, "root=stayed", **on[1])
    assert stayed.returncode == 0, stayed.stderr
    (log,) = door.cwd.glob("stayed/*/*/logs/metrics.jsonl")
    for count, stop in ((1, 25), (2, 45)):
        process = door.start(*words, **on[count])
        moved = None
        while moved is None or not any(json.loads(line)["step"] >= stop for line in moved.read_text().splitlines()):
            assert process.poll() is None, process.communicate()
            moved = next(iter(door.cwd.glob("outputs/*/*/logs/metrics.jsonl")), None)
        process.kill()
        process.communicate()
        assert process.returncode == -9
    ended = door.run(*words, **on[4])
    assert ended.returncode == 0, ended.stderr
    assert "to rounding" not in ended.stdout
    assert moved is not None
    assert moved.read_bytes() == log.read_bytes()
    attempts = [json.loads(line) for line in (moved.parent.parent / "attempts.jsonl").read_text().splitlines()]
    assert [attempt.get("hardware") for attempt in attempts] == ["1 × cpu", "2 × cpu", "4 × cpu"]


def test_parts_are_the_mean_over_the_batch() -> None:
    """Without dropout and batch statistics, to rounding."""
    words = ["model=mlp", "data=digits", "data.batch_size=32"]
    config = compose_run([*words, "train.parts=8"]).config
    whole, parts = build(compose_run(words).config), build(config)
    batch = next(whole.stream)
    one, metrics = whole.train_step(whole.init(), whole.put(batch))
    other, same = compile_step(parts, config)(parts.init(), batch, parts.train_step.put_lr())
    for before, after in zip(jax.tree.leaves(one["params"]), jax.tree.leaves(other["params"]), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-6)
    assert {name: float(value) for name, value in same.items()} == pytest.approx(
        {name: float(value) for name, value in metrics.items()}, rel=1e-4
    )


def test_sums_are_a_binary_tree_of_neighbours() -> None:
    sums = PartialSums(lambda a, b: f"({a}{b})")
    for letter in "abcdefgh":
        sums.push(letter)
    assert sums.total() == "(((ab)(cd))((ef)(gh)))"
    assert add_trees({"x": jnp.ones(2)}, {"x": jnp.ones(2)})["x"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.parts=6"], r"train.parts=6 must be a power of two"),
        (["train.parts=32"], r"train.parts=32 must divide data.batch_size=16"),
        (["train.parts=2", "train.microbatches=2"], r"train.parts=2 and train.microbatches=2 both split a batch"),
        (["train.parts=2", "mesh=fsdp"], r"train.parts=2 keeps the bits where each device has the whole state"),
        (["train.parts=2", "mesh.tensor=2"], r"train.parts=2 keeps the bits where"),
    ],
)
def test_parts_that_cannot_be_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_run(words)


def test_devices_that_cannot_share_them_out_are_refused(tmp_path: Path) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", **THREADS}
    done = Door(tmp_path).run("model=mlp", "data=digits", "data.batch_size=24", "train.parts=8", "mesh=data", **flags)
    assert done.returncode == 2
    assert done.stderr == (
        "error: train.parts=8: 3 devices cannot share them out evenly; use 1, 2, 4, 8 devices (mesh.data=N)\n"
    )
