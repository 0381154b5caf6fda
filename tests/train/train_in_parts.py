"""Train a few steps in parts, on so many processes and devices, and say what came of it, bit for bit.

`run_in_parts` starts the processes; `python -m tests.train.train_in_parts STEPS FILE WORDS...` is each of them.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from runner.launch.compose import compose_run
from runner.train.build import build
from runner.train.compile import compile_eval, compile_step
from runner.train.evaluator import EvaluationRun
from tests.conftest import HANG_SECONDS, REPO

# The same pool of threads everywhere, as a run keeps its own.
ENVIRONMENT = {"NPROC": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
# Where one of several processes finds which it is: ADDRESS,COUNT,INDEX.
PLACE = "TRAIN_IN_PARTS"
# A process that takes longer hangs: the longest of these tests trains six models for a hundred steps.
PATIENCE_SECONDS = 10 * HANG_SECONDS
PARTS = ("train.parts=8", "mesh=data", "data.batch_size=32", "train.eval_batches=2")
# What a part may have beside its parameters: dropout, batch statistics, whole numbers, a random key that is no stream; a
# metric that is no mean. And labels to leave out, so that examples do not all count alike.
OWN_FILE = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx, struct

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, rngs):
        self.out = nnx.Linear(64, num_outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(num_outputs, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.seen, self.bright = nnx.BatchStat(jnp.zeros((), int)), nnx.BatchStat(jnp.zeros((), int))
        self.key = nnx.BatchStat(jax.random.key(7))

    def __call__(self, x):
        self.seen[...] += 1
        self.bright[...] = (x > 0.5).sum()
        return self.norm(self.out(self.drop(x.reshape(len(x), -1))))

@struct.dataclass
class F1:
    hits: jax.Array
    named: jax.Array
    there: jax.Array

    def merge(self, other):
        return F1(self.hits + other.hits, self.named + other.named, self.there + other.there)

    def compute(self):
        return 2 * self.hits / (self.named + self.there)

def loss(model, batch, weights):
    logits = model(batch["inputs"])
    named, there = (logits.argmax(axis=1) == 1) * weights, (batch["label"] == 1) * weights
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"loss": each, "f1": F1((named * there).sum(), named.sum(), there.sum())}
"""
OWN = "model=own:Net data=digits objective=external objective.target=own:loss optim.ema=0.9"
IGNORED = "model=mlp model.width=16 data=arrays data.path=arrays.npz data.gives=features data.ignore_label=255"
MODELS = (
    "model=mlp data=digits optim.ema=0.9",
    "model=resnet data=digits model.stages=[1,1] optim=sgd optim.lr=0.05",
    "model=cnn data=digits model.widths=[4] train.precision=bf16",
    "data=stdlib data.seq_len=16 model.num_layers=2 model.width=32 model.num_heads=2 model.dropout=0.1 remat=full",
    OWN,
    IGNORED,
)


@dataclass(frozen=True)
class Outcome:
    """What every process found: a digest of the last state, the loss of each step, an evaluation of that state."""

    state: str
    losses: list[float]
    measured: dict[str, dict[str, float]]


def run_in_parts(layout: tuple[int, int], folder: Path, steps: int, models: tuple[str, ...]) -> list[Outcome]:
    """Train each of the models on so many processes with so many devices each; all of them find the same."""
    (folder / "own.py").write_text(OWN_FILE)
    write_arrays(folder / "arrays.npz")
    num_processes, num_devices = layout
    files = [folder / f"{num_processes}x{num_devices}.{index}.json" for index in range(num_processes)]
    address = f"127.0.0.1:{find_free_port()}"
    processes = []
    for index, file in enumerate(files):
        place = {PLACE: f"{address},{num_processes},{index}"} if num_processes > 1 else {}
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
        with file.with_suffix(".txt").open("w") as said:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(steps), str(file), *models],
                    env={**os.environ, **ENVIRONMENT, **flags, **place},
                    cwd=folder,
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
    wait_for_all(processes)
    said = "\n".join(file.with_suffix(".txt").read_text() for file in files)
    assert [process.returncode for process in processes] == [0] * num_processes, said
    first, *others = [json.loads(file.read_text()) for file in files]
    assert all(other == first for other in others), (first, others)
    assert first["devices"] == num_processes * num_devices
    return [Outcome(**outcome) for outcome in first["outcomes"]]


def wait_for_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended well; where one fails, or they hang, kill those that are left."""
    give_up, stdin = time.monotonic() + PATIENCE_SECONDS, processes[0].stdin
    assert stdin is not None
    try:
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < give_up:
            if any(codes):
                break
            # The first one serves the others, who abort when it is gone: it ends when they have ended.
            if None not in codes[1:]:
                stdin.close()
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def find_free_port() -> int:
    """Return a port that nobody has at this moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_arrays(path: Path) -> None:
    """Write some examples of three classes; every fourth has no label."""
    rng = np.random.default_rng(3)
    inputs, label = rng.standard_normal((64, 4)).astype(np.float32), np.arange(64, dtype=np.uint8) % 3
    label[::4] = 255
    np.savez(path, x_train=inputs, y_train=label, x_val=inputs, y_val=label)


def be_one_process(steps: int, file: Path, models: list[str]) -> None:
    """Train as one of the processes, and write what was found."""
    # Should it hang, it says where before it is killed.
    faulthandler.dump_traceback_later(PATIENCE_SECONDS - 30)
    if place := os.environ.get(PLACE):
        address, count, index = place.split(",")
        jax.config.update("jax_enable_recoverability", True)
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(address, int(count), int(index), initialization_timeout=PATIENCE_SECONDS)
    outcomes = [asdict(train_model(words.split(), steps)) for words in models]
    file.write_text(json.dumps({"devices": jax.device_count(), "outcomes": outcomes}))
    if jax.process_index() == 0:
        sys.stdin.read()
    sys.stdout.flush()
    os._exit(0)


def train_model(words: list[str], steps: int) -> Outcome:
    """Train a model in eight parts, and evaluate it."""
    config = compose_run([*words, *PARTS]).config
    built = build(config)
    program, evaluate = compile_step(built, config), compile_eval(built, config)
    state, lr, losses = built.init(), built.train_step.put_lr(), []
    wait_for_others("-".join(words))
    for _ in range(steps):
        state, metrics = program(state, next(built.stream), lr)
        # Several devices of one process on a CPU may stall where two steps are under way.
        jax.block_until_ready(state)
        losses.append(float(metrics["loss"]))
    measured: Any = built.evaluator(["eval"], state, EvaluationRun(evaluate, Path("."), "x"))
    return Outcome(digest_state(state), losses, measured)


def wait_for_others(key: str) -> None:
    """Wait until every process has come here: devices give up where another's program comes half a minute later."""
    if jax.process_count() > 1:
        # Names of such a place have no slash.
        distributed.global_state.client.wait_at_barrier(key.replace("/", ":"), PATIENCE_SECONDS * 1000)


def digest_state(state: Any) -> str:
    """Return a digest of every array of a state, as the first device of this process has it."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        here = leaf.addressable_data(0)
        is_key = jax.dtypes.issubdtype(here.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(here) if is_key else here).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    be_one_process(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
