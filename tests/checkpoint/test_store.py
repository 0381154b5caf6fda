"""BYTES: what goes in comes out bit for bit, whoever reads it; what is not what was written is found."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from runner.checkpoint import arrays, store
from runner.checkpoint.record import (
    FORMAT,
    PIN,
    READABLE_FORMATS,
    SIDECAR,
    STATE,
    Record,
    list_records,
    list_steps,
    locate_checkpoint,
    read_progress,
    read_sidecar,
)
from runner.checkpoint.seal import find_problem, measure_files, seal_checkpoint
from runner.checkpoint.transfer import transfer_weights
from runner.errors import RefusedError, StorageError
from tests.conftest import REPO

PROGRESS_VALUE = {"position": {"next_index": 3}, "best": None}


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "w": jnp.asarray(rng.standard_normal((64, 33)), jnp.float32),
            "deep": {"b": jnp.arange(seed, seed + 7), "half": jnp.ones((5,), jnp.bfloat16) / 3},
        },
        "opt": (jnp.float32(seed), {"count": jnp.int32(seed)}),
        "rng": {"key": jax.random.key(seed), "fast": jax.random.split(jax.random.key(seed, impl="rbg"), 3)},
    }


def abstract(state: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)


def raw(leaf: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def assert_equal(mine: Any, theirs: Any) -> None:
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert raw(one) == raw(other)


def saved(directory: Path, state: Any, **record: Any) -> Path:
    """A sealed checkpoint."""
    store.write_checkpoint(directory, state, PROGRESS_VALUE)
    seal_checkpoint(directory, Record(int(directory.name), "test", {"eval/loss": 0.1 + 0.2}, 1.5, **record))
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint to look at; whoever wants to damage one makes a copy."""
    return saved(tmp_path_factory.mktemp("checkpoints") / "3", tree(3))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "3"))


# --- what goes in comes out ---


def test_what_goes_in_comes_out_bit_for_bit(checkpoint: Path) -> None:
    back = store.read_state(checkpoint, abstract(tree()))
    assert_equal(back, tree(3))
    assert read_progress(checkpoint) == PROGRESS_VALUE
    assert all(leaf.committed for leaf in jax.tree.leaves(back))  # or the first step after a resume compiles again


def test_a_held_copy_is_what_it_was_when_the_state_goes_on(tmp_path: Path) -> None:
    state = tree(5)
    held = store.copy_to_host(state)
    step = jax.jit(
        lambda state: {**state, "params": jax.tree.map(lambda leaf: leaf * 0, state["params"])}, donate_argnums=0
    )
    step(state)
    assert state["params"]["w"].is_deleted()
    assert_equal(store.read_state(saved(tmp_path / "5", held), abstract(tree())), tree(5))


def test_plain_orbax_reads_it_without_a_line_of_ours(checkpoint: Path) -> None:
    manager = ocp.CheckpointManager(checkpoint.parent)
    assert manager.latest_step() == 3
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract(tree())), progress=ocp.args.JsonRestore())
    back = manager.restore(3, args=items)
    manager.close()
    assert_equal(back["state"], tree(3))
    assert back["progress"] == PROGRESS_VALUE


NOTES = ("array_metadatas/process_0", "_sharding")  # what Orbax notes beside the arrays, and store.py writes itself


def test_orbax_restores_it_without_being_told_what_or_where(checkpoint: Path) -> None:
    """Types, random generators and places then come from the notes beside the arrays."""
    manager = ocp.CheckpointManager(checkpoint.parent)
    state = manager.restore(3, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    manager.close()
    assert_equal({**state, "opt": tuple(state["opt"])}, tree(3))
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {jax.sharding.SingleDeviceSharding(jax.devices()[0])}


def test_the_notes_are_those_that_the_installed_orbax_writes(checkpoint: Path, tmp_path: Path) -> None:
    """They are private to Orbax: a release that writes others must be seen here first."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    with ocp.Checkpointer(handler) as plain:
        plain.save(tmp_path / "plain", args=ocp.args.PyTreeSave(tree(3)))
    for name in NOTES:
        ours, theirs = (json.loads((state / name).read_bytes()) for state in (checkpoint / STATE, tmp_path / "plain"))
        assert ours == theirs, name


def test_numpy_reads_it_without_a_model(checkpoint: Path) -> None:
    named, state = arrays.read_leaves(checkpoint / STATE), tree(3)
    assert named["params.w"].tobytes() == raw(state["params"]["w"])
    assert named["params.deep.half"].dtype.name == "bfloat16"
    assert named["rng.key"].tobytes() == raw(state["rng"]["key"])
    assert arrays.read_leaf_specs(checkpoint / STATE)["rng.fast"] == arrays.LeafSpec((3, 4), "uint32", "rbg")
    assert arrays.read_leaf_specs(checkpoint / STATE) == {
        name: store.describe_leaf(leaf) for name, leaf in sorted(store.name_leaves(state).items())
    }


def test_many_devices_share_it_and_each_part_is_read_where_it_goes(tmp_path: Path) -> None:
    """Written on one device, read on four in another division, in a process that has four."""
    import subprocess
    import sys

    state = {"w": jnp.arange(64.0).reshape(8, 8), "keys": jax.random.split(jax.random.key(1), 4)}
    saved(tmp_path / "3", state)
    code = """
import sys, jax, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from runner.checkpoint import store
mesh = jax.make_mesh((4,), ("data",))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
template = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=rows),
            "keys": jax.ShapeDtypeStruct((4,), jax.random.key(0).dtype, sharding=rows)}
back = store.read_state(Path(sys.argv[1]), template)
assert back["w"].sharding == rows and len(back["w"].addressable_shards) == 4
assert back["w"].addressable_shards[1].data.shape == (2, 8)
assert np.array_equal(np.asarray(back["w"]), np.arange(64.0).reshape(8, 8))
assert np.array_equal(jax.random.key_data(back["keys"]), jax.random.key_data(jax.random.split(jax.random.key(1), 4)))
store.write_checkpoint(Path(sys.argv[2]), back, {})
import json, orbax.checkpoint as ocp
plain = Path(sys.argv[2] + "-plain")
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)) as orbax:
    orbax.save(plain, args=ocp.args.PyTreeSave(back))
for name in ("array_metadatas/process_0", "_sharding"):  # the notes of arrays that are divided
    ours, theirs = (json.loads((state / name).read_bytes()) for state in (Path(sys.argv[2]) / "state", plain))
    assert ours == theirs, (name, ours, theirs)
"""
    again = tmp_path / "4"
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "3"), str(again)],
        env={**os.environ, **environment, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = dict[str, Any]()
    assert_equal(store.read_state(again, abstract(state), measured), state)  # and back from four to one
    # Also of files that TensorStore reads, for arrays that are divided otherwise.
    names = [path.relative_to(again).as_posix() for path in (again / "state/d").iterdir()]
    assert measured == measure_files(again, names, checksums=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["params"].pop("w"), "params.w is float32[64, 33] on disk and absent"),
        (lambda t: t["params"].update(new=t["params"]["w"]), "params.new is absent on disk and float32[64, 33]"),
        (
            lambda t: t["params"].update(w=jnp.zeros((64, 34))),
            "params.w is float32[64, 33] on disk and float32[64, 34]",
        ),
        (lambda t: t["params"].update(w=t["params"]["w"].astype(jnp.bfloat16)), "and bfloat16[64, 33]"),
        (
            lambda t: t["rng"].update(key=jax.random.key(0, impl="rbg")),
            "rng.key is uint32[2] key<threefry2x32> on disk",
        ),
        (lambda t: t["rng"].update(fast=jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 3)), "key<rbg> on disk"),
        (lambda t: (t["params"].pop("w"), t["rng"].pop("key")), "(and 1 more)"),
    ],
    ids=["removed", "added", "reshaped", "cast", "key", "generator", "two"],
)
def test_another_structure_is_refused_and_named(checkpoint: Path, change: Callable[[Any], Any], said: str) -> None:
    other = tree(3)
    change(other)
    with pytest.raises(RefusedError, match=".") as caught:
        store.read_state(checkpoint, abstract(other))
    assert said in str(caught.value)


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        store.write_checkpoint(tmp_path / "file" / "3", tree(), {})


def test_reading_back_finds_the_leaf_that_differs(checkpoint: Path) -> None:
    state = tree(3)
    assert store.find_differing_leaf(checkpoint, state) is None
    flipped = np.asarray(state["params"]["deep"]["b"]).copy()
    flipped[2] ^= 1
    state["params"]["deep"]["b"] = jnp.asarray(flipped)
    assert store.find_differing_leaf(checkpoint, state) == "params.deep.b"
    state["params"]["deep"]["b"] = jnp.asarray(flipped, jnp.uint32)
    assert store.find_differing_leaf(checkpoint, state) == "params.deep.b"


def test_the_logical_digest_is_of_what_it_means(checkpoint: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return arrays.compute_logical_digest(path / STATE, read_progress(path))

    again = saved(tmp_path / "3", tree(3))
    manifests = [(path / STATE / "manifest.ocdbt").read_bytes() for path in (again, checkpoint)]
    assert manifests[0] != manifests[1]  # when it was written is in it
    assert digest(again) == digest(checkpoint)
    assert digest(saved(tmp_path / "4", tree(4))) != digest(checkpoint)
    other = tree(3)
    other["params"]["v"] = other["params"].pop("w")
    assert digest(saved(tmp_path / "5", other)) != digest(checkpoint)


# --- proof ---


def test_every_file_is_in_the_seal_and_the_seal_seals_itself(checkpoint: Path) -> None:
    record, files, _ = read_sidecar(checkpoint)
    there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(files) == there - {SIDECAR}
    assert {"_CHECKPOINT_METADATA", "commit_success.txt", "state/manifest.ocdbt"} <= set(files)
    assert record.num_bytes == sum((checkpoint / name).stat().st_size for name in files)
    assert (record.step, record.reason, record.format, record.pinned) == (3, "test", FORMAT, False)
    assert record.metrics == {"eval/loss": 0.1 + 0.2}
    assert json.loads((checkpoint / SIDECAR).read_bytes())["step"] == 3  # any reader of JSON sees what is in it


def test_every_single_bit_of_the_sidecar_matters(copy: Path) -> None:
    sidecar = copy / SIDECAR
    content = sidecar.read_bytes()
    assert find_problem(copy) is None
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        sidecar.write_bytes(damaged)
        assert find_problem(copy), f"byte {at}: {content[at - 20 : at + 20]!r}"


@pytest.mark.parametrize("seed", range(20))
def test_damage_of_any_kind_to_any_file_is_found(copy: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = rng.choice(sorted(file for file in copy.rglob("*") if file.is_file()))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    for damaged in (flipped, content[: rng.randrange(len(content))], content + b"\0", b""):
        path.write_bytes(damaged)
        assert find_problem(copy), path
    path.unlink()
    assert find_problem(copy), path
    path.write_bytes(content)
    assert find_problem(copy) is None
    (copy / "state" / "foreign").write_bytes(b"")
    assert find_problem(copy) == "state/foreign does not belong to it"


def test_the_reason_is_said(copy: Path) -> None:
    data = max(copy.rglob("d/*"), key=lambda path: path.stat().st_size)
    name, content = data.relative_to(copy).as_posix(), data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_problem(copy) == f"{name} is not what was written (its checksum differs)"
    assert find_problem(copy, checksums=False) is None  # what `verify=off` means
    data.write_bytes(content[:-1])
    assert find_problem(copy, checksums=False) == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
    data.unlink()
    assert find_problem(copy) == f"{name} is missing"
    (copy / SIDECAR).unlink()
    assert find_problem(copy) == "no holdfast.json: it was never finished, or it is not a checkpoint of a run"


def test_a_checkpoint_under_another_name_is_not_one(copy: Path) -> None:
    moved = copy.rename(copy.parent / "4")
    assert find_problem(moved) == "holdfast.json cannot be believed (holdfast.json belongs to step 3)"


def test_a_pin_is_a_file_and_nothing_else_changes(copy: Path) -> None:
    (copy / PIN).touch()
    assert read_sidecar(copy)[0].pinned
    assert find_problem(copy) is None


def test_without_checksums_only_names_and_sizes_are_sealed(tmp_path: Path) -> None:
    store.write_checkpoint(tmp_path / "3", tree(), PROGRESS_VALUE)
    seal_checkpoint(tmp_path / "3", Record(3, "test", {}, 1.5), checksums=False)
    assert all("xxh3" not in file for file in read_sidecar(tmp_path / "3")[1].values())
    assert find_problem(tmp_path / "3") is None


def test_names_that_look_like_steps_are_not(tmp_path: Path) -> None:
    for name in ("30", "0030", "30 (copy)", ".30.a1b2", "३०", "-3", "best", "31.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "40").write_text("a file")
    assert list_steps(tmp_path) == [30]


def test_references_name_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run / "checkpoints")
    saved(run / "checkpoints/9", tree(), mark="error")
    assert (
        locate_checkpoint(str(run))
        == locate_checkpoint(f"{run}@newest")
        == locate_checkpoint(f"{run}@3")
        == run / "checkpoints/3"
    )
    assert locate_checkpoint(f"{run}@9") == run / "checkpoints/9"
    for wrong, said in {
        "@best": "has no checkpoint 'best'; it has 3",
        "@4": "'4'",
        "x": "no checkpoints are in",
    }.items():
        with pytest.raises(RefusedError, match=".") as caught:
            locate_checkpoint(f"{run}{wrong}")
        assert said in str(caught.value)
    (run / "checkpoints/best").symlink_to("3")
    assert locate_checkpoint(f"{run}@best") == (run / "checkpoints/3").resolve()


@pytest.mark.parametrize("number", READABLE_FORMATS)
def test_a_checkpoint_of_each_format_is_proven_and_read(number: int) -> None:
    """Each fixture was written when the number of the format was raised to it."""
    run = REPO / f"tests/fixtures/format{number}"
    (record,) = list_records(run / "checkpoints")
    directory = run / "checkpoints" / str(record.step)
    assert record.format == number
    assert find_problem(directory) is None
    assert arrays.read_leaves(directory / STATE)["step"] == record.step
    assert read_progress(directory)["position"]


# --- weights of another run ---


def state_of(layers: int = 2, width: int = 4, *, head: bool = True) -> dict[str, Any]:
    """A train state with stacked layers, as models keep them."""
    rng = np.random.default_rng(layers * 10 + width)
    params = {
        "blocks": {"w": jnp.asarray(rng.standard_normal((layers, width, width)), jnp.float32)},
        "norm": jnp.ones(width),
    }
    if head:
        params["head"] = jnp.asarray(rng.standard_normal((width, 3)), jnp.float32)
    return {
        "step": jnp.int32(layers),
        "params": params,
        "extra": {},
        "opt": {"mu": jnp.full(width, 7.0)},
        "rng": {"k": jax.random.key(layers)},
    }


def stacked(name: str) -> bool:
    return name.startswith("params.blocks.")


def test_weights_are_taken_and_the_rest_stays_fresh(tmp_path: Path) -> None:
    source, fresh = state_of(), jax.tree.map(lambda leaf: leaf, state_of())
    fresh["params"] = jax.tree.map(jnp.zeros_like, fresh["params"])
    fresh["step"], fresh["opt"] = jnp.int32(0), {"mu": jnp.zeros(4)}
    state, report = transfer_weights(fresh, saved(tmp_path / "2", source), partial=False, stacked=stacked)
    assert_equal(state["params"], source["params"])
    assert (int(state["step"]), float(state["opt"]["mu"].sum())) == (0, 0.0)
    assert report.exact
    assert len(report.taken) == 3
    assert report.lines() == []


def test_strict_weights_name_what_differs(tmp_path: Path) -> None:
    source = saved(tmp_path / "2", state_of(head=False))
    with pytest.raises(RefusedError, match=r"params.head is missing there: float32\[4, 3\]; .*init_from.partial=true"):
        transfer_weights(state_of(), source, partial=False, stacked=stacked)
    with pytest.raises(
        RefusedError, match=r"is reshaped: float32\[2, 4, 4\] there, float32\[3, 4, 4\] here \(and 1 more\)"
    ):
        transfer_weights(state_of(layers=3), source, partial=False, stacked=stacked)


def test_partial_adds_a_layer_and_keeps_the_old_weights(tmp_path: Path) -> None:
    source, fresh = state_of(layers=2), state_of(layers=3)
    del source["params"]["head"]
    source["params"]["old"] = jnp.ones(2)
    state, report = transfer_weights(fresh, saved(tmp_path / "2", source), partial=True, stacked=stacked)
    assert_equal(state["params"]["blocks"]["w"][:2], source["params"]["blocks"]["w"])
    assert_equal(state["params"]["blocks"]["w"][2], fresh["params"]["blocks"]["w"][2])
    assert_equal(state["params"]["head"], fresh["params"]["head"])
    assert report.taken == ["params.norm"]
    assert report.lines() == [
        "  missing there, fresh here: params.head float32[4, 3]",
        "  unexpected, left there: params.old float32[2]",
        "  reshaped: params.blocks.w float32[2, 4, 4] there, float32[3, 4, 4] here (the first 2 of 3 layers taken)",
    ]


def test_partial_casts_and_leaves_what_has_another_shape(tmp_path: Path) -> None:
    source = state_of()
    source["params"]["norm"] = (jnp.arange(4) / 3).astype(jnp.bfloat16)
    source["params"]["head"] = jnp.ones((5, 3))
    fresh = state_of()
    state, report = transfer_weights(fresh, saved(tmp_path / "2", source), partial=True, stacked=stacked)
    assert_equal(state["params"]["norm"], source["params"]["norm"].astype(jnp.float32))
    assert_equal(state["params"]["head"], fresh["params"]["head"])
    assert report.reshaped["params.norm"].endswith("(cast)")
    assert report.reshaped["params.head"].endswith("(fresh)")


def test_weights_are_proven_before_they_are_taken(tmp_path: Path) -> None:
    source = saved(tmp_path / "2", state_of())
    data = max(source.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    with pytest.raises(RefusedError, match=r"is not good: .*its checksum differs"):
        transfer_weights(state_of(), source, partial=True, stacked=stacked)


def test_weights_keep_their_place_on_the_mesh(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    fresh = jax.device_put(state_of(), NamedSharding(mesh, PartitionSpec()))
    state, _ = transfer_weights(fresh, saved(tmp_path / "2", state_of()), partial=False, stacked=stacked)
    assert state["params"]["head"].sharding == fresh["params"]["head"].sharding
