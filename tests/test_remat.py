"""Rematerialization changes what is stored and what is done twice, and nothing else. FLOPs and bytes are by hand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.declared import prepare
from models.scopes import Kept, active, scanned, scope
from runner import step as steps
from runner.flops import bodies, count
from runner.remat.policy import (
    AttentionCore,
    AttentionOnly,
    Dots,
    DotsNoBatch,
    EveryN,
    EverythingSaveable,
    FfnOnly,
    Full,
    Names,
    NoRemat,
    NothingSaveable,
)
from runner.remat.seen import seen, stored
from tests.conftest import QUICK
from tests.stacks import BATCH, HIDDEN, NUM_LAYERS, SEQ, WIDTH, example, filled, made

TAGS = ("qkv", "attn_ctx", "attn_out", "ffn_pre")
OF_BLOCKS = (Full(), NothingSaveable(), EverythingSaveable(), Dots(), DotsNoBatch(), EveryN(n=2), EveryN(n=3))
OF_SCOPES = (AttentionOnly(), AttentionCore(), FfnOnly())
OF_NAMES = (Names(save=("ffn_pre",)), Names(save=("qkv", "attn_out")), Names(save=("attn_ctx",)), Names(save=TAGS))
POLICIES = {"gpt": OF_BLOCKS + OF_SCOPES + OF_NAMES, "vit": OF_BLOCKS + OF_SCOPES + OF_NAMES}
POLICIES["batchnorm"] = (*OF_BLOCKS, Names(save=("up",)))
POLICIES["resnet"] = (*OF_BLOCKS, Names(save=("first",)))
POLICIES["untagged"] = OF_BLOCKS


def named(policy: Any) -> str:
    return "-".join([policy.kind, *getattr(policy, "save", ()), *([str(policy.n)] if policy.plan.every > 1 else [])])


def prepared(kind: str, style: str, dropout: float, policy: Any, num_layers: int = NUM_LAYERS) -> Any:
    """A model that obeys a policy; where it declares nothing, its class is named for every second policy, else found."""
    model = made(kind, style, dropout, num_layers)
    by_name = kind == "untagged" and (style == "scan" or policy.plan.every > 1)  # a stack of blocks is not a list
    prepare(model, policy.plan, "Normed" if by_name else None)
    return model


def losses_of(model: Any, precision: Any) -> tuple[Any, Any, Any]:
    """(params, rest, x) → (loss, rest after), and parameters and the rest."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        model = nnx.merge(graphdef, steps.cast(params, precision), rest, copy=True)
        y = model(steps.cast(x, precision)).astype(jnp.float32)
        after = nnx.split(model, nnx.Param, ...)[2]
        aim = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return ((y - aim) ** 2).mean(), jax.tree.map(lambda new, old: new.astype(old.dtype), after, rest)

    return loss, params, rest


def three_steps(kind: str, style: str, dropout: float, precision: str, policy: Any) -> Any:
    """Losses, gradients, and what the model keeps beside its parameters, after each of three steps."""
    loss, params, rest = losses_of(prepared(kind, style, dropout, policy), precision)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        (value, rest), gradients = gradient(params, rest, x)
        return value, gradients, jax.tree.map(lambda leaf, by: leaf - 0.1 * by, params, gradients), rest

    with active(policy.plan):
        compiled = jax.jit(step).trace(params, rest, example(kind)).lower().compile(QUICK)
    found, (params, rest) = [], (filled(params), filled(rest))
    for _ in range(3):
        value, gradients, params, rest = compiled(params, rest, example(kind))
        found.append((value, gradients, numbers(rest)))
    return found


def numbers(rest: nnx.State) -> dict[str, np.ndarray]:
    """Counts and keys of random streams, batch statistics."""
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(rest)}
    return {
        path: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for path, leaf in flat.items()
    }


plain = functools.cache(functools.partial(three_steps, policy=NoRemat()))

EVERYWHERE = [
    (kind, style, dropout, precision, policy)
    for kind, policies in POLICIES.items()
    for style in (("loop",) if kind == "resnet" else ("loop", "scan"))
    for dropout in ((0.0,) if kind == "resnet" else (0.0, 0.2))
    for precision in ("fp32", "bf16")
    for policy in policies
]
ALWAYS = [
    *(("gpt", "scan", 0.2, "fp32", policy) for policy in (EveryN(n=2), Names(save=("attn_ctx",)))),
    ("vit", "loop", 0.2, "bf16", DotsNoBatch()),
    *(("batchnorm", "scan", 0.2, "fp32", policy) for policy in (Full(), EveryN(n=3), Dots())),
    *(("untagged", "loop", 0.2, "fp32", policy) for policy in (Full(), EveryN(n=2), EverythingSaveable())),
    ("resnet", "loop", 0.0, "fp32", Full()),
]
CASES = [
    pytest.param(*case, id="-".join(map(str, case[:4])) + f"-{named(case[4])}", marks=[] if case in ALWAYS else slow)
    for slow in [pytest.mark.slow]
    for case in EVERYWHERE
]


@pytest.mark.parametrize(("kind", "style", "dropout", "precision", "policy"), CASES)
def test_nothing_changes_but_memory_and_time(
    kind: str, style: str, dropout: float, precision: str, policy: Any
) -> None:
    """In bfloat16 the compiler rounds where it stores, which moves with what is stored: some units of its last place."""
    mine = three_steps(kind, style, dropout, precision, policy)
    theirs = plain(kind, style, dropout, precision)
    # A unit in the last place is 1.2e-7 in float32 and 7.8e-3 in bfloat16; a step later the weights differ by it, too.
    rounding = 1e-6 if precision == "fp32" else 2e-3
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        np.testing.assert_allclose(one[0], other[0], rtol=rounding * (1 + number))
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other[1]))
        atol = scale * (1e-5 if precision == "fp32" else 3e-2)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), one[1], other[1])
        assert one[2].keys() == other[2].keys()
        for path, value in other[2].items():
            if np.issubdtype(value.dtype, np.floating):
                np.testing.assert_allclose(one[2][path], value, rtol=rounding * 10, atol=rounding, err_msg=path)
            else:
                np.testing.assert_array_equal(one[2][path], value, err_msg=path)


@pytest.mark.parametrize("style", ["loop", "scan"])
def test_streams_and_statistics_advance_once(style: str) -> None:
    """By hand: one draw of every block in every step; a running mean that has moved 1 % of the way, once."""
    after = three_steps("batchnorm", style, 0.2, "fp32", Full())
    for number, (_, _, rest) in enumerate(after):
        counts = [value for path, value in rest.items() if "dropout" in path and path.endswith("['count'].value")]
        assert counts, list(rest)
        assert {int(count) for value in counts for count in np.ravel(value)} == {number + 1}


# FLOPs, counted by hand: what a block does in its forward pass, and how much of that a policy does again.


def products(kind: str) -> dict[str, int]:
    """FLOPs of every product that a block must have done before its gradient: by tag, in order.

    The last product of a block is not among them: nothing needs its result. (Of a residual block with a norm at its end
    all are.)
    """
    tokens = BATCH * SEQ
    up = 2 * tokens * WIDTH * HIDDEN
    if kind in ("batchnorm", "untagged"):
        return {"up": up}
    each = 2 * BATCH * SEQ * SEQ * WIDTH
    qkv, out = 2 * tokens * WIDTH * 3 * WIDTH, 2 * tokens * WIDTH * WIDTH
    return {"qkv": qkv, "scores": each, "attn_ctx": each, "attn_out": out, "ffn_pre": up}


IN_SCOPE = {"attention": ("qkv", "scores", "attn_ctx"), "attention_core": ("scores",), "ffn": ("ffn_pre",)}
OVER_A_BATCH = ("scores", "attn_ctx")


def done_again(kind: str, policy: Any) -> int:
    """FLOPs of a step beyond those without rematerialization."""
    one, plan = products(kind), policy.plan
    if plan.scopes != {"block"}:
        return NUM_LAYERS * sum(one[name] for scope in plan.scopes for name in IN_SCOPE[scope])
    kept = {"nothing": (), "everything": one, "dots": one, "dots_no_batch": one.keys() - OVER_A_BATCH}[plan.keeps]
    chosen = math.ceil(NUM_LAYERS / plan.every)
    return chosen * sum(flops for name, flops in one.items() if name not in kept and name not in plan.names)


@functools.cache
def gradient_of(kind: str, style: str, policy: Any, num_layers: int = NUM_LAYERS) -> Any:
    """The jaxpr of the gradient."""
    loss, params, rest = losses_of(prepared(kind, style, 0.2, policy, num_layers), "fp32")
    with active(policy.plan):
        return jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(params, rest, example(kind)).jaxpr


OFTEN = {
    ("gpt", "scan"): (Full(), EveryN(n=2), DotsNoBatch(), *OF_SCOPES, Names(save=("attn_ctx",)), Names(save=TAGS)),
    ("vit", "loop"): (EverythingSaveable(), EveryN(n=3), Dots(), Names(save=("qkv", "attn_out"))),
    ("untagged", "loop"): (Full(), EveryN(n=2)),
}
BY_HAND = [
    pytest.param(kind, style, policy, id=f"{kind}-{style}-{named(policy)}", marks=[] if seldom else pytest.mark.slow)
    for kind, style in itertools.product(("gpt", "vit", "batchnorm", "untagged"), ("loop", "scan"))
    for policy in POLICIES[kind]
    for seldom in [policy in OFTEN.get((kind, style), ())]
]


@pytest.mark.parametrize(("kind", "style", "policy"), BY_HAND)
def test_a_policy_does_again_what_its_name_says(kind: str, style: str, policy: Any) -> None:
    """Fails where the seam does nothing, too much, or the same twice."""
    jaxpr = gradient_of(kind, style, policy)
    assert seen(jaxpr).scopes.keys() == policy.plan.scopes
    assert count(jaxpr) - count(gradient_of(kind, style, NoRemat())) == done_again(kind, policy)


# Barriers: in a loop XLA would find the same product twice, and do it once. In a scan it cannot.


def barriers(jaxpr: Any, length: int = 1) -> Iterator[tuple[int, bool]]:
    """Of every recomputed scope: the iterations of the scan it is in, and whether it is guarded by barriers."""
    for equation in jaxpr.eqns:
        if isinstance(equation.params.get("policy"), Kept):
            yield length, equation.params["prevent_cse"]
        for inner, times in bodies(equation):
            yield from barriers(inner, length * times)


@pytest.mark.parametrize(
    ("style", "num_layers", "policy", "expected"),
    [
        ("loop", NUM_LAYERS, Full(), {(1, True)}),
        ("scan", NUM_LAYERS, Full(), {(NUM_LAYERS, False)}),
        ("scan", 1, Full(), {(1, True)}),
        ("scan", 5, EveryN(n=2), {(2, False), (1, True)}),  # two groups, and one block left over
        ("scan", 5, EveryN(n=3), {(1, True)}),  # one group, and two blocks left over
        ("scan", 4, EveryN(n=2), {(2, False)}),
    ],
)
def test_only_a_scan_of_two_or_more_goes_without_barriers(
    style: str, num_layers: int, policy: Any, expected: set[tuple[int, bool]]
) -> None:
    loss, params, rest = losses_of(prepared("batchnorm", style, 0.2, policy, num_layers), "fp32")
    with active(policy.plan):
        assert set(barriers(jax.make_jaxpr(loss)(params, rest, example("batchnorm")).jaxpr)) == expected


def test_a_jit_of_the_users_own_is_not_reused_in_a_loop_after_a_scan() -> None:
    class Waves(nnx.Module):
        @scope("block")
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(jnp.sin(x))

    inner = jax.jit(lambda x: Waves()(x))

    def both(x: jax.Array) -> jax.Array:
        with scanned(3):
            x, _ = jax.lax.scan(lambda x, _: (inner(x), None), x, length=3)
        return inner(x)

    with active(Full().plan):
        assert set(barriers(jax.make_jaxpr(both)(jnp.ones(3)).jaxpr)) == {(3, False), (1, True)}


# Bytes: what the backward pass finds stored.


@functools.cache
def kept_by(kind: str, style: str, policy: Any, num_layers: int = NUM_LAYERS) -> Any:
    """The jaxpr of the forward pass, and how many of its last results are what is stored."""
    loss, params, rest = losses_of(prepared(kind, style, 0.2, policy, num_layers), "fp32")

    def forward(params: nnx.State, rest: nnx.State, x: jax.Array) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, rest, x), params, has_aux=True)[1])

    with active(policy.plan):
        jaxpr = jax.make_jaxpr(forward)(params, rest, example(kind)).jaxpr
    return jaxpr, len(jaxpr.outvars)


def num_bytes(style: str, policy: Any) -> int:
    """Of six blocks, which 2 and 3 divide: of five, `layers` would copy the weights to make groups."""
    return sum(stored(*kept_by("gpt", style, policy, 6)).values())


ORDER = [
    *(NoRemat(), AttentionCore(), AttentionOnly(), Dots(), Names(save=TAGS), DotsNoBatch()),
    *(Names(save=("qkv", "attn_out")), Names(save=("attn_ctx",)), Full()),
]


@pytest.mark.parametrize("style", ["scan", pytest.param("loop", marks=pytest.mark.slow)])
def test_what_is_stored_falls_in_this_order(style: str) -> None:
    for falling in (ORDER, [NoRemat(), EveryN(n=3), EveryN(n=2), Full()], [NoRemat(), FfnOnly(), Full()]):
        sizes = {named(policy): num_bytes(style, policy) for policy in falling}
        assert list(sizes.values()) == sorted(set(sizes.values()), reverse=True), sizes
    assert num_bytes(style, EverythingSaveable()) == num_bytes(style, NoRemat())
    assert num_bytes(style, NothingSaveable()) == num_bytes(style, Full())


@pytest.mark.parametrize("style", ["scan", pytest.param("loop", marks=pytest.mark.slow)])
def test_a_name_stores_its_value_and_nothing_else(style: str) -> None:
    value = NUM_LAYERS * BATCH * SEQ * WIDTH * 4  # of the width of the stream, in every block
    full = stored(*kept_by("gpt", style, Full()))
    assert full == {"": full[""]}
    kept = stored(*kept_by("gpt", style, Names(save=("qkv", "attn_out"))))
    assert kept == {"": full[""], "qkv": 3 * value, "attn_out": value}
    # what enters each block; what is before and behind them; the keys of dropout
    assert value <= full[""] < 2 * value


@pytest.mark.parametrize(("policy", "num_layers", "copies"), [(EveryN(n=3), 6, 0), (EveryN(n=2), 5, 1)])
def test_no_slice_of_the_weights_is_stored(policy: Any, num_layers: int, copies: int) -> None:
    """Where n does not divide the number of blocks, the stack is cut once into groups and what is left over."""
    params = jax.tree.leaves(losses_of(made("gpt", "scan", 0.0, num_layers), "fp32")[1])
    weights = {leaf.shape[1:] for leaf in params if len(leaf.shape) == 3}
    assert weights == {(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)}
    jaxpr, _ = kept_by("gpt", "scan", policy, num_layers)
    given = set(jaxpr.invars)
    reshaped = [equation for equation in jaxpr.eqns if equation.primitive.name == "reshape"]
    given |= {equation.outvars[0] for equation in reshaped if equation.invars[0] in given}
    values = {var for var in jaxpr.outvars if not hasattr(var, "val")} - given
    of_weights = sum(math.prod(var.aval.shape) for var in values if var.aval.shape[-2:] in weights)
    assert of_weights == copies * sum(math.prod(leaf.shape) for leaf in params if len(leaf.shape) == 3)
