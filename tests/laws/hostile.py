"""The law: whatever the side files of a run hold, a verb or a start ends in the contract and touches nothing outside.

    python -m tests.laws.hostile                      2,000 mutations × every verb that takes a run, and the start
    python -m tests.laws.hostile 5000 --seed 1        others
    python -m tests.laws.hostile --only 1234          one of them once more, with all that was said

Each mutation (mutations.py) hits a fresh copy of a small run, beside a canary that nothing may touch or show. Asserted
of every command: no traceback, an exit code of the contract, at most three lines of complaint, no control character,
an end in time and in memory, no code run, and of every start that what was good is still there. Verbs and most starts run in this process; some starts are the real run.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import Door
from tests.laws.commands import Ending, run_verb, start_run
from tests.laws.faults import TINY, Forks, forks
from tests.laws.mutations import CANARY, PLANTED, SECRET, STRUCTURES, Mutation, canary_of, draw_mutation, plant

WORDS = (*(word for word in TINY if not word.startswith("log.tensorboard")), "retention=last_n", "retention.last.n=2")
KILLED_AT = (7, 11)
# A command that looks at a small run takes some ten milliseconds; a loaded machine is no hang.
MOST_SECONDS = 2.0
MOST_MEMORY = 400 << 20
# Of how many mutations one meets what is slow: drawing, evaluating, the real run.py.
RARE = 12
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# diff says 1 where two differ. A start is evaluated to its end, refused, or stopped by the law itself.
EXIT_CODES = {"diff": (0, 1, 3, 5), "start": (0, 1, 2, 3, 5, 75)}
USUAL_CODES = (0, 2, 3, 5)


# --- the runs ---


def make_templates(room: Path, door: Forks) -> list[Path]:
    """Return the folders of two runs, each with its canary: one that is finished, one that was killed twice."""
    made = []
    for name, kills in (("finished", ()), ("killed", KILLED_AT)):
        folder = room / name
        folder.mkdir(parents=True)
        for step in kills or (None,):
            done = door.run(folder, *WORDS, kill_at=step)
            assert done.returncode == (0 if step is None else -9), done.stdout
        made.append(folder)
    for folder in made:
        # What a search, a quarantine and an earlier evaluation leave.
        run = Door(folder).the_run
        choice = {"option": {"kind": "full"}, "words": "full, 1 MB", "circumstances": {"device": "1 × cpu"}}
        (run / "remat.json").write_text(json.dumps(choice))
        (run / "quarantine/3-1").mkdir(parents=True)
        (run / "quarantine/3-1/reason.txt").write_text("a checksum differs\n")
        _make_canary(folder / CANARY, run)
    return made


def _make_canary(folder: Path, run: Path) -> None:
    """Make what lies beside a run and belongs to somebody else: files of the names that a run writes or deletes."""
    (folder / "sub/deeper").mkdir(parents=True)
    for name in ("victim.txt", "metrics.jsonl", "run.log", "events.out.tfevents.1.host", "sub/deeper/kept.txt"):
        (folder / name).write_text(f'{{"step": 1, "split": "train", "loss": 1.0, "note": "{SECRET}"}}\n')
    shutil.copytree(run / "checkpoints", folder / "run/checkpoints", symlinks=True)


def take_inventory(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: names, kinds, contents, and when each was last written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[path.relative_to(folder).as_posix()] = (facts.st_mode, facts.st_mtime_ns, content)
    return found


# --- one mutation ---


@dataclass
class Trial:
    """A folder in which one run after the other is mutated and looked at.

    Attributes:
        folder: the working directory: `outputs` and the canary lie in it.
        templates: the runs to copy.
        door: forks of the real run.py; None where none is started.
        sample: so many of the commands on each mutation; None: all of them.
        loud: whether all is printed.
        failures: what did not go as promised.
        counts: how many commands, by what they were and how they ended.
    """

    folder: Path
    templates: Sequence[Path]
    door: Forks | None = None
    sample: int | None = None
    loud: bool = False
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def note(self, failure: str) -> None:
        """Keep a failure, and say it at once: all of the law takes a while."""
        self.failures.append(failure)
        print(f"FAILED: {failure}", file=sys.stderr, flush=True)

    def suffer(self, number: int, seed: int) -> None:
        """Copy a run, mutate it as this number says, and look at it with every verb; then start it."""
        rng = random.Random(f"{seed} {number}")
        run = self._renew(rng.choice(self.templates))
        self.check(run, draw_mutation(run, rng), f"{seed}/{number}", rng)

    def suffer_link(self, place: str, kind: str, template: Path) -> None:
        """Plant something in the place of a file or folder, and do the same."""
        run = self._renew(template)
        harm = Mutation(kind, place, lambda target: plant(target, place, kind))
        self.check(run, harm, f"{kind} {place}", random.Random(f"{kind} {place}"))

    def _renew(self, template: Path) -> Path:
        for name in ("outputs", CANARY, "exported", "page.html", "time.png", "s"):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        shutil.copytree(template / "outputs", self.folder / "outputs", symlinks=True)
        shutil.copytree(template / CANARY, self.folder / CANARY, symlinks=True)
        return Door(self.folder).the_run

    def check(self, run: Path, harm: Mutation, name: str, rng: random.Random) -> None:
        """Mutate a run and run every command on it; what is not as promised becomes a failure."""
        canary = canary_of(run)
        harm.strike(run)
        before = take_inventory(canary)
        relative = os.path.relpath(run, self.folder)
        steps = sorted(int(path.name) for path in (canary / "run/checkpoints").iterdir() if path.name.isdecimal())
        commands = list_commands(relative, steps, is_rare=self.sample is None and rng.random() < 1 / RARE)
        for words in commands if self.sample is None else rng.sample(commands, self.sample):
            if words[0] != "start":
                self._judge(words, run_verb(*words), f"{name}: {harm}", canary, before)
                continue
            good = find_good_steps(run)
            self._judge(words, start_run(*words[1:]), f"{name}: {harm}", canary, before)
            if lost := good - find_good_steps(run):
                self.note(f"{name}: {harm}: a start has lost what was good: {sorted(lost)}")
        if self.door is not None and rng.random() < 1 / RARE:
            done = self.door.run(self.folder, f"dir={relative}", "train.steps=14")
            said = done.stdout.splitlines()
            # The forks write both streams into one file: what is no warning and no progress comes last.
            trace = done.stdout if any("Traceback" in line for line in said) else ""
            ending = Ending(None if trace else done.returncode, "", said[-1] if said else "", 0.0, trace[-1500:])
            self._judge(["start", "for real"], ending, f"{name}: {harm}", canary, before)
            if not trace and done.returncode not in (0, 3, 5):
                self.note(f"{name}: {harm}: the real start ended with {done.returncode}: {said[-3:]}")
        if leak := find_leak(self.folder):
            self.note(f"{name}: {harm}: {leak} shows what lies outside")

    def _judge(self, words: Sequence[str], ending: Ending, name: str, canary: Path, before: dict[str, Any]) -> None:
        self.counts[f"{words[0]} {ending.code}"] += 1
        problem = find_fault(words, ending)
        if problem is None and (now := take_inventory(canary)) != before:
            touched = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            problem = f"touched outside: {', '.join(touched)}"
        if self.loud:
            print(f"$ {' '.join(words)}\n{ending.out}{ending.err}{ending.trace}[{ending.code}, {ending.seconds:.2f} s]")
        if problem is not None:
            self.note(f"{name}\n    $ {' '.join(words)}\n    {problem}")


def find_good_steps(run: Path) -> set[int]:
    """Return the checkpoints that are in their place and proven; none where that is no folder of the run's own."""
    from runner.checkpoint.record import list_steps
    from runner.checkpoint.seal import find_problem
    from runner.errors import HoldfastError

    good = set()
    # A link, a file, a format of later: nothing that this run could lose.
    with suppress(OSError, HoldfastError):
        for step in list_steps(run / "checkpoints") if not (run / "checkpoints").is_symlink() else ():
            if find_problem(run / "checkpoints" / str(step)) is None:
                good.add(step)
    return good


def list_commands(run: str, steps: Sequence[int], *, is_rare: bool) -> list[list[str]]:
    """Return the verbs that take a run, what only reads first, and the start; those that are slow only where rare."""
    first, last = f"{run}@{steps[0]}", f"{run}@{steps[-1]}"
    reading = [
        *(["ls", run], ["ls", "--verify", run], ["ls", "--json", "outputs/default"], ["ls"]),
        *(["show", run], ["show", "--json", first], ["why", run], ["why", "--json", run]),
        *(
            ["verify", "--all", run],
            ["verify", "--json", run],
            ["restore", f"{run}@3"],
            ["verify", run],
            ["digest", last],
            ["diff", first, last],
            ["prune", "--dry-run", run],
        ),
        *(["goodput", run], ["goodput", "--json", "outputs"]),
    ]
    writing = [
        *(["report", run], ["report", "outputs", "--to", "page.html"]),
        *(["pin", f"{run}@best"], ["pin", first], ["unpin", first]),
        ["export", run, "exported/weights", *(["--to", "npz"] if is_rare else [])],
    ]
    slow = [["goodput", run, "--to", "time.png"], ["eval", first]] if is_rare else []
    start = ["start", f"dir={run}", "train.steps=14"]
    return [*reading, *writing, *slow, ["prune", run], start, start, ["ls", run], ["goodput", run]]


def find_fault(words: Sequence[str], ending: Ending) -> str | None:
    """Return what is wrong with the end of a command; None where nothing is."""
    if ending.code is None:
        return f"a traceback: {ending.trace.strip()}"
    if ending.code not in EXIT_CODES.get(words[0], USUAL_CODES):
        return f"exit code {ending.code}: {ending.err.strip() or ending.out[-500:]}"
    if words[0] == "start" and ending.code == 1 and "gave" not in ending.err and "in a row" not in ending.err:
        return f"exit code 1: {ending.err[-1500:]}"
    if len(ending.err.splitlines()) > 3:
        return f"{len(ending.err.splitlines())} lines of complaint: {ending.err[-1500:]}"
    if ending.code in (2, 3, 5) and len(ending.err) > 2000:
        return f"a complaint of {len(ending.err)} characters: {ending.err[:500]}"
    if found := CONTROL.search(ending.err + ending.out):
        return f"a control character {found[0]!r} was printed: {ending.out[-300:]} {ending.err[-300:]}"
    if SECRET in ending.out + ending.err:
        return "what lies outside was shown"
    if ending.seconds > MOST_SECONDS and words[0] not in ("eval", "goodput", "start", "export"):
        return f"took {ending.seconds:.1f} s of the processor"
    return None


def find_leak(folder: Path) -> str | None:
    """Return the page or the export that shows what lies outside; None where none does."""
    for path in (folder / "page.html", *folder.glob("outputs/*/*/report.html"), *folder.glob("exported/**/*")):
        if path.is_file() and not path.is_symlink() and SECRET in path.read_bytes().decode(errors="replace"):
            return str(path)
    return None


# --- all of it ---


def main(argv: Sequence[str] | None = None) -> int:
    """Give 0 where every command kept the contract, 1 where one did not."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tests.laws.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("mutations", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutation, once more and with all it says")
    parser.add_argument("--links", type=int, help="so many of the planted links, pipes and folders; else each of them")
    parser.add_argument("--no-starts", action="store_true", help="do not start the real run.py for some of them")
    asked = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)
    before, began = Path.cwd(), time.monotonic()
    with tempfile.TemporaryDirectory() as room, forks() as door:
        trial = Trial(Path(room) / "work", make_templates(Path(room) / "templates", door), loud=asked.only is not None)
        trial.door = None if asked.no_starts else door
        trial.folder.mkdir()
        os.chdir(trial.folder)
        try:
            if asked.only is not None:
                trial.suffer(asked.only, asked.seed)
            else:
                try_links(trial, asked.links, asked.seed)
                try_mutations(trial, asked.mutations, asked.seed)
        finally:
            os.chdir(before)
    _report(trial, time.monotonic() - began)
    return 1 if trial.failures else 0


def try_links(trial: Trial, count: int | None, seed: int) -> None:
    """Plant so many of all that can be planted, each in one run; None: all of it, in every run."""
    planted = [(place, kind) for kind in STRUCTURES for place in PLANTED]
    rng = random.Random(seed)
    for place, kind in planted if count is None else rng.sample(planted, min(count, len(planted))):
        for template in trial.templates if count is None else [rng.choice(trial.templates)]:
            trial.suffer_link(place, kind, template)


def try_mutations(trial: Trial, count: int, seed: int) -> None:
    """Have the trial suffer the first mutations of a seed, in memory that does not grow."""
    memory = _most_memory()
    for number in range(count):
        trial.suffer(number, seed)
        if _most_memory() > memory + MOST_MEMORY:
            trial.note(f"{seed}/{number}: memory grew by {(_most_memory() - memory) >> 20} MiB")
            memory = _most_memory()


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report(trial: Trial, seconds: float) -> None:
    commands = sum(trial.counts.values())
    endings: dict[str, list[str]] = {}
    for (verb, code), count in sorted((key.split(" "), count) for key, count in trial.counts.items()):
        endings.setdefault(verb, []).append(f"{count} × {code}")
    for verb, codes in endings.items():
        print(f"  {verb:<8} exit codes: {', '.join(codes)}")
    print(f"{commands} commands in {seconds:.0f} s: {len(trial.failures)} failures")


if __name__ == "__main__":
    sys.exit(main())
