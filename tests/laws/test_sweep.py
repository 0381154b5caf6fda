"""Sweeps in full: killed at random and typed again, one member broken and mended, another order."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from runner.config.schema import read_document
from tests.conftest import SMALL, Door, assert_same, write_corpus

pytestmark = pytest.mark.slow

KILLS = 5
PAGES = 0.05  # of memory, by when threads come and go (measured: below 0.01)
GRID = ("ckpt=periodic,best,combined", "remat=none,full,attention_only")
SHORT = (*SMALL[5:], "train.steps=40", "data.seq_len=16", "data.batch_size=8")  # on the default data


def alone(folder: Path, *words: str) -> Door:
    folder.mkdir()
    door = Door(folder)
    write_corpus(folder)
    done = door.run(*words)
    assert done.returncode == 0, done.stderr
    return door


def peak_memory(run: Path) -> int:
    return json.loads((run / "attempts.jsonl").read_text())["peak_memory_bytes"]


def attempts(run: Path) -> int:
    file = run / "attempts.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_grid_killed_at_random_ends_as_each_run_does_alone(door: Door, tmp_path: Path) -> None:
    chance, command = random.Random(0), ("-m", *SHORT, *GRID)
    for _ in range(KILLS):
        process = door.start(*command)
        time.sleep(chance.uniform(2.0, 5.0))
        if process.poll() is not None:
            break  # it was through before the last of the kills
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.communicate()
    done = door.run(*command)
    assert done.returncode == 0, (done.stdout, done.stderr)
    places = sorted(path.parent for path in door.cwd.glob("outputs/default/*/config.yaml"))
    assert len(places) == 9
    assert sum(map(attempts, places)) > 9  # the kills hit runs
    before = {place: attempts(place) for place in places}
    again = door.run(*command)
    assert again.returncode == 0
    assert {place: attempts(place) for place in places} == before
    assert "9 runs: 9 finished" in again.stdout
    for number, place in enumerate(places):
        config = read_document(place / "config.yaml")
        rules = sorted(config["ckpt"]["save"])
        ckpt = "combined" if len(rules) == 2 else rules[0]
        reference = alone(tmp_path / str(number), *SHORT, f"ckpt={ckpt}", f"remat={config['remat']['kind']}")
        assert reference.the_run.name.rpartition("-")[2] == place.name.rpartition("-")[2]
        assert_same(place, reference.the_run, 40)


BROKEN = """
import pathlib

def loss(model, batch, factor=1):
    from models.objectives import classify
    if factor == 2 and pathlib.Path("broken").exists():
        raise RuntimeError("planted")
    return classify(model, batch)
"""


def test_a_broken_member_is_named_and_when_it_is_mended_only_it_runs(door: Door) -> None:
    (door.cwd / "mine.py").write_text(BROKEN)
    (door.cwd / "broken").touch()
    words = ("objective=external", "objective.target=mine:loss", "+objective.options.factor=1,2,3,4,5,6,7,8,9")
    command = ("-m", "model=mlp", "data=digits", "train.steps=20", *words)
    done = door.run(*command)
    assert done.returncode == 1
    (row,) = [
        line for line in done.stdout.splitlines() if "failed " in line and "20/20" not in line and "[" not in line
    ]
    assert "options.factor=2 " in row
    assert "RuntimeError: pl" in row  # as much of it as fits
    assert "9 runs: 1 failed, 8 finished" in done.stdout
    (door.cwd / "broken").unlink()
    mended = door.run(*command)
    assert mended.returncode == 0, (mended.stdout, mended.stderr)
    assert mended.stdout.count("  running") == 1
    assert "9 runs: 9 finished" in mended.stdout


def test_neither_order_nor_neighbours_change_a_result(door: Door, tmp_path: Path) -> None:
    programs = f"compile_cache={tmp_path / 'programs'}"  # who compiles needs more memory than who finds it compiled
    alone(tmp_path / "before", *SMALL, programs, "seed=4")

    def finished(folder: Path, seeds: str) -> dict[int, Path]:
        folder.mkdir()
        write_corpus(folder)
        swept = Door(folder)
        done = swept.run("-m", *SMALL, programs, f"seed={seeds}", "hydra.launcher.parallel=2")
        assert done.returncode == 0, (done.stdout, done.stderr)
        runs = [path.parent for path in folder.glob("outputs/default/*/config.yaml")]
        assert all(json.loads((run / "status.json").read_text())["state"] == "finished" for run in runs)
        return {read_document(run / "config.yaml")["seed"]: run for run in runs}

    one, other = finished(tmp_path / "one", "0,1,2,3"), finished(tmp_path / "other", "3,2,1,0")
    assert one.keys() == other.keys() == {0, 1, 2, 3}
    for seed, run in one.items():
        assert_same(run, other[seed], 60)
        assert peak_memory(run) == pytest.approx(peak_memory(other[seed]), rel=PAGES)
