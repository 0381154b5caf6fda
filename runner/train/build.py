"""Build the parts of a run from its configuration: the only file that knows every concrete class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from data.sources import Sources
from models import OBJECTIVE_METRICS, Distill, HfModel
from models.call_roles import follow_mode
from models.find_blocks import apply_plan
from models.objectives import BYTE_VOCABULARY, BatchObjective
from models.remat_plan import RematPlanError
from runner import hosts
from runner.checkpoint import store
from runner.checkpoint.frozen_base import find_digest, locate_base, prove_base
from runner.checkpoint.record import FileTable
from runner.checkpoint.transfer import (
    CheckpointWeights,
    HeldWeights,
    TransferReport,
    WeightSource,
    prove_weights,
    take_weights,
)
from runner.config import user_code
from runner.config.metric_names import list_chosen_metrics
from runner.config.program import ExternalProgram
from runner.config.schema import Config
from runner.errors import ConfigError, RefusedError
from runner.mesh import AXES, state_shardings
from runner.optim.parameter_groups import is_stacked
from runner.text import display_path
from runner.train.build_program import build_program
from runner.train.build_steps import check_parts, choose_rows, make_step_functions
from runner.train.built import Built
from runner.train.dataset import make_stream, read_sources, watch_labels
from runner.train.evaluator import Evaluator
from runner.train.find_probabilities import warn_of_probabilities
from runner.train.frozen_layers import find_unchanged, leave_unchanged_out, split_frozen
from runner.train.model_content import ModelContent
from runner.train.rehearse import Rehearsal, rehearse
from runner.train.rehearse_optimizer import choose_optimizer
from runner.train.split_model import (
    SplitModel,
    Variables,
    abstract_variables,
    merge_model,
    read_declared_axes,
    split_model,
)
from runner.train.step import init_state, make_init, make_key, with_ema, with_reference
from runner.train.teacher import open_teacher
from runner.train.tune_model import adapt_model, choose_frozen, divide_whole, gather_whole, warn_of_fresh_base
from runner.train.tuned_weights import read_whole_weights
from runner.types import Batch, State


def build(config: Config, sources: Sources | None = None, devices: Sequence[jax.Device] | None = None) -> Built:
    """Put the parts together, for the devices of this machine unless others are given; read the data unless it is.

    Nothing is compiled, and no array is allocated.

    Raises:
        ConfigError: the data, the machine or the user's own code does not fit.
    """
    user_code.import_targets(config)
    with user_code.as_config_error("data", getattr(config.data, "target", None)):
        sources = sources or read_sources(config.data)
    config = config.with_known_steps(len(sources.train))
    if isinstance(config.program, ExternalProgram):
        return build_program(config, sources, devices)
    own = user_code.choose_objective(config, sources)
    mesh = config.mesh.build(config.data.batch_size, config.train.microbatches, devices)
    teacher = None
    with user_code.as_config_error("objective"):
        if isinstance(config.objective, Distill):
            teacher = open_teacher(config, config.objective, sources, mesh)
            ask: dict[str, Any] = {"teach": teacher.teach}
        else:
            ask = {}
        objective = config.objective.build(own, sources.num_outputs, ignored=sources.ignored, **ask)
    check_parts(config, mesh)
    measured = own if config.objective.kind in ("default", "distill") else config.objective.kind
    sources = watch_labels(config.data, sources, measured)
    rows = choose_rows(config, mesh)
    stream = make_stream(config.data, sources, config.seed, measured, rows)
    key, make_model = make_key(config.seed), partial(_make_model, config, sources, objective)
    with user_code.as_config_error("model", getattr(config.model, "target", None)):
        network = split_model(lambda: make_model(key), partial(_apply_remat, config))
    whole = abstract_variables(network)[0]
    network = replace(network, frozen=choose_frozen(config, whole))
    trained = jax.eval_shape(lambda params: split_frozen(params, network.frozen)[0], whole)
    make_optimizer, told = choose_optimizer(config, trained)

    def begin(variables: Variables) -> State:
        tx = make_optimizer(config.optim.lr)[0]
        averaged = config.optim.ema is not None
        return init_state(variables, tx, ema=averaged, frozen=network.frozen, reference=objective.compares)

    declared = read_declared_axes(network)
    init, abstract = make_init(make_model, network, begin, partial(state_shardings, mesh, declared=declared))
    functions = make_step_functions(config, network, objective, make_optimizer, mesh, abstract)
    put = functions.put if teacher is None else partial(teacher.add_to_batch, functions.put)

    def model(state: State) -> nnx.Module:
        return merge_model(network.eval, network, state)

    maker = ModelContent(sources, model, nnx.merge(network.eval, *network.variables), config.seed)
    evaluator = Evaluator(
        config.eval,
        sources,
        maker,
        put,
        config.data.batch_size,
        config.train.eval_batches,
        config.seed,
        list_chosen_metrics(config),
        rows=rows,
    )
    evaluator.check_content()
    seen = _look_at_metrics(config, sources, network, objective, measured)
    return Built(
        sources=sources,
        stream=stream,
        beginning=stream.state(),
        mesh=mesh,
        init=partial(init, key),
        abstract=abstract,
        loss=functions.loss,
        train_step=functions.train_step,
        eval_step=functions.eval_step,
        model=model,
        evaluator=evaluator,
        put=put,
        plan=config.remat.plan,
        warnings=(
            *_warn_of_data(config, sources),
            *_warn_of_axes(declared),
            *seen.warnings,
            *told,
            *warn_of_fresh_base(config),
            *_warn_of_fresh_reference(config, objective),
        ),
        measures=_list_distilled(measured) if teacher is not None else seen.metrics,
        frozen=network.frozen,
        teacher=teacher,
    )


def _make_model(config: Config, sources: Sources, objective: BatchObjective, key: jax.Array) -> nnx.Module:
    """Return a fresh model of the configuration; one of the user's own follows `train()` and `eval()` in its call."""
    try:
        # Where an array lies is the mesh's business; a kernel that says it by itself (`nnx.with_partitioning`) would
        # ask for a mesh with axes of its own.
        with nnx.use_eager_sharding(False):  # noqa: FBT003 - flax takes it by position
            model = config.model.build(sources.inputs, sources.num_outputs, nnx.Rngs(key))
    except ValueError as error:
        if config.model.kind == "external":
            # It is told with its place in the user's file.
            raise
        raise ConfigError(f"model={config.model.kind}: {error}") from error
    if _is_users_own(config):
        follow_mode(model, key, objective.roles)
    adapt_model(model, config, key)
    return model


def _look_at_metrics(
    config: Config, sources: Sources, network: SplitModel, objective: BatchObjective, measured: str
) -> Rehearsal:
    """Return what is measured, and what is to be told of a model or an objective of the user's own.

    Raises ConfigError where these do not fit each other.
    """
    if not _is_users_own(config):
        return Rehearsal(_list_metrics(measured, sources.num_outputs), ())
    model, own = getattr(config.model, "target", None), getattr(config.objective, "target", None)
    with user_code.as_config_error("objective" if own else "model", own or model):
        size = config.data.batch_size
        seen = rehearse(network, objective, abstract_batch(sources, size), model)
        if size == sources.num_outputs:
            # Logits with examples and classes exchanged have the right shape by chance alone.
            rehearse(network, objective, abstract_batch(sources, 2 * size), model)
        if own is None and model and measured in ("classify", "next_token"):
            told = warn_of_probabilities(network, abstract_batch(sources, size), model)
            return replace(seen, warnings=(*seen.warnings, *told))
        return seen


def _warn_of_axes(declared: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return a warning where a model states axes that no mesh here has; these dimensions are then not divided."""
    for name, axes in declared.items():
        stated = [each for entry in axes for each in (entry if isinstance(entry, tuple) else (entry,)) if each]
        if unknown := [each for each in stated if each not in AXES]:
            return [f"{name} states the axis '{unknown[0]}', which no mesh has (there are: {', '.join(AXES)})"]
    return []


def _warn_of_data(config: Config, sources: Sources) -> list[str]:
    return [*_warn_of_large_batch(config, sources), *_warn_of_vocabulary(config, sources)]


def _warn_of_large_batch(config: Config, sources: Sources) -> list[str]:
    size, count = config.data.batch_size, len(sources.train)
    if size <= count:
        return []
    return [f"data.batch_size={size} is more than the {count} training examples: a batch holds some of them twice"]


def _warn_of_vocabulary(config: Config, sources: Sources) -> list[str]:
    """Return a warning where the data has other tokens than those that the model of a folder was trained on."""
    shape = config.model.shape if isinstance(config.model, HfModel) else None
    if shape is None or shape.vocab in (0, sources.num_outputs):
        return []
    return [
        f"the data has a vocabulary of {sources.num_outputs:,} tokens, and the model one of {shape.vocab:,}: the data "
        "should be tokenized as the model's was"
    ]


def _warn_of_fresh_reference(config: Config, objective: BatchObjective) -> list[str]:
    """Return a warning where a model is to stay near to one that was trained by nobody."""
    if not objective.compares or config.init_from.run is not None:
        return []
    return ["objective=dpo without init_from: answers are compared with a model that knows nothing; say init_from=RUN"]


def _is_users_own(config: Config) -> bool:
    return "external" in (config.model.kind, config.objective.kind)


def abstract_batch(sources: Sources, batch_size: int) -> Batch:
    """Return the shapes of one batch."""
    examples = sources.eval.take(np.zeros(batch_size, np.int64))
    return {
        name: jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype))
        for name, value in examples.items()
    }


def _list_metrics(objective: str, num_outputs: int) -> tuple[str, ...]:
    """Return the names of what an objective of ours measures; none for one of the user's own."""
    names = OBJECTIVE_METRICS.get(objective, ())
    # The one of these that the objective does not give for such a vocabulary.
    other = "bits_per_token" if num_outputs == BYTE_VOCABULARY else "bits_per_byte"
    return tuple(name for name in names if name != other)


def _list_distilled(own: str) -> tuple[str, ...]:
    """Return the names of what is measured beside a teacher; accuracy is of classes."""
    return tuple(name for name in OBJECTIVE_METRICS["distill"] if name != "accuracy" or own == "classify")


def _apply_remat(config: Config, model: nnx.Module) -> None:
    try:
        apply_plan(model, config.remat.plan, config.remat.block)
    except RematPlanError as error:
        raise ConfigError(f"remat={config.remat.kind}: {error}") from None


def read_train_state(built: Built, checkpoint: Path, measured: FileTable | None = None) -> State:
    """Read the train state of a checkpoint; `measured` takes the checksums of its files that were read.

    Raises RefusedError where it is not one of this configuration.
    """
    unchanged = find_unchanged(built.abstract)
    if not unchanged:
        return store.read_state(checkpoint, built.abstract, measured)
    digest = find_digest(checkpoint)
    if digest is None:
        raise RefusedError(
            f"{display_path(checkpoint)}: is of a run that trained all of its parameters, and compared them with none; "
            "start a new run, with init_from=RUN"
        )
    base = locate_base(checkpoint, digest)
    # Of several processes one reads it for a proof.
    if hosts.is_lead():
        prove_base(base)
    trained = store.read_state(checkpoint, leave_unchanged_out(built.abstract), measured)
    return {**trained, **store.read_state(base, unchanged)}


def start_from_weights(built: Built, checkpoint: Path | WeightSource, *, partial: bool) -> tuple[State, TransferReport]:
    """Return a fresh state with the weights of another run's checkpoint, or of others, and what did not fit.

    Raises RefusedError where the checkpoint is not what was written, or where weights differ that may not.
    """
    if isinstance(checkpoint, Path):
        prove_weights(checkpoint)
        whole = read_whole_weights(checkpoint)
        source: WeightSource = (
            CheckpointWeights(checkpoint) if whole is None else HeldWeights(display_path(checkpoint), whole)
        )
    else:
        source = checkpoint
    fresh, adapters = gather_whole(built.init(), built.frozen)
    state, report = take_weights(fresh, source, partial=partial, stacked=is_stacked)
    state = divide_whole(state, adapters, built)
    state = with_ema(state) if "ema" in state else state
    return with_reference(state) if "reference" in built.abstract else state, report
