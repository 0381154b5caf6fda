"""The door: Hydra composes, `load` validates, `run` trains, and the outcome becomes an exit code.

    python run.py                                        # the default experiment
    python run.py ckpt=combined remat=attention_only     # choose by name; type it again to resume
    python run.py --help                                 # what there is to choose

Neither jax nor flax is imported before the configuration is valid.
"""

import os
import sys
import threading

from runner.compose import Command, compose
from runner.config import Config


def start(config: Config, command: Command) -> tuple[int, float | None]:
    """Work on one run. Gives the exit code and the score (less or more is better, as `score.mode` says)."""
    from runner.experiment import run

    outcome = run(config, command.overrides)
    return outcome.exit_code, outcome.score


def leave(code: int) -> None:
    """End the process. All is closed and on disk; but a save that failed can leave threads of Orbax behind, which
    would keep a finished process waiting for twenty minutes (seen on 0.12.8)."""
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        leave(compose(sys.argv[1:], start))
    except KeyboardInterrupt:  # before there was anything to save; later the run listens for it
        leave(130)
