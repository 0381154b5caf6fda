"""`drill`: run a configuration to its end, and again while it is killed; compare every bit, draw both.

Nothing of the user's is touched: both runs live in a folder of their own, and go when they turn out identical. Exit
code 0 where every bit is equal; 1 where not, with the first difference and its probable cause.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner import files
from runner.drill.compare_runs import RunComparison, compare_runs, measure_drift
from runner.drill.diagnosis import DifferenceFacts, explain_difference, explain_drift
from runner.drill.drill_result import PICTURE, DrillResult, name_victim, result_document, result_lines
from runner.drill.kill_plan import STARTING_PHASES, Baseline, plan_kills
from runner.drill.kill_process import DrilledProcess, DrillRun, run_and_kill, watch_process
from runner.drill.wiped_disk import NO_BUCKET, find_wiped_disk
from runner.errors import ConfigError, HoldfastError, RefusedError
from runner.inspect.diff_checkpoints import compare_arrays
from runner.inspect.lookup import Checkpoint, choose_new_folder, read_config_document
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.heartbeat import Heartbeat
from runner.rundir.layout import RunDir
from runner.text import format_count, format_duration
from runner.values import Say, VerbResult

# Keys that the drill decides itself: where its runs live and how they go on.
RESERVED_KEYS = ("dir", "root", "resume", "overwrite", "step", "hydra")
REPORT = "report.json"
MAX_KILLS, MAX_DEVICES = 1000, 64
# The line on a terminal that says what is going on is written anew at most once in this time.
STATUS_LINE_SECONDS = 0.2


def add_arguments(parser: ArgumentParser) -> None:
    """Declare how often to kill, by which seed, and the configuration as for run.py."""
    parser.usage = (
        "python -m runner drill [--kills N] [--seed S] [--devices N,M,…] [--keep] [--to DIR] [--json] [--] "
        "[key=value …]"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how often to kill it (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed kills elsewhere (0)")
    parser.add_argument(
        "--devices", metavar="N,M,…", help="so many devices of a CPU for one process after the other (needs a mesh)"
    )
    parser.epilog = "With remote=URL the disk is wiped at every kill, and the run goes on from the bucket."
    parser.add_argument("--keep", action="store_true", help="keep both runs also where they are identical")
    parser.add_argument("--to", metavar="DIR", help="a new folder for it all (outputs/.drill/TIME)")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Run, kill, compare, report. Exit code 0: identical; 1: not; a run that fails untouched has its own."""
    overrides, folder = _check_arguments(arguments), choose_new_folder("drill", arguments.to)
    # A SIGTERM or a hang-up ends a drill as Ctrl-C does: its processes and folders are to be taken away first.
    before = [(each, signal.signal(each, signal.default_int_handler)) for each in (signal.SIGTERM, signal.SIGHUP)]
    keep, made = arguments.keep, [parent for parent in folder.parents if not parent.exists()]
    try:
        result = DrillResult(folder, kills_asked=arguments.kills, devices=_read_devices(arguments))
        answer = _run_drill(result, overrides, arguments.seed, say)
        keep = keep or answer.exit_code != 0
        return answer
    # Also when it is interrupted: half a drill proves nothing, so nothing of it is kept.
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        if not keep:
            _remove_runs(folder, made)


def _check_arguments(arguments: Namespace) -> tuple[str, ...]:
    """Return the overrides. Raises ConfigError where one is not for a drill."""
    if not 1 <= arguments.kills <= MAX_KILLS:
        raise ConfigError(f"drill: --kills {arguments.kills}: expected 1 to {MAX_KILLS}")
    for word in arguments.overrides:
        if word.startswith("-"):
            raise ConfigError(f"drill: {word}: a drill is of one configuration; leave it out")
        key = word.lstrip("+~").split("=")[0].split(".")[0].split("/")[0]
        if key in RESERVED_KEYS:
            raise ConfigError(f"drill: {word}: the drill decides where and how its runs live; leave it out")
    return tuple(arguments.overrides)


def _read_devices(arguments: Namespace) -> tuple[int, ...]:
    """Return how many devices each process has, in turn. Raises ConfigError where that means nothing."""
    if arguments.devices is None:
        return ()
    words = arguments.devices.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_DEVICES for word in words):
        raise ConfigError(f"drill: --devices {arguments.devices}: expected numbers from 1 to {MAX_DEVICES}, as 4,2,1")
    # What a file of choices says of the mesh is not read here.
    if not any(word.lstrip("+").startswith(("mesh", "experiment=")) for word in arguments.overrides):
        raise ConfigError(
            "drill: --devices: the run uses one device, however many there are; add mesh=data (and train.parts=N, so "
            "that the bits do not depend on their number)"
        )
    return tuple(map(int, words))


def _remove_runs(folder: Path, made: Sequence[Path]) -> None:
    """Delete the runs; where there is no report, also the folder and the parents that were made to hold it."""
    for name in ("uninterrupted", "interrupted", "again"):
        files.remove_tree(folder / name)
        files.remove_file(folder / f"{name}.txt")
    if not (folder / REPORT).exists():
        for empty in (folder, *made):
            # Not empty, or not there: something of somebody else's lies in it.
            with suppress(OSError):
                empty.rmdir()


def _run_drill(result: DrillResult, overrides: tuple[str, ...], seed: int, say: Say) -> VerbResult:
    """Run both runs, fill in `result` and report it."""
    reporter = KillReporter(say, result.kills_asked)
    first_count = result.devices[0] if result.devices else None
    wiped_disk = find_wiped_disk(overrides, os.environ, result.folder)
    untouched = overrides if wiped_disk is None else (*overrides, *NO_BUCKET)
    killed = overrides if wiped_disk is None else (*overrides, *wiped_disk.overrides)
    drill_run = DrillRun("uninterrupted", result.folder / "uninterrupted", untouched, first_count)
    result.uninterrupted, first = _run_untouched(drill_run, reporter)
    result.baseline = result.uninterrupted.trace.as_baseline(first.read_status()["step"])
    kills = plan_kills(seed, result.kills_asked, result.baseline)
    drill_run = DrillRun("interrupted", result.folder / "interrupted", killed, wiped_disk=wiped_disk)
    disk = "" if wiped_disk is None else ", its disk lost each time"
    say(f"again, and killed {format_count(len(kills), 'time')}{disk}:")
    reporter.begin_run("interrupted", result.baseline.processes)
    for process in run_and_kill(drill_run, kills, result.baseline, reporter.observe, result.devices):
        result.processes.append(process)
        reporter.end_process(process)
    reporter.clear_status_line()
    if (exit_code := result.processes[-1].exit_code) != 0:
        said = "; it said:\n  " + "\n  ".join(drill_run.last_words) if drill_run.last_words else ""
        result.broken = f"the same command ended with exit code {exit_code}{said}"
    elif not result.kills:
        result.broken = "no kill landed: the run was over before the first; give it more steps"
    second = drill_run.run_dir
    if second is not None and result.broken is None:
        try:
            result.comparison = compare_runs(first, second)
        except RefusedError as error:
            result.broken = str(error)
    is_different = result.comparison is not None and not result.comparison.identical
    if second is not None and is_different and len(set(result.devices)) > 1 and not _keeps_bits(first):
        result.cause = explain_drift(result.devices, measure_drift(first, second))
    elif second is not None and is_different:
        # A second uninterrupted run tells what is not restored from what never repeats, even without a kill.
        reporter.say("they are different; once more untouched, to see whether it repeats at all:")
        _, again = _run_untouched(DrillRun("again", result.folder / "again", untouched, first_count), reporter)
        facts = _gather_facts(result, first, second, compare_runs(first, again))
        result.cause = explain_difference(facts)
    if wiped_disk is not None and result.identical:
        wiped_disk.delete_all()
    return _report(result, first, second, say)


def _run_untouched(drill_run: DrillRun, reporter: KillReporter) -> tuple[DrilledProcess, RunDir]:
    """Run it to its end.

    Raises:
        HoldfastError: the run does not get there; with its own exit code, and its own words for codes 2 and 3.
    """
    reporter.begin_run(drill_run.name)
    process = watch_process(drill_run, None, Baseline(0), time.perf_counter(), reporter.observe)
    reporter.clear_status_line()
    run_dir = drill_run.run_dir
    if process.exit_code == 0 and run_dir is not None:
        took = format_duration(process.ended - process.began)
        reporter.say(f"{drill_run.name}: {run_dir.read_status()['step']} steps in {took}")
        return process, run_dir
    *_, last = drill_run.last_words or ["it said nothing"]
    error = HoldfastError(last.removeprefix("error: "))
    if process.exit_code not in (2, 3):
        error = HoldfastError(f"drill: also untouched the run ends with exit code {process.exit_code}: {last}")
    error.exit_code = process.exit_code if process.exit_code > 0 else 1
    raise error


def _keeps_bits(run: RunDir) -> bool:
    """Return whether a run says that its bits do not depend on how many devices there are."""
    train = read_config_document(run).get("train")
    return isinstance(train, dict) and train.get("parts") is not None


def _gather_facts(result: DrillResult, first: RunDir, second: RunDir, again: RunComparison) -> DifferenceFacts:
    """Return what is known about a difference; `again` compares the first run with a second uninterrupted one."""
    found = result.comparison
    assert found is not None
    both = sorted(set(found.kept[0]) & set(found.kept[1]))
    return DifferenceFacts(
        arrays=found.differing,
        progress=list(found.progress),
        line=found.line,
        resumes=result.resumed_steps,
        agree=[step for step in both if compare_arrays(Checkpoint(first, step), Checkpoint(second, step)).equal],
        again=again,
        hardware=read_attempts(first)[-1].get("hardware", ""),
    )


def _report(result: DrillResult, first: RunDir, second: RunDir | None, say: Say) -> VerbResult:
    """Draw, write down and print what was found."""
    # Here: matplotlib takes a moment to import, and a wrong command should be answered at once.
    from runner.drill.drill_plot import draw_drill

    draw_drill(result.folder / PICTURE, result, first, second)
    document = result_document(result)
    files.replace_file(result.folder / REPORT, files.format_json(document, indent=1) + "\n")
    say("")
    for line in result_lines(result):
        say(line)
    return VerbResult(document, 0 if result.identical else 1)


class KillReporter:
    """Say a line for each kill once training goes on; on a terminal also keep one that says what is going on now."""

    def __init__(self, say: Say, kills_asked: int):
        self.say, self._kills_asked = say, kills_asked
        self._on_terminal, self._last_written = sys.stderr.isatty(), 0.0
        self._name, self._num_processes = "", 0
        # The last killed process, while it is not known yet what came of the kill.
        self._pending: DrilledProcess | None = None
        self._count = 0

    def begin_run(self, name: str, num_processes: int = 0) -> None:
        """Speak of another run from here on; `num_processes`: as many as its command starts to work on it."""
        self._name, self._num_processes = name, num_processes

    def observe(self, now: float, beat: Heartbeat | None) -> None:
        """Take note of what a process does now."""
        if self._pending is not None and beat is not None and beat.phase not in STARTING_PHASES:
            self._say_what_was_lost(self._pending, now)
            self._pending = None
        if self._on_terminal and time.monotonic() > self._last_written + STATUS_LINE_SECONDS:
            self._last_written = time.monotonic()
            phase = beat.phase if beat else "startup"
            sys.stderr.write(f"\r\033[K{self._name}: {phase}{f', step {beat.step}' if beat and beat.step else ''}")
            sys.stderr.flush()

    def end_process(self, process: DrilledProcess) -> None:
        """Take note of a process that is gone."""
        if self._pending is not None:
            self._say_kill(self._pending, "killed again before it went on")
        self._pending = None
        if process.was_killed:
            self._count, self._pending = self._count + 1, process

    def clear_status_line(self) -> None:
        """Take away the line that says what is going on."""
        if self._on_terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _say_what_was_lost(self, killed: DrilledProcess, now: float) -> None:
        lost = max((killed.step or 0) - killed.durable, 0)
        again = f"{format_count(lost, 'step')} again" if lost else "nothing lost"
        where = f"from step {killed.durable}" if killed.durable else "from the beginning"
        self._say_kill(killed, f"goes on {where}, {again}, after {format_duration(now - killed.ended)}")

    def _say_kill(self, killed: DrilledProcess, what: str) -> None:
        assert killed.planned is not None
        self.clear_status_line()
        step = f"step {killed.step}" if killed.step is not None else ""
        number = f"{self._count:>{len(str(self._kills_asked))}}/{self._kills_asked}"
        who = f"  {name_victim(killed.planned.victim):<10}" if self._num_processes else ""
        self.say(f"  {number}  {killed.planned.signal.name}{who}  {killed.moment:<8} {step:<9}  {what}")
