"""What recomputation buys: for runs that do the same work under different policies, memory against time and FLOPs.

Runs are compared where they do the same: equal FLOPs without what is recomputed, equal bytes of state and batch, the
same devices, and nothing else chosen that changes the program of a step. Seeds and checkpoints are no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.config_diff import ConfigDiff, format_value
from runner.report.facts import RunFacts
from runner.text import format_size
from runner.trace.step_requirements import StepRequirements, bytes_at_once, is_compiler_believable

REMAT = "remat"
OF_THE_STEP = ("model", "data", "mesh", "objective", "train.precision", "train.microbatches")  # and what is below
Cost = Callable[["Point"], float | None]


@dataclass(frozen=True)
class PolicyPoint:
    """The runs of one policy. `seconds` of a step: least, median and most over the runs, each by its own median."""

    policy: str
    runs: tuple[int, ...]
    measure_memory: int | None  # bytes on one device
    seconds: tuple[float, float, float] | None
    extra: float | None  # what is recomputed ÷ the rest
    words: str = ""  # what auto said

    @property
    def pace(self) -> float | None:
        """Seconds of a step, the median over the runs."""
        return self.seconds and self.seconds[1]


COSTS: dict[str, Cost] = {"pace": lambda point: point.pace, "extra": lambda point: point.extra}


@dataclass(frozen=True)
class ComparableRuns:
    """Runs that can be compared, by policy; least memory first. `compiled`: it is the compiler's; else counted."""

    name: str
    points: tuple[PolicyPoint, ...]
    compiled: bool

    def is_drawn(self, cost: Cost) -> bool:
        """Whether two policies have both a memory and a cost."""
        return sum(point.memory is not None and cost(point) is not None for point in self.points) > 1

    def best(self, cost: Cost) -> tuple[int, ...]:
        """The points that no other one beats in memory and in cost, least memory first (Pareto)."""
        known = [(point.memory, cost(point), place) for place, point in enumerate(self.points)]
        ranked = sorted((size, own, place) for size, own, place in known if size is not None and own is not None)
        found, least = [], float("inf")
        for _, own, place in ranked:
            if own < least:
                found.append(place)
                least = own
        return tuple(found)


def measure_memory(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[int | None]:
    """Bytes that a step of each run needs on one device; told the same way for runs that can be compared."""
    found: list[int | None] = [None] * len(facts)
    for runs in _alike(facts, differs):
        compiled = _is_compiled(facts, runs)
        for run in runs:
            needs = facts[run].needs
            found[run] = None if needs is None else bytes_at_once(needs, compiled=compiled)
    return found


def group_comparable_runs(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[ComparableRuns]:
    """Runs by the work they do, where that was done under several policies; those with most policies first."""
    members = [runs for runs in _alike(facts, differs) if len({_policy(facts, differs, run) for run in runs}) > 1]
    sizes, found = measure_memory(facts, differs), []
    for runs, name in zip(members, _names(facts, differs, members), strict=True):
        policies = dict.fromkeys(_policy(facts, differs, run) for run in runs)
        points = [
            _point(policy, [run for run in runs if _policy(facts, differs, run) == policy], facts, sizes)
            for policy in policies
        ]
        points.sort(key=lambda point: point.memory if point.memory is not None else float("inf"))
        found.append(ComparableRuns(name, tuple(points), _is_compiled(facts, runs)))
    return sorted(found, key=lambda group: -len(group.points))


def list_policy_tables(found: Sequence[ComparableRuns]) -> list[tuple[str, list[tuple[str, ...]], int | None]]:
    """For each group its name, a line for each policy, and which figure it has; nothing where nothing was measured."""
    drawn = [group for group in found if _frontiers(group)]
    lines = [
        (group.name, [_line(point) for point in group.points], drawn.index(group) if group in drawn else None)
        for group in found
    ]
    return lines if any(any(line[2:5]) for _, points, _ in lines for line in points) else []


def list_figures(found: Sequence[ComparableRuns]) -> list[dict[str, Any]]:
    """What the scripts draw: the points of each group, and the places of the best by each cost that is known."""
    return [
        {
            "compiled": group.compiled,
            "points": [[each.policy, each.runs, each.memory, each.seconds, each.extra] for each in group.points],
            "best": best,
        }
        for group in found
        if (best := _frontiers(group))
    ]


def _frontiers(group: ComparableRuns) -> dict[str, tuple[int, ...]]:
    return {name: group.best(cost) for name, cost in COSTS.items() if group.is_drawn(cost)}


def _line(point: PolicyPoint) -> tuple[str, ...]:
    low, _, high = [f"{1000 * pace:.3g}" for pace in point.seconds or (0.0, 0.0, 0.0)]
    pace = low if low == high else f"{low} – {high}"
    size = "" if point.memory is None else format_size(point.memory)
    extra = "" if point.extra is None else f"{100 * point.extra:.3g} %"
    return point.policy, str(len(point.runs)), size, extra, pace if point.seconds else "", point.words


def _point(policy: str, runs: Sequence[int], facts: Sequence[RunFacts], sizes: Sequence[int | None]) -> PolicyPoint:
    paces = sorted(pace for run in runs if (pace := facts[run].step_seconds) is not None)
    known = [size for run in runs if (size := sizes[run]) is not None]
    extra = [needs.extra for run in runs if (needs := facts[run].needs)]
    return PolicyPoint(
        policy=policy,
        runs=tuple(runs),
        memory=max(known, default=None),
        seconds=(paces[0], statistics.median(paces), paces[-1]) if paces else None,
        extra=extra[0] if extra else None,
        words="; ".join(sorted({facts[run].remat for run in runs if facts[run].remat})),
    )


def _alike(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[list[int]]:
    """The runs that do the same work."""
    found: dict[object, list[int]] = {}
    for run, each in enumerate(facts):
        found.setdefault((_typed(differs, run), _work(each.needs), each.hardware), []).append(run)
    return list(found.values())


def _work(needs: StepRequirements | None) -> tuple[int, int] | None:
    return None if needs is None else (needs.flops - needs.recomputed, needs.held)


def _typed(differs: ConfigDiff, run: int) -> str:
    """What was chosen for a run, as far as it changes the program of a step."""
    own = [(column.key, column.values[run]) for column in differs.columns if _is_below(column.key, OF_THE_STEP)]
    return " ".join(f"{key}={format_value(value)}" for key, value in own if value is not None)


def _is_below(key: str, above: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in above)


def _policy(facts: Sequence[RunFacts], differs: ConfigDiff, run: int) -> str:
    """In a word; what auto stood for in this run."""
    each = facts[run]
    if each.needs is not None:
        return f"auto: {each.needs.remat}" if each.remat else each.needs.remat
    own = [column.values[run] for column in differs.columns if _is_below(column.key, (REMAT,))]
    return " ".join(format_value(value) for value in own if value is not None)


def _is_compiled(facts: Sequence[RunFacts], runs: Sequence[int]) -> bool:
    return is_compiler_believable(needs for run in runs if (needs := facts[run].needs))


def _names(facts: Sequence[RunFacts], differs: ConfigDiff, members: Sequence[Sequence[int]]) -> list[str]:
    """What makes a group another than the others: what was chosen, else the devices, else its size."""
    firsts = [runs[0] for runs in members]
    needs = [facts[run].needs for run in firsts]
    words = [_typed(differs, run) for run in firsts]
    hardware = [facts[run].hardware for run in firsts]
    sizes = [f"{format_size(each.held)} of state and batch" if each else "" for each in needs]
    names = words if len(set(words)) > 1 else [""] * len(members)
    for more in (hardware, sizes):
        if len(set(names)) < len(names) and len(set(more)) > 1:
            names = [" · ".join(filter(None, pair)) for pair in zip(names, more, strict=True)]
    return names
