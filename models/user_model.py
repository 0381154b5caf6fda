"""A user's own model and objective: called as they were written, and checked to be what the runner can work with."""

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
    """What `target` makes of the shape of an example. Raises Unfit where it is no flax.nnx.Module."""
    made = _found(target)(inputs, num_outputs, rngs=rngs, **options)
    if not isinstance(made, nnx.Module):
        raise InvalidModelOrObjective(f"{target}: made {_article(made)}; expected a flax.nnx.Module")
    return made


def wrap_user_objective(target: str, options: Mapping[str, Any]) -> ObjectiveFunction:
    """The function `target`. It raises Unfit, when it is traced, where it does not give one value per example."""
    function = _found(target)

    def checked(model: nnx.Module, batch: Batch) -> Examples:
        given = function(model, batch, **options)
        if not isinstance(given, Mapping) or "loss" not in given:
            raise InvalidModelOrObjective(
                f'{target}: gave {_article(given)}; expected a dict with "loss" and any other metric'
            )
        size = len(next(iter(batch.values())))
        for name, values in given.items():
            if not isinstance(values, jax.Array) or values.shape != (size,):
                raise InvalidModelOrObjective(
                    f'{target}: "{name}" is {_article(values)}; expected one value per example, of shape ({size},): '
                    "the mean is taken later"
                )
        return dict(given)

    return checked


def _found(target: str) -> Any:
    name, _, attribute = target.partition(":")
    return getattr(import_module(name), attribute)


def _article(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, jax.Array):
        return f"an array of shape {value.shape}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    return f"{type(value).__name__}"
