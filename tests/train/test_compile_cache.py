"""What was compiled once is found again, by the next process too; trouble with the cache only costs time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.train import compile_cache
from runner.train.program_store import find_trouble
from tests.conftest import REPO, SMALL, Door, fail_loudly

PROGRAM = """
import sys
from runner.train.compile_cache import enable_compile_cache
kept = enable_compile_cache(sys.argv[1], print)
exec(sys.argv[2])
import jax
import jax.numpy as jnp
jax.jit(lambda x: jnp.sin(x @ x).sum(), static_argnums=()).lower(jnp.ones((8, 8))).compile()
print(kept)
"""
# zlib, which jax uses where nothing better is installed, has a checksum of its own; zstandard has none.
UNCHECKED = "from jax._src import compilation_cache as c; c.compress_executable = c.decompress_executable = bytes"
FATAL = "import os; from jax._src import compilation_cache as c; c.extract_executable_and_time = lambda _: os.abort()"


def compile_once(option: str, plant: str = "", *, code: int = 0, **environment: str) -> str:
    words, variables = [sys.executable, "-c", PROGRAM, option, plant], {**os.environ, **environment}
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, env=variables)
    assert done.returncode == code, done.stderr
    return done.stdout


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/jit_*.program"))


def test_a_small_program_is_found_again(tmp_path: Path) -> None:
    assert compile_once(str(tmp_path)) == "miss\n"
    assert entries(tmp_path)
    assert compile_once(str(tmp_path)) == "hit\n"
    assert compile_once("off") == "off\n"


def test_damaged_entries_are_thrown_away_and_replaced(tmp_path: Path) -> None:
    """Also where the bytes have no other checksum: jax would execute them, or die of them."""
    compile_once(str(tmp_path), UNCHECKED)
    found = entries(tmp_path)
    for number, entry in enumerate(found):
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 4
        entry.write_bytes(content if number % 2 else content[:-100])
    said = compile_once(str(tmp_path), UNCHECKED)
    assert said.endswith("miss\n")
    assert said.count("is compiled anew: its entry was damaged") == len(found) > 1
    assert compile_once(str(tmp_path), UNCHECKED) == "hit\n"


def test_what_killed_the_process_that_loaded_it_is_not_loaded_again(tmp_path: Path) -> None:
    compile_once(str(tmp_path))
    compile_once(str(tmp_path), FATAL, code=-signal.SIGABRT)
    (marker,) = tmp_path.glob("*/pending/*")
    said = compile_once(str(tmp_path))
    assert said.count("the process that loaded it last has died") == 1
    assert said.endswith("miss\n")
    assert not marker.exists()
    assert compile_once(str(tmp_path)) == "hit\n"


def test_a_program_for_another_number_of_threads_is_another_program(tmp_path: Path) -> None:
    """XLA divides work when it compiles, and its key does not say for how many."""
    assert compile_once(str(tmp_path), NPROC="2") == "miss\n"
    assert compile_once(str(tmp_path), NPROC="3") == "miss\n"
    assert compile_once(str(tmp_path), NPROC="2") == "hit\n"


def test_what_jax_alone_has_kept_is_neither_loaded_nor_taken_from_the_user(tmp_path: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    plain = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    subprocess.run([sys.executable, "-c", plain], cwd=REPO, check=True, env={**os.environ, **own})
    left = sorted(tmp_path.glob("*-cache"))
    assert left
    plant = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    assert compile_once("auto", plant, **own) == "miss\n"
    assert compile_once("auto", plant, **own) == "hit\n"
    assert sorted(tmp_path.glob("*-cache")) == left


def test_a_jax_that_keeps_programs_in_another_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src import compilation_cache

    monkeypatch.delattr(compilation_cache, "LRUCache")
    assert "without proof" in str(compile_cache._replace_disk_cache(tmp_path, print))


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
    assert find_trouble(place) is None
    assert place.stat().st_mode & 0o077 == 0  # what lies there is executed
    assert compile_cache.cache_folder("shared/place") == Path("shared/place").resolve() / place.name
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "another")
    compile_cache.processor_id.cache_clear()
    assert compile_cache.cache_folder("auto") != place
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/their/own")
    assert compile_cache.cache_folder("auto") == Path("/their/own")
    assert compile_cache.cache_folder("off") is None
    compile_cache.processor_id.cache_clear()


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


def test_every_process_keeps_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax has process 0 alone write; with a cache of its own each other machine would compile at every restart."""
    from jax._src import compilation_cache, compiler

    kept: list[str] = []
    monkeypatch.setattr(compilation_cache, "put_executable_and_time", lambda key, *rest: kept.append(key))
    # So that what is replaced below comes back.
    monkeypatch.setattr(compiler, "_cache_write", compiler._cache_write)
    monkeypatch.setattr(compiler.distributed.global_state, "process_id", 1)
    compiler._cache_write("by jax", 1.0, "name", None, None, [])
    assert kept == []
    compile_cache._write_from_this_process()
    compiler._cache_write("by us", 1.0, "name", None, None, [])
    compiler._cache_write("with a callback", 1.0, "name", None, None, [print])
    assert kept == ["by us"]
