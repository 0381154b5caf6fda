"""Where arrays lie: which axis divides what, by name and shape; and on eight devices, what each of them holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from runner.errors import ConfigError
from runner.launch.compose import compose_run
from runner.mesh import Mesh, choose_axes
from tests.conftest import HANG_SECONDS, QUICK_RUN, REPO, SMALL, Door

# Compiled in half of the time: numbers are compared to rounding, and what is sent is in the program before that.
EIGHT = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK_RUN['XLA_FLAGS']}",
    "JAX_PLATFORMS": "cpu",
}
SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("params.blocks.attention.qkv.kernel", (4, 128, 384), (None, "fsdp", "tensor")),
        ("params.blocks.attention.out.kernel", (4, 128, 128), (None, "tensor", "fsdp")),
        ("params.blocks.ffn.up.kernel", (4, 128, 512), (None, "fsdp", "tensor")),
        ("params.blocks.ffn.down.kernel", (4, 512, 128), (None, "tensor", "fsdp")),
        ("opt.1.0.mu.blocks.ffn.down.kernel", (4, 512, 128), (None, "tensor", "fsdp")),
        ("ema.blocks.ffn.up.bias", (8, 1024), (None, "tensor")),
        ("params.embed.embedding", (50257, 128), (None, "fsdp")),  # the rows do not divide by 4
        ("params.embed.embedding", (256, 128), ("fsdp", None)),
        ("params.blocks.norm.scale", (4, 128), ()),  # small
        ("params.blocks.0.linear.kernel", (4096, 3), ("fsdp", None)),  # a list of blocks is not stacked
        ("params.blocks.linear.kernel", (4096, 3, 5), ()),  # the layers are never divided, and nothing else divides
        ("params.layers.q_proj.kernel", (64, 64), ("fsdp", "tensor")),
        ("weights.params.Dense_0.kernel", (64, 100), (None, "fsdp")),
        ("params.head.kernel", (128, 1001), ("fsdp", None)),  # tensor does not divide its outputs
        ("step", (), ()),
        ("params.conv.kernel", (3, 3, 32, 64), (None, None, None, "fsdp")),
    ],
)
def test_tensor_divides_by_name_and_fsdp_the_largest_that_is_left(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> None:
    found = choose_axes(name.split("."), shape, SIZES)
    assert [*found, *[None] * (len(shape) - len(found))] == [*axes, *[None] * (len(shape) - len(axes))]


def test_without_these_axes_nothing_is_divided() -> None:
    assert choose_axes(("params", "head", "kernel"), (4096, 4096), {"data": 8}) == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mesh.data=-1", "mesh.fsdp=-1"], r"mesh.data=-1 and fsdp=-1 both ask for what is left"),
        (["mesh.fsdp=0"], r"mesh.fsdp=0 must be a number of devices"),
        (["mesh.tensor=3"], r"mesh.tensor=3 must divide model.num_heads=4"),
        (["mesh.fdsp=2"], r"mesh.fdsp: unknown key; did you mean fsdp"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_run(words)


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mesh.data=2, mesh.fsdp=3: 6 devices in all; this machine has \d+ device"):
        Mesh(data=2, fsdp=3).build(12)


def test_a_mesh_may_be_typed_as_a_mapping() -> None:
    config = compose_run(["mesh={data: 2, fsdp: 4, tensor: 1}"]).config
    assert config.mesh == Mesh(data=2, fsdp=4)
    assert compose_run(["mesh=fsdp", "mesh.tensor=2"]).config.mesh == Mesh(fsdp=-1, tensor=2)


# One process with eight devices does all of this: starting it is what takes long.
PROGRAM = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from runner.checkpoint import store
from runner.launch.compose import compose_run
from runner.mesh import bytes_per_device, state_shardings
from runner.train.build import build, read_train_state
from runner.train.compile import trace_step

assert len(jax.devices()) == 8
out, folder = {}, Path(sys.argv[1])
WORDS = ["data=stdlib", "data.seq_len=32", "data.batch_size=24", "model.num_layers=2", "optim.ema=0.99"]
MESHES = {
    "one": [], "data": ["mesh=data"], "fsdp": ["mesh=fsdp"], "both": ["mesh.data=2", "mesh.fsdp=4"],
    "tensor": ["mesh.tensor=2"], "three": ["mesh.fsdp=3"], "all": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
}
same = lambda a, b: all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(
    jax.tree.leaves(jax.tree.map(words, a)), jax.tree.leaves(jax.tree.map(words, b)), strict=True))
words = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
builds, first = {}, None
for name, more in MESHES.items():
    config = compose_run([*WORDS, *more]).config
    built = builds[name] = build(config)
    state = built.init()
    first = state if first is None else first
    found = out[name] = {"bytes": bytes_per_device(built.abstract), "init": same(state, first)}
    # What each device holds of the largest array.
    largest = max(jax.tree.leaves(state["params"]), key=lambda leaf: leaf.size)
    found["share"] = largest.addressable_shards[0].data.size / largest.size
    if name in ("one", "data", "fsdp", "all"):
        program = trace_step(built, config).lower().compile()
        text = program.as_text()
        found["sent"] = {op: len(re.findall(rf" {op}(?:-start)?[(]", text)) for op in ("all-gather", "all-to-all")}
        batch, lr = built.put(next(built.stream)), built.train_step.put_lr()
        trained = jax.tree.map(jnp.copy, state)
        trained, metrics = program(trained, batch, lr)
        found["loss"], found["norm"] = float(metrics["loss"]), float(metrics["grad_norm"])
        where = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
        found["stays"] = all(a.is_equivalent_to(b.sharding, b.ndim) for a, b in zip(where(trained), jax.tree.leaves(state)))
        weights = built.put(np.ones(24, np.float32))
        found["eval"] = float(built.eval_step(state, batch, weights)["loss"])
# Saved on any of them, restored on any other.
for name in ("one", "fsdp", "all"):
    store.write_checkpoint(folder / name, builds[name].init(), {})
out["restored"] = {
    f"{one} to {other}": same(read_train_state(builds[other], folder / one), first)
    for one in ("one", "fsdp", "all") for other in MESHES
}
class Net(nnx.Module):
    def __init__(self, rngs):
        stated = {"out_sharding": ("tensor", ("data", "fsdp"))}
        self.a = nnx.Linear(64, 96, kernel_metadata=stated, rngs=rngs)
from runner.train.split_model import split_model, read_declared_axes
with nnx.use_eager_sharding(False):
    declared = read_declared_axes(split_model(lambda: Net(nnx.Rngs(0)), lambda model: None))
abstract = {"params": {"a": {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}},
            "opt": [{"mu": {"a": {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}}}]}
placed = state_shardings(builds["all"].mesh, abstract, declared)
out["declared"] = [list(leaf.spec) for leaf in jax.tree.leaves(placed)]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("checkpoints"))],
        env={**os.environ, **EIGHT, "PYTHONPATH": str(REPO)},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fsdp_divides_the_state(on_eight: dict[str, Any]) -> None:
    whole = on_eight["one"]["bytes"]
    assert on_eight["data"]["bytes"] == whole
    assert on_eight["fsdp"]["bytes"] < whole / 7
    assert on_eight["both"]["bytes"] < whole / 3.5
    assert on_eight["tensor"]["bytes"] < whole / 1.8
    assert on_eight["all"]["bytes"] < whole / 3.5
    shares = {name: found["share"] for name, found in on_eight.items() if "share" in found}
    assert shares == {"one": 1, "data": 1, "fsdp": 1 / 8, "both": 1 / 4, "tensor": 1 / 2, "three": 1, "all": 1 / 4}


def test_the_fresh_state_has_the_same_bits_on_every_mesh(on_eight: dict[str, Any]) -> None:
    assert [name for name, found in on_eight.items() if "init" in found and not found["init"]] == []
    assert sum("init" in found for found in on_eight.values()) == 7


def test_a_step_computes_the_same_to_rounding_and_leaves_the_state_where_it_was(on_eight: dict[str, Any]) -> None:
    one = on_eight["one"]
    for name in ("data", "fsdp", "all"):
        for value in ("loss", "norm", "eval"):
            assert on_eight[name][value] == pytest.approx(one[value], rel=1e-5), (name, value)
        assert on_eight[name]["stays"], name


def test_activations_are_stated_so_that_none_is_moved_back_and_forth(on_eight: dict[str, Any]) -> None:
    """Without `constrain_batch` at the borders of blocks there are all-to-alls in the step, and twice as many gathers."""
    assert on_eight["fsdp"]["sent"]["all-to-all"] == 0
    assert on_eight["fsdp"]["sent"]["all-gather"] <= 12
    assert on_eight["one"]["sent"] == {"all-gather": 0, "all-to-all": 0}


def test_saved_on_any_mesh_it_is_restored_on_any_other(on_eight: dict[str, Any]) -> None:
    assert len(on_eight["restored"]) == 21
    assert [pair for pair, equal in on_eight["restored"].items() if not equal] == []


def test_what_a_model_states_of_its_weights_wins(on_eight: dict[str, Any]) -> None:
    """Also for what an optimizer keeps of them."""
    assert on_eight["declared"] == [["tensor", ["data", "fsdp"]]] * 2


@pytest.mark.forked(quick=True)
def test_a_run_moves_from_mesh_to_mesh(door: Door) -> None:
    """Killed on one device, gone on with on four that divide the state, ended on two that share the batch."""
    four, two = ({"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"} for count in (4, 2))
    door.kill_at(20, *SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=10")
    moved = door.run(f"dir={door.the_run}", "mesh=fsdp", "train.steps=80", **four)
    assert moved.returncode == 0, moved.stderr
    assert "changed: mesh.fsdp: " in moved.stdout
    assert "\non 4 × cpu (fsdp 4), and on 1 × cpu before: from here on it is the same to rounding, not" in moved.stdout
    ended = door.run(f"dir={door.the_run}", "mesh=data", "train.steps=100", **two)
    assert ended.returncode == 0, ended.stderr
    attempts = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["hardware"] for attempt in attempts] == ["1 × cpu", "4 × cpu (fsdp 4)", "2 × cpu"]
    assert attempts[1]["from_step"] > 0
    assert attempts[2]["from_step"] == 80
