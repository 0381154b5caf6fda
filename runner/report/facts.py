"""What the files of a run say, as frozen values. Reads only; a file that is missing or torn tells less, never nothing.

A run may be training while it is looked at: its last lines may be half written. And it may be somebody else's: no link
is followed, and a value of another type than a run writes is as if it were not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.record import Record, Score, find_best, list_records
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError, StorageError
from runner.files import read_json_object
from runner.inspect.goodput_table import account_for_run
from runner.inspect.lookup import parse_retention_settings, read_config_document, tell_state
from runner.inspect.tiers import Tiers, read_tiers
from runner.inspect.time_account import TimeAccount
from runner.inspect.timing_lines import measure_speed, read_json_lines
from runner.profiling.profile_record import ProfileRecord, list_profiles
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_count, is_number
from runner.text import shorten
from runner.trace.step_requirements import StepRequirements, parse_requirements
from runner.types import Document, JsonObject
from runner.values import Speed

# Step and value.
CurvePoint = tuple[int, float]
# A word that the page shows is no longer.
MOST_WORD_CHARS = 1000


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint that was made.

    Attributes:
        step: the step that it holds.
        reason: why it was saved.
        kept: why it is still there; None where it was deleted.
        num_bytes: its size, where that is known.
        score: what ranks it, where that was measured at its step.
        is_best: whether it is the best of those that are there.
    """

    step: int
    reason: str
    kept: str | None
    num_bytes: int | None
    score: float | None
    is_best: bool = False


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        state: `finished`, `running`, `killed`, …
        why: why it is not finished, in one line.
        step: completed updates.
        steps: how many are wanted; None where no file says it.
    """

    state: str
    why: str
    step: int
    steps: int | None


@dataclass(frozen=True)
class StepCost:
    """What a step of a run costs.

    Attributes:
        speed: how fast steps went, without evaluating and saving; None where nothing was logged.
        needs: memory and FLOPs, of the newest attempt that wrote them down.
        hardware: the devices that these are of.
        remat_choice: what `remat=auto` chose, in its own words; else nothing.
    """

    speed: Speed | None
    needs: StepRequirements | None
    hardware: str
    remat_choice: str

    @property
    def seconds(self) -> float | None:
        """Return the median of the seconds that a step took; None where none was logged."""
        return None if self.speed is None else 1.0 / self.speed.steps


@dataclass(frozen=True)
class RunFacts:
    """All that the page tells of one run.

    Attributes:
        run_dir: where it lies.
        status: how it stands.
        score: the metric that ranks its checkpoints.
        best: the step and the value of the best score.
        document: its configuration; empty where that cannot be read.
        words: what was typed for it after `python run.py`.
        account: where its time went.
        curves: finite values by `split/metric`.
        saves: its checkpoints, in their order.
        step_cost: memory, time and FLOPs of a step.
        tiers: where its checkpoints lie; None where it lives on this disk alone.
        profiles: what traces of its steps say.
    """

    run_dir: RunDir
    status: RunStatus
    score: Score
    best: tuple[int, float] | None
    document: Document
    words: tuple[str, ...]
    account: TimeAccount
    curves: Mapping[str, Sequence[CurvePoint]]
    saves: tuple[SaveEvent, ...]
    step_cost: StepCost
    tiers: Tiers | None = None
    profiles: tuple[ProfileRecord, ...] = ()


def read_facts(run_dir: RunDir) -> RunFacts:
    """Read everything that the page tells of a run."""
    status = run_dir.read_status()
    attempt = status.get("attempt", {})
    try:
        document = read_config_document(run_dir, attempt.get("drift", ()))
        settings = parse_retention_settings(document, run_dir)
        rules, score = settings.keep, settings.score
    except (RefusedError, ValueError):
        # A run without its configuration still has logs and checkpoints.
        document, rules, score = {}, {}, Score()
    timing, records = list(read_json_lines(run_dir.timing)), _list_own_records(run_dir)
    account = account_for_run(run_dir, status, document)
    needs, hardware = _find_requirements([*read_attempts(run_dir), attempt])
    state, tiers = tell_state(run_dir), read_tiers(run_dir)
    kept = select_survivors(rules, records, score)
    if tiers is not None:
        kept = {step: f"{why} ({tiers.state_of(step)})" for step, why in kept.items()}
    return RunFacts(
        run_dir=run_dir,
        status=RunStatus(
            state=shorten(state, MOST_WORD_CHARS),
            why=shorten(_explain_state(state, status.get("why") or "", account), MOST_WORD_CHARS),
            step=status.get("step", 0),
            steps=status.get("steps"),
        ),
        score=score,
        best=_parse_best(status.get("best")),
        document=document,
        words=tuple(attempt.get("command", ())[2:]),
        account=account,
        curves=_read_curves(run_dir.metrics),
        saves=tuple(_list_saves(timing, records, kept, score)),
        step_cost=StepCost(measure_speed(timing), needs, hardware, _read_remat_choice(run_dir.remat)),
        tiers=tiers,
        profiles=tuple(list_profiles(run_dir.profile)),
    )


def _explain_state(state: str, why: str, account: TimeAccount) -> str:
    """Return why a run ended, or is not finished, in one line; nothing where it went to its last step."""
    # A killed run could not write down why; the account knows what it was doing.
    if state == "killed" and account.spans:
        return account.spans[-1].how
    return why


def _parse_best(found: JsonObject | None) -> tuple[int, float] | None:
    return (found["step"], float(found["value"])) if found else None


def _list_own_records(run_dir: RunDir) -> list[Record]:
    """Return the checkpoints of a run; none where they cannot be listed, or are those of another run."""
    try:
        return [] if run_dir.checkpoints.is_symlink() else list_records(run_dir.checkpoints)
    except (OSError, StorageError):
        return []


def _read_curves(path: Path) -> dict[str, list[CurvePoint]]:
    curves: dict[str, list[CurvePoint]] = {}
    for line in read_json_lines(path):
        step, split = line.pop("step", None), line.pop("split", None)
        if not is_count(step) or not isinstance(split, str):
            continue
        for metric, value in line.items():
            if is_number(value):
                curves.setdefault(f"{split}/{metric}", []).append((step, float(value)))
    return curves


def _list_saves(
    timing: Sequence[JsonObject], records: Sequence[Record], kept: Mapping[int, str], score: Score
) -> Iterator[SaveEvent]:
    """Yield the checkpoints that timing.jsonl says were saved and those on disk, in the order of their steps."""
    on_disk, best = {record.step: record for record in records}, find_best(records, score)
    logged = {line["step"]: line for line in timing if line.get("event") == "save" and is_count(line.get("step"))}
    # Either may lack one that the other has: retention deletes, and a kill may come before the line is written.
    for step in sorted({*on_disk, *logged}):
        line, record = logged.get(step, {}), on_disk.get(step)
        value = record.metrics.get(score.metric) if record else None
        yield SaveEvent(
            step=step,
            reason=shorten(str(line.get("reason") or (record.reason if record else "")), MOST_WORD_CHARS),
            kept=kept.get(step, "the next save lets it go") if record else None,
            num_bytes=record.num_bytes if record else _int_or_none(line.get("bytes")),
            # The browser knows no number that is not finite.
            score=value if value is not None and math.isfinite(value) else None,
            is_best=record is not None and record is best,
        )


def _read_remat_choice(path: Path) -> str:
    try:
        words = (read_json_object(path) or {}).get("words")
    except OSError:
        return ""
    return shorten(words, MOST_WORD_CHARS) if isinstance(words, str) else ""


def _find_requirements(lines: Sequence[JsonObject]) -> tuple[StepRequirements | None, str]:
    """Return what a step needs by the newest attempt that says it, and on what hardware."""
    for attempt in reversed(lines):
        if (needs := parse_requirements(attempt.get("needs"))) is not None:
            return needs, attempt.get("hardware", "")
    return None, ""


def _int_or_none(value: Any) -> int | None:
    return value if is_count(value) else None


def thin_curve(curve: Sequence[CurvePoint], most: int) -> list[CurvePoint]:
    """Return at most `most` (≥ 4) points of a curve, in order: both ends, and of each stretch its extremes.

    A spike that is one step wide survives, which it would not where every n-th point is taken.
    """
    if len(curve) <= most:
        return list(curve)
    inner, num_stretches = curve[1:-1], (most - 2) // 2
    thinned = [curve[0]]
    for number in range(num_stretches):
        begin, end = len(inner) * number // num_stretches, len(inner) * (number + 1) // num_stretches
        stretch = inner[begin:end]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        thinned += sorted(extremes)
    return [*thinned, curve[-1]]
