"""A batch is a function of its number: whoever makes it, however far ahead, in whichever process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.data_errors import UnreadableError
from data.option_fields import Augmentation
from data.pipeline import ShuffledBatches, TrainingStream
from data.sources import Table
from data.transforms import augment_images, draw_uniform, make_normal
from runner.train.dataset import make_stream
from tests.conftest import Door, assert_same, last_logged
from tests.laws.faults import Forks
from tests.places import MADE, VARIED

FAST = ("digits", "tokens", "images")  # in memory, mapped, decoded; the others with `slow`


def bits(batch: dict[str, np.ndarray]) -> list[tuple[str, bytes]]:
    return [(name, values.tobytes()) for name, values in sorted(batch.items())]


def drawn(stream: TrainingStream, count: int) -> list[list[tuple[str, bytes]]]:
    return [bits(next(stream)) for _ in range(count)]


def with_(option: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(option, **changes)


def several_epochs(option: Any, sources: Any) -> int:
    return min(2 * len(sources.train) // option.batch_size + 5, 60)


@pytest.mark.parametrize("kind", MADE)
def test_positions_are_exact_with_and_without_threads(kind: str, tmp_path: Path) -> None:
    option = MADE[kind](tmp_path)
    sources = option.sources()
    count = several_epochs(option, sources)
    expected = drawn(make_stream(with_(option, prefetch=0), sources, seed=3), count)
    assert len({repr(batch) for batch in expected}) == count
    stream = make_stream(with_(option, prefetch=3), sources, seed=3)
    assert drawn(stream, count // 2) == expected[: count // 2]
    assert stream.state() == {"next_index": count // 2}
    stream.close()
    again = make_stream(with_(option, prefetch=2), option.sources(), seed=3)
    again.restore(stream.state())
    assert drawn(again, count - count // 2) == expected[count // 2 :]
    again.close()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in MADE])
def test_worker_processes_change_nothing(kind: str, tmp_path: Path) -> None:
    option = MADE[kind](tmp_path)
    sources = option.sources()
    count = several_epochs(option, sources)
    expected = drawn(make_stream(with_(option, prefetch=0), sources, seed=3), count)
    stream = make_stream(with_(option, workers=2), sources, seed=3)
    stream.skip([1, 4])
    assert drawn(stream, 5) == [expected[n] for n in (0, 2, 3, 5, 6)]
    assert stream.state() == {"next_index": 7}
    stream.skip([])
    if kind == FAST[0]:  # back, in the middle of it, with new workers
        stream.restore({"next_index": 3})
        assert drawn(stream, count - 3) == expected[3:]
    stream.close()


def test_what_is_sent_to_a_worker_is_small(tmp_path: Path) -> None:
    import pickle

    for kind in ("stdlib", "tokens", "images"):
        option = MADE[kind](tmp_path)
        assert len(pickle.dumps(make_stream(option, option.sources(), seed=0)._batches)) < 2000, kind


def test_data_that_changes_before_a_worker_reads_it_is_not_trained_on(tmp_path: Path) -> None:
    import pickle

    option = MADE["text"](tmp_path)
    sent = pickle.dumps(make_stream(option, option.sources(), seed=0)._batches)
    pickle.loads(sent)
    (tmp_path / "texts/00.txt").write_text("other")
    with pytest.raises(UnreadableError, match="data=text: changed since training began"):
        pickle.loads(sent)


def test_augmentation_is_a_function_of_seed_and_number() -> None:
    images = np.random.default_rng(0).random((16, 8, 8, 1), np.float32)
    make = partial(augment_images, images, VARIED)
    assert make(seed=1, number=7).tobytes() == make(seed=1, number=7).tobytes()
    assert make(seed=1, number=7).tobytes() != make(seed=1, number=8).tobytes()
    assert make(seed=1, number=7).tobytes() != make(seed=2, number=7).tobytes()
    assert make(seed=1, number=7).dtype == np.float32
    assert augment_images(images, Augmentation(), seed=1, number=7) is images


def test_each_epoch_sees_an_image_differently_and_evaluation_sees_it_as_it_is() -> None:
    source = Table({"inputs": np.random.default_rng(0).random((8, 8, 8, 1), np.float32), "label": np.arange(8)})
    stream = TrainingStream(ShuffledBatches(source, batch_size=8, seed=0, augment=VARIED))
    first, second = (
        {int(n): image for n, image in zip(b["label"], b["inputs"], strict=True)} for b in (next(stream), next(stream))
    )
    assert all((first[n] != second[n]).any() for n in range(8))
    assert (source.take(np.arange(8))["inputs"] == source.columns["inputs"]).all()


def test_each_augmentation_does_what_it_says() -> None:
    images = np.random.default_rng(0).random((400, 8, 8, 1), np.float32) + 1.0

    def make(**options: Any) -> np.ndarray:
        return augment_images(images, Augmentation(**options), seed=0, number=0)

    flipped = make(flip=True)
    turned = [(a == b[:, ::-1]).all() for a, b in zip(flipped, images, strict=True)]
    kept = [(a == b).all() for a, b in zip(flipped, images, strict=True)]
    assert all(t != k for t, k in zip(turned, kept, strict=True))
    assert 150 < sum(turned) < 250
    black = (make(erase=0.5) == 0).sum(axis=(1, 2, 3))
    assert set(black.tolist()) == {0, 16}
    assert 150 < (black == 16).sum() < 250
    borders = (make(crop=2) == 0).sum(axis=(1, 2, 3))
    assert set(borders.tolist()) == {64 - a * b for a in (6, 7, 8) for b in (6, 7, 8)}
    shifts = (make(brightness=0.1) - images).std(axis=(1, 2, 3))
    assert shifts.max() < 1e-6
    assert 0.08 < (make(brightness=0.1) - images).mean(axis=(1, 2, 3)).std() < 0.12
    assert 0.098 < (make(noise=0.1) - images).std() < 0.102


def test_random_numbers_are_those_of_philox_on_every_machine() -> None:
    values = draw_uniform(1, 2, 3, (4,))
    assert (values * 2**24).astype(int).tolist() == [10256777, 1064363, 11998130, 11869960]
    assert abs(float(make_normal(draw_uniform(1, 2, 3, (2, 100_000))).std()) - 1.0) < 0.01


def workers_of(pid: int) -> list[int]:
    """The processes below one, whatever they are."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(stat.parent.name), *workers_of(int(stat.parent.name))]
    return found


def until_gone(pids: list[int]) -> list[int]:
    """Wait for processes to end; those that do not."""
    limit = time.monotonic() + 30
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_run_with_workers_is_killed_stopped_and_goes_on_without_them(make_door: Any, served: Forks) -> None:
    """SIGKILL leaves no process behind; Ctrl-C no traceback; the bits are those of a run that had no workers."""
    command = (
        *("data=digits", "model=mlp", "data.augment={crop: 1, noise: 0.1}", "model.dropout=0.2", "train.steps=90"),
        *("train.log_steps=1", "train.eval_steps=30", "log.tensorboard=false", "ckpt=periodic", "data.batch_size=64"),
        "ckpt.save.periodic.steps=10",
    )
    slow = ("data.workers=2", "data.prefetch=1")
    reference, door = make_door("reference", served), make_door("killed", served)
    assert reference.run(*command).returncode == 0
    for number, step in ((signal.SIGKILL, 15), (signal.SIGINT, 40)):
        process = begun(door, *command, *slow)
        workers: list[int] = []
        while last_logged(door.cwd) < step:
            assert process.poll() is None, process.communicate()
            workers = workers_of(process.pid) or workers
            time.sleep(0.002)
        assert len(workers) >= 2
        os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
        process.wait(timeout=300)
        left = until_gone(workers)
        for pid in left:  # they would hold the pipe, and this test with it
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), (out, err)
        assert left == []
        assert "Traceback" not in out + err
        assert "resource_tracker" not in err
    done = door.run(*command)
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, reference.the_run, 90)


def begun(door: Door, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        door.start_arguments(*overrides),
        cwd=door.cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
