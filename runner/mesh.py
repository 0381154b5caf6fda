"""Devices, and where every array lies on them. One device is a mesh of one; a batch is divided along the axis `data`.

This is the only module that decides where an array lies: `state_shardings` for what training changes, `batch_sharding`
for what it reads. Everything else asks here, or asks an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import ConfigError
from runner.types import State, Tree

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices share the batch.

    Attributes:
        data: how many; -1 takes every device of this machine.
    """

    data: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 and self.data != -1:
            raise ValueError(f"data={self.data} must be a number of devices, or -1 for all of them")

    def build(
        self, batch_size: int, microbatches: int = 1, devices: Sequence[jax.Device] | None = None
    ) -> jax.sharding.Mesh:
        """Return the mesh of these devices, or of this process's.

        Raises ConfigError where there are too few, or where the batch does not divide evenly among them.
        """
        import jax

        owner, devices = ("this machine", jax.devices()) if devices is None else ("the target", devices)
        count = len(devices) if self.data == -1 else self.data
        if count > len(devices):
            raise ConfigError(f"mesh.data: got {count}; {owner} has {len(devices)} device(s); use mesh.data=-1")
        if batch_size % (count * microbatches):
            parts = f" times train.microbatches={microbatches}" if microbatches > 1 else ""
            raise ConfigError(
                f"data.batch_size: got {batch_size}; it must divide evenly among mesh.data={count} devices{parts}"
            )
        return jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices[:count])


def state_shardings(mesh: jax.sharding.Mesh, abstract_state: State) -> Tree:
    """Return a tree like the state with the sharding of every leaf: today each device holds the whole state."""
    import jax

    return jax.tree.map(lambda leaf: replicated_sharding(mesh), abstract_state)


def replicated_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of a batch: its leading dimension is divided along `data`."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec("data"))


def bytes_per_device(tree: Tree) -> int:
    """Return how many bytes of a tree of arrays, abstract or real, lie on one device, as their shardings say."""
    import jax

    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def batch_share(mesh: jax.sharding.Mesh, num_bytes: int) -> int:
    """Return how many of the bytes that grow with the batch (activations) lie on one device."""
    return num_bytes // mesh.shape["data"]


def _shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    import math

    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
