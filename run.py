"""The door: Hydra composes, `load` validates, `run` trains, and the outcome becomes an exit code.

    python run.py                                        # the default experiment
    python run.py ckpt=combined remat=attention_only     # choose by name; type it again to resume
    python run.py --help                                 # what there is to choose

Neither jax nor flax is imported before the configuration is valid.
"""

import os
import sys

from runner.compose import Command, compose
from runner.config import Config
from runner.errors import STOPPED


def start(config: Config, command: Command) -> tuple[int, float | None]:
    """Work on one run. Gives the exit code and the score (less or more is better, as `score.mode` says)."""
    from runner.experiment import run

    outcome = run(config, command.overrides, command.began)
    return outcome.exit_code, outcome.score


if __name__ == "__main__":
    try:
        code = compose(sys.argv[1:], start)
    except KeyboardInterrupt:  # before there was anything to save; later the run listens for it
        sys.exit(130)
    if code == STOPPED:  # everything is saved and closed; a compiler may still be at work in a thread of its own
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
