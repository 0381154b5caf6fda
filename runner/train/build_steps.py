"""Build the functions that a run computes with: the train step, the evaluation step, and how a batch gets to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

import jax

from models.layout import use_batch_sharding
from models.objectives import BatchObjective
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.mesh import activation_sharding, find_local_rows, put_local_rows, replicated_sharding
from runner.train.parts import PartsStep
from runner.train.parts_evaluation import PartsEvaluation
from runner.train.split_model import SplitModel
from runner.train.step import (
    MakeOptimizer,
    MeanLoss,
    TrainStep,
    TrainStepFunction,
    UpdateOptions,
    make_eval_step,
    make_mean_loss,
    make_train_step,
)
from runner.types import State, Tree

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class StepFunctions:
    """The functions of a run, jitted and not compiled.

    Attributes:
        loss: what is differentiated.
        put: lays a batch on the devices, of which it is given the rows that this process makes.
    """

    loss: MeanLoss
    train_step: TrainStep | PartsStep
    eval_step: jax.stages.Wrapped | PartsEvaluation
    put: Callable[[Tree], Tree]


def make_step_functions(
    config: Config,
    network: SplitModel,
    objective: BatchObjective,
    make_optimizer: MakeOptimizer,
    mesh: jax.sharding.Mesh,
    abstract: State,
) -> StepFunctions:
    """Return the functions of a run whose state is `abstract`, on these devices."""
    update = UpdateOptions(config.train.precision, config.train.num_splits, config.optim.ema)
    lay_out = partial(_lay_out_activations, activation_sharding(mesh))
    loss = lay_out(make_mean_loss(network, objective, update.precision))
    step = jit_train_step(lay_out(make_train_step(network, objective, make_optimizer, update)), abstract)
    train_step = TrainStep(step, config.optim.lr, replicated_sharding(mesh))
    eval_step = jax.jit(lay_out(make_eval_step(network, objective, update.precision)))
    if (num_parts := config.train.parts) is None:
        return StepFunctions(loss, train_step, eval_step, partial(put_local_rows, mesh, config.data.batch_size))
    return StepFunctions(
        loss,
        PartsStep(train_step, loss, objective, make_optimizer, update.ema, num_parts, mesh),
        PartsEvaluation(eval_step, num_parts, mesh),
        _leave_on_host,
    )


def jit_train_step(function: TrainStepFunction, abstract: State) -> jax.stages.Wrapped:
    """Return an update that takes over the memory of the state it is given.

    The next state lies where the one before lay: else a resumed run would compile another program.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(function, donate_argnums=0, out_shardings=(where, None))


def check_parts(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError where so many devices cannot share the parts of a batch out evenly."""
    if (parts := config.train.parts) is not None and parts % mesh.size:
        fitting = [count for count in range(1, parts + 1) if parts % count == 0]
        raise ConfigError(
            f"train.parts={parts}: {mesh.size} devices cannot share them out evenly; use "
            f"{', '.join(map(str, fitting))} devices (mesh.data=N)"
        )


def choose_rows(config: Config, mesh: jax.sharding.Mesh) -> slice | None:
    """Return the rows of a batch that this process makes; None for all of them, where it trains in parts."""
    # Which part goes to which device is settled when the parts are computed, not here.
    return find_local_rows(mesh, config.data.batch_size) if config.train.parts is None else None


def _leave_on_host(tree: Tree) -> Tree:
    """Return what it is given: each part of a batch goes to its device by itself."""
    return tree


def _lay_out_activations(sharding: jax.sharding.NamedSharding | None, function: F) -> F:
    """Return a function that is traced with the batch divided like this between blocks."""
    if sharding is None:
        return function

    @wraps(function)
    def laid_out(*arguments: Any) -> Any:
        with use_batch_sharding(sharding):
            return function(*arguments)

    return laid_out  # type: ignore[return-value]
