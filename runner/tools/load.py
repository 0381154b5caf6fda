"""A checkpoint as a live model, in a notebook: `from runner import load`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data.sources import Sources, Table
from runner import dataset
from runner.build import build, restore
from runner.config import Config, checked
from runner.mesh import Mesh
from runner.tools.place import maker_of, proven_at
from runner.tools.settings import document_of

if TYPE_CHECKING:
    from flax import nnx


def load(reference: str) -> tuple[nnx.Module, Config]:
    """The model of `RUN`, `RUN@STEP` or `RUN@best`, in evaluation mode, and the configuration it was trained with.

        model, config = load("outputs/NAME/RUN@best")

    Every byte is proven first (RefusedError), and no code of the run is executed: config.yaml is data. The model lies
    on one device, whatever the run had. How many inputs and outputs the model has is in data.json; for a run without
    one the data is read: it must still be where the configuration says (ConfigError).
    """
    checkpoint, _ = proven_at(reference)
    document = document_of(checkpoint.run, maker_of(checkpoint).get("drift", ()))
    config = replace(checked(Config, document), mesh=Mesh(data=1))
    built = build(config, _as_recorded(dataset.recorded(checkpoint.run)))
    return built.model(restore(built, checkpoint.directory)), config


def _as_recorded(data: dict[str, Any] | None) -> Sources | None:
    """The shape of a run's data, without the data."""
    if data is None:
        return None
    nothing = Table({"inputs": np.zeros(0)})
    return Sources(nothing, nothing, tuple(data["inputs"]), data["num_outputs"], data["fingerprint"], data["summary"])
