"""What the files of a run say, as frozen values. Reads only; a file that is missing or torn tells less, never nothing.

A run may be training while it is looked at: its last lines may be half written.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.record import Record, Score, find_best, list_records
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError
from runner.inspect.goodput_table import account_for_run
from runner.inspect.lookup import parse_retention_settings, read_config_document
from runner.inspect.time_account import TimeAccount
from runner.rundir.attempts import read_attempts
from runner.rundir.layout import RunDir, run_state
from runner.trace import step_requirements as needed
from runner.trace.step_requirements import StepRequirements

Point = tuple[int, float]


@dataclass(frozen=True)
class SaveEvent:
    """One checkpoint that was made; `kept`: why it is still there, None where it was deleted."""

    step: int
    reason: str
    kept: str | None
    num_bytes: int | None
    score: float | None
    is_best: bool = False


@dataclass(frozen=True)
class RunFacts:
    """One run. `curves`: by `split/metric`, finite values only."""

    run: RunDir
    state: str
    why: str
    step: int
    steps: int | None
    score: Score
    best: tuple[int, float] | None  # step, value
    document: Mapping[str, Any]
    words: tuple[str, ...]  # what was typed for it after `python run.py`
    account: TimeAccount
    curves: Mapping[str, Sequence[Point]]
    saves: tuple[SaveEvent, ...]
    step_seconds: float | None  # the median over what was logged, without waiting, evaluating and saving
    remat: str  # what `remat=auto` chose, in its own words
    needs: StepRequirements | None  # of the newest attempt that wrote it down
    hardware: str  # that it ran on


def read_facts(run: RunDir) -> RunFacts:
    """Everything the page tells of a run."""
    status, attempt = run.read_status(), {}
    if isinstance(status.get("attempt"), dict):
        attempt = status["attempt"]
    try:
        document = read_config_document(run, attempt.get("drift", ()))
        settings = parse_retention_settings(document, run)
        keep, score = settings.keep, settings.score
    except (RefusedError, ValueError):  # a run without its configuration still has logs and checkpoints
        document, keep, score = {}, {}, Score()
    timing, records = list(_lines(run.timing)), list_records(run.checkpoints)
    account = account_for_run(run, status, document)
    kept = select_survivors(keep, records, score)
    state, needs = run_state(run), _needs([*read_attempts(run), attempt])
    return RunFacts(
        run=run,
        state=state,
        why=_why(state, str(status.get("why") or ""), account),
        step=_whole(status.get("step")) or 0,
        steps=_whole(status.get("steps")),
        score=score,
        best=_best(status.get("best")),
        document=document,
        words=tuple(str(word) for word in attempt.get("command", ())[2:]),
        account=account,
        curves=_curves(run.metrics),
        saves=tuple(_saves(timing, records, kept, score)),
        step_seconds=_step_seconds(timing),
        remat=_remat(run.remat),
        needs=needs[0],
        hardware=needs[1],
    )


def _why(state: str, why: str, account: TimeAccount) -> str:
    """Why it is not finished, in one line."""
    if state == "killed" and account.spans:
        return account.spans[-1].how
    return "" if state == "finished" else why


def _best(found: Any) -> tuple[int, float] | None:
    try:
        return int(found["step"]), float(found["value"])
    except (TypeError, KeyError, ValueError):
        return None


def _curves(path: Path) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for line in _lines(path):
        step, split = line.pop("step", None), line.pop("split", None)
        if isinstance(step, int) and isinstance(split, str):
            for metric, value in line.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(f"{split}/{metric}", []).append((step, float(value)))
    return curves


def _saves(
    timing: Sequence[Mapping[str, Any]], records: Sequence[Record], kept: Mapping[int, str], score: Score
) -> Iterator[SaveEvent]:
    """What timing.jsonl tells was saved, and what is on disk; a line may be missing for what is there."""
    here, best = {record.step: record for record in records}, find_best(records, score)
    told = {line.get("step"): line for line in timing if line.get("event") == "save"}
    for step in sorted(step for step in {*here, *told} if isinstance(step, int)):
        line, record = told.get(step, {}), here.get(step)
        yield SaveEvent(
            step=step,
            reason=str(line.get("reason") or (record.reason if record else "")),
            kept=kept.get(step, "the next save lets it go") if record else None,
            num_bytes=record.num_bytes if record else _whole(line.get("bytes")),
            score=record.metrics.get(score.metric) if record else None,
            is_best=record is not None and record is best,
        )


def _step_seconds(timing: Sequence[Mapping[str, Any]]) -> float | None:
    found = [
        line["seconds"] / line["steps"]
        for line in timing
        if line.get("event") == "train" and line.get("steps") and isinstance(line.get("seconds"), int | float)
    ]
    return statistics.median(found[1:] or found) if found else None  # the first step is slower than any other


def _remat(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["words"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _needs(lines: Sequence[Mapping[str, Any]]) -> tuple[StepRequirements | None, str]:
    """What a step needs, and on what devices."""
    for attempt in reversed(lines):
        if (found := needed.parse_requirements(attempt.get("needs"))) is not None:
            return found, str(attempt.get("hardware") or "")
    return None, ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every JSON object of a log; what is torn is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def thin_curve(curve: Sequence[Point], most: int) -> list[Point]:
    """At most `most` (≥ 4) of the points, in order."""
    if len(curve) <= most:
        return list(curve)
    inner, stretches = curve[1:-1], (most - 2) // 2
    chosen = [curve[0]]
    for number in range(stretches):
        begin, end = (len(inner) * edge // stretches for edge in (number, number + 1))
        stretch = inner[begin:end]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        chosen += sorted(extremes)
    return [*chosen, curve[-1]]
