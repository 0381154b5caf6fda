"""What is true after a step, and after a run: the values that rules, loggers and the door look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

Say = Callable[[str], None]

Ending = Literal["finished", "preempted", "diverged", "failed", "evaluated"]
Values = Mapping[str, float | str]  # metrics by name; text is the name of a file in the run's directory


@dataclass(frozen=True)
class StepInfo:
    """`step` completed updates; `metrics` holds what an evaluation measured at exactly this step, as `eval/loss`."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch_steps: float = float("inf")  # steps in one pass over the training data
    losses: Sequence[float] = ()  # the training loss at the last steps that were logged, oldest first


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last completed step, and the best value of the score, as it was measured."""

    ending: Ending
    step: int
    score: float | None
    exit_code: int


@dataclass(frozen=True)
class VerbResult:
    """What a verb found or did, for `--json`: plain JSON values, sizes in bytes, times in unix seconds."""

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
