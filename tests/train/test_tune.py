"""`tune=`: what does not train has no gradient, no optimizer state and no update; what trains is as it would be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.errors import ConfigError
from runner.inspect.model_cost import summarize_model
from runner.train.build import build, start_from_weights
from runner.train.built import Built, describe_run
from runner.train.frozen_layers import iter_paths
from runner.types import State
from tests.checkpoint.test_store import saved
from tests.conftest import QUICK, composed

LITTLE = (
    *("data=stdlib", "data.seq_len=16", "data.batch_size=8", "model.num_layers=4", "model.num_heads=2"),
    *("model.width=32", "model.hidden=64", "schedule=constant", "optim.ema=0.9"),
)
LORA = ("tune=lora", "tune.rank=2", "tune.targets=[qkv,attn_out,ffn_*]")
FREEZE = ("tune=freeze", "tune.train=[norm,blocks.3.*]")
HOW: dict[str, tuple[str, ...]] = {
    "lora": LORA,
    "lora, bf16": (*LORA, "model.dropout=0.3", "train.precision=bf16", "remat=full"),
    "lora, microbatches": (*LORA, "remat=every_n", "train.microbatches=2"),
    "lora in parts": (*LORA, "+train.parts=2"),
    "freeze": (*FREEZE, "remat=full", "train.precision=bf16"),
    "freeze in parts": (*FREEZE, "+train.parts=2"),
}


def made(*words: str) -> Built:
    return build(composed(*LITTLE, *words))


def copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)  # type: ignore[no-any-return]


def trained(built: Built, steps: int = 2) -> tuple[State, State]:
    """A fresh state, and what so many steps make of it."""
    first = built.init()
    batches = [next(built.stream) for _ in range(steps)]
    put = built.put(batches[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), put)
    program = built.train_step.compile(built.train_step.trace(built.abstract, shapes), built.abstract, shapes)
    state = copied(first)
    for batch in batches:
        state, _ = built.train_step.with_lr(program)(state, built.put(batch))
    return first, state


def same(left: Any, right: Any) -> bool:
    return bool(jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right)))


@pytest.mark.parametrize("how", HOW)
def test_only_what_trains_changes_and_has_optimizer_state(how: str) -> None:
    built = made(*HOW[how])
    before, after = trained(built)
    assert after.keys() == before.keys() == built.abstract.keys()
    assert same(before["frozen"], after["frozen"])
    assert not any(
        same(old, new) for old, new in zip(*map(jax.tree.leaves, (before["params"], after["params"])), strict=True)
    )
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(after["params"]))
    assert num_trained == sum(leaf.size for leaf in jax.tree.leaves(after["ema"]))
    # AdamW: two moments, and counts.
    moments = sum(leaf.size for leaf in jax.tree.leaves(after["opt"]) if leaf.ndim)
    assert moments == 2 * num_trained
    for old, new in zip(*map(jax.tree.leaves, (built.abstract, after)), strict=True):
        assert (old.shape, old.dtype, old.sharding) == (new.shape, new.dtype, new.sharding)


def test_a_model_begins_with_the_weights_it_has_without_tune() -> None:
    plain, lora, freeze = made().init(), made(*LORA).init(), made(*FREEZE).init()
    theirs = dict(iter_paths(lora["frozen"]))
    assert all(np.array_equal(leaf, theirs[path]) for path, leaf in iter_paths(plain["params"]))
    kernel = plain["params"]["blocks"]["ffn"]["up"]["kernel"]
    assert np.array_equal(freeze["params"]["blocks"]["ffn"]["up"]["kernel"], kernel[3:])
    assert np.array_equal(freeze["frozen"]["blocks"]["ffn"]["up"]["kernel"], kernel[:3])


def test_layers_of_a_stack_have_the_gradient_that_they_have_in_the_whole_model() -> None:
    whole, part = made(), made("tune=freeze", "tune.train=[blocks.1.*,blocks.3.attention,embed]")
    batch = whole.put(next(whole.stream))
    grads = []
    for built in (whole, part):
        state = built.init()
        found, _ = jax.jit(jax.grad(built.loss, has_aux=True), compiler_options=QUICK)(state["params"], state, batch)
        grads.append(dict(iter_paths(found)))
    for path, leaf in grads[1].items():
        rows = np.s_[:] if path.startswith("embed") else [1, 3] if ".attention." in path else [1]
        assert np.allclose(leaf, np.asarray(grads[0][path])[rows], atol=1e-6), path
    assert "norm.scale" not in grads[1]


def test_no_gradient_of_the_base_is_computed() -> None:
    """A forward pass is 1, the gradient of what flows back 1, and that of the weights, which full training adds, 1."""

    def step_per_forward(*words: str) -> float:
        config = composed(*LITTLE, "model.width=64", "model.hidden=256", *words)
        cost = summarize_model(build(config), config)
        return cost.step_flops / (cost.total.flops * cost.batch_size)

    full, lora = step_per_forward(), step_per_forward("tune=lora", "tune.rank=1")
    assert full > 2.85
    assert lora < 2.2
    assert step_per_forward("tune=freeze", "tune.train=[norm]") < 2.1


def test_how_much_trains_is_said() -> None:
    config = composed(*LITTLE, *LORA)
    built = build(config)
    # Rank 2: (32 + 96) + (32 + 32) + (32 + 64) + (64 + 32), in 4 layers.
    assert " M parameters, 3,072 of them train (" in describe_run(built, config)
    cost = summarize_model(built, config)
    assert (cost.total.parameters, cost.total.frozen) == (
        3072,
        sum(leaf.size for leaf in jax.tree.leaves(built.abstract["frozen"])),
    )
    assert "of them train" not in describe_run(made(), composed(*LITTLE))


def test_it_begins_with_the_weights_of_a_run_and_fresh_adapters(tmp_path: Any) -> None:
    base = made("seed=7")
    state = base.init()
    checkpoint = saved(tmp_path / "5", state)
    for tune in (LORA, FREEZE):
        built = made(*tune)
        begun, report = start_from_weights(built, checkpoint, partial=False)
        assert report.exact
        assert begun.keys() == built.abstract.keys()
        assert np.array_equal(built.model(begun)(jnp.ones((1, 16), int)), base.model(state)(jnp.ones((1, 16), int)))
        assert same(begun["ema"], begun["params"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tune=lora", "tune.targets=[qkw]"), "tune.targets: no layer is called 'qkw'; did you mean qkv?"),
        (("tune=lora", "tune.train=[haed]", "model.tied=false"), "called 'haed'; did you mean head?"),
        (("tune=freeze", "tune.train=[blocks.4.*]"), "; blocks has 4 layers, from blocks.0 on"),
        (("tune=freeze", "tune.train=['*']"), "tune.train names every parameter; leave tune out"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        made(*words)
    assert says in str(refused.value)


def test_nothing_to_train_is_refused_before_jax_starts() -> None:
    with pytest.raises(ConfigError, match="nothing is named, and nothing would train"):
        composed("tune=freeze")
