"""How fast training is told to be: what counts as time, what counts as work, and where no share of a peak is told."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from runner.rundir.layout import RunDir
from runner.trace.flops import count_flops, count_useful_flops, find_uncounted
from runner.trace.peak_flops import PEAK_FLOPS, find_peak_flops
from runner.train import speed
from runner.train.speed import SpeedMeter, StepWork
from tests.conftest import SMALL, Door

WEIGHTS = jnp.ones((8, 8))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only where a test says so."""
    now = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def test_what_training_waited_for_is_no_time_of_steps(clock: list[float]) -> None:
    meter = SpeedMeter(StepWork(32, 1000), Future(), [].append, step=40)
    clock[0] += 2.0
    with meter.pause():
        clock[0] += 3.0
    took, found = meter.measure(50)
    assert took == {
        "steps": 10,
        "seconds": 5.0,
        "paused": 3.0,
        "examples_per_second": 160.0,
        "tokens_per_second": 5000.0,
    }
    assert (found.steps, found.mfu) == (5.0, None)
    clock[0] += 1.0
    assert meter.measure(60)[0]["seconds"] == 1.0


def test_the_share_of_the_peak_comes_when_it_is_counted(clock: list[float]) -> None:
    counted: Future[StepWork] = Future()
    said: list[str] = []
    meter = SpeedMeter(StepWork(32, None), counted, said.append, step=0)
    clock[0] += 1.0
    assert "mfu" not in meter.measure(10)[0]
    # 8 devices of 1e12 each; 1e11 FLOPs a step, 10 steps a second.
    counted.set_result(StepWork(32, None, flops=100_000_000_000, peak=8e12))
    clock[0] += 1.0
    took, found = meter.measure(20)
    assert took["mfu"] == found.mfu == 0.125
    assert not said


def test_why_there_is_no_share_is_said_once(clock: list[float]) -> None:
    counted: Future[StepWork] = Future()
    counted.set_result(StepWork(32, None, flops=None, peak=8e12, untold="no trace tells the FLOPs of while"))
    said: list[str] = []
    meter = SpeedMeter(StepWork(32, None), counted, said.append, step=0)
    for step in (10, 20):
        clock[0] += 1.0
        assert meter.measure(step)[1].mfu is None
    assert said == ["MFU is not told: no trace tells the FLOPs of while"]


def test_a_device_that_nobody_knows_has_no_peak() -> None:
    assert find_peak_flops("cpu") is None
    assert find_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    # A slice of a GPU does not do what the whole one does.
    assert find_peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS.values())


def test_what_is_done_again_is_no_work() -> None:
    def loss(weights: jax.Array, *, again: bool) -> jax.Array:
        def layer(hidden: jax.Array, each: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(hidden @ each), None

        body = jax.checkpoint(layer) if again else layer
        return jax.lax.scan(body, jnp.ones((4, 8)), weights)[0].sum()

    stack = jnp.ones((5, 8, 8))
    plain, again = (
        jax.make_jaxpr(jax.grad(lambda weights, again=again: loss(weights, again=again)))(stack).jaxpr
        for again in (False, True)
    )
    assert count_flops(again) > count_flops(plain)
    assert count_useful_flops(again) == count_useful_flops(plain) == count_flops(plain) == 3 * 5 * 2 * 4 * 8 * 8


def kernel(value: Any, out: Any) -> None:
    out[...] = value[...]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: jax.lax.scan(lambda c, w: (c @ w, None), x, jnp.ones((3, 8, 8)))[0], []),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ WEIGHTS, x), ["while"]),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x @ WEIGHTS), []),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda c: c @ WEIGHTS, lambda c: c @ c, x), ["cond"]),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda c: c @ WEIGHTS, lambda c: c, x), []),
        (lambda x: pallas.pallas_call(kernel, out_shape=x, interpret=True)(x), ["pallas_call"]),
        (lambda x: jax.pure_callback(lambda c: c, x, x), ["pure_callback"]),
    ],
)
def test_what_no_trace_tells_is_not_guessed(function: Any, names: list[str]) -> None:
    assert find_uncounted(jax.make_jaxpr(jax.jit(function))(WEIGHTS).jaxpr) == names


@pytest.mark.forked(quick=True)
def test_a_run_writes_down_how_fast_it_was(door: Door) -> None:
    assert door.run(*SMALL, "train.peak_flops=1e11").returncode == 0
    lines = [json.loads(line) for line in RunDir(door.the_run).timing.read_text().splitlines()]
    trained = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in trained] == list(range(5, 61, 5))
    for line in trained:
        busy = line["seconds"] - line.get("paused", 0.0)
        assert line["examples_per_second"] == pytest.approx(8 * line["steps"] / busy, rel=0.01)
        assert line["tokens_per_second"] == pytest.approx(16 * line["examples_per_second"], rel=0.01)
    # Of two lines one has an evaluation before it: each 10 steps, after the line of that step.
    assert [line["step"] for line in trained if line.get("paused", 0.0) > 0] == list(range(15, 61, 10))
    # Counting waits for everything else; at the end it is there.
    known = [line for line in trained if "mfu" in line]
    assert known[-1]["step"] == 60
    work = {line["mfu"] / line["tokens_per_second"] for line in known}
    assert max(work) == pytest.approx(min(work), rel=0.01)
