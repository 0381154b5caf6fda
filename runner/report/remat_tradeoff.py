"""What recomputation buys: for runs that do the same work under different policies, memory against time and FLOPs.

Runs are compared where they do the same: equal FLOPs without what is recomputed, equal bytes of state and batch, the
same devices, and nothing else chosen that changes the program of a step. Seeds and checkpoints are no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner.report.config_diff import ConfigDiff, format_value
from runner.report.facts import RunFacts
from runner.text import format_size
from runner.trace.pareto import find_pareto_front
from runner.trace.step_requirements import StepRequirements, bytes_at_once, is_compiler_believable
from runner.types import JsonObject

REMAT_KEY = "remat"
# These keys, and what is below them, change the program of a step.
STEP_KEYS = ("model", "data", "mesh", "objective", "train.precision", "train.microbatches")


@dataclass(frozen=True)
class PolicyPoint:
    """The runs of one policy.

    Attributes:
        policy: the policy in a word.
        runs: which runs, by their place on the page.
        memory: bytes that a step needs on one device; None where no run says it.
        seconds: least, median and most seconds of a step over the runs, each run by its own median.
        extra: FLOPs that are recomputed ÷ the others.
        words: what `remat=auto` said of its choice.
    """

    policy: str
    runs: tuple[int, ...]
    memory: int | None
    seconds: tuple[float, float, float] | None
    extra: float | None
    words: str = ""

    @property
    def pace(self) -> float | None:
        """Return the seconds of a step, the median over the runs."""
        return self.seconds and self.seconds[1]


# What memory is paid with, or None where that is not known.
Cost = Callable[[PolicyPoint], float | None]
COSTS: dict[str, Cost] = {"pace": lambda point: point.pace, "extra": lambda point: point.extra}


@dataclass(frozen=True)
class ComparableRuns:
    """Runs that do the same work.

    Attributes:
        name: what makes them others than the runs of another group.
        points: the runs by policy, the one with least memory first.
        compiled: whether memory is what the compiler says; else it was counted in the trace.
    """

    name: str
    points: tuple[PolicyPoint, ...]
    compiled: bool

    def is_drawn(self, cost: Cost) -> bool:
        """Return whether at least two policies have both a memory and a cost."""
        return sum(point.memory is not None and cost(point) is not None for point in self.points) > 1

    def best(self, cost: Cost) -> tuple[int, ...]:
        """Return the indices of the points that no other one beats in memory and in cost, least memory first."""
        known = []
        for index, point in enumerate(self.points):
            if point.memory is not None and (value := cost(point)) is not None:
                known.append((index, (point.memory, value)))
        front = find_pareto_front([costs for _, costs in known], keep_ties=False)
        return tuple(known[place][0] for place in front)


def measure_memory(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[int | None]:
    """Return the bytes that a step of each run needs on one device, told the same way for comparable runs."""
    found: list[int | None] = [None] * len(facts)
    for runs in _group_by_work(facts, differs):
        compiled = _is_compiler_believed(facts, runs)
        for run in runs:
            needs = facts[run].step_cost.needs
            found[run] = None if needs is None else bytes_at_once(needs, compiled=compiled)
    return found


def group_comparable_runs(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[ComparableRuns]:
    """Return the groups of runs that do the same work under several policies; those with most policies first."""
    members = []
    for runs in _group_by_work(facts, differs):
        if len({_name_policy(facts, differs, run) for run in runs}) > 1:
            members.append(runs)
    sizes, groups = measure_memory(facts, differs), []
    for runs, name in zip(members, _name_groups(facts, differs, members), strict=True):
        by_policy: dict[str, list[int]] = {}
        for run in runs:
            by_policy.setdefault(_name_policy(facts, differs, run), []).append(run)
        points = [_summarize_policy(policy, same, facts, sizes) for policy, same in by_policy.items()]
        points.sort(key=lambda point: point.memory if point.memory is not None else float("inf"))
        groups.append(ComparableRuns(name, tuple(points), _is_compiler_believed(facts, runs)))
    return sorted(groups, key=lambda group: -len(group.points))


def list_policy_tables(groups: Sequence[ComparableRuns]) -> list[tuple[str, list[tuple[str, ...]], int | None]]:
    """Return for each group its name, a line for each policy, and the index of its figure in `list_figures`.

    The index is None for a group without a figure. Nothing is returned where nothing was measured in any group.
    """
    drawn = [group for group in groups if _find_fronts(group)]
    tables = [
        (group.name, [_format_point(point) for point in group.points], drawn.index(group) if group in drawn else None)
        for group in groups
    ]
    is_measured = any(any(line[2:5]) for _, lines, _ in tables for line in lines)
    return tables if is_measured else []


def list_figures(groups: Sequence[ComparableRuns]) -> list[JsonObject]:
    """Return what the scripts draw: the points of each group, and the indices of the best by each known cost."""
    figures = []
    for group in groups:
        if fronts := _find_fronts(group):
            points = [[each.policy, each.runs, each.memory, each.seconds, each.extra] for each in group.points]
            figures.append({"compiled": group.compiled, "points": points, "best": fronts})
    return figures


def _find_fronts(group: ComparableRuns) -> dict[str, tuple[int, ...]]:
    return {name: group.best(cost) for name, cost in COSTS.items() if group.is_drawn(cost)}


def _format_point(point: PolicyPoint) -> tuple[str, ...]:
    """Return the cells of a policy: its name, runs, memory, recomputation, milliseconds of a step, words of auto."""
    pace = ""
    if point.seconds:
        low, _, high = (f"{1000 * seconds:.3g}" for seconds in point.seconds)
        pace = low if low == high else f"{low} – {high}"
    size = "" if point.memory is None else format_size(point.memory)
    extra = "" if point.extra is None else f"{100 * point.extra:.3g} %"
    return point.policy, str(len(point.runs)), size, extra, pace, point.words


def _summarize_policy(
    policy: str, runs: Sequence[int], facts: Sequence[RunFacts], sizes: Sequence[int | None]
) -> PolicyPoint:
    costs = [facts[run].step_cost for run in runs]
    paces = sorted(cost.seconds for cost in costs if cost.seconds is not None)
    known = [size for run in runs if (size := sizes[run]) is not None]
    # The same for all runs of the group: they do the same work under the same policy.
    extra = [cost.needs.extra for cost in costs if cost.needs]
    return PolicyPoint(
        policy=policy,
        runs=tuple(runs),
        memory=max(known, default=None),
        seconds=(paces[0], statistics.median(paces), paces[-1]) if paces else None,
        extra=extra[0] if extra else None,
        words="; ".join(sorted({cost.remat_choice for cost in costs if cost.remat_choice})),
    )


def _group_by_work(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[list[int]]:
    """Return the runs in groups that do the same work on the same devices."""
    groups: dict[object, list[int]] = {}
    for run, each in enumerate(facts):
        needs = each.step_cost.needs
        # What a step does without recomputation, and what it works on: equal under every policy.
        work = None if needs is None else (needs.flops - needs.recomputed, needs.held)
        groups.setdefault((_format_step_keys(differs, run), work, each.step_cost.hardware), []).append(run)
    return list(groups.values())


def _format_step_keys(differs: ConfigDiff, run: int) -> str:
    """Return what was chosen for a run, as far as it changes the program of a step: `model.width=64`."""
    words = []
    for column in differs.columns:
        value = column.values[run]
        if value is not None and _is_at_or_below(column.key, STEP_KEYS):
            words.append(f"{column.key}={format_value(value)}")
    return " ".join(words)


def _is_at_or_below(key: str, above: Sequence[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in above)


def _name_policy(facts: Sequence[RunFacts], differs: ConfigDiff, run: int) -> str:
    """Return the policy of a run in a word; where `remat=auto` chose it, with what it chose."""
    cost = facts[run].step_cost
    if cost.needs is not None:
        return f"auto: {cost.needs.remat}" if cost.remat_choice else cost.needs.remat
    # A run that wrote nothing down has what was typed for it.
    own = [column.values[run] for column in differs.columns if _is_at_or_below(column.key, (REMAT_KEY,))]
    return " ".join(format_value(value) for value in own if value is not None)


def _is_compiler_believed(facts: Sequence[RunFacts], runs: Sequence[int]) -> bool:
    """Return whether the compiler's bytes rank these runs; one that was counted is compared with counted ones only."""
    needs: list[StepRequirements] = [found for run in runs if (found := facts[run].step_cost.needs)]
    return is_compiler_believable(needs)


def _name_groups(facts: Sequence[RunFacts], differs: ConfigDiff, members: Sequence[Sequence[int]]) -> list[str]:
    """Return what makes each group another than the others: what was chosen, else the devices, else its size."""
    firsts = [runs[0] for runs in members]
    needs = [facts[run].step_cost.needs for run in firsts]
    words = [_format_step_keys(differs, run) for run in firsts]
    hardware = [facts[run].step_cost.hardware for run in firsts]
    sizes = [f"{format_size(each.held)} of state and batch" if each else "" for each in needs]
    names = words if len(set(words)) > 1 else [""] * len(members)
    # More is added only as long as two groups have one name.
    for more in (hardware, sizes):
        if len(set(names)) < len(names) and len(set(more)) > 1:
            names = [" · ".join(filter(None, pair)) for pair in zip(names, more, strict=True)]
    return names
