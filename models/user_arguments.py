"""Which arguments a user's own model is made with: by position, as the documentation asks, or by the names they have.

    target(inputs, num_outputs, rngs=rngs, **options)

is the rule. A published class was not written for it, but what its parameters are called says what they want: the
number of classes, the features of an input, random numbers. What no name says has to be given as an option.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_origin, get_type_hints

from models import InvalidModelOrObjective

SHAPE_NAMES = ("inputs", "input_shape", "in_shape")
FEATURE_NAMES = (
    *("in_features", "in_channels", "in_chans", "in_dim", "din", "dim_in"),
    *("input_dim", "input_size", "input_channels", "num_inputs", "n_inputs"),
)
CLASS_NAMES = (
    *("num_outputs", "num_classes", "n_classes", "nb_classes", "num_labels", "n_labels"),
    *("out_features", "out_dim", "dout", "dim_out", "output_dim", "output_size", "n_outputs"),
)
STEP_NAMES = ("num_steps", "total_steps", "train_steps", "num_train_steps", "max_steps")
VOCABULARY_NAMES = ("vocab_size", "n_vocab", "vocabulary_size")


@dataclass(frozen=True)
class Wanted:
    """Hold what a model, or a program, is made for.

    Attributes:
        inputs: the shape of one example; None where there is no data.
        num_outputs: the number of classes, or the size of the vocabulary.
        rngs: random numbers (`nnx.Rngs`); None where there are none to be had.
        num_steps: the number of updates, for who makes a schedule of its own; None where nobody asks.
        part: the part of the configuration that has its options.
    """

    inputs: tuple[int, ...] | None
    num_outputs: int
    rngs: Any = None
    num_steps: int | None = None
    part: str = "model"

    def find(self, name: str, names: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what a parameter of this name gets, or nothing; `names` are all that there are beside it."""
        if name in STEP_NAMES and self.num_steps is not None:
            return (self.num_steps,)
        if self.inputs is None:
            return ()
        if name in SHAPE_NAMES:
            return (self.inputs,)
        if name in FEATURE_NAMES and self.inputs:
            return (self.inputs[-1],)
        # A classifier of text has both, and then the outputs are its classes.
        if name in CLASS_NAMES or (name in VOCABULARY_NAMES and not names.keys() & set(CLASS_NAMES)):
            return (self.num_outputs,)
        return (self.rngs,) if name == "rngs" and self.rngs is not None else ()


def bind_arguments(target: Any, options: Mapping[str, Any], wanted: Wanted) -> tuple[list[Any], dict[str, Any]]:
    """Return what a target is called with, by position and by name.

    Raises InvalidModelOrObjective, beginning with the way it would be called, where something is missing.
    """
    function = initializer_of(target)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return [wanted.inputs, wanted.num_outputs], {"rngs": wanted.rngs, **options}
    hints = _read_hints(target.__init__ if inspect.isclass(target) else target)
    options = {name: _as_declared(name, value, hints.get(name), wanted) for name, value in options.items()}
    by_position = [wanted.inputs, wanted.num_outputs]
    scalars = [name for name, hint in hints.items() if hint in (int, float, str, bool) or _is_dataclass(hint)]
    # The first one gets a shape, whatever it is called: nothing that is declared as a number or a record.
    takes_shape = next(iter(parameters), None) not in scalars
    if takes_shape and _fits_by_position(function, parameters, by_position, {"rngs": wanted.rngs, **options}, wanted):
        return by_position, {"rngs": wanted.rngs, **options}
    return _bind_names(parameters, hints, options, wanted)


def bind_by_name(target: Any, options: Mapping[str, Any], wanted: Wanted) -> tuple[list[Any], dict[str, Any]]:
    """Return what a target is called with, by position and by name, where names alone say what they want.

    Raises InvalidModelOrObjective where something is missing.
    """
    try:
        parameters = inspect.signature(initializer_of(target)).parameters
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return [], dict(options)
    hints = _read_hints(target.__init__ if inspect.isclass(target) else target)
    options = {name: _as_declared(name, value, hints.get(name), wanted) for name, value in options.items()}
    return _bind_names(parameters, hints, options, wanted)


def _bind_names(
    parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any], options: Mapping[str, Any], wanted: Wanted
) -> tuple[list[Any], dict[str, Any]]:
    """Return options, and what the names of the other parameters say, by position and by name."""
    named: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in options or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if found := wanted.find(name, parameters):
            named[name] = found[0]
        elif parameter.default is parameter.empty:
            named[name] = _make_required(name, hints.get(name), wanted)
    positional = [{**named, **options}[name] for name, each in parameters.items() if each.kind is each.POSITIONAL_ONLY]
    by_name = {
        name: value
        for name, value in {**named, **options}.items()
        if name not in parameters or parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
    }
    return positional, by_name


def initializer_of(target: Any) -> Callable[..., Any]:
    """Return what has the signature of a call: the metaclass of flax modules hides that of `__init__`."""
    return partial(target.__init__, None) if inspect.isclass(target) else target


def _fits_by_position(
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    positional: list[Any],
    named: Mapping[str, Any],
    wanted: Wanted,
) -> bool:
    """Return whether a target takes (inputs, num_outputs, rngs=…), and the names it has for them do not object."""
    try:
        bound = inspect.signature(function).bind(*positional, **named)
    except TypeError:
        return False
    for name, value in bound.arguments.items():
        found = wanted.find(name, parameters)
        if found and found[0] is not value:
            return False
        # Of a classifier of text: neither the shape of an example nor the number of its classes.
        if not found and name in VOCABULARY_NAMES and name not in named:
            return False
    return True


def _read_hints(annotated: Any) -> dict[str, Any]:
    """Return the types of parameters, or of fields; empty where they cannot be told."""
    try:
        return get_type_hints(annotated)
    # What the text of an annotation, which is then evaluated, may be: jaxtyping's `Float[Array, "batch dim"]` is none
    # of Python's, and a name may be imported for type checkers alone.
    except (NameError, SyntaxError, TypeError, AttributeError):
        return {}


def _is_dataclass(hint: Any) -> bool:
    return inspect.isclass(hint) and dataclasses.is_dataclass(hint)


def _as_declared(name: str, value: Any, hint: Any, wanted: Wanted) -> Any:
    """Return an option as its parameter wants it: a dataclass of its fields, or of the method of it that has a name."""
    # YAML knows lists alone.
    if isinstance(value, list) and (get_origin(hint) or hint) is tuple:
        return tuple(value)
    if not _is_dataclass(hint):
        return value
    if isinstance(value, Mapping):
        return _make_dataclass(name, hint, value, wanted)
    maker = getattr(hint, value, None) if isinstance(value, str) else None
    if not callable(maker):
        return value
    takes = inspect.signature(maker).parameters
    return maker(**{key: found[0] for key in takes if (found := wanted.find(key, takes))})


def _make_required(name: str, hint: Any, wanted: Wanted) -> Any:
    if _is_dataclass(hint):
        return _make_dataclass(name, hint, {}, wanted)
    raise InvalidModelOrObjective(f"it asks for {name}; give it as +{wanted.part}.options.{name}=…")


def _make_dataclass(name: str, kind: Any, given: Mapping[str, Any], wanted: Wanted) -> Any:
    """Return a dataclass of options; fields that are not given but have a known name get what they want."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(given.keys() - fields.keys()):
        raise InvalidModelOrObjective(
            f"{wanted.part}.options.{name}.{unknown[0]}: {kind.__name__} has no such field; it has: {', '.join(fields)}"
        )
    hints = _read_hints(kind)
    values = {key: _as_declared(f"{name}.{key}", value, hints.get(key), wanted) for key, value in given.items()}
    for key, field in fields.items():
        if key in values:
            continue
        if found := wanted.find(key, fields):
            values[key] = found[0]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidModelOrObjective(
                f"{kind.__name__} asks for {key}; give it as +{wanted.part}.options.{name}.{key}=…, or name a "
                f"method of {kind.__name__} that makes one: +{wanted.part}.options.{name}=METHOD"
            )
    return kind(**values)
