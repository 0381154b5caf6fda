"""Run a real `python run.py`, watch it through its heartbeat and kill it at a chosen moment.

The heartbeat is read about every millisecond, and far more often just before a moment that may be short. All times are
seconds since the first process of a run was started (`origin`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGTERM
from statistics import median

from runner import files
from runner.checkpoint.record import newest_durable_step
from runner.drill.kill_plan import STARTING_PHASES, TRAINING_PHASES, Baseline, PlannedKill, phase_of
from runner.drill.run_processes import OpenProcesses, list_processes
from runner.drill.wiped_disk import WipedDisk
from runner.errors import STOPPED
from runner.installation import find_run_program
from runner.rundir.heartbeat import Heartbeat, read_heartbeat
from runner.rundir.layout import RunDir
from runner.text import format_override

# What a drill changes in the configuration beside the root: what is printed, which is no part of what is computed.
QUIET = ("log.console=false", "log.wandb=null")

# The time between two looks at the heartbeat, and just before a planned kill: some moments are over at once.
POLL_SECONDS = 1e-3
CLOSE_POLL_SECONDS = 1e-4
# The flag of XLA that makes several devices of a CPU.
COUNT_FLAG = "--xla_force_host_platform_device_count"
# So many steps before a planned kill the looks become frequent.
CLOSE_STEPS = 2
# The time at which a step was completed is noted at most once in this time, however fast the steps are.
REACHED_SECONDS = 0.05

# Called with the time and the heartbeat of every look; None before the first heartbeat.
OnHeartbeat = Callable[[float, Heartbeat | None], None]


@dataclass(frozen=True)
class DrillRun:
    """One of the runs of a drill: `python run.py OVERRIDES` under a root of its own, in nobody's way.

    Attributes:
        num_devices: a CPU is divided into so many devices for its process; None: the machine as it is.
        wiped_disk: where the run lives while its disk goes at every kill; None: the disk stays.
    """

    name: str
    root: Path
    overrides: tuple[str, ...]
    num_devices: int | None = None
    wiped_disk: WipedDisk | None = None

    def environment(self) -> dict[str, str]:
        """Return the variables of its process."""
        if self.num_devices is None:
            return dict(os.environ)
        others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(COUNT_FLAG)]
        flags = " ".join([*others, f"{COUNT_FLAG}={self.num_devices}"])
        return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}

    def command(self, planned: PlannedKill | None) -> list[str]:
        """Return what to execute for the process that is to be killed so."""
        # A process that is to be killed while it compiles must have something to compile.
        cache = ["compile_cache=off"] if planned and planned.moment == "compile" else []
        return [
            *(sys.executable, *find_run_program(), *self.overrides, *QUIET, *cache),
            format_override("root", str(self.root)),
        ]

    def find_durable_step(self) -> int:
        """Return the newest step that the next process can go on from; 0 where there is none."""
        if self.wiped_disk is not None:
            return self.wiped_disk.find_newest_step()
        run_dir = self.run_dir
        return 0 if run_dir is None else newest_durable_step(run_dir.checkpoints)

    def lose_disk(self) -> None:
        """Let the disk go with the machine, where the run lives elsewhere as well."""
        if self.wiped_disk is not None:
            files.remove_tree(self.root)

    @property
    def run_dir(self) -> RunDir | None:
        """The run's directory, once it is there."""
        return next((RunDir(path.parent) for path in self.root.glob("*/*/config.yaml")), None)

    @property
    def output(self) -> Path:
        """The file with what its last process printed."""
        return self.root.with_name(f"{self.name}.txt")

    @property
    def last_words(self) -> list[str]:
        """The last lines of what its last process printed, or logged if it printed nothing."""
        run_dir = self.run_dir
        for path in [self.output] + ([run_dir.log] if run_dir else []):
            if path.is_file() and (lines := path.read_text(errors="replace").strip().splitlines()):
                return lines[-5:]
        return []


@dataclass
class ProcessTrace:
    """What was seen of one process.

    Attributes:
        spans: (phase, from, to), one after the other.
        writes: (phase of the writer, step, from, to), beside the spans.
        evaluated: the steps at which it evaluated.
        reached: (time, how many steps were complete).
        processes: how many processes it had started to work on the run when it began to train.
    """

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    writes: list[tuple[str, int, float, float]] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    reached: list[tuple[float, int]] = field(default_factory=list)
    processes: int = 0

    def observe(self, now: float, beat: Heartbeat | None) -> None:
        """Note what has changed since the last look."""
        phase = "train" if beat is not None and beat.phase in TRAINING_PHASES else phase_of(beat)
        # Once it has trained, "startup" is what is left to do between two other phases, and that is at the end.
        phase = "finish" if self.reached and phase == "startup" else phase
        if not self.spans or self.spans[-1][0] != phase:
            self.spans.append((phase, now, now))
            if phase == "eval" and beat is not None:
                self.evaluated.append(beat.step)
        self.spans[-1] = (phase, self.spans[-1][1], now)
        if beat is None or beat.phase in STARTING_PHASES:
            return
        if beat.writing and (not self.writes or self.writes[-1][0] != beat.writing):
            self.writes.append((beat.writing, beat.step, now, now))
        if beat.writing:
            self.writes[-1] = (*self.writes[-1][:3], now)
        if not self.reached or (beat.step > self.reached[-1][1] and now > self.reached[-1][0] + REACHED_SECONDS):
            self.reached.append((now, beat.step))

    @property
    def training_began(self) -> float | None:
        """The time at which training began or went on; None where it did not."""
        return self.reached[0][0] if self.reached else None

    def as_baseline(self, steps: int) -> Baseline:
        """Return what a plan needs to know of an uninterrupted run of so many steps."""
        lengths: dict[str, list[float]] = {}
        for phase, begin, end in self.spans:
            lengths.setdefault(phase, []).append(end - begin)
        for phase, _, begin, end in self.writes:
            lengths.setdefault(phase, []).append(end - begin)
        seconds = {phase: median(each) for phase, each in lengths.items()}
        seconds["step"] = sum(lengths.get("train", ())) / steps
        saved = {step for phase, step, _, _ in self.writes if phase == "write"}
        return Baseline(steps, sorted(set(self.evaluated)), sorted(saved), seconds, self.processes)


@dataclass(frozen=True)
class DrilledProcess:
    """One process of a drill, after its end.

    Attributes:
        planned: how it was to be killed; None where it was left alone.
        began: when it was started.
        ended: when it was gone.
        exit_code: -N where signal N killed it.
        beat: its heartbeat when it was killed; None where there was none yet.
        from_step: where it went on from; None where it did not come so far.
        durable: the step of the newest checkpoint it left behind; 0 where there is none.
        trace: what it did when.
    """

    planned: PlannedKill | None
    began: float
    ended: float
    exit_code: int
    beat: Heartbeat | None
    from_step: int | None
    durable: int
    trace: ProcessTrace

    @property
    def was_killed(self) -> bool:
        """True if the kill ended it. A SIGTERM may be obeyed, or not be listened for (`preempt.signals=[]`)."""
        if self.planned is None:
            return False
        obeyed = self.planned.signal == SIGTERM and self.exit_code == STOPPED
        if self.planned.victim is None:
            return obeyed or self.exit_code == -self.planned.signal
        # The command lives on: it tells of its process 0 as a shell does, and without another one the run stops.
        return obeyed or self.exit_code == (STOPPED if self.planned.victim else 128 + self.planned.signal)

    @property
    def moment(self) -> str:
        """The moment it was in at the end, by its own word."""
        if self.beat is None:
            return "startup"
        phase = "step" if self.beat.phase in TRAINING_PHASES else phase_of(self.beat)
        # Two threads work at once. The planned one of the two is what counts; otherwise the writer says more.
        hit = self.planned is not None and self.planned.moment == phase
        return self.beat.writing if self.beat.writing and not hit else phase

    @property
    def step(self) -> int | None:
        """The number of steps that were complete at the end; None where training had not begun."""
        return self.beat.step if self.beat is not None and self.from_step is not None else None


def watch_process(
    drill_run: DrillRun, planned: PlannedKill | None, baseline: Baseline, origin: float, on_heartbeat: OnHeartbeat
) -> DrilledProcess:
    """Run one process to its end or to the kill, and return what was seen. No process is left behind, ever."""
    reader, trace, began = HeartbeatReader(drill_run), ProcessTrace(), time.perf_counter() - origin
    moment_began: float | None = None
    struck: list[Heartbeat | None] = []
    is_counted = False
    with _start_process(drill_run, planned) as (process, others):
        while process.poll() is None:
            now, beat = time.perf_counter() - origin, reader.read()
            trace.observe(now, beat)
            if trace.reached and not is_counted:
                is_counted, trace.processes = True, len(list_processes(process.pid))
            on_heartbeat(now, beat)
            if planned is not None and not struck:
                if not planned.is_in(beat):
                    moment_began = None
                elif moment_began is None:
                    moment_began = now
                if planned.is_due(beat, None if moment_began is None else now - moment_began, baseline):
                    planned = planned.avoid_late_sigterm(beat, baseline)
                    processes = list_processes(process.pid)
                    others.add(list(processes.values()))
                    if planned.victim is None:
                        process.send_signal(planned.signal)
                        struck.append(beat)
                    elif planned.victim in processes:
                        os.kill(processes[planned.victim], planned.signal)
                        struck.append(beat)
            time.sleep(CLOSE_POLL_SECONDS if planned and _is_close(planned, beat) else POLL_SECONDS)
    last, run_dir = reader.read(), drill_run.run_dir
    # A run that obeys a SIGTERM goes on for a moment, and so does what is left of several processes: what it did when
    # it was struck is what counts.
    at_kill = struck[0] if planned and struck and (planned.signal == SIGTERM or baseline.processes) else last
    trained = run_dir is not None and bool(trace.reached or (last and last.phase not in STARTING_PHASES))
    from_step = run_dir.read_status().get("attempt", {}).get("from_step") if run_dir and trained else None
    return DrilledProcess(
        planned=planned,
        began=began,
        ended=time.perf_counter() - origin,
        exit_code=process.returncode,
        beat=at_kill,
        from_step=from_step,
        durable=drill_run.find_durable_step(),
        trace=trace,
    )


class HeartbeatReader:
    """Read the heartbeat of the process of a run that was started last."""

    def __init__(self, drill_run: DrillRun):
        self._drill_run, self._run_dir = drill_run, drill_run.run_dir
        # What the process before left in the file is not believed: the fresh one has not written to it yet.
        self._stale = read_heartbeat(self._run_dir.heartbeat) if self._run_dir else None
        self._last: Heartbeat | None = None

    def read(self) -> Heartbeat | None:
        """Return its last heartbeat; None before the first."""
        self._run_dir = self._run_dir or self._drill_run.run_dir
        found = read_heartbeat(self._run_dir.heartbeat) if self._run_dir else None
        if found is not None and found != self._stale:
            self._last = found
        return self._last


@contextmanager
def _start_process(
    drill_run: DrillRun, planned: PlannedKill | None
) -> Iterator[tuple[subprocess.Popen[bytes], OpenProcesses]]:
    """Start the command of a run; yield it, and what holds the processes that it starts in its turn.

    At the end all have ended: killed, where the drill is interrupted.
    """
    files.make_folder(drill_run.root)
    output = files.open_file(drill_run.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with os.fdopen(output, "wb") as out:
        process = subprocess.Popen(
            drill_run.command(planned),
            env=drill_run.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # A session of its own: Ctrl-C reaches the drill alone, which then ends the process here.
            start_new_session=True,
        )
    others = OpenProcesses()
    try:
        yield process, others
        # Those whose command was killed save before they leave: what goes on next is to find the run free.
        others.wait()
    finally:
        others.add(list(list_processes(process.pid).values()))
        process.kill()
        process.wait()
        others.kill()
        others.wait()


def _is_close(planned: PlannedKill, beat: Heartbeat | None) -> bool:
    """Return whether a short moment may come any time now."""
    return planned.moment not in STARTING_PHASES and beat is not None and beat.step >= planned.step - CLOSE_STEPS


def run_and_kill(
    drill_run: DrillRun,
    kills: Sequence[PlannedKill],
    baseline: Baseline,
    on_heartbeat: OnHeartbeat,
    devices: Sequence[int] = (),
) -> Iterator[DrilledProcess]:
    """Yield one process after the other, each but the last killed; end early with one that was not.

    `devices`: how many each process has, in turn; empty: what there are.
    """
    origin = time.perf_counter()
    for number, planned in enumerate((*kills, None)):
        moved = replace(drill_run, num_devices=devices[number % len(devices)]) if devices else drill_run
        process = watch_process(moved, planned, baseline, origin, on_heartbeat)
        yield process
        if not process.was_killed:
            return
        drill_run.lose_disk()


@dataclass(frozen=True)
class LandedKill:
    """One kill that landed, and what came of it.

    Attributes:
        number: the number of the process that it killed, from 1.
        signal: SIGKILL or SIGTERM.
        moment: what the process was doing.
        aimed: what it should have been doing.
        victim: the number of the process of the run that was killed; None for its command.
        step: how many steps were complete; None where training had not begun.
        resumed_from: the step the next process went on from; None where that was killed before it trained.
        lost: how many steps were done again.
        back_seconds: how long it took until training went on; None where the next process did not come so far.
    """

    number: int
    signal: str
    moment: str
    aimed: str
    victim: int | None
    step: int | None
    resumed_from: int | None = None
    lost: int = 0
    back_seconds: float | None = None


def list_landed_kills(processes: Sequence[DrilledProcess]) -> list[LandedKill]:
    """Return the kills that ended one of these processes of a run, in their order."""
    kills = []
    for index, process in enumerate(processes):
        if process.planned is None or not process.was_killed:
            continue
        later = processes[index + 1 :]
        after = later[0] if later else None
        # Steps are lost to the first process that trains again, which need not be the next one.
        goes_on = next((each.from_step for each in later if each.from_step is not None), None)
        lost = max(process.step - goes_on, 0) if process.step is not None and goes_on is not None else 0
        back = after.trace.training_began if after else None
        kills.append(
            LandedKill(
                number=index + 1,
                signal=process.planned.signal.name,
                moment=process.moment,
                aimed=process.planned.moment,
                victim=process.planned.victim,
                step=process.step,
                resumed_from=after.from_step if after else None,
                lost=lost,
                back_seconds=back - process.ended if back is not None else None,
            )
        )
    return kills
