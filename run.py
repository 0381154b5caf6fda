"""The door: Hydra composes, `load` validates, `run` trains, and the outcome becomes an exit code.

    python run.py                                        # the default experiment
    python run.py ckpt=combined remat=attention_only     # choose by name; type it again to resume
    python run.py hydra/launcher=slurm …                 # the same as a Slurm job; with -m as a job array
    python run.py --help                                 # what there is to choose

Neither jax nor flax is imported before the configuration is valid.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from runner.config.schema import Config
from runner.errors import ConfigError
from runner.launch.command_line import Command
from runner.launch.compose import compose
from runner.launch.local import Local
from runner.launch.slurm_job import Slurm
from runner.launch.study import Study
from runner.launch.submitit import Submitit
from runner.session.attempt import collect_garbage_seldom


def start(config: Config, command: Command) -> tuple[int, float | None]:
    """Work on one run. Gives the exit code and the score (less or more is better, as `score.mode` says)."""
    collect_garbage_seldom()  # importing and tracing make none worth looking for, until training begins
    from runner.session import experiment

    if command.slurm is not None:
        return submit(config, command, command.slurm), None
    outcome = experiment.run(config, command.overrides, command.began)
    return outcome.exit_code, outcome.score


def sweep(
    runs: Sequence[tuple[Config, Command]], option: Local | Slurm | Submitit, study: Study | None
) -> tuple[int, list[float | None]]:
    """Work on every run of a sweep, each in a process or job of its own. Gives the exit code, and the scores."""
    from runner.launch import sweep as launch_sweep

    if isinstance(option, Submitit):
        return launch_sweep.hand_on(runs, option)
    return launch_sweep.submit(runs, option) if isinstance(option, Slurm) else launch_sweep.run(runs, option, study)


def submit(config: Config, command: Command, options: Slurm) -> int:
    """Leave the run to a Slurm job, unless it is finished."""
    from runner.launch import slurm_job
    from runner.session import experiment

    if config.resume == "never":
        raise ConfigError("resume=never: a requeued job goes on with its run; leave it out with hydra/launcher=slurm")
    if config.train.steps == 0:
        raise ConfigError("train.steps=0: evaluates here and now; leave hydra/launcher=slurm out")
    place, _, done = experiment.standing(config, command.overrides)
    if done is None:
        slurm_job.submit(place, command.words, options)
    return 0


if __name__ == "__main__":
    try:
        code = compose(sys.argv[1:], start, sweep)
    except KeyboardInterrupt:  # before there was anything to save; later the run listens for it
        sys.exit(130)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(code)  # all is saved and closed; a thread that still compiles must not meet an interpreter that ends
