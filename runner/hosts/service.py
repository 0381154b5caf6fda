"""Have jax join the devices of all processes of a run, and keep its own ideas of their health out of the way."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import closing

from runner import hosts
from runner.hosts.options import Place

# jax's own service notices less than ours, and its answer is to abort: it is to come last.
PATIENT_SECONDS = 24 * 3600


def connect_devices(place: Place, join_seconds: float) -> None:
    """Join the devices of all processes: from then on `jax.devices()` lists those of all of them.

    Every process calls this at the same time, before anything else asks for a device.
    """
    import jax

    # On any port that is free: process 0 says which, so that nobody has to keep a second one free.
    port = _find_free_port(place.host) if place.index == 0 else 0
    address = hosts.agree("jax service", f"{_bracket(place.host)}:{port}")
    # It would take SIGTERM away from us, and knows no other notice.
    jax.config.update("jax_enable_preemption_service", False)  # noqa: FBT003
    # Without it a process that has gone makes jax abort the others, with a C++ stack.
    jax.config.update("jax_enable_recoverability", True)  # noqa: FBT003
    jax.distributed.initialize(
        address,
        place.count,
        place.index,
        local_device_ids=_own_devices(place),
        cluster_detection_method="deactivate",
        initialization_timeout=int(join_seconds),
        heartbeat_timeout_seconds=PATIENT_SECONDS,
        shutdown_timeout_seconds=1,
    )


def _own_devices(place: Place) -> list[int] | None:
    """Return which of this machine's GPUs are this process's: one each, where several processes share them.

    None leaves it to jax: all that are visible.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Whoever starts the processes has dealt the GPUs out already, or there is nobody to share with.
    if place.local_index is None or _count_local(os.environ) == 1 or (visible is not None and "," not in visible):
        return None
    return [place.local_index]


def _count_local(environ: Mapping[str, str]) -> int:
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 1


def _find_free_port(host: str) -> int:
    # Between this and jax's use of it somebody else may take it; then jax says so, and the command is typed again.
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
