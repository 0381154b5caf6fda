"""Rematerialization changes what is stored and what is done twice, and nothing else. FLOPs and bytes are by hand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.find_blocks import apply_plan
from models.remat_plan import RematPlan, RematPlanError
from models.scopes import EXEMPT, CheckpointPolicy, inside_scan, layers, scope, tag, use_plan
from runner.config.remat_policies import (
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
    Offload,
)
from runner.errors import ConfigError
from runner.trace.flops import count_flops, inner_jaxprs
from runner.trace.remat_trace import count_stored_bytes, find_scopes_and_tags, iterate_equations
from runner.train import compile
from runner.train import step as steps
from tests.conftest import QUICK, composed
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
    apply_plan(model, policy.plan, "Normed" if by_name else None)
    return model


def losses_of(model: Any, precision: Any) -> tuple[Any, Any, Any]:
    """(params, rest, x) → (loss, rest after), and parameters and the rest."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        model = nnx.merge(graphdef, steps.cast_floats(params, precision), rest, copy=True)
        y = model(steps.cast_floats(x, precision)).astype(jnp.float32)
        after = nnx.split(model, nnx.Param, ...)[2]
        aim = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return ((y - aim) ** 2).mean(), jax.tree.map(lambda new, old: new.astype(old.dtype), after, rest)

    return loss, params, rest


@functools.cache
def three_steps(kind: str, style: str, dropout: float, precision: str, policy: Any) -> Any:
    """Losses, gradients, and what the model keeps beside its parameters, after each of three steps."""
    loss, params, rest = losses_of(prepared(kind, style, dropout, policy), precision)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        (value, rest), gradients = gradient(params, rest, x)
        return value, gradients, jax.tree.map(lambda leaf, by: leaf - 0.1 * by, params, gradients), rest

    with use_plan(policy.plan):
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


EVERYWHERE = [
    (kind, style, dropout, precision, policy)
    for kind, policies in POLICIES.items()
    for style in (("loop",) if kind == "resnet" else ("loop", "scan"))
    for dropout in ((0.0,) if kind == "resnet" else (0.0, 0.2))
    for precision in ("fp32", "bf16")
    for policy in policies
]
ALWAYS = [
    ("gpt", "scan", 0.2, "fp32", EveryN(n=2)),
    *(("batchnorm", "scan", 0.2, "fp32", policy) for policy in (Full(), EveryN(n=3))),
    ("untagged", "loop", 0.2, "bf16", EveryN(n=2)),
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
    theirs = three_steps(kind, style, dropout, precision, NoRemat())
    # A unit in the last place is 1.2e-7 in float32 and 7.8e-3 in bfloat16; a step later the weights differ by it, too,
    # and there a ReLU may be on its other side.
    rounding, of_gradients = (1e-6, 1e-5) if precision == "fp32" else (2e-3, 5e-2)
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        np.testing.assert_allclose(one[0], other[0], rtol=rounding * (10 if number else 1))
        if number == 0 or precision == "fp32":
            apart = jax.tree.map(jnp.subtract, one[1], other[1])
            assert optax.tree.norm(apart) <= of_gradients * optax.tree.norm(other[1])
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
    with use_plan(policy.plan):
        return jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(params, rest, example(kind)).jaxpr


OFTEN = {
    ("gpt", "scan"): (Full(), EveryN(n=2), DotsNoBatch(), *OF_SCOPES, Names(save=("attn_ctx",)), Names(save=TAGS)),
    ("vit", "loop"): (EveryN(n=3), Dots(), Names(save=("qkv", "attn_out"))),
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
    assert find_scopes_and_tags(jaxpr).scopes.keys() == policy.plan.scopes
    assert count_flops(jaxpr) - count_flops(gradient_of(kind, style, NoRemat())) == done_again(kind, policy)


# Barriers: in a loop XLA would find the same product twice, and do it once. In a scan it cannot.


def barriers(jaxpr: Any, length: int = 1) -> Iterator[tuple[int, bool]]:
    """Of every recomputed scope: the iterations of the scan it is in, and whether it is guarded by barriers."""
    for equation in jaxpr.eqns:
        if isinstance(equation.params.get("policy"), CheckpointPolicy):
            yield length, equation.params["prevent_cse"]
        for inner, times in inner_jaxprs(equation):
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
    with use_plan(policy.plan):
        assert set(barriers(jax.make_jaxpr(loss)(params, rest, example("batchnorm")).jaxpr)) == expected


def test_a_scan_of_one_is_recomputed_by_the_compiled_program_too() -> None:
    """XLA takes such a loop apart: without barriers it would find the products of the forward pass, and use those."""

    def flops(policy: Any) -> float:
        loss, params, rest = losses_of(prepared("gpt", "scan", 0.0, policy, 1), "fp32")
        with use_plan(policy.plan):
            lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rest, example("gpt"))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(Full()) - flops(NoRemat()) >= sum(products("gpt").values())


def test_a_jit_of_the_users_own_is_not_reused_in_a_loop_after_a_scan() -> None:
    class Waves(nnx.Module):
        @scope("block")
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.sin(jnp.sin(x))

    inner = jax.jit(lambda x: Waves()(x))

    def both(x: jax.Array) -> jax.Array:
        with inside_scan(3):
            x, _ = jax.lax.scan(lambda x, _: (inner(x), None), x, length=3)
        return inner(x)

    with use_plan(Full().plan):
        assert set(barriers(jax.make_jaxpr(both)(jnp.ones(3)).jaxpr)) == {(3, False), (1, True)}


# Bytes: what the backward pass finds stored.


@functools.cache
def kept_by(kind: str, style: str, policy: Any, num_layers: int = NUM_LAYERS) -> Any:
    """The jaxpr of the forward pass, and how many of its last results are what is stored."""
    loss, params, rest = losses_of(prepared(kind, style, 0.2, policy, num_layers), "fp32")

    def forward(params: nnx.State, rest: nnx.State, x: jax.Array) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, rest, x), params, has_aux=True)[1])

    with use_plan(policy.plan):
        jaxpr = jax.make_jaxpr(forward)(params, rest, example(kind)).jaxpr
    return jaxpr, len(jaxpr.outvars)


def num_bytes(style: str, policy: Any) -> int:
    """Of six blocks, which 2 and 3 divide: of five, `layers` would copy the weights to make groups."""
    return sum(count_stored_bytes(*kept_by("gpt", style, policy, 6)).values())


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
    full = count_stored_bytes(*kept_by("gpt", style, Full()))
    assert full == {"": full[""]}
    kept = count_stored_bytes(*kept_by("gpt", style, Names(save=("qkv", "attn_out"))))
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


# What a plan must not trip over in a user's modules.


class Sum(nnx.Module):
    """Two linear maps with what goes in added to what comes out."""

    def __init__(self, rngs: nnx.Rngs):
        self.one, self.two = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def through(self, x: jax.Array) -> jax.Array:
        return x + self.two(jnp.sin(self.one(x)))


class Statics(Sum):
    """None, text, types, bools of Python and numpy, given or by default; arrays among what is not, both ways."""

    @scope("block")
    def __call__(self, x: Any, train: bool = True, mode: str = "sin", dtype: Any = jnp.float32) -> Any:
        assert train
        assert mode in ("sin", "cos")
        return {"x": self.through(x["x"]).astype(dtype), "why": mode, "again": True, "nothing": None}


class Streams(Sum):
    """Dropout from random streams that the caller owns."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5)

    @scope("block")
    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        return self.dropout(self.through(x), rngs=rngs)


class Shared(Sum):
    """The second map is that of all blocks, and counts its calls."""

    def __init__(self, rngs: nnx.Rngs, norm: nnx.Module | None = None):
        super().__init__(rngs)
        self.norm = norm
        self.one.kernel = self.two.kernel  # tied, inside of a block

    @scope("block")
    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.norm is not None
        return self.norm(self.through(x))


class Sown(Sum):
    """Notes what it computes."""

    @scope("block")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.through(x)
        self.sow(nnx.Intermediate, "seen", x)
        return x


class Bare(nnx.Module):
    """No parameters, no state."""

    def __init__(self, rngs: nnx.Rngs):
        pass

    @scope("block")
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.sin(x))


class Chain(nnx.Module):
    """Twelve blocks in lists in a list, whatever they take and give."""

    def __init__(self, kind: Any):
        rngs = nnx.Rngs(0)
        self.rngs = nnx.Rngs(dropout=1)
        more = {"norm": nnx.BatchNorm(4, rngs=rngs)} if kind is Shared else {}
        self.blocks = nnx.List(nnx.List(kind(rngs, **more) for _ in range(6)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        for number, block in enumerate(block for part in self.blocks for block in part):
            if isinstance(block, Statics):
                found = block({"x": x}, np.bool_(True), mode="cos", dtype=jnp.float32) if number else block({"x": x})
                assert found["again"] is True
                assert found["why"] == ("cos" if number else "sin")
                x = found["x"]
            else:
                x = block(x, rngs=self.rngs) if isinstance(block, Streams) else block(x)
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of sow
@pytest.mark.parametrize("kind", [Statics, Streams, Shared, Sown, Bare], ids=lambda kind: kind.__name__)
def test_whatever_a_block_takes_gives_shares_and_notes(kind: Any) -> None:
    def after(plan: RematPlan) -> Any:
        model = Chain(kind)
        apply_plan(model, plan, None)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params: nnx.State) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            value = jnp.square(model(jnp.ones((2, 4)))).sum()
            return value, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

        with use_plan(plan):
            jaxpr, shape = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True), return_shape=True)(params)
        leaves = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(params))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves), find_scopes_and_tags(jaxpr.jaxpr).scopes["block"]

    without, _ = after(RematPlan())
    for policy, times in ((Full(), 12), (EveryN(n=3), 4))[: 1 + (kind is Sown)]:
        found, wrapped = after(policy.plan)
        assert wrapped == times
        jax.tree.map(assert_close, found, without)


def assert_close(one: Any, other: Any) -> None:
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_stack_of_blocks_without_variables() -> None:
    for policy in (NoRemat(), Full(), EveryN(n=2)):
        with use_plan(policy.plan):
            found = layers(Bare(nnx.Rngs(0)), jnp.ones(()), 3)
        np.testing.assert_allclose(found, functools.reduce(lambda x, _: np.sin(x), range(6), 1.0), rtol=1e-6)


def test_every_nth_of_a_list_is_chosen_in_its_order() -> None:
    model = Chain(Sown)
    apply_plan(model, EveryN(n=3).plan, None)
    chosen = [not getattr(block, EXEMPT) for part in model.blocks for block in part]
    assert chosen == [True, False, False] * 4


def test_a_stack_that_scans_itself_cannot_do_every_nth() -> None:
    model = made("gpt", "scan")
    apply_plan(model, EveryN(n=2).plan, None)
    graphdef, state = nnx.split(model.blocks)

    def own(state: Any, x: jax.Array) -> jax.Array:
        through = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return through(x, nnx.merge(graphdef, state, copy=True))

    with use_plan(EveryN(n=2).plan), pytest.raises(RematPlanError, match="iterate over them with models.scopes.layers"):
        jax.make_jaxpr(own)(state, example("gpt"))


PLANS = [
    *(NoRemat().plan, Full().plan, Dots().plan, NoRemat().plan),
    *(Names(save=("one",)).plan, Names(save=("one", "two")).plan, Full().plan),
]


def test_a_jit_of_the_users_own_follows_a_changed_plan() -> None:
    class Twice(nnx.Module):
        @scope("block")
        def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
            x = jnp.sin(tag(x @ kernel, "one"))
            return jnp.sin(tag(x @ kernel, "two"))

    inner = jax.jit(lambda x, kernel: Twice()(x, kernel).sum())
    gradient = jax.grad(lambda x, kernel: inner(x, kernel), argnums=(0, 1))
    product = 2 * 8 * 8 * 8
    flops = []
    for plan in PLANS:
        with use_plan(plan):
            flops.append(count_flops(jax.make_jaxpr(gradient)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr))
    assert [each // product for each in flops] == [6, 8, 6, 6, 7, 6, 8]


# Refusals that need a compiler's answer, or a trace for each name: tests/config/test_user_code.py has the others.


def test_offloading_must_move_something() -> None:
    def compiled(host: int, text: str = "") -> Any:
        return SimpleNamespace(
            memory_analysis=lambda: SimpleNamespace(host_temp_size_in_bytes=host), as_text=lambda: text
        )

    option = Offload(offload=("qkv",), save=("ffn_pre",))
    with pytest.raises(ConfigError, match=r"choose remat=names remat.save=\[qkv,ffn_pre\]"):
        compile.refuse_offload_on_cpu(option, "cpu")
    with pytest.raises(ConfigError, match="moved nothing of qkv to the host's memory"):
        compile.refuse_not_offloaded(option, compiled(0))
    compile.refuse_not_offloaded(
        option, compiled(0, "f32[8,8]{1,0:S(5)} copy-done(%start)")
    )  # not every backend counts it
    compile.refuse_offload_on_cpu(Names(save=("qkv",)), "cpu")
    compile.refuse_offload_on_cpu(option, "tpu")
    compile.refuse_not_offloaded(option, compiled(4096))
    compile.refuse_not_offloaded(Full(), compiled(0))


def test_an_offloaded_tag_is_moved_and_the_rest_is_recomputed() -> None:
    """In the trace: there is a copy to pinned host memory and back for the tag, and only for it."""
    jaxpr = gradient_of("gpt", "scan", Offload(offload=("ffn_pre",), save=("qkv",)))
    moves = [str(equation) for equation in iterate_equations(jaxpr) if equation.primitive.name == "device_put"]
    assert sum("pinned_host" in move or "host" in move for move in moves) >= 1, moves
    expected = done_again("gpt", Names(save=("qkv", "ffn_pre")))
    assert count_flops(jaxpr) - count_flops(gradient_of("gpt", "scan", NoRemat())) == expected


REFUSED = [
    (["remat=names", "remat.save=[qkw]"], "remat=names: model=gpt tags no value 'qkw'; did you mean qkv?"),
    (["remat=names", "remat.save=[x]"], "tags no value 'x' (it has: qkv, attn_ctx, attn_out, ffn_pre)"),
    (["remat=names"], "remat.save: no value is named; name at least one (model=gpt tags qkv, attn_ctx, attn_out"),
    (["remat=offload"], "remat.offload: no value is named; name at least one (model=gpt tags qkv, attn_ctx"),
    (["remat=offload", "remat.offload=[x]"], "remat=offload: model=gpt tags no value 'x' (it has: qkv, attn_ctx"),
    (["remat=every_n", "remat.n=1"], "remat.n: got 1; expected at least 2"),
    (["remat=auto", "remat.budget_bytes=8XB"], "budget_bytes=8XB must be a number of bytes, as 8000000000, 8GB or"),
    (["remat=full", "+remat.block=Block"], "model=gpt does: leave it out"),
    (["remat=ffn_only", "model=mlp", "data=digits"], "which model=mlp does not declare (it has: block)"),
]


@pytest.mark.parametrize(
    ("words", "message"), REFUSED, ids=lambda each: "-".join(each) if isinstance(each, list) else ""
)
def test_a_wrong_choice_is_told_before_jax_starts(words: list[str], message: str) -> None:
    """`load` needs no jax: tests/test_architecture.py."""
    with pytest.raises(ConfigError) as raised:
        composed(*words, *(() if "data=digits" in words else ("data=stdlib",)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
