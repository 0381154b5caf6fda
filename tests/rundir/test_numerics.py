"""The size of XLA's thread pool is decided once for a run, survives any damage, and is what XLA then has."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.rundir import numerics
from runner.rundir.layout import RunDir
from runner.rundir.numerics import adopt_numerics, check_thread_pool, count_threads_to_come, settle_numerics
from tests.conftest import REPO

FILE, COPY = "numerics.json", ".numerics.copy.json"
VARIABLES = ("NPROC", "HOLDFAST_NPROC", *numerics.NUMERIC_VARIABLES)
Attempt = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a run sets here must not reach other tests of this process."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A process of its own that works on a run: with so many cores, and these variables."""

    def work(run: RunDir, cores: int, **environment: str) -> tuple[int, list[str]]:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
        monkeypatch.setattr(numerics, "_count_cores", lambda: cores)
        monkeypatch.setattr(numerics, "count_pool_threads", lambda: 0)
        said: list[str] = []
        threads = settle_numerics(run, said.append).threads
        assert os.environ["NPROC"] == str(threads) == str(count_threads_to_come())
        return threads, said

    return work


def trained(run: RunDir) -> RunDir:
    (run.checkpoints / "5").mkdir(parents=True, exist_ok=True)
    return run


@pytest.mark.parametrize(("cores", "threads"), [(1, 8), (2, 8), (8, 8), (96, 96), (5000, 1024)])
def test_a_new_run_has_at_least_eight_threads_and_one_for_each_core(
    cores: int, threads: int, run: RunDir, attempt: Attempt
) -> None:
    assert attempt(run, cores) == (threads, [])
    for others in (1, 4, 64):
        assert attempt(trained(run), others) == (threads, [])


def test_the_user_s_word_counts_for_a_new_run_only(run: RunDir, attempt: Attempt) -> None:
    assert attempt(run, 2, NPROC=" 3 ") == (3, [])
    assert attempt(trained(run), 2) == (3, [])
    threads, said = attempt(run, 2, NPROC="5")
    assert threads == 3
    assert said == ["warning: NPROC=5: this run was begun with 3 threads, and keeps them"]


@pytest.mark.parametrize("word", ["many", "0", "-2", "1.5", "99999999999999999999", "٣", "1025"])
def test_a_word_that_is_no_number_is_told_and_not_taken(word: str, run: RunDir, attempt: Attempt) -> None:
    threads, said = attempt(run, 2, NPROC=word)
    assert threads == 8
    assert said == [f"warning: NPROC={word!r} is no number from 1 to 1024; taken as not set"]


def test_what_a_run_sets_is_not_the_word_of_its_child_s_user(tmp_path: Path, run: RunDir, attempt: Attempt) -> None:
    attempt(run, 2, NPROC="3")
    inherited = {name: os.environ[name] for name in ("NPROC", "HOLDFAST_NPROC")}
    child = RunDir(tmp_path / "child")
    child.path.mkdir()
    assert attempt(child, 2, **inherited) == (8, [])
    # What is typed for the child is.
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    assert attempt(other, 2, **{**inherited, "NPROC": "5"}) == (5, [])


def damage_one(run: RunDir) -> None:
    (run.path / FILE).write_bytes(b"\xff\xfe{}")


def damage_both(run: RunDir) -> None:
    (run.path / FILE).write_bytes(b"")
    (run.path / COPY).write_bytes(b'{"threads": 4}\n' + b"0" * 32)


def remove_one(run: RunDir) -> None:
    (run.path / FILE).unlink()


def remove_both(run: RunDir) -> None:
    (run.path / FILE).unlink()
    (run.path / COPY).unlink()


def say_in_attempts(run: RunDir, threads: object) -> None:
    line = {"attempt": 1, "started": "2026-11-21T00:00:00+00:00", "ending": "killed", "to_step": 5, "threads": threads}
    run.attempts.write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("harm", [damage_one, remove_one])
def test_one_copy_is_enough_and_the_other_is_mended(
    harm: Callable[[RunDir], None], run: RunDir, attempt: Attempt
) -> None:
    attempt(run, 2, NPROC="3")
    harm(trained(run))
    assert attempt(run, 2) == (3, [])
    assert (run.path / FILE).read_bytes() == (run.path / COPY).read_bytes()


@pytest.mark.parametrize("harm", [damage_both, remove_both])
def test_without_a_file_the_attempts_say_it(harm: Callable[[RunDir], None], run: RunDir, attempt: Attempt) -> None:
    attempt(run, 2, NPROC="3")
    harm(trained(run))
    say_in_attempts(run, 3)
    threads, (said,) = attempt(run, 2)
    assert threads == 3
    assert "going on with 3 threads, as attempts.jsonl says" in said
    assert attempt(run, 1) == (3, [])  # written down again


@pytest.mark.parametrize("recorded", [None, True, -1, 0, 10**9, "8", [8]])
def test_a_run_that_does_not_say_it_goes_on_with_the_cores_there_are(
    recorded: object, run: RunDir, attempt: Attempt
) -> None:
    """An older version had one thread for each core; from here on it is written down."""
    say_in_attempts(trained(run), recorded)
    threads, (said,) = attempt(run, 2)
    assert threads == 2
    assert said.startswith("warning: this run does not say how many threads XLA had: going on with 2")
    assert attempt(run, 1) == (2, [])
    remove_both(run)
    run.attempts.unlink()
    assert attempt(run, 2, NPROC="6")[0] == 6  # the user may know


def test_what_is_begun_anew_is_new(run: RunDir, attempt: Attempt) -> None:
    """Killed before its first checkpoint, or before the file: nothing has been computed that could differ."""
    run.config.write_text("{}")
    say_in_attempts(run, None)
    assert attempt(run, 2) == (8, [])


def test_any_bytes_are_survived(run: RunDir, attempt: Attempt) -> None:
    attempt(run, 2, NPROC="3")
    good = (run.path / FILE).read_bytes()
    rng = random.Random(0)
    trained(run)
    for _ in range(60):
        for name in (FILE, COPY):
            content = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            content = content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content
            (run.path / name).write_bytes(rng.randbytes(60) if rng.random() < 0.2 else bytes(content))
        threads, said = attempt(run, 2)
        assert threads in (2, 3)
        assert threads == 3 or len(said) == 1
        remove_both(run)
        (run.path / FILE).write_bytes(good)


@pytest.mark.parametrize(
    "document", [{}, {"threads": 0, "environment": {}}, {"threads": 8, "environment": [1]}, [], "x", {"threads": 8, "environment": {"A": 1}}, {"threads": 2**70, "environment": {}}]
)  # fmt: skip
def test_a_right_checksum_makes_no_wrong_value_right(document: object, run: RunDir, attempt: Attempt) -> None:
    import xxhash

    body = json.dumps(document).encode()
    for name in (FILE, COPY):
        (run.path / name).write_bytes(body + b"\n" + xxhash.xxh3_128(body).hexdigest().encode() + b"\n")
    threads, (said,) = attempt(trained(run), 2)
    assert threads == 2
    assert "cannot be believed" in said


def test_a_variable_that_changes_what_is_computed_is_told(run: RunDir, attempt: Attempt) -> None:
    dumped = "--xla_dump_to=/somewhere --xla_force_host_platform_device_count=2"
    attempt(run, 2, JAX_ENABLE_X64="1", XLA_FLAGS=f"{dumped} --xla_cpu_enable_fast_math=true")
    assert attempt(run, 2, JAX_ENABLE_X64="1", XLA_FLAGS="--xla_cpu_enable_fast_math=true")[1] == []
    assert attempt(run, 2, XLA_FLAGS=dumped)[1] == [
        'warning: XLA_FLAGS was "--xla_cpu_enable_fast_math=true" when this run began and is not set: bits may differ',
        'warning: JAX_ENABLE_X64 was "1" when this run began and is not set: bits may differ',
    ]


def test_who_only_reads_a_run_computes_like_it_and_writes_nothing(
    run: RunDir, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    adopt_numerics(run, said.append)
    assert "NPROC" not in os.environ
    attempt(run, 2, NPROC="3")
    for name in ("NPROC", "HOLDFAST_NPROC"):
        monkeypatch.delenv(name)
    remove_one(trained(run))
    before = sorted(run.path.rglob("*"))
    adopt_numerics(run, said.append)
    assert os.environ["NPROC"] == "3"
    assert sorted(run.path.rglob("*")) == before
    assert said == []
    damage_both(run)
    adopt_numerics(run, said.append)
    assert "cannot be believed" in said[0]


def test_a_pool_that_has_started_already_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(numerics, "count_pool_threads", lambda: 8)
    check_thread_pool(8, said.append)
    assert said == []
    check_thread_pool(2, said.append)
    assert said[0].startswith("warning: XLA started with 8 threads in this process, and this run has 2")


SETTLED = """
import sys
from pathlib import Path
import jax  # imported is not started
from runner.rundir.layout import RunDir
from runner.rundir.numerics import count_pool_threads, settle_numerics
settle_numerics(RunDir(Path(sys.argv[1])), print)
assert count_pool_threads() == 0
jax.devices()
print(count_pool_threads())
"""


def test_xla_has_the_threads_that_are_written_down(run: RunDir) -> None:
    """Of the jaxlib that is installed: NPROC is no promise of its makers."""
    environment = {**os.environ, "NPROC": "5"}
    done = subprocess.run(
        [sys.executable, "-c", SETTLED, str(run.path)], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["5"], done.stderr
