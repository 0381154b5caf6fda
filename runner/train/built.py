"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from data.pipeline import Stream
from data.sources import Sources
from models.remat_plan import Plan
from runner.checkpoint import store
from runner.config.schema import Config
from runner.train import step as steps
from runner.train.evaluator import Evaluator

State = steps.State


@dataclass(frozen=True)
class Built:
    """What a configuration becomes. Nothing is compiled, allocated or written yet, but the data is read."""

    sources: Sources
    stream: Stream
    beginning: Mapping[str, Any]  # the position of the data at step 0
    mesh: jax.sharding.Mesh
    init: Callable[[], State]
    abstract: State
    loss: steps.MeanLoss  # what is differentiated
    train_step: steps.Rated  # not compiled yet
    eval_step: jax.stages.Wrapped
    model: Callable[[State], nnx.Module]
    evaluator: Evaluator
    put: Callable[[Any], Any]
    plan: Plan


def num_bytes(built: Built) -> int:
    """The size of one train state, in bytes."""
    return sum(store.as_leaf(leaf).num_bytes for leaf in jax.tree.leaves(built.abstract))


def describe(built: Built, config: Config) -> str:
    """One line: the model, its size, and the data."""
    count = sum(leaf.size for leaf in jax.tree.leaves(built.abstract["params"]))
    model, data = (getattr(part, "target", part.kind) for part in (config.model, config.data))
    size = f"{count / 1e6:.2f} M" if count >= 10_000 else f"{count}"
    return f"{model}, {size} parameters · {data}, {built.sources.summary}"


def hardware(built: Built) -> str:
    """The devices of the mesh: `1 × cpu`."""
    return f"{built.mesh.size} × {built.mesh.devices.flat[0].device_kind}"
