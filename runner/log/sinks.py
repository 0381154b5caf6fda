"""The contract of a sink of metrics: what it is told about its run, and what it has to do.

metrics.jsonl is the truth about metrics; a sink shows the same lines somewhere else. A line is what one split measured
at one step. To add a sink, write a module in this folder with a class that keeps `MetricSink`, an option that opens it
(options.py), and a choice in conf/log. Nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from runner.files import read_file
from runner.types import Document
from runner.values import MetricValues, Say


@dataclass(frozen=True)
class CutPoint:
    """Mark up to where logs go when a step is restored: up to the step, without its evaluation where that is owed.

    An evaluation is owed where the checkpoint was made before it: then it is made again.
    """

    step: int
    owes: bool = False

    def holds(self, step: int, split: str) -> bool:
        """Tell whether a line stays; `split` may also be an event of timing.jsonl."""
        # A save at this step came before its evaluation, as training did; everything else is measured or made by one.
        late = split not in ("train", "save")
        return step < self.step or (step == self.step and not (self.owes and late))


@dataclass(frozen=True)
class LogDigest:
    """Hold what a log was, byte for byte, when a step was saved: from its beginning up to that step.

    Attributes:
        bytes: its length.
        xxh3: XXH3 of 128 bits of all of it, in hexadecimal.
    """

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class SinkContext:
    """Tell a sink about its run.

    Attributes:
        metrics: metrics.jsonl, already cut back. Sinks put what is theirs beside it.
        cut_point: where training goes on from.
        attempt: the number of this process's attempt at the run, to name what is cut off.
        document: the validated configuration.
        lineage: what the values that come depend on; where it is equal, steps that are done again come out the same.
        say: tells a person a line.
        digests: what metrics.jsonl was at each saved step up to the cut point, where that is known, oldest first.
        check_held: raises LostRunError where the run is no longer this process's; called before each write.
    """

    metrics: Path
    cut_point: CutPoint
    attempt: int
    document: Document
    lineage: str
    say: Say
    digests: Sequence[tuple[int, LogDigest]] = ()
    check_held: Callable[[], None] = lambda: None

    @property
    def logs(self) -> Path:
        """Return the folder of the run's logs."""
        return self.metrics.parent

    @property
    def run_path(self) -> Path:
        """Return the directory of the run; values that are text name a file in it."""
        return self.logs.parent

    def read_media(self, name: str) -> bytes | None:
        """Return the content of a file that a value names; None where it was deleted, or is none of this run's.

        A log may come from somebody else: a sink must not show, or send away, what lies outside of the run.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            return None
        try:
            return read_file(self.run_path.resolve() / name)
        except OSError:
            return None


class MetricSink(Protocol):
    """Show the metrics of a run to somebody.

    Training calls `catch_up` once, then `log` for each line in order, then `close`. Each may raise: then a warning is
    said, the sink is left out, and training goes on. The next start of the run fills in what is missing.
    """

    # A property, so that a plain class attribute satisfies it.
    @property
    def name(self) -> str:
        """Return the name of the sink, for warnings."""

    def catch_up(self) -> None:
        """Hold exactly the lines of metrics.jsonl.

        After a restart that is work in two directions. What training had logged past the restored checkpoint is done
        again, perhaps with other values, so it has to go: what `SinkContext.cut_point` does not hold. And what is in
        metrics.jsonl but not here, because a kill came between the two or the sink was not there, has to be filled in.
        `read_metric_lines` and `read_metric_lines_after` (jsonl.py) read it.
        """

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Take one line. A (step, split) comes once in a run, over all attempts, but for what was cut off."""

    def close(self) -> None:
        """Let go of everything; all lines are to be seen by others then."""


class MetricWriter(Protocol):
    """Take metrics from training: metrics.jsonl, alone or with the sinks beside it."""

    @property
    def trouble(self) -> str:
        """Return why the last line is not durable, as the operating system said it; empty where it is."""

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Take one line: what a split measured at a step."""

    def flush(self) -> bool:
        """Return whether every line so far is durable: only then may a checkpoint of this step be made."""

    def digest(self) -> LogDigest | None:
        """Return what every line so far adds up to, for the checkpoint of this step; None where none are kept."""

    def close(self) -> None:
        """Let go of the files."""


class SinkOption(Protocol):
    """Open a sink: the behaviour of every option of a sink (options.py)."""

    def open(self, context: SinkContext) -> MetricSink:
        """Return the sink; what it needs is imported here, not before. It has not caught up yet."""
