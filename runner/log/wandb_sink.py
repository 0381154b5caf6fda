"""Weights & Biases: one run id for all attempts, our own step axis, and each line of metrics.jsonl once.

wandb counts what is logged to it; we make that the number of the line. So what it holds already is known from its own
count: less is filled in from metrics.jsonl, and lines that are computed again are passed over, for they are the same.
Offline, each start makes a directory of its own, and `wandb sync` of a second one replaces the first, as users report:
so each holds the run from its first line, and those before are deleted.
"""

from __future__ import annotations

import html
import os
import re
import secrets
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from runner import files
from runner.log.jsonl import read_metric_lines
from runner.log.sinks import SinkContext
from runner.values import MetricValues


class WandbSink:
    """Mirror metrics to wandb. It may fail without harm: the next start fills in what is missing."""

    name = "wandb"

    def __init__(self, context: SinkContext, project: str, mode: str):
        self._context, self._folder = context, context.logs / "wandb"
        self._project, self._mode = project, mode
        self._run: Any = None
        self._num_held = 0  # lines that wandb has already
        self._next_line = 0  # the number of the line that comes, in metrics.jsonl

    def catch_up(self) -> None:
        """Go on with the run at wandb, or begin it, and log every line of metrics.jsonl that it lacks."""
        files.make_folder(self._folder)
        superseded = self._set_offline_data_aside()
        if self._mode == "online" or (self._mode == "auto" and wandb.login(prompt=False)):
            self._run = self._begin_online()
        else:
            # Not with `resume`: a sync would append to what an earlier sync has sent.
            self._run = self._begin(mode="offline", id=self._run_id())
            relative = shlex.quote(f"{os.path.relpath(self._folder)}/wandb")
            self._context.say(f"wandb: offline; upload with: wandb sync {relative}/offline-run-*")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._num_held = self._run.starting_step
        for line in read_metric_lines(self._context.metrics):
            self.log(*line)
        # Only now that all of it is written again: a kill before this leaves the old data to be set aside once more.
        files.remove_tree(superseded)

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Log the values of one line, unless wandb has it already."""
        if self._next_line >= self._num_held:
            values = {f"{split}/{name}": self._as_media(value) for name, value in metrics.items()}
            self._run.log({"step": step, **values}, step=self._next_line, commit=True)
        self._next_line += 1

    def close(self) -> None:
        """Wait until wandb has taken everything."""
        self._run.finish()

    def _begin_online(self) -> Any:
        """Go on with the run at wandb; make it forget what it holds past our lines, unless that will come again.

        Where the server cannot rewind (a preview at wandb), a new run is begun, and gets every line.
        """
        run_id, lineage = self._run_id(), self._context.lineage
        lineage_file = self._folder / "lineage"  # what the lines that wandb holds were computed from
        known_lineage = _read_text(lineage_file)
        num_lines = sum(1 for _ in read_metric_lines(self._context.metrics))
        run = self._begin(mode="online", id=run_id, resume="allow")
        if run.starting_step > num_lines and known_lineage is not None and known_lineage != lineage:
            run.finish()
            try:
                run = self._begin(mode="online", resume_from=f"{run_id}?_step={num_lines - 1}")
            except wandb.Error as error:
                files.remove_file(self._folder / "run_id")
                run = self._begin(mode="online", id=self._run_id(), resume="allow")
                why = " ".join(str(error).split())
                self._context.say(f"wandb: {run_id} keeps what was taken back ({why}); the run goes on as {run.id}")
        files.replace_file(lineage_file, lineage)
        return run

    def _begin(self, **options: Any) -> Any:
        """Begin or resume a run at wandb; what there is to say, we say."""
        return wandb.init(
            project=self._project,
            name=self._context.run_path.name,
            config=dict(self._context.document),
            dir=self._folder,
            settings=wandb.Settings(silent=True, console="off"),
            **options,
        )

    def _set_offline_data_aside(self) -> Path:
        """Move the data of earlier starts out of the way of `wandb sync`, until all of it is written again."""
        aside = self._folder / ".superseded"
        for path in (self._folder / "wandb").glob("offline-run-*"):
            files.make_folder(aside)
            # With a random end: what a killed start has set aside may have the same name.
            files.rename_path(path, aside / f"{path.name}-{secrets.token_hex(4)}")
        return aside

    def _run_id(self) -> str:
        """Return the id of this run at wandb, made once, before wandb first hears of it."""
        path = self._folder / "run_id"
        known = (_read_text(path) or "").strip()
        # Of another shape it is none that was made here, and wandb would read more into it than a name.
        if re.fullmatch("[0-9a-f]{8}", known):
            return known
        fresh = secrets.token_hex(4)
        files.replace_file(path, fresh)
        return fresh

    def _as_media(self, value: float | str) -> Any:
        """Return a number as it is, and a file as wandb shows it."""
        content = self._context.read_media(value) if isinstance(value, str) else None
        # Where somebody has deleted the file, its name is what is left.
        if content is None:
            return value
        if str(value).endswith(".png"):
            # Whatever is in the file, the curves are worth having without it.
            with suppress(Exception):
                return wandb.Image(str(self._context.run_path / str(value)))
            return value
        return wandb.Html(f"<pre>{html.escape(content.decode(errors='replace'))}</pre>")


def _read_text(path: Path) -> str | None:
    """Return the text in a small file of ours; None where it is missing or nothing that we wrote."""
    try:
        return files.read_file(path, limit=1 << 16).decode()
    except (OSError, UnicodeDecodeError):
        return None
