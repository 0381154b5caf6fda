"""A real `python run.py`, watched through its pulse and killed at a chosen moment.

A pulse is read about every millisecond; just before a moment that is short, ever so often.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from statistics import median

from runner.checkpoint.record import records_in
from runner.drill.kill_plan import STARTING, TRAINING, Aim, Past, doing
from runner.errors import STOPPED
from runner.rundir import heartbeat
from runner.rundir.heartbeat import Beat
from runner.rundir.layout import Run

DOOR = Path(__file__).resolve().parents[2] / "run.py"
# What a drill changes in the configuration: where it lives and what it prints, which is no part of what it computes.
QUIET = ("log.console=false", "log.wandb=null")
POLL_SECONDS, CLOSE_SECONDS = 1e-3, 1e-4
CLOSE_STEPS = 2
REACHED_SECONDS = 0.05  # when a step was reached is noted so often

See = Callable[[float, Beat | None], None]


@dataclass(frozen=True)
class Case:
    """One of the runs of a drill: its own root, so that it is a run like any other and in nobody's way."""

    name: str
    root: Path
    overrides: tuple[str, ...]

    def words(self, aim: Aim | None) -> list[str]:
        """The command. A process that is to be killed while it compiles must have something to compile."""
        anew = ["compile_cache=off"] if aim and aim.moment == "compile" else []
        quoted = str(self.root).replace("\\", "\\\\").replace("'", "\\'")
        return [sys.executable, str(DOOR), *self.overrides, *QUIET, *anew, f"root='{quoted}'"]

    @property
    def run(self) -> Run | None:
        """The run in it, once it is there."""
        return next((Run(path.parent) for path in self.root.glob("*/*/config.yaml")), None)

    @property
    def output(self) -> Path:
        """What its processes print."""
        return self.root.with_name(f"{self.name}.txt")

    @property
    def last_words(self) -> list[str]:
        """The end of what its last process printed, or logged if it printed nothing."""
        run = self.run
        for path in (self.output, *([run.log] if run else [])):
            if path.is_file() and (lines := path.read_text(errors="replace").strip().splitlines()):
                return lines[-5:]
        return []


@dataclass
class Trace:
    """What was seen of one process, in seconds since the drill of its run began."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)  # phase, from, to
    writes: list[tuple[str, int, float, float]] = field(default_factory=list)  # the writer's phase, step, from, to
    evaluated: list[int] = field(default_factory=list)
    reached: list[tuple[float, int]] = field(default_factory=list)  # when, how many steps were complete

    def see(self, now: float, beat: Beat | None) -> None:
        """Note what has changed."""
        phase = "train" if beat is not None and beat.phase in TRAINING else doing(beat)
        phase = "finish" if self.reached and phase == "startup" else phase  # what is left to do after training
        if not self.spans or self.spans[-1][0] != phase:
            self.spans.append((phase, now, now))
            if phase == "eval" and beat is not None:
                self.evaluated.append(beat.step)
        self.spans[-1] = (phase, self.spans[-1][1], now)
        if beat is None or beat.phase in STARTING:
            return
        if beat.writing and (not self.writes or self.writes[-1][0] != beat.writing):
            self.writes.append((beat.writing, beat.step, now, now))
        if beat.writing:
            self.writes[-1] = (*self.writes[-1][:3], now)
        if not self.reached or (beat.step > self.reached[-1][1] and now > self.reached[-1][0] + REACHED_SECONDS):
            self.reached.append((now, beat.step))

    @property
    def resumed(self) -> float | None:
        """When training began."""
        return self.reached[0][0] if self.reached else None

    def past(self, steps: int) -> Past:
        """What a planner needs to know of an uninterrupted run."""
        lengths: dict[str, list[float]] = {}
        for phase, begin, end in (*self.spans, *((write[0], write[2], write[3]) for write in self.writes)):
            lengths.setdefault(phase, []).append(end - begin)
        seconds = {phase: median(each) for phase, each in lengths.items()}
        seconds["step"] = sum(lengths.get("train", ())) / steps
        saved = [step for phase, step, _, _ in self.writes if phase == "write"]
        return Past(steps, sorted(set(self.evaluated)), sorted(set(saved)), seconds)


@dataclass(frozen=True)
class Attempt:
    """One process: what it was aimed at, how it ended, how far it had come. Seconds since its run's drill began."""

    aim: Aim | None
    began: float
    ended: float
    code: int
    at: Beat | None  # its last sign of life; None where there was none yet
    from_step: int | None  # where it went on from; None where it did not come so far
    durable: int  # the newest checkpoint it left behind; 0 where there is none
    trace: Trace

    @property
    def landed(self) -> bool:
        """Whether the kill is what ended it. A SIGTERM may be obeyed, or not be listened for (`preempt.signals=[]`)."""
        if self.aim is None:
            return False
        return self.code == -self.aim.signal or (self.aim.signal == SIGTERM and self.code == STOPPED)

    @property
    def moment(self) -> str:
        """What it was doing at the end, by its own word."""
        if self.at is None:
            return "startup"
        phase = "step" if self.at.phase in TRAINING else doing(self.at)
        aimed = self.aim is not None and self.aim.moment == phase
        return self.at.writing if self.at.writing and not aimed else phase

    @property
    def step(self) -> int | None:
        """How many steps were complete at the end; None where training had not begun."""
        return self.at.step if self.at is not None and self.from_step is not None else None


def follow(case: Case, aim: Aim | None, past: Past, origin: float, see: See) -> Attempt:
    """Run one process to its end, or to the kill. `see` hears what is seen. No process is left behind, ever."""
    sight, trace, began = Sight(case), Trace(), time.perf_counter() - origin
    entered: float | None = None
    struck: list[Beat | None] = []
    with _started(case, aim) as process:
        while process.poll() is None:
            now, beat = time.perf_counter() - origin, sight.beat()
            trace.see(now, beat)
            see(now, beat)
            if aim is not None and not struck:
                entered = None if not aim.is_in(beat) else now if entered is None else entered
                if aim.is_due(beat, None if entered is None else now - entered, past):
                    aim = aim.at_last(beat, past)
                    process.send_signal(aim.signal)
                    struck.append(beat)
            time.sleep(CLOSE_SECONDS if aim and _is_close(aim, beat) else POLL_SECONDS)
    last, run = sight.beat(), case.run
    at = struck[0] if aim and aim.signal == SIGTERM and struck else last  # one that obeys goes on for a moment
    trained = run is not None and bool(trace.reached or (last and last.phase not in STARTING))
    from_step = run.read_status().get("attempt", {}).get("from_step") if run and trained else None
    durable = [record.step for record in records_in(run.checkpoints) if not record.mark] if run else []
    ended = time.perf_counter() - origin
    return Attempt(aim, began, ended, process.returncode, at, from_step, max(durable, default=0), trace)


class Sight:
    """The pulse of the process that was started last; what the one before it left there is not believed."""

    def __init__(self, case: Case):
        self._case, self._run = case, case.run
        self._stale = heartbeat.read(self._run.pulse) if self._run else None
        self._last: Beat | None = None

    def beat(self) -> Beat | None:
        """Its last sign of life; None before the first."""
        self._run = self._run or self._case.run
        found = heartbeat.read(self._run.pulse) if self._run else None
        self._last = found if found is not None and found != self._stale else self._last
        return self._last


@contextmanager
def _started(case: Case, aim: Aim | None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own: Ctrl-C reaches the drill alone, which then ends it here."""
    case.root.mkdir(parents=True, exist_ok=True)
    with case.output.open("wb") as out:
        process = subprocess.Popen(
            case.words(aim), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _is_close(aim: Aim, beat: Beat | None) -> bool:
    """Whether a short moment may come any time now."""
    return aim.moment not in STARTING and beat is not None and beat.step >= aim.step - CLOSE_STEPS


def attempts(case: Case, aims: Sequence[Aim], past: Past, see: See) -> Iterator[Attempt]:
    """One process after the other, each but the last killed; ends early with one that ended in any other way."""
    origin = time.perf_counter()
    for aim in (*aims, None):
        attempt = follow(case, aim, past, origin, see)
        yield attempt
        if not attempt.landed:
            return


@dataclass(frozen=True)
class Kill:
    """One that landed, and what came of it; seconds and `lost` steps are known once training went on."""

    number: int
    signal: str
    moment: str
    aimed: str
    step: int | None  # None where training had not begun
    resumed_from: int | None = None  # None where the next process was killed before it trained
    lost: int = 0  # steps that were done again
    back_seconds: float | None = None  # until training went on


def kills(past: Sequence[Attempt]) -> list[Kill]:
    """The kills among attempts, in their order."""
    found = []
    for index, attempt in enumerate(past):
        if attempt.aim is None or not attempt.landed:
            continue
        after = past[index + 1] if index + 1 < len(past) else None
        goes_on = next((later.from_step for later in past[index + 1 :] if later.from_step is not None), None)
        lost = max(attempt.step - goes_on, 0) if attempt.step is not None and goes_on is not None else 0
        back = after.trace.resumed - attempt.ended if after and after.trace.resumed is not None else None
        signal, moment, resumed = attempt.aim.signal.name, attempt.moment, after.from_step if after else None
        found.append(Kill(index + 1, signal, moment, attempt.aim.moment, attempt.step, resumed, lost, back))
    return found
