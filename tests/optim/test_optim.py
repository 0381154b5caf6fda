"""Optimizers and schedules: each option trains, and does what its name and its paper say."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config.identity import classify_key
from runner.config.schema import validate_config
from runner.errors import ConfigError
from runner.optim.clip import clip_by_known_norm
from runner.optim.optimizers import AdamW, ExternalOptim, Lion, Muon, Optim, Sgd
from runner.optim.parameter_groups import decay_mask, muon_axes
from runner.optim.schedules import Constant, Cosine, ExternalSchedule, InverseSqrt, Linear, Schedule, Wsd
from runner.train.build import build
from tests.config.test_config import changed
from tests.conftest import QUICK, REPO, composed

OPTIMS, SCHEDULES = (
    sorted({path.stem for path in (REPO / "conf" / group).glob("*.yaml")} - {"external"})
    for group in ("optim", "schedule")
)
MLP = ("model=mlp", "model.width=16", "data=synthetic", "data.gives=features", "data.batch_size=8", "train.steps=10")
GPT = (
    *("model=gpt", "model.num_layers=2", "model.num_heads=2", "model.width=16", "model.hidden=32", "train.steps=10"),
    *("data=synthetic", "data.seq_len=8", "data.batch_size=8"),
)
# A user's own: tests/optim/test_user_optim.py and test_user_schedule.py.
OPTIONS = [option() for option in get_args(Optim) if option is not ExternalOptim]
WSD = Wsd(decay_fraction=0.4, end_lr_fraction=0.2)


def names(options: Any) -> list[str]:
    return sorted(option.kind for option in options)


def rates(schedule: Schedule, lr: float, num_steps: int) -> np.ndarray[Any, Any]:
    """The learning rate of every step."""
    return np.asarray(schedule.build(lr, num_steps)(jnp.arange(num_steps + 1)) * np.ones(num_steps + 1))


def tree(leaf: Any = jnp.ones) -> dict[str, Any]:
    """A parameter of every kind, by the names that flax gives them."""
    return {
        "embed": {"embedding": leaf((12, 4))},
        "patch_embed": {"kernel": leaf((2, 2, 3, 4)), "bias": leaf((4,))},
        "blocks": {
            "norm": {"scale": leaf((3, 4))},
            "up": {"kernel": leaf((3, 4, 8)), "bias": leaf((3, 8))},
            "heads_of": {"query": {"bias": leaf((3, 2, 4))}},
        },
        "conv": {"kernel": leaf((3, 3, 4, 5)), "bias": leaf((5,))},
        "bn": {"scale": leaf((5,)), "bias": leaf((5,))},
        "head": {"kernel": leaf((5, 6)), "bias": leaf((6,))},
    }


def normal(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float32)


def size(tree: Any) -> float:
    """The norm over all leaves."""
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def updates(option: Optim, grads: Any, params: Any) -> Any:
    """The first update, at a learning rate of 1."""
    tx = option.build(Constant().build(1.0, 10))

    def first(grads: Any, params: Any) -> Any:
        return tx.update(grads, tx.init(params), params)[0]

    return jax.jit(first, compiler_options=QUICK)(grads, params)


# --- every choice ---


def test_every_option_has_a_file_and_every_file_an_option() -> None:
    assert names(get_args(Optim)) == sorted([*OPTIMS, "external"])
    assert names(get_args(Schedule)) == sorted([*SCHEDULES, "external"])


@pytest.mark.parametrize("name", OPTIMS)
def test_every_optimizer_trains_with_the_values_its_file_has(name: str) -> None:
    config = composed(*(GPT if name == "muon" else MLP), f"optim={name}")  # to it alone stacked layers are special
    assert config.optim == next(option for option in OPTIONS if option.kind == name)
    built = build(config)
    state = built.init()
    first = jax.tree.map(np.array, state["params"])
    step = built.train_step.with_lr(built.train_step.trace(state, next(built.stream)).lower().compile(QUICK))
    for _ in range(2):
        state, metrics = step(state, next(built.stream))
    assert int(state["step"]) == 2
    assert math.isfinite(float(metrics["loss"]))
    for path, before in jax.tree_util.tree_leaves_with_path(first):
        after = dict(jax.tree_util.tree_leaves_with_path(state["params"]))[path]
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after), path
    np.testing.assert_allclose(metrics["lr"], config.schedule.build(config.optim.lr, 10)(1), rtol=1e-6)


@pytest.mark.parametrize("choice", [f"optim={name}" for name in OPTIMS] + [f"schedule={name}" for name in SCHEDULES])
def test_another_learning_rate_finds_the_step_compiled(choice: str) -> None:
    def program(lr: float) -> str:
        built = build(composed(*(GPT if "muon" in choice else MLP), choice, f"optim.lr={lr}"))
        return built.train_step.trace(built.abstract, next(built.stream)).lower().as_text()

    assert program(1e-3) == program(3e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optim", OPTIMS)
def test_the_state_is_the_same_under_every_schedule(name: str, optim: str) -> None:
    """So a run can be continued under another one."""
    config = composed(*MLP, f"optim={optim}", f"schedule={name}", "schedule.warmup_steps=null")
    states = [
        jax.eval_shape(config.optim.build(schedule.build(config.optim.lr, 10)).init, tree())
        for schedule in (config.schedule, Cosine())
    ]
    assert states[0] == states[1]
    assert any(
        path[-1] == jax.tree_util.GetAttrKey("count") for path, _ in jax.tree_util.tree_leaves_with_path(states[0])
    )


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.kind)
def test_every_optimizer_walks_down_a_bowl(option: Any) -> None:
    target = tree(normal)
    tx = type(option)(weight_decay=0.0).build(Linear().build(0.03 if option.kind in ("adamw", "lion") else 0.1, 300))

    def distance(params: Any) -> jax.Array:
        gaps = jax.tree.map(lambda one, other: jnp.square(one - other).sum(), params, target)
        return 0.5 * jax.tree.reduce(jnp.add, gaps)

    def step(carry: Any, _: None) -> Any:
        params, opt = carry
        change, opt = tx.update(jax.grad(distance)(params), opt, params)
        return (optax.apply_updates(params, change), opt), distance(params)

    start = jax.tree.map(lambda leaf: leaf + 1.0, target)

    def walk(start: Any) -> Any:
        return jax.lax.scan(step, (start, tx.init(start)), length=300)[1]

    distances = jax.jit(walk, compiler_options=QUICK)(start)
    assert distances[-1] < 0.1 * distances[0]


# --- which parameters ---


def test_weight_decay_is_for_matrices_kernels_and_embeddings() -> None:
    assert decay_mask(tree(np.ones)) == {
        "embed": {"embedding": True},
        "patch_embed": {"kernel": True, "bias": False},
        "blocks": {
            "norm": {"scale": False},
            "up": {"kernel": True, "bias": False},
            "heads_of": {"query": {"bias": False}},  # [layers heads head_dim], and still a bias
        },
        "conv": {"kernel": True, "bias": False},
        "bn": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.kind)
def test_every_optimizer_decays_those_and_no_others(option: Any) -> None:
    params = tree(normal)
    decayed = type(option)(weight_decay=0.125)
    change = updates(decayed, jax.tree.map(np.zeros_like, params), params)
    for path, does in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        before, moved = (dict(jax.tree_util.tree_leaves_with_path(each))[path] for each in (params, change))
        coupled = -0.125 * (1 + Sgd().momentum)  # through Nesterov's momentum
        factor = (coupled if option.kind == "sgd" else -0.125) if does else 0.0
        np.testing.assert_allclose(moved, factor * before, rtol=1e-5, atol=1e-7)


def test_hidden_matrices_are_kernels_inside() -> None:
    axes = jax.tree_util.tree_leaves_with_path(muon_axes(tree(np.ones)), is_leaf=lambda node: isinstance(node, tuple))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in axes}
    assert found == {"blocks.up.kernel": ((1,), (2,)), "conv.kernel": ((0, 1, 2), (3,))}
    outer = {name: {"first": {"kernel": np.ones((2, 2))}} for name in ("stem", "patches", "token_embedding", "lm_head")}
    assert jax.tree.leaves(muon_axes(outer)) == []
    inner = {"multi_head_attention": {"kernel": np.ones((2, 2))}}
    assert muon_axes(inner) == {"multi_head_attention": {"kernel": ((0,), (1,))}}


def test_muon_orthogonalizes_each_layer_of_a_stack_and_each_convolution() -> None:
    """Also where one layer's gradient is a million times another's: treated as one matrix, the small one would vanish."""
    params, grads = tree(normal), tree(normal)
    grads["blocks"]["up"]["kernel"] *= np.asarray([1.0, 1e3, 1e-3], np.float32)[:, None, None]
    change = updates(Muon(weight_decay=0.0, clip_norm=None), grads, params)
    matrices = [*change["blocks"]["up"]["kernel"], change["conv"]["kernel"].reshape(36, 5)]
    for matrix in matrices:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        assert values.shape == (min(matrix.shape),)
        assert (np.abs(values - 1.0) < 0.35).all(), values  # five Newton-Schulz steps bring all to 0.7 - 1.2
    rms = [float(np.sqrt(np.square(matrix).mean())) for matrix in matrices]
    assert np.allclose(rms, 0.2, rtol=0.2)


def test_muon_gives_embeddings_heads_norms_and_biases_to_adam() -> None:
    params, grads = tree(normal), tree(normal)
    muon = updates(Muon(weight_decay=0.0, clip_norm=None), grads, params)
    adam = updates(AdamW(weight_decay=0.0, clip_norm=None, b2=0.95), grads, params)
    for parts in (
        ("embed", "embedding"),
        ("patch_embed", "kernel"),
        ("head", "kernel"),
        ("bn", "scale"),
        ("conv", "bias"),
    ):
        mine, theirs = (each[parts[0]][parts[1]] for each in (muon, adam))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert not np.allclose(muon["conv"]["kernel"], adam["conv"]["kernel"], rtol=0.1)


def test_lion_moves_by_the_sign() -> None:
    change = updates(Lion(weight_decay=0.0), tree(normal), tree(normal))
    assert {float(value) for leaf in jax.tree.leaves(change) for value in np.unique(np.abs(leaf))} == {1.0}


def test_gradients_are_clipped_to_their_norm_over_all_parameters() -> None:
    plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    params, grads = tree(normal), tree(normal)
    norm = size(grads)
    clipped, small, free = (updates(Sgd(clip_norm=limit, **plain), grads, params) for limit in (2.0, 2 * norm, None))
    assert size(clipped) == pytest.approx(2.0, rel=1e-5)
    assert size(free) == pytest.approx(norm, rel=1e-5)
    # One factor of 1: to the bit.
    np.testing.assert_array_equal(small["conv"]["kernel"], free["conv"]["kernel"])


def test_the_norm_is_computed_once_for_clip_and_metric() -> None:
    clip, grads = clip_by_known_norm(1.0), tree(normal)
    program = jax.make_jaxpr(lambda norm: clip.update(grads, clip.init(grads), grad_norm=norm)[0])(jnp.float32(2.0))
    assert "reduce_sum" not in str(program)
    assert size(clip.update(grads, clip.init(grads), grad_norm=jnp.float32(4.0))[0]) == pytest.approx(size(grads) / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_makes_no_gradient_finite(bad: float) -> None:
    clip, grads = clip_by_known_norm(1.0), {"a": jnp.array([1.0, bad]), "b": jnp.ones(2)}
    clipped, _ = clip.update(grads, clip.init(grads))
    assert not np.isfinite(clipped["a"][1])


def test_clipping_keeps_types() -> None:
    clip, grads = clip_by_known_norm(1.0), {"a": jnp.ones(8, jnp.bfloat16), "b": jnp.ones(8, jnp.complex64)}
    clipped, _ = clip.update(grads, clip.init(grads))
    assert {name: leaf.dtype for name, leaf in clipped.items()} == {name: leaf.dtype for name, leaf in grads.items()}
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0, rel=1e-2)


# --- learning rates ---


def test_schedules_follow_their_formulas() -> None:
    steps = np.arange(101)
    after = steps[20:] - 20
    expected = {
        Constant(warmup_steps=20): 0 * after + 1.0,
        Cosine(warmup_steps=20, end_lr_fraction=0.1): 0.1 + 0.9 * (1 + np.cos(np.pi * after / 80)) / 2,
        Linear(warmup_fraction=0.2, end_lr_fraction=0.5): 1 - 0.5 * after / 80,
        Wsd(warmup_steps=20, decay_fraction=0.4, end_lr_fraction=0.2): np.where(
            after < 40, 1.0, 1 - 0.8 * np.sqrt(np.maximum(after - 40, 0) / 40)
        ),
        InverseSqrt(warmup_steps=20): np.sqrt(20 / steps[20:]),
    }
    for schedule, formula in expected.items():
        rise = np.arange(20) * (1 - 1 / 21) / 20 + 1 / 21  # from lr / 21 to lr
        np.testing.assert_allclose(
            rates(schedule, 4e-3, 100), 4e-3 * np.concatenate([rise, formula]), rtol=2e-6, err_msg=str(schedule)
        )
    assert {type(schedule) for schedule in expected} == set(get_args(Schedule)) - {ExternalSchedule}


@given(
    schedule=st.one_of(
        st.builds(Constant, warmup_steps=st.integers(0, 60)),
        st.builds(Cosine, warmup_steps=st.integers(0, 60), end_lr_fraction=st.floats(0, 1)),
        st.builds(Linear, warmup_fraction=st.floats(0, 1), end_lr_fraction=st.floats(0, 1)),
        st.builds(
            Wsd, warmup_steps=st.integers(0, 60), decay_fraction=st.floats(0.01, 1), end_lr_fraction=st.floats(0, 1)
        ),
        st.builds(Wsd, warmup_fraction=st.floats(0, 0.5), decay_fraction=st.floats(0.01, 0.5)),
        st.builds(InverseSqrt, warmup_steps=st.integers(0, 60)),
        st.builds(InverseSqrt, warmup_fraction=st.floats(0, 1)),
    )
)
@settings(max_examples=60, deadline=None)
def test_a_rate_is_never_negative_nor_above_its_peak_and_makes_no_jumps(schedule: Schedule) -> None:
    """One number of steps, so that nothing is compiled twice; a jump is more than a straight fall to zero would make."""
    got = rates(schedule, 1.0, 50)
    assert (got >= 0.0).all()
    assert (got <= 1.0 + 1e-6).all()
    warmup = schedule.warmup(50)
    assert 0 <= warmup <= 50
    assert math.isclose(got[warmup], 1.0, rel_tol=1e-6)
    room = 50 - warmup if not isinstance(schedule, Wsd) else min(round(schedule.decay_fraction * 50), 50 - warmup)
    steepest = math.sqrt(1 / max(room, 1)) if isinstance(schedule, Wsd) else math.pi / 2 / max(room, 1)
    if isinstance(schedule, InverseSqrt):
        steepest = 1 - math.sqrt(max(warmup, 1) / (max(warmup, 1) + 1))
    assert (np.diff(got[: warmup + 1]) <= 1 / (warmup + 1) + 1e-6).all()
    assert (np.diff(got[warmup:]) <= 1e-6).all()
    assert (np.diff(got[warmup:]) >= -steepest - 1e-6).all()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"kind": "cosine", "warmup_steps": 20, "warmup_fraction": 0.1},
            "schedule.warmup_steps=20 and warmup_fraction=0.1 both say how long the warm-up is; set one of them to null",
        ),
        (
            {"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6},
            "schedule.decay_fraction=0.6 and warmup_fraction=0.5 are more than all steps together; "
            "make one of them smaller",
        ),
        (
            {"kind": "cosin"},
            'schedule.kind: got "cosin"; expected one of constant, cosine, linear, wsd, inverse_sqrt, external; '
            "did you mean cosine?",
        ),
        (
            {"kind": "constant", "end_lr_fraction": 0.1},
            "schedule.end_lr_fraction: unknown key; did you mean warmup_fraction?",
        ),
    ],
)
def test_what_makes_no_schedule_is_told(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(changed(schedule=schedule))
    assert str(caught.value) == message


# --- which run ---


def test_a_run_may_go_on_under_another_schedule_but_not_with_another_state() -> None:
    resumable = ("schedule.kind", "schedule.warmup_steps", "optim.lr", "train.microbatches", "train.precision")
    assert {classify_key(key) for key in resumable} == {"resumable"}
    assert {classify_key(key) for key in ("optim.kind", "optim.ema")} == {"identity"}
