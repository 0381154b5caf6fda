"""What a configuration becomes: the pure parts of one run, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from data.pipeline import TrainingStream
from data.sources import Sources
from models.remat_plan import RematPlan
from runner.checkpoint import store
from runner.config.program import ExternalProgram
from runner.config.schema import Config
from runner.mesh import describe_mesh
from runner.train.evaluator import Evaluator
from runner.train.frozen_layers import FrozenLayers, leave_unchanged_out
from runner.train.parts import PartsStep
from runner.train.parts_evaluation import PartsEvaluation
from runner.train.step import MeanLoss, TrainStep
from runner.train.teacher import Teacher
from runner.types import JsonObject, State, Tree


@dataclass(frozen=True)
class LoadedProgram:
    """A user's own program with a state of it, to work with.

    Attributes:
        program: what the target names or made, with its functions.
        state: the program's own state, as its functions take it.
    """

    program: Any
    state: Tree


@dataclass(frozen=True)
class Built:
    """The parts of one run. Nothing is compiled, allocated or written yet, but the data is read.

    Attributes:
        beginning: the data position at step 0.
        init: makes the fresh state, on the devices.
        abstract: the shape, type and sharding of every array of the state.
        loss: what is differentiated; a program of the user's own refuses to say.
        model: makes of a state what a person works with: a live model in evaluation mode, or a `LoadedProgram`.
        put: lays a batch on the devices, of which it is given the rows that this process makes.
        plan: what is recomputed in the backward pass.
        warnings: what a first look at a user's own model showed, one line each.
        measures: the names of what the objective measures.
        traced: a digest of what the step of a user's own program computes; "" of a model.
        frozen: which parameters do not train; empty where all do.
        teacher: the model that is learnt from; None where there is none.
    """

    sources: Sources
    stream: TrainingStream
    beginning: JsonObject
    mesh: jax.sharding.Mesh
    init: Callable[[], State]
    abstract: State
    loss: MeanLoss
    train_step: TrainStep | PartsStep
    eval_step: jax.stages.Wrapped | PartsEvaluation
    model: Callable[[State], nnx.Module | LoadedProgram]
    evaluator: Evaluator
    put: Callable[[Tree], Tree]
    plan: RematPlan
    warnings: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    traced: str = ""
    frozen: FrozenLayers = field(default_factory=dict)
    teacher: Teacher | None = None


def count_state_bytes(built: Built) -> int:
    """Return the size of one train state, in bytes."""
    return sum(store.describe_leaf(leaf).num_bytes for leaf in jax.tree.leaves(built.abstract))


def count_saved_bytes(built: Built) -> int:
    """Return the size of what each checkpoint holds of a train state, in bytes: all but what no step changes."""
    return sum(store.describe_leaf(leaf).num_bytes for leaf in jax.tree.leaves(leave_unchanged_out(built.abstract)))


def describe_run(built: Built, config: Config) -> str:
    """Return one line for a person: the model, its size, and the data."""
    is_program = isinstance(config.program, ExternalProgram)
    count = _count_numbers(built.abstract["weights" if is_program else "params"])
    # Where model or data are the user's own, their target says more than `external`.
    trained = config.program if is_program else config.model
    model, data = (getattr(part, "target", part.kind) for part in (trained, config.data))
    size = f"{_format_count(count)} parameters"
    if "frozen" in built.abstract:
        frozen = _count_numbers(built.abstract["frozen"])
        size = f"{_format_count(count + frozen)} parameters, {count:,} of them train ({count / (count + frozen):.2%})"
    return f"{model}, {size} · {data}, {built.sources.summary}"


def _count_numbers(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _format_count(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else f"{count}"


def describe_hardware(built: Built) -> str:
    """Return the devices of the mesh: `1 × cpu`, `8 × cpu (data 2 × fsdp 4, 2 processes)`."""
    return f"{built.mesh.size} × {built.mesh.devices.flat[0].device_kind}{describe_mesh(built.mesh)}"
