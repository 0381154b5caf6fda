"""When, which and bytes: rules as pure functions, the checkpointer with the real store, and what a disk can do to it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint.checkpointer import Checkpointer, Policy, newest_good
from runner.checkpoint.digest import problem_of
from runner.checkpoint.record import Record, Score, best_of, records_in
from runner.checkpoint.retention import All, BestN, Keep, Last, survivors
from runner.checkpoint.store import Store
from runner.checkpoint.strategy import Best, Steps, due
from runner.errors import RefusedError, StorageError
from runner.moment import Moment

SCORE = Score("eval/loss", "min")


def record(step: int, loss: float | None = None, *, pinned: bool = False) -> Record:
    return Record(step, "test", {} if loss is None else {"eval/loss": loss}, 0.0, pinned)


# --- WHEN ---


def test_steps_are_counted_from_the_beginning() -> None:
    rules = {"periodic": Steps(steps=5)}
    saved: list[Record] = []
    for step in range(1, 21):
        if due(rules, Moment(step), saved):
            saved.append(record(step))
    assert [r.step for r in saved] == [5, 10, 15, 20]
    assert due(rules, Moment(5), []) == "every 5 steps"


def test_a_multiple_that_was_missed_is_made_up_for_and_the_grid_stays() -> None:
    rule = Steps(steps=5)
    assert rule.reason(Moment(7), [record(4)])  # 5 fell due while another save was written
    assert rule.reason(Moment(8), [record(7)]) is None
    assert rule.reason(Moment(10), [record(7)])


def test_best_beats_what_is_on_disk_and_nothing_else_ranks() -> None:
    rule, records = Best(min_improvement=0.1), [record(1, 2.0), record(2, math.nan), record(3)]
    reasons = {
        loss: rule.reason(Moment(9, {"eval/loss": loss}), records) for loss in (1.5, 1.95, 2.5, math.nan, -math.inf)
    }
    assert reasons == {1.5: "best eval/loss: 2 → 1.5", 1.95: None, 2.5: None, math.nan: None, -math.inf: None}
    assert rule.reason(Moment(9), records) is None
    assert rule.reason(Moment(9, {"eval/loss": 7.0}), [record(1, math.nan)]) == "first eval/loss: 7"
    assert Best(mode="max").reason(Moment(9, {"eval/loss": 2.5}), records) == "best eval/loss: 2 → 2.5"


def test_reasons_are_joined() -> None:
    rules = {"periodic": Steps(steps=3), "best": Best()}
    assert due(rules, Moment(3, {"eval/loss": 1.0}), []) == "every 3 steps; first eval/loss: 1"


# --- WHICH ---


def test_worsening_metric_and_nan_keep_the_newest_and_the_true_best() -> None:
    """Orbax's stock recipe (`best_fn` with `max_to_keep`) deletes the newest here, and the best at the first NaN."""
    records = [record(step, loss) for step, loss in enumerate([0.9, 0.5, 0.6, math.nan, 0.8, math.inf, 0.95], 1)]
    kept = survivors({"last": Last(n=1), "best": BestN(n=1)}, records, SCORE)
    assert kept == {2: "best, best 1 eval/loss", 7: "newest, last 1"}


metrics = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
some_records = st.lists(st.tuples(metrics, st.booleans()), max_size=12).map(
    lambda rows: [record(step, loss, pinned=pinned) for step, (loss, pinned) in enumerate(rows, 1)]
)
some_rules: st.SearchStrategy[dict[str, Keep]] = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.one_of(
        st.builds(Last, n=st.integers(1, 4)),
        st.builds(BestN, n=st.integers(1, 4), mode=st.sampled_from(["min", "max"])),
        st.just(All()),
    ),
    max_size=3,
)


@given(some_records, some_rules)
def test_the_newest_the_best_and_the_pinned_survive_any_rules(records: list[Record], rules: dict[str, Keep]) -> None:
    kept = survivors(rules, records, SCORE)
    assert kept.keys() <= {r.step for r in records}
    assert {r.step for r in records if r.pinned} <= kept.keys()
    if records:
        assert records[-1].step in kept
    finite = [(r.metrics["eval/loss"], -r.step) for r in records if math.isfinite(r.metrics.get("eval/loss", math.nan))]
    if finite:
        assert -min(finite)[1] in kept


@given(some_records, some_rules, st.randoms())
def test_retention_is_stable_and_more_rules_keep_more(
    records: list[Record], rules: dict[str, Keep], rng: random.Random
) -> None:
    kept = survivors(rules, records, SCORE)
    assert survivors(rules, [r for r in records if r.step in kept], SCORE).keys() == kept.keys()
    shuffled = rng.sample(records, len(records))
    assert survivors(rules, shuffled, SCORE).keys() == kept.keys()
    assert survivors({**rules, "more": Last(n=3)}, records, SCORE).keys() >= kept.keys()


# --- BYTES ---


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "model": {
            "w": jnp.asarray(rng.standard_normal((64, 33)), jnp.float32),
            "deep": {"b": jnp.arange(seed, seed + 7)},
        },
        "rng": {"key": jax.random.key(seed), "fast": jax.random.key(seed, impl="rbg")},
        "data": {"next_index": seed},
    }


def abstract(items: dict[str, Any]) -> dict[str, Any]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return {name: None if name == "data" else jax.tree.map(shape, value) for name, value in items.items()}


def open_store(directory: Path) -> Store:
    return Store(directory, ("model", "rng"), ("data",))


class Told(list[str]):
    def __call__(self, line: object) -> None:
        self.append(str(line))


def checkpointer(
    path: Path, keep: dict[str, Keep], *, background: bool = False, store: Any = open_store
) -> tuple[Checkpointer, Told]:
    told = Told()
    policy = Policy({"best": Best(), "every": Steps(steps=1)}, keep, SCORE, background)
    return Checkpointer(path, policy, store, told, lambda saved: None), told


def raw(leaf: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def test_what_goes_in_comes_out_bit_for_bit(tmp_path: Path) -> None:
    items, store = tree(3), open_store(tmp_path)
    store.save(record(3), items)
    store.wait()
    back = store.restore(3, abstract(items))
    store.close()
    assert jax.tree.structure(back) == jax.tree.structure(items)
    for old, new in zip(jax.tree.leaves(items), jax.tree.leaves(back), strict=True):
        if isinstance(old, jax.Array):
            assert old.dtype == new.dtype
            assert raw(old) == raw(new)
        else:
            assert old == new


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"].pop("w"), "model.w is float32[64, 33] on disk and absent"),
        (lambda t: t["model"].update(new=t["model"]["w"]), "model.new is absent on disk and float32[64, 33]"),
        (lambda t: t["model"].update(w=jnp.zeros((64, 34))), "model.w is float32[64, 33] on disk and float32[64, 34]"),
        (lambda t: t["model"].update(w=t["model"]["w"].astype(jnp.bfloat16)), "and bfloat16[64, 33]"),
        (lambda t: t["rng"].update(key=jax.random.key(0, impl="rbg")), "rng.key is"),
        (lambda t: t["rng"].update(fast=jax.random.key(0, impl="unsafe_rbg")), "rng.fast is key<rbg>[]"),
    ],
    ids=["removed", "added", "reshaped", "cast", "key", "generator"],
)
def test_another_structure_is_refused_and_named(tmp_path: Path, change: Any, said: str) -> None:
    store = open_store(tmp_path)
    store.save(record(1), tree(1))
    store.wait()
    other = tree(1)
    change(other)
    with pytest.raises(RefusedError, match=".") as caught:
        store.restore(1, abstract(other))
    store.close()
    assert said in str(caught.value)


@pytest.mark.parametrize("background", [False, True])
def test_scripted_metrics_leave_the_newest_and_the_best_on_disk(tmp_path: Path, background: bool) -> None:
    saver, _ = checkpointer(tmp_path, {"last": Last(n=1), "best": BestN(n=1)}, background=background)
    for step, loss in enumerate([0.9, 0.5, 0.6, math.nan, 0.8, math.inf], 1):
        moment = Moment(step, {"eval/loss": loss})
        reason = saver.due(moment)
        assert reason
        saver.save(reason, moment, tree(step))
    assert saver.holds(6)
    saver.close()
    assert [r.step for r in records_in(tmp_path)] == [2, 6]
    assert (tmp_path / "best").resolve() == tmp_path / "2"
    assert best_of(records_in(tmp_path), SCORE).step == 2  # type: ignore[union-attr]
    assert newest_good(tmp_path, tmp_path / "q", print).step == 6  # type: ignore[union-attr]
    assert not list(tmp_path.glob(".trash/*"))
    assert not list(tmp_path.glob("*tmp*"))


def saved_steps(path: Path, *steps: int) -> None:
    saver, _ = checkpointer(path, {"all": All()})
    for step in steps:
        saver.save("test", Moment(step), tree(step))
    saver.close()


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    saved_steps(tmp_path, 1)
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    files = [
        path
        for path in files
        if path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt") and path.stat().st_size
    ]
    assert problem_of(tmp_path / "1") is None
    rng = random.Random(0)
    for _ in range(60):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        old = path.read_bytes()
        path.write_bytes(content)
        assert problem_of(tmp_path / "1"), f"{path} byte {at}"
        path.write_bytes(old)
    assert problem_of(tmp_path / "1") is None


def test_what_is_not_good_is_set_aside_and_the_next_older_is_used(tmp_path: Path) -> None:
    path, quarantine, told = tmp_path / "c", tmp_path / "quarantine", Told()
    saved_steps(path, 1, 2, 3)
    (path / "99999").mkdir()  # an empty directory that is named like a step
    flipped = max((path / "3").rglob("d/*"), key=lambda file: file.stat().st_size)
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\0")
    good = newest_good(path, quarantine, told)
    assert good is not None
    assert good.step == 2
    assert len(told) == 2
    assert "99999 is not good: no readable holdfast.json" in told[0]
    assert "checkpoint 3 is not good: " in told[1]
    assert sorted(aside.name.split("-")[0] for aside in quarantine.iterdir()) == ["3", "99999"]
    assert all((aside / "reason.txt").read_text() for aside in quarantine.iterdir())


def test_nothing_good_left_is_refused_saying_what_was_tried(tmp_path: Path) -> None:
    saved_steps(tmp_path / "c", 1)
    (tmp_path / "c/1/holdfast.json").unlink()
    with pytest.raises(RefusedError, match=r"tried 1 \(no readable holdfast.json"):
        newest_good(tmp_path / "c", tmp_path / "q", Told())
    assert newest_good(tmp_path / "empty", tmp_path / "q", Told()) is None


class Full(Store):
    """A store whose disk is full for a while."""

    full = True

    def wait(self) -> None:
        super().wait()
        if Full.full:
            raise StorageError("No space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_told_once_and_deletes_nothing(tmp_path: Path, background: bool) -> None:
    saved_steps(tmp_path, 1)
    Full.full = True
    saver, told = checkpointer(
        tmp_path, {"last": Last(n=1)}, background=background, store=lambda path: Full(path, ("model", "rng"), ("data",))
    )
    saver.save("test", Moment(2), tree(2))
    saver.save("test", Moment(3), tree(3))
    saver.holds(3)
    assert sum("could not be written: No space left on device" in line for line in told) == 1
    assert problem_of(tmp_path / "1") is None  # nothing was deleted for a save that failed
    Full.full = False
    saver.save("test", Moment(4), tree(4))
    assert saver.holds(4)
    saver.close()
    assert (tmp_path / "4").is_dir()
    assert not (tmp_path / "1").exists()


def test_leftovers_of_a_killed_process_are_cleaned_up(tmp_path: Path) -> None:
    for leftover in ("7.orbax-checkpoint-tmp/model", ".trash/3-1/model"):
        (tmp_path / leftover).mkdir(parents=True)
    saved_steps(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".trash", "7"]
    assert not list((tmp_path / ".trash").iterdir())


def test_the_sidecar_says_why(tmp_path: Path) -> None:
    saved_steps(tmp_path, 5)
    sidecar = json.loads((tmp_path / "5/holdfast.json").read_text())
    assert (sidecar["step"], sidecar["reason"], sidecar["format"]) == (5, "test", 1)
    assert any(name.startswith("model/") for name in sidecar["files"])
