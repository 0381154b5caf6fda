"""Open every sink that is wanted, and write each line to all of them."""

from __future__ import annotations

from collections.abc import Sequence

from runner import hosts
from runner.errors import StorageError
from runner.log.jsonl import open_json_lines
from runner.log.options import LogOptions
from runner.log.sinks import MetricSink, MetricWriter, SinkContext, SinkOption
from runner.values import MetricValues, Say


def open_sinks(options: LogOptions, context: SinkContext, console: MetricSink) -> MetricFanout:
    """Open metrics.jsonl, cut back to where training goes on from, and every other sink that can be had.

    Raises OSError where metrics.jsonl cannot be opened.
    """
    # One process logs for all of them.
    if not hosts.is_lead():
        return MetricFanout(NoMetrics(), [], context.say)
    # First metrics.jsonl: the others are brought to what it holds after the cut.
    metrics = open_json_lines(context.metrics, context)
    sinks = [console]
    for name, option in options.chosen_sinks().items():
        sink = open_or_warn(name, option, context)
        if sink is not None:
            sinks.append(sink)
    return MetricFanout(metrics, sinks, context.say)


def open_or_warn(name: str, option: SinkOption, context: SinkContext) -> MetricSink | None:
    """Return a sink that has caught up; say a warning and return None where it cannot be had."""
    try:
        sink = option.open(context)
        sink.catch_up()
    # No server, no disk, no package: none of these may stop a run, and the next start fills in what is missing.
    except Exception as error:
        context.say(f"warning: {name} is left out: {' '.join(str(error).split())}")
        return None
    return sink


class NoMetrics:
    """Take metrics and keep none: those of a process that another one logs for."""

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Do nothing with a line."""

    def flush(self) -> bool:
        """Return True: no line of this process is missing."""
        return True

    def close(self) -> None:
        """Let go of nothing."""


class MetricFanout:
    """Write every line to metrics.jsonl and then to every sink, in order. Only metrics.jsonl may stop a run."""

    def __init__(self, metrics: MetricWriter, sinks: Sequence[MetricSink], say: Say):
        self._metrics, self._sinks, self._say = metrics, list(sinks), say

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Write one line: what a split measured at a step."""
        self._metrics.log(step, split, metrics)
        for sink in list(self._sinks):
            try:
                sink.log(step, split, metrics)
            # Whatever it is, training goes on. The sink is left out, or it would have a gap nobody knows of.
            except Exception as error:
                self._sinks.remove(sink)
                self._say(f"warning: {sink.name} stopped logging at step {step}: {error}")

    def flush(self) -> bool:
        """Return whether metrics.jsonl holds every line durably: only then may a checkpoint of this step be made."""
        return self._metrics.flush()

    def close(self) -> None:
        """Let go of every sink. Raises StorageError where metrics.jsonl is not complete."""
        complete = self._metrics.flush()
        self._metrics.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._say(f"warning: {sink.name} did not close: {error}")
        # Said last, so that every sink is closed first.
        if not complete:
            raise StorageError("the last lines of metrics.jsonl could not be written; free space, run the same command")
