"""Examples that cannot be decoded: named, or passed over in the same way by whoever makes a batch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Images
from data.bad_examples import NEWLY_SKIPPED, SkippedExample, SkippingSource, iter_skipping
from data.data_errors import UndecodableError, UnreadableError
from data.pipeline import ShuffledBatches, TrainingStream
from data.sources import SourcePart, Sources, split_source


class Numbers:
    """Examples that are their own numbers; some cannot be decoded."""

    def __init__(self, size: int, bad: set[int]):
        self.size, self.bad, self.taken = size, bad, list[int]()

    def __len__(self) -> int:
        return self.size

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.taken += np.asarray(indices).tolist()
        if hit := sorted(self.bad & set(np.asarray(indices).tolist())):
            error = UndecodableError(f"number {hit[0]} is torn")
            error.file = f"{hit[0]}.png"
            raise error
        return {"n": np.asarray(indices), "label": np.asarray(indices) % 3}


def taken(source: SkippingSource, *indices: int) -> list[int]:
    return source.take(np.array(indices))["n"].tolist()


@pytest.mark.parametrize(
    ("bad", "asked", "given"),
    [
        ({3}, [2, 3, 4], [2, 4, 4]),
        ({3, 4, 5}, [3, 5, 3], [6, 6, 6]),
        ({9, 0}, [9, 0, 1], [1, 1, 1]),
        (set(range(9)), [0, 5, 9], [9, 9, 9]),
        (set(), [7, 1], [7, 1]),
    ],
)
def test_the_next_good_example_takes_the_place(bad: set[int], asked: list[int], given: list[int]) -> None:
    source = SkippingSource(Numbers(10, bad))
    batch = source.take(np.array(asked))
    assert batch["n"].tolist() == given
    assert batch["label"].tolist() == [n % 3 for n in given]
    assert taken(source, *asked) == given
    # In whatever order they are met, the same ones take the places.
    backwards = SkippingSource(Numbers(10, bad))
    assert [taken(backwards, index)[0] for index in reversed(range(10))][::-1] == taken(source, *range(10))


def test_what_is_known_is_not_tried_again_and_told_once() -> None:
    numbers, told = Numbers(10, {3}), list[SkippedExample]()
    source = SkippingSource(numbers)
    taken(source, 3)
    source.listen(told.append)
    taken(source, 3, 3, 2)
    numbers.taken.clear()
    taken(source, 3)
    assert numbers.taken == [4]
    assert told == [SkippedExample(3, "number 3 is torn", "3.png")]


def test_what_was_passed_over_stays_so_when_it_is_mended() -> None:
    source = SkippingSource(Numbers(10, set()))
    source.remember({3: SkippedExample(3, "was torn")})
    assert taken(source, 3, 4) == [4, 4]


def test_a_place_on_one_side_is_taken_by_that_side() -> None:
    """Never by an example that is evaluated on."""
    train, held_out = split_source(Numbers(40, {5, 17, 30}), 0.3)
    for part in (train, held_out):
        source = SkippingSource(part)
        assert set(taken(source, *range(len(part)))) == set(part.chosen.tolist()) - {5, 17, 30}


def test_nothing_that_can_be_decoded_is_an_error() -> None:
    with pytest.raises(UnreadableError, match="none of the 4 examples can be decoded: number"):
        taken(SkippingSource(Numbers(4, {0, 1, 2, 3})), 2)


def test_what_is_away_is_no_bad_example() -> None:
    """A disk that is gone would otherwise be trained around."""

    class Away(Numbers):
        def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            raise UnreadableError("a.png: No such file or directory; bring it back")

    with pytest.raises(UnreadableError, match="bring it back"):
        taken(SkippingSource(Away(4, set())), 2)


def jpegs(root: Path, count: int = 30, torn: Mapping[int, float] | None = None) -> Path:
    """Write images of noise in three classes; of some only a share of the bytes is there."""
    rng = np.random.default_rng(2)
    for number in range(count):
        file = root / "abc"[number % 3] / f"{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        if torn and number in torn:
            content = file.read_bytes()
            file.write_bytes(content[: int(len(content) * torn[number])])
    return root


def images(root: Path, **options: object) -> Sources:
    return Images(path=str(root), size=8, eval_fraction=0.3, **options).sources()  # type: ignore[arg-type]


def test_every_way_an_image_is_broken_is_an_undecodable_example(tmp_path: Path) -> None:
    """Cut off in the middle, empty, text, a huge one, a PNG without its end: each is found when it is decoded."""
    jpegs(tmp_path, torn={0: 0.5, 3: 0.0, 6: 0.02})
    (tmp_path / "a/09.jpg").write_text("no image")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a/x.png")
    (tmp_path / "a/x.png").write_bytes((tmp_path / "a/x.png").read_bytes()[:60])
    sources = images(tmp_path, on_bad="skip")
    found = {}
    for name, source in iter_skipping(sources):
        batch = source.take(np.arange(len(source)))
        assert batch["inputs"].shape == (len(source), 8, 8, 3)
        found |= {example.file: name for example in source.skipped.values()}
    assert found.keys() == {"a/00.jpg", "a/03.jpg", "a/06.jpg", "a/09.jpg", "a/x.png"}
    with pytest.raises(ValueError, match="is no image that can be read .*; replace or remove it, or add data.on_bad=s"):
        images(tmp_path)


def test_both_ways_out_are_said_and_the_file_is_named(tmp_path: Path) -> None:
    source = images(jpegs(tmp_path, torn={0: 0.5, 1: 0.5})).train
    with pytest.raises(
        UndecodableError, match="replace it with a good file of the same name, or add data.on_bad=skip"
    ) as caught:
        source.take(np.arange(len(source)))
    assert caught.value.file in ("a/00.jpg", "b/01.jpg")
    assert pickle.loads(pickle.dumps(caught.value)).file == caught.value.file


def test_workers_pass_over_the_same_and_tell_it(tmp_path: Path) -> None:
    jpegs(tmp_path, torn={number: 0.5 for number in (0, 4, 8, 13)})
    option = Images(path=str(tmp_path), size=8, eval_fraction=0.1, on_bad="skip")
    given, told = {}, {}
    for workers in (0, 1):
        source = option.sources().train
        assert isinstance(source, SkippingSource)
        told[workers] = list[SkippedExample]()
        source.listen(told[workers].append)
        batches = ShuffledBatches(source, batch_size=4, seed=1, reopen=_Reopen(option))
        stream = TrainingStream(batches, workers=workers, prefetch=workers)
        given[workers] = [next(stream) for _ in range(10)]
        stream.close()
    for here, there in zip(given[0], given[1], strict=True):
        assert here.keys() == there.keys() == {"inputs", "label"}
        assert all((here[name] == there[name]).all() for name in here)
    assert {one.index for one in told[0]} == {one.index for one in told[1]}
    assert len(told[1]) == len({one.file for one in told[1]}) >= 3


class _Reopen:
    def __init__(self, option: Images):
        self.option = option

    def __call__(self) -> object:
        return self.option.sources().train


def test_a_batch_says_what_was_passed_over_where_nobody_listens() -> None:
    batches = ShuffledBatches(SkippingSource(Numbers(6, {2})), batch_size=6, seed=0)
    assert NEWLY_SKIPPED in batches[0]
    assert NEWLY_SKIPPED not in batches[1]
    assert [next(TrainingStream(batches)).keys() for _ in range(2)] == [{"n", "label"}] * 2


def test_parts_are_wrapped_one_by_one(tmp_path: Path) -> None:
    sources = images(jpegs(tmp_path), on_bad="skip")
    assert [name for name, _ in iter_skipping(sources)] == ["train", "eval"]
    assert not list(iter_skipping(images(tmp_path)))
    assert not isinstance(sources.train, SourcePart)
