"""Devices that are not here: those of a TPU topology, for which libtpu compiles on any machine. Imports jax late."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from runner.errors import ConfigError

if TYPE_CHECKING:
    import jax

# The smallest slices of each kind that a compiler can be asked about, by their number of devices.
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "4x4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# libtpu reads these when jax starts: no TPU is to be started, and it need not ask on what machine it is.
COMPILE_ONLY_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def prepare_target(target: str) -> None:
    """Set the environment in which jax can compile for a target, as `tpu:v5e` or `tpu:v5e:4x4`; before jax starts.

    Raises ConfigError where the target is none of those there are, or libtpu is not installed.
    """
    platform, _, name = target.partition(":")
    kind, _, shape = name.partition(":")
    if platform != "tpu" or kind not in TOPOLOGIES or (shape and not shape.replace("x", "").isdecimal()):
        kinds = ", ".join(f"tpu:{each}" for each in TOPOLOGIES)
        raise ConfigError(f"--target {target}: expected {kinds}, or one of its slices, as tpu:v5e:4x4")
    if find_spec("libtpu") is None:
        raise ConfigError(
            f"--target {target}: libtpu is not installed, and it is what compiles for a TPU; pip install libtpu"
        )
    for name, value in COMPILE_ONLY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Return the devices of the slice that a target names, else of the smallest slice of its kind with `count` of them.

    Where no slice has as many, they are those of the largest. Raises ConfigError where libtpu knows no such slice.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental.topologies import get_topology_desc

    kind, _, shape = target.partition(":")[2].partition(":")
    for each in (shape,) if shape else TOPOLOGIES[kind]:
        try:
            found = list(get_topology_desc(f"{kind}:{each}", "tpu").devices)
        except JaxRuntimeError as error:
            raise ConfigError(f"--target {target}: {str(error).splitlines()[0]}") from None
        if len(found) >= count:
            break
    return found
