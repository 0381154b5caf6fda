"""A plain multi-layer perceptron over feature vectors."""

from __future__ import annotations

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from models import Mlp
from models.scopes import scope, tag


class HiddenLayer(nnx.Module):
    """A linear map, ReLU, dropout."""

    def __init__(self, num_inputs: int, width: int, dropout: float, rngs: nnx.Rngs):
        self.linear = nnx.Linear(num_inputs, width, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch width"]:
        """Return the activations of the layer."""
        return self.dropout(jax.nn.relu(tag(self.linear(x), "hidden")))


class MLP(nnx.Module):
    """Hidden layers with He initialization (He et al. 2015, arXiv:1502.01852) and a linear head."""

    def __init__(self, option: Mlp, *, num_inputs: int, num_classes: int, rngs: nnx.Rngs):
        widths = [num_inputs] + [option.width] * option.num_layers
        self.hidden = nnx.List(
            HiddenLayer(inputs, width, option.dropout, rngs) for inputs, width in itertools.pairwise(widths)
        )
        self.head = nnx.Linear(option.width, num_classes, rngs=rngs)

    def __call__(self, inputs: Float[Array, "batch *inputs"]) -> Float[Array, "batch classes"]:
        """Return the logits of the classes; an image is taken as one long row of features."""
        x = inputs.reshape(len(inputs), -1)
        for layer in self.hidden:
            x = layer(x)
        return self.head(x)
