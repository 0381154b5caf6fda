"""What a parameter is to the optimizer, by its name and its shape: what decays, and which are hidden matrices."""

from __future__ import annotations

import math
from typing import Any

import jax

Tree = dict[str, Any]
Axes = tuple[tuple[int, ...], tuple[int, ...]]  # of a matrix: in, out

STACKED = "blocks"  # models keep layers that are stacked for a scan under this name: one more leading dimension
VECTORS = ("bias", "scale")  # never matrices, also where heads or channels give them more dimensions
# Modules between tokens or pixels or classes and the inside, by the last word of their name (`lm_head`).
OUTER = ("embed", "embedding", "embeddings", "patch", "patches", "stem", "head")


def is_stacked(name: str) -> bool:
    """Whether a leaf of the state (`params.blocks.ffn.up.kernel`) holds the same weight of every stacked layer."""
    return name.split(".")[1:2] == [STACKED]


def decay_mask(params: Tree) -> Tree:
    """True for what weight decay applies to: matrices, kernels and embeddings, not counting the stacking dimension."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        *_, name = names = _names(path)
        return name not in VECTORS and leaf.ndim - (names[0] == STACKED) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon_axes(params: Tree) -> Tree:
    """For each parameter the axes (in, out) of a hidden matrix, or None: what is orthogonalized, one layer at a time.

    A hidden matrix is a `kernel` (flax's name for the weights of a linear map or a convolution) outside embeddings,
    stems and heads. Its last axis is out, all others but the stacking one are in: a convolution counts as one matrix.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> Axes | None:
        *modules, name = names = _names(path)
        first = int(names[0] == STACKED)
        outer = any(module.split("_")[-1] in OUTER for module in modules)
        if name != "kernel" or outer or leaf.ndim - first < 2:
            return None
        return tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,)

    return jax.tree_util.tree_map_with_path(axes, params)


def count_fans(matrix: jax.Array, axes: Axes) -> tuple[int, int]:
    """How many numbers go in and out of a hidden matrix with these axes."""
    inward, outward = (math.prod(matrix.shape[axis] for axis in side) for side in axes)
    return inward, outward


def _names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]
