"""`train.parts`: the bits of a run do not depend on how many devices computed it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.errors import ConfigError
from runner.launch.compose import compose_run
from runner.train.across_devices import (
    PartialSums,
    add_trees,
    divided_sharding,
    gather_results,
    list_own_devices,
    sum_across,
)
from runner.train.build import build
from runner.train.compile import compile_step
from tests.conftest import SMALL, Door
from tests.train.train_in_parts import MODELS, OWN, OWN_FILE, PARTS, run_in_parts

# The same pool of threads on every machine, as a run keeps its own.
THREADS = {"NPROC": "4", "JAX_PLATFORMS": "cpu"}


# In the short form two processes do (test_parts_processes.py), and the drill changes the number of devices.
@pytest.mark.slow
def test_one_and_four_devices_have_the_same_bits(tmp_path: Path) -> None:
    """With batch statistics, and with dropout and recomputation."""
    one, four = (run_in_parts((1, count), tmp_path, 6, (MODELS[3], MODELS[4])) for count in (1, 4))
    assert one == four
    assert all(found.losses[0] != found.losses[-1] for found in one)


@pytest.mark.slow
def test_one_two_and_four_devices_have_the_same_bits(tmp_path: Path) -> None:
    """Also with an average of the weights, bfloat16, a model and a metric of one's own, and labels left out."""
    one, two, four = (run_in_parts((1, count), tmp_path, 6, MODELS) for count in (1, 2, 4))
    assert one == two == four


@pytest.mark.slow
def test_a_hundred_steps_on_eight_devices_have_the_bits_of_one(tmp_path: Path) -> None:
    assert run_in_parts((1, 1), tmp_path, 100, MODELS) == run_in_parts((1, 8), tmp_path, 100, MODELS)


# In the short form the law of several processes has a run that moves (tests/laws/test_ranks.py), and the drill one.
@pytest.mark.slow
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


class Half:
    """A metric that merges to a number of Python, with more digits than an array has."""

    def __init__(self, value: Any):
        self.value = value

    def merge(self, other: Half) -> Half:
        return Half((float(self.value) + float(other.value)) / 2)

    def compute(self) -> Any:
        return self.value


jax.tree_util.register_pytree_node(Half, lambda half: ((half.value,), None), lambda _, values: Half(*values))


def test_numbers_that_a_metric_merges_to_are_rounded_at_once() -> None:
    """As they are where they have to move to another device: else the bits would depend on how many there are."""
    merged = add_trees({"half": Half(jnp.float32(0.1))}, {"half": Half(jnp.float32(0.2))})["half"].value
    assert isinstance(merged, jax.Array)
    assert merged.dtype == jnp.float32


def test_devices_are_numbered_through_all_processes() -> None:
    devices = np.array([SimpleNamespace(process_index=index) for index in (1, 0, 1, 0)])
    own = list_own_devices(SimpleNamespace(devices=devices))  # type: ignore[arg-type]
    assert [(each.place, each.device) for each in own] == [(1, devices[1]), (3, devices[3])]


def test_devices_meet_with_everything_that_numbers_can_be() -> None:
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    tree = {
        "flag": jnp.ones((1, 2), bool),
        "key": jax.random.split(jax.random.key(3), 1),
        "bf16": jnp.ones(1, jnp.bfloat16),
    }
    tree = jax.device_put(tree, divided_sharding(mesh))
    summed, kept = jax.jit(partial(sum_across, mesh))({"grads": jnp.full((1, 3), 0.1)}, tree)
    (gathered,) = gather_results(mesh, tree)
    assert summed["grads"].tolist() == [pytest.approx([0.1] * 3)]
    for name, leaf in tree.items():
        assert (kept[name].dtype, kept[name].shape) == (leaf.dtype, leaf.shape)
        assert (kept[name] == leaf).all()
        assert (gathered[name] == leaf[0]).all()


def test_what_lasts_and_is_no_fraction_is_that_of_the_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count grows by one in a step of eight parts; a key stays; the state before gives its memory to the next one."""
    (tmp_path / "own.py").write_text(OWN_FILE)
    monkeypatch.chdir(tmp_path)
    config = compose_run([*OWN.split(), *PARTS, "mesh=single"]).config
    built = build(config)
    program, before = compile_step(built, config), built.init()
    keys = jax.random.key_data(before["extra"]["key"])
    batch = next(built.stream)
    after, _ = program(before, batch, built.train_step.put_lr())
    assert int(after["extra"]["seen"]) == 1
    assert int(after["extra"]["bright"]) == (batch["inputs"][:4] > 0.5).sum() != (batch["inputs"][4:8] > 0.5).sum()
    assert (jax.random.key_data(after["extra"]["key"]) == keys).all()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before["params"]))


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
