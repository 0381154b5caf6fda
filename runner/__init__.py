"""Holdfast's rooms, from the way in to the ground. A room imports only rooms below it (`lint-imports`).

    __main__.py   the verbs: `python -m runner VERB …`; and the command `holdfast`
    drill/        a run untouched, and again while it is killed: every bit compared
    report/       one page of HTML about runs
    inspect/      the verbs that look at runs, one file each; `runner.load`
    launch/       a command line becomes requests (Hydra lives here); sweeps, searches, Slurm, supervision
    session/      one run in this process: find, lock, inspect, work, record how it ended
    remat/        which policy to recompute with, and what each costs
    train/        the step, the loop around it, and what they are built from
    config/       the document of a run: schema, identity, a user's own code
    preempt/      who may ask for a stop, and the one flag that they raise
    rundir/       the directory of a run: names, lock, status, attempts, heartbeat
    checkpoint/   when to save, which to keep, the bytes, the proof; what to restore
    log/          where metrics go
    optim/        optimizers, schedules, parameter groups
    trace/        what a jaxpr stores and costs
    mesh.py       where an array lies
    hosts.py      what the processes of a run decide together
    text.py files.py plots.py     sizes, durations and tables for people; atomic files; the style of pictures
    screen.py     stdout and stderr, which are never part of a run
    values.py types.py errors.py  the ground: values that rooms hand on, names of pytrees, exit codes
    recipes/      files that make a scheduler run the command again

`step` is the number of completed updates, everywhere. docs/architecture.md says why it is so.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.inspect.load_model import load_model

    load = load_model


def __getattr__(name: str) -> Any:
    """Import `runner.load` when it is asked for: importing this package alone imports nothing."""
    if name == "load":
        from runner.inspect.load_model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
