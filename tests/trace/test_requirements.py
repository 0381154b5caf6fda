"""What a run writes down of its step: bytes and FLOPs are those of `python -m runner remat`, from the trace it has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models.scopes import CheckpointPolicy
from runner.config.remat_policies import AttentionOnly, EveryN, Full, Names, NoRemat, RematPolicy
from runner.config.schema import validate_config
from runner.remat.candidates import Candidate, trace_candidate
from runner.trace import step_requirements
from runner.trace.flops import count_flops, count_recomputed_flops
from runner.trace.remat_trace import count_bytes_kept_by_step
from runner.train.compile import measure_step, trace_step
from runner.train.dataset import read_sources as read_data
from tests import synthetic
from tests.config.test_config import changed
from tests.remat.test_survey import config_of

LOOP = validate_config(changed(model={"kind": "resnet"}, data={"kind": "digits", "batch_size": 8}))
SCAN = config_of()
IN_PARTS = replace(SCAN, train=replace(SCAN.train, microbatches=2))
SOURCES = {"gpt": read_data(SCAN.data), "resnet": read_data(LOOP.data)}


def traced(config: Any, option: RematPolicy) -> Candidate:
    return trace_candidate(config, option, SOURCES[config.model.kind])


SOME = (NoRemat(), AttentionOnly(), EveryN(n=2), Names(save=("qkv",)), Full())


@pytest.mark.parametrize(("config", "options"), [(SCAN, SOME), (IN_PARTS, (NoRemat(), Full()))], ids=["whole", "parts"])
def test_bytes_and_flops_are_those_that_all_policies_are_weighed_by(config: Any, options: Any) -> None:
    found = [traced(config, option) for option in options]
    for one in found:
        mine = count_bytes_kept_by_step(one.traced.jaxpr.jaxpr)
        assert mine.total() == pytest.approx(one.num_bytes, abs=8), one.policy  # a scalar or two
        assert {**mine, "": 0} == {**one.stored, "": 0}, one.policy  # by tag
        assert count_recomputed_flops(one.traced.jaxpr.jaxpr) == one.flops - found[0].flops, one.policy
    assert found[-1].flops > found[0].flops


def test_a_product_in_a_function_that_is_done_again_is_counted() -> None:
    @jax.checkpoint
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.jit(lambda x: jnp.sin(x @ w))(x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(twice, argnums=(0, 1)))(jnp.ones((3, 5)), jnp.ones((5, 7))).jaxpr
    assert count_recomputed_flops(jaxpr) == 2 * 3 * 5 * 7
    assert count_flops(jaxpr) == 4 * count_recomputed_flops(jaxpr)


def test_in_a_loop_no_more_is_counted_than_what_a_backward_pass_asks_for() -> None:
    none, full = traced(LOOP, NoRemat()), traced(LOOP, Full())
    for one in (none, full):
        assert 0.7 * one.num_bytes < count_bytes_kept_by_step(one.traced.jaxpr.jaxpr).total() <= one.num_bytes
    assert count_recomputed_flops(full.traced.jaxpr.jaxpr) == full.flops - none.flops > 0


class Program:
    """Stands for a compiled one."""

    def __init__(self, found: Any):
        self.memory_analysis = lambda: found


SAID = SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=90,
    alias_size_in_bytes=80,
    temp_size_in_bytes=70,
    host_temp_size_in_bytes=0,
    peak_memory_in_bytes=150,
)


def test_what_is_written_down_is_read_again_and_a_silent_backend_tells_less() -> None:
    one = traced(LOOP, Full())
    config = replace(LOOP, remat=Full())
    found = measure_step(one.built, config, Full(), Program(SAID))  # type: ignore[arg-type]
    assert (found.remat, found.backend, found.devices, found.blocks) == ("full", "cpu", 1, "loop")
    assert (found.held, found.flops) == (one.held, one.flops)
    assert found.compiled == step_requirements.CompiledMemory(100, 90, 80, 70, 0, None)  # a CPU's peak is no peak
    assert found.compiled.footprint == 180
    assert step_requirements.read_compiled_memory(Program(SAID), "gpu") == step_requirements.CompiledMemory(
        100, 90, 80, 70, 0, 150
    )  # type: ignore[arg-type]
    assert step_requirements.parse_requirements(found.document()) == found
    silent = measure_step(one.built, config, Full(), Program(None))  # type: ignore[arg-type]
    assert silent == replace(found, compiled=None)
    assert step_requirements.parse_requirements(silent.document()) == silent
    scopes = {each.params["policy"].scope for each in _checkpoints(trace_step(one.built, config))}
    assert scopes == {"block"}  # it is the run's own plan that was counted


def _checkpoints(step: Any) -> list[Any]:
    from runner.trace.remat_trace import iterate_equations

    return [
        each for each in iterate_equations(step.jaxpr.jaxpr) if isinstance(each.params.get("policy"), CheckpointPolicy)
    ]


@pytest.mark.parametrize(
    "found",
    [
        None,
        "torn",
        {},
        {"remat": "full"},
        synthetic.needs("full", 10, 3) | {"stored": -1},
        synthetic.needs("full", 10, 3, held="<b>"),
        synthetic.needs("full", 10, 3, held=True),
        synthetic.needs("full", 10, 3, another=1),
        synthetic.needs("full", 10, 3, compiled={"peak": 3}),
        synthetic.needs("full", 10, 3) | {"remat": 7},
    ],
)
def test_what_is_no_such_record_counts_as_none(found: Any) -> None:
    assert step_requirements.parse_requirements(synthetic.needs("full", 10, 3)) is not None
    assert step_requirements.parse_requirements(found) is None


def test_the_compiler_is_not_believed_of_a_loop_on_a_cpu() -> None:
    def step(remat: str, **more: Any) -> step_requirements.StepRequirements:
        found = step_requirements.parse_requirements(synthetic.needs(remat, 1000, 0, **more))
        assert found is not None
        return found

    none, loop, scan = step("none"), step("full", blocks="loop"), step("full")
    assert step_requirements.is_compiler_believable([none, scan])
    assert not step_requirements.is_compiler_believable([none, loop])
    assert step_requirements.is_compiler_believable([none, step("full", blocks="loop", backend="gpu")])
    assert not step_requirements.is_compiler_believable([none, step("full", compiled=None)])
    assert step_requirements.bytes_at_once(none, compiled=True) == 100 + 2000
    assert step_requirements.bytes_at_once(none, compiled=False) == 100 + 1000
    assert replace(scan, flops=1250, recomputed=250).extra == 0.25
