"""Devices and shardings. One device is a mesh of one; the batch is divided along the axis `data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import ConfigError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices share the batch; -1 takes every device of this machine."""

    data: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 and self.data != -1:
            raise ValueError(f"data={self.data} must be a number of devices, or -1 for all of them")

    def build(
        self, batch_size: int, microbatches: int = 1, devices: Sequence[jax.Device] | None = None
    ) -> jax.sharding.Mesh:
        """The mesh of these devices, or of this process. Raises ConfigError where they or the batch do not allow it."""
        import jax

        place, devices = ("this machine", jax.devices()) if devices is None else ("the target", devices)
        count = len(devices) if self.data == -1 else self.data
        if count > len(devices):
            raise ConfigError(f"mesh.data: got {count}; {place} has {len(devices)} device(s); use mesh.data=-1")
        if batch_size % (count * microbatches):
            parts = f" times train.microbatches={microbatches}" if microbatches > 1 else ""
            raise ConfigError(
                f"data.batch_size: got {batch_size}; it must divide evenly among mesh.data={count} devices{parts}"
            )
        return jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices[:count])


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Every device holds the whole value."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The leading dimension is divided along `data`."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec("data"))
