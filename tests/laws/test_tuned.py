"""The laws of a run that trains a part of a model: its frozen weights are stored once, and it keeps every promise."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.buckets import BUCKET, serve_bucket
from tests.conftest import SMALL, Door, assert_same, checkpoint

pytestmark = pytest.mark.forked

LORA = (*SMALL, "tune=lora", "tune.rank=2", "tune.targets=[qkv,ffn_*]", "ckpt.save.periodic.steps=7")
FREEZE = (*SMALL, "tune=freeze", "tune.train=[norm,blocks.1.*]", "ckpt.save.periodic.steps=7", "optim.ema=0.9")


def base_of(run: Path) -> Path:
    """The only base of a run, which every checkpoint of it names."""
    (found,) = (run / "base").iterdir()
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert steps
    for path in steps:
        assert json.loads((path / "progress/metadata").read_text())["base"] == found.name
    return found


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("words", [LORA, FREEZE], ids=["lora", "freeze"])
def test_killed_twice_is_bit_identical(words: tuple[str, ...], door: Door, untouched: Callable[..., Door]) -> None:
    reference = untouched(*words).the_run
    for step, delay in ((10, 0.0), (35, 0.02)):
        door.kill_at(step, *words, delay=delay)
    done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "restored step" in done.stdout
    assert_same(door.the_run, reference, 60)
    mine, theirs = base_of(door.the_run), base_of(reference)
    assert mine.name == theirs.name
    # By plain Orbax, and no code of ours.
    arrays, same = checkpoint(mine), checkpoint(theirs)
    assert all(name.startswith("['frozen']") for name in arrays if name != "progress")
    assert all(np.array_equal(same[name], leaf) for name, leaf in arrays.items())
    saved = checkpoint(door.the_run / "checkpoints/60")
    assert not any("frozen" in name for name in saved)


def test_a_flipped_byte_in_the_base_is_noticed_and_made_good_from_the_seed(door: Door) -> None:
    door.kill_at(30, *LORA)
    base = base_of(door.the_run)
    flip(largest(base))
    done = door.run(*LORA)
    assert done.returncode == 0, done.stderr
    assert "the frozen weights in" in done.stdout
    assert "made again, with the same digest" in done.stdout
    assert "restored step" in done.stdout
    (aside,) = (door.the_run / "quarantine").iterdir()
    assert aside.name.startswith(f"base-{base.name[:8]}-")
    assert base_of(door.the_run) == base


def test_a_base_that_cannot_be_made_again_is_told_and_nothing_starts_over(
    door: Door, make_door: Callable[..., Door]
) -> None:
    source = make_door("source", door.forks)
    assert source.run(*SMALL, "train.steps=10", "seed=5").returncode == 0
    words = (*LORA, f"init_from={source.the_run}")
    door.kill_at(30, *words)
    run, saved = door.the_run, {}
    shutil.rmtree(source.the_run)
    assert source.run(*SMALL, "train.steps=20", "seed=6").returncode == 0
    flip(largest(base_of(run)))
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    source.the_run.rename(Path(words[-1].removeprefix("init_from=")))
    done = door.run(*words)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert "frozen weights that this run's checkpoints need are not good" in done.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == saved


def test_runs_of_a_name_have_the_bytes_of_one_base(door: Door) -> None:
    for lr in ("1e-3", "2e-3"):
        assert door.run(*LORA, "train.steps=10", f"optim.lr={lr}").returncode == 0
    first, second = (base_of(config.parent) for config in sorted(door.cwd.glob("outputs/*/*/config.yaml")))
    assert first.name == second.name
    assert os.path.samefile(largest(first), largest(second))
    # Each has names of its own: who deletes one run takes nothing from the other.
    shutil.rmtree(first.parent.parent)
    flip_free = checkpoint(second)
    assert len(flip_free) > 1


def test_an_empty_machine_goes_on_from_a_bucket(door: Door, tmp_path: Path, untouched: Callable[..., Door]) -> None:
    """The base goes up once; the checkpoints that need it come down with it; a damaged one is told and made again."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    words = (*LORA, f"remote=file://{bucket}")
    door.kill_at(30, *words, number=signal.SIGTERM)
    (seal,) = bucket.rglob("base/*/holdfast.json")
    sent, digest = seal.stat().st_mtime_ns, base_of(door.the_run).name
    assert seal.parent.name == digest
    shutil.rmtree(door.cwd / "outputs")
    done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "restored step" in done.stdout
    assert base_of(door.the_run).name == digest
    assert seal.stat().st_mtime_ns == sent
    assert_same(door.the_run, untouched(*LORA).the_run, 60)
    flip(largest(seal.parent))
    shutil.rmtree(door.cwd / "outputs")
    again = door.run(*words, "step=60")
    assert again.returncode == 0, again.stderr
    assert "the frozen weights there are not good" in again.stdout + again.stderr
    assert "made again, with the same digest" in again.stdout


@pytest.mark.slow
def test_an_empty_machine_goes_on_from_s3(door: Door, untouched: Callable[..., Door]) -> None:
    """As from a folder, over S3's own protocol."""
    with serve_bucket() as server:
        # A schedule that does not ask how long the run is to be.
        steady = (*LORA, "schedule=constant", "schedule.warmup_steps=2")
        words = (*steady, f"remote=s3://{BUCKET}/tuned")
        done = door.run(*words, "train.steps=30", **server.environment)
        assert done.returncode == 0, done.stderr
        name, base = door.the_run.name, base_of(door.the_run)
        shutil.rmtree(door.cwd / "outputs")
        again = door.run(*words, f"dir=outputs/default/{name}", **server.environment)
        assert again.returncode == 0, again.stderr
        assert "restored step 30" in again.stdout
    assert base_of(door.the_run).name == base.name
    mine, theirs = (checkpoint(each.the_run / "checkpoints/60") for each in (door, untouched(*steady)))
    assert all(np.array_equal(mine[leaf], value) for leaf, value in theirs.items() if "progress" not in leaf)


@pytest.mark.parametrize("words", [LORA, FREEZE], ids=["lora", "freeze"])
def test_several_processes_make_a_lost_base_again(words: tuple[str, ...], door: Door) -> None:
    together = ("hosts=local", "hosts.count=2", "mesh=fsdp")
    done = door.run(*words, "train.steps=15", *together)
    assert done.returncode == 0, done.stderr
    run = door.the_run
    base = base_of(run)
    before = checkpoint(base)
    flip(largest(base))
    more = door.run(f"dir={run}", "train.steps=20", *together)
    assert more.returncode == 0, more.stderr
    assert "made again, with the same digest" in more.stdout
    assert "restored step 15" in more.stdout
    assert base_of(run) == base
    after = checkpoint(base)
    assert all(np.array_equal(after[name], leaf) for name, leaf in before.items())


def test_several_processes_write_one_base_and_one_goes_on_from_it(door: Door, untouched: Callable[..., Door]) -> None:
    """Each writes its part; the digest is that of one process, and so the run may move."""
    done = door.run(*LORA, "train.steps=30", "hosts=local", "hosts.count=2", "mesh=fsdp")
    assert done.returncode == 0, done.stderr
    base = base_of(door.the_run)
    assert base.name == base_of(untouched(*LORA).the_run).name
    again = door.run(*LORA, f"dir={door.the_run}")
    assert again.returncode == 0, again.stderr
    assert "restored step 30" in again.stdout
    assert base_of(door.the_run) == base
