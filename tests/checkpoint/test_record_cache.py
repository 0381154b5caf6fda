"""The records of a folder that is asked again and again: each sidecar is read once, and every change is seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from runner.checkpoint import record_cache
from runner.checkpoint.record import Record, list_records
from runner.checkpoint.record_cache import RecordCache
from runner.checkpoint.seal import seal_checkpoint
from runner.errors import StorageError


def make(folder: Path, step: int, reason: str = "test") -> Path:
    directory = folder / str(step)
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(b"x")
    seal_checkpoint(directory, Record(step, reason, {}, 0.0))
    return directory


def test_it_says_what_a_look_at_the_disk_says(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path / "checkpoints")
    assert cache.list_records() == []
    folder = tmp_path / "checkpoints"
    for step in (100, 20, 3):
        make(folder, step)
        assert cache.list_records() == list_records(folder)
    (folder / "20" / "pinned").touch()
    assert [record.pinned for record in cache.list_records()] == [False, True, False]
    (folder / "20" / "pinned").unlink()
    assert not any(record.pinned for record in cache.list_records())
    shutil.rmtree(folder / "3")
    assert [record.step for record in cache.list_records()] == [20, 100]
    # Another one under a name that was known: saved anew after the run was taken back.
    os.rename(folder / "20", folder / ".trash")
    make(folder, 20, "anew")
    assert [record.reason for record in cache.list_records()] == ["anew", "test"]
    (folder / "7").mkdir()
    (folder / "best").symlink_to("100")
    (folder / "100.tmp").mkdir()
    assert cache.list_records() == list_records(folder)
    # Without a seal when it was first seen, and sealed then.
    (folder / "7/data").write_bytes(b"x")
    seal_checkpoint(folder / "7", Record(7, "late", {}, 0.0))
    assert cache.list_records() == list_records(folder)


def test_each_sidecar_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping all checkpoints costs no more at the thousandth save than at the first."""
    read: list[Path] = []
    real = record_cache.read_sidecar
    monkeypatch.setattr(record_cache, "read_sidecar", lambda directory: read.append(directory) or real(directory))
    cache = RecordCache(tmp_path)
    for step in range(1, 41):
        make(tmp_path, step)
        assert len(cache.list_records()) == step
    assert len(read) == 40


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="cannot be listed"):
        RecordCache(tmp_path / "checkpoints").list_records()
