"""What is true after a step: the value that rules and loggers look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Moment:
    """`step` completed updates; `metrics` holds what an evaluation measured at exactly this step, as `eval/loss`."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
