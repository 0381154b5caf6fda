"""Optimizers of the user's own and of libraries: called as they are written, continued bit for bit, or refused in a line."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runner.config.identity import classify_key
from runner.config.schema import validate_config
from runner.errors import ConfigError
from runner.optim.user_optimizer import LearningRate, make_user_transformation
from runner.train.build import build
from runner.train.rehearse_optimizer import choose_optimizer
from runner.train.step import UpdateOptions, make_train_step
from tests.config.test_config import changed
from tests.conftest import QUICK, Door, assert_same, composed
from tests.laws.faults import Forks

MINE = """
from typing import NamedTuple
import jax, jax.numpy as jnp, numpy as np, optax
from functools import partial

finished = optax.adam(0.5)
number = 3
ready = partial(optax.sgd, momentum=0.5)

class Memory(NamedTuple):
    count: jax.Array
    anchor: dict

def anchored(schedule, pull=0.1):
    def init(params): return Memory(jnp.zeros((), jnp.int32), params)
    def update(grads, state, params):
        rate = schedule(state.count)
        moves = jax.tree.map(lambda g, a, p: -rate * (g + pull * (p - a)), grads, state.anchor, params)
        return moves, Memory(state.count + 1, state.anchor)
    return optax.GradientTransformation(init, update)

def named(decay=0.9, lr=None): return optax.sgd(lr, momentum=decay)
def bare(decay=0.9): return optax.chain(optax.trace(decay), optax.scale(-0.01))
def many(schedule): return optax.MultiSteps(optax.sgd(schedule), 2)
def reads(schedule): return optax.sgd(float(schedule(0)))
def only_value(schedule):
    def update(grads, state, params=None, *, value):
        return jax.tree.map(lambda g: -schedule(0) * value * g, grads), state
    return optax.GradientTransformation(lambda params: (), update)
def on_value(schedule):
    def update(grads, state, params=None, *, value, **rest):
        return jax.tree.map(lambda g: -schedule(0) * value * g, grads), state
    return optax.GradientTransformationExtraArgs(lambda params: (), update)
def by_loss(schedule):
    def update(grads, state, params, *, value, value_fn, grad, **rest):
        same, slope = jax.value_and_grad(value_fn)(params)
        far = jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.abs(a - b).sum(), slope, grad))
        return jax.tree.map(jnp.zeros_like, grads), (value, same, far)
    return optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()),) * 3, update)

def noisy(schedule): return optax.chain(optax.sgd(schedule), optax.scale(np.random.default_rng().uniform(1, 2)))
def masked(schedule):
    mask = np.random.default_rng().uniform(0, 1, 2)
    return like(update=lambda g, s, p: (jax.tree.map(lambda x: -schedule(0) * mask * x, g), s))
def keyed(schedule): return optax.noisy_sgd(schedule, key=jax.random.key(3))

def like(init=lambda params: (), update=lambda g, s, p: (g, s)): return optax.GradientTransformation(init, update)
def three(schedule): return 3
def pair(schedule): return (lambda params: (), lambda g, s, p: (g, s))
def none(schedule): pass
def raises(schedule): raise ValueError("my own")
def ends(schedule): raise SystemExit(3)
def negates(schedule): return optax.scale(-schedule)
def asks(schedule, width): return optax.sgd(schedule)
def bad_init(schedule): return like(init=lambda params: params["nothing"])
def text_state(schedule): return like(init=lambda params: {"name": "a"})
def bad_update(schedule): return like(update=lambda g, s, p: g["nothing"])
def branches(schedule): return like(update=lambda g, s, p: (g, s) if g["b"].sum() > 0 else (g, s))
def updates_alone(schedule): return like(update=lambda g, s, p: g)
def fewer(schedule): return like(update=lambda g, s, p: ({"a": g["a"]}, s))
def shapes(schedule): return like(update=lambda g, s, p: (jax.tree.map(jnp.sum, g), s))
def grows(schedule):
    return like(lambda params: jnp.zeros(1), lambda g, s, p: (g, jnp.append(s, 1.0)))
def changes_type(schedule):
    return like(lambda params: jnp.zeros((), jnp.int32), lambda g, s, p: (g, s + 0.5))
def other_state(schedule): return like(lambda params: {"x": jnp.ones(2)}, lambda g, s, p: (g, {"y": s["x"]}))
def other_argument(schedule):
    def update(grads, state, params=None, *, hessian, **rest): return grads, state
    return optax.GradientTransformationExtraArgs(lambda params: (), update)
"""
MLP = ("model=mlp", "model.width=16", "data=synthetic", "data.gives=features", "data.batch_size=8", "train.steps=10")
PARAMS = {
    "a": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)},
    "b": jax.ShapeDtypeStruct((2,), jnp.float32),
}
UNTOUCHED = "asks for no learning rate: optim.lr and schedule do not touch it, and no lr is logged"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mine", None)


def external(target: str, **options: Any) -> dict[str, Any]:
    return {"kind": "external", "target": target, "options": options, "lr": 0.01}


def chosen(target: str, **options: Any) -> Any:
    """How the optimizer is made, and what is told of it."""
    return choose_optimizer(validate_config(changed(optim=external(target, **options))), PARAMS)


def trained(*words: str, steps: int = 3) -> tuple[Any, list[dict[str, float]]]:
    """What is built, and the metrics of a few steps."""
    built = build(composed(*MLP, *words))
    state, metrics = built.init(), []
    step = built.train_step.with_lr(built.train_step.trace(built.abstract, next(built.stream)).lower().compile(QUICK))
    for _ in range(steps):
        state, found = step(state, next(built.stream))
        metrics.append({name: float(value) for name, value in found.items()})
    return (built, state), metrics


# --- what is called, and how ---


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("optax:adamw", {"b1": 0.8}, False),
        ("optax:lion", {}, False),
        ("optax.contrib:prodigy", {}, False),
        ("mine:ready", {}, False),
        ("mine:anchored", {"pull": 0.5}, False),
        ("mine:named", {"decay": 0.5}, False),  # by its name, though it is the second
        ("mine:many", {}, False),
        ("mine:reads", {}, False),  # a number that is then known
        ("mine:only_value", {}, False),  # nothing that it has no name for
        ("mine:finished", {}, True),
        ("mine:bare", {"decay": 0.5}, True),
        ("mine:named", {"lr": 0.5}, True),
        ("optax.contrib:reduce_on_plateau", {}, True),
    ],
)
def test_who_gets_the_learning_rate(target: str, options: dict[str, Any], told: bool) -> None:
    make, warnings = chosen(target, **options)
    tx, schedule = make(0.01)
    assert warnings == ((f"{target}: {UNTOUCHED}",) if told else ())
    assert (schedule is None) == told
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), PARAMS)
    updates, _ = tx.update(params, tx.init(params), params, value=1.0, grad=params, value_fn=lambda params: 1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_one_of_optax_is_what_it_is_without_us() -> None:
    (_, state), metrics = trained(
        "optim=external", "optim.target=optax:adamw", "+optim.options.b1=0.8", "optim.lr=0.01"
    )
    config = composed(*MLP, "optim.lr=0.01")
    built = build(config)
    tx, own = optax.adamw(config.schedule.build(0.01, 10), b1=0.8), built.init()
    params, opt = own["params"], tx.init(own["params"])
    next(built.stream)  # on its shapes the step above is traced
    find_slope = jax.jit(jax.grad(built.loss, has_aux=True), compiler_options=QUICK)
    for number in range(3):
        slope = find_slope(params, own, next(built.stream))[0]
        updates, opt = tx.update(slope, opt, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics[number]["lr"], config.schedule.build(0.01, 10)(number), rtol=1e-6)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), params, state["params"]
    )


def test_a_finished_one_logs_no_learning_rate() -> None:
    (built, _), metrics = trained("optim=external", "optim.target=mine:finished")
    assert built.warnings == (f"mine:finished: {UNTOUCHED}",)
    assert all(line.keys() >= {"loss", "grad_norm"} and "lr" not in line for line in metrics)


def test_a_state_may_be_the_parameters_themselves() -> None:
    """A step is given the memory of the state: an array that is in it twice would be given away twice."""
    (_, state), metrics = trained("optim=external", "optim.target=mine:anchored")
    assert all(math.isfinite(line["loss"]) for line in metrics)
    eager, params = chosen("mine:anchored")[0](0.01)[0], {"w": jnp.ones(3)}
    assert eager.init(params).anchor["w"] is not params["w"]
    assert type(state["opt"]).__name__ == "Memory"


@pytest.mark.parametrize("microbatches", [1, 2])
def test_what_an_update_may_ask_for(microbatches: int) -> None:
    """The mean loss, its slope, and the loss of other parameters: where they are the same ones, it is the same."""
    words = ("optim=external", "optim.target=mine:by_loss", f"train.microbatches={microbatches}")
    (_, state), metrics = trained(*words, steps=1)
    value, same, far = state["opt"]
    np.testing.assert_allclose([value, same], metrics[0]["loss"], rtol=1e-6)
    assert float(far) < 1e-5


def test_a_line_search_finds_its_own_way_down() -> None:
    words = ("optim=external", "optim.target=optax:lbfgs", "optim.lr=1", "schedule=constant", "train.microbatches=2")
    _, metrics = trained(*words, "schedule.warmup_steps=null")
    assert metrics[1]["lr"] == 1.0
    assert all(math.isfinite(line["loss"]) for line in metrics)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adafactor"])
def test_ours_compile_to_what_they_were(optim: str) -> None:
    """What an update may ask for costs those nothing that do not ask."""
    config = composed(*MLP, f"optim={optim}")
    built = build(config)
    batch = next(built.stream)
    network, objective = _network(config)

    def deaf(lr: Any) -> Any:
        schedule = config.schedule.build(lr, config.train.num_steps)
        tx = config.optim.build(schedule)

        def update(grads: Any, opt: Any, params: Any, *, grad_norm: Any, **_: Any) -> Any:
            return tx.update(grads, opt, params, grad_norm=grad_norm)

        return optax.GradientTransformationExtraArgs(tx.init, update), schedule

    def program(make: Any) -> str:
        step = make_train_step(network, objective, make, UpdateOptions())
        return str(jax.make_jaxpr(step)(built.abstract, batch, jnp.float32(0.1)))

    assert program(deaf) == program(choose_optimizer(config, built.abstract["params"])[0])


def _network(config: Any) -> Any:
    from flax import nnx

    from models.objectives import make_objective
    from runner.train.split_model import split_model

    sources = config.data.sources()
    network = split_model(
        lambda: config.model.build(sources.inputs, sources.num_outputs, nnx.Rngs(0)), lambda model: None
    )
    return network, make_objective("classify")


def test_a_sweep_over_the_learning_rate_compiles_once() -> None:
    def program(lr: float) -> str:
        built = build(composed(*MLP, "optim=external", "optim.target=mine:anchored", f"optim.lr={lr}"))
        return built.train_step.trace(built.abstract, next(built.stream)).lower().as_text()

    assert program(1e-3) == program(3e-3)


def test_the_learning_rate_is_no_number() -> None:
    rate = LearningRate(lambda step: 0.1)
    assert not rate.is_used
    assert rate(3) == 0.1
    assert rate.is_used
    for wrong in (lambda: -rate, lambda: 2 * rate, lambda: float(rate), lambda: rate / 3):
        with pytest.raises(TypeError, match=r"^the learning rate is a function of the step, and no number; call it"):
            wrong()


def test_what_it_is_made_of_is_the_run() -> None:
    assert (
        classify_key("optim.target") == classify_key("optim.options.b1") == classify_key("optim.options") == "identity"
    )
    assert (
        classify_key("optim.lr") == classify_key("schedule.target") == classify_key("schedule.options") == "resumable"
    )


# --- what does not fit ---

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "mine:number",
        {},
        r"mine:number: is a value of type int; expected an optax.GradientTransformation, or a function",
    ),
    ("mine:three", {}, r"mine:three: made a value of type int; expected an optax.GradientTransformation"),
    ("mine:pair", {}, r"mine:pair: made a tuple of function, function; expected an optax.GradientTransformation"),
    ("mine:none", {}, r"mine:none: made a value of type NoneType; expected an optax.GradientTransformation"),
    ("mine:raises", {}, r"mine:raises: ValueError: my own \(mine.py, line \d+\); HYDRA_FULL_ERROR=1 shows"),
    ("mine:ends", {}, r"mine:ends: it ends Python \(SystemExit: 3\); return or raise"),
    ("mine:negates", {}, r"mine:negates: TypeError: the learning rate is a function of the step, .* \(mine.py, line"),
    ("mine:asks", {}, r"mine:asks: TypeError: asks\(\) missing 1 required positional argument: 'width' \(mine\)"),
    ("mine:bad_init", {}, r"mine:bad_init: KeyError: 'nothing' \(mine.py, line \d+\)"),
    ("mine:text_state", {}, r"mine:text_state: its init gave a value of type str at name; expected arrays"),
    ("mine:bad_update", {}, r"mine:bad_update: KeyError: 'nothing' \(mine.py, line \d+\)"),
    ("mine:branches", {}, r"mine:branches: TracerBoolConversionError: .* \(mine.py, line \d+\)"),
    (
        "mine:updates_alone",
        {},
        r"mine:updates_alone: its update gave a value of type dict; expected a tuple of updates",
    ),
    ("mine:fewer", {}, r"mine:fewer: its updates are not like the parameters: got nothing at b; expected float32\[2\]"),
    ("mine:shapes", {}, r"mine:shapes: its updates are not .*: got float32\[\] at a.kernel; expected float32\[3,2\]"),
    (
        "mine:grows",
        {},
        r"mine:grows: its update changes the state, .*: got float32\[2\] at its top; expected float32\[1\]",
    ),
    (
        "mine:changes_type",
        {},
        r"mine:changes_type: its update changes the state, .*: got float32\[\] .*; expected int32",
    ),
    (
        "mine:other_state",
        {},
        r"mine:other_state: its update changes the state, .*: got nothing at x; expected float32\[2",
    ),
    (
        "mine:other_argument",
        {},
        r"mine:other_argument: TypeError: .*missing 1 required keyword-only argument: 'hessian'",
    ),
    ("optax:rprop", {}, r"optax:rprop: TypeError: .* \(optax\); HYDRA_FULL_ERROR=1 shows the whole traceback"),
    ("optax:adamw", {"b1": "x"}, r"optax:adamw: TypeError: .* \(optax\); HYDRA_FULL_ERROR=1 shows"),
]


@pytest.mark.parametrize(("target", "options", "line"), WRONG, ids=[target for target, _, _ in WRONG])
def test_a_misfit_is_one_line(target: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^optim.target: {line}") as raised:
        chosen(target, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", ["mine:noisy", "mine:masked", "mine:keyed"])
def test_one_that_is_another_each_time_is_told(target: str) -> None:
    """What is drawn while it is made is drawn again by the next attempt."""
    _, warnings = chosen(target)
    assert [line.startswith(f"{target}: makes another program each time") for line in warnings] == (
        [] if target == "mine:keyed" else [True]
    )


def test_options_are_for_functions() -> None:
    with pytest.raises(
        ConfigError, match=r"^optim.options.b1: mine:finished is a finished object, which is called with"
    ):
        chosen("mine:finished", b1=0.8)
    with pytest.raises(ConfigError, match=r"^optim.options.b11: optax:adamw has no such option; did you mean b1"):
        build(composed(*MLP, "optim=external", "optim.target=optax:adamw", "+optim.options.b11=0.8"))


def test_who_wants_the_traceback_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"^my own"):
        chosen("mine:raises")


def test_an_update_takes_only_what_it_names() -> None:
    tx = make_user_transformation("mine:on_value", {}, lambda step: 1.0)
    updates, _ = tx.update({"w": jnp.ones(2)}, (), None, value=2.0, grad=3.0, value_fn=None)
    np.testing.assert_array_equal(updates["w"], -2.0)
    plain = make_user_transformation("mine:only_value", {}, lambda step: 1.0)
    assert plain.update({"w": jnp.ones(2)}, (), None, value=2.0, grad=3.0)[0]["w"][0] == -2.0


# --- whole runs ---

RUN = (
    *("model=mlp", "model.width=16", "data=synthetic", "data.gives=features", "data.batch_size=8", "train.steps=30"),
    *(
        "train.log_steps=1",
        "train.eval_steps=10",
        "train.eval_batches=2",
        "ckpt=periodic",
        "ckpt.save.periodic.steps=5",
    ),
    *("log.tensorboard=false", "optim=./mine.py:anchored", "+optim.options.pull=0.5", "optim.ema=0.9"),
    *(
        "schedule=optax:warmup_cosine_decay_schedule",
        "+schedule.options.init_value=0",
        "+schedule.options.warmup_steps=9",
    ),
)


def test_killed_is_uninterrupted(served: Forks, tmp_path: Path) -> None:
    untouched, struck = Door(tmp_path / "untouched"), Door(tmp_path / "struck")
    for door in (untouched, struck):
        door.cwd.mkdir()
        (door.cwd / "mine.py").write_text(MINE)
    done = served.run(untouched.cwd, *RUN)
    assert done.returncode == 0, done.stdout
    killed = served.run(struck.cwd, *RUN, kill_at=13)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    finished = served.run(struck.cwd, *RUN)
    assert finished.returncode == 0, finished.stdout
    assert_same(struck.the_run, untouched.the_run, 30)
    endings = [json.loads(line) for line in (struck.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [(line["ending"], line["from_step"]) for line in endings] == [("killed", 0), ("finished", 10)]
    # Evaluated and continued as it is; its options are part of what the run is.
    run = f"dir={struck.the_run}"
    evaluated = served.run(struck.cwd, run, "train.steps=0", "--trust")
    assert evaluated.returncode == 0, evaluated.stdout
    refused = served.run(struck.cwd, run, "train.steps=40", "optim.options.pull=0.1", "--trust")
    assert refused.returncode == 3, refused.stdout
    assert "optim.options.pull" in refused.stdout
    longer = served.run(struck.cwd, run, "train.steps=40", "schedule=cosine", "--trust")
    assert longer.returncode == 0, longer.stdout
