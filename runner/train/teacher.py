"""The teacher of `objective=distill`: a trained model, whose weights are constants of every step.

They travel beside the examples of a batch, under a key of their own: an argument of the compiled program, and so
neither part of the state, donated or saved, nor built into the program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data.sources import Sources
from models import Distill
from models.objectives import CONSTANTS
from runner.checkpoint.store import describe_leaf, name_leaves
from runner.config.schema import Config
from runner.errors import ConfigError, RefusedError
from runner.mesh import state_shardings
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.train.split_model import SplitModel, abstract_variables, merge_model, split_model
from runner.train.step import Precision, cast_floats, make_key
from runner.train.teacher_source import RunTeacher, TeacherSource, locate_teacher
from runner.types import Tree


@dataclass(frozen=True)
class Teacher:
    """A model that is only asked.

    Attributes:
        source: where its weights are.
        network: its structure.
        abstract: shape, type and sharding of its weights, and of what lasts beside them.
        precision: what it computes in.
    """

    source: TeacherSource
    network: SplitModel
    abstract: Tree
    precision: Precision

    @cached_property
    def loaded(self) -> tuple[Tree, str]:
        """Return its arrays on the devices, and a digest of them. Raises RefusedError where they are not good."""
        self.source.prove()
        weights, digest, filled = self.source.open_weights(), hashlib.sha256(), []
        for name, leaf in name_leaves(self.abstract).items():
            value = weights.read(name, (slice(None),) * len(leaf.shape))
            digest.update(f"\n{name} {describe_leaf(leaf)}\n".encode())
            digest.update(value.tobytes())
            filled.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__))
        return jax.tree.unflatten(jax.tree.structure(self.abstract), filled), digest.hexdigest()

    def teach(self, constants: Tree, inputs: jax.Array, beside: Mapping[str, jax.Array]) -> Any:
        """Return what the model gives, in evaluation mode."""
        rng = jax.tree.map(_make_unused, abstract_variables(self.network)[1])
        state = {**constants, "params": cast_floats(constants["params"], self.precision), "rng": rng}
        model: Any = merge_model(self.network.eval, self.network, state)
        return model(inputs, **beside)

    def add_to_batch(self, put: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """Return a batch on the devices with the constants; anything else, such as weights, as `put` lays it."""
        return {**put(tree), CONSTANTS: self.loaded[0]} if isinstance(tree, Mapping) else put(tree)


def _make_unused(leaf: Any) -> jax.Array:
    """Return an array in the place of a random stream, which nothing draws from in evaluation mode."""
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.broadcast_to(jax.random.key(0), leaf.shape)


def pin_teacher(config: Config, run_dir: RunDir) -> Config:
    """Return the configuration with the step of its teacher: the one that the run has begun with, else that of now.

    So a teacher that trains on, and has another best checkpoint by now, stays the one it was. A folder of Hugging Face
    is named as it was. Raises RefusedError where it is not there, ConfigError where a run cannot begin with it.
    """
    if not isinstance(config.objective, Distill):
        return config
    before = read_recorded_teacher(run_dir) if run_dir.holds_checkpoints() else None
    reference = config.objective.teacher
    if before is not None and "step" in before:
        # A directory may have an @ in its name.
        base = reference.rpartition("@")[0] if "@" in reference and not Path(reference).is_dir() else reference
        reference = f"{base}@{before['step']}"
    try:
        source = locate_teacher(reference)
    except ConfigError as error:
        if before is None:
            raise
        # The command is what it was: the folder has changed.
        raise RefusedError(f"{error} (the run has trained with it: bring its files back)") from None
    if isinstance(source, RunTeacher):
        reference = f"{source.checkpoint.parent.parent}@{source.checkpoint.name}"
    return replace(config, objective=replace(config.objective, teacher=reference))


def read_recorded_teacher(run_dir: RunDir) -> dict[str, Any] | None:
    """Return what was recorded of the teacher that a run has trained with; None where nothing says so."""
    for line in reversed(read_attempts(run_dir)):
        found: Any = line.get("teacher")
        if isinstance(found, dict) and "digest" in found:
            return found
    return None


def check_same_teacher(teacher: Teacher, run_dir: RunDir) -> dict[str, Any]:
    """Return what is recorded of a teacher. Raises RefusedError where the run has trained with other weights."""
    found: dict[str, Any] = {**teacher.source.facts, "digest": teacher.loaded[1]}
    before = read_recorded_teacher(run_dir) if run_dir.holds_checkpoints() else None
    if before is not None and before["digest"] != found["digest"]:
        raise RefusedError(
            f"objective.teacher: {teacher.source.name} is not what this run was trained with: its weights "
            f"have changed (digest {str(before['digest'])[:12]} → {found['digest'][:12]}); bring what it was back"
        )
    return found


def open_teacher(config: Config, option: Distill, sources: Sources, mesh: jax.sharding.Mesh) -> Teacher:
    """Return the teacher of a run; no array is read yet.

    Raises:
        ConfigError: it is none for this data.
        RefusedError: it is not there.
    """
    source = locate_teacher(option.teacher)
    where, model = f"objective.teacher={source.name}", source.choose_model(config, sources)
    if hasattr(model, "attention"):
        model = replace(model, attention="xla")
    try:
        network = split_model(
            lambda: model.build(sources.inputs, sources.num_outputs, nnx.Rngs(make_key(0))), lambda made: None
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    params, _, extra = abstract_variables(network)
    shapes: Tree = {"params": params, "extra": extra}
    _check_shapes(where, source, shapes)
    laid = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )
    return Teacher(source, network, laid, config.train.precision)


def _check_shapes(where: str, source: TeacherSource, shapes: Tree) -> None:
    """Raise ConfigError where the weights of a teacher are not those of a model for this data."""
    there, named = source.open_weights().specs, name_leaves(shapes)
    for name, leaf in named.items():
        here = describe_leaf(leaf)
        if there.get(name) != here:
            raise ConfigError(
                f"{where}: {name} is {there.get(name) or 'absent'} there, and {here} on this data; choose a teacher of "
                "the same data"
            )
    if unknown := sorted(set(there) - set(named)):
        raise ConfigError(f"{where}: has {unknown[0]}, which its model has not ({len(unknown)} of these)")
