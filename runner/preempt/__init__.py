"""Requests to stop. Every source only raises one flag; the loop acts on it at a step boundary.

The options are here, free of anything heavy; what listens is beside: signals.py, files.py, cloud.py, slurm.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt

Signal = Literal["TERM", "INT", "USR1", "USR2", "HUP"]
Seconds = Annotated[float, Gt(0.0)]
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(duration: str | float) -> float:
    """Seconds of `3h55m`, `90m`, `1d2h` or a plain number. Raises ValueError, with what is expected."""
    text = str(duration).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return float(text)
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    total = (
        sum(int(count) * UNITS[unit] for count, unit in zip(parts.groups(), "dhms", strict=True) if count)
        if parts
        else 0
    )
    if not total:
        raise ValueError(f"walltime={text} is no duration; write it as 3h55m, 90m, 1d2h or seconds")
    return float(total)


@dataclass(frozen=True, kw_only=True)
class Preempt:
    """What asks the run to save and stop: signals, the file RUN/STOP, a time limit, and notices of the machine.

    `notice_seconds` is how long the machine leaves between SIGTERM and SIGKILL; `walltime` counts from the start of
    the process.
    """

    signals: list[Signal] = field(default_factory=lambda: ["TERM", "INT", "USR1", "USR2", "HUP"])
    notice_seconds: Seconds = 30.0
    stop_file: bool = True
    walltime: str | Seconds | None = None

    def __post_init__(self) -> None:
        if self.walltime is not None:
            seconds_of(self.walltime)

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """The fewest seconds that any source leaves, and its name."""
        return self.notice_seconds, "SIGTERM (preempt.notice_seconds)"
