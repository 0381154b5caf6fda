"""The verbs on a run that trained a part of a model: its frozen weights belong to each of its checkpoints."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from runner.errors import RefusedError
from runner.inspect import diff_checkpoints, export_weights, ls_runs, show_checkpoint, verify_checkpoint
from runner.inspect.load_model import load_model
from tests.conftest import SMALL, Door
from tests.laws.test_tuned import FREEZE, LORA, base_of, flip, largest

pytestmark = pytest.mark.forked(quick=True)
SHORT = ("train.steps=10", "optim.ema=0.9")
TOKENS = jnp.arange(32).reshape(2, 16) % 64


@pytest.fixture(scope="module")
def runs(make_door: Callable[..., Door], served: Any) -> dict[str, Path]:
    found = {}
    for name, words in {"lora": (*LORA, "tune.alpha=32"), "freeze": FREEZE, "whole": SMALL}.items():
        door = make_door(name, served)
        done = door.run(*words, *SHORT)
        assert done.returncode == 0, done.stderr
        found[name] = door.the_run
    return found


def said_by(verb: Any, **arguments: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    return verb.run_verb(Namespace(**arguments), said.append).exit_code, said


def export(run: Path, to: Path, form: str = "safetensors", weights: str = "params") -> dict[str, np.ndarray]:
    code, _ = said_by(export_weights, checkpoint=str(run), directory=str(to), to=form, weights=weights)
    assert code == 0
    (file,) = to.glob("*.safetensors")
    return dict(load_file(file))


@pytest.mark.parametrize("weights", ["params", "ema"])
@pytest.mark.parametrize("kind", ["lora", "freeze"])
def test_what_is_exported_is_the_model_that_is_loaded(
    kind: str, weights: Any, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Under the names of a run that trained all of it: whoever loads it need not know how it was trained."""
    exported = export(runs[kind], tmp_path / "out", weights=weights)
    plain, _ = load_model(str(runs["whole"]))
    names = set(export(runs["whole"], tmp_path / "whole"))
    assert exported.keys() == names
    from flax import nnx

    state = nnx.state(plain, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(exported["params." + ".".join(map(str, path))]))
    nnx.update(plain, state)
    tuned, _ = load_model(str(runs[kind]), weights)
    assert np.allclose(plain(TOKENS), tuned(TOKENS), atol=2e-5)
    card = (tmp_path / "out/README.md").read_text()
    assert "trained " in card
    assert "Here is the whole model." in card


def test_adapters_alone_are_in_the_layout_of_peft(runs: dict[str, Path], tmp_path: Path) -> None:
    arrays = export(runs["lora"], tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 32.0)
    assert "blocks.1.attention.qkv" in config["target_modules"]
    assert len(arrays) == 2 * len(config["target_modules"]) == 2 * 2 * 3
    whole, base = export(runs["lora"], tmp_path / "whole"), base_of(runs["lora"])
    from runner.checkpoint.arrays import read_leaves

    kernel = read_leaves(base / "state", ["frozen.blocks.ffn.up.kernel"])["frozen.blocks.ffn.up.kernel"]
    for layer in range(2):
        a, b = (arrays[f"base_model.model.blocks.{layer}.ffn.up.lora_{each}.weight"] for each in "AB")
        assert a.shape == (2, 32)
        assert b.shape == (64, 2)
        merged = kernel[layer].T + 32 / 2 * b @ a
        assert np.allclose(merged.T, whole["params.blocks.ffn.up.kernel"][layer], atol=1e-6)


def test_a_flipped_byte_in_the_base_is_told_by_every_verb(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["lora"], tmp_path / "name/run", symlinks=True))
    assert said_by(verify_checkpoint, checkpoint=str(run), all=True)[0] == 0
    flip(largest(base_of(run)))
    code, said = said_by(verify_checkpoint, checkpoint=str(run), all=True)
    assert code == 3
    assert any(line.startswith("frozen ") and "its checksum differs" in line for line in said)
    for use in (lambda: load_model(str(run)), lambda: export(run, tmp_path / "out")):
        with pytest.raises(RefusedError, match="frozen weights that this run's checkpoints need are not good"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_run_under_this_name_is_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["lora"], tmp_path / "name/run", symlinks=True))
    base = base_of(run)
    shutil.rmtree(base)
    shutil.copytree(base_of(runs["freeze"]), base)
    code, said = said_by(verify_checkpoint, checkpoint=str(run), all=True)
    assert code == 3
    assert any("is of another base" in line for line in said)


def test_diff_compares_the_bases_as_well(runs: dict[str, Path]) -> None:
    code, said = said_by(diff_checkpoints, a=str(runs["lora"]), b=str(runs["freeze"]))
    assert code == 1
    assert any("frozen." in line for line in said)
    assert said_by(diff_checkpoints, a=str(runs["lora"]), b=str(runs["lora"]))[0] == 0


def test_a_save_has_what_trains_and_no_more(runs: dict[str, Path]) -> None:
    from runner.checkpoint.arrays import read_leaf_specs

    for kind in ("lora", "freeze"):
        specs = read_leaf_specs(runs[kind] / "checkpoints/10/state")
        assert {name.partition(".")[0] for name in specs} == {"params", "opt", "ema", "step", "rng"}
        trained = sum(spec.num_bytes for name, spec in specs.items() if name.startswith("params."))
        assert sum(spec.num_bytes for spec in specs.values()) < 4.05 * trained, "AdamW has two moments; and the average"


def test_another_run_begins_with_what_a_tuned_run_computes(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapters are added to the kernels: a run that trains all, and one with fresh adapters, begin alike."""
    from runner.train.build import build, start_from_weights
    from tests.conftest import composed

    for kind in ("lora", "freeze"):
        tuned, _ = load_model(str(runs[kind]))
        # Where its corpus is.
        monkeypatch.chdir(runs[kind].parents[2])
        for words in (SMALL, LORA):
            built = build(composed(*words))
            state, report = start_from_weights(built, runs[kind] / "checkpoints/10", partial=False)
            assert report.exact
            assert np.allclose(built.model(state)(TOKENS), tuned(TOKENS), atol=2e-5)


def test_adapters_on_a_trained_model_reach_a_lower_loss_than_it_has(untouched: Callable[..., Door], door: Door) -> None:
    """On a text that the base has not seen; docs/tuning.md has the same with the default model."""
    (door.cwd / "corpus.txt").write_text("".join(f"{n} and {n} are {2 * n}: so it is, always.\n" for n in range(60)))
    base = untouched(*SMALL, "optim.lr=1e-2", "train.steps=120").the_run
    words = (*SMALL, f"init_from={base}", "tune=lora", "tune.rank=4", "optim.weight_decay=0")
    losses = []
    for more in (("train.steps=1", "train.eval_steps=1", "optim.lr=1e-12"), ("optim.lr=2e-2",)):
        done = door.run(*words, *more, f"name=after{len(losses)}")
        assert done.returncode == 0, done.stderr
        lines = (next(door.cwd.glob(f"outputs/after{len(losses)}/*")) / "logs/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if json.loads(line)["split"] == "eval"][-1])
    assert losses[1] < losses[0] - 0.3


def test_which_base_a_run_has_is_told_with_its_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    """Those of a file that another run has as well are told apart: together they take the disk once."""
    for name in ("one", "two"):
        shutil.copytree(runs["lora"], tmp_path / name, symlinks=True)
    base = base_of(tmp_path / "one")
    files = [path for path in base.rglob("*") if path.is_file()]
    size, file = sum(path.stat().st_size for path in files), largest(base)

    def listed(run: Path) -> Any:
        said: list[str] = []
        result = ls_runs.run_verb(Namespace(run=str(run), verify=False), said.append)
        return result.document["bases"], next((line for line in said if line.startswith("frozen")), "")

    bases, line = listed(tmp_path / "one")
    assert bases == [{"digest": base.name, "bytes": size, "shared_bytes": 0, "other_links": 0}]
    assert line.startswith(f"frozen weights {base.name[:8]}, stored once: ")
    assert line.endswith("of this run alone")
    other = tmp_path / "two" / file.relative_to(tmp_path / "one")
    other.unlink()
    other.hardlink_to(file)
    bases, line = listed(tmp_path / "one")
    assert bases == [{"digest": base.name, "bytes": size, "shared_bytes": file.stat().st_size, "other_links": 1}]
    assert line.endswith("are shared by links with 1 other")
    assert listed(runs["whole"]) == ([], "")
    (result,) = [show_checkpoint.run_verb(Namespace(checkpoint=str(tmp_path / "one")), lambda _: None)]
    assert result.document["bases"] == bases
    shutil.rmtree(base)
    _, said = said_by(show_checkpoint, checkpoint=str(tmp_path / "one"))
    assert any(f"weights {base.name[:8]} are missing: this checkpoint needs them" in line for line in said)
