"""Open every sink that is wanted, and write each line to all of them."""

from __future__ import annotations

from collections.abc import Sequence

from runner import hosts
from runner.errors import StorageError
from runner.log.jsonl import open_metrics
from runner.log.lacking_sinks import LackingSinks
from runner.log.options import LogOptions
from runner.log.sinks import LogDigest, MetricSink, MetricWriter, SinkContext, SinkOption
from runner.values import MetricValues, Say


def open_sinks(options: LogOptions, context: SinkContext, console: MetricSink) -> MetricFanout:
    """Open metrics.jsonl, cut back to where training goes on from, and every other sink that can be had.

    Raises OSError where metrics.jsonl cannot be opened.
    """
    # One process logs for all of them.
    if not hosts.is_lead():
        return MetricFanout(NoMetrics(), [], context.say)
    # First metrics.jsonl: the others are brought to what it holds after the cut.
    metrics = open_metrics(context)
    sinks, lacking = [console], LackingSinks(context.logs)
    for name, option in options.chosen_sinks().items():
        sink = open_or_warn(name, option, context)
        if sink is not None:
            sinks.append(sink)
        else:
            lacking.names.add(name)
    return MetricFanout(metrics, sinks, context.say, lacking)


def fill_in_sinks(options: LogOptions, context: SinkContext) -> None:
    """Give the sinks of a finished run the lines that they lack; does nothing where none of them lacks any."""
    lacking = LackingSinks.read(context.logs)
    for name in sorted(lacking.names):
        option = options.chosen_sinks().get(name)
        if option is None or (sink := open_or_warn(name, option, context)) is None:
            continue
        try:
            sink.close()
        except Exception as error:
            context.say(f"warning: {name} did not close: {error}")
            continue
        # A logger of the user's own that does not catch up gets only what comes.
        if getattr(sink, "catches_up", True):
            context.say(f"{name} has every line now")
        lacking.names.discard(name)
        lacking.write()


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

    trouble = ""

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Do nothing with a line."""

    def flush(self) -> bool:
        """Return True: no line of this process is missing."""
        return True

    def digest(self) -> LogDigest | None:
        """Return None: another process knows."""
        return None

    def close(self) -> None:
        """Let go of nothing."""


class MetricFanout:
    """Write every line to metrics.jsonl and then to every sink, in order. Only metrics.jsonl may stop a run."""

    def __init__(
        self, metrics: MetricWriter, sinks: Sequence[MetricSink], say: Say, lacking: LackingSinks | None = None
    ):
        self._metrics, self._sinks, self._say, self._lacking = metrics, list(sinks), say, lacking

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Write one line: what a split measured at a step."""
        self._metrics.log(step, split, metrics)
        for sink in list(self._sinks):
            try:
                sink.log(step, split, metrics)
            # Whatever it is, training goes on. The sink is left out, or it would have a gap nobody knows of.
            except Exception as error:
                self._sinks.remove(sink)
                self._note_lack(sink)
                self._say(f"warning: {sink.name} stopped logging at step {step}: {error}")

    def flush(self) -> bool:
        """Return whether metrics.jsonl holds every line durably: only then may a checkpoint of this step be made."""
        return self._metrics.flush()

    @property
    def trouble(self) -> str:
        """Return why the last line of metrics.jsonl is not durable; empty where it is."""
        return self._metrics.trouble

    def digest(self) -> LogDigest | None:
        """Return what every line of metrics.jsonl adds up to."""
        return self._metrics.digest()

    def close(self) -> None:
        """Let go of every sink. Raises StorageError where metrics.jsonl is not complete."""
        complete = self._metrics.flush()
        self._metrics.close()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._say(f"warning: {sink.name} did not close: {error}")
                self._note_lack(sink)
        if self._lacking is not None:
            self._lacking.write()
        # Said last, so that every sink is closed first.
        if not complete:
            raise StorageError(
                f"the last lines of metrics.jsonl could not be written ({self._metrics.trouble}); mend that, then run "
                "the same command"
            )

    def _note_lack(self, sink: MetricSink) -> None:
        """Remember a sink that lacks lines, for the next time the command is typed."""
        if self._lacking is not None:
            self._lacking.names.add(sink.name)
