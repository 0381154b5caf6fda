"""Weights & Biases: one run id for all attempts, kept in the run; our own step axis; offline without an account."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from runner import rundir


class WandbLogger:
    """Mirrors metrics to wandb. It may fail without harm: metrics.jsonl is the truth."""

    def __init__(
        self, directory: Path, project: str, mode: str, name: str, config: dict[str, Any], tell: Callable[[str], None]
    ):
        directory.mkdir(parents=True, exist_ok=True)
        chosen: Any = mode
        if mode == "auto":
            chosen = "online" if wandb.login(prompt=False) else "offline"
        if chosen == "offline":
            runs = f"{os.path.relpath(directory)}/wandb/offline-run-*"
            tell(f"wandb: offline, no account; upload later with: wandb sync {runs}")
        self._run = wandb.init(
            project=project,
            name=name,
            id=_run_id(directory / "run_id"),
            resume="allow",
            mode=chosen,
            dir=directory,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),  # what there is to say, we say
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{split}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    """The id of this run at wandb, made once, before wandb first hears of it."""
    if not path.exists():
        rundir.replace(path, secrets.token_hex(4))
    return path.read_text().strip()
