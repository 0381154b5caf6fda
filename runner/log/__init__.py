"""Where measurements go: one small protocol and one fan-out. The options are here; each sink has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from runner.errors import StorageError
from runner.values import Values


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases. `auto` is online where there is an account and offline otherwise."""

    project: str = "holdfast"
    mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Log:
    """What to log to, besides metrics.jsonl, timing.jsonl and run.log, which are always written."""

    console: bool = True
    tensorboard: bool = True
    wandb: Wandb | None = None


class Logger(Protocol):
    """A sink of metrics. A (step, split) comes once in a run, in order, over all attempts."""

    def log(self, step: int, split: str, metrics: Values) -> None: ...

    def close(self) -> None: ...


class MetricsFile(Logger, Protocol):
    """metrics.jsonl."""

    def flush(self) -> bool: ...


class Fanout:
    """Every metric to every sink, in order. The first is metrics.jsonl, the truth: only it may stop a run."""

    def __init__(self, truth: MetricsFile, mirrors: Sequence[Logger], tell: Teller):
        self._truth, self._mirrors, self._tell = truth, list(mirrors), tell

    def log(self, step: int, split: str, metrics: Values) -> None:
        self._truth.log(step, split, metrics)
        for mirror in list(self._mirrors):
            try:
                mirror.log(step, split, metrics)
            except Exception as error:  # a mirror must not kill a run
                self._mirrors.remove(mirror)
                self._tell(f"warning: {type(mirror).__name__} stopped logging at step {step}: {error}")

    def flush(self) -> bool:
        """Whether the truth holds every line so far: only then may a checkpoint of this step be made."""
        return self._truth.flush()

    def close(self) -> None:
        """Let go of every sink. Raises StorageError where the truth is not complete."""
        complete = self._truth.flush()
        self._truth.close()
        for mirror in self._mirrors:
            try:
                mirror.close()
            except Exception as error:  # a mirror must not kill a run
                self._tell(f"warning: {type(mirror).__name__} did not close: {error}")
        if not complete:
            raise StorageError("the last lines of metrics.jsonl could not be written; free space, run the same command")


def reached(name: str, sink: Callable[[], Logger], tell: Teller) -> list[Logger]:
    """A mirror, or none where it cannot be had: no server, no disk, no package. The next start fills it in."""
    try:
        return [sink()]
    except Exception as error:  # a mirror must not kill a run
        tell(f"warning: {name} is left out: {' '.join(str(error).split())}")
        return []


class Teller(Protocol):
    """Says one line to a person."""

    def __call__(self, line: str) -> None: ...
