"""Tell while a run trains when it is to end, because a metric gets no better (rule: runner/config/early_stop.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from runner.checkpoint.record import Mode
from runner.config.early_stop import EarlyStop, explain_early_stop, read_history


class EndRule(Protocol):
    """Say why training ends before its last step, from what evaluations measure."""

    @property
    def reason(self) -> str:
        """Return why training ends here, for people; empty where it goes on."""

    def observe(self, measured: Mapping[str, float]) -> None:
        """Take what was measured at a step, with its split, as `eval/loss`."""


class NoEarlyEnd:
    """Let training go to its last step."""

    reason = ""

    def observe(self, measured: Mapping[str, float]) -> None:
        """Do nothing: nothing is looked at."""


class EarlyStopper:
    """Remember one metric at every evaluation of a run: those that its log holds, then those that come.

    `metrics` is metrics.jsonl, cut back to where training goes on from. `default_mode` is that of the score.

    Attributes:
        reason: why training ends here, for people; empty where it goes on.
    """

    def __init__(self, option: EarlyStop, default_mode: Mode, metrics: Path):
        self._option, self._mode = option, default_mode
        self._values = [] if option.metric is None else list(read_history(metrics, option.metric))
        # Asked for after every step, and another one only after an evaluation.
        self.reason = explain_early_stop(option, default_mode, self._values)

    def observe(self, measured: Mapping[str, float]) -> None:
        """Take what was measured at a step; nothing is taken where the metric's evaluation was not due."""
        metric = self._option.metric
        if metric is not None and any(name.partition("/")[0] == metric.partition("/")[0] for name in measured):
            self._values.append(measured.get(metric))
            self.reason = explain_early_stop(self._option, self._mode, self._values)
