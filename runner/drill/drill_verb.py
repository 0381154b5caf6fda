"""`drill`: your own configuration, uninterrupted and again while it is killed; every bit compared, and both drawn.

Nothing of yours is touched: both runs live in a folder of their own, and go when they turn out identical. Exit code 0
where every bit is equal; 1 where not, with the first difference and its probable cause.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner import files
from runner.drill.compare import evidence
from runner.drill.diagnose import Facts, diagnose
from runner.drill.kill import Attempt, Case, attempts, follow
from runner.drill.kill_plan import STARTING, Past, plan
from runner.drill.result import PICTURE, Story, clock, document, told
from runner.errors import ConfigError, HoldfastError, RefusedError
from runner.inspect.diff import compared
from runner.inspect.lookup import Checkpoint, new_folder
from runner.rundir.attempts import attempts as lines_of
from runner.rundir.heartbeat import Beat
from runner.rundir.layout import Run
from runner.text import plural
from runner.values import Answer, Say

OURS = ("dir", "root", "resume", "overwrite", "step", "hydra")  # the drill's to decide
REPORT = "report.json"
MOST = 1000  # kills
TICK_SECONDS = 0.2


def arguments(parser: ArgumentParser) -> None:
    """How often to kill, by which seed, and the configuration as for run.py."""
    parser.usage = "python -m runner drill [--kills N] [--seed S] [--keep] [--to DIR] [--json] [--] [key=value …]"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how often to kill it (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed kills elsewhere (0)")
    parser.add_argument("--keep", action="store_true", help="keep both runs also where they are identical")
    parser.add_argument("--to", metavar="DIR", help="a new folder for it all (outputs/.drill/TIME)")


def run(arguments: Namespace, say: Say) -> Answer:
    """Run, kill, compare, report. Exit code 0: identical; 1: not; a run that fails untouched has its own."""
    overrides, place = _checked(arguments), new_folder("drill", arguments.to)
    before = [(each, signal.signal(each, signal.default_int_handler)) for each in (signal.SIGTERM, signal.SIGHUP)]
    kept, made = arguments.keep, [folder for folder in place.parents if not folder.exists()]
    try:
        story = Story(place, asked=arguments.kills)
        answer = _drilled(story, overrides, arguments.seed, say)
        kept = kept or answer.exit_code != 0
        return answer
    finally:  # also when it is interrupted: half a drill proves nothing
        for number, handler in before:
            signal.signal(number, handler)
        if not kept:
            _leave_only_results(place, made)


def _checked(arguments: Namespace) -> tuple[str, ...]:
    """The overrides. Raises ConfigError where one is not for a drill."""
    if not 1 <= arguments.kills <= MOST:
        raise ConfigError(f"drill: --kills {arguments.kills}: expected 1 to {MOST}")
    for word in arguments.overrides:
        if word.startswith("-"):
            raise ConfigError(f"drill: {word}: a drill is of one configuration; leave it out")
        key = word.lstrip("+~").split("=")[0].split(".")[0].split("/")[0]
        if key in OURS:
            raise ConfigError(f"drill: {word}: the drill decides where and how its runs live; leave it out")
    return tuple(arguments.overrides)


def _leave_only_results(place: Path, made: Sequence[Path]) -> None:
    """Delete the runs; where there is no report, also the folder and what was made to hold it."""
    for name in ("uninterrupted", "interrupted", "again"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / f"{name}.txt").unlink(missing_ok=True)
    if not (place / REPORT).exists():
        for folder in (place, *made):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()


def _drilled(story: Story, overrides: tuple[str, ...], seed: int, say: Say) -> Answer:
    teller = Teller(say, story.asked)
    case = Case("uninterrupted", story.place / "uninterrupted", overrides)
    story.first, first = _untouched(case, teller)
    story.past = story.first.trace.past(first.read_status()["step"])
    aims = plan(seed, story.asked, story.past)
    other = Case("interrupted", story.place / "interrupted", overrides)
    say(f"again, and killed {plural(len(aims), 'time')}:")
    teller.begin("interrupted")
    for attempt in attempts(other, aims, story.past, teller.see):
        story.attempts.append(attempt)
        teller.ended(attempt)
    teller.clear()
    if story.attempts[-1].code != 0:
        said = "; it said:\n  " + "\n  ".join(other.last_words) if other.last_words else ""
        story.broken = f"the same command ended with exit code {story.attempts[-1].code}{said}"
    elif not story.kills:
        story.broken = "no kill landed: the run was over before the first; give it more steps"
    second = other.run
    if second is not None and story.broken is None:
        try:
            story.evidence = evidence(first, second)
        except RefusedError as error:
            story.broken = str(error)
    if story.evidence and not story.evidence.identical:
        story.cause = _cause(story, first, second, overrides, teller)
    return _reported(story, first, second, say)


def _untouched(case: Case, teller: Teller) -> tuple[Attempt, Run]:
    """Run it to its end. Raises what a user can act on, with the exit code of the run, where it does not get there."""
    teller.begin(case.name)
    attempt = follow(case, None, Past(0), time.perf_counter(), teller.see)
    teller.clear()
    run = case.run
    if attempt.code == 0 and run is not None:
        teller.say(f"{case.name}: {run.read_status()['step']} steps in {clock(attempt.ended - attempt.began)}")
        return attempt, run
    *_, last = case.last_words or ["it said nothing"]
    error = HoldfastError(last.removeprefix("error: "))
    if attempt.code not in (2, 3):
        error = HoldfastError(f"drill: also untouched the run ends with exit code {attempt.code}: {last}")
    error.exit_code = attempt.code if attempt.code > 0 else 1
    raise error


def _cause(story: Story, first: Run, second: Run | None, overrides: tuple[str, ...], teller: Teller) -> str:
    """Run it untouched a second time, and think."""
    assert story.evidence is not None
    assert second is not None
    teller.say("they are different; once more untouched, to see whether it repeats at all:")
    _, again = _untouched(Case("again", story.place / "again", overrides), teller)
    both = sorted(set(story.evidence.kept[0]) & set(story.evidence.kept[1]))
    agree = [step for step in both if compared(Checkpoint(first, step), Checkpoint(second, step)).equal]
    resumes = [attempt.from_step for attempt in story.attempts[1:] if attempt.from_step is not None]
    hardware = lines_of(first)[-1].get("hardware", "")
    progress = [*story.evidence.progress]
    facts = Facts(
        story.evidence.differing, progress, story.evidence.line, resumes, agree, evidence(first, again), hardware
    )
    return diagnose(facts)


def _reported(story: Story, first: Run, second: Run | None, say: Say) -> Answer:
    """Tell, draw, write down."""
    from runner.drill.drill_plot import draw

    draw(story.place / PICTURE, story, first, second)
    facts = document(story)
    files.replace(story.place / REPORT, json.dumps(facts, indent=1) + "\n")
    say("")
    for line in told(story):
        say(line)
    return Answer(facts, 0 if story.identical else 1)


class Teller:
    """A line for each kill once training goes on; on a terminal also one that says what is going on now."""

    def __init__(self, say: Say, asked: int):
        self.say, self._asked = say, asked
        self._live, self._shown, self._name = sys.stderr.isatty(), 0.0, ""
        self._open: Attempt | None = None  # killed, and nothing came of it yet
        self._count = 0

    def begin(self, name: str) -> None:
        """Another run from here on."""
        self._name = name

    def see(self, now: float, beat: Beat | None) -> None:
        """What a process does now."""
        if self._open is not None and beat is not None and beat.phase not in STARTING:
            self._back(self._open, now)
        if self._live and time.monotonic() > self._shown + TICK_SECONDS:
            self._shown = time.monotonic()
            phase = beat.phase if beat else "startup"
            sys.stderr.write(f"\r\033[K{self._name}: {phase}{f', step {beat.step}' if beat and beat.step else ''}")
            sys.stderr.flush()

    def ended(self, attempt: Attempt) -> None:
        """A process is gone."""
        if self._open is not None:
            self._line(self._open, "killed again before it went on")
        self._open = None
        if attempt.landed:
            self._count, self._open = self._count + 1, attempt

    def clear(self) -> None:
        """Nothing is going on any more."""
        if self._live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _back(self, killed: Attempt, now: float) -> None:
        self._open = None
        lost = max((killed.step or 0) - killed.durable, 0)
        again = f"{plural(lost, 'step')} again" if lost else "nothing lost"
        where = f"from step {killed.durable}" if killed.durable else "from the beginning"
        self._line(killed, f"goes on {where}, {again}, after {clock(now - killed.ended)}")

    def _line(self, killed: Attempt, what: str) -> None:
        assert killed.aim is not None
        self.clear()
        step = f"step {killed.step}" if killed.step is not None else ""
        number = f"{self._count:>{len(str(self._asked))}}/{self._asked}"
        self.say(f"  {number}  {killed.aim.signal.name}  {killed.moment:<8} {step:<9}  {what}")
