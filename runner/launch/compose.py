"""Turn a command line into a validated request: Hydra merges the choices of conf/, `config.load` judges the result.

Hydra is asked to compose and to sweep, nothing else: it keeps no directory and configures no logging. A plain
`key=value` is handed on as `++key=value`, so that Hydra merges without judging and `config.load` alone decides which
keys exist; its message knows the whole schema.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.config import user_code
from runner.config.program import settle_program
from runner.config.run_length import drop_untyped_length
from runner.config.schema import (
    Config,
    RemoteByKind,
    merge_typed_keys,
    read_document,
    to_plain,
    validate_config,
    validate_options,
)
from runner.config.trust import ALL_USES, KEYS_OF_THE_COMMAND, TRUST_FLAG, Use, require_trust
from runner.errors import ConfigError, HoldfastError, RefusedError
from runner.launch.command_line import Command, RunRequest, SearchRequest, SweepRequest, WorkOnBatch
from runner.launch.command_words import MULTIRUN, drop_launcher, list_config_flags, spell_for_hydra
from runner.launch.conf_folders import OwnConf, describe_unused_conf, list_conf_folders, name_replaced_config
from runner.launch.hydra_driver import drive_hydra
from runner.launch.hydra_errors import cut_errors, in_one_line, in_plain_words
from runner.launch.job_composer import parse_override
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.submitit_sweep import SUBMITIT_LAUNCHERS, SubmititOptions
from runner.launch.sweep_members import find_distinguishing_overrides
from runner.remote.contact import read_remote_config
from runner.rundir.layout import RunDir
from runner.rundir.provenance import process_start_time
from runner.screen import print_error
from runner.types import Document

if TYPE_CHECKING:
    from runner.launch.hydra_plugin import SweepJobs

# Of these flags one says that it is a single run, whatever a file of choices says.
SINGLE = {"--run", "-r"}
SEARCH_IS_SWEEP = "hydra/sweeper=optuna: a search is many runs; add -m, or leave it out"
# What the verbs that look at a configuration do with it: they neither log nor listen for a stop.
LOOKING: tuple[Use, ...] = ("code", "data")


@cut_errors()
@name_replaced_config()
def compose(argv: Sequence[str], uses: Sequence[Use] = ALL_USES) -> RunRequest | SweepRequest | SearchRequest | None:
    """Compose and validate what `argv` asks for; return None where Hydra has answered it (`--cfg`, `--info`).

    Nothing is written and no jax is imported. `uses` is what is to be done with it.

    Raises:
        ConfigError: the command or its configuration is wrong.
        RefusedError: `dir=` names no run, or one that brings code or names hosts and is not trusted.
        SystemExit: Hydra has printed its help.
    """
    # Hydra reads mappings and functions with asserts that also move on, so without them it reads something else.
    if sys.flags.optimize and (word := next((word for word in argv if set("{(") & set(word)), None)):
        raise ConfigError(f"{word}: cannot be read without asserts; leave out python -O, and unset PYTHONOPTIMIZE")
    words = spell_for_hydra(argv)
    if unused := describe_unused_conf():
        print_error(unused)
    composed = _drive(words, argv)
    # `hydra.mode: MULTIRUN` in a file of choices is what -m is on the command line.
    if composed.run is not None and _asks_for_sweep(composed.run[1].hydra) and not SINGLE & set(argv):
        composed = _drive([MULTIRUN[0], *words], argv)
    if composed.run is not None:
        return _validate_run(composed.run, argv, uses)
    if composed.sweep is not None:
        return _validate_sweep(composed.sweep, argv)
    if composed.search is not None:
        return SearchRequest(partial(_search, composed.search, argv))
    return None


def _drive(words: Sequence[str], argv: Sequence[str]) -> _Composed:
    """Return what Hydra composes of a command."""
    composed = _Composed()
    if set(MULTIRUN) & set(words):
        # Imported for sweeps alone: it lets Hydra load its plugins, which takes a fifth of a second.
        from runner.launch import hydra_plugin

        hydra_plugin.register_plugins(composed.keep_sweep, composed.keep_search)
    elif "hydra/sweeper=optuna" in argv:
        raise ConfigError(SEARCH_IS_SWEEP)
    with in_plain_words(words):
        drive_hydra(words, list_conf_folders()[-1], OwnConf, composed.keep_run)
    return composed


def _asks_for_sweep(chosen: DictConfig) -> bool:
    """Return whether a file of choices, and not the command line, makes several runs of a command."""
    return bool(chosen.mode == RunMode.MULTIRUN)


def compose_run(argv: Sequence[str]) -> RunRequest:
    """Compose and validate one configuration, for a verb that looks at it. Raises as `compose` does."""
    request = compose(argv, LOOKING)
    if not isinstance(request, RunRequest):
        raise ConfigError("this looks at one configuration: leave out what makes several, or only prints one")
    return request


@dataclass
class _Composed:
    """What Hydra composed, caught when it calls us, before anything of it is judged."""

    run: tuple[DictConfig, DictConfig] | None = None  # the configuration, and Hydra's own
    sweep: SweepJobs | None = None
    search: Callable[[], None] | None = None  # not begun

    def keep_run(self, config: DictConfig, chosen: DictConfig) -> None:
        self.run = config, chosen

    def keep_sweep(self, jobs: SweepJobs) -> list[None]:
        self.sweep = jobs
        return [None] * len(jobs.jobs)

    def keep_search(self, search: Callable[[], None]) -> None:
        self.search = search


@contextmanager
def _hydra_config(chosen: DictConfig) -> Iterator[None]:
    """Let `${hydra:…}` in a configuration stand for this while it is resolved."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _validate_run(composed: tuple[DictConfig, DictConfig], argv: Sequence[str], uses: Sequence[Use]) -> RunRequest:
    config, chosen = composed
    if chosen.hydra.runtime.choices.get("hydra/sweeper") != "basic" and not SINGLE & set(argv):
        raise ConfigError(SEARCH_IS_SWEEP)
    with _hydra_config(chosen):
        validated, overrides = _validate(config, argv, uses)
        words = (*drop_launcher(argv), *_stay_here(argv, chosen.hydra))
        return RunRequest(validated, Command(overrides, process_start_time(), words), _slurm_option(chosen.hydra))


def _validate_sweep(sweep: SweepJobs, argv: Sequence[str]) -> SweepRequest:
    """Validate every job. Raises ConfigError, naming the run, where one is wrong: then none is started."""
    chosen = sweep.jobs[0][0].hydra
    launcher = _launcher_option(chosen, sweep)
    flags = (*list_config_flags(argv), *_stay_here(argv, chosen))
    trust = [TRUST_FLAG] if TRUST_FLAG in argv else []
    runs = []
    for (composed, words), own in zip(
        sweep.jobs, find_distinguishing_overrides([words for _, words in sweep.jobs]), strict=True
    ):
        with _hydra_config(composed):
            try:
                config, overrides = _validate(_without_hydra(composed), argv, ALL_USES)
            except HoldfastError as error:
                raise type(error)(f"{error} (in the run {' '.join(own)})" if own else str(error)) from None
        single = _stay_single(argv, composed.hydra)
        runs.append(RunRequest(config, Command(overrides, process_start_time(), (*flags, *single, *words, *trust))))
    return SweepRequest(tuple(runs), launcher)


def _search(search: Callable[[], None], argv: Sequence[str], work_on_batch: WorkOnBatch) -> None:
    """Let a sweeper search; each batch of jobs that it asks for is validated and worked on."""
    from runner.launch import hydra_plugin

    def launch(jobs: SweepJobs) -> Sequence[float | None]:
        assert jobs.study is not None, "only a search is called back"
        return work_on_batch(_validate_sweep(jobs, argv), jobs.study)

    hydra_plugin.hand_jobs_to(launch)
    try:
        search()
    # Of Hydra's alone: what else is raised comes from the runs.
    except HydraException as error:
        raise ConfigError(in_one_line(error)) from None


def _validate(composed: DictConfig, argv: Sequence[str], uses: Sequence[Use]) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration and the overrides that made it."""
    trusted = TRUST_FLAG in argv
    # As they were typed: what `${…}` in one of them stands for is not for the run's files, and may be a secret.
    task: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[assignment]
    overrides = tuple(override.removeprefix("++") for override in task) + ((TRUST_FLAG,) if trusted else ())
    with in_plain_words(task):
        typed_dir, has_group = composed.get("dir"), "experiment" in composed
    if has_group:
        raise ConfigError(
            f"experiment={HydraConfig.get().runtime.choices.get('experiment')}: its file sets a group of that name; "
            "begin it with the line `# @package _global_`, and what it sets counts for all groups"
        )
    keys = [override.key_or_group.replace("/", ".") for override in map(parse_override, task)]
    # A choice of everything leaves nothing to the run's own document.
    if typed_dir is None or "experiment" in keys:
        # Without evaluations at all is not as if nobody had said anything.
        document = {"eval": {}, **to_plain(composed)}
        config = validate_config(settle_program(drop_untyped_length(document, keys), keys))
    else:
        config = _continue_run(Path(str(typed_dir)), composed, keys, () if trusted else uses)
    user_code.check_targets_exist(config.document, for_training="training" in uses and config.train.steps != 0)
    return config, overrides


def _continue_run(path: Path, composed: DictConfig, keys: Sequence[str], uses: Sequence[Use]) -> Config:
    """Return the configuration of a run that is there, with the keys that were typed as they are composed now.

    Raises RefusedError where there is no run, or where it reaches for something in one of these uses that the command
    does not come to by itself.
    """
    saved = RunDir(path).config
    # Not `Path.exists`, which raises where a name is too long.
    document = read_document(saved) if os.path.exists(saved) else _read_remote_document(path, composed)
    document = merge_typed_keys(document, composed, [*keys, *KEYS_OF_THE_COMMAND])
    config: Config = validate_options(Config, document)
    if config.train.steps == 0:
        uses = [use for use in uses if use != "training"]
    require_trust(saved.parent, config, to_plain(composed, throw=False), f"add {TRUST_FLAG}", uses)
    # Whether its data is there is asked after that: a path may be anywhere.
    return validate_config(document)


def _read_remote_document(path: Path, composed: DictConfig) -> Document:
    """Return the document of a run whose directory is not on this disk, from the bucket that the command names.

    Raises RefusedError where there is none.
    """
    remote: RemoteByKind = validate_options(RemoteByKind, to_plain(composed, throw=False).get("remote", {}))
    content = read_remote_config(remote, "/".join(Path(os.path.abspath(path)).parts[-2:]))
    if content is None:
        where = "" if remote.url is None else f" here or in {remote.url}"
        raise RefusedError(f"dir={path}: holds no run{where}; leave dir out to start one, or check the path")
    with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
        fetched = RunDir(Path(scratch)).config
        fetched.write_bytes(content)
        return read_document(fetched)


def _launcher_option(chosen: DictConfig, sweep: SweepJobs) -> LocalOptions | SlurmOptions | SubmititOptions:
    """Return how the runs of a sweep are to be worked on. Raises ConfigError where they cannot be so."""
    launcher, sweeper = (chosen.runtime.choices.get(f"hydra/{group}") for group in ("launcher", "sweeper"))
    if launcher != "local" and sweeper != "basic":
        raise ConfigError(
            f"hydra/sweeper={sweeper}: chooses the next runs by the scores of those before, on this machine; "
            "leave hydra/launcher out"
        )
    if launcher in SUBMITIT_LAUNCHERS:
        return SubmititOptions(launcher, chosen.launcher, sweep.run_on_workers)
    return _slurm_option(chosen) or _read_option(LocalOptions, chosen.launcher)


def _slurm_option(chosen: DictConfig) -> SlurmOptions | None:
    """Return what a job is to ask for, where `hydra/launcher=slurm` was chosen. Raises ConfigError for any but ours."""
    launcher = chosen.runtime.choices.get("hydra/launcher")
    if launcher in SUBMITIT_LAUNCHERS:
        raise ConfigError(f"hydra/launcher={launcher}: is for sweeps; add -m, or use hydra/launcher=slurm")
    if launcher not in ("local", "slurm"):
        raise ConfigError(
            f"hydra/launcher={launcher}: is not supported; leave it out (hydra.launcher.parallel=N: so many runs at "
            f"once), or use one of slurm, {', '.join(SUBMITIT_LAUNCHERS)}"
        )
    return _read_option(SlurmOptions, chosen.launcher) if launcher == "slurm" else None


def _read_option(schema: Any, launcher: DictConfig) -> Any:
    """Return the options of a launcher, checked."""
    option: Any = OmegaConf.to_container(launcher) if isinstance(launcher, DictConfig) else None
    if not isinstance(option, dict):
        raise ConfigError("hydra.launcher: expected a mapping")
    try:
        return validate_options(schema, {key: value for key, value in option.items() if key != "_target_"})
    except ConfigError as error:
        raise ConfigError(f"hydra.launcher.{error}") from None


def _without_hydra(composed: DictConfig) -> DictConfig:
    # Four times as fast as `OmegaConf.masked_copy`.
    rest: DictConfig = pickle.loads(pickle.dumps(composed))
    with open_dict(rest):
        del rest["hydra"]
    return rest


def _stay_single(argv: Sequence[str], chosen: DictConfig) -> tuple[str, ...]:
    """Return what keeps a run of a sweep a single one where a file of choices makes a sweep, or a search, of it."""
    typed = any(word.lstrip("+~").startswith("hydra/sweeper=") for word in argv)
    searches = chosen.runtime.choices.get("hydra/sweeper") != "basic" and not typed
    return ("--run",) if _asks_for_sweep(chosen) or searches else ()


def _stay_here(argv: Sequence[str], chosen: DictConfig) -> tuple[str, ...]:
    """Return what keeps a run where it is started when a YAML chooses its launcher: a job would submit it again."""
    typed = any(word.lstrip("+~").startswith("hydra/launcher=") for word in argv)
    return () if typed or chosen.runtime.choices.get("hydra/launcher") == "local" else ("hydra/launcher=local",)
