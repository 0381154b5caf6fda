"""Tell while a run trains when it is to end before its last step (options and rules: runner/config/early_stop.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from runner import hosts
from runner.checkpoint.record import Mode
from runner.checkpoint.user_rules import UserRule, read_reason
from runner.config.early_stop import (
    EarlyStop,
    ExternalStop,
    Measured,
    explain_early_stop,
    read_evaluations,
    read_history,
)
from runner.values import Say


class EndRule(Protocol):
    """Say why training ends before its last step, from what evaluations measure."""

    @property
    def reason(self) -> str:
        """Return why training ends here, for people; empty where it goes on."""

    def observe(self, measured: Mapping[str, float], step: int) -> None:
        """Take what was measured at a step, with its split, as `eval/loss`."""


class NoEarlyEnd:
    """Let training go to its last step."""

    reason = ""

    def observe(self, measured: Mapping[str, float], step: int) -> None:
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

    def observe(self, measured: Mapping[str, float], step: int) -> None:
        """Take what was measured at a step; nothing is taken where the metric's evaluation was not due."""
        metric = self._option.metric
        if metric is not None and any(name.partition("/")[0] == metric.partition("/")[0] for name in measured):
            self._values.append(measured.get(metric))
            self.reason = explain_early_stop(self._option, self._mode, self._values)


class UserStopper:
    """Ask rules of the user's own after every evaluation: of those that the log of a run holds, then of each new one.

    Attributes:
        reason: why training ends here, for people; empty where it goes on.
    """

    reason = ""

    def __init__(
        self,
        rules: Mapping[str, ExternalStop],
        metrics: Path,
        splits: Collection[str],
        find_due: Callable[[int], Collection[str]],
        say: Say,
    ):
        """Ask about the log as it is.

        Args:
            rules: by name.
            metrics: metrics.jsonl, cut back to where training goes on from.
            splits: the evaluations that something may be chosen by: a rule is shown no test set.
            find_due: which evaluations are due at a step where training goes on.
            say: tells a person a line.
        """
        self._rules = [UserRule(f"stop.rules.{name}", one.target, one.options, say) for name, one in rules.items()]
        self._splits, self._history = splits, list[Measured]()
        if not rules:
            return
        self._history = read_evaluations(metrics, splits)
        if self._history:
            # Where a rule ended training, more was measured after it was asked: it is asked about the same again.
            step, measured = self._history.pop()
            self._add(step, measured, find_due(step))
        self._ask()

    def observe(self, measured: Mapping[str, float], step: int) -> None:
        """Take what was measured at a step, and ask."""
        if self._rules:
            self._add(step, measured, self._splits)
            self._ask()

    def _add(self, step: int, measured: Mapping[str, float], splits: Collection[str]) -> None:
        shown = {name: value for name, value in measured.items() if name.partition("/")[0] in splits}
        if shown:
            self._history.append((step, shown))

    def _ask(self) -> None:
        reasons = []
        for rule in self._rules if self._history else ():
            # Copies: what one rule does to them, no other one sees.
            history = [(step, dict(measured)) for step, measured in self._history]
            read = partial(read_reason, name=rule.target)
            reasons.append(rule.ask(read, None, "training goes on", history))
        self.reason = "; ".join(filter(None, reasons))


class EndRules:
    """End training where any of several rules does; the processes of a run at the same step, where process 0 says so.

    Attributes:
        reason: every reason why training ends here; empty where it goes on.
    """

    def __init__(self, *rules: EndRule):
        self._rules = rules
        self._agree()

    def observe(self, measured: Mapping[str, float], step: int) -> None:
        """Take what was measured at a step."""
        for rule in self._rules:
            rule.observe(measured, step)
        self._agree()

    def _agree(self) -> None:
        self.reason = hosts.agree("early end", "; ".join(filter(None, (rule.reason for rule in self._rules))))
