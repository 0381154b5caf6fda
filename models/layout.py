"""Where activations lie on several devices: the leading dimension of what goes from block to block is the batch.

Left to itself the compiler lays some activations out like the weights that made them, and moves them back and forth:
with divided weights a GPT's step then has 23 all-gathers and 7 all-to-alls, and 10 and none where the batch is stated
at the borders of blocks (measured on jax 0.10.2, 8 devices).

The statement travels in a jax user context, as the remat plan does (scopes.py): it is part of the key of every trace.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import jax

_batch_sharding = jax.make_user_context(default_value=None)


def use_batch_sharding(sharding: jax.sharding.NamedSharding | None) -> AbstractContextManager[None]:
    """Return a context in which `constrain_batch` divides what it is given like this; None: not at all."""
    return _batch_sharding(sharding)


def constrain_batch(x: Any) -> Any:
    """Return x, with its leading dimension divided as the batch is, where the context says how and it can be."""
    sharding = _batch_sharding.value
    if sharding is None or not isinstance(x, jax.Array) or x.ndim < 2:
        return x
    # Of one example, as a model goes on after a prompt, nothing is said.
    return x if x.shape[0] % _count_parts(sharding) else jax.lax.with_sharding_constraint(x, sharding)


def _count_parts(sharding: jax.sharding.NamedSharding) -> int:
    """Return in how many parts the leading dimension is divided."""
    axes = sharding.spec[0] if len(sharding.spec) else ()
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names if name)
