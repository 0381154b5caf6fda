"""Holdfast's rooms, from the way in to the ground. A room imports only rooms below it (`lint-imports`).

    __main__.py   the verbs: `python -m runner VERB …`; and the command `holdfast`
    drill/        a run untouched, and again while it is killed: every bit compared
    report/       one page of HTML about runs
    notebook/     `runner.run` and `runner.sweep`: the command, called from Python
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
    hosts/        the processes of a run: how they find each other, what they agree on, who has gone
    text.py files.py plots.py     sizes, durations and tables for people; atomic files; the style of pictures
    screen.py     stdout and stderr, which are never part of a run
    values.py types.py errors.py  the ground: values that rooms hand on, names of pytrees, exit codes
    recipes/      files that make a scheduler run the command again

`step` is the number of completed updates, everywhere. docs/architecture.md says why it is so.
"""

import os
import sys


def leave_working_directory() -> None:
    """Take the working directory off the path on which Python looks for modules, unless this package lies in it.

    `python -m` puts it first, and so does an empty part of PYTHONPATH: in the directory of somebody else's run, a file
    called `json.py` would be imported in place of Python's. A user's own code is found there all the same, when a
    target asks for it (runner/config/user_code.py).
    """
    try:
        here = os.path.realpath(os.getcwd())
    # It was deleted: nothing is found there.
    except OSError:
        return
    if here != os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]


def _is_own_program() -> bool:
    """Return whether this process was started as `python -m runner…`, `holdfast` or run.py; else it only imports us."""
    # A process that multiprocessing starts takes over the path of its parent, on which a user's code may be wanted, and
    # its words as well.
    if any(word.startswith("from multiprocessing.") for word in sys.orig_argv):
        return False
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":
        # Python is about to look for the module; its name is among the words that Python itself was given.
        return sys.orig_argv[-len(argv)].removeprefix("-m").split(".")[0] == __name__
    beside = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    programs = [os.path.join(beside, name) for name in ("run.py", "holdfast.py")]
    return os.path.basename(argv[0]) == "holdfast" or os.path.realpath(argv[0]) in programs


# Before anything else is imported: these two modules Python has at hand by itself.
if _is_own_program():
    leave_working_directory()

from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from runner.inspect.load_model import load_model
    from runner.notebook.from_python import run, sweep
    from runner.notebook.run_result import RunError, RunResult

    load = load_model

# What a notebook or a program imports: the name here, and where it is.
_EXPORTS = {
    "load": ("runner.inspect.load_model", "load_model"),
    "run": ("runner.notebook.from_python", "run"),
    "sweep": ("runner.notebook.from_python", "sweep"),
    "RunResult": ("runner.notebook.run_result", "RunResult"),
    "RunError": ("runner.notebook.run_result", "RunError"),
}
__all__ = ["RunError", "RunResult", "load", "run", "sweep"]


def __getattr__(name: str) -> Any:
    """Import `runner.load` and its like when they are asked for: importing this package alone imports nothing."""
    if name in _EXPORTS:
        import importlib

        from runner.installation import import_own_packages

        # It needs them, and the other names do not.
        if name == "load":
            import_own_packages()
        module, attribute = _EXPORTS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
