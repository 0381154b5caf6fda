"""What was compiled once is found again, by the next process too; trouble with the cache only costs time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.train import compile_cache
from tests.conftest import REPO, SMALL, Door, fail_loudly

PROGRAM = """
import sys
from runner.train.compile_cache import enable_compile_cache
kept = enable_compile_cache(sys.argv[1], print)
import jax
import jax.numpy as jnp
jax.jit(lambda x: jnp.sin(x @ x).sum(), static_argnums=()).lower(jnp.ones((8, 8))).compile()
print(kept)
"""


def compile_once(option: str) -> str:
    code = [sys.executable, "-c", PROGRAM, option]
    return subprocess.run(code, cwd=REPO, capture_output=True, text=True, check=True).stdout


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/jit_*-cache"))


def test_a_small_program_is_found_again(tmp_path: Path) -> None:
    assert compile_once(str(tmp_path)) == "miss\n"
    assert entries(tmp_path)
    assert compile_once(str(tmp_path)) == "hit\n"
    assert compile_once("off") == "off\n"


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_entry_is_thrown_away_and_replaced(damage: str, tmp_path: Path) -> None:
    compile_once(str(tmp_path))
    for entry in entries(tmp_path):
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 4
        entry.write_bytes(content[:-100] if damage == "torn" else content)
    said = compile_once(str(tmp_path))
    assert said.endswith("miss\n")
    assert "compiled anew: its entry was damaged" in said
    assert compile_once(str(tmp_path)) == "hit\n"


def test_a_place_that_cannot_be_written_is_told_and_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = compile_once(str(tmp_path / "file"))
    assert said.startswith(f"warning: compile_cache={tmp_path / 'file'}: ")
    assert said.endswith("off\n")


def test_the_default_place_is_the_user_s_own_and_divided_by_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = compile_cache.cache_folder("auto")
    assert place is not None
    assert place.is_relative_to(tmp_path / "holdfast")
    assert compile_cache.find_trouble(place) is None
    assert place.stat().st_mode & 0o077 == 0  # what lies there is executed
    assert compile_cache.cache_folder("shared/place") == Path("shared/place").resolve() / place.name
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    assert compile_cache.cache_folder("auto") != place
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/their/own")
    assert compile_cache.cache_folder("auto") == Path("/their/own")
    assert compile_cache.cache_folder("off") is None


# A run that is done before it is known what its step needs: that is waited for.
SLOW_TO_COUNT = """
import time
from runner.train import compile
measure_step = compile.measure_step
def slow(*words):
    time.sleep(3)
    return measure_step(*words)
compile.measure_step = slow
"""


def test_a_restart_finds_its_programs_and_computes_the_same(door: Door, tmp_path: Path) -> None:
    run = (*SMALL, f"compile_cache={tmp_path / 'programs'}")
    (door.cwd / "sitecustomize.py").write_text(fail_loudly(SLOW_TO_COUNT))
    path = {"PYTHONPATH": f"{door.cwd}{os.pathsep}{REPO}"}
    assert door.run(*run, "train.steps=10", **path).returncode == 0
    (first,) = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert first["compile_cache"] == "miss"
    assert first["compile_seconds"] > 0
    assert first["first_step_seconds"] > first["compile_seconds"]
    cold = (door.the_run / "logs/metrics.jsonl").read_bytes()
    assert door.run(f"dir={door.the_run}", "resume=never", "overwrite=true", run[-1]).returncode == 0
    (second,) = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert second["compile_cache"] == "hit"
    assert second["needs"] == first["needs"]  # a program from the cache says the same of itself
    assert first["needs"]["compiled"]["temporaries"] > 0
    assert (door.the_run / "logs/metrics.jsonl").read_bytes() == cold
