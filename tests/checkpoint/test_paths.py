"""A path is a path: whatever characters are in it, arrays lie where they should, and a seal finds where they do not."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from runner.__main__ import main as verbs
from runner.checkpoint import arrays, store
from runner.checkpoint.checkpointer import Checkpointer, SaveListeners, SavePolicy
from runner.checkpoint.record import PROGRESS, STATE, Record, Score, read_sidecar
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.retention import KeepAll
from runner.checkpoint.seal import WrittenArrays, find_problem, seal_checkpoint
from runner.checkpoint.strategy import EverySteps, Failures
from runner.errors import StorageError
from runner.text import format_override
from runner.values import StepInfo
from tests.conftest import QUICK_RUN, REPO, SMALL, Door, write_corpus

# Each means something to some language that a path is put into: URLs, shells, globs, YAML, Hydra, terminals.
PARTS = (
    *(" ", "%", "%41", "%2e", "%zz", "#", "?", "\\", "'", '"', "$", "$HOME", "${x}", ";", "&", "|", "<", ">", "!", "`"),
    *(
        "[",
        "]",
        "[a]",
        "{",
        "}",
        "*",
        "(",
        ")",
        ":",
        "://",
        "@",
        "=",
        ",",
        "+",
        "~",
        "^",
        "-",
        "--",
        ".",
        "..x",
        "a",
        "Z9",
    ),
    *("\n", "\t", "\x01", "\x7f", "é", "e\u0301", "漢", "🎉", "\u202e", "\u00a0", "\u2028"),
)
NO_TEXT = "\udcff"  # as Python names a byte that is not UTF-8


def ugly_name(rng: random.Random) -> str:
    name = "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 6))).replace("/", "_")
    return name if name not in (".", "..") else f"{name}_"


def state(step: int) -> dict[str, Any]:
    return {"w": jnp.full((8, 3), step, jnp.float32), "rng": {"key": jax.random.key(step)}, "step": jnp.int32(step)}


def saver(checkpoints: Path, told: list[str]) -> Checkpointer:
    policy = SavePolicy({"every": EverySteps(steps=1)}, {"all": KeepAll()}, Score(), background=False)
    return Checkpointer(checkpoints, policy, store, SaveListeners(told.append, lambda saved: None), Failures())


def files_below(folder: Path) -> set[str]:
    return {os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names}


def save_and_restore(root: Path, checkpoints: Path) -> None:
    told: list[str] = []
    made = saver(checkpoints, told)
    made.save("test", StepInfo(7), {STATE: state(7), PROGRESS: {"next": 7}})
    made.close()
    assert told == []
    directory = checkpoints / "7"
    # Nothing has gone anywhere else.
    inside = os.path.relpath(directory.absolute(), root)
    assert all(name.startswith(f"{inside}{os.sep}") for name in files_below(root))
    assert (directory / STATE / "manifest.ocdbt").is_file()
    assert find_problem(directory) is None
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
    found = restore_newest(checkpoints, root / "quarantine", lambda path: store.read_state(path, template), print)
    assert found is not None
    assert int(found[1]["step"]) == 7
    assert float(found[1]["w"].sum()) == 7 * 24
    assert store.find_differing_leaf(directory, state(7)) is None


@pytest.mark.parametrize("seed", range(40))
def test_what_is_saved_below_any_name_lies_there_and_comes_back(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    cwd = tmp_path / ugly_name(rng)
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    # Relative and absolute, as `root=` may be.
    start = Path() if seed % 2 else cwd
    checkpoints = start / ugly_name(rng) / ugly_name(rng) / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    save_and_restore(tmp_path, checkpoints)


@pytest.mark.parametrize("part", [*PARTS, NO_TEXT])
def test_each_character_alone(tmp_path: Path, part: str) -> None:
    checkpoints = tmp_path / f"a{part.replace('/', '_')}b"
    directory = checkpoints / "7"
    checkpoints.mkdir()
    written = {"w": store.np.arange(6, dtype=store.np.int32)}
    (directory / STATE).mkdir(parents=True)
    arrays.write_leaves(directory / STATE, {"w": arrays.LeafPieces((6,), (6,), [((), written["w"])])})
    assert all(name.startswith(f"{checkpoints.name}{os.sep}") for name in files_below(tmp_path))
    assert arrays.read_leaves(directory / STATE)["w"].tolist() == list(range(6))


def test_a_name_that_is_no_text_ends_the_run_at_its_first_save(tmp_path: Path) -> None:
    """Orbax writes no metadata there."""
    made = saver(tmp_path / f"a{NO_TEXT}", told := [])
    with pytest.raises(StorageError, match="step 7 cannot be saved: .*surrogates not allowed"):
        made.save("test", StepInfo(7), {STATE: state(7), PROGRESS: {}})
    made.close()
    assert told == []


def test_plain_orbax_reads_what_lies_below_a_name_that_would_be_another_in_a_url(tmp_path: Path) -> None:
    directory = tmp_path / "per%41cent #1?" / "7"
    directory.parent.mkdir()
    store.write_checkpoint(directory, state(7), {})
    restored = ocp.PyTreeCheckpointer().restore(directory / STATE)
    assert float(restored["w"].sum()) == 7 * 24


# --- names of arrays ---

LEAVES = (
    "a/b",
    "a%2eb",
    "%41",
    "..",
    ".",
    "a b",
    "é",
    "e\u0301",
    "漢",
    "zarr.json",
    "a/zarr.json",
    "c/0",
    "#?",
    "\\",
)


def test_arrays_of_any_name_come_back(tmp_path: Path) -> None:
    tree = {name: jnp.full((2,), number) for number, name in enumerate(LEAVES)}
    tree["a"] = {"c/0": jnp.full((2,), 100), "c": jnp.full((3,), 101)}
    listed = store.write_checkpoint(tmp_path / "1", tree, {})
    seal_checkpoint(tmp_path / "1", Record(1, "test", {}, 1.0), listed)
    assert find_problem(tmp_path / "1") is None
    assert files_below(tmp_path) == {f"1/{name}" for name in files_below(tmp_path / "1")}
    assert store.find_differing_leaf(tmp_path / "1", tree) is None


def test_two_arrays_of_one_name_are_refused_before_one_is_lost(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"two arrays of the state are called params\.a\.b"):
        store.write_checkpoint(tmp_path / "1", {"params": {"a": {"b": jnp.ones(2)}, "a.b": jnp.zeros(2)}}, {})
    assert not (tmp_path / "1").exists()


def test_an_array_without_a_name_is_refused_by_the_seal(tmp_path: Path) -> None:
    """TensorStore writes it beside the others, where no reader looks for it."""
    listed = store.write_checkpoint(tmp_path / "1", {"": jnp.ones(2), "a": jnp.ones(2)}, {})
    with pytest.raises(StorageError, match=r"^ is absent on disk and was float32\[2\] in memory"):
        seal_checkpoint(tmp_path / "1", Record(1, "test", {}, 1.0), listed)


# --- a seal compares what should be there ---


def test_a_seal_finds_what_was_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path that was taken for a URL did: the arrays lay in another directory, and the rest was sealed."""
    real, elsewhere = arrays.write_leaves, tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(arrays, "write_leaves", lambda place, *rest: real(elsewhere, *rest))
    made = saver(tmp_path / "checkpoints", [])
    with pytest.raises(StorageError, match=r"step 7 cannot be saved: .*rng\.key is absent on disk and was uint32\[2\]"):
        made.save("test", StepInfo(7), {STATE: state(7), PROGRESS: {}})
    made.close()
    assert not (tmp_path / "checkpoints/7").exists()


def test_a_seal_finds_an_array_that_is_missing_changed_or_too_many(tmp_path: Path) -> None:
    listed = store.write_checkpoint(tmp_path / "1", state(1), {}).table
    assert listed == {"rng.key": "uint32[2] key<threefry2x32>", "step": "int32[]", "w": "float32[8, 3]"}
    record = Record(1, "test", {}, 1.0)
    for wrong, said in (
        ({**listed, "more": "int8[1]"}, "more is absent on disk and was int8[1] in memory"),
        ({**listed, "w": "float32[3, 8]"}, "w is float32[8, 3] on disk and was float32[3, 8] in memory"),
        ({**listed, "rng.key": "uint32[2] key<rbg>"}, "rng.key is uint32[2] key<threefry2x32> on disk"),
        ({"w": listed["w"]}, "rng.key is uint32[2] key<threefry2x32> on disk and was absent in memory (and 1 more)"),
    ):
        with pytest.raises(StorageError) as caught:
            seal_checkpoint(tmp_path / "1", record, WrittenArrays(wrong))
        assert said in str(caught.value)
        # Whoever gave it a name all the same is found by `verify` and by a restart.
        assert said in str(find_problem(tmp_path / "1"))
    seal_checkpoint(tmp_path / "1", record, WrittenArrays(listed))
    assert find_problem(tmp_path / "1") is None
    assert read_sidecar(tmp_path / "1").arrays == listed


def test_a_checkpoint_without_arrays_is_found_where_an_older_sidecar_lists_none(tmp_path: Path) -> None:
    store.write_checkpoint(tmp_path / "1", state(1), {})
    for path in sorted((tmp_path / "1/state").rglob("*"), reverse=True):
        if path.name == "manifest.ocdbt" or "d" in path.relative_to(tmp_path / "1/state").parts[:1]:
            path.rmdir() if path.is_dir() else path.unlink()
    seal_checkpoint(tmp_path / "1", Record(1, "test", {}, 1.0, format=2))
    assert find_problem(tmp_path / "1") == "it holds no arrays: they were written somewhere else"


def test_arrays_of_the_older_format_are_not_compared() -> None:
    (directory,) = (REPO / "tests/fixtures/format2/checkpoints").glob("20")
    assert read_sidecar(directory).arrays is None
    assert find_problem(directory) is None


# --- whole runs ---


def test_a_run_below_ugly_names_is_trained_verified_and_gone_on_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "-cwd %41 #[a]'\\ $HOME;\n\"é\u0301漢🎉"
    cwd.mkdir()
    write_corpus(cwd)
    door = Door(cwd)
    root = "out?*{x}=1,%2e \\"
    command = (*SMALL, "train.steps=20", "ckpt.save.periodic.steps=10", format_override("root", root))
    done = door.run(*command, **QUICK_RUN)
    assert done.returncode == 0, done.stderr
    (config,) = cwd.glob("*/*/*/config.yaml")
    run = config.parent
    assert run.parent.parent.name == root
    assert sorted(path.name for path in tmp_path.iterdir()) == [cwd.name]
    assert sorted(path.name for path in cwd.iterdir()) == ["corpus.txt", root]
    monkeypatch.chdir(cwd)
    # As the page of the run says it, for a run that lies somewhere below here.
    assert verbs(["verify", str(run.relative_to(cwd)), "--all"]) == 0
    assert verbs(["ls", str(run)]) == 0
    capfd.readouterr()
    done = door.run(format_override("dir", str(run)), "train.steps=30", **QUICK_RUN)
    assert done.returncode == 0, done.stderr
    assert "restored step 20 " in done.stdout
    assert verbs(["verify", f"{run}@30"]) == 0
