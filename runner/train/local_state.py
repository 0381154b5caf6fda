"""Bring a state that lies on the devices of several processes to one device of this one: to look at it."""

from __future__ import annotations

import functools

import jax

from runner import hosts
from runner.mesh import replicated_sharding
from runner.types import State, Tree

# What an optimizer keeps is as large as everything else, and nobody looks at it.
LEFT_OUT = "opt"


def bring_here(state: State) -> State:
    """Return a state without its optimizer, each array whole on one device of this process.

    Every process calls this at the same time. With one process it is the state as it is. Takes as much memory as the
    weights on one device of each process.
    """
    if hosts.is_alone():
        return state
    looked_at = {name: leaf for name, leaf in state.items() if name != LEFT_OUT}
    mesh = jax.tree.leaves(looked_at)[0].sharding.mesh
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), _gather_function(mesh)(looked_at))


@functools.cache
def _gather_function(mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    def give_back(tree: Tree) -> Tree:
        return tree

    return jax.jit(give_back, out_shardings=replicated_sharding(mesh))
