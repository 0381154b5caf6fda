"""Tell by its name and its shape what a parameter is to the optimizer: what decays, and which are hidden matrices."""

from __future__ import annotations

import math
from typing import Any

import jax

from runner.mesh import STACKED
from runner.types import Params

# A tree like the parameters, with something else at each leaf.
ParamsLike = dict[str, Any]
# Of a matrix: the axes that go in, and those that go out.
Axes = tuple[tuple[int, ...], tuple[int, ...]]

# These are never matrices, also where heads or channels give them more dimensions.
VECTORS = ("bias", "scale")
# Modules between tokens or pixels or classes and the inside, by the last word of their name (`lm_head`).
OUTER_MODULES = ("embed", "embedding", "embeddings", "patch", "patches", "stem", "head")


def is_stacked(name: str) -> bool:
    """Return whether a leaf, as `params.blocks.ffn.up.kernel`, holds the same weight of every stacked layer."""
    return name.split(".")[1:2] == [STACKED]


def decay_mask(params: Params) -> ParamsLike:
    """Return True for what weight decay applies to: matrices, kernels and embeddings.

    The stacking dimension does not count, so the bias of stacked layers is no matrix.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        *_, name = names = _path_names(path)
        return name not in VECTORS and leaf.ndim - (names[0] == STACKED) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon_axes(params: Params) -> ParamsLike:
    """Return for each parameter the axes (in, out) of a hidden matrix, which Muon orthogonalizes, or None.

    A hidden matrix is a `kernel` (flax's name for the weights of a linear map or a convolution) outside embeddings,
    stems and heads. Its last axis is out, all others but the stacking one are in: a convolution counts as one matrix.
    """

    def find_axes(path: tuple[Any, ...], leaf: Any) -> Axes | None:
        *modules, name = names = _path_names(path)
        first = int(names[0] == STACKED)
        is_outer = any(module.split("_")[-1] in OUTER_MODULES for module in modules)
        if name != "kernel" or is_outer or leaf.ndim - first < 2:
            return None
        return tuple(range(first, leaf.ndim - 1)), (leaf.ndim - 1,)

    return jax.tree_util.tree_map_with_path(find_axes, params)


def count_fans(matrix: jax.Array, axes: Axes) -> tuple[int, int]:
    """Return how many numbers go in and out of a hidden matrix with these axes."""
    inward, outward = (math.prod(matrix.shape[axis] for axis in side) for side in axes)
    return inward, outward


def _path_names(path: tuple[Any, ...]) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]
