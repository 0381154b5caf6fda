"""Weights & Biases: one run id for all attempts, our own step axis, and each line of metrics.jsonl once.

wandb counts what is logged to it; we make that the number of the line. So what it holds already is known from its own
count: less is filled in from metrics.jsonl, and lines that are computed again are passed over, for they are the same.
Offline, each start makes a directory of its own, and `wandb sync` of a second one replaces the first, as users report:
so each holds the run from its first line, and those before are deleted.
"""

from __future__ import annotations

import html
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb

from runner import files
from runner.log.jsonl import read_metric_lines
from runner.values import Values


@dataclass(frozen=True)
class Identity:
    """What wandb is told about a run. `lineage` says what its values come from: where it is equal, they are."""

    project: str
    mode: str
    name: str
    document: dict[str, Any]
    lineage: str


class WandbLogger:
    """Mirrors metrics to wandb. It may fail without harm: the next start fills in what is missing."""

    def __init__(self, directory: Path, truth: Path, run: Identity, tell: Callable[[str], None]):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = truth.parent.parent
        superseded = _set_aside(directory)
        options = {"project": run.project, "name": run.name, "config": run.document, "dir": directory}
        if run.mode == "online" or (run.mode == "auto" and wandb.login(prompt=False)):
            self._run = _online(directory, sum(1 for _ in read_metric_lines(truth)), run.lineage, options, tell)
        else:
            self._run = _init(mode="offline", id=_run_id(directory), **options)  # not `resume`: a sync would append
            tell(f"wandb: offline; upload with: wandb sync {os.path.relpath(directory)}/wandb/offline-run-*")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._held, self._number = self._run.starting_step, 0
        for line in read_metric_lines(truth):
            self.log(*line)
        shutil.rmtree(superseded, ignore_errors=True)

    def log(self, step: int, split: str, metrics: Values) -> None:
        if self._number >= self._held:
            values = {f"{split}/{name}": self._shown(value) for name, value in metrics.items()}
            self._run.log({"step": step, **values}, step=self._number, commit=True)
        self._number += 1

    def close(self) -> None:
        self._run.finish()

    def _shown(self, value: float | str) -> Any:
        """A number as it is; a file as wandb shows it."""
        path = self._directory / str(value)
        if not isinstance(value, str) or not path.exists():  # somebody has deleted it: its name is what is left
            return value
        if path.suffix == ".png":
            return wandb.Image(str(path))
        return wandb.Html(f"<pre>{html.escape(path.read_text())}</pre>")


def _online(directory: Path, num_lines: int, lineage: str, options: dict[str, Any], tell: Callable[[str], None]) -> Any:
    """Go on with the run at wandb. It forgets what it holds past our lines, unless that will come again.

    Where the server cannot rewind (a preview at wandb), a new run is begun, and gets every line.
    """
    run_id, told = _run_id(directory), directory / "lineage"
    run = _init(mode="online", id=run_id, resume="allow", **options)
    if run.starting_step > num_lines and told.exists() and told.read_text() != lineage:
        run.finish()
        try:
            run = _init(mode="online", resume_from=f"{run_id}?_step={num_lines - 1}", **options)
        except wandb.Error as error:
            (directory / "run_id").unlink()
            run = _init(mode="online", id=_run_id(directory), resume="allow", **options)
            why = " ".join(str(error).split())
            tell(f"wandb: {run_id} keeps what was taken back ({why}); the run goes on as {run.id}")
    files.replace_file(told, lineage)
    return run


def _init(**options: Any) -> Any:
    """What there is to say, we say."""
    return wandb.init(settings=wandb.Settings(silent=True, console="off"), **options)


def _set_aside(directory: Path) -> Path:
    """Move the offline data of earlier starts out of the way of `wandb sync`, until all of it is written again."""
    aside = directory / ".superseded"
    for path in (directory / "wandb").glob("offline-run-*"):
        aside.mkdir(exist_ok=True)
        path.rename(aside / f"{path.name}-{secrets.token_hex(4)}")
    return aside


def _run_id(directory: Path) -> str:
    """The id of this run at wandb, made once, before wandb first hears of it."""
    path = directory / "run_id"
    if not path.exists():
        files.replace_file(path, secrets.token_hex(4))
    return path.read_text().strip()
