"""A checkpoint as a live model, in a notebook: `from runner import load`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runner.config.schema import Config, of_now, validate_options
from runner.config.user_code import require_trust
from runner.inspect.lookup import find_attempt, find_proven_checkpoint, read_config_document
from runner.mesh import Mesh
from runner.train import dataset
from runner.train.build import build, restore
from runner.train.step import Weights, with_weights

if TYPE_CHECKING:
    from flax import nnx


def load_model(reference: str, weights: Weights = "params", *, trust: bool = False) -> tuple[nnx.Module, Config]:
    """The model of `RUN`, `RUN@STEP` or `RUN@best`, in evaluation mode, and the configuration it was trained with.

        model, config = load("outputs/NAME/RUN@best")

    Every byte is proven first (RefusedError), and no code of the run is executed: config.yaml is data. A run that names
    a model, data or an objective of somebody's own is refused without `trust=True` (RefusedError). The model lies
    on one device, whatever the run had. How many inputs and outputs the model has is in data.json; for a run without
    one the data is read: it must still be where the configuration says (ConfigError). `weights="ema"` takes the average
    that optim.ema keeps (ConfigError where there is none).
    """
    checkpoint, _ = find_proven_checkpoint(reference)
    document = read_config_document(checkpoint.run, find_attempt(checkpoint).get("drift", ()))
    if not trust:
        require_trust(checkpoint.run.path, document, {}, "say trust=True")
    config = on_one_device(validate_options(Config, of_now(document)))
    built = build(config, dataset.as_recorded(checkpoint.run))
    return built.model(with_weights(restore(built, checkpoint.directory), weights)), config


def on_one_device(config: Config) -> Config:
    """The same on one device; and with an attention that every machine has, in float32 as well."""
    model: Any = config.model
    if hasattr(model, "attention"):
        model = replace(model, attention="xla")
    return replace(config, mesh=Mesh(data=1), model=model)
