"""Choose how updates are made. A user's own optimizer or schedule is tried on shapes first: a misfit is one line.

Nothing is compiled, but for a schedule of the user's own, which is asked for a few learning rates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from runner.config.schema import Config
from runner.config.user_code import as_config_error
from runner.errors import ConfigError
from runner.optim.grouped_updates import build_optimizer, check_groups
from runner.optim.schedules import ExternalSchedule
from runner.optim.user_optimizer import LearningRate
from runner.optim.user_schedule import takes_learning_rate
from runner.trace.trace_digest import digest_trace
from runner.train.split_model import READS_VALUES
from runner.train.step import MakeOptimizer
from runner.types import Params, Tree

MakeGuarded: TypeAlias = Callable[[Any], tuple[optax.GradientTransformation, LearningRate]]


def choose_optimizer(config: Config, params: Params) -> tuple[MakeOptimizer, tuple[str, ...]]:
    """Return how the optimizer is made for a learning rate, and what is to be told of it, one line each.

    Args:
        config: with an optimizer and a schedule.
        params: the parameters, abstract.

    Raises:
        ConfigError: the user's own optimizer or schedule is none.
    """
    optim, schedule = _get_targets(config)
    check_groups(getattr(config.optim, "groups", {}), params)
    if not optim and not schedule:
        return partial(_make_optimizer, config), ()
    make: MakeGuarded = partial(_make_guarded, config)
    if _reads_learning_rate(config, params):
        # Of a number that is not known yet nothing can be read: it becomes part of the program.
        known = make(config.optim.lr)
        make = lambda lr: known  # noqa: E731 - a function of its own would say no more
    asked = _try_optimizer(make, config, params)
    told = []
    if _digest_program(config, params) != _digest_program(config, params):
        told.append(
            f"{optim or schedule}: makes another program each time (with random numbers of Python's or numpy's?), so a "
            "run that is continued is not what it would have been; draw them with jax.random and a fixed key"
        )
    if optim and not asked:
        told.append(f"{optim}: asks for no learning rate: optim.lr and schedule do not touch it, and no lr is logged")
        return lambda lr: (make(lr)[0], None), tuple(told)
    if isinstance(config.schedule, ExternalSchedule):
        _check_rates(config, config.schedule.target)
        if not takes_learning_rate(config.schedule.target, config.schedule.options):
            told.append(f"{schedule}: takes no learning rate: optim.lr does not touch it")
    return make, tuple(told)


def _make_optimizer(config: Config, lr: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    schedule = config.schedule.build(lr, config.train.num_steps)
    return build_optimizer(config.optim, schedule), schedule


def _make_guarded(config: Config, lr: Any) -> tuple[optax.GradientTransformation, LearningRate]:
    """Make the optimizer so that what the user's code raises, whenever it is called, is one line with its place."""
    optim, target = _get_targets(config)
    with as_config_error("schedule", target, anywhere=True):
        schedule = config.schedule.build(lr, config.train.num_steps)

    def find_rate(step: Any) -> Any:
        with as_config_error("schedule", target, anywhere=True):
            return schedule(step)

    rate = LearningRate(find_rate)
    if optim is None:
        return build_optimizer(config.optim, rate), rate
    with as_config_error("optim", optim, anywhere=True):
        tx = optax.with_extra_args_support(config.optim.build(rate))

    def init(params: Params) -> Tree:
        own = {id(leaf) for leaf in jax.tree.leaves(params)}
        with as_config_error("optim", optim, anywhere=True):
            state = tx.init(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
                raise ConfigError(
                    f"optim.target: {optim}: its init gave a value of type {type(leaf).__name__} at "
                    f"{_write_path(path)}; expected arrays"
                )
        # A step is given the memory of the whole state: what is in it twice would be given away twice.
        return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in own else jnp.asarray(leaf), state)

    def update(grads: Params, state: Tree, params: Params | None = None, **extra: Any) -> tuple[Params, Tree]:
        with as_config_error("optim", optim, anywhere=True):
            result = tx.update(grads, state, params, **extra)
        # A dictionary of two parameters could be taken apart as well.
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigError(
                f"optim.target: {optim}: its update gave a value of type {type(result).__name__}; expected a tuple of "
                "updates and the next state"
            )
        return result

    return optax.GradientTransformationExtraArgs(init, update), rate


def _reads_learning_rate(config: Config, params: Params) -> bool:
    """Return whether the user's code reads the number of the learning rate, as `float(lr)` does."""

    def attempt(lr: jax.Array, params: Params) -> Tree:
        tx, schedule = _make_optimizer(config, lr)
        return _update_once(tx, params), schedule(jnp.zeros((), jnp.int32))

    try:
        jax.eval_shape(attempt, jax.ShapeDtypeStruct((), jnp.float32), params)
    except READS_VALUES:
        return True
    # Whatever else is wrong is told by who tries it next.
    except (Exception, SystemExit):
        return False
    return False


def _update_once(tx: optax.GradientTransformation, params: Params) -> tuple[Tree, Params, Tree]:
    """Return the state before and after an update, and the updates; for gradients and values that mean nothing."""

    def add_up(params: Params) -> jax.Array:
        return sum((jnp.real(leaf).sum().astype(jnp.float32) for leaf in jax.tree.leaves(params)), jnp.float32(0))

    before = tx.init(params)
    updates, after = optax.with_extra_args_support(tx).update(
        params, before, params, value=add_up(params), grad=params, value_fn=add_up
    )
    return before, updates, after


def _try_optimizer(make: MakeGuarded, config: Config, params: Params) -> bool:
    """Call the optimizer as training will, on shapes alone, and return whether it asks for the learning rate.

    Raises ConfigError where it cannot be called so, or where updates or state are not what a step needs.
    """
    target = _get_targets(config)[0]
    asked: list[bool] = []

    def attempt(lr: jax.Array, params: Params) -> tuple[Tree, Params, Tree]:
        tx, rate = make(lr)
        tried = _update_once(tx, params)
        asked.append(rate.is_used)
        rate(jnp.zeros((), jnp.int32))
        return tried

    # What is no array in the state of an optimizer is refused by jax itself.
    with as_config_error("optim", target, anywhere=True):
        before, updates, after = jax.eval_shape(attempt, jax.ShapeDtypeStruct((), jnp.float32), params)
    if target:
        _refuse_difference(target, "its updates are not like the parameters", _list_types(params), _list_types(updates))
        found = "its update changes the state, and every step has the same"
        _refuse_difference(target, found, _list_types(before), _list_types(after))
    return asked[0]


def _digest_program(config: Config, params: Params) -> str:
    """Return what an optimizer, made afresh, computes in an update, as a digest of its program and its constants."""
    tx, rate = _make_guarded(config, config.optim.lr)
    return digest_trace(
        jax.make_jaxpr(lambda params: (_update_once(tx, params), rate(jnp.zeros((), jnp.int32))))(params)
    )


def _refuse_difference(target: str, found: str, expected: dict[str, str], got: dict[str, str]) -> None:
    """Raise ConfigError where two trees differ, with the first difference."""
    for path in [*expected, *got]:
        if expected.get(path) != got.get(path):
            wanted, given = expected.get(path, "nothing"), got.get(path, "nothing")
            raise ConfigError(f"optim.target: {target}: {found}: got {given} at {path}; expected {wanted}")


def _list_types(tree: Tree) -> dict[str, str]:
    """Return what each array of a tree is, by its path: `{"head.kernel": "float32[4,3]"}`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_write_path(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves}


def _write_path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "its top"


def _check_rates(config: Config, target: str) -> None:
    """Raise ConfigError where a schedule of the user's own gives no learning rate at the first, middle or last step."""
    last = config.train.num_steps - 1
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        rate = _make_guarded(config, config.optim.lr)[1]
        for step in dict.fromkeys((0, last // 2, last)):
            value = float(np.asarray(rate(jnp.asarray(max(step, 0), jnp.int32))))
            if not (np.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"schedule.target: {target}: gives {value:g} at step {step}; expected a learning rate of 0 or more"
                )


def _get_targets(config: Config) -> tuple[str | None, str | None]:
    """Return the targets of the optimizer and of the schedule; None for what is ours."""
    return getattr(config.optim, "target", None), getattr(config.schedule, "target", None)
