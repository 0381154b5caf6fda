"""A program of the user's own: made as its target asks, and checked to have the functions that a run calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from models import InvalidModelOrObjective
from models.objectives import describe_value
from models.user_arguments import Wanted, bind_by_name
from models.user_model import find_target

# What each function is called with.
FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "init": ("key", "example"),
    "step": ("state", "batch", "key"),
    "evaluate": ("state", "batch"),
    "sample": ("state", "key"),
}
REQUIRED = ("init", "step")
# Top-level parts of a state that are called so are its weights, where the program does not say which are.
USUAL_WEIGHTS = ("params", "batch_stats", "model", "weights")


@dataclass(frozen=True)
class UserProgram:
    """The functions of a program; `evaluate` and `sample` are None where it has none.

    Attributes:
        target: what the user calls it.
        init: (key, example) → state.
        step: (state, batch, key) → (state, metrics).
        evaluate: (state, batch) → metrics.
        sample: (state, key) → pictures or text.
        weights: names of the top-level parts of the state that are what is learnt, as the program says; None: it does
            not say.
        made: the user's own object.
    """

    target: str
    init: Callable[..., Any]
    step: Callable[..., Any]
    evaluate: Callable[..., Any] | None
    sample: Callable[..., Any] | None
    weights: tuple[str, ...] | None
    made: Any


def make_user_program(target: str, options: Mapping[str, Any], wanted: Wanted) -> UserProgram:
    """Return the program that `target` names, or makes with these options.

    A parameter that is called `inputs`, `num_classes`, `num_steps` and the like gets what its name says.

    Raises InvalidModelOrObjective where it asks for what it does not get, or lacks a function.
    """
    found = find_target(target)
    if inspect.isclass(found) or (callable(found) and not hasattr(found, "step")):
        positional, named = bind_by_name(found, options, wanted)
        made = found(*positional, **named)
    elif options:
        raise InvalidModelOrObjective(
            f"{target}: is {describe_value(found)} that was made on import, and takes no options; name its class"
        )
    else:
        made = found
    functions = {name: _find_function(target, made, name) for name in FUNCTIONS}
    return UserProgram(target, **functions, weights=_read_weights(target, made), made=made)  # type: ignore[arg-type]


def _find_function(target: str, made: Any, name: str) -> Callable[..., Any] | None:
    function, arguments = getattr(made, name, None), FUNCTIONS[name]
    if function is None and name not in REQUIRED:
        return None
    if function is None:
        near = get_close_matches(name, [each for each in dir(made) if not each.startswith("_")], 1, 0.5)
        hint = f"; did you mean that by {near[0]}?" if near else ""
        raise InvalidModelOrObjective(
            f"{target}: {describe_value(made)} has no function {name}({', '.join(arguments)}){hint}"
        )
    if not callable(function):
        raise InvalidModelOrObjective(
            f"{target}: {name} is {describe_value(function)}; expected a function {name}({', '.join(arguments)})"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return function
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InvalidModelOrObjective(
            f"{target}: {name}{signature} cannot be called as {name}({', '.join(arguments)}): {error}"
        ) from None
    return function


def _read_weights(target: str, made: Any) -> tuple[str, ...] | None:
    given = getattr(made, "weights", None)
    if given is None or callable(given):
        return None
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise InvalidModelOrObjective(
            f"{target}: weights is {describe_value(given)}; expected names of parts of the state, as ('params',)"
        )
    return tuple(names)
