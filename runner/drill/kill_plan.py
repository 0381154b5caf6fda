"""Plan where a drill kills: a pure function of a seed, a number of kills and what the uninterrupted run did.

A *moment* is a phase of the heartbeat in which a run can be killed. Every moment comes once before any comes twice, in
the order of `MOMENTS`; the steps are spread over the whole run.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from runner.rundir.heartbeat import Heartbeat

Choice = TypeVar("Choice")

# Phases of a process that does not train yet, in the order in which they come.
STARTING_PHASES = ("import", "startup", "restore", "compile")
# These alternate too fast to be told apart from another process: to the drill they are one moment, "step".
TRAINING_PHASES = ("step", "data", "save")
# Phases of the thread that writes checkpoints, which go on beside those of training.
WRITER_PHASES = ("write", "seal", "publish", "prune")

MOMENTS = ("step", "eval", "write", "restore", "prune", "compile", "publish", "seal", "startup")
# Moments long enough to choose a point within.
LONG_MOMENTS = ("startup", "eval", "write", "step")
# Moments at which the signal handlers are surely installed. Earlier, a SIGTERM just kills, as a SIGKILL does.
SIGTERM_MOMENTS = ("step", "eval", "write", "restore", "compile")

# One kill of so many is a SIGTERM.
SIGTERM_ONE_IN = 5
# Of the kills beyond one for each moment, so many times more fall on a step than on another moment.
STEP_WEIGHT = 4
# A run may be over before it can obey a SIGTERM that is sent after this part of its steps.
LATEST_SIGTERM = 0.9


@dataclass(frozen=True)
class Baseline:
    """What the uninterrupted run did.

    Attributes:
        steps: how many steps it trained.
        evaluated: the steps at which it evaluated.
        saved: the steps at which it saved.
        seconds: how long a phase usually took (the median), by its name.
        processes: how many processes its command has started to work on it; 0 where it works on it itself.
    """

    steps: int
    evaluated: Sequence[int] = ()
    saved: Sequence[int] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    processes: int = 0

    def steps_of(self, moment: str) -> Sequence[int]:
        """Return the steps at which a moment came; all of them for a moment that comes at any step."""
        if moment == "eval":
            return self.evaluated
        return self.saved if moment in WRITER_PHASES else range(1, max(self.steps, 2))


@dataclass(frozen=True)
class PlannedKill:
    """One kill to be made.

    Attributes:
        moment: what the process is to be doing. A moment of starting is meant of the process that the kill before
            made start again.
        step: how many steps are to be completed at least.
        late: from this step on it is killed whatever it does: its moment was too short to be seen.
        signal: SIGKILL, or SIGTERM as a machine that goes away sends it.
        depth: how far into the moment, as a part of its usual length.
        victim: the number of the process of the run that is killed; None for its command.
    """

    moment: str
    step: int
    late: int
    signal: signal.Signals = signal.SIGKILL
    depth: float = 0.0
    victim: int | None = None

    def is_in(self, beat: Heartbeat | None) -> bool:
        """Return whether a process with this heartbeat is in the moment; None is a process without one yet."""
        if self.moment in STARTING_PHASES or beat is None:
            return self.moment == phase_of(beat)
        if beat.phase in STARTING_PHASES or beat.step < self.step:
            return False
        if self.moment in WRITER_PHASES:
            return beat.writing == self.moment
        return beat.phase in TRAINING_PHASES if self.moment == "step" else beat.phase == self.moment

    def is_due(self, beat: Heartbeat | None, seconds_inside: float | None, baseline: Baseline) -> bool:
        """Return whether to kill now; `seconds_inside` is the time since the moment began, None outside of it."""
        if seconds_inside is not None and seconds_inside >= self.depth * baseline.seconds.get(self.moment, 0.0):
            return True
        if beat is None:
            return False
        # A phase of starting that went by between two looks (a cached compilation, say) does not come again.
        if self.moment in STARTING_PHASES:
            return beat.phase not in STARTING_PHASES[: STARTING_PHASES.index(self.moment) + 1]
        if beat.phase in STARTING_PHASES:
            return False
        # After the last step no other moment comes; "finish" before it is only the gap between restoring and training.
        return beat.step >= (baseline.steps if beat.phase == "finish" else self.late)

    def avoid_late_sigterm(self, beat: Heartbeat | None, baseline: Baseline) -> PlannedKill:
        """Return the kill to be made now: a SIGKILL where the run may end before it could obey a SIGTERM."""
        too_late = beat is not None and (beat.phase == "finish" or beat.step > LATEST_SIGTERM * baseline.steps)
        return replace(self, signal=signal.SIGKILL) if too_late else self


def phase_of(beat: Heartbeat | None) -> str:
    """Return what the training thread of a process does; "startup" also while it imports and has no heartbeat yet."""
    return "startup" if beat is None or beat.phase == "import" else beat.phase


def plan_kills(seed: int, count: int, baseline: Baseline) -> list[PlannedKill]:
    """Return `count` kills in the order in which they fall; equal arguments give equal plans."""
    rng = random.Random(seed)
    possible = [moment for moment in MOMENTS if baseline.steps_of(moment)]
    weights = [STEP_WEIGHT if moment == "step" else 1 for moment in possible]
    moments = [*possible[:count], *rng.choices(possible, weights, k=max(count - len(possible), 0))]
    while_starting = [moment for moment in moments if moment in STARTING_PHASES]
    while_running = [moment for moment in moments if moment not in STARTING_PHASES]
    kills = _plan_running_kills(while_running, baseline, rng)
    kills = _insert_starting_kills(kills, while_starting, baseline, rng)
    kills = _choose_sigterms(kills, baseline, rng)
    if not baseline.processes:
        return kills
    # The command comes as often as each of its processes, of which process 0 leads.
    victims = _draw_endlessly((None, *range(baseline.processes)), rng)
    return [replace(kill, victim=victim) for kill, victim in zip(kills, victims, strict=False)]


def _plan_running_kills(moments: Sequence[str], baseline: Baseline, rng: random.Random) -> list[PlannedKill]:
    """Return kills while it trains: on steps evenly spread, on as many different evaluations and saves as there are."""
    steps = _spread_steps(moments.count("step"), baseline.steps, rng)
    evaluations, saves = _draw_endlessly(baseline.evaluated, rng), _draw_endlessly(baseline.saved, rng)
    kills = []
    for moment in moments:
        step = next(steps if moment == "step" else evaluations if moment == "eval" else saves)
        # At most 0.7: a moment that is shorter than usual is not over before the kill comes.
        depth = rng.uniform(0.0, 0.7) if moment in LONG_MOMENTS else 0.0
        kills.append(PlannedKill(moment, step, _latest_step(moment, step, baseline), depth=depth))
    order = ("step", "eval", *WRITER_PHASES)
    return sorted(kills, key=lambda kill: (kill.step, order.index(kill.moment)))


def _insert_starting_kills(
    running: Sequence[PlannedKill], moments: Sequence[str], baseline: Baseline, rng: random.Random
) -> list[PlannedKill]:
    """Return the kills with those at `moments` of starting among them, each after one while it trained."""
    # After the first save, where there is one: a process that starts before it has nothing to restore.
    first_save = min(baseline.saved, default=0)
    candidates = [index for index, kill in enumerate(running) if kill.step > first_save] or list(range(len(running)))
    following: dict[int, list[PlannedKill]] = {}
    for moment in moments:
        index = rng.choice(candidates)
        depth = rng.uniform(0.2, 0.9) if moment in LONG_MOMENTS else 0.0
        following.setdefault(index, []).append(PlannedKill(moment, running[index].step, 0, depth=depth))
    kills: list[PlannedKill] = []
    for index, kill in enumerate(running):
        kills += [kill, *following.get(index, ())]
    return kills


def _choose_sigterms(kills: Sequence[PlannedKill], baseline: Baseline, rng: random.Random) -> list[PlannedKill]:
    """Return the kills with one of a few sent as SIGTERM."""
    latest = LATEST_SIGTERM * baseline.steps
    eligible = [i for i, kill in enumerate(kills) if kill.moment in SIGTERM_MOMENTS and kill.step <= latest]
    rng.shuffle(eligible)
    # The only kill in its moment stays a SIGKILL where that can be helped: it is the harder test.
    sigkills, spare = Counter(kill.moment for kill in kills), []
    for index in eligible:
        if sigkills[kills[index].moment] > 1:
            sigkills[kills[index].moment] -= 1
            spare.append(index)
    preferred = spare + [index for index in eligible if index not in spare]
    chosen = preferred[: (len(kills) + 2) // SIGTERM_ONE_IN]
    return [replace(kill, signal=signal.SIGTERM) if index in chosen else kill for index, kill in enumerate(kills)]


def _spread_steps(count: int, steps: int, rng: random.Random) -> Iterator[int]:
    """Yield a random step from each of `count` equal parts of a run."""
    room = max(steps - 1, 1)
    return (1 + min(int((index + rng.random()) / count * room), room - 1) for index in range(count))


def _draw_endlessly(choices: Sequence[Choice], rng: random.Random) -> Iterator[Choice]:
    """Yield choices at random for ever, all of them before any comes again."""
    while choices:
        yield from rng.sample(list(choices), len(choices))


def _latest_step(moment: str, step: int, baseline: Baseline) -> int:
    """Return the step from which to wait no longer for a moment.

    It has one more chance, the next step at which it comes, in case it was too short to be seen.
    """
    if moment == "step":
        return step + 1
    again = next((chance for chance in baseline.steps_of(moment) if chance > step), step)
    return again + max(baseline.steps // 20, 1)
