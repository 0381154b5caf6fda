"""Low-rank adapters: what a layer computes with one, where it is found by name, and what can have none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import BLOCK_LAYERS, Gpt, Vit
from models.adapters import LORA_A, LORA_B, AdapterError, AdapterPlan, add_adapters, merge_adapters
from models.name_patterns import match_pattern, suggest_names

KEY = jax.random.key(5)
TOKENS = jnp.arange(16).reshape(2, 8) % 7


class Tower(nnx.Module):
    """A model of somebody's: a list of blocks, flax's own attention (LinearGeneral), a convolution, an embedding."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3,), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.mix = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.table = nnx.Embed(5, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x) + self.table(jnp.zeros(x.shape[:2], int))
        for block in self.blocks:
            x = jax.nn.relu(block(x))
        return self.head(self.mix(x))


def tower() -> Tower:
    return Tower(nnx.Rngs(0))


def gpt() -> nnx.Module:
    return Gpt(num_layers=3, num_heads=2, width=16, hidden=32, activation="swiglu").build((8,), 7, nnx.Rngs(0))


def plan(*targets: str, rank: int = 2, scale: float = 1.5) -> AdapterPlan:
    return AdapterPlan(targets, rank, scale, BLOCK_LAYERS)


def params(model: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))  # type: ignore[no-any-return]


def with_values(model: nnx.Module) -> nnx.Module:
    """The model with its B no longer zero, as after training."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, LORA_B):
            module.lora_b[...] = jax.random.normal(KEY, module.lora_b.shape)
    return model


@pytest.mark.parametrize(("make", "x"), [(tower, jnp.ones((2, 6, 3))), (gpt, TOKENS)], ids=["own", "gpt"])
def test_it_begins_as_the_model_and_merges_into_it(make: Any, x: jax.Array) -> None:
    plain, adapted = make(), make()
    names = add_adapters(adapted, plan("*"), KEY)
    assert len(names) == (3 + 4 + 1 if make is tower else 5)
    assert np.array_equal(plain(x), adapted(x)), "B is zero"
    moved = with_values(adapted)(x)
    assert not np.allclose(plain(x), moved, atol=1e-3)
    merged = make()
    nnx.update(merged, merge_adapters(params(adapted), 1.5))
    assert np.allclose(merged(x), moved, atol=2e-6, rtol=2e-6)


def test_the_weights_of_the_model_are_where_and_what_they_were() -> None:
    plain, adapted = gpt(), gpt()
    add_adapters(adapted, plan("qkv"), KEY)
    theirs = params(adapted)
    assert {LORA_A, LORA_B} <= theirs["blocks"]["attention"]["qkv"].keys()
    a = theirs["blocks"]["attention"]["qkv"].pop(LORA_A)
    b = theirs["blocks"]["attention"]["qkv"].pop(LORA_B)
    assert a.shape == (3, 16, 2)
    assert b.shape == (3, 2, 48)
    assert 0.2 < np.abs(a).max() <= 1 / 16**0.5, "uniform within one by the root of its inputs"
    assert len(np.unique(a)) == a.size, "each layer of a stack has its own"
    assert jax.tree.all(jax.tree.map(np.array_equal, theirs, params(plain)))
    assert type(adapted.blocks.attention.qkv).__name__ == "Linear"


def test_an_adapter_does_not_depend_on_what_else_is_adapted() -> None:
    one, all_ = gpt(), gpt()
    add_adapters(one, plan("attn_out"), KEY)
    add_adapters(all_, plan("*"), KEY)
    assert np.array_equal(one.blocks.attention.out.lora_a[...], all_.blocks.attention.out.lora_a[...])


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (("qkv", "attn_out"), {"attention.qkv", "attention.out"}),
        (("ffn_*",), {"ffn.up", "ffn.gate", "ffn.down"}),
        (("ffn",), {"ffn.up", "ffn.gate", "ffn.down"}),
        (("attention.*",), {"attention.qkv", "attention.out"}),
        (("block.ffn.down",), {"ffn.down"}),
        (("u?",), {"ffn.up"}),
    ],
)
def test_layers_are_found_by_paths_by_scopes_and_by_the_names_of_their_values(
    targets: tuple[str, ...], found: set[str]
) -> None:
    assert set(add_adapters(gpt(), plan(*targets), KEY)) == {f"blocks.{name}" for name in found}


def test_a_list_of_layers_has_numbers() -> None:
    assert add_adapters(tower(), plan("blocks.1", "mix.query"), KEY) == ["blocks.1", "mix.query"]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("haed",), "no layer is called 'haed'; did you mean head?"),
        (("stem",), "'stem' is of type Conv; adapters are for linear layers"),
        (("table",), "'table' is of type Embed"),
        (("zzz",), "no layer is called 'zzz' (it has: blocks"),
    ],
)
def test_what_can_have_none_is_said(targets: tuple[str, ...], says: str) -> None:
    with pytest.raises(AdapterError) as refused:
        add_adapters(tower(), plan(*targets), KEY)
    assert says in str(refused.value)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(AdapterError, match="no linear layer"):
        add_adapters(nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))), plan("*"), KEY)


def test_it_computes_in_the_precision_of_what_comes_in() -> None:
    model = tower()
    add_adapters(model, plan("head"), KEY)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model, nnx.Param))
    nnx.update(model, half)
    assert model.head(jnp.ones((1, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_vit_has_the_same_names() -> None:
    model = Vit(num_layers=2, width=16, num_heads=2, hidden=32).build((8, 8, 1), 10, nnx.Rngs(0))
    assert len(add_adapters(model, plan("qkv", "attn_out", "ffn_*"), KEY)) == 4


@pytest.mark.parametrize(
    ("pattern", "name", "yes"),
    [
        ("head", "head.kernel", True),
        ("head", "lm_head.kernel", False),
        ("*head", "lm_head.kernel", True),
        ("bias", "blocks.norm.bias", True),
        ("attention.out", "blocks.attention.out.kernel", True),
        ("blocks.1", "blocks.11.kernel", False),
        ("blocks.1*", "blocks.11.kernel", True),
        ("*", "anything", True),
    ],
)
def test_a_pattern_is_a_whole_part_of_a_name(pattern: str, name: str, yes: bool) -> None:
    assert match_pattern(pattern, name) is yes


def test_a_suggestion_replaces_the_word_that_is_wrong() -> None:
    assert suggest_names("attention.quv", ["blocks.attention.qkv.kernel"]) == "; did you mean attention.qkv?"
