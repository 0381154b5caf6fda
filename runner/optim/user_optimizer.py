"""A user's own optimizer, or one of a library: called with the schedule, and checked to be one of optax's kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from data.user_target import import_target, restore_number_keys
from models.user_arguments import initializer_of
from runner.errors import ConfigError

if TYPE_CHECKING:
    import optax

# A parameter of one of these names gets the schedule, wherever it stands and also where it has a default.
SCHEDULE_NAMES = ("learning_rate", "schedule", "lr", "lr_schedule", "learning_rate_schedule", "learning_rate_fn")
# What an update may ask for beside gradients, state and parameters, as optax calls it.
EXTRA_ARGUMENTS = ("value", "grad", "value_fn")


class LearningRate:
    """A schedule that notes whether it was asked: an optimizer that never does is not moved by a learning rate."""

    def __init__(self, schedule: optax.Schedule):
        self._schedule = schedule
        self.is_used = False

    def __call__(self, step: Any) -> Any:
        """Return the learning rate after so many steps."""
        self.is_used = True
        return self._schedule(step)

    def _refuse_arithmetic(self, *_: Any) -> NoReturn:
        raise TypeError("the learning rate is a function of the step, and no number; call it, or hand it to optax")

    __neg__ = __float__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse_arithmetic
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse_arithmetic


def make_user_transformation(
    target: str, options: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that `target` is or makes. Raises ConfigError where it is none, and makes none."""
    import optax

    found = import_target(target)
    if callable(found):
        positional, named = _bind_schedule(found, restore_number_keys(options), schedule)
        made, verb = found(*positional, **named), "made"
    else:
        made, verb = found, "is"
        if options:
            raise ConfigError(
                f"optim.options.{next(iter(options))}: {target} is a finished object, which is called with nothing; "
                "leave the options out, or name a function that makes it"
            )
    # optax.MultiSteps is none itself, but has one.
    finish = getattr(made, "gradient_transformation", None)
    if callable(finish) and not inspect.isclass(made):
        made = finish()
    if not isinstance(made, optax.GradientTransformation):
        raise ConfigError(
            f"optim.target: {target}: {verb} {_describe(made)}; expected an optax.GradientTransformation"
            + ("" if verb == "made" else ", or a function that makes one")
        )
    return _accept_extra_arguments(made)


def _bind_schedule(
    function: Any, options: Mapping[str, Any], schedule: optax.Schedule
) -> tuple[list[Any], dict[str, Any]]:
    """Return what a target is called with: the schedule by its name, or as the first that it asks for, and options."""
    try:
        parameters = inspect.signature(initializer_of(function)).parameters
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return [schedule], dict(options)
    name = next((name for name in SCHEDULE_NAMES if name in parameters), None)
    if name is None:
        # By its place: what is left to a default is an option, and none that a schedule would be taken for.
        first = next(iter(parameters.values()), None)
        if (
            first
            and first.default is first.empty
            and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        ):
            name = first.name
    if name is None or name in options:
        return [], dict(options)
    if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
        return [schedule], dict(options)
    return [], {name: schedule, **options}


def _accept_extra_arguments(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return a transformation whose update is given what it asks for of EXTRA_ARGUMENTS, and no more."""
    import optax

    try:
        parameters = inspect.signature(tx.update).parameters
    except (TypeError, ValueError):
        return optax.with_extra_args_support(tx)
    takes_all = isinstance(tx, optax.GradientTransformationExtraArgs) and any(
        each.kind is each.VAR_KEYWORD for each in parameters.values()
    )
    wanted = [name for name in EXTRA_ARGUMENTS if takes_all or name in parameters]

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        return tx.update(updates, state, params, **{name: given[name] for name in wanted if name in given})

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _describe(value: Any) -> str:
    """Return what a value is, for an error message."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"a tuple of {', '.join(type(each).__name__ for each in value) or 'nothing'}"
    return "a function" if inspect.isfunction(value) else f"a value of type {type(value).__name__}"
