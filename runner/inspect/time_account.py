"""Where the wall-clock of a run went, from the lines of its attempts: a pure function, in whole milliseconds.

The clock runs from the first start to the last end, and each moment is in exactly one bucket:

    progress   in training steps whose result is still there: goodput is this ÷ the whole clock
    lost       in steps, and the data, evaluations and saves between them, that were done again
    data eval save                  what training waited for, as far as it was not lost
    import startup restore compile  before the first step; compiling counts only where nothing else was left to do
    finish     after the last step: the last write, closing logs
    other      that nobody wrote down (lines of old versions)
    down       between the end of one attempt and the start of the next

The definition is that of ML goodput: time that makes progress which is kept ÷ time. A step is kept where no later
attempt began before it; what lost steps cost is the mean of their attempt. When a run is finished the clock stops,
until somebody continues it: nobody wanted it to run between. Attempts that overlap (clocks of two machines) are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

TRAINING = {"step": "progress", "data": "data", "eval": "eval", "save": "save"}  # what lost steps had cost
BEFORE = ("import", "startup", "restore", "compile")
BUCKETS = ("progress", "data", "eval", "save", "lost", *BEFORE, "finish", "other", "down")
INTERRUPTED = ("killed", "failed", "preempted")
HOUR = 3_600_000  # milliseconds
SEEN = 50  # milliseconds: less would be told as 0.0 s


@dataclass(frozen=True)
class AttemptSpan:
    """One attempt on the clock of its run, in milliseconds; its buckets add up to `end - start`."""

    number: int
    host: str
    started: float  # unix seconds, as its machine had it
    ending: str
    during: str  # what a killed one was doing
    start: int
    end: int
    down: int  # between the one before it and this one
    from_step: int | None  # None: it never came to training
    to_step: int
    lost_steps: int
    buckets: Mapping[str, int]

    @property
    def how(self) -> str:
        """How it ended: `killed during eval`."""
        return f"{self.ending} during {self.during}" if self.during and self.ending == "killed" else self.ending

    @property
    def steps(self) -> str:
        """`20 → 120`; nothing where it never came to training."""
        return "" if self.from_step is None else f"{self.from_step} → {self.to_step}"


@dataclass(frozen=True)
class TimeAccount:
    """A run's attempts and the sum of them; milliseconds."""

    spans: tuple[AttemptSpan, ...]
    unreadable: int  # lines that say neither when an attempt began nor when it ended
    dollars_per_hour: float | None = None

    @property
    def clock(self) -> int:
        """From the first start to the last end, without the time when a finished run rested."""
        return self.spans[-1].end if self.spans else 0

    @property
    def running(self) -> int:
        """How long there was an attempt: what a machine is paid for."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def buckets(self) -> dict[str, int]:
        """Every bucket, with `down`; they add up to the clock."""
        sums = {bucket: sum(span.buckets.get(bucket, 0) for span in self.spans) for bucket in BUCKETS}
        return {**sums, "down": sum(span.down for span in self.spans)}

    @property
    def goodput(self) -> float:
        """Progress that is kept ÷ the clock, in [0, 1]."""
        return self.buckets["progress"] / self.clock if self.clock else 0.0

    @property
    def goodput_running(self) -> float:
        """Progress that is kept ÷ the time there was an attempt."""
        return self.buckets["progress"] / self.running if self.running else 0.0

    @property
    def interruptions(self) -> int:
        """How many attempts did not come to their end."""
        return sum(span.ending in INTERRUPTED for span in self.spans)

    @property
    def lost_steps(self) -> int:
        """Steps that were done again, or will be."""
        return sum(span.lost_steps for span in self.spans)

    @property
    def dollars(self) -> float | None:
        """What the machine cost; nothing while it was down."""
        return None if self.dollars_per_hour is None else self.running / HOUR * self.dollars_per_hour


def account_for_attempts(lines: Sequence[Mapping[str, Any]], dollars_per_hour: float | None = None) -> TimeAccount:
    """The account of a run from the lines of attempts.jsonl, in any order; a line may lack whatever old ones lack."""
    believed = {(line["started"], str(line.get("attempt"))): line for line in lines if _is_believable(line)}
    ordered = sorted(believed.values(), key=lambda line: _unix(line["started"]))
    kept = _kept(ordered)
    spans: list[AttemptSpan] = []
    offset = _unix(ordered[0]["started"]) if ordered else 0.0  # unix seconds where the clock shows nothing
    for line, upto in zip(ordered, kept, strict=True):
        before = spans[-1].end if spans else 0
        start = max(round((_unix(line["started"]) - offset) * 1000), before)
        if spans and spans[-1].ending == "finished":
            offset, start = offset + (start - before) / 1000, before
        end = max(round((_unix(line["ended"]) - offset) * 1000), start)
        spans.append(_span(line, start, end, start - before, upto))
    return TimeAccount(tuple(spans), len(lines) - len(believed), dollars_per_hour)


def _kept(lines: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For each attempt the step up to which its work is still there: where later ones began; None: none did."""
    limits: list[int | None] = []
    limit: int | None = None
    for line in reversed(lines):
        limits.append(limit)
        if (begun := _step(line, "from_step")) is not None:
            limit = begun if limit is None else min(limit, begun)
    return limits[::-1]


def _span(line: Mapping[str, Any], start: int, end: int, down: int, upto: int | None) -> AttemptSpan:
    begun, reached = _step(line, "from_step"), _step(line, "to_step") or 0
    again = _step(line, "redone_steps") or 0  # gone back over by the attempt itself, which then skipped a batch
    done = max(reached - begun, 0) if begun is not None else 0
    lost = (_step(line, "lost_steps") or 0) if upto is None else reached - upto
    lost = min(max(lost, 0), done) + again
    return AttemptSpan(
        number=_step(line, "attempt") or 0,
        host=str(line.get("host", "")),
        started=_unix(line["started"]),
        ending=str(line.get("ending", "")),
        during=str(line.get("during", "")),
        start=start,
        end=end,
        down=down,
        from_step=begun,
        to_step=reached,
        lost_steps=lost,
        buckets=_whole(_divided(line.get("seconds"), lost / (done + again) if lost else 0.0), end - start),
    )


def _divided(seconds: Any, lost: float) -> dict[str, float]:
    """Seconds by bucket, with the lost share of what training cost in a bucket of its own."""
    buckets = dict.fromkeys(BUCKETS, 0.0)
    for name, spent in (seconds if isinstance(seconds, dict) else {}).items():
        if name == "total" or not isinstance(spent, int | float) or not 0.0 <= spent < float("inf"):
            continue
        if name in TRAINING:
            buckets[TRAINING[name]] += spent * (1.0 - lost)
            buckets["lost"] += spent * lost
        else:
            buckets[name if name in (*BEFORE, "finish") else "other"] += spent
    return buckets


def _whole(seconds: Mapping[str, float], milliseconds: int) -> dict[str, int]:
    """Whole milliseconds that add up to a span: what nobody wrote down is `other`; too much is scaled down."""
    total = sum(seconds.values()) * 1000
    scale = min(milliseconds / total, 1.0) if total else 0.0
    whole, reached, upto = {}, 0, 0.0
    for bucket, spent in seconds.items():
        upto += spent * 1000 * scale
        mark = min(round(upto), milliseconds)
        whole[bucket], reached = mark - reached, mark
    whole["other"] += milliseconds - reached
    return {bucket: spent for bucket, spent in whole.items() if spent}


def _is_believable(line: Any) -> bool:
    try:
        return isinstance(line, Mapping) and _unix(line["started"]) + _unix(line["ended"]) > 0
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _step(line: Mapping[str, Any], key: str) -> int | None:
    value = line.get(key)
    return value if isinstance(value, int) else None


def _unix(text: str) -> float:
    """Seconds since 1970; a time that names no zone is UTC."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
