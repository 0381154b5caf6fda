"""What the machine cannot do now is no reason to give anything up: trouble at every call by which a restart reads.

A run that was killed is resumed, and the n-th call that opens, reads, lists or looks below its directory gets an error,
once or from then on: a disk that does not answer, too many open files, no memory, no permission. Whatever the process
does then, every checkpoint stays where it is, the log is kept up to the newest, and the same command goes on later.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.laws.crash_states import Tree, read_tree
from tests.laws.endings import Ending, find_run, find_wrong_end, read_ending
from tests.laws.faults import TINY, Event, Forks, Trouble, Window, compiled, events_in, forks, missing

COMMAND = (*TINY, "retention.last.n=2")
KILLED_AT, NEWEST = 7, 6  # it holds 3 or more, 4 and 6, and its log is ahead of the newest by a step
RESTART = Window(until="/.writing/")  # until the first save
# What each sort of call can meet. A wait that a signal ends (EINTR) is over at the next try.
ANY = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES, errno.EMFILE, errno.ENFILE)
ERRORS = {
    "open": (*ANY, errno.EINTR),
    "list": ANY,
    "read": (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EINTR),
    "look": (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES),
    "map": (errno.ENOMEM, errno.EACCES, errno.EIO),
}
ALLOWED = frozenset({0, 1, 5})


@dataclass(frozen=True)
class Case:
    """What is to go wrong: the error, and at which call; or code that is run before anything else.

    Attributes:
        name: what it is called.
        at: the number of the call.
        trouble: the error; None where code is what makes trouble.
        planted: the code.
        allowed: how the process may end.
        may_trace: a traceback may be printed: memory can be short at any line of Python, also of others.
    """

    name: str
    at: int = 0
    trouble: Trouble | None = None
    planted: str = ""
    allowed: frozenset[int] = ALLOWED
    may_trace: bool = False


@dataclass(frozen=True)
class Laboratory:
    """Where runs meet trouble: forks with the shim, a run that was killed, and how an undisturbed one ends.

    `window` is what trouble is limited to: a restart until its first save, or all of it.
    """

    forks: Forks
    room: Path
    killed: Path
    ending: Ending
    window: Window

    def list_calls(self) -> list[Event]:
        """Return the calls by which a restart reads, in their order; threads make that differ a little each time."""
        cwd = self._copy("listed")
        log = cwd.with_suffix(".calls")
        window = self.window.environment(cwd / "outputs", log, 0)
        assert self.forks.run(cwd, *COMMAND, FAULT_READS="1", **window).returncode == 0
        return events_in(log)

    def _copy(self, name: str) -> Path:
        cwd = self.room / name
        shutil.copytree(self.killed, cwd, symlinks=True)
        return cwd

    def try_case(self, case: Case) -> str | None:
        """Let a restart meet trouble, then type the command again; return what is wrong, None where nothing is."""
        cwd = self._copy(re.sub(r"[^\w-]", "_", case.name))
        run, before, log = find_run(cwd), read_tree(cwd), cwd.with_suffix(".calls")
        environment = {}
        if case.trouble is not None:
            environment = case.trouble.environment() | self.window.environment(cwd / "outputs", log, case.at)
        done = self.forks.run(cwd, *COMMAND, planted=case.planted, **environment)
        # Another number than was planned may mean another file: threads are not in order.
        met = "".join(f", met at `{call.kind} {call.path.removeprefix(str(run))}`" for call in events_in(log))
        problem = _find_bad_answer(done.returncode, done.stdout, case) or _find_loss(before, read_tree(cwd), cwd)
        again = self.forks.run(cwd, *COMMAND)
        if problem is None and again.returncode != 0:
            problem = f"afterwards: exit {again.returncode}: {again.stdout.strip().splitlines()[-1]}"
        problem = problem or find_wrong_end(run, self.ending)
        if problem is not None:
            return f"{case.name}{met}: {problem}".replace(str(run), "RUN").replace(str(run.relative_to(cwd)), "RUN")
        shutil.rmtree(cwd)
        return None


def _find_bad_answer(code: int, said: str, case: Case) -> str | None:
    last_words = said.strip().splitlines()[-1:] or [""]
    if code not in case.allowed:
        return f"exit {code}: {last_words[0]}"
    if "Traceback" in said:
        return None if case.may_trace else f"exit {code} with a traceback: {last_words[0]}"
    # A process that is ended from within C++ has no word of ours.
    is_silent = code in ALLOWED and code != 0 and "error: " not in said
    return f"exit {code} without a word: {last_words[0]}" if is_silent else None


def _find_loss(before: Tree, after: Tree, cwd: Path) -> str | None:
    """Return what is no longer there of what was; checkpoints go only where newer ones have come."""
    run = str(find_run(cwd).relative_to(cwd))
    if aside := [name for name in after if name.startswith(f"{run}/quarantine/")]:
        return f"{aside[0]}: a good checkpoint was set aside"
    steps = [name.removeprefix(f"{run}/checkpoints/") for name in after if name.startswith(f"{run}/checkpoints/")]
    if not any(step.isdecimal() and int(step) > NEWEST for step in steps):
        sealed = [name for name in before if name.startswith(f"{run}/checkpoints/") and before[name] is not None]
        if gone := [name for name in sealed if after.get(name) != before[name]]:
            return f"{gone[0]} is gone, and nothing newer has come"
    log = f"{run}/logs/metrics.jsonl"
    lines, left = before[log], after.get(log)
    assert isinstance(lines, bytes)
    kept = b"".join(line for line in lines.splitlines(keepends=True) if json.loads(line)["step"] <= NEWEST)
    if not isinstance(left, bytes) or not left.startswith(kept):
        return "metrics.jsonl was cut behind the newest checkpoint"
    return None


def iter_cases(calls: Sequence[Event], seed: int) -> Iterator[Case]:
    """Yield trouble at calls of every sort and on every file, one of each before the second of any; without end."""
    rng = random.Random(seed)
    sorts: dict[tuple[str, str], list[int]] = {}
    for call in calls:
        sorts.setdefault((call.kind, Path(call.path).name), []).append(call.number)
    shuffled = [(kind, numbers) for (kind, _), numbers in sorts.items()]
    rng.shuffle(shuffled)
    while True:
        for kind, numbers in shuffled:
            error = rng.choice(ERRORS[kind])
            lasts = error != errno.EINTR and rng.random() < 0.5
            at = rng.choice(numbers)
            yield Case(f"{errno.errorcode[error]} {'from' if lasts else 'at'} call {at}", at, Trouble(error, lasts))


OUT_OF_DEVICE_MEMORY = """
import runner.checkpoint.store as store
from jax.errors import JaxRuntimeError
put = store._put_array
calls = []
def full(*words):
    # A restore puts its arrays there with this, and nothing else does.
    calls.append(1)
    if {when}:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
    return put(*words)
store._put_array = full
"""
LIMIT = """
import resource
taken = {taken}
resource.setrlimit(resource.{name}, (taken + {more}, resource.getrlimit(resource.{name})[1]))
"""
PAGES_TAKEN = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
# Out of memory C++ ends a process by itself, and the loader with 127; then there is nobody to say a word.
ABORTS = ALLOWED | {-signal.SIGABRT, -signal.SIGSEGV, 127}


def list_machine_cases() -> list[Case]:
    """Return trouble that is not of one call: a full device, and limits of the system that are too small."""
    cases = [
        Case("device-full", planted=OUT_OF_DEVICE_MEMORY.format(when="True"), allowed=frozenset({1, 5})),
        Case("device-full-once", planted=OUT_OF_DEVICE_MEMORY.format(when="len(calls) == 1")),
    ]
    for more in (4, 8, 16, 24, 32, 48):
        limit = LIMIT.format(name="RLIMIT_NOFILE", taken="len(__import__('os').listdir('/proc/self/fd'))", more=more)
        cases.append(Case(f"files-{more}", planted=limit))
    for more in (20, 60, 120, 250, 500, 1000):
        limit = LIMIT.format(name="RLIMIT_AS", taken=PAGES_TAKEN, more=more << 20)
        cases.append(Case(f"memory-{more}-MiB", planted=limit, allowed=ABORTS, may_trace=True))
    return cases


@contextmanager
def laboratory(room: Path, window: Window) -> Iterator[Laboratory]:
    """A run that was killed, and the way an undisturbed one ends."""
    with forks(compiled(room)) as served:
        whole, killed = room / "whole", room / "killed"
        whole.mkdir()
        killed.mkdir()
        assert served.run(whole, *COMMAND).returncode == 0
        assert served.run(killed, *COMMAND, kill_at=KILLED_AT).returncode == -signal.SIGKILL
        yield Laboratory(served, room, killed, read_ending(find_run(whole)), window)


def main(arguments: Sequence[str]) -> int:
    """Try trouble at every sort of call, and say what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws.faults", description=__doc__)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--whole", action="store_true", help="not only while it restarts: while it trains and saves, too"
    )
    options = parser.parse_args(arguments)
    if reason := missing():
        print(reason)
        return 1
    room = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(room / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ["JAX_PLATFORMS"] = "cpu"
    wrong: list[str] = []
    with laboratory(room, Window() if options.whole else RESTART) as lab:
        calls = lab.list_calls()
        print(f"a restart reads by {len(calls)} calls: {dict(Counter(call.kind for call in calls))}", flush=True)
        cases = [*list_machine_cases(), *itertools.islice(iter_cases(calls, options.seed), options.cases)]
        for case in cases:
            if problem := lab.try_case(case):
                wrong.append(problem)
                print(f"  {problem}", flush=True)
    print(f"{len(cases)} cases of trouble, {len(wrong)} wrong" + (f"; they lie in {room}" if wrong else ""))
    if not wrong:
        shutil.rmtree(room)
    return 1 if wrong else 0
