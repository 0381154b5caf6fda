"""A small convolutional network: stages of two 3 × 3 convolutions and a pooling, a hidden layer, a linear head."""

from __future__ import annotations

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from models import Cnn
from models.scopes import scope, tag

# ReLU halves the variance of what passes, so the weights double it (He et al. 2015, arXiv:1502.01852).
HE = nnx.initializers.he_normal()


class ConvStage(nnx.Module):
    """Two convolutions with ReLU and a max-pooling (Simonyan & Zisserman 2015, arXiv:1409.1556), then dropout."""

    def __init__(self, channels: int, width: int, dropout: float, rngs: nnx.Rngs):
        self.first = nnx.Conv(channels, width, (3, 3), kernel_init=HE, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), kernel_init=HE, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        """Return features of half the height and width."""
        x = jax.nn.relu(tag(self.first(x), "first"))
        x = jax.nn.relu(tag(self.second(x), "second"))
        return self.dropout(nnx.max_pool(x, (2, 2), (2, 2)))


class CNN(nnx.Module):
    """Stages, then one hidden layer with dropout (Srivastava et al. 2014) and a linear head; He initialization."""

    def __init__(self, option: Cnn, *, image: tuple[int, ...], num_classes: int, rngs: nnx.Rngs):
        height, width, channels = image
        self.stages = nnx.List(
            ConvStage(inputs, outputs, option.dropout, rngs)
            for inputs, outputs in itertools.pairwise((channels, *option.widths))
        )
        halved = 2 ** len(option.widths)
        num_features = (height // halved) * (width // halved) * option.widths[-1]
        self.hidden = nnx.Linear(num_features, option.hidden, kernel_init=HE, rngs=rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)
        self.head = nnx.Linear(option.hidden, num_classes, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Return the logits of the classes."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(jax.nn.relu(self.hidden(x.reshape(len(x), -1)))))
