"""Load a checkpoint as a live model, in a notebook or a program: `from runner import load`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from models import Distill, NamedObjective
from runner.config.schema import Config, validate_options
from runner.config.trust import Use, require_trust
from runner.errors import ConfigError
from runner.inspect.lookup import Checkpoint, find_attempt, find_proven_checkpoint, is_in_bucket, read_config_document
from runner.mesh import Mesh
from runner.text import shorten
from runner.train import dataset
from runner.train.build import build, read_train_state
from runner.train.step import Weights, with_weights

if TYPE_CHECKING:
    from flax import nnx

    from runner.train.built import LoadedProgram


def load_model(
    reference: str, weights: Weights = "params", *, trust: bool = False
) -> tuple[nnx.Module | LoadedProgram, Config]:
    """Return the model of a checkpoint, in evaluation mode on one device, and the configuration it was trained with.

    In the place of a model, a run of a program of one's own has the program and its state (`LoadedProgram`).

        from runner import load
        model, config = load("outputs/NAME/RUN@best")

    No code of the run is executed: config.yaml is data. How many inputs and outputs the model has is in data.json; for
    a run without one the data is read, and must still be where the configuration says.

    Args:
        reference: `RUN`, `RUN@STEP` or `RUN@best`; RUN is a directory, or `s3://BUCKET/PREFIX/NAME/RUN` and the like.
        weights: `"ema"` takes the average that `optim.ema` keeps.
        trust: whether code that the run names may be imported: a model, data or an objective of somebody's own.

    Raises:
        RefusedError: a byte of the checkpoint is not what was written, or code is named and not trusted.
        ConfigError: there is no such average, or the data is not where it was.
    """
    # What is no name of weights is mostly the step that is asked for, and would get the average of another one.
    if weights not in get_args(Weights):
        raise ConfigError(
            f"weights={shorten(str(weights), 60)}: expected one of {', '.join(get_args(Weights))}; a checkpoint is "
            "named as RUN@best, or as at=… of a result"
        )
    checkpoint, _ = find_proven_checkpoint(reference)
    try:
        return _build_model(checkpoint, weights, trust=trust)
    finally:
        # A notebook loads again and again, and has what it needs in memory by now.
        if is_in_bucket(checkpoint.run_dir):
            from runner.remote.reading import forget_run

            forget_run(checkpoint.run_dir.path)


def _build_model(checkpoint: Checkpoint, weights: Weights, *, trust: bool) -> tuple[nnx.Module | LoadedProgram, Config]:
    document = read_config_document(checkpoint.run_dir, find_attempt(checkpoint).get("drift", ()))
    config = on_one_device(validate_options(Config, document))
    # What is built for so many steps (a schedule, a program) is built as it was; the data may not be there to count.
    steps = checkpoint.run_dir.read_status().get("steps") or config.train.steps or checkpoint.step
    known = replace(config, train=replace(config.train, steps=steps, epochs=None))
    recorded = dataset.sources_as_recorded(checkpoint.run_dir)
    if not trust:
        # What data.json tells needs no data.
        uses: tuple[Use, ...] = ("code", "data") if recorded is None else ("code",)
        require_trust(checkpoint.run_dir.path, config, {}, "say trust=True", uses)
    built = build(known, recorded)
    return built.model(with_weights(read_train_state(built, checkpoint.directory), weights)), config


def on_one_device(config: Config) -> Config:
    """Return a configuration for one device, and with XLA's attention, which every machine has in every precision."""
    model: Any = config.model
    # Weights are the same for every implementation of attention, but a GPU's own is for a GPU, and for bfloat16.
    if hasattr(model, "attention"):
        model = replace(model, attention="xla")
    # A model that was taught needs no teacher any more.
    objective = NamedObjective() if isinstance(config.objective, Distill) else config.objective
    return replace(config, mesh=Mesh(data=1), model=model, objective=objective)
