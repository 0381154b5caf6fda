"""The way in: compose → run → exit code. `python run.py …` and `holdfast …` both come here.

Neither jax nor flax is imported before the configuration is valid.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from runner import hosts
from runner.errors import ConfigError, HoldfastError, StorageError
from runner.hosts.exit_code import tell_exit_code
from runner.hosts.options import LocalHosts
from runner.launch.command_line import RunRequest, SearchRequest, SweepRequest
from runner.launch.compose import compose
from runner.launch.handover import describe_checked, take_checked_run
from runner.launch.local_group import run_group
from runner.launch.parent_report import ParentReport, take_report
from runner.screen import decouple_screen, flush_screen, prepare_screen, print_error
from runner.text import mask_lines

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141


def main(argv: Sequence[str]) -> int:
    """Do what a command line asks for: one run, a sweep or a search. Return the exit code; say errors on stderr."""
    prepare_screen()
    report = take_report()
    try:
        try:
            request = compose(argv)
        except BrokenPipeError:
            # Whoever read what Hydra prints (`--help | head`) has seen enough.
            return EXIT_PIPE
        except OSError as error:
            # A file that cannot be read has a name, and is told with it.
            if error.filename is not None:
                raise
            return _refuse_answer(error)
        except SystemExit as answered:
            # Hydra has printed its help. Python's own way out would complain of a reader who has left by now.
            return answered.code if isinstance(answered.code, int) else 0
        if request is not None:
            # What Hydra printed was the answer; from here on there is work, of which the terminal is no part.
            decouple_screen()
        if isinstance(request, RunRequest) and request.job is None:
            chosen = request.config.hosts
            if isinstance(chosen, LocalHosts) and chosen.count > 1 and chosen.find_place(os.environ) is None:
                return run_group(chosen, request.command.words, report)
            # Imported when the command is known to be right: a wrong one is answered without it.
            from runner.session import experiment

            command, checked = request.command, take_checked_run(request.config)
            outcome = experiment.run(request.config, command.overrides, command.began, checked, report.tell_run)
            report.tell_outcome(outcome)
            return outcome.exit_code
        return _launch(request, report)
    except HoldfastError as error:
        report.tell_error(mask_lines(str(error)))
        # A message quotes what lies on a disk.
        print_error(mask_lines(f"error: {error}"))
        return error.exit_code
    except KeyboardInterrupt:
        # Before there was anything to save; later the run listens for it.
        return EXIT_INTERRUPTED


def exit_process(code: int) -> NoReturn:
    """End the process now: all is saved and closed, and a thread that still compiles must not meet a dying Python.

    The other processes of its run, which it leads, end before it and with the same code.
    """
    failed = flush_screen()
    # A run's screen is decoupled, and never fails: here somebody asked for help, or for a configuration.
    if failed is not None and not isinstance(failed, BrokenPipeError) and code == 0:
        code = _refuse_answer(failed)
    tell_exit_code(code)
    hosts.current_group().end_others(code)
    os._exit(code)


def _refuse_answer(error: OSError) -> int:
    """Say that what was asked for could not be printed; return the exit code."""
    print_error(f"error: stdout: {error.strerror}; what was asked for could not be printed")
    return StorageError.exit_code


def _launch(request: RunRequest | SweepRequest | SearchRequest | None, report: ParentReport) -> int:
    """Start what is more than one run in this process."""
    if isinstance(request, RunRequest):
        report.refuse_jobs("hydra/launcher=slurm")
        return _submit_job(request)
    if request is None:
        return 0
    from runner.launch.sweep import launch_search, launch_sweep

    return launch_search(request, report) if isinstance(request, SearchRequest) else launch_sweep(request, report)


def _submit_job(request: RunRequest) -> int:
    """Leave the run to a Slurm job, unless it is finished."""
    from runner.launch import slurm_job
    from runner.launch.sweep import refuse_one_of_several
    from runner.session import experiment

    config, job = request.config, request.job
    assert job is not None
    refuse_one_of_several(config, "hydra/launcher=slurm", "a job")
    job.check_hosts(config)
    if config.resume == "never":
        raise ConfigError("resume=never: a requeued job goes on with its run; leave it out with hydra/launcher=slurm")
    if config.train.steps == 0:
        raise ConfigError("train.steps=0: evaluates here and now; leave hydra/launcher=slurm out")
    run_dir = experiment.find_unfinished(config, request.command.overrides)
    if run_dir is not None:
        slurm_job.submit_job(run_dir, request.command.words, job, describe_checked(config, run_dir))
    return 0
