"""The power fails at any moment, and the same command goes on as if nothing had been: `python -m tests.laws.powercut`.

Every call that changes the disk is recorded while a run is begun, resumed or taken back (recorder.c). From the record
come the states that a power cut may leave (crash_states.py), each is made on disk, and the command is typed again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.laws.crash_states import Cut, History, Tree, read_calls, read_tree, write_tree
from tests.laws.endings import Ending, find_run, find_wrong_end, read_ending
from tests.laws.faults import LAST, TINY, Forks, compiled, forks, missing

COMMAND = (*TINY, "retention.last.n=1")  # saves at 3, 4, 6, 8, 9, 12; the best two of these are linked in turn
ALL_KEPT = (*TINY, "retention.last.n=9")
BACKGROUND = (*COMMAND, "ckpt.write=background", "log.tensorboard=true")
# What lies there has no name yet, or no more, that anything looks for: one cut among these says as much as a hundred.
DULL = re.compile(r"\.writing/N[./]|\.trash/N-N/")
# The calls by which training shows that it has gone on after a save, or ended after it.
GONE_ON = re.compile(r"mkdir .*/\.writing/|write .*/(attempts|metrics)\.jsonl")
GONE_ON_IN_BACKGROUND = re.compile(r"mkdir .*/\.writing/|write .*/attempts\.jsonl")
BACK_TO, KILLED_AT = 6, 7


@dataclass(frozen=True)
class Scenario:
    """A command whose calls are recorded.

    Attributes:
        name: how it is called.
        command: what is typed, before the power cut and after it.
        prepare: leaves in an empty folder what is there before; durable, all of it.
        held: the newest step that a restart goes on from while nothing newer is durable.
        goes_on: the calls that come after a save only when it is durable.
    """

    name: str
    command: tuple[str, ...]
    prepare: Callable[[Forks, Path], None] = lambda forks, cwd: None
    held: int = 0
    goes_on: re.Pattern[str] = GONE_ON


@dataclass(frozen=True)
class Recording:
    """A scenario that was played: what happened on disk, where the run lies, and what came of it."""

    scenario: Scenario
    history: History
    run: str
    ending: Ending

    def durable_step(self, after: int) -> int:
        """Return the newest step that no power cut after so many calls may take.

        One that has got its name, and whose folder was synced since; and whether it was or not, one after which
        training has gone on: it is told, and older ones may go.
        """
        folder = self.history.node_at(f"{self.run}/checkpoints", after)
        gone_on = [
            number
            for number, call in enumerate(self.history.calls[:after])
            if self.scenario.goes_on.match(f"{call.kind} {call.path}")
        ]
        steps = {self.scenario.held}
        for change in self.history.names:
            if change.number >= after or change.entry[0] != folder or not change.entry[1].isdecimal():
                continue
            if change.node is None:
                steps -= {int(change.entry[1])}
            elif max([self.history.last_sync(folder, after), *gone_on[-1:]]) > change.number:
                steps |= {int(change.entry[1])}
        return max(steps, default=0)


def _kill_and_damage(forks: Forks, cwd: Path) -> None:
    """Leave a killed run whose newest checkpoint is damaged, and whose log is ahead of the one before."""
    assert forks.run(cwd, *COMMAND, kill_at=KILLED_AT).returncode == -9
    (array,) = find_run(cwd).glob("checkpoints/6/state/d/*")
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)


def _finish(forks: Forks, cwd: Path) -> None:
    assert forks.run(cwd, *ALL_KEPT).returncode == 0


def _kill_in_background(forks: Forks, cwd: Path) -> None:
    assert forks.run(cwd, *BACKGROUND, kill_at=KILLED_AT).returncode == -9


SCENARIOS = (
    Scenario("fresh", COMMAND),
    Scenario("resumed", COMMAND, _kill_and_damage, held=4),
    Scenario("taken back", (*ALL_KEPT, f"step={BACK_TO}"), _finish, held=BACK_TO),
    Scenario("background", BACKGROUND, goes_on=GONE_ON_IN_BACKGROUND),
    Scenario("background resumed", BACKGROUND, _kill_in_background, goes_on=GONE_ON_IN_BACKGROUND),
)


def _inodes(cwd: Path) -> dict[str, int]:
    return {".": cwd.stat().st_ino} | {str(path.relative_to(cwd)): path.lstat().st_ino for path in cwd.rglob("*")}


def record_scenario(forks: Forks, scenario: Scenario, room: Path) -> Recording:
    """Play a scenario and write down what happens on disk; assert that nothing escaped the record."""
    cwd, log = room / scenario.name / "work", room / scenario.name / "calls"
    cwd.mkdir(parents=True)
    scenario.prepare(forks, cwd)
    start, inodes = read_tree(cwd), _inodes(cwd)
    done = forks.run(cwd, *scenario.command, RECORD_BELOW=str(cwd.resolve()), RECORD_LOG=str(log))
    assert done.returncode == 0, done.stdout
    history = History(start, read_calls(log, cwd.resolve()), inodes)
    played, there = history.tree(), read_tree(cwd)
    # The heartbeat is mapped into memory: no call writes there.
    differing = [name for name in played.keys() | there if played.get(name, 0) != there.get(name, 0)]
    assert all(name.endswith("/.pulse") for name in differing), f"not recorded: {differing}"
    run = find_run(cwd)
    return Recording(scenario, history, str(run.relative_to(cwd)), read_ending(run))


def iter_states(history: History, seed: int) -> Iterator[tuple[Cut, Tree]]:
    """Yield states, each content once, those around what a restart looks at first; ends when nothing new comes."""
    rng, seen = random.Random(seed), set()
    sorts: dict[str, list[int]] = {}
    for number, call in enumerate(history.calls):
        sorts.setdefault(str(call), []).append(number)
    lively = [numbers for sort, numbers in sorts.items() if not DULL.search(sort)]
    dull = list(itertools.chain(*(numbers for sort, numbers in sorts.items() if DULL.search(sort))))
    rng.shuffle(lively)
    for turn in itertools.count():
        found = False
        for numbers in filter(None, [*lively, dull]):
            # Before and after the call: a cut in between leaves one of these.
            cut = Cut(rng.choice(numbers) + rng.randint(0, 1), rng.choice(["ordered", "weak"]), seed + turn)
            tree = cut.state_of(history)
            if (key := hash(tuple(sorted(tree.items(), key=lambda item: item[0])))) not in seen:
                seen.add(key)
                found = True
                yield cut, tree
        if not found:
            return


def judge_state(forks: Forks, recording: Recording, cut: Cut, cwd: Path) -> str | None:
    """Type the command again where the power was cut; return what is wrong with what comes of it, None for nothing."""
    done = forks.run(cwd, *recording.scenario.command)
    last_words = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode != 0 or "Traceback" in done.stdout:
        return f"exit {done.returncode}: {last_words[0]}"
    held, restored = recording.durable_step(cut.after), re.search(r"restored step (\d+)", done.stdout)
    begun_at = int(restored[1]) if restored else LAST if "is finished" in done.stdout else 0
    if begun_at < held:
        return f"step {held} was durable, and it began at step {begun_at}"
    return find_wrong_end(cwd / recording.run, recording.ending)


@dataclass(frozen=True)
class Verdict:
    """What came of one state; `kept` is a copy of it as the power cut left it, where something is wrong."""

    scenario: str
    cut: Cut
    call: str
    problem: str | None
    kept: Path | None

    def __str__(self) -> str:
        """Say where the power was cut, and what is wrong."""
        return f"{self.scenario}: {self.cut} (before `{self.call}`): {self.problem}; the state is in {self.kept}"


def try_states(forks: Forks, recording: Recording, room: Path, count: int, seed: int) -> list[Verdict]:
    """Make `count` states of a scenario on disk, or as many as there are, and try each."""
    verdicts, history = [], recording.history
    room.mkdir(parents=True, exist_ok=True)
    for number, (cut, tree) in enumerate(itertools.islice(iter_states(history, seed), count)):
        cwd, kept = room / f"{number}", room / f"{number}-as-found"
        cwd.mkdir()
        write_tree(tree, cwd)
        problem = judge_state(forks, recording, cut, cwd)
        if problem is not None:
            kept.mkdir()
            write_tree(tree, kept)
        else:
            shutil.rmtree(cwd)
        call = str(history.calls[cut.after]) if cut.after < len(history.calls) else "the end"
        verdicts.append(Verdict(recording.scenario.name, cut, call, problem, kept if problem else None))
    return verdicts


@contextmanager
def recording_forks(room: Path) -> Iterator[Forks]:
    """Processes that can be recorded, forked from one that has imported everything."""
    with forks(compiled(room, "recorder.c")) as served:
        yield served


def main(arguments: Sequence[str]) -> int:
    """Try states of every scenario in turn, and say what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws.powercut", description=__doc__)
    parser.add_argument("--states", type=int, default=500, help="how many, over all scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=[scenario.name for scenario in SCENARIOS], action="append")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason)
        return 1
    chosen = [scenario for scenario in SCENARIOS if scenario.name in (options.scenario or [scenario.name])]
    room = Path(tempfile.mkdtemp(prefix="powercut-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(room / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ["JAX_PLATFORMS"] = "cpu"
    wrong: list[Verdict] = []
    tried = 0
    with recording_forks(room) as served:
        for scenario in chosen:
            recording = record_scenario(served, scenario, room)
            share = -(-options.states // len(chosen))
            verdicts = try_states(served, recording, room / scenario.name / "states", share, options.seed)
            failed = [verdict for verdict in verdicts if verdict.problem]
            calls = len(recording.history.calls)
            print(f"{scenario.name}: {calls} calls, {len(verdicts)} states, {len(failed)} wrong", flush=True)
            for verdict in failed:
                print(f"  {verdict}", flush=True)
            wrong, tried = [*wrong, *failed], tried + len(verdicts)
    print(f"{tried} states after a power cut, {len(wrong)} wrong")
    if not wrong:
        shutil.rmtree(room)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
