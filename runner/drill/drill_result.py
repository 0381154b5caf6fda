"""What a drill found: one line for a verdict, a few lines for a person, all of it as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runner.drill.compare_runs import RunComparison
from runner.drill.diagnosis import most_telling_array
from runner.drill.kill_plan import MOMENTS, Baseline
from runner.drill.kill_process import DrilledProcess, LandedKill, list_landed_kills
from runner.text import display_path, format_count, format_duration, format_size, wrap_labelled

PICTURE = "drill.png"


@dataclass
class DrillResult:
    """What happened so far; filled in while the drill goes on.

    Attributes:
        folder: where the drill lives.
        kills_asked: how many kills were asked for.
        devices: how many devices each process had, in turn; empty: what there are.
        uninterrupted: the process that was left alone.
        baseline: what that one did.
        processes: the processes of the run that was killed, in their order.
        comparison: how the two runs compare; None where they cannot be compared.
        broken: how the run failed to come back; None where it came back.
        cause: why the runs differ, probably; None where they do not.
    """

    folder: Path
    kills_asked: int = 0
    devices: tuple[int, ...] = ()
    uninterrupted: DrilledProcess | None = None
    baseline: Baseline = field(default_factory=lambda: Baseline(0))
    processes: list[DrilledProcess] = field(default_factory=list)
    comparison: RunComparison | None = None
    broken: str | None = None
    cause: str | None = None

    @property
    def kills(self) -> list[LandedKill]:
        """The kills that landed."""
        return list_landed_kills(self.processes)

    @property
    def identical(self) -> bool:
        """True if the run came back and every bit is equal."""
        return self.broken is None and self.comparison is not None and self.comparison.identical

    @property
    def resumed_steps(self) -> list[int]:
        """The steps from which training went on after a kill."""
        return [process.from_step for process in self.processes[1:] if process.from_step is not None]

    @property
    def title(self) -> str:
        """The verdict in a line."""
        count = len(self.kills)
        times = {1: "once", 2: "twice"}.get(count, f"{count} times")
        if self.broken:
            return f"Killed {times}. It did not come back."
        return f"Killed {times}. {'Identical, bit for bit.' if self.identical else f'DIFFERENT{self._where}.'}"

    @property
    def _where(self) -> str:
        """The name of the first difference, where it has one."""
        if self.comparison is None:
            return ""
        if worst := most_telling_array(self.comparison.differing):
            return f": {worst}"
        return f": the log, at step {self.comparison.line.step}" if self.comparison.line else ""

    @property
    def moments(self) -> str:
        """The number of kills in each moment: `eval 1 · step 3`."""
        counts = Counter(kill.moment for kill in self.kills)
        return " · ".join(f"{moment} {counts[moment]}" for moment in (*MOMENTS, "finish", "data") if counts[moment])

    @property
    def victims(self) -> str:
        """The number of kills of each process of the run: `command 1 · process 0 2`; empty where it had but one."""
        if not self.baseline.processes:
            return ""
        counts = Counter(kill.victim for kill in self.kills)
        whom: list[int | None] = [None, *range(self.baseline.processes)]
        return " · ".join(f"{name_victim(victim)} {counts[victim]}" for victim in whom if counts[victim])

    @property
    def price(self) -> str:
        """The cost of the kills in steps and in seconds, for a person."""
        kills, alone, killed = self.kills, _total_seconds([self.uninterrupted]), _total_seconds(self.processes)
        lost = format_count(sum(kill.lost for kill in kills), "step")
        each = (killed - alone) / max(len(kills), 1)
        return f"{lost} done again; {format_duration(killed)} instead of {format_duration(alone)}, {each:.1f} s a kill"


def name_victim(victim: int | None) -> str:
    """Return what people are told was killed: `process 1`, or `command` where that was not one of its processes."""
    return "command" if victim is None else f"process {victim}"


def result_document(result: DrillResult) -> dict[str, object]:
    """Return all facts as plain JSON values."""
    compared = None
    if found := result.comparison:
        compared = {
            "step": found.step,
            "arrays": found.num_arrays,
            "bytes": found.num_bytes,
            "differing": found.differing,
            "first_differing": most_telling_array(found.differing),
            "progress": found.progress,
            "lines": found.num_lines,
            "first_differing_line": asdict(found.line) if found.line else None,
            "result": found.result,
            "kept": {"uninterrupted": found.kept[0], "interrupted": found.kept[1]},
        }
    return {
        "verdict": "broken" if result.broken else "identical" if result.identical else "different",
        "why": result.broken or result.cause,
        "steps": result.baseline.steps,
        "kills_asked": result.kills_asked,
        "devices": list(result.devices),
        "kills": [asdict(kill) for kill in result.kills],
        "compared": compared,
        "seconds": {
            "uninterrupted": _total_seconds([result.uninterrupted]),
            "interrupted": _total_seconds(result.processes),
        },
        "place": str(result.folder),
        "picture": str(result.folder / PICTURE),
    }


def result_lines(result: DrillResult) -> list[str]:
    """Return the verdict and what it rests on, for a person."""
    landed, lines = result.kills, [result.title]
    if len(landed) < result.kills_asked:
        lines.append(f"  only {len(landed)} of {result.kills_asked} kills landed: the run was over before the others")
    if result.comparison:
        lines += _comparison_lines(result.comparison)
    lines.append(f"  kills     {result.moments}")
    if result.victims:
        lines.append(f"  killed    {result.victims}")
    lines.append(f"  price     {result.price}")
    if result.broken:
        lines.append(f"  broken    {result.broken}")
    if result.cause:
        lines += wrap_labelled("  probably  ", result.cause)
    if not result.identical:
        lines.append(f"  both runs are in {display_path(result.folder)}")
    return [*lines, f"  picture   {display_path(result.folder / PICTURE)}"]


def _comparison_lines(found: RunComparison) -> list[str]:
    line = found.line and f"line of step {found.line.step} ({found.line.split}) {found.line.wrong}"
    log = f"  log       metrics.jsonl, {format_count(found.num_lines, 'line')}: {line or 'identical'}"
    if found.arrays is None:
        return ["  state     nothing was saved: there is only the log to compare", log]
    what = f"{format_count(found.num_arrays, 'array')} of step {found.step}, {format_size(found.num_bytes)}"
    worst = most_telling_array(found.differing)
    return [
        f"  state     {what}: {f'{len(found.differing)} differ, first {worst}' if worst else 'identical'}",
        f"  progress  position of the data, best score: {', '.join(found.progress) or 'identical'}",
        log,
    ]


def _total_seconds(processes: Sequence[DrilledProcess | None]) -> float:
    return round(sum(process.ended - process.began for process in processes if process), 3)
