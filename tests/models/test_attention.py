"""`model.attention=cudnn`: what can be seen without a GPU, which is the trace. Nothing here was computed by cuDNN."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import Gpt, Model, Vit
from models.gpt import GPT
from models.objectives import OBJECTIVES
from models.scopes import FLASH_FORWARD, use_plan
from models.vit import ViT
from runner.config.remat_policies import (
    AttentionCore,
    AttentionOnly,
    Dots,
    DotsNoBatch,
    FfnOnly,
    Full,
    Names,
    NoRemat,
    RematPolicy,
)
from runner.config.schema import validate_config
from runner.errors import ConfigError
from runner.inspect.load_model import on_one_device
from runner.trace.flops import count_flops
from runner.trace.remat_trace import count_stored_bytes, find_scopes_and_tags, iterate_equations
from runner.train.build import build
from tests.config.test_config import changed

LAYERS, HEADS, WIDTH, SEQ, BATCH = 3, 2, 32, 24, 2
SIZES: Any = {"num_layers": LAYERS, "num_heads": HEADS, "width": WIDTH, "hidden": 64}
GPT_OPTION, VIT_OPTION = Gpt(**SIZES, attention="cudnn"), Vit(**SIZES, attention="cudnn")


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax asks for the version of cuDNN when it traces; all else that it checks are shapes and types."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)


def loss_of(option: Model) -> Any:
    """A loss, and the shapes of what it takes: parameters in bfloat16, the rest. The model is not asked for its GPU."""
    batch: dict[str, Any] = {"tokens": jnp.zeros((BATCH, SEQ + 1), jnp.int32)}
    if isinstance(option, Vit):
        batch = {"inputs": jnp.zeros((BATCH, 8, 8, 1), jnp.bfloat16), "label": jnp.zeros(BATCH, jnp.int32)}

    def make() -> nnx.Module:
        if isinstance(option, Vit):
            return ViT(option, image=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0))
        return GPT(option, vocab=256, rngs=nnx.Rngs(0))

    graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)

    def loss(params: Any, rest: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        return OBJECTIVES[option.objective](model, batch)["loss"].mean()

    return loss, params, rest


def traced(option: Model, remat: RematPolicy) -> Any:
    """The jaxpr of the gradient."""
    loss, *shapes = loss_of(option)
    with use_plan(remat.plan):
        return jax.make_jaxpr(jax.grad(loss))(*shapes).jaxpr


def kept(option: Model, remat: RematPolicy) -> Counter[str]:
    """The bytes that are stored for it, by tag."""
    loss, *shapes = loss_of(option)

    def forward(params: Any, rest: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, rest), params)[1])

    with use_plan(remat.plan):
        jaxpr = jax.make_jaxpr(forward)(*shapes).jaxpr
    return count_stored_bytes(jaxpr, len(jaxpr.outvars))


def operations(jaxpr: Any) -> list[str]:
    return [equation.primitive.name for equation in iterate_equations(jaxpr)]


POLICIES = [
    (NoRemat(), 1),
    (FfnOnly(), 1),
    (DotsNoBatch(), 1),
    (Dots(), 1),
    (Names(save=("attn_ctx",)), 1),
    (Names(save=("attn_ctx", "ffn_pre")), 1),
    (Names(save=("qkv", "ffn_pre")), 2),
    (AttentionCore(), 2),
    (AttentionOnly(), 2),
    (Full(), 2),
]


@pytest.mark.parametrize("option", [GPT_OPTION, VIT_OPTION], ids=["gpt", "vit"])
@pytest.mark.parametrize(("remat", "forward"), POLICIES, ids=[remat.kind for remat, _ in POLICIES])
def test_flash_attention_runs_again_only_where_it_says_so(option: Model, remat: RematPolicy, forward: int) -> None:
    """All layers are one scan: once in its text is once a layer."""
    found = operations(traced(option, remat))
    assert found.count(FLASH_FORWARD) == forward
    assert found.count("dot_product_attention_bwd_wrapper") == 1


def test_what_attention_mixed_is_stored_once() -> None:
    """By the operation itself, with the statistics of its softmax; with a tag as well it would be there twice."""
    option = Names(save=("attn_ctx",))
    jaxpr = traced(GPT_OPTION, option)
    assert kept(GPT_OPTION, option) - kept(GPT_OPTION, Full()) == {
        "attn_ctx": LAYERS * (2 * BATCH * SEQ * WIDTH + 4 * BATCH * HEADS * SEQ)
    }
    assert "attn_ctx" in find_scopes_and_tags(jaxpr).tags  # the operation stands for it
    tags = {equation.params["name"] for equation in iterate_equations(jaxpr) if equation.primitive.name == "name"}
    assert tags == {"qkv", "attn_out", "ffn_pre"}


def test_no_scores_are_ever_there() -> None:
    """Neither stored nor computed outside of the operation, and no product is left of them but cuDNN's."""
    flash, by_xla = (replace(GPT_OPTION, num_heads=4, attention=by) for by in ("cudnn", "xla"))
    assert (squares(flash), bool(squares(by_xla))) == ([], True)
    assert kept(flash, NoRemat()).total() < kept(by_xla, NoRemat()).total()


def squares(option: Gpt) -> list[Any]:
    """The arrays over pairs of positions."""
    made = [out.aval.shape for equation in iterate_equations(traced(option, NoRemat())) for out in equation.outvars]
    return [shape for shape in made if shape[-2:] == (SEQ, SEQ)]


def document(**changes: Any) -> dict[str, Any]:
    data = {"kind": "synthetic", "gives": "tokens", "seq_len": SEQ, "batch_size": BATCH, "size": 8}
    return changed(model={"kind": "gpt", "attention": "cudnn"}, data=data, **changes)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^model.attention=cudnn computes in bfloat16; add train.precision=bf16, or"):
        validate_config(document())
    with pytest.raises(ConfigError, match=r"^model.attention=cudnn takes heads of up to 256 .* is 4; change one"):
        validate_config(document(train__precision="bf16", model__num_heads=32))
    config = validate_config(document(train__precision="bf16"))
    if jax.default_backend() == "cpu":
        with pytest.raises(
            ConfigError, match=r"^model=gpt: attention=cudnn needs an NVIDIA GPU, and this is a cpu; choose"
        ):
            build(config)


def test_a_run_that_had_it_can_be_loaded_anywhere() -> None:
    """As every run can be continued without it."""
    config = on_one_device(validate_config(document(train__precision="bf16", mesh={"data": 64})))
    assert (config.mesh.data, config.model) == (1, Gpt())
    assert build(config).mesh.size == 1


def test_sampling_with_a_cache_stays_with_xla() -> None:
    """It takes a token at a time, and the weights in float32."""
    model = nnx.eval_shape(lambda: GPT(GPT_OPTION, vocab=256, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, state)).empty_cache(1, 8))

    def extended(state: Any, tokens: Any, cache: Any) -> Any:
        return nnx.merge(graphdef, state, copy=True).extend(tokens, cache, 0)

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    assert FLASH_FORWARD not in operations(jax.make_jaxpr(extended)(state, tokens, cache).jaxpr)


@pytest.mark.parametrize("option", [GPT_OPTION, VIT_OPTION], ids=["gpt", "vit"])
def test_its_products_are_counted_so_that_it_is_worth_storing(option: Model) -> None:
    """As many as in plain attention, and one more backward, where the scores are computed again."""
    mine = traced(option, NoRemat())
    plain = traced(replace(option, attention="xla"), NoRemat())  # type: ignore[call-arg]
    shape = next(each.invars[0].aval.shape for each in iterate_equations(mine) if each.primitive.name == FLASH_FORWARD)
    product = 2 * BATCH * shape[1] ** 2 * WIDTH * LAYERS
    assert count_flops(mine) - count_flops(plain) == product
    full, context = traced(option, Full()), traced(option, Names(save=("qkv", "attn_ctx")))
    assert count_flops(full) - count_flops(context) == 2 * product + 2 * BATCH * shape[1] * WIDTH * 3 * WIDTH * LAYERS
