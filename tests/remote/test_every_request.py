"""At each request to the bucket something goes wrong: nothing is lost, and nothing is believed that was not whole."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from runner.errors import HoldfastError
from tests.buckets import FAULTS, Fault, Killed, failing
from tests.buckets import memory as memory
from tests.remote.simulation import STEPS, find_lie, work

# A thread of a process that was killed ends where it is.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

# So many requests more than an untouched run makes may be made after a fault: beyond these none is left to strike.
SPARE = 6


def count_requests(monkeypatch: pytest.MonkeyPatch, disk: Path) -> int:
    with failing(monkeypatch, 0, "refused") as client:
        work(disk)
        return client.count


def suffer(monkeypatch: pytest.MonkeyPatch, disk: Path, at: int, fault: Fault) -> bool:
    """Work, with something wrong at one request; return whether it came to that. The disk is lost afterwards."""
    with failing(monkeypatch, at, fault) as client:
        try:
            work(disk)
        except (Killed, HoldfastError):
            assert client.count >= at
        struck = client.count >= at
    # A thread of what was killed may be on its last line.
    while disk.exists():
        shutil.rmtree(disk, ignore_errors=True)
    return struck


def check_rest(disk: Path) -> None:
    """Look at what a vanished machine has left in the bucket, and let another one go on from there to the end."""
    assert find_lie(disk / "look") is None
    run_dir = work(disk / "next")
    assert run_dir.metrics.read_text().splitlines() == [f"line of step {step}" for step in range(1, STEPS + 1)]
    assert find_lie(disk / "end") is None
    shutil.rmtree(disk)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_third_request(
    monkeypatch: pytest.MonkeyPatch, memory: MemoryStore, tmp_path: Path, fault: Fault
) -> None:
    check_every(monkeypatch, memory, tmp_path, fault, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_request(
    monkeypatch: pytest.MonkeyPatch, memory: MemoryStore, tmp_path: Path, fault: Fault
) -> None:
    check_every(monkeypatch, memory, tmp_path, fault, 1)


def check_every(
    monkeypatch: pytest.MonkeyPatch, memory: MemoryStore, tmp_path: Path, fault: Fault, stride: int
) -> None:
    total = count_requests(monkeypatch, tmp_path / "first")
    assert total > 40
    landed = 0
    for at in range(1, total + SPARE, stride):
        clear(memory)
        landed += suffer(monkeypatch, tmp_path / "struck", at, fault)
        check_rest(tmp_path / "rest")
    assert landed >= total // stride - 2


def test_a_kill_while_a_machine_fetches_and_it_goes_on_with_that_disk(
    monkeypatch: pytest.MonkeyPatch, memory: MemoryStore, tmp_path: Path
) -> None:
    """Half of a run is on its disk then: it is no run, and is fetched again."""
    work(tmp_path / "first", 30)
    kept = {meta["path"]: memory.get(meta["path"]).bytes().to_bytes() for meta in memory.list().collect()}
    for at in range(2, 30):
        clear(memory)
        for key, content in kept.items():
            memory.put(key, content)
        disk = tmp_path / f"next-{at}"
        with failing(monkeypatch, at, "killed before"):
            with contextlib.suppress(Killed, HoldfastError):
                work(disk)
        run_dir = work(disk)
        assert run_dir.metrics.read_text().splitlines() == [f"line of step {step}" for step in range(1, STEPS + 1)]
        assert run_dir.config.read_text() == "seed: 0\n"
        assert not (run_dir.path.parent / ".overwritten").exists(), "what was half fetched is nobody's work"


def clear(memory: MemoryStore) -> None:
    memory.delete([meta["path"] for meta in memory.list().collect()])
