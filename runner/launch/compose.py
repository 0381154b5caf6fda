"""Turn a command line into a validated request: Hydra merges the choices of conf/, `config.load` judges the result.

Hydra is asked to compose and to sweep, nothing else: it keeps no directory and configures no logging. A plain
`key=value` is handed on as `++key=value`, so that Hydra merges without judging and `config.load` alone decides which
keys exist; its message knows the whole schema.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.config import user_code
from runner.config.schema import Config, merge_typed_keys, read_document, validate_config, validate_options
from runner.errors import ConfigError, HoldfastError, RefusedError
from runner.installation import find_product_conf
from runner.launch.command_line import Command, RunRequest, SearchRequest, SweepRequest, WorkOnBatch
from runner.launch.hydra_errors import in_one_line
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.submitit_sweep import SUBMITIT_LAUNCHERS, SubmititOptions
from runner.launch.sweep_members import find_distinguishing_overrides
from runner.rundir.layout import RunDir
from runner.rundir.provenance import process_start_time
from runner.text import display_path

if TYPE_CHECKING:
    from runner.launch.hydra_plugin import SweepJobs

MULTIRUN = ("-m", "--multirun")
# Of these flags of Hydra's a command has one at most.
EXCLUSIVE = ("--run", "-r", *MULTIRUN, "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
# These say which configuration is meant, and take a value.
WHICH_CONFIG = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
OTHER_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--package", "-p", "--experimental-rerun")
FLAGS = (*EXCLUSIVE, *WHICH_CONFIG, *OTHER_FLAGS, user_code.TRUST_FLAG)


@contextmanager
def _name_replaced_config() -> Iterator[None]:
    """Say with a ConfigError that the working directory has a config.yaml in place of the product's, where it has."""
    try:
        yield
    except ConfigError as error:
        first, *others = config_folders()
        # The folder of another program, which uses Hydra as well, is likelier than a person who has meant it.
        if others and (first / "config.yaml").is_file():
            replaced = display_path(first / "config.yaml")
            raise ConfigError(f"{error} ({replaced} is used in place of the product's own)") from None
        raise


@_name_replaced_config()
def compose(argv: Sequence[str]) -> RunRequest | SweepRequest | SearchRequest | None:
    """Compose and validate what `argv` asks for; return None where Hydra has answered it (`--cfg`, `--info`).

    Nothing is written and no jax is imported.

    Raises:
        ConfigError: the command or its configuration is wrong.
        RefusedError: `dir=` names no run, or one that brings code and is not trusted.
        SystemExit: Hydra has printed its help.
    """
    if len(asked := [word for word in argv if word in EXCLUSIVE]) > 1:
        raise ConfigError(f"{' and '.join(asked)} are not for one command; leave out all but one")
    composed = _Composed()
    if set(MULTIRUN) & set(argv):
        # Imported for sweeps alone: it lets Hydra load its plugins, which takes a fifth of a second.
        from runner.launch import hydra_plugin

        hydra_plugin.register_plugins(composed.keep_sweep, composed.keep_search)
    elif "hydra/sweeper=optuna" in argv:
        raise ConfigError("hydra/sweeper=optuna: a search is many runs; add -m, or leave it out")
    with _plain_errors():
        _run_hydra(argv, composed)
    if composed.run is not None:
        return _validate_run(composed.run, argv)
    if composed.sweep is not None:
        return _validate_sweep(composed.sweep, argv)
    if composed.search is not None:
        return SearchRequest(partial(_search, composed.search, argv))
    return None


def compose_run(argv: Sequence[str]) -> RunRequest:
    """Compose and validate one configuration, for a verb that looks at it. Raises as `compose` does."""
    request = compose(argv)
    if not isinstance(request, RunRequest):
        raise ConfigError("this looks at one configuration: leave out what makes several, or only prints one")
    return request


def config_folders() -> list[Path]:
    """List the folders that choices are looked for in: `conf` of the working directory first, then the product's own.

    Raises ConfigError where there is something called `conf` in the working directory that is no readable folder.
    """
    ours, own = find_product_conf(), Path.cwd() / "conf"
    # A broken link counts as well: whoever made it expects his choices to be found.
    if not os.path.lexists(own):
        return [ours]
    try:
        next(own.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"{own}: {error.strerror}; `conf` of the working directory is where choices of your own are looked for: "
            "make it a readable folder, or type the command elsewhere"
        ) from None
    return [ours] if own.samefile(ours) else [own, ours]


class _OwnConf(SearchPathPlugin):
    """Have Hydra look into `conf` of the working directory before the product's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in config_folders()[:-1]:
            search_path.prepend("working directory", str(folder))


@dataclass
class _Composed:
    """What Hydra composed, caught when it calls us, before anything of it is judged."""

    run: tuple[DictConfig, DictConfig] | None = None  # the configuration, and Hydra's own
    sweep: SweepJobs | None = None
    search: Callable[[], None] | None = None  # not begun

    def keep_run(self, config: DictConfig) -> None:
        self.run = config, copy.deepcopy(HydraConfig.instance().cfg)  # type: ignore[assignment]

    def keep_sweep(self, jobs: SweepJobs) -> list[None]:
        self.sweep = jobs
        return [None] * len(jobs.jobs)

    def keep_search(self, search: Callable[[], None]) -> None:
        self.search = search


def _run_hydra(argv: Sequence[str], composed: _Composed) -> None:
    """Let Hydra parse and compose; it hands what it made to `composed`."""
    Plugins.instance().register(_OwnConf)
    words = [_forced(word) for argument in argv for word in _spelled_out(argument) if word != user_code.TRUST_FLAG]
    typed = sys.argv[1:]
    # argparse wants -m before what is positional.
    sys.argv[1:] = sorted(words, key=lambda word: word not in MULTIRUN)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to us instead of printed
    # Hydra 1.3 warns where version_base is missing, 1.4 where it is there; nothing a user could do about either.
    warnings.filterwarnings("ignore", message="The version_base parameter is deprecated")
    try:
        decorate = hydra.main(config_path=str(config_folders()[-1]), config_name="config", version_base="1.3")
        decorate(composed.keep_run)()
    finally:
        sys.argv[1:] = typed
        os.environ.pop("HYDRA_FULL_ERROR", None)  # processes that we start are told nothing of it


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what is wrong with a command or with a file of conf/ into ConfigError, of one line."""
    try:
        yield
    except HydraException as error:
        raise ConfigError(in_one_line(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{display_path(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem}; it cannot be read as YAML") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"a file of conf/ is not written in UTF-8: {error}") from None
    except PermissionError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


@contextmanager
def _hydra_config(chosen: DictConfig) -> Iterator[None]:
    """Let `${hydra:…}` in a configuration stand for this while it is resolved."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def _validate_run(composed: tuple[DictConfig, DictConfig], argv: Sequence[str]) -> RunRequest:
    config, chosen = composed
    with _hydra_config(chosen):
        validated, overrides = _validate(config, argv)
        words = (*_without_launcher(argv), *_stay_here(argv, chosen.hydra))
        return RunRequest(validated, Command(overrides, process_start_time(), words), _slurm_option(chosen.hydra))


def _validate_sweep(sweep: SweepJobs, argv: Sequence[str]) -> SweepRequest:
    """Validate every job. Raises ConfigError, naming the run, where one is wrong: then none is started."""
    chosen = sweep.jobs[0][0].hydra
    launcher = _launcher_option(chosen, sweep)
    flags = (*_which_config(argv), *_stay_here(argv, chosen))
    trust = [user_code.TRUST_FLAG] if user_code.TRUST_FLAG in argv else []
    runs = []
    for (composed, words), own in zip(
        sweep.jobs, find_distinguishing_overrides([words for _, words in sweep.jobs]), strict=True
    ):
        with _hydra_config(composed):
            try:
                config, overrides = _validate(_without_hydra(composed), argv)
            except HoldfastError as error:
                raise type(error)(f"{error} (in the run {' '.join(own)})" if own else str(error)) from None
        runs.append(RunRequest(config, Command(overrides, process_start_time(), (*flags, *words, *trust))))
    return SweepRequest(tuple(runs), launcher)


def _search(search: Callable[[], None], argv: Sequence[str], work_on_batch: WorkOnBatch) -> None:
    """Let a sweeper search; each batch of jobs that it asks for is validated and worked on."""
    from runner.launch import hydra_plugin

    def launch(jobs: SweepJobs) -> Sequence[float | None]:
        assert jobs.study is not None, "only a search is called back"
        return work_on_batch(_validate_sweep(jobs, argv), jobs.study)

    hydra_plugin.hand_jobs_to(launch)
    with _plain_errors():
        search()


def _validate(composed: DictConfig, argv: Sequence[str]) -> tuple[Config, tuple[str, ...]]:
    """Return the configuration and the overrides that made it."""
    trusted = user_code.TRUST_FLAG in argv
    task = list(HydraConfig.get().overrides.task)
    overrides = (*(override.removeprefix("++") for override in task), *([user_code.TRUST_FLAG] if trusted else []))
    config = validate_config(_document_of(composed, task, trusted=trusted))
    user_code.check_targets_exist(config.document)
    return config, overrides


def _document_of(composed: DictConfig, task: list[str], *, trusted: bool) -> Any:
    """Return what was composed; with dir=, that run's own document under what was typed.

    Raises RefusedError where there is no run, or where it names code of its own and was not trusted.
    """
    if "experiment" in composed:
        raise ConfigError(
            f"experiment={HydraConfig.get().runtime.choices.get('experiment')}: its file sets a group of that name; "
            "begin it with the line `# @package _global_`, and what it sets counts for all groups"
        )
    if composed.get("dir") is None:
        return composed
    saved = RunDir(Path(str(composed.dir))).config
    if not saved.exists():
        raise RefusedError(f"dir={composed.dir}: holds no run; leave dir out to start one, or check the path")
    keys = [override.key_or_group.replace("/", ".") for override in OverridesParser.create().parse_overrides(task)]
    if "experiment" in keys:
        return composed
    # A compile cache holds programs that are run without being read: the run's own document may not name one.
    document = merge_typed_keys(read_document(saved), composed, [*keys, "compile_cache"])
    if not trusted:
        typed = OmegaConf.to_container(composed)
        user_code.require_trust(saved.parent, document, typed, f"add {user_code.TRUST_FLAG}")  # type: ignore[arg-type]
    return document


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
    option: Any = OmegaConf.to_container(launcher)
    try:
        return validate_options(schema, {key: value for key, value in option.items() if key != "_target_"})
    except ConfigError as error:
        raise ConfigError(f"hydra.launcher.{error}") from None


def _without_hydra(composed: DictConfig) -> DictConfig:
    plain = copy.copy(composed)
    with open_dict(plain):
        del plain["hydra"]
    return plain


def _without_launcher(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the words that start the same run here."""
    return tuple(word for word in argv if not word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher.")))


def _stay_here(argv: Sequence[str], chosen: DictConfig) -> tuple[str, ...]:
    """Return what keeps a run where it is started when a YAML chooses its launcher: a job would submit it again."""
    typed = any(word.lstrip("+~").startswith("hydra/launcher=") for word in argv)
    return () if typed or chosen.runtime.choices.get("hydra/launcher") == "local" else ("hydra/launcher=local",)


def _which_config(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the flags that say which configuration is meant, each with its value: every run of a sweep needs them."""
    flags: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word in WHICH_CONFIG:
            flags += [word, following]
        elif word.split("=")[0] in WHICH_CONFIG:
            flags.append(word)
    return tuple(flags)


def _spelled_out(argument: str) -> tuple[str, ...]:
    """Spell `model=my_file:MyModel` out as `model=external model.target=my_file:MyModel`."""
    group, _, value = argument.partition("=")
    if re.fullmatch(r"[\w.]+:[\w.]+", value) and (config_folders()[-1] / group / "external.yaml").is_file():
        return f"{group}=external", f"{group}.target={value}"
    return (argument,)


def _forced(argument: str) -> str:
    """Write `key=value` as `++key=value`, unless the key is a group of choices. Refuses an unknown flag."""
    if argument.startswith("-") and "=" not in argument:
        if argument not in FLAGS:
            raise ConfigError(f"{argument}: unknown flag; overrides read key=value; --help shows what there is")
        return argument
    key, equals, value = argument.partition("=")
    if key == "init_from":
        return f"++init_from.run={value}"
    if not equals or key[:1] in "+~-" or key.startswith("hydra") or "@" in key:
        return argument
    if any((folder / key).is_dir() for folder in config_folders()):
        return argument
    return f"++{argument}"
