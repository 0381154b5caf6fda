"""Account for the wall-clock of a run from the lines of its attempts: pure functions, in whole milliseconds.

The clock runs from the first start to the last end, and each moment is in exactly one bucket:

    progress   in training steps whose result is still there: goodput is this ÷ the whole clock
    lost       in steps, and the data, evaluations and saves between them, that were done again
    data eval save                  what training waited for, as far as it was not lost
    import startup restore compile  before the first step; compiling counts only where nothing else was left to do
    profile    tracing steps (`profile=`): starting and writing the trace; the traced steps themselves are progress
    finish     after the last step: the last write, closing logs
    other      that nobody wrote down (lines of old versions)
    down       between the end of one attempt and the start of the next

The definition is that of ML goodput: time that makes progress which is kept ÷ time. A step is kept where no later
attempt began before it; what lost steps cost is the mean of their attempt. When a run is finished the clock stops,
until somebody continues it: nobody wanted it to run between.

Clocks are set, and those of two machines differ. By how much one was set during an attempt is in its line
(`clock_jump_seconds`), and so is how long it took by a clock that nobody can set (`seconds.total`): it took no less.
What would be less than nothing is nothing, and attempts that overlap are cut; `TimeAccount.set_clocks` says how often
that was more than a minute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from runner.text import CLOCK_SLACK_SECONDS, LONGEST_SECONDS
from runner.types import JsonObject

# Seconds as an attempt writes them down → bucket. Of these a part is lost where steps are.
TRAINING_BUCKETS = {"step": "progress", "data": "data", "eval": "eval", "save": "save"}
STARTING_BUCKETS = ("import", "startup", "restore", "compile")
BUCKETS = ("progress", "data", "eval", "save", "lost", *STARTING_BUCKETS, "profile", "finish", "other", "down")
# Endings of attempts that did not come to their end.
INTERRUPTED = ("killed", "failed", "preempted")
MILLISECONDS_PER_HOUR = 3_600_000
# A bucket with less would be told as 0.0 s.
SHOWN_MILLISECONDS = 50
# Two clocks that differ by less agree; an attempt that is that much too early came from another machine.
SLACK_MILLISECONDS = round(CLOCK_SLACK_SECONDS * 1000)
SAME_MILLISECONDS = 100
# No number in a line that is larger was counted or measured by us.
MOST_STEPS = 1 << 53


@dataclass(frozen=True)
class AttemptSpan:
    """One attempt on the clock of its run. Times are milliseconds where nothing else is said.

    Attributes:
        number: which attempt it was, from 1.
        host: the machine it ran on.
        started: unix seconds, as that machine had them.
        ending: `finished`, `killed`, … or `running`.
        during: what a killed one was doing.
        start: when it began on the clock of the run.
        end: when it ended there.
        down: how long no attempt was running before it.
        from_step: the step that training went on from; None where it never came to training.
        to_step: the last step that it completed.
        lost_steps: how many of its steps were done again, or will be.
        buckets: bucket → time; they add up to `end - start`.
        devices: how many it computed on.
    """

    number: int
    host: str
    started: float
    ending: str
    during: str
    start: int
    end: int
    down: int
    from_step: int | None
    to_step: int
    lost_steps: int
    buckets: Mapping[str, int]
    devices: int = 1

    @property
    def how(self) -> str:
        """Return how it ended: `finished`, `killed during eval`."""
        return f"{self.ending} during {self.during}" if self.during and self.ending == "killed" else self.ending

    @property
    def steps(self) -> str:
        """Return `20 → 120`, or nothing where it never came to training."""
        return "" if self.from_step is None else f"{self.from_step} → {self.to_step}"


@dataclass(frozen=True)
class TimeAccount:
    """The attempts of a run and the sums over them, in milliseconds.

    Attributes:
        spans: the attempts in their order.
        unreadable: how many lines say neither when an attempt began nor when it ended.
        dollars_per_hour: the price of the machine while an attempt runs, where it is known.
        set_clocks: how many attempts ended before they began, or began before the one before them had ended.
    """

    spans: tuple[AttemptSpan, ...]
    unreadable: int
    dollars_per_hour: float | None = None
    set_clocks: int = 0

    @property
    def clock(self) -> int:
        """Return the time from the first start to the last end, without what a finished run rested."""
        return self.spans[-1].end if self.spans else 0

    @property
    def running(self) -> int:
        """Return how long an attempt was running: what a machine is paid for."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def device_time(self) -> int:
        """Return the time that attempts were running, times the devices of each."""
        return sum((span.end - span.start) * span.devices for span in self.spans)

    @property
    def buckets(self) -> dict[str, int]:
        """Return the time in every bucket, `down` included; they add up to the clock."""
        sums = {bucket: sum(span.buckets.get(bucket, 0) for span in self.spans) for bucket in BUCKETS}
        return {**sums, "down": sum(span.down for span in self.spans)}

    @property
    def goodput(self) -> float:
        """Return progress that is kept ÷ the clock, in [0, 1]."""
        return self.buckets["progress"] / self.clock if self.clock else 0.0

    @property
    def goodput_running(self) -> float:
        """Return progress that is kept ÷ the time an attempt was running, in [0, 1]."""
        return self.buckets["progress"] / self.running if self.running else 0.0

    @property
    def interruptions(self) -> int:
        """Return how many attempts did not come to their end."""
        return sum(span.ending in INTERRUPTED for span in self.spans)

    @property
    def lost_steps(self) -> int:
        """Return how many steps were done again, or will be."""
        return sum(span.lost_steps for span in self.spans)

    @property
    def dollars(self) -> float | None:
        """Return what the machine cost while attempts ran; None without a price."""
        if self.dollars_per_hour is None:
            return None
        return self.running / MILLISECONDS_PER_HOUR * self.dollars_per_hour


def account_for_attempts(lines: Sequence[JsonObject], dollars_per_hour: float | None = None) -> TimeAccount:
    """Return the account of a run from the lines of attempts.jsonl, in any order.

    A line without a time of start and end is left out and counted; anything else may be missing or odd.
    """
    # An attempt counts once. It has two lines where a kill came between its line and the end of its status.json.
    believed = {(line["started"], str(line.get("attempt"))): line for line in lines if _has_times(line)}
    ordered = _sort_attempts(list(believed.values()))
    kept_until = _find_kept_steps(ordered)
    spans: list[AttemptSpan] = []
    set_clocks = 0
    # Unix seconds at which the clock of the run shows nothing.
    offset = _parse_time(ordered[0]["started"]) if ordered else 0.0
    for line, kept in zip(ordered, kept_until, strict=True):
        before = spans[-1].end if spans else 0
        told_start = round((_parse_time(line["started"]) - offset) * 1000)
        told_length, length, jump = _measure_length(line)
        # A finished run rested until somebody continued it: the clock goes on from where it stopped. So it does where
        # the clock was set back since the attempt before: nobody knows how long that was.
        is_early = told_start < before - SLACK_MILLISECONDS
        if spans and (spans[-1].ending == "finished" or is_early):
            offset, told_start = offset + (told_start - before) / 1000, before
        # Never before the last one ended: two machines need not agree on the time, and each moment counts once.
        start = max(told_start, before)
        end = max(told_start + length, start)
        offset += jump / 1000
        set_clocks += is_early or told_length < -SLACK_MILLISECONDS
        spans.append(_make_span(line, (before, start, end), kept))
    return TimeAccount(tuple(spans), len(lines) - len(believed), dollars_per_hour, set_clocks)


def _sort_attempts(lines: list[JsonObject]) -> list[JsonObject]:
    """Return lines in the order of the attempts: by their numbers, or by the clock where those do not tell."""
    numbers = [_get_step(line, "attempt") for line in lines]
    # By the clock, an attempt after it was set back would come before those that it goes on from.
    if None not in numbers and len(set(numbers)) == len(numbers):
        return sorted(lines, key=lambda line: line["attempt"])
    return sorted(lines, key=lambda line: _parse_time(line["started"]))


def _measure_length(line: JsonObject) -> tuple[int, int, int]:
    """Return how long an attempt took by its two times, how long it really did, and how far its clock was set.

    In milliseconds. The first two differ by more than the last where a clock was set back and nobody wrote it down.
    """
    told = round((_parse_time(line["ended"]) - _parse_time(line["started"])) * 1000)
    jump = line.get("clock_jump_seconds")
    jump = round(jump * 1000) if isinstance(jump, int | float) and abs(jump) < LONGEST_SECONDS else 0
    seconds = line.get("seconds")
    measured = round((_get_seconds(seconds, "total") or 0.0) * 1000) if isinstance(seconds, dict) else 0
    # The two clocks are read one after the other.
    if told - jump < measured - SAME_MILLISECONDS:
        jump = told - measured
    return told, max(told - jump, 0), jump


def _find_kept_steps(lines: Sequence[JsonObject]) -> list[int | None]:
    """Return for each attempt the step up to which its work is kept; None where no later one came to training."""
    limits: list[int | None] = []
    limit: int | None = None
    # From the last to the first: what an attempt did is kept up to the least step that a later one began at.
    for line in reversed(lines):
        limits.append(limit)
        from_step = _get_step(line, "from_step")
        if from_step is not None:
            limit = from_step if limit is None else min(limit, from_step)
    return limits[::-1]


def _make_span(line: JsonObject, times: tuple[int, int, int], kept: int | None) -> AttemptSpan:
    """Return an attempt on the clock. `times`: the end of the one before it, its start and its end."""
    before, start, end = times
    from_step, to_step = _get_step(line, "from_step"), _get_step(line, "to_step") or 0
    done = max(to_step - from_step, 0) if from_step is not None else 0
    # Where a later attempt shows what was kept, it knows better than the line, which was written before.
    lost = (_get_step(line, "lost_steps") or 0) if kept is None else to_step - kept
    # Steps that the attempt itself went back over, to skip a batch on which the loss was not finite.
    redone = _get_step(line, "redone_steps") or 0
    lost = min(max(lost, 0), done) + redone
    seconds = _split_seconds(line.get("seconds"), lost / (done + redone) if lost else 0.0)
    return AttemptSpan(
        number=_get_step(line, "attempt") or 0,
        host=str(line.get("host", "")),
        started=_parse_time(line["started"]),
        ending=str(line.get("ending", "")),
        during=str(line.get("during", "")),
        start=start,
        end=end,
        down=start - before,
        from_step=from_step,
        to_step=to_step,
        lost_steps=lost,
        buckets=_fit_to_span(seconds, end - start),
        devices=_count_devices(line.get("hardware")),
    )


def _count_devices(hardware: Any) -> int:
    """Return the devices of `8 × H100 (fsdp 8)`; 1 where nothing says it."""
    count = str(hardware).partition(" × ")[0]
    return int(count) if count.isdecimal() and count.isascii() and 0 < len(count) < 7 else 1


def _split_seconds(seconds: Any, lost_share: float) -> dict[str, float]:
    """Return seconds by bucket; the lost share of what training cost has a bucket of its own."""
    buckets = dict.fromkeys(BUCKETS, 0.0)
    for name in seconds if isinstance(seconds, dict) else ():
        # A line may be torn or of an old version: what is no length of time is as if nobody had written it down.
        spent = _get_seconds(seconds, name)
        if name == "total" or spent is None:
            continue
        if name in TRAINING_BUCKETS:
            buckets[TRAINING_BUCKETS[name]] += spent * (1.0 - lost_share)
            buckets["lost"] += spent * lost_share
        else:
            buckets[name if name in (*STARTING_BUCKETS, "profile", "finish") else "other"] += spent
    return buckets


def _fit_to_span(seconds: Mapping[str, float], milliseconds: int) -> dict[str, int]:
    """Return whole milliseconds by bucket that add up to a span.

    What nobody wrote down is `other`; where more was written down than there was time, all are scaled down.
    """
    total = sum(seconds.values()) * 1000
    scale = min(milliseconds / total, 1.0) if total else 0.0
    fitted, reached, so_far = {}, 0, 0.0
    # The running sum is rounded, not each bucket: the parts then add up exactly.
    for bucket, spent in seconds.items():
        so_far += spent * 1000 * scale
        mark = min(round(so_far), milliseconds)
        fitted[bucket], reached = mark - reached, mark
    fitted["other"] += milliseconds - reached
    return {bucket: spent for bucket, spent in fitted.items() if spent}


def _has_times(line: Any) -> bool:
    try:
        # Reading both is the test; a clock that was never set, before 1970, tells nothing.
        return isinstance(line, Mapping) and _parse_time(line["started"]) + _parse_time(line["ended"]) > 0
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _get_step(line: JsonObject, key: str) -> int | None:
    value = line.get(key)
    return value if isinstance(value, int) and 0 <= value < MOST_STEPS else None


def _get_seconds(seconds: Mapping[str, Any], name: str) -> float | None:
    value = seconds.get(name)
    return float(value) if isinstance(value, int | float) and 0.0 <= value < LONGEST_SECONDS else None


def _parse_time(text: str) -> float:
    """Return the seconds since 1970 of an ISO 8601 time; one that names no zone is UTC."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
