"""Find a model that gives probabilities where logits are expected: it would train, and never become sure of anything.

A loss of logits takes the softmax itself. A softmax of probabilities is nearly flat, so the loss stays high and no line
says why. The last operations of a model show it before anything is computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from models.objectives import take_logits
from runner.train.split_model import SplitModel, Variables, abstract_variables, merge_model
from runner.types import Batch

# Operations that leave the values of their first argument as they are.
UNCHANGED = frozenset({"convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "copy", "slice"})
INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def warn_of_probabilities(network: SplitModel, batch: Batch, name: str) -> tuple[str, ...]:
    """Return a warning where the last thing that a model does is a softmax or a sigmoid; `batch` holds shapes."""
    if "inputs" in batch:
        given, places = batch["inputs"], batch["label"].shape
    else:
        # The last token is only a target.
        size, length = batch["tokens"].shape
        given, places = jax.ShapeDtypeStruct((size, length - 1), jnp.int32), (size, length - 1)

    def call(variables: Variables, given: Any) -> jax.Array:
        params, rng, extra = variables
        model = merge_model(network.eval, network, {"params": params, "rng": rng, "extra": extra})
        return take_logits(model(given), places, None)

    traced = jax.make_jaxpr(call)(abstract_variables(network), given).jaxpr
    if (kind := _find_last_operation(traced, 0)) is None:
        return ()
    return (
        f"{name}: its call ends in a {kind}, but the loss expects logits and takes the softmax itself; return what the "
        f"{kind} is taken of, or give a loss of your own (objective=my_file:my_loss)",
    )


def _find_last_operation(jaxpr: Any, number: int) -> str | None:
    """Return `softmax` or `sigmoid` where an output of a program is one; None where it is something else."""
    made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    equation = _find_maker(made, jaxpr.outvars[number])
    if equation is None:
        return None
    inner = next((equation.params[key] for key in INNER if key in equation.params), None)
    if inner is not None:
        place = [id(variable) for variable in equation.outvars].index(id(_skip_unchanged(made, jaxpr.outvars[number])))
        opened = getattr(inner, "jaxpr", inner)
        return _find_last_operation(opened, place) if place < len(opened.outvars) else None
    if equation.primitive.name == "logistic":
        return "sigmoid"
    if equation.primitive.name == "div":
        above = _find_maker(made, equation.invars[0])
        return "softmax" if above is not None and above.primitive.name == "exp" else None
    return None


def _find_maker(made: dict[Any, Any], variable: Any) -> Any:
    """Return the operation whose values a variable holds; None where they are given from outside."""
    last = _skip_unchanged(made, variable)
    return None if isinstance(last, core.Literal) else made.get(last)


def _skip_unchanged(made: dict[Any, Any], variable: Any) -> Any:
    while not isinstance(variable, core.Literal) and variable in made:
        equation = made[variable]
        if equation.primitive.name not in UNCHANGED:
            return variable
        variable = equation.invars[0]
    return variable
