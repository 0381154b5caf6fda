"""The functions of a user's own program as a run calls them: from train states to train states, and to sums.

The train state of a program is a plain dict of arrays:

    {"step": Int[], "rng": Key[], "weights": …, "rest": …}

`weights` and `rest` hold the program's own state (program_layout.py). The key that a step gets is made of `rng` and of
the number of the step; without data, of the number of its batch: a batch that is skipped is then another key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models import InvalidModelOrObjective
from models.objectives import MergeableMetric, describe_value
from models.user_model import check_metric
from models.user_program import UserProgram
from runner.train.program_layout import ProgramLayout
from runner.train.step import TrainStepFunction, sum_weighted
from runner.types import Batch, Metrics, State

# Names that a line of the log has already.
TAKEN_NAMES = ("step", "split", "weight")


def make_program_init(
    program: UserProgram, layout: ProgramLayout
) -> Callable[[jax.Array, Batch | None], dict[str, Any]]:
    """Return the function (key, example) → fresh train state."""

    def fresh(key: jax.Array, example: Batch | None) -> dict[str, Any]:
        begin, steps = jax.random.split(key)
        packed = layout.pack(program.init(begin, example), "init")
        return {"step": jnp.zeros((), jnp.int32), "rng": steps, **packed}

    return fresh


def make_program_step(program: UserProgram, layout: ProgramLayout, *, has_data: bool) -> TrainStepFunction:
    """Return one update: (state, batch, learning rate, which a program has by itself) → (next state, metrics)."""

    def train_step(state: State, batch: Batch, lr: jax.Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state["rng"], state["step"] if has_data else batch["number"][0])
        given = program.step(layout.unpack(state), batch if has_data else None, key)
        if not isinstance(given, tuple) or len(given) != 2:
            raise InvalidModelOrObjective(
                f"{program.target}: step gave {describe_value(given)}; expected (state, metrics)"
            )
        tree, metrics = given
        packed = layout.pack(tree, "step")
        return {"step": state["step"] + 1, "rng": state["rng"], **packed}, check_step_metrics(program, metrics)

    return train_step


def check_step_metrics(program: UserProgram, metrics: Any) -> dict[str, jax.Array]:
    """Return the metrics of a step as scalars. Raises InvalidModelOrObjective where they are none."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise InvalidModelOrObjective(
            f'{program.target}: step gave the metrics {describe_value(metrics)}; expected a dict such as {{"loss": …}}'
        )
    scalars = {}
    for name, value in metrics.items():
        _check_name(program, name)
        array = jnp.asarray(value) if isinstance(value, int | float) or hasattr(value, "dtype") else None
        if array is None or array.shape != () or not _is_real(array):
            shown = describe_value(value if array is None else array)
            raise InvalidModelOrObjective(
                f'{program.target}: step gave "{name}" as {shown}; expected one real number, as .mean() gives'
            )
        scalars[name] = array
    return scalars


def _is_real(array: jax.Array) -> bool:
    return any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _check_name(program: UserProgram, name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or name in TAKEN_NAMES or "/" in name:
        raise InvalidModelOrObjective(
            f"{program.target}: a metric may not be called {name!r} (taken: {', '.join(TAKEN_NAMES)}, and names with "
            "'/' or what cannot be printed); give it another name"
        )


def make_program_eval(
    program: UserProgram, layout: ProgramLayout, *, has_data: bool
) -> Callable[[State, Batch, jax.Array], Metrics]:
    """Return the evaluation step: (state, batch, weights) → weighted sums of every metric, and `weight`."""

    def eval_step(state: State, batch: Batch, weights: jax.Array) -> Metrics:
        if program.evaluate is None:
            raise InvalidModelOrObjective(f"{program.target}: has no function evaluate(state, batch)")
        found = program.evaluate(layout.unpack(state), batch if has_data else None)
        if not isinstance(found, Mapping) or not found:
            raise InvalidModelOrObjective(
                f"{program.target}: evaluate gave {describe_value(found)}; expected a dict of metrics"
            )
        if not has_data:
            return {**{name: _average(program, name, value) for name, value in found.items()}, "weight": jnp.ones(())}
        metrics = {name: _as_values(value) for name, value in found.items()}
        for name, value in metrics.items():
            check_metric(f"{program.target}: evaluate", name, value, len(weights))
        return {**{name: sum_weighted(value, weights) for name, value in metrics.items()}, "weight": weights.sum()}

    return eval_step


def _as_values(value: Any) -> Any:
    """Return what does not depend on the batch, which is often an array of numpy, as one of jax."""
    return value if isinstance(value, MergeableMetric) or not hasattr(value, "dtype") else jnp.asarray(value)


def _average(program: UserProgram, name: Any, value: Any) -> Any:
    """Return the mean of what a program measured on data of its own: one number, or a vector of them."""
    _check_name(program, name)
    if isinstance(value, MergeableMetric):
        return value
    array = jnp.asarray(value) if isinstance(value, int | float) or hasattr(value, "dtype") else None
    if array is None or array.ndim > 1 or array.size == 0 or not _is_real(array):
        shown = describe_value(value if array is None else array)
        raise InvalidModelOrObjective(
            f'{program.target}: evaluate gave "{name}" as {shown}; expected one number, or a vector of them'
        )
    return array.astype(jnp.float32).mean()
