"""Sources and the pipeline: the order of examples is a value, exact and the same everywhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import Digits, Stdlib, Synthetic, Text
from data.built_in import _load_digits_table
from data.pipeline import ShuffledBatches, TrainingStream, iterate_in_order
from data.sources import Table
from data.text_files import TokenWindows, _find_modules


def counting(size: int) -> Table:
    return Table({"n": np.arange(size)})


def stream_of(size: int, *, batch_size: int, seed: int) -> TrainingStream:
    return TrainingStream(ShuffledBatches(counting(size), batch_size=batch_size, seed=seed))


def drawn(stream: TrainingStream, count: int) -> list[list[int]]:
    return [next(stream)["n"].tolist() for _ in range(count)]


def test_every_epoch_has_each_example_once_and_another_order() -> None:
    batches = drawn(stream_of(40, batch_size=8, seed=3), 15)
    epochs = [sum(batches[i : i + 5], []) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_cross_an_epoch() -> None:
    seen = Counter(sum(drawn(stream_of(10, batch_size=4, seed=0), 5), []))
    assert set(seen.values()) == {2}


def test_the_order_depends_on_the_seed_alone() -> None:
    one, same, other = (drawn(stream_of(40, batch_size=8, seed=seed), 5) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("at", [0, 1, 4, 5, 13])
def test_a_position_is_the_first_batch_not_yet_handed_out(at: int) -> None:
    stream = stream_of(40, batch_size=8, seed=3)
    drawn(stream, at)
    position = stream.state()
    rest = drawn(stream, 7)
    fresh = stream_of(40, batch_size=8, seed=3)
    fresh.restore(position)
    assert drawn(fresh, 7) == rest


def test_in_order_pads_the_last_batch_with_weight_zero() -> None:
    batches = list(iterate_in_order(counting(10), batch_size=4, num_batches=99))
    assert [batch["n"].tolist() for batch, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [weights.tolist() for _, weights in batches] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_part_of_a_source_lies_evenly_in_all_of_it() -> None:
    """The first files of a text would not do for the rest."""
    batches = list(iterate_in_order(counting(100), batch_size=4, num_batches=2))
    assert [batch["n"].tolist() for batch, _ in batches] == [[0, 12, 25, 37], [50, 62, 75, 87]]
    assert all(weights.tolist() == [1, 1, 1, 1] for _, weights in batches)


def test_windows_share_only_the_border_token() -> None:
    windows = TokenWindows(np.arange(21, dtype=np.uint8), seq_len=5)
    assert len(windows) == 4
    assert windows.take(np.array([0, 3]))["tokens"].tolist() == [[0, 1, 2, 3, 4, 5], [15, 16, 17, 18, 19, 20]]


def test_the_standard_library_is_large_and_split_by_file() -> None:
    sources = Stdlib().sources()
    assert len(sources.train) > 50_000
    assert len(sources.eval) > 1_000
    assert sources.fingerprint == Stdlib().sources().fingerprint
    text = sources.train.corpus.tobytes()  # type: ignore[attr-defined]
    assert text.count(b"\nimport ") > 300


def test_a_folder_of_text_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name * 50)
    both = Text(path=str(tmp_path), seq_len=8, eval_fraction=0.5).sources()
    corpora = b"".join(side.corpus.tobytes() for side in (both.train, both.eval))  # type: ignore[attr-defined]
    assert b"a.txt" in corpora
    assert b"b.txt" in corpora
    assert b"c.md" not in corpora
    before = both.fingerprint
    (tmp_path / "a.txt").write_text("changed" * 50)
    assert Text(path=str(tmp_path), seq_len=8).sources().fingerprint != before


def test_digits_are_real_and_split_without_overlap() -> None:
    sources = Digits().sources()
    assert (len(sources.train), len(sources.eval), sources.inputs, sources.num_outputs) == (1437, 360, (8, 8, 1), 10)
    rows = [
        {row.tobytes() for row in side.take(np.arange(len(side)))["inputs"]} for side in (sources.train, sources.eval)
    ]
    assert len(rows[0] & rows[1]) == 0
    assert sources.train.take(np.arange(5))["inputs"].max() == 1.0


def test_synthetic_data_is_the_same_on_every_machine() -> None:
    tokens = Synthetic(size=8, seq_len=4).sources().train.take(np.array([0]))["tokens"]
    assert tokens.tolist() == [[95, 130, 194, 217, 207]]
    features = Synthetic(gives="features", size=64, num_features=3).sources()
    assert features.inputs == (3,)
    assert set(features.train.take(np.arange(56))["label"].tolist()) <= set(range(10))


def test_the_standard_library_is_what_it_was_said_to_be(tmp_path: Path) -> None:
    """Skipped folders are not entered, at any depth; what is found is what a search of everything would give."""
    skip = {"test", "site-packages"}
    for name in ("b.py", "a/c.py", "a/test/d.py", "site-packages/x/e.py", "a/b/f.py", "a/notes.txt", "test.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    everything = (path for path in tmp_path.rglob("*.py") if not skip.intersection(path.relative_to(tmp_path).parts))
    assert sorted(_find_modules(tmp_path, skip)) == sorted(everything)
    assert len(sorted(_find_modules(tmp_path, skip))) == 4


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from its file or through its function: the same, bit for bit."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    table = _load_digits_table()
    assert table[:, :-1].tobytes() == pixels.tobytes()
    assert (table[:, -1] == labels).all()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _load_digits_table().tobytes() == table.tobytes()
