"""Schedules of the user's own and of libraries: called by the names of their parameters, or refused in a line."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runner.config.schema import validate_config
from runner.config.user_code import import_targets
from runner.errors import ConfigError
from runner.optim.schedules import ExternalSchedule
from runner.train.build import build
from runner.train.rehearse_optimizer import choose_optimizer
from tests.config.test_config import changed
from tests.conftest import Door, composed
from tests.laws.faults import Forks

MINE = """
import math
import jax.numpy as jnp
import numpy as np

def halves(step, lr, every=10): return lr * 0.5 ** (step // every)
def falls(step, peak_lr, total_steps): return peak_lr * (1 - step / total_steps)
def own(step): return 0.25
def by_position(count, lr, /, num_steps): return lr * (1 - count / num_steps)
def makes(learning_rate, num_train_steps, power=1.0):
    return lambda count: learning_rate * (1 - count / num_train_steps) ** power
def reads(lr, num_steps):
    top = float(lr)
    return lambda step: top * math.exp(-1) * jnp.ones(())
def reads_each(step, lr): return lr if lr > 1e-6 else 0.0
def whole(step): return 1
class Ramp:
    def __init__(self, lr, num_steps): self.lr, self.num_steps = lr, num_steps
    def __call__(self, step): return self.lr * step / self.num_steps
ramp = Ramp(0.5, 10)

number = 3
def raises(lr): raise ValueError("my own")
def raises_each(step): raise ValueError("my own")
def ends(lr): raise SystemExit(3)
def no_function(lr): return lr
def nothing(lr): pass
def unknown(lr, width): return lambda step: lr
def none(step): pass
def text(step): return "0.1"
def two(step): return jnp.ones(2)
def truth(step): return step > 3
def complexly(step): return 1j * jnp.ones(())
def branches(step, lr): return lr if step < 3 else 0.0
def cosine(step, lr): return lr * math.cos(step)
def divides(step, lr): return lr / jnp.sqrt(step)
def negative(step, lr, num_steps): return lr * (0.5 - step / num_steps)
def late(step, lr): return jnp.where(step > 5, jnp.nan, lr)
def two_arguments(lr): return lambda step, more: lr
"""
MLP = ("model=mlp", "model.width=16", "data=synthetic", "data.gives=features", "data.batch_size=8", "train.steps=20")
PARAMS = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
LR, STEPS = 0.01, 20
ALONE = "takes no learning rate: optim.lr does not touch it"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mine", None)


def chosen(target: str, **options: Any) -> Any:
    """How the optimizer is made under a schedule, and what is told of it."""
    external = {"kind": "external", "target": target, "options": options}
    config = validate_config(changed(schedule=external, optim__lr=LR, train__steps=STEPS))
    import_targets(config)
    return choose_optimizer(config, PARAMS)


def rates(target: str, **options: Any) -> np.ndarray[Any, Any]:
    """The learning rate of every step, as a compiled step finds it, given the rate as its argument."""
    make, _ = chosen(target, **options)
    find = jax.jit(lambda lr, step: jnp.asarray(make(lr)[1](step), jnp.float32))
    return np.asarray([find(jnp.float32(LR), jnp.int32(step)) for step in range(STEPS)])


STEP = np.arange(STEPS)
RIGHT = [
    ("mine:halves", {}, LR * 0.5 ** (STEP // 10)),
    ("mine:halves", {"every": 5}, LR * 0.5 ** (STEP // 5)),
    ("mine:falls", {}, LR * (1 - STEP / STEPS)),
    ("mine:falls", {"total_steps": 40}, LR * (1 - STEP / 40)),
    ("mine:by_position", {}, LR * (1 - STEP / STEPS)),
    ("mine:makes", {"power": 2.0}, LR * (1 - STEP / STEPS) ** 2),
    ("mine:Ramp", {}, LR * STEP / STEPS),
    ("mine:reads", {}, np.full(STEPS, LR * math.exp(-1))),
    ("mine:reads_each", {}, np.full(STEPS, LR)),
    ("optax:constant_schedule", {}, np.full(STEPS, LR)),
    ("optax:cosine_decay_schedule", {"alpha": 0.1}, optax.cosine_decay_schedule(LR, STEPS, 0.1)(STEP)),
    ("optax:linear_schedule", {"end_value": 0.0}, LR * (1 - STEP / STEPS)),
    ("optax:exponential_decay", {"decay_rate": 0.5}, LR * 0.5 ** (STEP / STEPS)),
    # As text they would be sorted otherwise, and be no numbers. A document has them as text.
    (
        "optax:piecewise_constant_schedule",
        {"boundaries_and_scales": {5: 0.5, 10: 0.1}},
        optax.piecewise_constant_schedule(LR, {5: 0.5, 10: 0.1})(STEP),
    ),
    (
        "optax:warmup_cosine_decay_schedule",
        {"init_value": 0.0, "warmup_steps": 10},
        optax.warmup_cosine_decay_schedule(0.0, LR, 10, STEPS)(STEP),
    ),
]


@pytest.mark.parametrize(("target", "options", "expected"), RIGHT, ids=[f"{one} {two}" for one, two, _ in RIGHT])
def test_parameters_get_what_their_names_say(target: str, options: dict[str, Any], expected: Any) -> None:
    assert chosen(target, **options)[1] == ()
    np.testing.assert_allclose(rates(target, **options), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("target", "options", "first"),
    [("mine:own", {}, 0.25), ("mine:whole", {}, 1.0), ("mine:ramp", {}, 0.0), ("mine:halves", {"lr": 0.5}, 0.5)],
)
def test_one_with_no_use_for_the_learning_rate_is_told(target: str, options: dict[str, Any], first: float) -> None:
    assert chosen(target, **options)[1] == (f"{target}: {ALONE}",)
    assert rates(target, **options)[0] == first


def test_it_has_no_warm_up_of_ours() -> None:
    assert [field.name for field in fields(ExternalSchedule)] == ["kind", "target", "options"]
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps: unknown key"):
        validate_config(changed(schedule={"kind": "external", "target": "mine:own", "warmup_steps": 3}))


def test_a_sweep_over_the_learning_rate_compiles_once_where_the_number_is_not_read() -> None:
    def program(target: str, lr: float) -> str:
        words = ("schedule=external", f"schedule.target={target}", f"optim.lr={lr}")
        built = build(composed(*MLP, *words))
        return built.train_step.trace(built.abstract, next(built.stream)).lower().as_text()

    assert program("mine:makes", 1e-3) == program("mine:makes", 3e-3)
    assert program("mine:reads", 1e-3) != program("mine:reads", 3e-3)


def test_the_state_is_that_under_every_other_schedule() -> None:
    """So a run is continued under one of the user's own, and back."""
    theirs = chosen("mine:halves")[0](LR)[0]
    ours = choose_optimizer(validate_config(changed(optim__lr=LR)), PARAMS)[0](LR)[0]
    assert jax.eval_shape(theirs.init, PARAMS) == jax.eval_shape(ours.init, PARAMS)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("mine:number", {}, r"mine:number is of type int; expected a class or a function"),
    ("mine:raises", {}, r"mine:raises: ValueError: my own \(mine.py, line \d+\); HYDRA_FULL_ERROR=1 shows"),
    ("mine:raises_each", {}, r"mine:raises_each: ValueError: my own \(mine.py, line \d+\)"),
    ("mine:ends", {}, r"mine:ends: it ends Python \(SystemExit: 3\); return or raise"),
    ("mine:no_function", {}, r"mine:no_function: made .*; expected a function of the step"),
    ("mine:nothing", {}, r"mine:nothing: made NoneType; expected a function of the step"),
    ("mine:unknown", {}, r"mine:unknown: it asks for width; give it as \+schedule.options.width=…"),
    ("optax:warmup_cosine_decay_schedule", {}, r".*: it asks for init_value; give it as \+schedule.options.init_value"),
    ("mine:none", {}, r"mine:none: gives NoneType for a step; expected one number, the learning rate"),
    ("mine:text", {}, r"mine:text: gives str for a step; expected one number"),
    ("mine:two", {}, r"mine:two: gives an array of float32 and shape \(2,\) for a step; expected one number"),
    ("mine:truth", {}, r"mine:truth: gives one number of bool for a step; expected one number"),
    ("mine:complexly", {}, r"mine:complexly: gives one number of complex64 for a step"),
    ("mine:branches", {}, r"mine:branches: TracerBoolConversionError: .* \(mine.py, line \d+\)"),
    ("mine:cosine", {}, r"mine:cosine: .* \(mine.py, line \d+\)"),
    ("mine:divides", {}, r"mine:divides: gives inf at step 0; expected a learning rate of 0 or more"),
    ("mine:negative", {}, r"mine:negative: gives -0.0045 at step 19; expected a learning rate of 0 or more"),
    ("mine:late", {}, r"mine:late: gives nan at step 9; expected a learning rate"),
    ("mine:two_arguments", {}, r"mine:two_arguments: TypeError: .* \(mine\)"),
    (
        "optax:cosine_decay_schedule",
        {"decay_steps": -3},
        r"optax:cosine_decay_schedule: ValueError: .* \(optax\); HYDRA",
    ),
]


@pytest.mark.parametrize(("target", "options", "line"), WRONG, ids=[target for target, _, _ in WRONG])
def test_a_misfit_is_one_line(target: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^schedule.target: {line}") as raised:
        chosen(target, **options)
    assert "\n" not in str(raised.value)


def test_a_finished_optimizer_follows_none() -> None:
    config = validate_config(
        changed(
            schedule={"kind": "external", "target": "mine:own"},
            optim={"kind": "external", "target": "optax:identity", "lr": LR},
        )
    )
    (line,) = choose_optimizer(config, PARAMS)[1]
    assert "optax:identity: asks for no learning rate: optim.lr and schedule do not touch it" in line


def test_a_run_is_told_what_does_not_move_it(served: Forks, tmp_path: Path) -> None:
    door = Door(tmp_path)
    words = ("schedule=mine:own", "log.tensorboard=false", "train.log_steps=5", *MLP)
    done = served.run(door.cwd, *words)
    assert done.returncode == 0, done.stdout
    assert f"warning: mine:own: {ALONE}" in done.stdout
    assert '"lr":0.25' in (door.the_run / "logs/metrics.jsonl").read_text().replace(" ", "")
