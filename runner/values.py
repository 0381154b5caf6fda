"""What is true after a step, and after a run: the values that rules, loggers and the door look at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
class Answer:
    """What a verb found or did, as plain JSON values: sizes in bytes, times in unix seconds."""

    document: Any
    exit_code: int = 0
