"""What a drill found, told: one line for a verdict, a few for a person, all of it as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runner.drill.compare import Evidence
from runner.drill.diagnose import tell_tale
from runner.drill.kill import Attempt, Kill, kills
from runner.drill.kill_plan import MOMENTS, Past
from runner.text import plural, shown, size_text, wrapped

PICTURE = "drill.png"


@dataclass
class Story:
    """What happened, as far as it has; the verdict comes last."""

    place: Path
    first: Attempt | None = None
    past: Past = field(default_factory=lambda: Past(0))
    attempts: list[Attempt] = field(default_factory=list)
    asked: int = 0
    broken: str | None = None  # the run did not come back: how
    evidence: Evidence | None = None
    cause: str | None = None

    @property
    def kills(self) -> list[Kill]:
        return kills(self.attempts)

    @property
    def identical(self) -> bool:
        return self.broken is None and self.evidence is not None and self.evidence.identical

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
        """The first difference, where it has a name."""
        found = self.evidence
        if found is None:
            return ""
        worst = tell_tale(found.differing)
        return f": {worst}" if worst else f": the log, at step {found.line.step}" if found.line else ""

    @property
    def moments(self) -> str:
        """`killed in eval 1 · step 3`: how often in what."""
        counts = Counter(kill.moment for kill in self.kills)
        return " · ".join(f"{moment} {counts[moment]}" for moment in (*MOMENTS, "finish", "data") if counts[moment])

    @property
    def price(self) -> str:
        """What the kills cost in steps and in seconds."""
        landed, alone, killed = self.kills, _seconds([self.first]), _seconds(self.attempts)
        lost, each = sum(kill.lost for kill in landed), (killed - alone) / max(len(landed), 1)
        return f"{plural(lost, 'step')} done again; {clock(killed)} instead of {clock(alone)}, {each:.1f} s a kill"


def document(story: Story) -> dict[str, Any]:
    """All facts, as plain JSON values."""
    found = story.evidence
    compared = found and {
        "step": found.step,
        "arrays": found.found.num_equal + len(found.differing) if found.found else 0,
        "bytes": found.num_bytes,
        "differing": found.differing,
        "first_differing": tell_tale(found.differing),
        "progress": found.progress,
        "lines": found.num_lines,
        "first_differing_line": asdict(found.line) if found.line else None,
        "result": found.result,
        "kept": {"uninterrupted": found.kept[0], "interrupted": found.kept[1]},
    }
    return {
        "verdict": "broken" if story.broken else "identical" if story.identical else "different",
        "why": story.broken or story.cause,
        "steps": story.past.steps,
        "kills_asked": story.asked,
        "kills": [asdict(kill) for kill in story.kills],
        "compared": compared,
        "seconds": {"uninterrupted": _seconds([story.first]), "interrupted": _seconds(story.attempts)},
        "place": str(story.place),
        "picture": str(story.place / PICTURE),
    }


def _seconds(several: Sequence[Attempt | None]) -> float:
    return round(sum(each.ended - each.began for each in several if each), 3)


def told(story: Story) -> list[str]:
    """The verdict for a person."""
    landed, lines = story.kills, [story.title]
    if len(landed) < story.asked:
        lines.append(f"  only {len(landed)} of {story.asked} kills landed: the run was over before the others")
    if story.evidence:
        lines += _compared(story.evidence)
    lines += [f"  kills     {story.moments}", f"  price     {story.price}"]
    if story.broken:
        lines.append(f"  broken    {story.broken}")
    if story.cause:
        lines += wrapped("  probably  ", story.cause)
    if not story.identical:
        lines.append(f"  both runs are in {shown(story.place)}")
    return [*lines, f"  picture   {shown(story.place / PICTURE)}"]


def _compared(found: Evidence) -> list[str]:
    line = found.line and f"line of step {found.line.step} ({found.line.split}) {found.line.wrong}"
    log = f"  log       metrics.jsonl, {plural(found.num_lines, 'line')}: {line or 'identical'}"
    if found.found is None:
        return ["  state     nothing was saved: there is only the log to compare", log]
    num, worst = found.found.num_equal + len(found.differing), tell_tale(found.differing)
    what = f"{plural(num, 'array')} of step {found.step}, {size_text(found.num_bytes)}"
    return [
        f"  state     {what}: {f'{len(found.differing)} differ, first {worst}' if worst else 'identical'}",
        f"  progress  position of the data, best score: {', '.join(found.progress) or 'identical'}",
        log,
    ]


def clock(seconds: float) -> str:
    """`4.1 s`, `2:31`, `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
