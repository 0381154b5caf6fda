"""Move results between the devices of a mesh, which may belong to several processes, and add them in one fixed order.

A process holds and runs what belongs to its own devices. Where devices have to meet there is one program that all of
them run (SPMD), and every process must come to it equally often. Such a program only moves numbers; what it adds, it
adds in the tree in which everything else is added, so that no bit depends on how many devices or processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from models.objectives import MergeableMetric
from runner.types import Tree

# The axis that divides what each device has: its leading dimension.
AXIS = "data"


@dataclass(frozen=True)
class OwnDevice:
    """A device of this process.

    Attributes:
        place: where it stands among all devices of the mesh, those of other processes included.
    """

    place: int
    device: jax.Device


def list_own_devices(mesh: jax.sharding.Mesh) -> list[OwnDevice]:
    """Return the devices of a mesh that this process computes on, in the order of the mesh."""
    this = jax.process_index()
    devices = enumerate(mesh.devices.flat)
    return [OwnDevice(place, device) for place, device in devices if device.process_index == this]


def add_trees(left: Tree, right: Tree) -> Tree:
    """Return the sum of two trees of arrays, or of metrics that know how they are merged."""
    return jax.tree.map(
        lambda a, b: _merge_metrics(a, b) if isinstance(a, MergeableMetric) else a + b,
        left,
        right,
        is_leaf=lambda leaf: isinstance(leaf, MergeableMetric),
    )


def _merge_metrics(left: MergeableMetric, right: MergeableMetric) -> Tree:
    # A user's own may give numbers of Python or numpy. They are rounded at once, as they are where they have to move.
    return jax.tree.map(jnp.asarray, left.merge(right))


class PartialSums:
    """Add results pair by pair in the order in which they come: equal numbers of them first, as a binary tree does."""

    def __init__(self, add: Callable[[Tree, Tree], Tree]):
        self._add, self._waiting, self._count = add, list[Tree](), 0

    def push(self, result: Tree) -> None:
        """Take the result that comes next."""
        self._count += 1
        size = self._count
        while size % 2 == 0:
            result, size = self._add(self._waiting.pop(), result), size // 2
        self._waiting.append(result)

    def total(self) -> Tree:
        """Return the sum; there were a power of two of them."""
        (total,) = self._waiting
        return total


def sum_across(mesh: jax.sharding.Mesh, summed: Tree, kept: Tree) -> tuple[Tree, Tree]:
    """Return on every device the sum of what all of them have, and what the first of them keeps.

    The leading dimension counts the devices, and is one in what is returned. Each device gets one piece of what all
    have (all-to-all), adds the pieces in the fixed tree, and the sums are put together again (all-gather): as many
    bytes as in a ring, and no addition on the way.
    """

    def add_pieces(leaf: jax.Array) -> jax.Array:
        flat = leaf.reshape(-1)
        pieces = jnp.pad(flat, (0, -flat.size % mesh.size)).reshape(mesh.size, -1)
        pieces = jax.lax.all_to_all(pieces, AXIS, 0, 0).reshape(mesh.size, -1)
        while len(pieces) > 1:
            pieces = pieces[0::2] + pieces[1::2]
        whole = jax.lax.all_gather(pieces[0], AXIS, tiled=True)
        return whole[: flat.size].reshape(leaf.shape)

    def meet(summed: Tree, kept: Tree) -> tuple[Tree, Tree]:
        first = jax.tree.map(lambda leaf: _gather_leaf(leaf)[:1], kept)
        return jax.tree.map(add_pieces, summed), first

    return _run_on_all(mesh, meet)(summed, kept)


@partial(jax.jit, static_argnums=0)
def gather_results(mesh: jax.sharding.Mesh, tree: Tree) -> list[Tree]:
    """Return on every device what each of them has, in the order of the mesh; the leading dimension counts them."""

    def meet(tree: Tree) -> list[Tree]:
        gathered = jax.tree.map(_gather_leaf, tree)
        return [jax.tree.map(lambda leaf, place=place: leaf[place], gathered) for place in range(mesh.size)]

    return _run_on_all(mesh, meet)(tree)


def _run_on_all(mesh: jax.sharding.Mesh, function: Callable[..., Tree]) -> Callable[..., Tree]:
    """Return a function from arrays that are divided among the devices to arrays that all of them have."""
    return jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(), check_vma=False)


def _gather_leaf(leaf: jax.Array) -> jax.Array:
    # jax moves the words of a random key, and no key itself.
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.lax.all_gather(jax.random.key_data(leaf), AXIS, tiled=True)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return jax.lax.all_gather(leaf, AXIS, tiled=True)


def divided_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of what each device has one of."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def join_divided(mesh: jax.sharding.Mesh, own: Sequence[Tree]) -> Tree:
    """Return arrays whose leading dimension is divided among all devices, of what each device of this process has."""

    def join(*leaves: jax.Array) -> jax.Array:
        shape = (mesh.size, *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, divided_sharding(mesh), list(leaves))

    return jax.tree.map(join, *own)


def join_replicas(shardings: Tree, own: Sequence[Tree]) -> Tree:
    """Return arrays that every device has whole, of those that each device of this process has."""

    def join(sharding: NamedSharding, *leaves: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(leaves[0].shape, sharding, list(leaves))

    return jax.tree.map(join, shardings, *own)


def view_on_device(tree: Tree, device: jax.Device) -> Tree:
    """Return the arrays of a tree as one device of this process has them, without a copy."""

    def look(leaf: jax.Array) -> jax.Array:
        return next(shard.data for shard in leaf.addressable_shards if shard.device == device)

    return jax.tree.map(look, tree)
