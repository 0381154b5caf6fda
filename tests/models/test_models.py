"""Models, and that they keep to the remat seam: test_remat.py has what that does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Cnn, Gpt, Mlp, Model, Resnet, Vae, Vit
from models.objectives import OBJECTIVES
from models.remat_plan import RematPlan
from models.scopes import scope, use_plan
from runner.config.remat_policies import Full
from runner.trace.flops import count_flops as flops
from runner.trace.remat_trace import find_scopes_and_tags
from runner.train import step as steps
from tests.fresh import fresh

GPT = Gpt(num_layers=3, num_heads=2, width=32, hidden=96, dropout=0.1)
BATCH, SEQ = 2, 16


def loss_and_grads(option: Model, batch: dict[str, Any]) -> Any:
    """A function of parameters to ((loss, variables after), gradients), and parameters."""
    model = option.build(batch["inputs"].shape[1:] if "inputs" in batch else (SEQ,), 256, nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        mean = OBJECTIVES[option.objective](model, batch)["loss"].mean()
        return mean, nnx.to_pure_dict(nnx.state(model, nnx.RngCount))

    return jax.value_and_grad(loss, has_aux=True), params


TOKENS = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, SEQ + 1)), jnp.uint8)}


def flops_under(plan: RematPlan) -> int:
    function, params = loss_and_grads(GPT, TOKENS)
    with use_plan(plan):
        return flops(jax.make_jaxpr(function)(params).jaxpr)


def test_only_the_outermost_scope_is_recomputed() -> None:
    assert flops_under(Full().plan) == flops_under(RematPlan(frozenset({"block", "attention", "ffn"})))


def test_without_a_plan_the_seam_is_the_identity() -> None:
    function, params = loss_and_grads(GPT, TOKENS)
    assert "remat" not in str(jax.make_jaxpr(function)(params))
    assert "checkpoint" not in str(jax.make_jaxpr(function)(params))


def test_an_inner_jit_is_not_reused_under_another_plan() -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)

        @scope("block")
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(self.linear(jnp.sin(self.linear(x))))

    graphdef, state = nnx.split(Layer(nnx.Rngs(0)))
    inner = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x).sum())
    gradient = jax.grad(lambda state, x: inner(state, x))
    counts = []
    for scopes in (frozenset[str](), frozenset({"block"}), frozenset[str]()):
        with use_plan(RematPlan(scopes)):
            counts.append(flops(jax.make_jaxpr(gradient)(state, jnp.ones((2, 8))).jaxpr))
    assert counts[0] == counts[2] < counts[1]


SMALL = (
    *(GPT, Mlp(width=16, dropout=0.1), Cnn(widths=(4, 8), hidden=8), Resnet(stages=(1, 1), width=4)),
    *(Vit(num_layers=2, num_heads=2, width=8, hidden=16), Vae(widths=(4,), latent=2, likelihood="gaussian")),
)
IMAGES = {
    "inputs": jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32),
    "label": jnp.arange(4, dtype=jnp.int32),
}


def batch_for(option: Model) -> dict[str, Any]:
    return TOKENS if "tokens" in option.takes else IMAGES


@pytest.mark.parametrize(
    "option",
    [pytest.param(each, marks=pytest.mark.slow if each.kind in ("vit", "resnet") else ()) for each in SMALL],
    ids=[each.kind for each in SMALL],
)
def test_every_declared_scope_is_entered(option: Model) -> None:
    for name in option.scopes:
        with use_plan(RematPlan(frozenset({name}))):
            function, params = loss_and_grads(option, batch_for(option))
            assert find_scopes_and_tags(jax.make_jaxpr(function)(params).jaxpr).scopes.keys() == {name}


def losses(option: Model, model: Any, precision: Any) -> Any:
    """The losses of a model cast to a precision."""
    graphdef, params, rest = model
    model = nnx.merge(graphdef, steps.cast_floats(params, precision), rest, copy=True)
    return OBJECTIVES[option.objective](model, steps.cast_floats(batch_for(option), precision))["loss"]


def shape_for(option: Model) -> tuple[int, ...]:
    return (SEQ,) if option.kind == "gpt" else (8, 8, 1)


@pytest.mark.parametrize("option", SMALL, ids=lambda option: option.kind)
def test_in_bfloat16_every_product_is_one_of_bfloat16(option: Model) -> None:
    """A module that holds on to float32 makes everything behind it float32, and nobody would see it."""
    model = nnx.split(nnx.eval_shape(lambda: option.build(shape_for(option), 256, nnx.Rngs(0))), nnx.Param, ...)
    arrays = model[1:]
    traced = jax.make_jaxpr(lambda *arrays: losses(option, (model[0], *arrays), "bf16"))(*arrays)
    assert operands(traced.jaxpr) == {"bfloat16"}
    assert traced.out_avals[0].dtype == jnp.float32  # the softmax and the loss are not


@pytest.mark.slow
@pytest.mark.parametrize("option", SMALL, ids=lambda option: option.kind)
def test_in_bfloat16_the_loss_is_nearly_the_same(option: Model) -> None:
    model = fresh(option, shape_for(option), 256, 0.05)
    half, whole = (
        jax.jit(lambda precision=precision: losses(option, model, precision))() for precision in ("bf16", "fp32")
    )
    np.testing.assert_allclose(half.mean(), whole.mean(), rtol=0.02)


def operands(jaxpr: Any) -> set[str]:
    """The types of what is multiplied in matrix products and convolutions."""
    found = set[str]()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found |= {str(each.aval.dtype) for each in equation.invars}
        for value in equation.params.values():
            for inner in (getattr(each, "jaxpr", each) for each in (value if isinstance(value, tuple) else (value,))):
                found |= operands(inner) if hasattr(inner, "eqns") else set()
    return found


def test_positions_matter() -> None:
    """Rotary embedding: attention without it could not tell the order of earlier tokens."""
    model = GPT.build((SEQ,), 256, nnx.Rngs(0))
    model.eval()
    one, two = model(jnp.array([[1, 2, 3]])), model(jnp.array([[2, 1, 3]]))
    assert np.abs(np.asarray(one[:, -1] - two[:, -1])).max() > 1e-6


def test_layers_differ_and_drop_differently() -> None:
    model = GPT.build((SEQ,), 256, nnx.Rngs(0))
    kernels = np.asarray(model.blocks.attention.qkv.kernel[...])
    assert kernels.shape[0] == GPT.num_layers
    assert not np.array_equal(kernels[0], kernels[1])
    keys = np.asarray(jax.random.key_data(model.blocks.dropout.rngs.key[...]))
    assert len({key.tobytes() for key in keys}) == GPT.num_layers
