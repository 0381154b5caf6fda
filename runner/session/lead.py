"""Lead the other processes of a run: tell them where it is, and end all of them where one has ended. No jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runner import files, hosts
from runner.checkpoint.record import newest_durable_step
from runner.config.identity import hash_config, replace_places
from runner.config.schema import Config
from runner.errors import (
    STOPPED,
    ConfigError,
    DivergedError,
    HoldfastError,
    LostProcessError,
    RefusedError,
    StorageError,
)
from runner.hosts.group import Lead, describe_lost
from runner.hosts.link import Link
from runner.preempt.deadline import end_process, read_sign_of
from runner.rundir.attempt_log import AttemptLog
from runner.session.base_files import describe_settled
from runner.train.run_context import RunContext
from runner.types import JsonObject

# They decide what is computed: processes that differ in one compute different things.
COMPARED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
ERRORS: Mapping[int, type[HoldfastError]] = {
    kind.exit_code: kind for kind in (ConfigError, RefusedError, StorageError, LostProcessError)
}


def describe_command(config: Config) -> JsonObject:
    """Return what every process of a run must have in common, as plain JSON: configuration and versions."""
    versions = {}
    for package in COMPARED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    # Its data may lie elsewhere on each machine; what it is, is compared later.
    return {"configuration": hash_config(replace_places(config.document, {})), **versions}


def lead_others(context: RunContext, record_refusal: Callable[[HoldfastError], None]) -> None:
    """Tell the other processes where the run is, and end it from now on where one of them ends.

    `record_refusal` writes down how the attempt ended by an error that is not this process's own. Raises HoldfastError
    where one has ended already.
    """
    group, attempt = hosts.current_group(), context.attempt
    assert isinstance(group, Lead)
    group.read_own_sign = lambda: read_sign_of(attempt.heartbeat.read())

    def on_failed(link: Link, code: int, line: str) -> None:
        what = f"{link.name}: {line}"

        def record() -> None:
            if code == STOPPED:
                # Its time was up before the others had come to a place to stop at.
                _record_lost(context, what)
                return
            context.console.say(f"error: {what}")
            if code == DivergedError.exit_code or code not in ERRORS:
                attempt.end("failed", attempt.step, what, newest_durable_step(context.run_dir.checkpoints))
            else:
                record_refusal(ERRORS[code](what))

        end_process(code, record)

    def on_lost(link: Link, how: str) -> None:
        end_process(STOPPED, lambda: _record_lost(context, describe_lost(link, how)))

    def on_early_end(error: HoldfastError) -> None:
        # Where nothing may be left of the run it waits until this process comes to where it looks for the others.
        if isinstance(error, ConfigError | RefusedError):
            return

        def record() -> None:
            context.console.say(f"error: {error}")
            record_refusal(error)

        end_process(error.exit_code, record)

    group.handlers.on_failed, group.handlers.on_lost = on_failed, on_lost
    group.handlers.on_early_end = on_early_end
    # Somebody may have ended before anybody listened.
    group.raise_if_lost()
    where = {"run": str(context.run_dir.path), "holder": read_holder(context.run_dir.lock)}
    hosts.agree("begin", {**where, "settled": describe_settled(context.config)})


def _record_lost(context: RunContext, what: str) -> None:
    """Write down that another process has gone, which says nothing about the run."""
    attempt = context.attempt
    durable = newest_durable_step(context.run_dir.checkpoints)
    lost = attempt.count_lost_steps(durable)
    stands = f"checkpoint {durable} stands" if durable else "nothing was saved yet"
    steps = f", {lost} steps are done again" if lost else ""
    context.console.say(f"error: {what}; {stands}{steps}; the same command goes on from there")
    record_lost_process(attempt)
    was_asked = context.stop_flag.asked is not None
    attempt.end("preempted" if was_asked else "failed", attempt.step, what, durable)


def record_lost_process(attempt: AttemptLog) -> None:
    """Note that the attempt ended because a process has gone."""
    attempt.record(lost_process=True)
    if "from_step" not in attempt.facts:
        # It has not trained: that says nothing about the run, and counts as no failure of it.
        attempt.record(machine_trouble=True)


def read_holder(lock: Path) -> str:
    """Return what the holder of a run has written into its lock: the same in every process that sees the same run."""
    return files.read_file(lock, limit=4096).decode(errors="replace")
