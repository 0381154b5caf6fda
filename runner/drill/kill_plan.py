"""Where a drill kills: a pure function of a seed, a number, and what the uninterrupted run did when.

Every moment comes once before any comes twice, in the order of `MOMENTS`; the steps are spread over the whole run.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.rundir.heartbeat import Beat

STARTING = ("import", "startup", "restore", "compile")  # phases before training goes on
TRAINING = ("step", "data", "save")  # one phase to whoever looks from afar
WRITING = ("write", "seal", "publish", "prune")  # phases of the thread that writes checkpoints
MOMENTS = ("step", "eval", "write", "restore", "prune", "compile", "publish", "seal", "startup")
HEARD = ("step", "eval", "write", "restore", "compile")  # moments at which a run surely listens for SIGTERM
LONG = ("startup", "eval", "write", "step")  # moments long enough to choose a point within
ONE_IN = 5  # one kill of so many is a SIGTERM
STEP_WEIGHT = 4  # of the kills beyond one for each moment, so many times more fall on a step than on another moment
LAST = 0.9  # later in a run than this it may be over before it can obey a SIGTERM


@dataclass(frozen=True)
class Past:
    """What the uninterrupted run did when: steps at which it evaluated and saved, and the usual length of a phase."""

    steps: int
    evaluated: Sequence[int] = ()
    saved: Sequence[int] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def chances(self, moment: str) -> Sequence[int]:
        """The steps at which a moment came; for one that comes at any step, all."""
        if moment == "eval":
            return self.evaluated
        return self.saved if moment in WRITING else range(1, max(self.steps, 2))


@dataclass(frozen=True)
class Aim:
    """One kill to be made: in this moment, when at least `step` steps are completed; in any moment from `late` on.

    Where the moment is one of starting, it is that of the process after the kill before. `depth` is how far into the
    moment, as a part of its usual length.
    """

    moment: str
    step: int
    late: int
    signal: signal.Signals = signal.SIGKILL
    depth: float = 0.0

    def is_in(self, beat: Beat | None) -> bool:
        """Whether the process is in the moment."""
        if self.moment in STARTING or beat is None:
            return self.moment == doing(beat)
        if beat.phase in STARTING or beat.step < self.step:
            return False
        if self.moment in WRITING:
            return beat.writing == self.moment
        return beat.phase in TRAINING if self.moment == "step" else beat.phase == self.moment

    def is_due(self, beat: Beat | None, into: float | None, past: Past) -> bool:
        """Whether to kill now, `into` seconds after the moment began; None where it has not."""
        if into is not None and into >= self.depth * past.seconds.get(self.moment, 0.0):
            return True
        if beat is None:
            return False
        if self.moment in STARTING:  # it was too short to be seen
            return beat.phase not in STARTING[: STARTING.index(self.moment) + 1]
        if beat.phase in STARTING:
            return False
        return beat.step >= (past.steps if beat.phase == "finish" else self.late)  # at the end it is any moment

    def at_last(self, beat: Beat | None, past: Past) -> Aim:
        """The kill to be made now: where a polite request might come too late to be obeyed, it is none."""
        too_late = beat is not None and (beat.phase == "finish" or beat.step > LAST * past.steps)
        return replace(self, signal=signal.SIGKILL) if too_late else self


def doing(beat: Beat | None) -> str:
    """The phase a process is in; importing is starting up, also before it gives a sign of life."""
    return "startup" if beat is None or beat.phase == "import" else beat.phase


def plan(seed: int, count: int, past: Past) -> list[Aim]:
    """So many kills, in the order in which they fall. Equal for equal arguments."""
    rng = random.Random(seed)
    possible = [moment for moment in MOMENTS if past.chances(moment)]
    weights = [STEP_WEIGHT if moment == "step" else 1 for moment in possible]
    moments = [*possible[:count], *rng.choices(possible, weights, k=max(count - len(possible), 0))]
    while_running = _running([moment for moment in moments if moment not in STARTING], past, rng)
    aims = _with_starts(while_running, [moment for moment in moments if moment in STARTING], past, rng)
    return _with_terms(aims, past, rng)


def _running(moments: Sequence[str], past: Past, rng: random.Random) -> list[Aim]:
    """Kills while it trains: on steps evenly spread, on as many different evaluations and saves as there are."""
    steps = _spread(moments.count("step"), past.steps, rng)
    evaluations, saves = _drawn(past.evaluated, rng), _drawn(past.saved, rng)
    aims = []
    for moment in moments:
        step = next(steps if moment == "step" else evaluations if moment == "eval" else saves)
        depth = rng.uniform(0.0, 0.7) if moment in LONG else 0.0
        aims.append(Aim(moment, step, _late(moment, step, past), depth=depth))
    return sorted(aims, key=lambda aim: (aim.step, ("step", "eval", *WRITING).index(aim.moment)))


def _with_starts(aims: Sequence[Aim], moments: Sequence[str], past: Past, rng: random.Random) -> list[Aim]:
    """Kills while it starts again, each after one while it trained: where it can, with something to restore."""
    first = min(past.saved, default=0)
    after = [index for index, aim in enumerate(aims) if aim.step > first] or list(range(len(aims)))
    follows: dict[int, list[Aim]] = {}
    for moment in moments:
        index = rng.choice(after)
        depth = rng.uniform(0.2, 0.9) if moment in LONG else 0.0
        follows.setdefault(index, []).append(Aim(moment, aims[index].step, 0, depth=depth))
    return [each for index, aim in enumerate(aims) for each in (aim, *follows.get(index, ()))]


def _with_terms(aims: Sequence[Aim], past: Past, rng: random.Random) -> list[Aim]:
    """One of a few as a polite request, and not for the only kill in its moment where that can be helped."""
    heard = [index for index, aim in enumerate(aims) if aim.moment in HEARD and aim.step <= LAST * past.steps]
    rng.shuffle(heard)
    hard, spare = Counter(aim.moment for aim in aims), []
    for index in heard:
        if hard[aims[index].moment] > 1:
            hard[aims[index].moment] -= 1
            spare.append(index)
    polite = [*spare, *(index for index in heard if index not in spare)][: (len(aims) + 2) // ONE_IN]
    return [replace(aim, signal=signal.SIGTERM) if index in polite else aim for index, aim in enumerate(aims)]


def _spread(count: int, steps: int, rng: random.Random) -> Iterator[int]:
    """A random step from each of `count` equal parts of a run."""
    room = max(steps - 1, 1)
    return (1 + min(int((index + rng.random()) / count * room), room - 1) for index in range(count))


def _drawn(chances: Sequence[int], rng: random.Random) -> Iterator[int]:
    """Endless chances, at random, all of them before any comes again."""
    while chances:
        yield from rng.sample(list(chances), len(chances))


def _late(moment: str, step: int, past: Past) -> int:
    """Until when to wait for a moment: it has another chance, in case it was too short to be seen."""
    if moment == "step":
        return step + 1
    again = next((chance for chance in past.chances(moment) if chance > step), step)
    return again + max(past.steps // 20, 1)
