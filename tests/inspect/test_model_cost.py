"""What a model costs: counted from the trace, and by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from runner.config.schema import validate_config
from runner.inspect.model_cost import ModelCost, summarize_model
from runner.trace.flops import FromData, FromWeights, attribute_flops, count_flops
from runner.train.build import build
from tests.config.test_config import changed
from tests.conftest import REPO

LAYERS, WIDTH, HIDDEN, SEQ, VOCAB, BATCH = 3, 16, 24, 8, 256, 4
SIZES = {"num_layers": LAYERS, "num_heads": 2, "width": WIDTH, "hidden": HIDDEN}


def costs_of(**changes: Any) -> ModelCost:
    document = changed(
        model={"kind": "gpt", **SIZES},
        data={"kind": "synthetic", "gives": "tokens", "seq_len": SEQ, "batch_size": BATCH, "size": 16},
        **changes,
    )
    config = validate_config(document)
    return summarize_model(build(config), config)


def test_parts_cost_what_is_counted_by_hand() -> None:
    plain = costs_of()
    parts = {part.name: part for part in plain.parts}
    assert parts["blocks"].parameters == LAYERS * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN + 2 * WIDTH)
    assert parts["embed"].parameters == VOCAB * WIDTH
    products = 4 * WIDTH**2 + 2 * SEQ * WIDTH + 2 * WIDTH * HIDDEN
    assert parts["blocks"].flops == LAYERS * 2 * SEQ * products
    assert parts["embed"].flops == 2 * SEQ * WIDTH * VOCAB  # tied: it also gives the logits
    assert parts[""].stored_bytes == SEQ * 4  # the tokens themselves
    assert plain.step_flops == 3 * BATCH * plain.total.flops  # the backward pass is twice the forward pass


def test_a_table_knows_remat_precision_and_microbatches() -> None:
    plain, full = costs_of(), costs_of(remat={"kind": "full"})
    before, after = ({part.name: part for part in each.parts}["blocks"] for each in (plain, full))
    one_value = 4 * LAYERS * SEQ * WIDTH
    assert one_value <= after.stored_bytes < 2 * one_value < before.stored_bytes
    assert after.flops == before.flops
    assert full.step_flops > plain.step_flops

    half = costs_of(train__precision="bf16", train__microbatches=2)
    assert half.step_flops == plain.step_flops
    assert half.total.stored_bytes < 0.8 * plain.total.stored_bytes


def test_the_verb_says_it_and_writes_nothing(tmp_path: Path) -> None:
    words = ("data=synthetic", *(f"model.{key}={value}" for key, value in SIZES.items()))
    command = [sys.executable, "-m", "runner", "model", *words]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["part", "parameters", "FLOPs", "stored"] in rows
    assert ["embed", f"{VOCAB * WIDTH:,}"] in [row[:2] for row in rows]
    assert "3.00 × the forward pass" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_are_counted(stride: int) -> None:
    """Each of the two gradients costs what the convolution costs; zeros between pixels are not multiplied."""

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = jnp.ones((5, 8, 8, 3)), jnp.ones((stride, stride, 3, 7))
    side = 8 // stride
    forward = 2 * 5 * side * side * 7 * stride * stride * 3
    assert count_flops(jax.make_jaxpr(convolved)(x, kernel).jaxpr) == forward
    both = jax.make_jaxpr(jax.grad(lambda *arguments: convolved(*arguments).sum(), (0, 1)))(x, kernel)
    assert count_flops(both.jaxpr) in (2 * forward, 3 * forward)  # whether or not the value itself is thrown away


def test_what_follows_belongs_to_the_part_whose_weights_were_met_last() -> None:
    def network(first: jax.Array, second: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        h = jnp.tanh(x @ (2 * first))
        return h, h @ h.T, (h @ h.T) @ second.T, 2 * second

    jaxpr = jax.make_jaxpr(network)(jnp.ones((3, 5)), jnp.ones((7, 4)), jnp.ones((4, 3))).jaxpr
    found = attribute_flops(jaxpr, [FromWeights("first"), FromWeights("second"), FromData("")])
    assert +found.flops == {"first": 2 * (4 * 3 * 5 + 2 * 4 * 5 * 4), "second": 2 * 4 * 4 * 7}
    assert found.made_by == ["first", "first", "second", None]
