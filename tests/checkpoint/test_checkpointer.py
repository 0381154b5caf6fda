"""The order of things in saving and restoring, with the real store: what a disk, a metric or a bug can do to it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner import files
from runner.checkpoint import arrays, checkpointer, store
from runner.checkpoint.checkpointer import Checkpointer, SaveListeners, SavePolicy, warn_of_little_space
from runner.checkpoint.quarantine import set_newer_aside
from runner.checkpoint.record import (
    PIN,
    PROGRESS,
    STATE,
    Record,
    Score,
    find_best,
    list_records,
    list_steps,
    read_sidecar,
)
from runner.checkpoint.restore import (
    iter_verdicts,
    list_ignored_names,
    restore_exactly,
    restore_newest,
)
from runner.checkpoint.retention import DiskBudget, KeepAll, KeepBest, KeepEveryK, KeepLast, KeepPinned, RetentionRule
from runner.checkpoint.seal import find_problem
from runner.checkpoint.strategy import EverySteps, Failures, NewBest, OnError, SaveRule
from runner.errors import RefusedError, StorageError
from runner.text import display_path, format_size
from runner.values import StepInfo

SCORE = Score("eval/loss", "min")
EVERY: dict[str, SaveRule] = {"best": NewBest(), "every": EverySteps(steps=1)}


def items(step: int) -> dict[str, Any]:
    return {STATE: {"w": jnp.full((32, 32), step, jnp.float32), "step": jnp.int32(step)}, PROGRESS: {"next": step}}


def values(directory: Path) -> dict[str, Any]:
    return arrays.read_leaves(directory / STATE)


class Told(list[str]):
    def __call__(self, line: object) -> None:
        self.append(str(line))


class Fake:
    """A store that writes one small file a checkpoint: as fast as the rules are to be tried."""

    def __init__(self) -> None:
        self.fails: Callable[[int], bool] = lambda step: False
        self.gate = threading.Event()
        self.gate.set()

    def copy_to_host(self, state: Any) -> Any:
        return dict(state)

    def wait_for_copy(self, held: Any) -> bool:
        return False

    def write_checkpoint(self, directory: Path, state: Any, progress: Any) -> None:
        self.gate.wait()
        directory.mkdir(parents=True)
        (directory / "data").write_text(str(state))
        if self.fails(int(directory.name.partition("-")[0])):
            raise OSError(errno.ENOSPC, "No space left on device")

    def find_differing_leaf(self, directory: Path, state: Any) -> str | None:
        return None if (directory / "data").read_text() == str(state) else "w"


def saver(
    path: Path,
    keep: dict[str, RetentionRule],
    *,
    save: dict[str, SaveRule] = EVERY,
    background: bool = False,
    bytes_: Any = store,
    verify: Any = "bytes",
) -> tuple[Checkpointer, Told, list[checkpointer.SavedCheckpoint]]:
    told, saves = Told(), []
    policy = SavePolicy(save, keep, SCORE, background, verify)
    return Checkpointer(path, policy, bytes_, SaveListeners(told, saves.append), Failures()), told, saves


def saved_steps(path: Path, *steps: int) -> None:
    made, _, _ = saver(path, {"all": KeepAll()})
    for step in steps:
        made.save("test", StepInfo(step), items(step))
    made.close()


# --- saving ---


@pytest.mark.parametrize("background", [False, True])
def test_scripted_metrics_leave_the_newest_and_the_best_on_disk(tmp_path: Path, background: bool) -> None:
    made, told, saves = saver(tmp_path, {"last": KeepLast(n=1), "best": KeepBest(n=1)}, background=background)
    for step, loss in enumerate([0.9, 0.5, 0.6, math.nan, 0.8, math.inf], 1):
        moment = StepInfo(step, {"eval/loss": loss})
        reason = made.due(moment)
        assert reason
        made.save(reason, moment, items(step))
    assert made.holds(6)
    made.close()
    assert [r.step for r in list_records(tmp_path)] == [2, 6]
    assert (tmp_path / "best").resolve() == tmp_path / "2"
    assert find_best(list_records(tmp_path), SCORE).step == 2  # type: ignore[union-attr]
    assert restore_newest(tmp_path, tmp_path / "q", values, print)[0].step == 6  # type: ignore[index]
    assert not list(tmp_path.glob(".trash/*"))
    assert not list(tmp_path.glob(".writing/*"))
    assert told == []
    assert [save.record.step for save in saves] == [1, 2, 3, 4, 5, 6]
    assert all(0 < save.stall_seconds <= save.durable_seconds for save in saves)
    assert all(save.bytes > 256 for save in saves)


def test_the_sidecar_says_why_and_what_it_cost(tmp_path: Path) -> None:
    made, _, saves = saver(tmp_path, {"all": KeepAll()}, background=True)
    made.save("because", StepInfo(5, {"eval/loss": 2.0}), items(5))
    made.close()
    record, files, _ = read_sidecar(tmp_path / "5")
    assert (record.step, record.reason, record.metrics, record.mark) == (5, "because", {"eval/loss": 2.0}, "")
    assert 0 < record.stall_seconds <= record.write_seconds <= saves[0].durable_seconds
    assert any(name.startswith("state/d/") for name in files)
    assert json.loads((tmp_path / "5/progress/metadata").read_text()) == {"next": 5}


def test_nothing_has_a_name_before_it_is_sealed_and_nothing_is_deleted_before_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the promise: write, seal, name, sync, and only then delete."""
    events: list[tuple[str, list[int]]] = []

    def watch(name: str, module: Any = checkpointer) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            events.append((name, list_steps(tmp_path)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch("sync_path", files)
    for name in ("seal_checkpoint", "_publish", "select_survivors", "delete_checkpoint"):
        watch(name)
    made, _, _ = saver(tmp_path, {"last": KeepLast(n=1)}, bytes_=Fake())
    made.save("test", StepInfo(1), items(1))
    events.clear()
    made.save("test", StepInfo(2), items(2))
    made.close()
    assert events == [
        ("seal_checkpoint", [1]),
        ("_publish", [1]),
        ("sync_path", [1, 2]),
        ("select_survivors", [1, 2]),
        ("delete_checkpoint", [1, 2]),
        ("sync_path", [2]),
    ]


def test_deletion_is_oldest_first_and_only_of_what_is_not_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_steps(tmp_path, 1, 2, 3, 9)
    gone: list[str] = []
    monkeypatch.setattr(
        checkpointer, "delete_checkpoint", lambda directory: (gone.append(directory.name), shutil.rmtree(directory))
    )
    made, _, _ = saver(tmp_path, {"last": KeepLast(n=1)}, bytes_=Fake())
    made.save("test", StepInfo(4), items(4))
    made.close()
    assert gone == ["1", "2", "3"]  # 9 is not from this training: not ours to judge
    assert list_steps(tmp_path) == [4, 9]


def test_a_save_in_the_background_does_not_keep_training_waiting(tmp_path: Path) -> None:
    slow = Fake()
    slow.gate.clear()
    made, _, _ = saver(tmp_path, {"all": KeepAll()}, background=True, bytes_=slow)
    made.save("test", StepInfo(1), items(1))
    assert made.due(StepInfo(2)) is None  # one is being written: not now
    assert made.newest is None
    slow.gate.set()
    made.holds(1)
    assert made.newest == 1
    assert made.due(StepInfo(3)) == "every 1 steps"
    made.close()


def test_pinned_survive_while_training_goes_on(tmp_path: Path) -> None:
    made, _, _ = saver(tmp_path, {"pinned": KeepPinned()}, bytes_=Fake())
    made.save("test", StepInfo(1), items(1))
    (tmp_path / "1" / PIN).touch()
    for step in (2, 3):
        made.save("test", StepInfo(step), items(step))
    made.close()
    assert list_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_told_once_deletes_nothing_and_heals(tmp_path: Path, background: bool) -> None:
    saved_steps(tmp_path, 1)
    bytes_ = Fake()
    bytes_.fails = lambda step: step < 4
    made, told, saves = saver(tmp_path, {"last": KeepLast(n=1)}, background=background, bytes_=bytes_)
    for step in (2, 3):
        assert made.due(StepInfo(step))
        made.save("test", StepInfo(step), items(step))
        assert not made.holds(step)
        assert list_steps(tmp_path) == [1]
        assert not any((tmp_path / ".writing").iterdir())  # its space is free again at once
    assert sum("could not be written: No space left on device" in line for line in told) == 1
    assert made.newest == 1
    assert made.due(StepInfo(3)) is None  # tried, and not again before it is next due
    made.save("test", StepInfo(4), items(4))
    assert made.holds(4)
    made.close()
    assert list_steps(tmp_path) == [4]
    assert told[1:] == ["checkpoints are written again: step 4 is durable"]
    assert [save.record.step for save in saves] == [4]


PASSING = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN),
)
LASTING = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.ELOOP)


class Failing(Fake):
    """A store that fails as an operating system does, or as TensorStore tells of it."""

    def __init__(self, error: Exception):
        super().__init__()
        self._error = error

    def write_checkpoint(self, directory: Path, state: Any, progress: Any) -> None:
        super().write_checkpoint(directory, state, progress)
        if directory.name.startswith("2-"):
            raise self._error


def wrapped(number: int) -> StorageError:
    error = StorageError("what store.py makes of it")
    error.__cause__ = ValueError(f"RESOURCE_EXHAUSTED: Failed to open: x [os_error_code='{number}'] [source locations=")
    return error


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("number", [*PASSING, *LASTING])
@pytest.mark.parametrize(
    "wrap", [lambda number: OSError(number, os.strerror(number)), wrapped], ids=["os", "tensorstore"]
)
def test_trouble_that_may_pass_is_told_and_what_never_works_ends_the_run(
    tmp_path: Path, number: int, wrap: Callable[[int], Exception], background: bool
) -> None:
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, background=background, bytes_=Failing(wrap(number)))
    made.save("test", StepInfo(1), items(1))
    if number in PASSING:
        made.save("test", StepInfo(2), items(2))
        made.save("test", StepInfo(3), items(3))
        assert made.holds(3)
        assert told[1:] == ["checkpoints are written again: step 3 is durable"]
        made.close()
        assert list_steps(tmp_path) == [1, 3]
        return

    def save() -> None:
        made.save("test", StepInfo(2), items(2))
        made.holds(2)

    with pytest.raises(StorageError) as caught:
        save()
    assert "step 2 cannot be saved: " in str(caught.value)
    assert "space" not in str(caught.value)
    assert (os.strerror(number) in str(caught.value)) == (wrap is not wrapped)
    assert told == []
    made.close()
    assert list_steps(tmp_path) == [1]


@pytest.mark.parametrize("background", [False, True])
def test_a_state_that_cannot_be_written_says_so_at_its_first_save(tmp_path: Path, background: bool) -> None:
    """TensorStore knows no such type; it was told of as a full disk, and trained on with to the end."""
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, background=background, save={"on_error": OnError()})
    state = {"w": jnp.zeros(3, jnp.uint4), "step": jnp.int32(1)}
    said = "step 1 cannot be saved: No TensorStore data type corresponding to NumPy dtype: dtype(uint4)"

    def save() -> None:
        made.save("test", StepInfo(1), {STATE: state, PROGRESS: {}})
        made.due(StepInfo(2, {"eval/loss": 1.0}))

    with pytest.raises(StorageError, match=re.escape(said)) as caught:
        save()
    # A rule that wants what there is after an error does not hide the first reason behind a second.
    made.rescue(caught.value, StepInfo(1), lambda: {STATE: state, PROGRESS: {}})
    assert "nothing could be left to look at" in told[0]
    made.close()
    assert list_steps(tmp_path) == []


def test_a_run_whose_directory_is_gone_is_not_begun_anew_below_its_name(tmp_path: Path) -> None:
    made, told, _ = saver(tmp_path / "run/checkpoints", {"all": KeepAll()}, bytes_=Fake())
    made.save("test", StepInfo(1), items(1))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StorageError, match="step 2 cannot be saved: No such file or directory"):
        made.save("test", StepInfo(2), items(2))
    made.close()
    assert told == []
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_too_long_ends_the_run_at_its_first_save(tmp_path: Path) -> None:
    parent = tmp_path
    while len(str(parent)) < 3950:
        parent /= "x" * 100
    # It is still a name itself; those in it are none.
    parent /= "x" * (4059 - len(str(parent)))
    parent.mkdir(parents=True)
    made, _, _ = saver(parent, {"all": KeepAll()})
    with pytest.raises(StorageError, match="step 1 cannot be saved: File name too long"):
        made.save("test", StepInfo(1), items(1))
    made.close()


def test_no_memory_for_a_copy_is_trouble_that_may_pass(tmp_path: Path) -> None:
    class Narrow(Fake):
        def copy_to_host(self, state: Any) -> Any:
            if int(state["step"]) == 1:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")
            return super().copy_to_host(state)

    made, told, _ = saver(tmp_path, {"all": KeepAll()}, background=True, bytes_=Narrow())
    made.save("test", StepInfo(1), items(1))
    assert told == [
        "warning: a checkpoint could not be written: Cannot allocate memory; training goes on, the next due save retries"
    ]
    assert made.trouble == "Cannot allocate memory"
    made.save("test", StepInfo(2), items(2))
    assert made.holds(2)
    assert made.trouble is None
    made.close()


def test_a_copy_that_is_made_after_save_returns_is_part_of_what_training_waited_for(tmp_path: Path) -> None:
    class SlowCopy(Fake):
        copied = threading.Event()

        def wait_for_copy(self, held: Any) -> bool:
            return self.copied.wait()

    bytes_ = SlowCopy()
    made, _, saves = saver(tmp_path, {"all": KeepAll()}, background=True, bytes_=bytes_)
    began = time.perf_counter()
    made.save("test", StepInfo(1), items(1))
    returned = time.perf_counter()
    assert made.copied_at is None
    time.sleep(0.05)
    bytes_.copied.set()
    assert made.holds(1)
    assert made.copied_at is not None
    assert made.copied_at - returned > 0.04
    (saved,) = saves
    assert saved.stall_seconds == saved.record.stall_seconds == list_records(tmp_path)[0].stall_seconds
    assert 0.04 < saved.stall_seconds <= made.copied_at - began


def test_a_copy_that_is_there_when_save_returns_costs_no_more(tmp_path: Path) -> None:
    made, _, saves = saver(tmp_path, {"all": KeepAll()}, background=True, bytes_=Fake())
    made.save("test", StepInfo(1), items(1))
    returned = time.perf_counter()
    assert made.holds(1)
    assert made.copied_at is not None
    assert made.copied_at <= returned
    made.close()
    assert len(saves) == 1


def test_half_a_checkpoint_gives_its_space_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk has no room for the log either, as long as what Orbax had begun lies there."""
    real = arrays.write_leaves

    def fill(place: Path, *rest: Any) -> None:
        real(place, *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays, "write_leaves", fill)
    made, told, _ = saver(tmp_path, {"all": KeepAll()})
    made.save("test", StepInfo(1), items(1))
    assert len(told) == 1
    assert list((tmp_path / ".writing").iterdir()) == []
    made.close()


def test_a_disk_that_cannot_even_be_listed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, bytes_=Failing(OSError(errno.EIO, "Input/output error")))
    made.save("test", StepInfo(1), items(1))

    def refuse(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        made.save("test", StepInfo(2), items(2))
    assert len(told) == 1
    assert made.newest == 1
    made.close()


def test_a_failure_in_the_background_is_noticed_at_the_next_step(tmp_path: Path) -> None:
    bytes_ = Fake()
    bytes_.fails = lambda step: True
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, background=True, bytes_=bytes_)
    made.save("test", StepInfo(1), items(1))
    while not made._pending.done():  # type: ignore[union-attr]
        time.sleep(0.001)
    made.due(StepInfo(2))
    assert len(told) == 1
    made.close()


def test_what_cannot_be_sealed_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpointer, "seal_checkpoint", fails)
    made, told, _ = saver(tmp_path, {"all": KeepAll()})
    made.save("test", StepInfo(1), items(1))
    assert not made.holds(1)
    made.close()
    assert list_steps(tmp_path) == []
    assert "could not be written: Input/output error" in told[0]


def test_verify_values_finds_what_was_not_saved_as_it_was(tmp_path: Path) -> None:
    """The seal proves the files; only reading back proves that the files are the state."""

    class Wrong(Fake):
        def write_checkpoint(self, directory: Path, state: Any, progress: Any) -> None:
            super().write_checkpoint(
                directory, {**state, "w": "other"} if directory.name.startswith("2-") else state, progress
            )

    for verify, there in (("bytes", [1, 2]), ("values", [1])):
        made, told, _ = saver(tmp_path / verify, {"all": KeepAll()}, bytes_=Wrong(), verify=verify)
        for step in (1, 2):
            made.save("test", StepInfo(step), items(step))
        made.close()
        assert list_steps(tmp_path / verify) == there
        assert bool(told) == (verify == "values")
    assert "w reads back differently from what was to be saved" in told[0]


def test_verify_values_on_the_real_store(tmp_path: Path) -> None:
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, background=True, verify="values")
    made.save("test", StepInfo(1), items(1))
    assert made.holds(1)
    made.close()
    assert told == []


def test_verify_off_takes_no_checksums(tmp_path: Path) -> None:
    made, _, _ = saver(tmp_path, {"all": KeepAll()}, verify="off")
    made.save("test", StepInfo(1), items(1))
    made.close()
    assert not any("xxh3" in file for file in read_sidecar(tmp_path / "1")[1].values())


def test_an_error_leaves_a_marked_checkpoint_where_a_rule_asks_for_it(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1)
    for rules, there in (({}, [1]), ({"on_error": OnError()}, [1, 2])):
        made, told, _ = saver(tmp_path, {"last": KeepLast(n=1)}, save=rules)
        made.rescue(KeyError("x"), StepInfo(2), lambda: items(2))
        assert made.newest == 1
        made.close()
        assert list_steps(tmp_path) == there
    assert told == ["left checkpoint 2 to look at, marked; step=2 restores it"]
    assert read_sidecar(tmp_path / "2")[0].mark == "error"
    assert read_sidecar(tmp_path / "2")[0].reason == "error after step 2: KeyError: 'x'"
    lines = Told()
    assert restore_newest(tmp_path, tmp_path / "q", values, lines)[0].step == 1  # type: ignore[index]
    assert lines == ["checkpoint 2 is passed over (error after step 2: KeyError: 'x'); step=2 restores it"]
    assert restore_exactly(tmp_path / "2", values)[0].mark == "error"  # asked for


def test_what_an_error_left_gives_way_to_the_real_step(tmp_path: Path) -> None:
    made, _, _ = saver(tmp_path, {"all": KeepAll()}, save={"on_error": OnError()})
    made.save("test", StepInfo(1), items(1))
    made.rescue(ValueError("boom"), StepInfo(2), lambda: items(7))
    made.save("test", StepInfo(2), items(2))
    made.close()
    assert read_sidecar(tmp_path / "2")[0].mark == ""
    assert int(values(tmp_path / "2")["step"]) == 2


def test_an_error_after_a_good_save_leaves_that_alone(tmp_path: Path) -> None:
    made, told, _ = saver(tmp_path, {"all": KeepAll()}, save={"on_error": OnError()})
    made.save("test", StepInfo(1), items(1))
    made.rescue(ValueError("boom"), StepInfo(1), lambda: items(7))
    made.close()
    assert read_sidecar(tmp_path / "1")[0].mark == ""
    assert told == []


def test_a_state_that_went_with_the_step_cannot_be_left_and_that_is_said(tmp_path: Path) -> None:
    def gone() -> dict[str, Any]:
        raise RuntimeError("Array has been deleted with shape=float32[8,8].")

    made, told, _ = saver(tmp_path, {"all": KeepAll()}, save={"on_error": OnError()})
    made.rescue(ValueError("boom"), StepInfo(1), gone)
    made.close()
    assert told == ["warning: nothing could be left to look at (Array has been deleted with shape=float32[8,8].)"]


def test_leftovers_of_a_killed_process_are_cleaned_up(tmp_path: Path) -> None:
    for leftover in (
        ".writing/7/state",
        ".writing/7.orbax-checkpoint-tmp",
        ".trash/3-1/state",
        "7.orbax-checkpoint-tmp",
    ):
        (tmp_path / leftover).mkdir(parents=True)
    saved_steps(tmp_path, 7)
    assert {path.name: len(list(path.iterdir())) for path in tmp_path.iterdir() if path.name != "7"} == {
        ".trash": 0,
        ".writing": 0,
    }


def test_what_a_killed_process_had_not_deleted_yet_is_deleted_at_the_start(tmp_path: Path) -> None:
    """Killed after the last save of a run, before pruning: no save comes any more that would do it."""
    saved_steps(tmp_path, 1, 2, 3)
    (tmp_path / "best").unlink(missing_ok=True)
    made, told, _ = saver(tmp_path, {"last": KeepLast(n=1)})
    assert made.newest == 3
    made.close()
    assert list_steps(tmp_path) == [3]
    assert told == []


# --- room on the disk ---


def usage(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())


def test_preflight_counts_what_will_be_kept_and_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep: dict[str, RetentionRule] = {"last": KeepLast(n=2), "best": KeepBest(n=1)}
    usage(monkeypatch, 4000)
    assert warn_of_little_space(tmp_path / "not/yet/there", 1000, keep, 100) is None
    usage(monkeypatch, 3999)
    said = warn_of_little_space(tmp_path / "not/yet/there", 1000, keep, 100)
    assert said is not None
    assert "4 kB free for checkpoints of 1 kB" in said
    assert "room for 3, but retention keeps up to 3 and one more" in said
    assert warn_of_little_space(tmp_path, 1000, {"k": KeepEveryK(steps=10)}, 100) is not None  # ten milestones
    assert (
        warn_of_little_space(tmp_path, 1000, {"k": KeepEveryK(steps=10), "budget": DiskBudget(bytes=2000)}, 100) is None
    )
    assert warn_of_little_space(tmp_path, 1000, {"all": KeepAll()}, 100) is None
    assert "keeps at least 2" in str(warn_of_little_space(tmp_path, 1400, {"all": KeepAll()}, 100))


def test_preflight_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_steps(tmp_path, 1)
    size = list_records(tmp_path)[0].num_bytes
    usage(monkeypatch, size * 2)
    assert warn_of_little_space(tmp_path, size, {"last": KeepLast(n=2)}, 9) is None  # one of three is on it


def test_sizes_are_for_people() -> None:
    sizes = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "1 kB",
        999_600_000: "1 GB",
        1_234_567: "1.23 MB",
        20e9: "20 GB",
        5e15: "5e+03 TB",
    }
    assert {size: format_size(size) for size in sizes} == sizes


# --- restoring ---


def test_what_is_not_good_is_set_aside_and_the_next_older_is_used(tmp_path: Path) -> None:
    path, quarantine, told = tmp_path / "c", tmp_path / "quarantine", Told()
    saved_steps(path, 1, 2, 3)
    (path / "99999").mkdir()  # an empty directory that is named like a step
    (path / "3 (copy)").mkdir()
    flipped = max((path / "3").rglob("d/*"), key=lambda file: file.stat().st_size)
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\0")
    found = restore_newest(path, quarantine, values, told)
    assert found is not None
    assert (found[0].step, int(found[1]["step"])) == (2, 2)
    assert told[0] == f"ignored in {display_path(path)}: 3 (copy) (not a directory named like a step)"
    assert "99999 is not good: no holdfast.json" in told[1]
    assert "checkpoint 3 is not good: " in told[2]
    assert sorted(aside.name.split("-")[0] for aside in quarantine.iterdir()) == ["3", "99999"]
    assert all((aside / "reason.txt").read_text() for aside in quarantine.iterdir())
    assert list_steps(path) == [1, 2]


def test_nothing_good_left_is_refused_saying_what_was_tried(tmp_path: Path) -> None:
    saved_steps(tmp_path / "c", 1, 2)
    for step in (1, 2):
        (tmp_path / f"c/{step}/holdfast.json").unlink()
    with pytest.raises(RefusedError, match=r"tried 2 \(no holdfast.json.*\), 1 \(no holdfast.json"):
        restore_newest(tmp_path / "c", tmp_path / "q", values, Told())
    assert restore_newest(tmp_path / "empty", tmp_path / "q", values, Told()) is None


def test_a_refusal_of_good_bytes_is_no_reason_to_go_back(tmp_path: Path) -> None:
    """Another model is the user's mistake: nothing is set aside for it."""

    def refuses(directory: Path) -> Any:
        raise RefusedError("another model")

    saved_steps(tmp_path / "c", 1, 2)
    with pytest.raises(RefusedError, match="another model"):
        restore_newest(tmp_path / "c", tmp_path / "q", refuses, Told())
    assert list_steps(tmp_path / "c") == [1, 2]


def test_a_flipped_bit_is_loaded_only_where_checking_is_off(tmp_path: Path) -> None:
    """What `ckpt.verify=off` gives up, so that nobody has to guess."""
    saved_steps(tmp_path / "c", 1, 2)
    data = max((tmp_path / "c/2").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    at = content.index(np.float32(2.0).tobytes())
    content[at] ^= 1
    data.write_bytes(content)
    found = restore_newest(tmp_path / "c", tmp_path / "q", values, Told(), checksums=False)
    assert found is not None
    assert found[0].step == 2
    found = restore_newest(tmp_path / "c", tmp_path / "q", values, Told())
    assert found is not None
    assert found[0].step == 1


def test_an_explicit_step_that_is_bad_fails_loudly_and_stays(tmp_path: Path) -> None:
    saved_steps(tmp_path / "c", 1, 2)
    assert restore_exactly(tmp_path / "c/1", values)[0].step == 1
    data = max((tmp_path / "c/1").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(RefusedError, match="is not good: .* bytes instead of"):
        restore_exactly(tmp_path / "c/1", values)
    assert list_steps(tmp_path / "c") == [1, 2]


def test_going_back_sets_the_newer_aside(tmp_path: Path) -> None:
    saved_steps(tmp_path / "c", 1, 2, 3)
    told = Told()
    set_newer_aside(tmp_path / "c", tmp_path / "q", 1, told)
    assert list_steps(tmp_path / "c") == [1]
    assert told == [f"taken back to step 1: 2, 3 moved to {display_path(tmp_path / 'q')}"]
    assert {path.name.split("-")[0] for path in (tmp_path / "q").iterdir()} == {"2", "3"}
    set_newer_aside(tmp_path / "c", tmp_path / "q", 1, told)
    assert len(told) == 1


def test_verdicts_look_and_change_nothing(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1, 2)
    (tmp_path / "3").mkdir()
    before = sorted(tmp_path.rglob("*"))
    found = list(iter_verdicts(tmp_path))
    assert [(verdict.step, verdict.usable) for verdict in found] == [(3, False), (2, True), (1, True)]
    assert list_ignored_names(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


# --- everything together ---

metrics = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
keeps: st.SearchStrategy[dict[str, RetentionRule]] = st.dictionaries(
    st.sampled_from("ab"),
    st.one_of(
        st.builds(KeepLast, n=st.integers(1, 3)),
        st.builds(KeepBest, n=st.integers(1, 3)),
        st.builds(KeepEveryK, steps=st.integers(2, 5)),
        st.just(KeepPinned()),
        st.builds(DiskBudget, bytes=st.integers(1, 4000)),
    ),
)
strategies: st.SearchStrategy[dict[str, SaveRule]] = st.dictionaries(
    st.sampled_from("xy"), st.one_of(st.builds(EverySteps, steps=st.integers(1, 4)), st.just(NewBest())), min_size=1
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategies, keeps, st.lists(st.tuples(metrics, st.booleans()), min_size=1, max_size=16), st.booleans())
def test_whatever_is_chosen_measured_and_fails_the_laws_hold_on_disk(
    tmp_path_factory: pytest.TempPathFactory,
    save: dict[str, SaveRule],
    keep: dict[str, RetentionRule],
    script: list[tuple[float | None, bool]],
    background: bool,
) -> None:
    """After every step: the newest durable and the best durable are there, proven; nothing else looks like one."""
    path, bytes_ = tmp_path_factory.mktemp("law"), Fake()
    bytes_.fails = lambda step: script[step - 1][1]
    made, _, _ = saver(path, keep, save=save, background=background, bytes_=bytes_)
    durable: dict[int, float] = {}
    for step, (loss, fails) in enumerate(script, 1):
        moment = StepInfo(step, {} if loss is None else {"eval/loss": loss})
        if reason := made.due(moment):
            made.save(reason, moment, items(step))
            assert made.holds(step) == (not fails)
            if not fails:
                durable[step] = math.inf if loss is None or not math.isfinite(loss) else loss
        there = list_steps(path)
        assert set(there) <= durable.keys()
        assert all(find_problem(path / str(known)) is None for known in there)
        if durable:
            assert max(durable) in there
            best = min(durable.values())
            assert math.isinf(best) or best in [r.metrics.get("eval/loss") for r in list_records(path)]
            assert math.isinf(best) or (path / "best").resolve().name in map(str, there)
    made.close()
    restarted, _, _ = saver(path, keep, save=save, bytes_=Fake())  # a new process decides from the disk alone
    assert restarted.newest == max(durable, default=None)
    restarted.close()


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Record(1, "", {}, 0.0).step = 2  # type: ignore[misc]
