"""Name the pytrees that pass between the parts of training.

The aliases are strings for a type checker: this module is imported before it is known whether jax is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax

# The train state, a plain dict of arrays: {"step": Int[], "params": …, "extra": …, "rng": …, "opt": …, "ema": …}.
# Its abstract twin holds a `jax.ShapeDtypeStruct` at every leaf. Its layout is stated in runner/train/step.py.
State: TypeAlias = "dict[str, Any]"

# Nested dicts of arrays with string keys: the trained variables of a model, their gradients, an average of them.
Params: TypeAlias = "dict[str, Any]"

# Arrays by field name, or their abstract twins; the leading dimension of each is the example.
Batch: TypeAlias = "Mapping[str, Any]"

# Scalars by name, still on the device: reading one waits for the step that computes it.
Metrics: TypeAlias = "Mapping[str, jax.Array]"

# Any pytree of arrays, abstract arrays or shardings (jax has no type for one).
Tree: TypeAlias = "Any"

# An object of plain JSON values that we made: a data position, a status, what a checkpoint says of itself.
JsonObject: TypeAlias = "dict[str, Any]"

# What a checkpoint holds, by item: a train state, and what is plain JSON.
CheckpointItems: TypeAlias = "Mapping[str, State | JsonObject]"

# A configuration as plain JSON values: as it is composed, validated, hashed and written to config.yaml.
Document: TypeAlias = "Mapping[str, Any]"
