"""A user's own learning-rate schedule: called by the names of its parameters, and checked to give a number per step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.user_target import import_target, restore_number_keys
from models.user_arguments import initializer_of
from runner.errors import ConfigError

if TYPE_CHECKING:
    import optax

# What gets optim.lr: the first of these that a target has, for a warm-up begins at one rate and ends at another.
RATE_NAMES = (
    *("lr", "learning_rate", "base_lr", "base_learning_rate", "base_value"),
    *("peak_value", "peak_lr", "peak_learning_rate", "max_lr", "max_learning_rate", "max_value"),
    *("init_value", "init_lr", "initial_lr", "initial_learning_rate", "value"),
)
LENGTH_NAMES = (
    *("num_steps", "total_steps", "train_steps", "num_train_steps", "training_steps", "max_steps", "n_steps"),
    *("decay_steps", "transition_steps"),
)
# A target whose first parameter is called so is the schedule, and makes none.
STEP_NAMES = ("step", "count")


@dataclass(frozen=True)
class ScheduleArguments:
    """How a target is called.

    Attributes:
        rate: the parameter that gets optim.lr; None where none does.
        lengths: the parameters that get train.steps.
        positional: the parameters that have no name in a call.
        is_schedule: whether it is called with each step, and not once.
        missing: a parameter that nothing is known for.
    """

    rate: str | None = None
    lengths: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    is_schedule: bool = False
    missing: str | None = None


def make_user_schedule(target: str, options: Mapping[str, Any], lr: Any, num_steps: int) -> optax.Schedule:
    """Return the learning rate by completed steps, as `target` says it.

    Raises ConfigError where it asks for what it does not get, or makes no function.
    """
    function = import_target(target)
    arguments = read_schedule_arguments(function, options)
    if arguments.missing:
        raise ConfigError(
            f"schedule.target: {target}: it asks for {arguments.missing}; give it as "
            f"+schedule.options.{arguments.missing}=…"
        )
    named = dict.fromkeys(arguments.lengths, num_steps) | ({arguments.rate: lr} if arguments.rate else {})
    named = {**named, **restore_number_keys(options)}
    positional = [named.pop(name) for name in arguments.positional if name in named]
    if arguments.is_schedule:
        return _check_rates(target, lambda step: function(step, *positional, **named))
    made = function(*positional, **named)
    if not callable(made):
        # Named by its type alone: the number itself may be one that is not known yet.
        raise ConfigError(
            f"schedule.target: {target}: made {_describe(made)}; expected a function of the step (where it is that "
            "function itself, call its first parameter `step`)"
        )
    return _check_rates(target, made)


def read_schedule_arguments(function: Any, options: Mapping[str, Any]) -> ScheduleArguments:
    """Return how a target is called, by the names of its parameters and of the options that are given."""
    try:
        parameters = dict(inspect.signature(initializer_of(function)).parameters)
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return ScheduleArguments()
    first = next(iter(parameters), None)
    is_schedule = first in STEP_NAMES and first not in options
    if is_schedule:
        del parameters[str(first)]
    parameters = {
        name: each for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    rate = next((name for name in RATE_NAMES if name in parameters), None)
    # What is given as an option is not given again, nor is another one in its place.
    rate = None if rate in options else rate
    lengths = tuple(name for name in LENGTH_NAMES if name in parameters and name not in options)
    known = {rate, *lengths, *options}
    return ScheduleArguments(
        rate=rate,
        lengths=lengths,
        positional=tuple(name for name, each in parameters.items() if each.kind is each.POSITIONAL_ONLY),
        is_schedule=is_schedule,
        missing=next(
            (name for name, each in parameters.items() if each.default is each.empty and name not in known), None
        ),
    )


def takes_learning_rate(target: str, options: Mapping[str, Any]) -> bool:
    """Return whether a target gets optim.lr."""
    return read_schedule_arguments(import_target(target), options).rate is not None


def _check_rates(target: str, schedule: Callable[[Any], Any]) -> optax.Schedule:
    """Return the schedule with a check of what it gives: a real number for a step. Raises ConfigError."""

    def find_rate(step: Any) -> Any:
        import jax.numpy as jnp
        import numpy as np

        rate = schedule(step)
        dtype = getattr(rate, "dtype", None)
        is_number = type(rate) in (int, float) or (
            dtype is not None
            and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))
            and np.shape(rate) in ((), np.shape(step))
        )
        if not is_number:
            raise ConfigError(
                f"schedule.target: {target}: gives {_describe(rate)} for a step; expected one number, the learning rate"
            )
        return rate

    return find_rate


def _describe(value: Any) -> str:
    """Return what a value is, for an error message."""
    if callable(value):
        return "a function"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return type(value).__name__
    return f"one number of {dtype}" if shape == () else f"an array of {dtype} and shape {tuple(shape)}"
