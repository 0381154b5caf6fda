"""Where the arrays of a program's state lie in a train state, which holds nested dicts with string keys alone.

A program's state is any pytree: tuples, records of optax or flax, modules of Equinox. What is saved, compared, exported
and laid out on devices is a plain dict, whose names any reader of a checkpoint can follow: `weights.params.out.kernel`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import InvalidModelOrObjective
from models.objectives import describe_value
from models.user_program import USUAL_WEIGHTS
from runner.types import Params, Tree

# The sections of a train state: what is learnt, and what lasts beside it.
WEIGHTS, REST = "weights", "rest"


@dataclass(frozen=True)
class ProgramLayout:
    """The structure of a program's state, and where each of its arrays lies.

    Attributes:
        structure: what jax calls its treedef.
        places: for each array, in the order of the structure, the keys that lead to it in a train state.
        kinds: shape and type of each array.
        promoted: positions of the numbers that `init` gives in another type than a step, which decides.
    """

    structure: Any
    places: tuple[tuple[str, ...], ...]
    kinds: tuple[jax.ShapeDtypeStruct, ...]
    promoted: frozenset[int] = frozenset()

    def unpack(self, state: Params) -> Tree:
        """Return the program's own state, out of a train state."""
        leaves = []
        for place in self.places:
            node: Any = state
            for key in place:
                node = node[key]
            leaves.append(node)
        return jax.tree.unflatten(self.structure, leaves)

    def pack(self, tree: Tree, function: str) -> dict[str, Any]:
        """Return the sections of a train state that hold a program's state, which `function` of it returned.

        Raises InvalidModelOrObjective where it has another structure, or an array another shape or type.
        """
        found = [(name_path(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        names = [place[1:] for place in self.places]
        if [name for name, _ in found] != names:
            raise InvalidModelOrObjective(_explain_structure(function, names, [name for name, _ in found]))
        state: dict[str, Any] = {WEIGHTS: {}, REST: {}}
        for position, (place, kind, (name, leaf)) in enumerate(zip(self.places, self.kinds, found, strict=True)):
            value = as_array(leaf, function, name)
            if position in self.promoted and function == "init":
                value = value.astype(kind.dtype)
            if (value.shape, value.dtype) != (kind.shape, kind.dtype):
                raise InvalidModelOrObjective(
                    f"{function} changes {join_name(name)} of the state from {_describe(kind)} to {_describe(value)}; "
                    "keep shape and type, as every step has the same state"
                )
            node = state
            for key in place[:-1]:
                node = node.setdefault(key, {})
            node[place[-1]] = value
        return state


def lay_out(tree: Tree, weights: Collection[str] | None) -> ProgramLayout:
    """Return the layout of a program's state, as `init` returned it: arrays, abstract ones, or numbers.

    `weights` names the top-level parts that are what is learnt; None: those with a usual name, else all.

    Raises InvalidModelOrObjective where the state is no pytree of arrays and random keys.
    """
    try:
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    except (ValueError, TypeError) as error:
        raise InvalidModelOrObjective(f"init gave a state that jax cannot take apart: {error}") from None
    if not paths:
        raise InvalidModelOrObjective("init gave a state without arrays; expected what a step changes")
    names = [name_path(path) for path, _ in paths]
    kinds = []
    for name, (_, leaf) in zip(names, paths, strict=True):
        value = as_array(leaf, "init", name)
        kinds.append(jax.ShapeDtypeStruct(value.shape, value.dtype))
    joined = [join_name(name) for name in names]
    if twice := sorted(name for name, count in Counter(joined).items() if count > 1):
        raise InvalidModelOrObjective(f"init gave a state with two arrays called {twice[0]}; rename one")
    parts = {name[0] for name in names}
    if unknown := sorted(set(weights or ()) - parts):
        raise InvalidModelOrObjective(
            f"weights names '{unknown[0]}', but the state has no such part; it has: {', '.join(sorted(parts))}"
        )
    learnt = set(weights) if weights is not None else parts & set(USUAL_WEIGHTS) or parts
    places = tuple((WEIGHTS if name[0] in learnt else REST, *name) for name in names)
    return ProgramLayout(structure, places, tuple(kinds))


def as_array(leaf: Any, function: str, name: tuple[str, ...]) -> jax.Array:
    """Return a leaf as an array whose type does not give way to another (jax: no weak type).

    A number of Python's takes the type of what it meets; after a restart it would be an array, and take no other.
    Raises InvalidModelOrObjective where it is no array.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf  # type: ignore[return-value]
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        raise InvalidModelOrObjective(
            f"{function} gave a state in which {join_name(name)} is {describe_value(leaf)}; expected arrays and random "
            "keys alone: close over the rest (Equinox: eqx.partition(model, eqx.is_array))"
        )
    try:
        array = jnp.asarray(leaf)
    except OverflowError:
        raise InvalidModelOrObjective(
            f"{function} gave a state in which {join_name(name)} is {leaf}, more than 32 bits hold; make it a "
            "fraction, or two numbers"
        ) from None
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    if array.dtype == jax.dtypes.float0:
        raise InvalidModelOrObjective(
            f"{function} gave a state in which {join_name(name)} is of float0, the gradient of whole numbers, which "
            "holds nothing; leave it out"
        )
    return jax.lax.convert_element_type(array, array.dtype)


def name_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the keys that lead to a leaf, as text; of a state that is one array, its one name."""
    keys = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return tuple(map(str, keys)) or ("state",)


def join_name(name: tuple[str, ...]) -> str:
    """Return a path as people read it: `params.out.kernel`."""
    return ".".join(name)


def _explain_structure(function: str, wanted: list[tuple[str, ...]], found: list[tuple[str, ...]]) -> str:
    new, gone = (sorted(map(join_name, set(one) - set(other))) for one, other in ((found, wanted), (wanted, found)))
    what = [f"adds {new[0]}"] if new else []
    what += [f"leaves out {gone[0]}"] if gone else []
    told = " and ".join(what) or "changes its order"
    return f"{function} changes the structure of the state: it {told}; return what it was given, with other values"


def _describe(kind: Any) -> str:
    return f"{kind.dtype}[{','.join(map(str, kind.shape))}]"
