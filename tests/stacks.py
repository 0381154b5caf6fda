"""Small models to prove rematerialization on: each in a Python loop and under a scan, tagged and untagged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Gpt, Resnet, Vit, decoder_blocks, vit
from models.scopes import layers, scope, tag

NUM_LAYERS, BATCH, SEQ, WIDTH, HIDDEN, HEADS = 5, 2, 6, 8, 24, 2  # neither 2 nor 3 divides the number of blocks


class Loop(nnx.Module):
    """Blocks one after the other, in a list."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.List(make(rngs) for _ in range(num_layers))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class Scan(nnx.Module):
    """The same blocks, their variables stacked."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs):
        self.num_layers = num_layers
        self.blocks = nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers(self.blocks, x, self.num_layers)


class Normed(nnx.Module):
    """A residual block with batch normalization and dropout, that declares nothing."""

    def __init__(self, dropout: float, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(self.norm(self.up(x)))
        return x + self.dropout(self.down(hidden)).astype(x.dtype)


class Declared(Normed):
    """The same with its call declared, and a tag."""

    @scope("block")
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(self.norm(tag(self.up(x), "up")))
        return x + self.dropout(self.down(hidden)).astype(x.dtype)


def _gpt(dropout: float) -> Callable[[nnx.Rngs], nnx.Module]:
    option = Gpt(num_layers=NUM_LAYERS, num_heads=HEADS, width=WIDTH, hidden=HIDDEN, dropout=dropout)
    return lambda rngs: decoder_blocks.DecoderBlock(option, rngs)


def _vit(dropout: float) -> Callable[[nnx.Rngs], nnx.Module]:
    option = Vit(num_layers=NUM_LAYERS, num_heads=HEADS, width=WIDTH, hidden=HIDDEN, dropout=dropout)
    return lambda rngs: vit.VitBlock(option, rngs)


BLOCKS: dict[str, Callable[[float], Callable[[nnx.Rngs], nnx.Module]]] = {
    "gpt": _gpt,
    "vit": _vit,
    "batchnorm": lambda dropout: lambda rngs: Declared(dropout, rngs),
    "untagged": lambda dropout: lambda rngs: Normed(dropout, rngs),
}


def made(kind: str, style: str, dropout: float = 0.0, num_layers: int = NUM_LAYERS) -> Any:
    """The structure of a stack of blocks, or of our ResNet: nothing is allocated."""

    def make() -> nnx.Module:
        if kind == "resnet":
            return Resnet(stages=(2, 3), width=4).build((SEQ, SEQ, 3), 4, nnx.Rngs(0))
        return {"loop": Loop, "scan": Scan}[style](BLOCKS[kind](dropout), num_layers, nnx.Rngs(0))

    model = nnx.eval_shape(make)
    model.train()
    return model


def filled(variables: nnx.State) -> nnx.State:
    """Arrays for the variables of a structure; initializers would take longer than all that is tested."""
    random, shape_of = np.random.default_rng(0), jax.ShapeDtypeStruct

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape or 1).reshape(leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(random.uniform(0.1, 0.5, leaf.shape) * random.choice((-1, 1), leaf.shape), leaf.dtype)

    return jax.tree.map(fill, variables, is_leaf=lambda leaf: isinstance(leaf, shape_of))


def example(kind: str) -> jax.Array:
    """What goes in."""
    shape = (BATCH, SEQ, SEQ, 3) if kind == "resnet" else (BATCH, SEQ, WIDTH)
    return jax.random.normal(jax.random.key(1), shape, jnp.float32)
