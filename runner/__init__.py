"""Holdfast's inside, in reading order.

    compose.py       a command line becomes a document: Hydra merges, its complaints become plain lines
    config.py        a document becomes a frozen, typed `Config`
    identity.py      which keys identify a run, and which may change when it goes on
    external.py      a user's own model, data and loss, found and checked · trust.py: whose code may run
    experiment.py    run(config) → Outcome: open → build → restore → train → finish
    rundir.py        the directory of a run: names, lock, atomic writes
    build.py         Config → Parts: the only file that knows every concrete class
    loop.py          the order of things in training, stated as a law
    step.py          the train state, and the pure functions that map it to its successor
    evaluate/        what is looked at while training, by name: numbers, texts, pictures; and again afterwards
    optim.py  schedule.py  roles.py     how parameters move, how fast, and what each of them is
    mesh.py          devices and shardings
    summary.py flops.py                 what a model costs, part by part, read from its trace: nothing is computed
    checkpoint/      strategy.py (WHEN) · retention.py (WHICH) · store.py arrays.py (BYTES) · digest.py (PROOF)
                     checkpointer.py puts them in order: strategy → store → prove → publish → prune
                     record.py: what is on disk · restore.py: what to go on from · transfer.py: weights of another run
    remat/           policy.py: what each name recomputes · seen.py: what a trace tells · needs.py: what a run tells
                     measure.py weigh.py: what one costs, and all of them, as facts (report.py) and a picture
                     target.py: on another device
    preempt/         one flag, raised by signals, a file, a clock or the machine; seen wherever a run may be
    sweep/           many runs: local.py, one process each, here; array.py, one Slurm job array; slurm.py, one job;
                     submitit.py, whatever that submits
    child.py         a process of ours, that is asked to stop when we die
    log/             jsonl, tensorboard, wandb, console: one small protocol, one fan-out
    dataset.py       the data of a run: read, written down, compared · waiting.py: whether training waits for it
    ledger.py        attempts, and where their seconds went
    garbage.py       how often Python looks for garbage
    errors.py        every way to end badly, with its exit code
    drill/           a run untouched and again while it is killed: where to kill, what differs, why, and the picture
    report/          runs as one page of HTML: facts.py differ.py frontier.py (WHAT) · page.py and template/ (HOW)
    tools/           what is done with runs afterwards, one file a verb: `python -m runner VERB`, `runner.load`
    recipes/         files that make a scheduler run the command again: `python -m runner recipe`

`step` is the number of completed updates, everywhere.
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
