"""Config → the live objects of a run: the only file that knows every concrete class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from data.sources import Sources
from models.find_blocks import prepare
from models.scopes import Misplaced
from runner.checkpoint import store
from runner.checkpoint.transfer import Report, transfer
from runner.config import user_code
from runner.config.evaluations import Text
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.mesh import batched, replicated
from runner.optim.parameter_groups import is_stacked
from runner.train import step as steps
from runner.train.built import Built, State
from runner.train.dataset import read, stream_of
from runner.train.evaluator import Evaluator


def build(config: Config, sources: Sources | None = None, devices: Sequence[jax.Device] | None = None) -> Built:
    """Put the parts together, for the devices of this machine unless others are given; read the data unless it is.

    Raises ConfigError where the data, the machine or what is the user's own does not fit.
    """
    user_code.bring(config)
    with user_code.told("data"):
        sources = sources or read(config.data)
    own = user_code.fit(config, sources.eval)
    mesh = config.mesh.build(config.data.batch_size, config.train.microbatches, devices)
    stream = stream_of(config.data, sources, config.seed)

    def make_model(key: jax.Array) -> nnx.Module:
        try:
            return config.model.build(sources.inputs, sources.num_outputs, nnx.Rngs(key))
        except ValueError as error:
            if config.model.kind == "external":
                raise  # a bug of the user's, with its traceback
            raise ConfigError(f"model={config.model.kind}: {error}") from error

    with user_code.told("model"):
        network = steps.take_apart(lambda: make_model(jax.random.key(config.seed)), partial(_prepared, config))
    objective = config.objective.build(own)
    update = steps.Update(config.train.precision, config.train.microbatches, config.optim.ema)

    def optimizer(lr: Any) -> tuple[Any, Any]:
        schedule = config.schedule.build(lr, config.train.steps)
        return config.optim.build(schedule), schedule

    def fresh(key: jax.Array) -> State:
        return steps.init(partial(make_model, key), optimizer(config.optim.lr)[0], ema=update.ema is not None)

    init, abstract = steps.place(fresh, config.seed, replicated(mesh))
    sharding = batched(mesh)

    def model(state: State) -> nnx.Module:
        return steps.assemble(network.eval, network, state)

    def put(batch: Any) -> Any:
        return jax.device_put(batch, sharding)

    evaluator = Evaluator(
        config.eval, sources, model, put, config.data.batch_size, config.train.eval_batches, config.seed
    )
    evaluator.admit(nnx.merge(network.eval, *network.variables))
    return Built(
        sources=sources,
        stream=stream,
        beginning=stream.state(),
        mesh=mesh,
        init=init,
        abstract=abstract,
        loss=steps.mean_loss(network, objective, update.precision),
        train_step=steps.rated(network, objective, optimizer, update, config.optim.lr, replicated(mesh)),
        eval_step=jax.jit(steps.eval_step(network, objective, update.precision)),
        model=model,
        evaluator=evaluator,
        put=put,
        plan=config.remat.plan,
    )


def _prepared(config: Config, model: nnx.Module) -> None:
    try:
        prepare(model, config.remat.plan, config.remat.block)
    except Misplaced as error:
        raise ConfigError(f"remat={config.remat.kind}: {error}") from None


def restore(built: Built, checkpoint: Path) -> State:
    """The train state of a checkpoint. Raises RefusedError where it is not one of this configuration."""
    return store.read(checkpoint, built.abstract)


def warm(built: Built, checkpoint: Path, *, partial: bool) -> tuple[State, Report]:
    """A fresh state with the weights of another run's checkpoint, and what did not fit."""
    state, report = transfer(built.init(), checkpoint, partial=partial, stacked=is_stacked)
    return steps.averaging(state) if "ema" in state else state, report


def showcase(built: Built, state: State) -> str | None:
    """How a language model goes on after a text it has not seen; None for a model, or data, without words."""
    model = built.model(state)
    if not built.evaluator.goes_on(model):
        return None
    ((prompt, text),) = built.evaluator.written(Text(count=1, new_tokens=240), model)
    return "".join(char if char.isprintable() or char == "\n" else "·" for char in prompt + text)  # a terminal obeys
