"""What can be logged to: the options under `log`. The module of a sink is imported when it is opened, not before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
class ExternalSink:
    """A logger of your own, made in the process that trains.

    It is called with what its parameters are named after, as far as it has them, and with its options:

        target(run_dir: Path, config: dict, attempt: int, say: Callable[[str], None], **options)

    What it makes has `log(step, split, metrics)`, and may have `catch_up(lines)` and `close()`. A function
    `log(step, split, metrics, **options)` is a logger by itself. One that raises is left out, with a warning.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`, a class or a function.
        options: what it is called with by name.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NamedSink:
    """A logger of the user's own, and the name that the configuration gives it."""

    name: str
    option: ExternalSink

    def open(self, context: SinkContext) -> MetricSink:
        """Return the sink; it has not caught up yet."""
        # Imported here: options are read by many, and opened by who trains alone.
        from runner.log.user_sink import UserSink

        return UserSink(self.name, self.option.target, self.option.options, context)


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What to log to, besides metrics.jsonl, timing.jsonl and run.log, which are always written.

    Attributes:
        console: a live line, and what happens.
        tensorboard: event files in `logs/tensorboard`.
        wandb: Weights & Biases; null: not.
        sinks: loggers of your own, each under a name of its own.
    """

    console: bool = True
    tensorboard: bool = True
    wandb: WandbOptions | None = None
    sinks: Mapping[str, ExternalSink] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(self.sinks.keys() & {"console", "tensorboard", "wandb"}):
            raise ValueError(f"sinks.{taken[0]}: this name is taken by Holdfast's own; choose another")

    def chosen_sinks(self) -> dict[str, SinkOption]:
        """Return the sinks that are wanted, by name; the console is not among them, for it is open before training."""
        chosen: dict[str, SinkOption] = {}
        if self.tensorboard:
            chosen["tensorboard"] = TensorBoardOptions()
        if self.wandb is not None:
            chosen["wandb"] = self.wandb
        return chosen | {name: NamedSink(name, option) for name, option in self.sinks.items()}
