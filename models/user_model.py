"""Models and objectives of the user's own: called as they were written, and checked to be what the runner can use."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models import InvalidModelOrObjective
from models.call_roles import STREAMS, is_training, read_roles
from models.objectives import Batch, BatchObjective, Examples, MergeableMetric, describe_value
from models.user_arguments import Wanted, bind_arguments

# Names that the runner writes itself, beside the metrics.
RESERVED_METRICS = ("step", "split", "lr", "grad_norm", "weight")


def build_user_model(
    target: str, options: Mapping[str, Any], inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs
) -> nnx.Module:
    """Return the model that `target` makes; `inputs` is the shape of one example.

    Raises InvalidModelOrObjective where it asks for what it does not get, or makes no flax.nnx.Module.
    """
    function = find_target(target)
    if isinstance(function, nnx.Module):
        raise InvalidModelOrObjective(
            f"{target}: is a {type(function).__name__} that was made on import; name its class, or a function that "
            "makes one, so that the seed decides its weights"
        )
    positional, named = bind_arguments(function, options, Wanted(inputs, num_outputs, rngs))
    made = function(*positional, **named)
    if not isinstance(made, nnx.Module):
        is_linen = any(base.__module__.startswith("flax.linen") for base in type(made).__mro__)
        way_out = " (nnx.bridge.ToNNX makes one of a flax.linen.Module)" if is_linen else ""
        raise InvalidModelOrObjective(f"{target}: made {describe_value(made)}; expected a flax.nnx.Module{way_out}")
    if not callable(made):
        raise InvalidModelOrObjective(f"{target}: {type(made).__name__} has no __call__")
    return made


def wrap_user_objective(target: str, options: Mapping[str, Any]) -> BatchObjective:
    """Return the function `target` with its options, and with a check of what it returns.

    Where it has arguments such as `training`, `rngs` or `weights`, it is told. Tracing it raises
    InvalidModelOrObjective where it does not return a "loss" with one value per example.
    """
    function = find_target(target)
    roles, takes_weights = read_roles(function, skip=2), "weights" in _name_arguments(function)

    def checked_objective(model: nnx.Module, batch: Batch, weights: Float[Array, "batch"]) -> Examples:
        told = roles.arguments(training=is_training(model), streams=getattr(model, STREAMS, None))
        if takes_weights:
            told["weights"] = weights
        given = function(model, batch, **{**told, **options})
        if not isinstance(given, Mapping) or "loss" not in given:
            raise InvalidModelOrObjective(
                f'{target}: gave {describe_value(given)}; expected a dict with "loss" and any other metric'
            )
        # What does not depend on the batch is often an array of numpy.
        metrics = {
            name: jnp.asarray(value) if isinstance(value, np.ndarray) else value for name, value in given.items()
        }
        for name, values in metrics.items():
            check_metric(target, name, values, len(weights))
        _check_loss(target, metrics["loss"].dtype)
        return metrics

    return BatchObjective(checked_objective, roles=roles, calls_with_inputs=False)


def check_metric(target: str, name: Any, values: Any, size: int) -> None:
    """Raise InvalidModelOrObjective where a metric has a name that is taken, or is not one value per example."""
    if (
        not isinstance(name, str)
        or not name.strip()
        or not name.isprintable()
        or name in RESERVED_METRICS
        or "/" in name
    ):
        raise InvalidModelOrObjective(
            f"{target}: a metric may not be called {name!r} (taken: {', '.join(RESERVED_METRICS)}, and names with "
            "'/' or what cannot be printed); give it another name"
        )
    if isinstance(values, MergeableMetric) and name != "loss":
        return
    # A mean would train as well, but an evaluation could not leave out the padding of its last batch.
    if not isinstance(values, jax.Array) or values.shape != (size,):
        raise InvalidModelOrObjective(
            f'{target}: "{name}" is {describe_value(values)}; expected one value per example, of shape ({size},): the '
            "mean is taken later"
        )


def _check_loss(target: str, dtype: Any) -> None:
    """Raise InvalidModelOrObjective where a loss has no slope to follow, or none that is downhill."""
    if not jnp.issubdtype(dtype, jnp.floating):
        way_out = (
            "take its real part or its absolute value"
            if jnp.issubdtype(dtype, jnp.complexfloating)
            else "no gradient comes from whole numbers: give a loss that the model changes by degrees, and this one "
            "as another metric"
        )
        raise InvalidModelOrObjective(f'{target}: "loss" is of {dtype}; expected real fractions; {way_out}')


def find_target(target: str) -> Any:
    """Return what a target names."""
    # It was imported when the configuration was built: a file is known by the name that the user gave it.
    module, _, attribute = target.rpartition(":")
    found: Any = sys.modules.get(module) or import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _name_arguments(function: Any) -> list[str]:
    try:
        return [*inspect.signature(function).parameters]
    except (TypeError, ValueError):
        return []
