"""Values that the parts of the runner hand to each other: what is true after a step, after a run, after a verb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

# For annotations alone: who runs an experiment parses no arguments of a verb.
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

Say = Callable[[str], None]  # tells a person a line

Ending = Literal["finished", "preempted", "diverged", "failed", "evaluated"]
# Metrics of one split by name, as `loss`. Text is the name of a file in the run's directory: a picture, a sample.
MetricValues = Mapping[str, float | str]


@dataclass(frozen=True)
class StepInfo:
    """Hold what is true after a step, for the rules that decide whether to save.

    Attributes:
        step: completed updates.
        metrics: what evaluations measured at exactly this step, with their split, as `eval/loss`; else empty.
        epoch_steps: steps in one pass over the training data.
        losses: the training loss at the last steps that were logged, oldest first.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch_steps: float = float("inf")
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Speed:
    """Hold how fast steps went, while training had nothing else to do: evaluating and saving are left out.

    Attributes:
        steps: a second.
        examples: a second; None where a step has no data.
        tokens: that were predicted, a second; None where the data are no tokens.
        mfu: FLOPs that a step needs ÷ what the devices could do at most in that time (model FLOPs utilization); None
            where either is not known.
    """

    steps: float
    examples: float | None = None
    tokens: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Say how a run ended.

    Attributes:
        ending: in one word.
        step: its last completed step.
        score: the best value of the metric that says what is best, as it was measured; None where none was.
        exit_code: what the process ends with.
    """

    ending: Ending
    step: int
    score: float | None
    exit_code: int


@dataclass(frozen=True)
class VerbResult:
    """Hold what a verb found or did, for `--json`: plain JSON values, sizes in bytes, times in unix seconds."""

    document: Any
    exit_code: int = 0


class Verb(Protocol):
    """A module that does one verb of `python -m runner VERB …`; `VERBS` in runner/__main__.py names it.

    It is imported when its verb is asked for, and not before. What needs jax is imported by `run_verb`, so that a
    mistake in what was typed is answered at once.
    """

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Tell the parser which arguments the verb takes. `--json` is added to them for every verb."""

    def run_verb(self, arguments: Namespace, say: Say) -> VerbResult:
        """Do it, say each line that a person is to see, and return the same facts as data.

        Raises HoldfastError, whose message is one plain line, where it cannot be done.
        """
