"""The law: interrupted and resumed is uninterrupted, bit for bit; and a stop request loses no completed step."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable

import pytest

from tests.conftest import SMALL, Door, assert_same

STRATEGIES = ("periodic", "combined", "async")
SAVES = ("ckpt.save.periodic.steps=7",)


def _overrides(ckpt: str) -> tuple[str, ...]:
    return (*SMALL, f"ckpt={ckpt}", *SAVES)


@pytest.fixture(scope="session")
def references(untouched: Callable[..., Door]) -> dict[str, Door]:
    """An uninterrupted run for each strategy."""
    return {ckpt: untouched(*_overrides(ckpt)) for ckpt in STRATEGIES}


def _killed_and_finished(door: Door, ckpt: str, kills: list[tuple[int, float]]) -> None:
    for step, delay in kills:
        door.kill_at(step, *_overrides(ckpt), delay=delay)
        if step > 0:
            assert "**running**" in (door.the_run / "README.md").read_text()  # there from the first moment
    done = door.run(*_overrides(ckpt))
    assert done.returncode == 0, done.stderr


# In the short form the one that has all of it: rules of both kinds, in the background.
@pytest.mark.parametrize(
    "ckpt", [pytest.param(each, marks=() if each == "async" else pytest.mark.slow) for each in STRATEGIES]
)
def test_killed_three_times_is_bit_identical(ckpt: str, door: Door, references: dict[str, Door]) -> None:
    _killed_and_finished(door, ckpt, [(10, 0.0), (25, 0.013), (45, 0.031)])
    assert_same(door.the_run, references[ckpt].the_run, 60)
    endings = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [line["ending"] for line in endings] == ["killed", "killed", "killed", "finished"]
    assert [line["from_step"] for line in endings[1:]] != [0, 0, 0]  # it resumed; it did not start over


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ckpt", STRATEGIES)
def test_killed_anywhere_is_bit_identical(ckpt: str, seed: int, door: Door, references: dict[str, Door]) -> None:
    rng = random.Random(f"{ckpt} {seed}")
    steps = sorted(rng.choices(range(0, 51, 5), k=3))
    _killed_and_finished(door, ckpt, [(step, rng.uniform(0.0, 0.08)) for step in steps])
    assert_same(door.the_run, references[ckpt].the_run, 60)


def test_the_strategies_compute_the_same(references: dict[str, Door]) -> None:
    """Saving looks at training and does not touch it."""
    logs = {(door.the_run / "logs/metrics.jsonl").read_bytes() for door in references.values()}
    assert len(logs) == 1


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)),
    ],
)
def test_a_stop_request_loses_no_step(number: signal.Signals, door: Door, references: dict[str, Door]) -> None:
    said = door.kill_at(20, *_overrides("async"), number=number)
    assert f"stopped by {number.name}" in said
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["state"] == "preempted"
    last_line = json.loads((door.the_run / "logs/metrics.jsonl").read_text().splitlines()[-1])
    assert status["step"] >= last_line["step"] >= 20
    newest = max(int(path.name) for path in (door.the_run / "checkpoints").iterdir() if path.name.isdecimal())
    assert newest == status["step"] == status["last_committed_step"]
    assert door.run(*_overrides("async")).returncode == 0
    assert_same(door.the_run, references["async"].the_run, 60)
    lost = [json.loads(line)["lost_steps"] for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert lost == [0, 0]


def test_a_second_signal_leaves_at_once(door: Door) -> None:
    """Slow saves: the first signal cannot have finished its work when the second one comes."""
    import time

    process = door.start(*SMALL, "train.steps=100000", "train.eval_steps=100000", "ckpt=periodic")
    assert process.stdout is not None
    while not (door.cwd / "outputs").exists():
        time.sleep(0.01)
    # While jax is imported and the step is compiled no boundary comes: both signals land before one.
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "leaving at once" in err
