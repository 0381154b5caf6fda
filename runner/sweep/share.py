"""Which cores and which GPUs each of several runs beside each other gets. A run alone gets what there is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import ConfigError

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
    devices = gpus(os.environ.get(VISIBLE), GPUS)
    if devices and len(devices) < parallel:
        raise ConfigError(
            f"hydra.launcher.parallel={parallel}: this machine has {len(devices)} GPU(s), and a GPU takes one run; "
            f"say parallel={len(devices)}"
        )
    return [
        Share(
            frozenset(part) if (part := dealt(cores, parallel)[place]) and len(cores) >= parallel else frozenset(),
            {VISIBLE: ",".join(dealt(devices, parallel)[place])} if devices else {},
        )
        for place in range(parallel)
    ]


def dealt(things: Sequence[str] | Sequence[int], parts: int) -> list[list]:
    """Consecutive parts, as equal as they can be: [0 1 2 3 4] in two are [0 1 2] and [3 4]."""
    size, more = divmod(len(things), parts)
    ends = [place * size + min(place, more) for place in range(parts + 1)]
    return [list(things[first:last]) for first, last in itertools.pairwise(ends)]


def gpus(visible: str | None, folder: Path) -> list[str]:
    """The GPUs that a process may use, as CUDA names them: what the environment says, else what the driver lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(number) for number in range(len(list(folder.iterdir())))]
    except OSError:
        return []
