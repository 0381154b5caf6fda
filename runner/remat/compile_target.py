"""Devices that are not here: those of a TPU slice or of a machine with GPUs, for which any machine can compile.

For TPUs libtpu does it, for GPUs the CUDA plugin of jax: it needs no GPU and no driver, only a description of the
device (jax 0.10.2; measured against no real one). Imports jax late.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
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
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
# What XLA asks of a GPU, as it describes an H100 with 80 GB itself (its GpuTargetConfig, as text).
GPUS = {
    "h100": (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
        "shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
        "device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 "
        "cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 } "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } '
        'runtime_version { major: 12 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"'
    ),
}
# No GPU is to be looked for, and none is there to try kernels on.
GPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
}
GPU_PACKAGES = ("jax-cuda12-pjrt", "jax-cuda12-plugin")
MOST_GPUS = 1024


def prepare_target(target: str) -> None:
    """Set the environment in which jax can compile for a target, before jax starts.

    A target is `tpu:v5e`, one of its slices as `tpu:v5e:4x4`, or `gpu:h100:8`.

    Raises ConfigError where it is none of those there are, or what compiles for it is not installed.
    """
    platform, _, name = target.partition(":")
    kind, _, shape = name.partition(":")
    if platform == "tpu" and kind in TOPOLOGIES and (not shape or shape.replace("x", "").isdecimal()):
        _prepare_tpu(target)
    elif platform == "gpu" and kind in GPUS and re.fullmatch(r"|[1-9]\d{0,3}", shape) and int(shape or 1) <= MOST_GPUS:
        _prepare_gpu(target)
    else:
        kinds = ", ".join([*(f"tpu:{each}" for each in TOPOLOGIES), *(f"gpu:{each}" for each in GPUS)])
        raise ConfigError(f"--target {target}: expected {kinds}, or so many of them, as tpu:v5e:4x4 or gpu:h100:8")


def _prepare_tpu(target: str) -> None:
    if find_spec("libtpu") is None:
        raise ConfigError(
            f"--target {target}: libtpu is not installed, and it is what compiles for a TPU; pip install libtpu"
        )
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _prepare_gpu(target: str) -> None:
    wanted = version("jax")
    for package in GPU_PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            both = " ".join(f"{each}=={wanted}" for each in GPU_PACKAGES)
            raise ConfigError(
                f"--target {target}: {package} {wanted} is what compiles for it (there is {found}); in an environment "
                f"of its own: pip install --no-deps {both}"
            )
    # Whatever the user has chosen for his own runs: nothing is computed here.
    os.environ.update(GPU_ENVIRONMENT)


def target_devices(target: str, count: int) -> list[jax.Device]:
    """Return the devices that a target names, else the fewest of its kind that are `count` or more.

    Of TPUs, where no slice has as many, they are those of the largest. Raises ConfigError where the compiler knows no
    such devices.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental.topologies import get_topology_desc

    platform, kind, shape = [*target.split(":"), ""][:3]
    found: list[jax.Device] = []
    try:
        if platform == "gpu":
            # Slices, hosts of each, and devices of each host.
            topology = f"1x1x{shape or count}"
            return list(get_topology_desc(platform="cuda", target_config=GPUS[kind], topology=topology).devices)
        for each in (shape,) if shape else TOPOLOGIES[kind]:
            found = list(get_topology_desc(f"{kind}:{each}", "tpu").devices)
            if len(found) >= count:
                break
    except JaxRuntimeError as error:
        raise ConfigError(f"--target {target}: {str(error).splitlines()[0]}") from None
    return found
