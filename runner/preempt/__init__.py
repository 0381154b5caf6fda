"""Requests to stop. Every source only raises one flag; the loop acts on it at a step boundary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Signal = Literal["TERM", "INT", "USR1", "USR2"]


@dataclass(frozen=True, kw_only=True)
class Preempt:
    """Which signals ask the run to save and stop."""

    signals: list[Signal] = field(default_factory=lambda: ["TERM", "INT", "USR1", "USR2"])
