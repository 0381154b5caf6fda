"""Which cores and which GPUs each of several runs beside each other gets. A run alone gets what there is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from runner.errors import ConfigError

Thing = TypeVar("Thing")

GPUS = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Share:
    """The cores a process may use (none: all), and what its environment has beside ours."""

    cores: frozenset[int] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)


def shares(parallel: int) -> list[Share]:
    """As many shares as runs go beside each other. Raises ConfigError where there are fewer GPUs than that."""
    if parallel == 1:
        return [Share()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = [] if os.environ.get("JAX_PLATFORMS") == "cpu" else gpus(os.environ.get(VISIBLE), GPUS)
    if devices and len(devices) < parallel:
        raise ConfigError(
            f"hydra.launcher.parallel={parallel}: this machine has {len(devices)} GPU(s), and a GPU takes one run; "
            f"say parallel={len(devices)}"
        )
    return [
        Share(frozenset(mine), {VISIBLE: ",".join(own)} if devices else {})
        for mine, own in zip(dealt(cores, parallel), dealt(devices, parallel), strict=True)
    ]


def dealt(things: Sequence[Thing], parts: int) -> list[list[Thing]]:
    """Equal parts; what is left over is nobody's: how many cores a run has decides the last bits of its results."""
    size = len(things) // parts
    return [list(things[place * size : (place + 1) * size]) for place in range(parts)]


def gpus(visible: str | None, folder: Path) -> list[str]:
    """The GPUs that a process may use, as CUDA names them: what the environment says, else what the driver lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(number) for number in range(len(list(folder.iterdir())))]
    except OSError:
        return []
