"""Call somebody else's model as it was written: what its `__call__` wants to be told is told, in training and after.

Published models say in several ways whether they are trained: `train`, `training` or `is_training` is true then,
`deterministic` or `use_running_average` is false. Some take random numbers as an argument as well. An argument that is
left at its default would train such a model as it is evaluated: BatchNorm never moves, nothing is dropped.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import jax
from flax import nnx

from models import InvalidModelOrObjective

# Arguments that are true in training, and arguments that are true in evaluation.
TRAINING_FLAGS = ("train", "training", "is_training", "is_train", "train_mode")
EVALUATION_FLAGS = (
    "deterministic",
    "use_running_average",
    "use_running_avg",
    "inference",
    "is_eval",
    "eval_mode",
)
RNGS = ("rngs", "rng", "key", "prng_key", "dropout_rng", "dropout_key")
# What a model gets, so that it can be told in its call: whether it is evaluated (flax sets every attribute of this
# name by `model.train()` and `model.eval()`), and its random numbers.
MODE, STREAMS = "deterministic", "call_rngs"


@dataclass(frozen=True)
class CallRoles:
    """Which arguments of a call say that a model is trained or evaluated, or bring its random numbers.

    Attributes:
        training: names of arguments that are true in training.
        evaluation: names of arguments that are true in evaluation.
        rngs: names of arguments that are an `nnx.Rngs`.
        keys: names of arguments that are one random key.
    """

    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    rngs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all arguments that have a role."""
        return (*self.training, *self.evaluation, *self.rngs, *self.keys)

    @property
    def draws(self) -> bool:
        """Return whether a call needs random numbers."""
        return bool(self.rngs or self.keys)

    def arguments(self, *, training: bool, streams: nnx.Rngs | None) -> dict[str, Any]:
        """Return the arguments of a call by name. A key is a fresh one of the streams."""
        given: dict[str, Any] = dict.fromkeys(self.training, training) | dict.fromkeys(self.evaluation, not training)
        if streams is not None:
            given |= dict.fromkeys(self.rngs, streams) | {name: streams.dropout() for name in self.keys}
        return given


def read_roles(function: Callable[..., Any], skip: int) -> CallRoles:
    """Return the roles of the arguments of a function after the first `skip`, by their names."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return CallRoles()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    drawn = [each for each in named if each.name in RNGS]
    keys = tuple(each.name for each in drawn if _is_key(each))
    return CallRoles(
        tuple(each.name for each in named if each.name in TRAINING_FLAGS),
        tuple(each.name for each in named if each.name in EVALUATION_FLAGS),
        tuple(each.name for each in drawn if each.name not in keys),
        keys,
    )


def _is_key(parameter: inspect.Parameter) -> bool:
    """Return whether an argument is one random key: by its annotation, else by its name."""
    annotation = parameter.annotation
    written = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if "Rng" in written:
        return False
    return parameter.name != "rngs" or "Array" in written or "Key" in written


def follow_mode(model: nnx.Module, key: jax.Array, objective: CallRoles = CallRoles()) -> None:
    """Make a model's call follow `model.train()` and `model.eval()`, whatever its arguments for that are called.

    An argument that a caller gives wins. `objective` are the roles in the objective, which is told by the model. Where
    neither asks for anything, the model is left as it is.
    """
    roles = read_roles(type(model).__call__, skip=2) if callable(model) else CallRoles()
    if (bridged := getattr(model, "to_nnx__module", None)) is not None:
        # A bridge to flax.linen takes every attribute for a variable of its module, and hands on what it is told.
        inner = read_roles(type(bridged).__call__, skip=2)
        if flags := (*inner.training, *inner.evaluation):
            raise InvalidModelOrObjective(
                f"{type(bridged).__name__} is told in its call whether it trains ({flags[0]}), and a bridge cannot "
                f"follow that; give it an nnx.Module around it, whose __call__(x, {flags[0]}) hands it on"
            )
        return
    if (roles or objective) and isinstance(getattr(type(model), MODE, None), property):
        raise InvalidModelOrObjective(
            f"{type(model).__name__} has a property `{MODE}`, which nobody can set; make it an attribute, so that "
            "model.train() and model.eval() set it"
        )
    if (roles or objective) and not hasattr(model, MODE):
        setattr(model, MODE, True)
    if roles.draws or objective.draws:
        # Of its own, so that what is drawn in a call changes nothing that the constructor drew.
        setattr(model, STREAMS, nnx.Rngs(jax.random.fold_in(key, 0x0CA11)))
    else:
        _give_streams(model, key)
    if roles:
        model.__class__ = _following(type(model), roles)


def _give_streams(model: nnx.Module, key: jax.Array) -> None:
    """Give random numbers to each Dropout that was made without any; in training it can do nothing else than fail."""
    lacking = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Dropout) and module.rngs is None and module.rate
    ]
    for number, (_, dropout) in enumerate(sorted(lacking, key=lambda each: [str(part) for part in each[0]])):
        dropout.rngs = nnx.data(nnx.Rngs(jax.random.fold_in(key, 0xD809 + number))[dropout.rng_collection].fork())


@cache
def _following(written: type[nnx.Module], roles: CallRoles) -> type[nnx.Module]:
    """Return a class that is the given one, but whose call is told what it does not get from its caller."""

    # What the written call asks for is still read from this one.
    @wraps(written.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(written.__call__).bind_partial(self, *args, **kwargs)
        told = roles.arguments(training=is_training(self), streams=getattr(self, STREAMS, None))
        missing = {name: value for name, value in told.items() if name not in bound.arguments}
        return written.__call__(self, *args, **kwargs, **missing)

    # The name is what a person reads in a message, and what `remat.block=NAME` looks for.
    body: Mapping[str, Any] = {"__call__": __call__, "__module__": written.__module__, "__doc__": written.__doc__}
    made: type[nnx.Module] = types.new_class(written.__name__, (written,), exec_body=lambda names: names.update(body))
    made.__qualname__ = written.__qualname__
    return made


def is_training(model: nnx.Module) -> bool:
    """Return whether a model that follows its mode is in training."""
    return not getattr(model, MODE, True)


def describe_signature_problem(model: nnx.Module, num_inputs: int = 1) -> str | None:
    """Return why a model cannot be called with its inputs alone; None where it can, or where nobody can tell.

    What has a role is told, as `follow_mode` makes it.
    """
    call = type(model).__call__
    told = dict.fromkeys(read_roles(call, skip=1 + num_inputs).names)
    try:
        inspect.signature(call).bind(model, *[None] * num_inputs, **told)
    except TypeError as error:
        return str(error)
    except ValueError:
        pass
    return None
