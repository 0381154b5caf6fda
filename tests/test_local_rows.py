"""Several processes train one run: each makes the rows that its devices need, and lays them there by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data import Synthetic
from runner.launch.compose import compose_run
from runner.mesh import Mesh, find_local_rows, is_local, put_local_rows
from runner.train import assemble, build_program, build_steps
from runner.train.assemble import _feed_program
from runner.train.build import build
from runner.train.dataset import make_stream
from tests.conftest import HANG_SECONDS, REPO
from tests.ranks import find_free_port
from tests.train.test_program import GOOD, HEAD

MEET = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
if (address := sys.argv[1]) != "alone":
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(address, 2, int(sys.argv[2]))
"""
LAY = """
from jax.experimental import multihost_utils
from runner.mesh import Mesh, batch_sharding, find_local_rows, is_local, put_local_rows

def refuse(*words):
    raise AssertionError("processes compare what they have")
multihost_utils.assert_equal = refuse

whole = {"inputs": np.random.default_rng(0).random((8, 3)), "label": np.arange(8), "tokens": np.arange(16, dtype=np.uint8).reshape(8, 2)}
out = {}
for name, sizes in {"data": {"data": 2}, "fsdp": {"fsdp": 2}, "tensor": {"tensor": 2}}.items():
    mesh = Mesh(**sizes).build(8)
    rows = find_local_rows(mesh, 8)
    own = {key: value[rows] for key, value in whole.items()}
    laid = put_local_rows(mesh, 8, own)
    # What one device would make of each.
    kinds = {key: jax.device_put(value).dtype for key, value in whole.items()}
    here = all(
        array.shape == whole[key].shape and array.dtype == kinds[key] and array.sharding == batch_sharding(mesh)
        and np.asarray(shard.data).tobytes() == whole[key].astype(kinds[key])[shard.index].tobytes()
        for key, array in laid.items() for shard in array.addressable_shards)
    # As the devices of both processes see it together.
    seen = jax.jit(lambda tree: (tree["label"] * jnp.arange(8)).sum())(laid)
    out[name] = [[rows.start, rows.stop], is_local(mesh), here, int(seen)]
mesh = Mesh(data=2).build(8)
try:
    put_local_rows(mesh, 8, whole)
except ValueError as error:
    out["whole"] = str(error)
# What there is without data: a batch of one row, which both have.
alone = Mesh(tensor=2).build(1)
assert find_local_rows(alone, 1) == slice(0, 1)
laid = put_local_rows(alone, 1, {"number": np.array([7], np.uint32)})["number"]
out["number"] = [laid.addressable_data(0).tolist(), str(laid.dtype), list(laid.shape)]
print(json.dumps(out), flush=True)
"""
TRAIN = """
from pathlib import Path
from runner.launch.compose import compose_run
from runner.train.assemble import _feed_program
from runner.train.build import build
from runner.train.compile import compile_eval, compile_step
from runner.train.evaluator import EvaluationRun
out = []
for line in sys.argv[3:]:
    config = compose_run([*line.split(), "data.batch_size=16", "train.eval_batches=2"]).config
    built = build(config)
    program, lr = _feed_program(built, compile_step(built, config)), built.train_step.put_lr()
    state, losses, batches = built.init(), [], []
    for _ in range(4):
        batch = next(built.stream)
        batches.append(len(next(iter(batch.values()))))
        state, metrics = program(state, batch, lr)
        losses.append(float(metrics["loss"]).hex())
    measured = built.evaluator(["eval"], state, EvaluationRun(compile_eval(built, config), Path("."), "x"))
    out.append([batches, losses, measured])
print(json.dumps(out), flush=True)
"""


def run_together(code: str, *words: str) -> list[Any]:
    """What each of two processes prints, of one device each. Neither ends before both have printed: then both are killed."""
    address = f"127.0.0.1:{find_free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", f"{MEET}{code}\nsys.stdin.read()", address, str(number), *words],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]

    def kill() -> None:
        for process in pair:
            process.send_signal(signal.SIGKILL)

    # A process whose other one is gone may wait for ever.
    limit = threading.Timer(HANG_SECONDS, kill)
    limit.start()
    try:
        return [_read_result(process) for process in pair]
    finally:
        limit.cancel()
        kill()
        for process in pair:
            process.communicate()


def _read_result(process: subprocess.Popen[str]) -> Any:
    """The last line of JSON; what the libraries print comes before it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", "[[")):
            return json.loads(line)
    raise AssertionError(f"nothing came; the exit code is {process.wait()}")


def test_two_processes_lay_their_own_rows_and_compare_nothing() -> None:
    first, second = run_together(LAY)
    assert first["data"] == first["fsdp"] == [[0, 4], False, True, 140]
    assert second["data"] == second["fsdp"] == [[4, 8], False, True, 140]
    # Both hold a part of each layer, and compute with every example.
    assert first["tensor"] == second["tensor"] == [[0, 8], False, True, 140]
    assert first["number"] == second["number"] == [[7], "uint32", [1]]
    assert second["whole"] == "a batch has 8 rows here; expected rows 4 to 8 of it"


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_that_has_both_devices() -> None:
    """To the last bit: a sum of two numbers has no order."""
    small = "data=stdlib data.seq_len=16 model.num_layers=1 model.width=32 model.num_heads=2"
    words = ("data=digits model=mlp data.augment={crop:1,noise:0.1} mesh.data=2", f"{small} mesh.fsdp=2")
    apart = run_together(TRAIN, *words)
    done = subprocess.run(
        [sys.executable, "-c", MEET + TRAIN, "alone", "0", *words],
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout.splitlines()[-1])
    for process in apart:
        assert [each[1:] for each in process] == [each[1:] for each in together]
        assert [each[0] for each in process] == [[8] * 4] * 2
    assert [each[0] for each in together] == [[16] * 4] * 2


def test_one_process_needs_every_row_and_lays_them_as_jax_does() -> None:
    mesh = Mesh().build(8)
    assert is_local(mesh)
    assert find_local_rows(mesh, 8) == slice(0, 8)
    # Of any number: whoever looks at examples lays them there as well.
    laid = put_local_rows(mesh, 8, {"x": np.arange(3)})["x"]
    assert laid.tolist() == [0, 1, 2]


def test_the_loop_lays_the_rows_where_devices_are_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all are its own, the program takes them as they are; beside a teacher's arrays, `put` lays both."""
    built: Any = SimpleNamespace(mesh=Mesh().build(8), put=lambda batch: f"{batch}, laid", teacher=None)
    program: Any = lambda *words: words  # noqa: E731
    assert _feed_program(built, program) is program
    taught: Any = SimpleNamespace(**{**vars(built), "teacher": "there"})
    assert _feed_program(taught, program)("state", "rows", "lr") == ("state", "rows, laid", "lr")  # type: ignore[arg-type,comparison-overlap]
    monkeypatch.setattr(assemble, "is_local", lambda mesh: False)
    given: Any = _feed_program(built, program)
    assert given("state", "rows", "lr") == ("state", "rows, laid", "lr")


def test_a_run_makes_and_evaluates_the_rows_that_its_devices_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(HEAD + GOOD)
    model, program = ["model=mlp"], [f"program={tmp_path}/own.py:Program"]
    data = Synthetic(gives="images", size=64, image_size=4, batch_size=16)
    sources = data.sources()
    whole = next(make_stream(data, sources, 0))

    def make(words: list[str]) -> tuple[dict[str, np.ndarray], slice | None]:
        given = ("data=synthetic", "data.gives=images", "data.size=64", "data.image_size=4", "data.batch_size=16")
        built = build(compose_run([*words, *given]).config, sources)
        return dict(next(built.stream)), built.evaluator.rows

    for module in (build_steps, build_program):
        monkeypatch.setattr(module, "find_local_rows", lambda mesh, batch_size: slice(4, 16))
    for words in (model, program):
        batch, rows = make(words)
        assert rows == slice(4, 16)
        assert all((batch[name] == whole[name][4:]).all() for name in whole)
    # Whoever adds up parts of a batch chooses them himself.
    batch, rows = make([*model, "train.parts=4"])
    assert rows is None
    assert all((batch[name] == whole[name]).all() for name in whole)
