"""Trouble of the machine while restoring says nothing about bytes: nothing is moved, and the run ends until it is over."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint import arrays, restore, seal
from runner.checkpoint.quarantine import list_set_aside, quarantine_checkpoint
from runner.checkpoint.record import list_steps
from runner.checkpoint.restore import restore_exactly, restore_newest
from runner.errors import HoldfastError, RefusedError, StorageError
from tests.checkpoint.test_checkpointer import Told, saved_steps, values
from tests.conftest import Door, plant
from tests.laws.faults import Forks

pytestmark = pytest.mark.forked

TROUBLE = [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.ESTALE]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    saved_steps(tmp_path / "c", 1, 2)
    return tmp_path / "c"


def fail_at(monkeypatch: pytest.MonkeyPatch, place: str, number: int, below: Path, times: int = 1 << 30) -> list[int]:
    """Let a call of os fail with an errno where it is about something below a folder; at most so often."""
    whole, failed = getattr(os, place), []

    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        is_below = isinstance(path, str | Path) and str(below) in str(path)
        if is_below and len(failed) < times:
            failed.append(number)
            raise OSError(number, os.strerror(number), str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(os, place, call)
    return failed


@pytest.mark.parametrize("number", TROUBLE)
def test_a_directory_that_cannot_be_read_is_not_set_aside(
    checkpoints: Path, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = fail_at(monkeypatch, "scandir", number, checkpoints / "2")
    with pytest.raises(StorageError, match="cannot be read now") as ended:
        restore_newest(checkpoints, tmp_path / "q", values, Told())
    assert len(failed) == 3
    assert ended.value.exit_code == 5
    assert os.strerror(number) in str(ended.value)
    assert list_steps(checkpoints) == [1, 2]
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("number", TROUBLE)
def test_a_file_that_cannot_be_read_is_not_set_aside(
    checkpoints: Path, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(path: Path) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(seal, "_measure_file", measure)
    with pytest.raises(StorageError, match="nothing was changed"):
        restore_newest(checkpoints, tmp_path / "q", values, Told())
    with pytest.raises(StorageError):
        restore_exactly(checkpoints / "1", values)
    assert list_steps(checkpoints) == [1, 2]


def test_trouble_that_passes_is_only_tried_again(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = fail_at(monkeypatch, "scandir", errno.EIO, checkpoints / "2", times=2)
    found = restore_newest(checkpoints, tmp_path / "q", values, Told())
    assert failed == [errno.EIO] * 2
    assert found is not None
    assert found[0].step == 2


def test_trouble_with_an_older_one_is_no_concern_of_the_newest(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_at(monkeypatch, "scandir", errno.EIO, checkpoints / "1")
    found = restore_newest(checkpoints, tmp_path / "q", values, Told())
    assert found is not None
    assert found[0].step == 2


def out_of_memory(directory: Path) -> Any:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.")


def out_of_host_memory(directory: Path) -> Any:
    raise MemoryError


@pytest.mark.parametrize("read", [out_of_memory, out_of_host_memory])
def test_too_little_memory_is_told_at_once_and_moves_nothing(
    checkpoints: Path, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.raises(HoldfastError, match="not enough memory") as ended:
        restore_newest(checkpoints, tmp_path / "q", read, Told())
    assert ended.value.exit_code == 1
    assert list_steps(checkpoints) == [1, 2]


def test_too_many_files_in_words_of_tensorstore_is_no_lack_of_memory(checkpoints: Path, tmp_path: Path) -> None:
    def read(directory: Path) -> Any:
        raise ValueError("RESOURCE_EXHAUSTED: Error reading local file: Too many open files [os_error_code='24']")

    with pytest.raises(StorageError, match="Too many open files"):
        restore_newest(checkpoints, tmp_path / "q", read, Told())
    assert list_steps(checkpoints) == [1, 2]


def test_a_bug_in_reading_good_bytes_is_a_bug(checkpoints: Path, tmp_path: Path) -> None:
    def read(directory: Path) -> Any:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        restore_newest(checkpoints, tmp_path / "q", read, Told())
    assert list_steps(checkpoints) == [1, 2]


def test_without_checksums_what_reads_as_no_array_is_damage(checkpoints: Path, tmp_path: Path) -> None:
    manifest = checkpoints / "2/state/manifest.ocdbt"
    manifest.write_bytes(bytes(manifest.stat().st_size))
    told = Told()
    found = restore_newest(
        checkpoints, tmp_path / "q", lambda path: arrays.read_leaves(path / "state"), told, checksums=False
    )
    assert found is not None
    assert found[0].step == 1
    assert "checkpoint 2 is not good: cannot be read (ValueError: DATA_LOSS" in told[0]


def test_what_is_removed_while_it_is_read_is_passed_over(checkpoints: Path, tmp_path: Path) -> None:
    def read(directory: Path) -> Any:
        if directory.name == "2":
            shutil.rmtree(directory)
            raise ValueError("NOT_FOUND: gone")
        return values(directory)

    found = restore_newest(checkpoints, tmp_path / "q", read, told := Told())
    assert found is not None
    assert found[0].step == 1
    assert "checkpoint 2 was removed while it was read" in told[0]


def test_setting_aside_is_durable_under_the_new_name_first(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    quarantine = checkpoints.parent / "quarantine"
    aside = quarantine_checkpoint(checkpoints / "2", quarantine, "a bit was flipped")
    assert synced.index("quarantine") < synced.index("c")
    assert [(each.step, each.directory, each.reason) for each in list_set_aside(quarantine)] == [
        (2, aside, "a bit was flipped")
    ]


def test_a_quarantine_may_hold_anything(tmp_path: Path) -> None:
    for name in ("notes", "7", "7-x", "-1-2", "9" * 200 + "-1", "07-1", "best-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "8-1").write_text("a file")
    (tmp_path / "7-3").mkdir()
    (tmp_path / "7-3/reason.txt").write_bytes(b"\xff\xfe")
    assert [each.directory.name for each in list_set_aside(tmp_path)] == ["7-3"]


SHORT = ("model=mlp", "data=digits", "model.width=16", "train.steps=20", "train.eval_steps=10", "log.tensorboard=false")
SAVES = ("ckpt=periodic", "ckpt.save.periodic.steps=5", "retention=last_n", "retention.last.n=2")


@pytest.fixture(scope="module")
def finished(make_door: Callable[..., Door], served: Forks) -> Door:
    door = make_door("trouble", served)
    done = door.run(*SHORT, *SAVES)
    assert done.returncode == 0, done.stderr
    return door


@pytest.fixture
def copied(finished: Door, tmp_path: Path) -> Door:
    shutil.copytree(finished.cwd / "outputs", tmp_path / "outputs", symlinks=True)
    return Door(tmp_path, finished.forks)


def test_out_of_memory_and_the_same_command_again_lose_nothing(copied: Door, tmp_path: Path) -> None:
    """The device has no room for the state, twice; the command typed again without that goes on."""
    code = """
from runner.checkpoint import store
def read_state(directory, template, measured):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
store.read_state = read_state
"""
    more = (*SHORT, *SAVES, f"dir={copied.the_run}", "train.steps=25")
    log = (copied.the_run / "logs/metrics.jsonl").read_bytes()
    for _ in range(2):
        failed = copied.run(*more, **plant(tmp_path, code))
        assert failed.returncode == 1
        assert "not enough memory to restore it" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert list_steps(copied.the_run / "checkpoints") == [15, 20]
        assert (copied.the_run / "logs/metrics.jsonl").read_bytes() == log
    done = copied.run(*more)
    assert (done.returncode, "restored step 20" in done.stdout) == (0, True), done.stderr


def test_a_run_that_was_durable_never_starts_over_by_itself(copied: Door) -> None:
    """Its checkpoints are gone: refused, twice, the log as it was; one is taken back from quarantine and goes on."""
    run, more = copied.the_run, (*SHORT, *SAVES, "train.steps=25")
    log = (run / "logs/metrics.jsonl").read_bytes()
    (run / "quarantine").mkdir()
    (run / "checkpoints/20").rename(run / "quarantine/20-1")
    (run / "quarantine/20-1/reason.txt").write_text("out of memory\n")
    shutil.rmtree(run / "checkpoints/15")
    for _ in range(2):
        refused = copied.run(*more, f"dir={run}")
        assert refused.returncode == 3, refused.stdout
        assert "none is left to go on from" in refused.stderr
        assert "python -m runner restore" in refused.stderr
        assert "resume=never overwrite=true" in refused.stderr
        assert (run / "logs/metrics.jsonl").read_bytes() == log


def test_a_checkpoint_is_taken_back_only_when_every_byte_is_proven(copied: Door, capsys: Any) -> None:
    from runner.__main__ import main

    run = copied.the_run
    (run / "quarantine").mkdir()
    (run / "checkpoints/20").rename(run / "quarantine/20-1")
    (run / "quarantine/20-1/reason.txt").write_text("too many open files\n")
    flipped = max((run / "quarantine/20-1").rglob("d/*"), key=lambda file: file.stat().st_size)
    good = flipped.read_bytes()
    flipped.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert main(["restore", f"{run}@20"]) == 3
    assert "no checkpoint 20 in its quarantine is good: 20-1 (" in capsys.readouterr().err
    assert list_steps(run / "checkpoints") == [15]
    flipped.write_bytes(good)
    assert main(["restore", f"{run}@20"]) == 0
    assert "is back in place, every byte proven" in capsys.readouterr().out
    assert list_steps(run / "checkpoints") == [15, 20]
    assert main(["verify", f"{run}@20"]) == 0
    assert main(["restore", f"{run}@20"]) == 3
    assert main(["restore", f"{run}@15"]) == 3
    assert main(["restore", str(run)]) == 2


def test_a_run_that_was_never_durable_begins_again(door: Door) -> None:
    """Killed before its first save there is nothing to go on from, and nothing to lose."""
    door.kill_at(5, *SHORT, "train.log_steps=1", "ckpt=none", "train.steps=100000")
    again = door.run(*SHORT, "train.log_steps=1", "ckpt=none", "train.steps=12", f"dir={door.the_run}")
    assert again.returncode == 0, again.stderr


def test_newest_refusals_are_kept(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is not good"):
        restore_exactly(checkpoints / "3", values)
