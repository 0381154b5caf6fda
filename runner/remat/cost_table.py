"""What the remat policies cost, as facts: a row for each, what to compare them by, and which of them are the best.

Memory is what the compiler says where that can be believed, and else what was counted. XLA on a CPU takes apart what is
recomputed where blocks follow each other in the program, and its numbers then rank policies backwards (jax 0.10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from statistics import quantiles
from typing import Any

from runner.config.remat_policies import RematPolicy
from runner.trace.pareto import find_pareto_front
from runner.trace.step_requirements import BlockLayout, CompiledMemory

# The name of the policy that recomputes nothing.
BASE = "none"

LAYOUTS = {"loop": "blocks in a Python loop", "scan": "blocks under one scan", "unknown": "no blocks found"}


@dataclass(frozen=True)
class PolicyCosts:
    """What one policy costs; bytes are those of one device.

    Attributes:
        name: The policy in a word.
        policy: The policy.
        stored: Bytes kept for the backward pass, by tag; `""` has none.
        counted: Bytes of state, batch and stored values.
        flops: FLOPs of a step, on all devices.
        trace_seconds: How long tracing took.
        memory: What the compiler says, where it was asked and had an answer.
        trouble: Why the compiler has no numbers.
        step_seconds: The time of each step that was taken.
    """

    name: str
    policy: RematPolicy
    stored: Mapping[str, int]
    counted: int
    flops: int
    trace_seconds: float
    memory: CompiledMemory | None = None
    trouble: str = ""
    step_seconds: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> int:
        """All bytes kept for the backward pass."""
        return sum(self.stored.values())

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """The quartiles of the seconds that a step took; the median is in the middle."""
        if not self.step_seconds:
            return None
        # statistics.quantiles wants two values at least.
        if len(self.step_seconds) == 1:
            return (self.step_seconds[0],) * 3
        low, middle, high = quantiles(self.step_seconds, n=4, method="inclusive")
        return low, middle, high


@dataclass(frozen=True)
class TagWorth:
    """What it costs and spares to store a tagged value of every block.

    Attributes:
        name: The tag.
        num_bytes: Bytes that are stored.
        alone: FLOPs that need not be done again where only this tag is stored.
        last: FLOPs that need not be done again where all other useful tags are stored already.
    """

    name: str
    num_bytes: int
    alone: int
    last: int

    @property
    def pays(self) -> bool:
        """True if any product is spared."""
        return self.alone > 0 or self.last > 0


@dataclass(frozen=True)
class Alternative:
    """Another way to need less memory, as a user would type it, and what it costs, counted in the trace."""

    words: str
    num_bytes: int
    counted: int
    flops: int


@dataclass(frozen=True)
class SurveySetting:
    """What the policies were measured on."""

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
        """The setting without the model, in a line for a person."""
        parts = f" in {self.microbatches} parts" if self.microbatches > 1 else ""
        facts = [f"{self.devices} × {self.device}", LAYOUTS[self.blocks], self.precision]
        facts += [f"batch {self.batch_size}{parts}", f"attention {self.attention}" if self.attention else ""]
        return " · ".join(filter(None, facts))


@dataclass(frozen=True)
class SurveyReport:
    """All that a survey of the policies found.

    Attributes:
        setting: What they were measured on.
        now: The name of the policy that the configuration has.
        rows: The policies.
        tags: The tags of the model.
        changes: What else would need less memory.
        refused: The policies that the model cannot be given, and why.
        budget: Bytes that a device has for a step; None: nobody said.
        is_auto: Whether the configuration leaves the choice to the runner.
    """

    setting: SurveySetting
    now: str
    rows: Sequence[PolicyCosts]
    tags: Sequence[TagWorth] = ()
    changes: Sequence[Alternative] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    budget: int | None = None
    is_auto: bool = False

    @property
    def is_compiled(self) -> bool:
        """True if the compiler was asked."""
        return any(row.memory or row.trouble for row in self.rows)

    @property
    def is_believed(self) -> bool:
        """True if memory is what the compiler says."""
        return self.is_compiled and not (self.setting.backend == "cpu" and self.setting.blocks == "loop")

    @property
    def is_timed(self) -> bool:
        """True if steps were taken."""
        return any(row.step_seconds for row in self.rows)

    @property
    def base(self) -> PolicyCosts:
        """The row where nothing is recomputed."""
        return self.row(BASE)

    def row(self, name: str) -> PolicyCosts:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def in_all(self, row: PolicyCosts) -> float:
        """Return the bytes that a step needs on one device; infinite where the compiler found no room."""
        if not self.is_believed:
            return row.counted
        return row.memory.footprint if row.memory else inf

    def recompute(self, row: PolicyCosts) -> float:
        """Return how much more is computed than without rematerialization: 0.24 is 24 %."""
        return row.flops / self.base.flops - 1 if self.base.flops else 0.0

    def cost(self, row: PolicyCosts) -> float:
        """Return what should be low beside memory: the time of a step where it was measured, else its FLOPs."""
        # A row without times among others that have some found no room on the device.
        if self.is_timed:
            return row.quartiles[1] if row.quartiles else inf
        return self.recompute(row)

    def fits(self, row: PolicyCosts) -> bool | None:
        """Return whether a policy stays within the budget; None without one."""
        return None if self.budget is None else self.in_all(row) <= self.budget

    @property
    def frontier(self) -> list[PolicyCosts]:
        """The rows that no other one beats in memory and cost (Pareto), those with most memory first."""
        places = find_pareto_front([(self.in_all(row), self.cost(row)) for row in self.rows], keep_ties=True)
        # By their place first, so that rows with equal memory stay in the order of `rows`.
        best = [self.rows[place] for place in sorted(places) if self.in_all(self.rows[place]) < inf]
        return sorted(best, key=self.in_all, reverse=True)

    @property
    def ordered(self) -> list[PolicyCosts]:
        """The rows by memory, most first; of equals the one that computes less."""
        return sorted(self.rows, key=lambda row: (-self.in_all(row), -row.num_bytes, row.flops))

    def lines(self) -> list[dict[str, Any]]:
        """Return one JSON document for each row, with every number."""
        best = {row.name for row in self.frontier}
        return [{**self._line(row), "pareto": row.name in best, "fits": self.fits(row)} for row in self.ordered]

    def _line(self, row: PolicyCosts) -> dict[str, Any]:
        memory = {**asdict(row.memory), "footprint": row.memory.footprint} if row.memory else None
        low, middle, high = row.quartiles or (None, None, None)
        return {
            "policy": row.name,
            "remat": asdict(row.policy),
            "stored_bytes": row.num_bytes,
            "stored_by_tag": {name or "(no tag)": size for name, size in sorted(row.stored.items())},
            "counted_bytes": row.counted,
            "compiled": memory,
            "trouble": row.trouble or None,
            # JSON has no infinity.
            "memory_bytes": None if self.in_all(row) == inf else self.in_all(row),
            "memory_is": "compiled" if self.is_believed else "counted",
            "flops": row.flops,
            "recompute": self.recompute(row),
            "trace_seconds": row.trace_seconds,
            "step_seconds": {"median": middle, "quartiles": [low, high], "all": list(row.step_seconds)},
            **asdict(self.setting),
        }

    def document(self) -> dict[str, Any]:
        """Return everything as one JSON document."""
        return {
            **asdict(self.setting),
            "remat": "auto" if self.is_auto else self.now,
            "budget_bytes": self.budget,
            "policies": self.lines(),
            "tags": [{**asdict(tag), "pays": tag.pays} for tag in self.tags],
            "changes": [asdict(change) for change in self.changes],
            "refused": dict(self.refused),
        }
