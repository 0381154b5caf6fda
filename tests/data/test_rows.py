"""Several processes make rows of one batch each: put together they are the batch that one process makes, bit for bit."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ExternalData
from data.bad_examples import SkippingSource
from data.option_fields import Augmentation
from data.pipeline import ShuffledBatches, TrainingStream, iterate_in_order
from data.sources import Sources, Table
from data.transforms import RowsOfBatch, augment_images
from runner.train.dataset import make_stream
from tests.data.test_bad_examples import Numbers
from tests.data.test_pipeline import several_epochs, with_
from tests.places import MADE, VARIED

Bits = list[tuple[str, str, tuple[int, ...], bytes]]
# Uneven, so that a row that is in the wrong half shows.
BATCH_SIZE, ROWS = 8, [slice(0, 3), slice(3, 8)]
SHORT = ("arrays", "csv", "tokens")  # images that are varied, a table, windows of text; the others with `slow`


def bits(batch: dict[str, np.ndarray]) -> Bits:
    return [(name, str(values.dtype), values.shape, values.tobytes()) for name, values in sorted(batch.items())]


def drawn(stream: TrainingStream, count: int) -> list[dict[str, np.ndarray]]:
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def joined(apart: list[list[dict[str, np.ndarray]]]) -> list[Bits]:
    """The batches of several processes, put together."""
    return [
        bits({name: np.concatenate([rows[name] for rows in batch]) for name in batch[0]})
        for batch in zip(*apart, strict=True)
    ]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in SHORT else pytest.mark.slow) for kind in MADE])
def test_rows_put_together_are_the_batch(kind: str, tmp_path: Path) -> None:
    """Over several epochs, whose border lies within a batch; by threads, from the middle on."""
    option = with_(MADE[kind](tmp_path), prefetch=0)
    assert option.batch_size == BATCH_SIZE
    sources = option.sources()
    count = several_epochs(option, sources)
    if kind in SHORT:  # others are larger
        assert len(sources.train) % BATCH_SIZE
        assert len(sources.train) < count * BATCH_SIZE
    whole = [bits(batch) for batch in drawn(make_stream(option, sources, 3), count)]
    assert joined([drawn(make_stream(option, sources, 3, rows=rows), count) for rows in ROWS]) == whole
    ahead = [make_stream(with_(option, prefetch=2), sources, 3, rows=rows) for rows in ROWS]
    for stream in ahead:
        stream.restore({"next_index": 5})
    assert joined([drawn(stream, 9) for stream in ahead]) == whole[5:14]


@pytest.mark.parametrize("kind", ["arrays", pytest.param("images", marks=pytest.mark.slow)])
def test_worker_processes_make_the_same_rows(kind: str, tmp_path: Path) -> None:
    """Kept where batches go to another process: of a table whole, of files by where they are."""
    option = MADE[kind](tmp_path)
    sources = option.sources()
    whole = [
        {name: values[ROWS[1]] for name, values in batch.items()}
        for batch in drawn(make_stream(with_(option, prefetch=0), sources, 3), 6)
    ]
    stream = make_stream(with_(option, workers=1), sources, 3, rows=ROWS[1])
    assert [bits(batch) for batch in drawn(stream, 6)] == [bits(batch) for batch in whole]


def test_rows_are_kept_where_batches_are_sent(tmp_path: Path) -> None:
    for kind in ("images", "csv"):
        option = MADE[kind](tmp_path)
        sent = make_stream(option, option.sources(), 3, rows=ROWS[1])._batches
        assert isinstance(sent, ShuffledBatches)
        again = pickle.loads(pickle.dumps(sent.starting_at(4)))
        assert bits(again[2]) == bits(sent[6]), kind


class Asked:
    """A source of a user's own that remembers which examples each batch was made of."""

    def __init__(self) -> None:
        self.batches = list[list[int]]()

    def __len__(self) -> int:
        return 13

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(indices.tolist())
        return {"inputs": np.stack([np.arange(3.0) + index for index in indices]), "label": np.asarray(indices) % 2}


def test_a_function_of_the_users_own_is_asked_for_these_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("their_rows")
    module.make = lambda: Sources(Asked(), Asked(), (3,), 2, "theirs", "")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_rows", module)
    option = ExternalData(target="their_rows:make", batch_size=BATCH_SIZE)

    def draw(rows: slice | None) -> tuple[list[dict[str, np.ndarray]], list[list[int]]]:
        sources = option.sources()
        own: Any = sources.train
        own.source.batches.clear()  # what it was first looked at with
        return drawn(make_stream(option, sources, 3, "classify", rows), 5), own.source.batches

    whole, apart = draw(None), [draw(rows) for rows in ROWS]
    assert joined([batches for batches, _ in apart]) == [bits(batch) for batch in whole[0]]
    assert [sum(asked, []) for asked in zip(*(asked for _, asked in apart), strict=True)] == whole[1]
    assert [len(asked) for _, batches in apart for asked in batches] == [3] * 5 + [5] * 5


def test_examples_that_are_passed_over_are_so_in_every_process() -> None:
    """Each process tells of those among its own rows."""

    def draw(rows: slice | None) -> tuple[list[dict[str, np.ndarray]], set[int]]:
        source = SkippingSource(Numbers(20, {1, 2, 7, 11, 19}))
        told = set[int]()
        source.listen(lambda example: told.add(example.index))
        return drawn(TrainingStream(ShuffledBatches(source, batch_size=BATCH_SIZE, seed=1, rows=rows)), 5), told

    whole, apart = draw(None), [draw(rows) for rows in ROWS]
    assert joined([batches for batches, _ in apart]) == [bits(batch) for batch in whole[0]]
    assert set.union(*(told for _, told in apart)) == whole[1] == {1, 2, 7, 11, 19}


@pytest.mark.parametrize("size", [11, 16, 5, 100])
def test_an_evaluation_in_order_gives_the_same_rows_and_weights(size: int) -> None:
    """Also of the last batch, which is filled up."""

    def walk(rows: slice | None) -> list[dict[str, np.ndarray]]:
        table = Table({"n": np.arange(size)})
        batches = iterate_in_order(table, batch_size=BATCH_SIZE, num_batches=4, rows=rows)
        return [{**batch, "weights": weights} for batch, weights in batches]

    whole = walk(None)
    assert joined([walk(rows) for rows in ROWS]) == [bits(batch) for batch in whole]
    assert (whole[-1]["weights"] == 0).any() == (size in (11, 5))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    number=st.integers(0, 2**40),
    cuts=st.lists(st.integers(1, 20), max_size=3),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)),
    option=st.sampled_from([VARIED, Augmentation(noise=0.3), Augmentation(flip=True, brightness=0.2)]),
)
def test_an_image_is_varied_the_same_whichever_others_are_made(
    seed: int, number: int, cuts: list[int], shape: tuple[int, int, int], option: Augmentation
) -> None:
    images = np.random.default_rng(0).random((21, *shape), np.float32)
    vary: Callable[..., np.ndarray] = lambda rows, place: augment_images(  # noqa: E731
        images[rows], option, seed=seed, number=number, place=place
    )
    whole = vary(slice(0, 21), None)
    edges = sorted({0, *cuts, 21})
    apart = [vary(slice(begin, end), RowsOfBatch(begin, 21)) for begin, end in pairwise(edges)]
    assert np.concatenate(apart).tobytes() == whole.tobytes()
