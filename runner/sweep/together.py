"""A sweep from beginning to end: which runs there are → all admitted → those that are left → what came of each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runner import experiment, rundir
from runner.compose import Command
from runner.config import Config
from runner.errors import ConfigError
from runner.rundir import Run, shown
from runner.sweep import local, members, summary, table
from runner.sweep.local import Local
from runner.sweep.members import Member
from runner.sweep.search import Study


def run(
    runs: Sequence[tuple[Config, Command]], option: Local, study: Study | None = None
) -> tuple[int, list[float | None]]:
    """Work on every run that is not finished. Gives the exit code, and the score of each run.

    With a `study` they are its next trials, and it keeps the books.

    Raises before anything is started: ConfigError where two are one run, RefusedError where one may not be worked on
    or the same sweep goes already.
    """
    named = members.distinct([command.words for _, command in runs])
    sweep = [
        Member(config, command.words, experiment.admitted(config, command.overrides), own)
        for (config, command), own in zip(runs, named, strict=True)
    ]
    if study is None:
        members.admit(sweep)
    if any(member.config.resume == "never" for member in sweep):
        raise ConfigError("resume=never: a sweep goes on with its runs when it is typed again; leave it out")
    command = [sys.executable, str(Path(sys.argv[0]).resolve())]
    if study is not None:
        return study.work(sweep, option, command)
    place = summary.folder(sweep)
    with rundir.locked(Run(place)):
        board = table.choose(sweep)
        try:
            results, code = local.run(sweep, option, command, place / "output", board)
        finally:
            board.close()
        summary.write(place, sweep, results)
    print("\n".join(table.drawn(sweep, results)))
    print(f"{shown(place / summary.SWEEP)}  {shown(place / summary.TABLE)}")
    print(f"one page about them: python -m runner report {shlex.quote(shown(place.parent.parent))}")
    return code, [member.status().get("score") if member.is_finished else None for member in sweep]
