"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

from runner.launch.slurm_job import Slurm


@dataclass(frozen=True)
class Command:
    """What the user typed, without what Hydra needs: `("ckpt=combined", "optim.lr=0.01")`; and when it was typed."""

    overrides: tuple[str, ...]
    began: float = 0.0  # seconds since 1970
    words: tuple[str, ...] = ()  # all that was typed, flags as well, but not how it is launched
    slurm: Slurm | None = None  # to be submitted as this job instead of running here
