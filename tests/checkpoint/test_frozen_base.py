"""The frozen weights of a run on disk: stored once, proven, shared, mended, and never taken from a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.checkpoint import frozen_base, store
from runner.checkpoint.arrays import read_leaves
from runner.checkpoint.frozen_base import (
    BASE,
    LostBaseError,
    find_base_problem,
    find_digest,
    find_needed_base,
    locate_base,
    open_base,
    prove_base,
    set_base_aside,
    share_base,
    store_base,
    with_digest,
)
from runner.checkpoint.record import PROGRESS, STATE, list_records
from runner.checkpoint.retention import KeepBest, KeepEveryK, KeepLast
from runner.checkpoint.seal import WrittenArrays
from runner.errors import RefusedError
from runner.values import StepInfo
from tests.checkpoint.test_checkpointer import Fake, saver
from tests.laws.test_tuned import flip, largest


def weights(value: float) -> dict[str, Any]:
    return {"frozen": {"embed": jnp.full((64, 64), value), "head": {"kernel": jnp.arange(8.0)}}}


def stored(run: Path, value: float = 1.0) -> Path:
    """The base of a run, with what a value makes of it."""
    run.mkdir(parents=True, exist_ok=True)

    def write(directory: Path) -> WrittenArrays:
        return store.write_checkpoint(directory, weights(value), {})

    return run / BASE / store_base(run, write)


def test_its_name_is_what_it_holds(tmp_path: Path) -> None:
    one, same, other = stored(tmp_path / "a/1"), stored(tmp_path / "b/1"), stored(tmp_path / "a/1", 2.0)
    assert one.name == same.name != other.name
    assert find_base_problem(one) is None
    assert np.array_equal(read_leaves(one / STATE)["frozen.embed"], np.full((64, 64), 1.0, np.float32))
    assert sorted(path.name for path in one.parent.iterdir()) == sorted([one.name, other.name])


def test_stored_again_it_stays_the_files_it_was(tmp_path: Path) -> None:
    base = stored(tmp_path / "a/1")
    before = {path: path.stat().st_ino for path in base.rglob("*") if path.is_file()}
    assert stored(tmp_path / "a/1") == base
    assert {path: path.stat().st_ino for path in base.rglob("*") if path.is_file()} == before
    flip(largest(base))
    assert find_base_problem(stored(tmp_path / "a/1")) is None


def test_another_run_of_the_name_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = stored(tmp_path / "a/1"), stored(tmp_path / "a/2")
    assert os.path.samefile(largest(one), largest(two))
    shutil.rmtree(one)
    assert find_base_problem(two) is None


def test_where_nothing_can_be_linked_each_run_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    one, two = stored(tmp_path / "a/1"), stored(tmp_path / "a/2")
    assert not os.path.samefile(largest(one), largest(two))
    assert find_base_problem(two) is None
    # One that is lost is copied.
    shutil.rmtree(two)
    assert share_base(tmp_path / "a/2", two.name)
    assert find_base_problem(two) is None


def test_what_is_not_good_is_not_shared(tmp_path: Path) -> None:
    one = stored(tmp_path / "a/1")
    flip(largest(one))
    two = stored(tmp_path / "a/2")
    assert find_base_problem(two) is None
    assert not os.path.samefile(largest(one), largest(two))


def test_one_that_changes_after_it_was_read_once_is_noticed_by_the_next_process(tmp_path: Path) -> None:
    base = stored(tmp_path / "a/1")
    prove_base(base)
    flip(largest(base))
    prove_base(base)
    frozen_base._proven.clear()
    with pytest.raises(LostBaseError, match="its checksum differs"):
        prove_base(base)


def test_a_missing_one_is_told_with_the_way_out(tmp_path: Path) -> None:
    base = stored(tmp_path / "a/1")
    shutil.rmtree(base)
    with pytest.raises(LostBaseError, match="bring that folder back from a copy"):
        prove_base(base)


def test_half_a_base_is_removed_and_written_anew(tmp_path: Path) -> None:
    half = tmp_path / "a/1/base/.writing/state"
    half.mkdir(parents=True)
    (half / "d").write_text("half")
    base = stored(tmp_path / "a/1")
    assert [path.name for path in base.parent.iterdir()] == [base.name]


def test_what_is_set_aside_has_its_reason(tmp_path: Path) -> None:
    base = stored(tmp_path / "a/1")
    set_base_aside(base, tmp_path / "a/1/quarantine", "a byte")
    (aside,) = (tmp_path / "a/1/quarantine").iterdir()
    assert (aside / "reason.txt").read_text() == "a byte\n"
    assert not base.exists()
    set_base_aside(base, tmp_path / "a/1/quarantine", "again")


def test_a_name_that_is_no_digest_leads_nowhere(tmp_path: Path) -> None:
    for value in ("../../x", 7, "a" * 63):
        directory = tmp_path / "checkpoints/5"
        (directory / PROGRESS).mkdir(parents=True, exist_ok=True)
        (directory / PROGRESS / "metadata").write_text(json.dumps({"base": value}))
        with pytest.raises(RefusedError, match="names no base that this version knows"):
            find_digest(directory)


def test_a_checkpoint_without_one_needs_none(tmp_path: Path) -> None:
    made, _, _ = saver(tmp_path / "checkpoints", {})
    made.save("test", StepInfo(1), {STATE: {"w": jnp.ones(3)}, PROGRESS: with_digest({"next": 1}, "")})
    made.close()
    assert open_base(tmp_path / "checkpoints/1") is None
    assert find_needed_base(tmp_path / "checkpoints") is None


class FakeWithProgress(Fake):
    """The fast store, with the progress beside it that names a base."""

    def write_checkpoint(self, directory: Path, state: Any, progress: Any) -> None:
        super().write_checkpoint(directory, state, progress)
        (directory / PROGRESS).mkdir()
        (directory / PROGRESS / "metadata").write_text(json.dumps(progress))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=12),
    last=st.integers(1, 3),
    best=st.integers(1, 2),
    every=st.sampled_from([None, 3, 5]),
    bases=st.lists(st.integers(0, 1), min_size=12, max_size=12),
    data=st.data(),
)
def test_whatever_is_kept_its_base_is_there(
    losses: list[float],
    last: int,
    best: int,
    every: int | None,
    bases: list[int],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Retention deletes checkpoints, and another run of the name is deleted: no kept one loses what it needs."""
    name = tmp_path_factory.mktemp("runs")
    for run in ("mine", "other"):
        digests = [stored(name / run, value).name for value in (1.0, 2.0)]
    rules: dict[str, Any] = {"last": KeepLast(n=last), "best": KeepBest(n=best)}
    if every is not None:
        rules["every"] = KeepEveryK(steps=every)
    made, _, _ = saver(name / "mine/checkpoints", rules, bytes_=FakeWithProgress())
    gone = data.draw(st.integers(0, len(losses) - 1))
    for step, loss in enumerate(losses, 1):
        progress = with_digest({"next": step}, digests[bases[step - 1]])
        made.save("test", StepInfo(step, {"eval/loss": loss}), {STATE: {"w": step}, PROGRESS: progress})
        if step - 1 == gone:
            shutil.rmtree(name / "other")
    made.close()
    kept = list_records(name / "mine/checkpoints")
    assert kept
    for record in kept:
        directory = name / "mine/checkpoints" / str(record.step)
        digest = find_digest(directory)
        assert digest is not None
        assert find_base_problem(locate_base(directory, digest)) is None


@pytest.mark.parametrize("own", [True, False], ids=["linked", "copied"])
@pytest.mark.parametrize(
    "odd", ["link", "folder link", "base link", "fifo", "grown", "missing", "extra", "other values"]
)
def test_of_another_run_nothing_is_taken_but_what_its_seal_says(
    odd: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sibling may hold anything: it is not followed, not waited for, and not believed."""
    theirs = stored(tmp_path / "a/1")
    mine = stored(tmp_path / "b/2")
    (tmp_path / "b/2").rename(tmp_path / "a/2")
    mine = tmp_path / "a/2" / BASE / mine.name
    if not own:
        shutil.rmtree(mine)
        monkeypatch.setattr(os, "link", refuse_links)
    file, away = largest(theirs), tmp_path / "away"
    if odd == "link":
        file.rename(away)
        file.symlink_to(away)
    elif odd == "folder link":
        (theirs / STATE).rename(away)
        (theirs / STATE).symlink_to(away)
    elif odd == "base link":
        theirs.rename(away)
        theirs.symlink_to(away)
    elif odd == "fifo":
        file.unlink()
        os.mkfifo(file)
    elif odd == "grown":
        os.truncate(file, 1 << 40)  # no disk has room for it
    elif odd == "missing":
        file.unlink()
    elif odd == "extra":
        os.mkfifo(theirs / "state/d/extra")
        (theirs / "elsewhere").symlink_to("/")
        with (theirs / "huge").open("wb") as huge:
            huge.truncate(1 << 40)
    else:
        # A good seal, of the right name, of other values.
        shutil.rmtree(theirs)
        monkeypatch.setattr(frozen_base, "_describe", lambda _: f"base {mine.name}")
        stored(tmp_path / "c/1", 2.0).rename(theirs)
    taken = share_base(tmp_path / "a/2", mine.name)
    assert taken == (odd == "extra")
    assert [path.name for path in mine.parent.iterdir()] == ([mine.name] if own or taken else [])
    if own or taken:
        monkeypatch.undo()
        assert find_base_problem(mine) is None
        assert np.array_equal(read_leaves(mine / STATE)["frozen.embed"], np.full((64, 64), 1.0, np.float32))


def refuse_links(*_: Any, **__: Any) -> None:
    raise OSError(95, "Operation not supported")
