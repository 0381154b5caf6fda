"""Models and objectives of the user's own: called as they were written, and checked to be what the runner can use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import jax
from flax import nnx

from models import InvalidModelOrObjective
from models.objectives import Batch, Examples, ObjectiveFunction


def build_user_model(
    target: str, options: Mapping[str, Any], inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs
) -> nnx.Module:
    """Return the model that `target` makes; `inputs` is the shape of one example.

    Raises InvalidModelOrObjective where it is no flax.nnx.Module.
    """
    made = _import_target(target)(inputs, num_outputs, rngs=rngs, **options)
    if not isinstance(made, nnx.Module):
        raise InvalidModelOrObjective(f"{target}: made {_describe_value(made)}; expected a flax.nnx.Module")
    return made


def wrap_user_objective(target: str, options: Mapping[str, Any]) -> ObjectiveFunction:
    """Return the function `target` with its options, and with a check of what it returns.

    Tracing it raises InvalidModelOrObjective where it does not return a "loss" with one value per example.
    """
    function = _import_target(target)

    def checked_objective(model: nnx.Module, batch: Batch) -> Examples:
        given = function(model, batch, **options)
        if not isinstance(given, Mapping) or "loss" not in given:
            raise InvalidModelOrObjective(
                f'{target}: gave {_describe_value(given)}; expected a dict with "loss" and any other metric'
            )
        # A mean would train as well, but an evaluation could not leave out the padding of its last batch.
        size = len(next(iter(batch.values())))
        for name, values in given.items():
            if not isinstance(values, jax.Array) or values.shape != (size,):
                raise InvalidModelOrObjective(
                    f'{target}: "{name}" is {_describe_value(values)}; expected one value per example, of shape '
                    f"({size},): the mean is taken later"
                )
        return dict(given)

    return checked_objective


def _import_target(target: str) -> Any:
    name, _, attribute = target.partition(":")
    return getattr(import_module(name), attribute)


def _describe_value(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"an array of shape {value.shape}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    return f"{type(value).__name__}"
