"""`model.loss_chunks`: the same loss and gradients, and never all logits at once."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Gpt
from models.objectives import next_token
from models.sequence_chunks import map_sequence_chunks
from runner.config.identity import classify_key, find_drift, hash_identity
from runner.config.remat_policies import Full, NoRemat, RematPolicy
from runner.config.schema import Config, validate_config
from runner.errors import ConfigError
from runner.inspect.model_cost import summarize_model
from runner.remat.candidates import trace_candidate
from runner.trace.flops import count_flops
from runner.trace.remat_trace import iterate_equations
from runner.train.build import build
from runner.train.compile import abstract_batch, trace_step
from runner.train.step import cast_floats
from tests.config.test_config import changed
from tests.conftest import QUICK, REPO

LAYERS, WIDTH, SEQ, VOCAB, BATCH = 2, 16, 16, 256, 4
LOGITS = BATCH * SEQ * VOCAB
HEAD = 2 * WIDTH * LOGITS  # FLOPs of its forward pass
SMALL = Gpt(num_layers=LAYERS, num_heads=2, width=WIDTH, hidden=24)
TOKENS = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ + 1)), jnp.int32)}


def configured(chunks: int, **changes: Any) -> Config:
    sizes = {"num_layers": LAYERS, "num_heads": 2, "width": WIDTH, "hidden": 24}
    data = {"kind": "synthetic", "gives": "tokens", "seq_len": SEQ, "batch_size": BATCH, "size": 16}
    return validate_config(changed(model={"kind": "gpt", **sizes, "loss_chunks": chunks}, data=data, **changes))


def gradients(option: Gpt) -> Any:
    """(metrics by example, gradients of the mean loss), with random weights so large that everything shows."""
    random = np.random.default_rng(0)

    def make() -> nnx.Module:
        return option.build((SEQ,), VOCAB, nnx.Rngs(0))

    graphdef, params, _ = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    rest = jax.jit(lambda: nnx.split(make(), nnx.Param, ...)[2], compiler_options=QUICK)()  # quick without weights
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype), params)

    def loss(params: Any) -> Any:
        examples = next_token(nnx.merge(graphdef, params, rest, copy=True), TOKENS)
        return examples["loss"].mean(), examples

    (_, examples), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return examples, nnx.to_pure_dict(grads)


@pytest.mark.parametrize(("chunks", "changes"), [(4, {}), (SEQ, {"tied": False, "norm": "layernorm"})])
def test_the_loss_and_its_gradients_are_those_of_the_whole(chunks: int, changes: dict[str, Any]) -> None:
    option = replace(SMALL, num_layers=1, **changes)
    (whole, expected), (divided, grads) = gradients(option), gradients(replace(option, loss_chunks=chunks))
    assert divided.keys() == {"loss", "bits_per_byte"}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), divided, whole)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6), grads, expected)


def largest(jaxpr: Any) -> int:
    """Numbers in the largest array that is ever computed."""
    return max(math.prod(out.aval.shape) for equation in iterate_equations(jaxpr) for out in equation.outvars)


@pytest.mark.parametrize("remat", [NoRemat(), Full()], ids=["none", "full"])
def test_all_logits_are_never_there_at_once(remat: RematPolicy) -> None:
    """Neither in training nor in an evaluation; of the largest chunk there are as many as it says."""
    found = {}
    for chunks in (1, 4):
        config = replace(configured(chunks), remat=remat)
        built = build(config)
        evaluation = built.eval_step.trace(built.abstract, *abstract_batch(built, config)).jaxpr
        found[chunks] = largest(trace_step(built, config).jaxpr.jaxpr), largest(evaluation.jaxpr)
    assert found == {1: (LOGITS, LOGITS), 4: (LOGITS // 4, LOGITS // 4)}


def test_it_costs_the_output_layer_once_more_and_stores_no_logits() -> None:
    config = configured(1)
    sources = config.data.sources()
    whole, divided = (trace_candidate(configured(chunks), NoRemat(), sources) for chunks in (1, 4))
    assert divided.flops - whole.flops == HEAD
    assert whole.num_bytes - divided.num_bytes >= 4 * LOGITS
    full = trace_candidate(configured(4), Full(), sources)
    stream = 4 * BATCH * SEQ * WIDTH
    assert full.num_bytes <= (LAYERS + 1) * stream + 3 * 4 * BATCH * SEQ + 1024  # and tokens, targets, scales


def test_the_table_of_parts_knows() -> None:
    whole, divided = ({part.name: part for part in costs(chunks).parts} for chunks in (1, 4))
    assert divided["embed"].flops == whole["embed"].flops == HEAD / BATCH  # of the forward pass
    assert (divided["embed"].stored_bytes, divided["norm"].stored_bytes) == (0, 0)
    assert whole["embed"].stored_bytes >= 4 * SEQ * VOCAB
    assert costs(4).step_flops == costs(1).step_flops + HEAD


def costs(chunks: int) -> Any:
    config = configured(chunks)
    return summarize_model(build(config), config)


def first_step(config: Config) -> dict[str, jax.Array]:
    """The metrics of the first step, on all devices of the mesh."""
    built = build(config)
    state = jax.jit(built.init, compiler_options=QUICK)()
    batch = {"tokens": TOKENS["tokens"].astype(abstract_batch(built, config)[0]["tokens"].dtype)}
    program = trace_step(built, config).lower().compile(compiler_options=QUICK)
    print(*sorted(set(re.findall(r"all-to-all|all-gather|collective-permute|all-reduce", program.as_text()))))
    return dict(built.train_step.with_lr(program)(state, built.put(batch))[1])


@functools.cache
def plain() -> dict[str, jax.Array]:
    return first_step(configured(1))


@pytest.mark.slow
def test_with_microbatches_bfloat16_and_remat_the_loss_is_right() -> None:
    together = {"train__precision": "bf16", "train__microbatches": 2, "remat": {"kind": "full"}}
    metrics = first_step(configured(4, **together))
    assert {str(value.dtype) for value in metrics.values()} == {"float32"}
    np.testing.assert_allclose(metrics["loss"], plain()["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["bits_per_byte"], metrics["loss"] / math.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], plain()["grad_norm"], rtol=2e-2)


@pytest.mark.slow
def test_two_devices_share_the_batch_of_every_chunk() -> None:
    """The same loss and gradient, and nothing is sent but the sums."""
    program = """
import json
from tests.models.test_chunks import configured, first_step
metrics = first_step(configured(4, mesh={"data": 2}))
print(json.dumps({name: float(value) for name, value in metrics.items()}))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **flags}, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    collectives, metrics = done.stdout.splitlines()
    assert collectives == "all-reduce"
    expected = {name: pytest.approx(float(value), rel=1e-5) for name, value in plain().items()}
    assert json.loads(metrics) == expected


def test_gradients_of_the_output_layer_are_summed_in_float32() -> None:
    """In bfloat16 the sum over many chunks would lose those that come late."""
    chunks = 512
    head = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
    graphdef, weights = nnx.split(head)
    x = jnp.asarray(np.random.default_rng(1).normal(1.0, 1.0, (2, chunks, 4)), jnp.float32)

    def gradient(precision: Any, num_chunks: int) -> Any:
        def loss(weights: Any) -> Any:
            head = nnx.merge(graphdef, cast_floats(weights, precision), copy=True)
            return (
                map_sequence_chunks(lambda head, x: head(x) ** 2, head, (cast_floats(x, precision),), num_chunks)
                .astype(float)
                .sum()
            )

        return jax.jit(jax.grad(loss))(weights)["kernel"][...]

    exact = gradient("fp32", chunks)
    error = jnp.linalg.norm(gradient("bf16", chunks) - exact) / jnp.linalg.norm(exact)
    assert error < 0.004  # one rounding; summed in bfloat16 it is 0.09


def test_chunks_that_do_not_divide_the_sequence_are_refused() -> None:
    message = r"^model=gpt: model.loss_chunks=7 must divide the sequences of 16 tokens; the nearest that does is 8"
    with pytest.raises(ConfigError, match=message):
        build(configured(7))


def test_it_may_change_in_a_continued_run() -> None:
    """Memory for speed: nothing in a state depends on it."""
    before, after = configured(1), configured(4)
    assert [change.kind for change in find_drift(before.document, after.document)] == ["free"]
    assert hash_identity(before.document) == hash_identity(after.document)
    assert classify_key("model.attention") == "free"
    assert build(before).abstract == build(after).abstract


def test_a_model_of_ones_own_may_do_it_its_own_way() -> None:
    class Own(nnx.Module):
        loss_chunks = 2

        def map_logits(self, function: Any, tokens: jax.Array, targets: jax.Array) -> Any:
            halves = [function(jnp.zeros((BATCH, SEQ // 2, 512)), part) for part in jnp.split(targets, 2, axis=1)]
            return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *halves)

    np.testing.assert_allclose(next_token(Own(), TOKENS)["bits_per_token"], 9.0, rtol=1e-6)


def test_an_option_that_is_left_alone_changes_nothing() -> None:
    """One chunk is no chunk: no scan over the loss, no recomputation."""
    config = configured(1)
    built = build(config)
    text = trace_step(built, config).jaxpr.jaxpr
    assert not [equation for equation in iterate_equations(text) if equation.primitive.name in ("remat", "checkpoint")]
    assert count_flops(text) == 3 * BATCH * costs(1).total.flops
