"""What the options of remat cost, as facts: a row for each, what to compare them by, and which of them are the best.

Memory is what the compiler says where that can be believed, and else what was counted: XLA on a CPU takes apart what
is recomputed where blocks follow each other in the program, and its numbers then rank options backwards (jax 0.10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import Any

from runner.config.remat_policies import RematPolicy
from runner.trace.step_requirements import BlockLayout, CompiledMemory

BASE = "none"
BLOCKS = {"loop": "blocks in a Python loop", "scan": "blocks under one scan", "unknown": "no blocks found"}


@dataclass(frozen=True)
class PolicyCosts:
    """One option. `stored`: bytes kept for the backward pass, by tag; `counted`: with state and batch; one device."""

    name: str
    option: RematPolicy
    stored: Mapping[str, int]
    counted: int
    flops: int  # of a step, on all devices
    trace_seconds: float
    memory: CompiledMemory | None = None
    trouble: str = ""  # why the compiler has no numbers
    step_seconds: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Everything stored."""
        return sum(self.stored.values())

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """Of the seconds that a step took."""
        if not self.step_seconds:
            return None
        if len(self.step_seconds) == 1:
            return (self.step_seconds[0],) * 3
        low, middle, high = quantiles(self.step_seconds, n=4, method="inclusive")
        return low, middle, high


@dataclass(frozen=True)
class TagWorth:
    """What saving a tagged value costs and spares: `alone`, and where it is the `last` that was still missing."""

    name: str
    num_bytes: int
    alone: int
    last: int

    @property
    def pays(self) -> bool:
        """Whether any product is spared."""
        return self.alone > 0 or self.last > 0


@dataclass(frozen=True)
class Alternative:
    """Another way to need less memory, counted."""

    words: str
    num_bytes: int
    counted: int
    flops: int


@dataclass(frozen=True)
class SurveySetting:
    """What it was measured on."""

    model: str
    backend: str
    device: str
    devices: int
    blocks: BlockLayout
    precision: str
    batch_size: int
    microbatches: int
    attention: str | None

    @property
    def line(self) -> str:
        """For a person."""
        parts = f" in {self.microbatches} parts" if self.microbatches > 1 else ""
        facts = [f"{self.devices} × {self.device}", BLOCKS[self.blocks], self.precision]
        facts += [f"batch {self.batch_size}{parts}", f"attention {self.attention}" if self.attention else ""]
        return " · ".join(filter(None, facts))


@dataclass(frozen=True)
class SurveyReport:
    """All that was found. `now`: the name of the option that the configuration has; `refused`: why others are not."""

    setting: SurveySetting
    now: str
    rows: Sequence[PolicyCosts]
    tags: Sequence[TagWorth] = ()
    changes: Sequence[Alternative] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None
    is_auto: bool = False  # the configuration leaves the choice to the runner

    @property
    def is_compiled(self) -> bool:
        """Whether the compiler was asked."""
        return any(row.memory or row.trouble for row in self.rows)

    @property
    def is_believed(self) -> bool:
        """Whether memory is what the compiler says."""
        return self.is_compiled and not (self.setting.backend == "cpu" and self.setting.blocks == "loop")

    @property
    def is_timed(self) -> bool:
        """Whether steps were taken."""
        return any(row.step_seconds for row in self.rows)

    @property
    def base(self) -> PolicyCosts:
        """Nothing is recomputed."""
        return next(row for row in self.rows if row.name == BASE)

    def row(self, name: str) -> PolicyCosts:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def in_all(self, row: PolicyCosts) -> float:
        """Bytes on one device; without end where the compiler found no room."""
        if not self.is_believed:
            return row.counted
        return row.memory.footprint if row.memory else float("inf")

    def recompute(self, row: PolicyCosts) -> float:
        """How much more is computed than without rematerialization: 0.24 is 24 %."""
        return row.flops / self.base.flops - 1 if self.base.flops else 0.0

    def cost(self, row: PolicyCosts) -> float:
        """What is to be as little as possible beside memory: the time of a step where it was measured, else FLOPs."""
        if self.is_timed:
            return row.quartiles[1] if row.quartiles else float("inf")
        return self.recompute(row)

    def fits(self, row: PolicyCosts) -> bool | None:
        """Whether it stays within the budget; None without one."""
        return None if self.budget is None else self.in_all(row) <= self.budget

    @property
    def frontier(self) -> list[PolicyCosts]:
        """The rows that no other one beats, those with most memory first (Pareto)."""
        best = [row for row in self.rows if not any(self._beats(other, row) for other in self.rows)]
        return sorted((row for row in best if self.in_all(row) < float("inf")), key=self.in_all, reverse=True)

    def _beats(self, one: PolicyCosts, other: PolicyCosts) -> bool:
        mine, its = (self.in_all(one), self.cost(one)), (self.in_all(other), self.cost(other))
        return mine != its and mine[0] <= its[0] and mine[1] <= its[1]

    @property
    def ordered(self) -> list[PolicyCosts]:
        """The rows by memory, most first; of equals the one that computes less."""
        return sorted(self.rows, key=lambda row: (-self.in_all(row), -row.num_bytes, row.flops))

    def lines(self) -> list[dict[str, Any]]:
        """One document for each row, with every number."""
        best = {row.name for row in self.frontier}
        return [{**self._line(row), "pareto": row.name in best, "fits": self.fits(row)} for row in self.ordered]

    def _line(self, row: PolicyCosts) -> dict[str, Any]:
        memory = {**asdict(row.memory), "footprint": row.memory.footprint} if row.memory else None
        low, middle, high = row.quartiles or (None, None, None)
        return {
            "policy": row.name,
            "remat": asdict(row.option),
            "stored_bytes": row.num_bytes,
            "stored_by_tag": {name or "(no tag)": size for name, size in sorted(row.stored.items())},
            "counted_bytes": row.counted,
            "compiled": memory,
            "trouble": row.trouble or None,
            "memory_bytes": None if self.in_all(row) == float("inf") else self.in_all(row),
            "memory_is": "compiled" if self.is_believed else "counted",
            "flops": row.flops,
            "recompute": self.recompute(row),
            "trace_seconds": row.trace_seconds,
            "step_seconds": {"median": middle, "quartiles": [low, high], "all": list(row.step_seconds)},
            **asdict(self.setting),
        }

    def document(self) -> dict[str, Any]:
        """Everything, as data."""
        return {
            **asdict(self.setting),
            "remat": "auto" if self.is_auto else self.now,
            "budget_bytes": self.budget,
            "policies": self.lines(),
            "tags": [{**asdict(tag), "pays": tag.pays} for tag in self.tags],
            "changes": [asdict(change) for change in self.changes],
            "refused": dict(self.refused),
        }
