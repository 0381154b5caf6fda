"""A fresh model with weights that hide nothing, made at once: an initializer after the other takes seconds to compile."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from models import Model


def fresh(option: Model, inputs: tuple[int, ...], num_outputs: int, noise: float, *, train: bool = False) -> Any:
    """(structure, parameters, the rest) of a model. Biases, scales and a head that start at zero get `noise` as well."""

    def make() -> nnx.Module:
        model = option.build(inputs, num_outputs, nnx.Rngs(0))
        model.train() if train else model.eval()
        return model

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    params, rest = jax.jit(lambda: nnx.split(make(), nnx.Param, ...)[1:])()
    random = np.random.default_rng(0)
    return (
        graphdef,
        jax.tree.map(lambda leaf: leaf + random.normal(0, noise, leaf.shape).astype(leaf.dtype), params),
        rest,
    )
