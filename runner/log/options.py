"""What can be logged to: the options under `log`. The module of a sink is imported when it is opened, not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runner.log.sinks import MetricSink, SinkContext, SinkOption


@dataclass(frozen=True, kw_only=True)
class TensorBoardOptions:
    """TensorBoard event files in `logs/tensorboard`. There is nothing to choose."""

    def open(self, context: SinkContext) -> MetricSink:
        """Return the sink; it has not caught up yet."""
        # Imported here: a run without it, and every verb that reads options, starts sooner.
        from runner.log.tensorboard_sink import TensorBoardSink

        return TensorBoardSink(context)


@dataclass(frozen=True, kw_only=True)
class WandbOptions:
    """Weights & Biases.

    Attributes:
        project: where the run is listed.
        mode: `auto` is online where there is an account and offline otherwise.
    """

    project: str = "holdfast"
    mode: Literal["auto", "online", "offline"] = "auto"

    def open(self, context: SinkContext) -> MetricSink:
        """Return the sink; it has not caught up yet."""
        # Imported here: a run without it, and every verb that reads options, starts sooner.
        from runner.log.wandb_sink import WandbSink

        return WandbSink(context, self.project, self.mode)


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What to log to, besides metrics.jsonl, timing.jsonl and run.log, which are always written.

    Attributes:
        console: a live line, and what happens.
        tensorboard: event files in `logs/tensorboard`.
        wandb: Weights & Biases; null: not.
    """

    console: bool = True
    tensorboard: bool = True
    wandb: WandbOptions | None = None

    def chosen_sinks(self) -> dict[str, SinkOption]:
        """Return the sinks that are wanted, by name; the console is not among them, for it is open before training."""
        chosen: dict[str, SinkOption] = {}
        if self.tensorboard:
            chosen["tensorboard"] = TensorBoardOptions()
        if self.wandb is not None:
            chosen["wandb"] = self.wandb
        return chosen
