"""One update, as arithmetic: averages of the weights, microbatches, precision, and what a state keeps exactly."""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Gpt
from models.objectives import OBJECTIVES, make_objective
from runner.checkpoint import store
from runner.config.schema import validate_config
from runner.errors import ConfigError
from runner.mesh import Mesh
from runner.optim.optimizers import AdamW, Sgd
from runner.optim.schedules import Constant
from runner.train import step as steps
from runner.train.build import build, start_from_weights
from runner.train.split_model import SplitModel, merge_model, split_model, split_variables
from runner.train.step import UpdateOptions
from runner.types import State
from tests.checkpoint.test_store import abstract, assert_equal, saved
from tests.config.test_config import changed
from tests.conftest import QUICK, REPO

BATCH, FEATURES, CLASSES = 8, 6, 3
DECAY = 0.8
ONCE = UpdateOptions()
Parts = tuple[Callable[..., Any], State, SplitModel]


class Small(nnx.Module):
    """Everything a state can hold: parameters, running statistics, random streams, a variable of its own."""

    def __init__(self, dropout: float, rngs: nnx.Rngs):
        self.inner = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.75, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.zeros(8))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = self.inner(inputs)
        self.seen.set_value(x.mean(axis=0))  # in whatever the model computes in
        x = self.norm(x).astype(x.dtype)  # its statistics would raise it to float32
        return self.head(self.dropout(jax.nn.relu(x)))


class Plain(nnx.Module):
    """Nothing but parameters: its batches can be divided without a difference."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner, self.head = nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.head(jax.nn.relu(self.inner(inputs)))


def small(dropout: float = 0.3) -> nnx.Module:
    return Small(dropout, nnx.Rngs(0))


def plain() -> nnx.Module:
    return Plain(nnx.Rngs(0))


def gpt() -> nnx.Module:
    return Gpt(num_layers=2, num_heads=2, width=16, hidden=32).build((8,), 32, nnx.Rngs(0))


def batch(number: int, size: int = BATCH) -> dict[str, jax.Array]:
    rng = np.random.default_rng(number)
    inputs = rng.standard_normal((size, FEATURES)).astype(np.float32)
    return {"inputs": jnp.asarray(inputs), "label": jnp.asarray(np.abs(inputs).argmax(axis=1) % CLASSES)}


def tokens() -> dict[str, jax.Array]:
    return {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 32, (BATCH, 9)))}


def parts(make: Callable[[], nnx.Module] = small, update: UpdateOptions = ONCE) -> Parts:
    """The jitted step as the runner has it, a fresh state, and the network."""
    step, init, network = made(make, update, AdamW(lr=0.05), "classify")
    return step, init(), network


@functools.cache
def made(make: Callable[[], nnx.Module], update: UpdateOptions, optim: Any, objective: Any) -> Any:
    """Compiled once for all tests."""
    schedule = Constant().build(optim.lr, 100)
    tx, network = optim.build(schedule), split_model(make, lambda model: None)
    train_step = steps.make_train_step(network, make_objective(objective), lambda lr: (tx, schedule), update)
    step = jax.jit(lambda state, batch: train_step(state, batch, optim.lr), donate_argnums=0, compiler_options=QUICK)

    def init() -> State:
        return steps.init_state(split_variables(make()), tx, ema=update.ema is not None)

    return step, jax.jit(init, compiler_options=QUICK), network


def gradients(
    make: Callable[[], nnx.Module], update: UpdateOptions, data: Mapping[str, jax.Array], objective: Any
) -> Any:
    """The gradients of the first step, as the change that plain descent makes; and its metrics."""
    descent = Sgd(lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    step, init, _ = made(make, update, descent, objective)
    state = init()
    before = jax.tree.map(np.asarray, state["params"])
    after, metrics = step(state, data)
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, after["params"]), metrics


def close(mine: Any, theirs: Any) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7), mine, theirs)


def shapes(state: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)


# --- an average of the weights ---


def test_the_average_is_the_mean_of_all_updates_each_weighted_by_its_age() -> None:
    step, state, _ = parts(update=UpdateOptions(ema=DECAY))
    seen: list[Any] = []
    for number in range(6):
        state, _ = step(state, batch(number))
        seen.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state["params"]))
        ages = np.arange(number, -1, -1)
        expected = jax.tree.map(lambda *leaves, ages=ages: np.average(leaves, axis=0, weights=DECAY**ages), *seen)
        close(state["ema"], expected)


def test_a_slow_average_begins_as_the_first_update_and_not_as_fresh_weights() -> None:
    step, state, _ = parts(update=UpdateOptions(ema=0.99999))
    state, _ = step(state, batch(0))
    jax.tree.map(
        lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-8),
        state["ema"],
        state["params"],
    )


def test_keeping_an_average_changes_no_bit_of_training_and_costs_nothing_where_it_is_not_kept() -> None:
    (with_average, one, _), (without, other, _) = parts(update=UpdateOptions(ema=DECAY)), parts()
    assert other.keys() == {"step", "params", "extra", "rng", "opt"} == one.keys() - {"ema"}
    for number in range(3):
        (one, mine), (other, theirs) = with_average(one, batch(number)), without(other, batch(number))
        assert_equal({name: one[name] for name in other}, other)
        assert_equal(mine, theirs)


def test_an_evaluation_chooses_the_weights_and_has_the_live_statistics() -> None:
    step, state, network = parts(update=UpdateOptions(ema=DECAY))
    for number in range(4):
        state, _ = step(state, batch(number))
    evaluate, ones = (
        jax.jit(steps.make_eval_step(network, make_objective("classify")), compiler_options=QUICK),
        jnp.ones(BATCH),
    )
    model = merge_model(network.eval, network, {**state, "params": state["ema"]})
    by_hand = OBJECTIVES["classify"](model, batch(9))["loss"].sum()
    live, average = (
        evaluate(steps.with_weights(state, weights), batch(9), ones) for weights in get_args(steps.Weights)
    )
    assert float(average["loss"]) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(live["loss"]) != pytest.approx(float(by_hand), rel=1e-3)
    assert float(live["weight"]) == BATCH


def test_an_average_that_is_not_kept_is_refused() -> None:
    _, state, _ = parts()
    with pytest.raises(ConfigError, match=r"weights=ema: this run keeps no average .* optim.ema=0.999"):
        steps.with_weights(state, "ema")


# --- microbatches ---


@pytest.mark.parametrize(
    ("make", "data", "objective"),
    [(plain, batch(0), "classify"), pytest.param(gpt, tokens(), "next_token", marks=pytest.mark.slow)],
    ids=["plain", "gpt"],
)
def test_microbatches_give_the_same_gradients_and_metrics(make: Any, data: Any, objective: Any) -> None:
    whole, metrics = gradients(make, UpdateOptions(), data, objective)
    for count in (2, 4) if make is plain else (4,):  # a transformer takes seconds to compile
        mine, same = gradients(make, UpdateOptions(microbatches=count), data, objective)
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
        for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * scale)
        assert {name: float(value) for name, value in same.items()} == pytest.approx(
            {name: float(value) for name, value in metrics.items()}, rel=1e-5
        )


def test_one_microbatch_is_the_plain_program() -> None:
    def function(*words: Any) -> Any:
        return words

    assert steps.accumulate_gradients(function, 1) is function
    step, state, _ = parts(plain)
    divided, _, _ = parts(plain, UpdateOptions(microbatches=2))
    assert " scan[" not in str(step.trace(state, batch(0)).jaxpr)
    assert " scan[" in str(divided.trace(state, batch(0)).jaxpr)


def test_statistics_and_random_streams_go_through_every_microbatch() -> None:
    step, state, _ = parts(update=UpdateOptions(microbatches=2))
    whole, same, network = parts()
    counts = {name: int(value) for name, value in leaves(same["rng"]).items() if name.endswith("count")}
    halves = [{name: values[first::2] for name, values in batch(0).items()} for first in (0, 1)]
    model = merge_model(network.train, network, same)
    for half in halves:
        model(half["inputs"])
    expected = np.asarray(model.norm.mean[...]), np.asarray(model.norm.var[...])
    (state, _), (same, _) = step(state, batch(0)), whole(same, batch(0))
    np.testing.assert_allclose(state["extra"]["norm"]["mean"], expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state["extra"]["norm"]["var"], expected[1], rtol=1e-5)
    for drawn, after in ((2, state), (1, same)):
        now = leaves(after["rng"])
        assert any(int(now[name]) == begin + drawn for name, begin in counts.items())


@pytest.mark.slow
def test_microbatches_leave_every_example_on_its_device() -> None:
    """Two devices: the same numbers as one, and no example is sent to the other one."""
    program = """
import re, jax, jax.numpy as jnp, numpy as np
from tests.train.test_step import *
from runner.mesh import Mesh, batch_sharding, replicated_sharding
assert len(jax.devices()) == 2
mesh = Mesh(data=2).build(BATCH, 2)
step, state, _ = parts(plain, UpdateOptions(microbatches=2))
one, _ = step(jax.tree.map(jnp.copy, state), batch(0))
state = jax.device_put(state, replicated_sharding(mesh))
data = jax.device_put(batch(0), batch_sharding(mesh))
text = step.lower(state, data).compile().as_text()
print(sorted(set(re.findall(r"all-reduce|all-to-all|all-gather|collective-permute", text))))
two, _ = step(state, data)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one["params"], two["params"])
parts_of = steps.split_microbatches({"label": jnp.arange(8)}, 2)["label"]
print(parts_of.tolist())
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **flags}, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['all-reduce']", "[[0, 2, 4, 6], [1, 3, 5, 7]]"]


def test_microbatches_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train.microbatches=3 must divide data.batch_size=64; change one of them$"):
        validate_config(changed(data__batch_size=64, train__microbatches=3))
    with pytest.raises(ConfigError, match="mesh.data=1 devices times train.microbatches=3"):
        Mesh(data=1).build(8, 3)


# --- precision ---


def test_bfloat16_computes_and_everything_that_lasts_stays_float32() -> None:
    update = UpdateOptions("bf16", microbatches=2, ema=DECAY)
    step, state, network = parts(update=update)
    before = shapes(state)
    products = re.findall(r":(\w+)\[[\d,]+\] = dot_general", str(step.trace(state, batch(0)).jaxpr))
    assert products == ["bf16"] * 5  # two forward, three back
    state, metrics = step(state, batch(0))
    assert shapes(state) == before
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state["params"], state["ema"], state["extra"]))} == {"float32"}
    assert {name: str(value.dtype) for name, value in metrics.items()} == dict.fromkeys(metrics, "float32")
    moments = [
        leaf
        for leaf in jax.tree.leaves(state["params"])
        if not np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))
    ]
    assert len(moments) == len(jax.tree.leaves(state["params"]))  # not rounded to bfloat16 on the way
    lossy, exact = (
        jax.jit(steps.make_eval_step(network, make_objective("classify"), precision)) for precision in ("bf16", "fp32")
    )
    one, other = (float(evaluate(state, batch(1), jnp.ones(BATCH))["loss"]) for evaluate in (lossy, exact))
    assert one != other
    assert one == pytest.approx(other, rel=0.05)


def test_a_transformer_computes_in_bfloat16_from_its_embedding_on() -> None:
    """All but the weights of attention, [batch heads …], which are summed in float32 and softened so."""
    step, init, _ = made(gpt, UpdateOptions("bf16"), AdamW(lr=0.05), "next_token")
    text = str(step.trace(jax.eval_shape(init), tokens()).jaxpr)
    products = re.findall(r":(\w+)\[([\d,]+)\] = dot_general", text)
    assert len(products) > 15
    assert {len(shape.split(",")) >= 4 for kind, shape in products if kind != "bf16"} == {True}


def test_bfloat16_learns_what_float32_learns() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        step, state, _ = parts(plain, UpdateOptions(precision))  # type: ignore[arg-type]
        for number in range(200):
            state, metrics = step(state, batch(number % 10, 32))
        losses[precision] = float(metrics["loss"])
    assert losses["fp32"] < 0.5 * math.log(CLASSES)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


# --- the state ---


@pytest.mark.parametrize(
    "update", [UpdateOptions(ema=DECAY), UpdateOptions("bf16", microbatches=2, ema=0.999)], ids=["fp32", "bf16-2"]
)
def test_statistics_averages_and_random_streams_survive_a_checkpoint_bit_for_bit(
    update: UpdateOptions, tmp_path: Path
) -> None:
    step, state, _ = parts(update=update)
    template = abstract(state)
    for number in range(3):
        state, _ = step(state, batch(number))
    store.write_checkpoint(tmp_path / "3", state, {})
    restored = store.read_state(tmp_path / "3", template)
    for number in range(3, 6):
        (state, mine), (restored, theirs) = step(state, batch(number)), step(restored, batch(number))
        assert_equal(mine, theirs)
    assert_equal(restored, state)
    assert int(state["step"]) == 6
    assert leaves(state["extra"])
    assert leaves(state["rng"])


def test_a_step_takes_over_the_memory_of_its_state() -> None:
    step, state, _ = parts(update=UpdateOptions(microbatches=2, ema=DECAY))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # jax warns of what it could not use again
        after, _ = step(state, batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after["step"]) == 1


def test_what_is_not_finite_is_found_where_it_matters() -> None:
    _, state, _ = parts(update=UpdateOptions(ema=DECAY))
    assert bool(steps.is_finite(state))
    for place, value, fine in (
        *(("params", bad, False) for bad in (jnp.nan, jnp.inf)),
        *(("ema", bad, False) for bad in (jnp.nan, -jnp.inf)),
        *(("extra", bad, good) for bad, good in ((jnp.nan, False), (jnp.inf, True))),
    ):
        poisoned = {**state, place: jax.tree.map(lambda leaf, value=value: leaf.at[0].set(value), state[place])}
        assert bool(steps.is_finite(poisoned)) == fine, (place, value)


def test_a_built_run_has_all_of_it() -> None:
    """From the document to the program: each key arrives."""
    keys = {"train__microbatches": 2, "train__precision": "bf16", "optim__ema": 0.9}
    size = {"model": {"kind": "mlp", "width": 8}, "data": {"kind": "synthetic", "gives": "features", "batch_size": 4}}
    built = build(validate_config(changed(**size, **keys)))
    state = built.init()
    text = str(jax.make_jaxpr(built.train_step)(state, next(built.stream)))
    assert " scan[" in text
    assert "bf16" in text
    batch = next(built.stream)
    assert "bf16" in str(jax.make_jaxpr(built.eval_step)(state, batch, jnp.ones(4)))
    after, _ = built.train_step(state, batch)
    close(after["ema"], after["params"])


def test_another_seed_begins_with_the_same_program() -> None:
    def program(seed: int) -> str:
        size = {"model": {"kind": "mlp", "width": 8}, "data": {"kind": "synthetic", "gives": "features"}}
        built = build(validate_config(changed(**size, seed=seed)))
        (call,) = [each for each in jax.make_jaxpr(built.init)().eqns if each.params.get("name") == "fresh"]
        return str(call.params["jaxpr"])

    assert program(0) == program(1)


def test_weights_of_another_run_are_where_the_average_begins(tmp_path: Path) -> None:
    keys = {"model": {"kind": "mlp", "width": 8}, "data": {"kind": "synthetic", "gives": "features", "batch_size": 4}}
    built = build(validate_config(changed(**keys, optim__ema=0.9)))
    source = built.init()
    source = {**source, "params": jax.tree.map(lambda leaf: leaf + 1.0, source["params"])}
    state, _ = start_from_weights(built, saved(tmp_path / "3", source), partial=False)
    assert_equal(state["params"], source["params"])
    assert_equal(state["ema"], source["params"])


def leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
