"""A trace becomes shares: how much of the devices' time went into matrix products, copies, collectives, or nothing.

Where a device does several things at once, as a GPU on two streams or a CPU in two threads, each moment is divided
equally among them: so the shares, with what is idle, add up to one. An operation that waits for another is at work.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.profiling.operations import KINDS, Kind, StepOperations

if TYPE_CHECKING:
    from jax.profiler import ProfileData, ProfileEvent

MOST_OPERATIONS = 20
# What a person looks at is no longer than this; the name of a TPU's operation is its whole instruction.
MOST_NAME_CHARS = 120
# The name of the program, nothing where that is not known, and that of the operation.
OperationName = tuple[str, str]
# Begin and end in nanoseconds, and the operation.
Interval = tuple[float, float, OperationName]


@dataclass(frozen=True)
class Operation:
    """One operation of the traced steps, over all devices of this process.

    Attributes:
        name: as the compiled program has it, or that of a kernel.
        kind: what kind of work it is.
        seconds: how long it ran, in all.
        share: its part of the devices' time.
        count: how often it ran.
    """

    name: str
    kind: Kind
    seconds: float
    share: float
    count: int


@dataclass(frozen=True)
class TraceSummary:
    """What a trace says.

    Attributes:
        seconds: how long the traced steps took, by the clock.
        devices: how many devices of this process were traced.
        shares: the part of each kind of work, and `idle`; they add up to one.
        operations: those that took most, the longest first.
    """

    seconds: float
    devices: int
    shares: Mapping[str, float]
    operations: Sequence[Operation]


def summarize_trace(path: Path, step: StepOperations, seconds: float) -> TraceSummary:
    """Return what a trace (`*.xplane.pb`) says of steps that took so many seconds.

    What is known to belong to another program than the step is left out. Raises ValueError where the trace holds no
    operation of a device.
    """
    from jax.profiler import ProfileData

    return summarize_profile(ProfileData.from_file(str(path)), step, seconds)


def summarize_profile(profile: ProfileData, step: StepOperations, seconds: float) -> TraceSummary:
    """Return what a trace says, see `summarize_trace`."""
    devices = list(_iter_devices(profile, step))
    if not devices:
        raise ValueError("no operation of a device is in the trace")
    counts, spent = Counter[OperationName](), defaultdict[OperationName, float](float)
    for lines in devices:
        counts.update(name for line in lines for _, _, name in line)
        for name, time in _divide_time([list(_flatten(line)) for line in lines]).items():
            spent[name] += time
    # The seconds are those of the training thread; what a device did may have begun a little before.
    total = max(seconds * 1e9 * len(devices), sum(spent.values()))
    shares: defaultdict[str, float] = defaultdict(float)
    operations = []
    for name, time in sorted(spent.items(), key=lambda item: (-item[1], item[0])):
        kind = step.find_kind(*name)
        shares[kind] += time / total
        shown = name[1][:MOST_NAME_CHARS]
        operations.append(Operation(shown, kind, round(time / 1e9, 9), round(time / total, 6), counts[name]))
    rounded: dict[str, float] = {kind: round(shares[kind], 6) for kind in KINDS}
    idle = round(max(1.0 - sum(rounded.values()), 0.0), 6)
    return TraceSummary(round(seconds, 6), len(devices), {**rounded, "idle": idle}, operations[:MOST_OPERATIONS])


def _iter_devices(profile: ProfileData, step: StepOperations) -> Iterator[list[list[Interval]]]:
    """Yield for each device that did something the operations of each of its lines (threads, streams)."""
    host: list[list[Interval]] = []
    for plane in profile.planes:
        if plane.name.startswith("/device:") and "CUSTOM" not in plane.name:
            names = [line.name for line in plane.lines]
            # A TPU has a line of operations, and others that show the same in other ways. A GPU has streams.
            prefix = "XLA Ops" if "XLA Ops" in names else "Stream"
            lines = [_read_line(line.events, step) for line in plane.lines if line.name.startswith(prefix)]
            if any(lines):
                yield [line for line in lines if line]
        elif plane.name == "/host:CPU":
            # A CPU computes in threads of the host, beside much else: what is an operation of a program says so.
            lines = [_read_line(line.events, step, only_named=True) for line in plane.lines]
            host += [line for line in lines if line]
    if host:
        yield host


def _read_line(events: Iterable[ProfileEvent], step: StepOperations, *, only_named: bool = False) -> list[Interval]:
    """Return the operations of a thread or a stream; with `only_named` those alone that say which one they are."""
    found = []
    for event in events:
        known = {key: str(value) for key, value in event.stats if key in ("hlo_op", "hlo_module")}
        module, name = known.get("hlo_module", ""), known.get("hlo_op", "")
        if step.is_foreign(module) or (only_named and not name):
            continue
        # A TPU names an event by its instruction: `%fusion.3 = f32[8]{0} fusion(…)`.
        name = name or event.name.partition(" = ")[0].lstrip("%")
        found.append((event.start_ns, event.start_ns + event.duration_ns, (module, name)))
    return found


def _flatten(line: Iterable[Interval]) -> Iterator[Interval]:
    """Yield the stretches of one line without overlap: where operations are inside one another, of the innermost."""
    stack: list[tuple[float, OperationName]] = []  # ends and names of those that are open
    now = 0.0
    for begin, end, name in sorted(line, key=lambda each: (each[0], -each[1])):
        while stack and stack[-1][0] <= begin:
            closed, inner = stack.pop()
            if closed > now:
                yield now, closed, inner
                now = closed
        if stack and begin > now:
            yield now, begin, stack[-1][1]
        now = max(now, begin)
        # What lasts longer than what it is inside of (clocks of two kinds) ends with it.
        stack.append((min(end, stack[-1][0]) if stack else end, name))
    while stack:
        closed, inner = stack.pop()
        if closed > now:
            yield now, closed, inner
            now = closed


def _divide_time(lines: Sequence[Sequence[Interval]]) -> dict[OperationName, float]:
    """Return the nanoseconds of each operation, where moments that several lines share are divided equally."""
    spent, active = defaultdict[OperationName, float](float), Counter[OperationName]()
    before = 0.0
    for moment, sign, name in heapq.merge(*(_list_changes(line) for line in lines)):
        if running := active.total():
            for each, count in active.items():
                spent[each] += (moment - before) * count / running
        active[name] += sign
        if not active[name]:
            del active[name]
        before = moment
    return spent


def _list_changes(line: Sequence[Interval]) -> list[tuple[float, int, OperationName]]:
    return sorted((moment, sign, name) for begin, end, name in line for moment, sign in ((begin, 1), (end, -1)))
