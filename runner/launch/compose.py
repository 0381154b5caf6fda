"""A command line becomes a validated `Config`: Hydra merges the choices of conf/, its complaints become plain lines.

Hydra is asked to compose and to sweep, nothing else: it keeps no directory and configures no logging. A plain
`key=value` is handed on as `++key=value`, so that Hydra merges without judging and `config.load` alone decides which
keys exist; its message knows the whole schema.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.config import user_code
from runner.config.explain import suggest
from runner.config.schema import Config, checked, continued, load, read
from runner.errors import STOPPED, ConfigError, HoldfastError, RefusedError
from runner.launch.command_line import Command
from runner.launch.local import Local
from runner.launch.members import distinct
from runner.launch.slurm_job import Slurm
from runner.launch.submitit import INSTALL, NAMES, Carry, Submitit
from runner.rundir import layout
from runner.rundir.provenance import process_start_time

if TYPE_CHECKING:
    from runner.launch import hydra_plugin
    from runner.launch.study import Study

CONF = Path(__file__).resolve().parents[2] / "conf"
LAUNCHER = "hydra.launcher."
SWEEP = ("-m", "--multirun")
ONE_OF = (*("--run", "-r", *SWEEP), *("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"))
WHICH = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")  # of Hydra's, with a value
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--run", "-r", *SWEEP, "--cfg", "-c", "--resolve"),
    *("--package", "-p", "--info", "-i", *WHICH),
    *("--shell-completion", "-sc", "--experimental-rerun", user_code.FLAG),
)


Start = Callable[[Config, Command], tuple[int, float | None]]
# The runs of a sweep → its exit code, and the score of each run.
Sweep = Callable[
    [Sequence[tuple[Config, Command]], Local | Slurm | Submitit, "Study | None"], tuple[int, list[float | None]]
]


def compose(argv: Sequence[str], start: Start, sweep: Sweep | None = None) -> int:
    """Compose, validate and start the run, or all runs of a sweep. Gives the exit code; says errors on stderr."""
    codes: list[int] = []
    began, trusted = process_start_time(), user_code.FLAG in argv

    def task(composed: DictConfig) -> float | None:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        try:
            config, overrides = _validated(composed, trusted=trusted)
            words = (*_words(argv), *_here(argv, HydraConfig.get()))
            code, score = start(
                config, Command(overrides, time.time() if codes else began, words, _slurm(HydraConfig.get()))
            )
        except HoldfastError as error:
            code, score = _say(error), None
        codes.append(code)
        if code == STOPPED:
            raise SystemExit(STOPPED)  # a stopped run stops the sweep
        return score

    def launch(jobs: Sequence[hydra_plugin.Job], study: Study | None, carry: Carry) -> list[float | None]:
        chosen = jobs[0][0].hydra
        runs, option, which = [], _option(chosen, carry), (*_which(argv), *_here(argv, chosen))
        for (composed, words), own in zip(jobs, distinct([words for _, words in jobs]), strict=True):
            HydraConfig.instance().set_config(composed)
            try:
                config, overrides = _validated(_without_hydra(composed), trusted=trusted)
            except HoldfastError as error:
                raise type(error)(f"{error} (in the run {' '.join(own)})" if own else str(error)) from None
            runs.append((config, Command(overrides, began, (*which, *words, *([user_code.FLAG] if trusted else [])))))
        assert sweep is not None
        code, scores = sweep(runs, option, study)
        codes.append(code)
        if code == STOPPED:
            raise SystemExit(STOPPED)  # whoever asked for these runs is not to ask for more
        return scores

    try:
        if len(asked := [word for word in argv if word in ONE_OF]) > 1:
            raise ConfigError(f"{' and '.join(asked)} are not for one command; leave out all but one")
        if set(SWEEP) & set(argv):
            from runner.launch import hydra_plugin

            hydra_plugin.register(launch)
        elif "hydra/sweeper=optuna" in argv:
            raise ConfigError("hydra/sweeper=optuna: a search is many runs; add -m, or leave it out")
        words = [_forced(word) for argument in argv for word in _spelled_out(argument) if word != user_code.FLAG]
        sys.argv[1:] = sorted(words, key=lambda word: word not in SWEEP)  # argparse wants it before what is positional
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to us instead of printed
        # Hydra 1.3 warns where version_base is missing, 1.4 where it is there; nothing a user could do about either.
        warnings.filterwarnings("ignore", message="The version_base parameter is deprecated")
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(task)()
    except SystemExit:
        if STOPPED not in codes:
            raise
    except HydraException as error:
        return _say(ConfigError(_plain_line(error)))
    except HoldfastError as error:
        return _say(error)
    return STOPPED if STOPPED in codes else next((code for code in codes if code), 0)


def _validated(composed: DictConfig, *, trusted: bool) -> tuple[Config, tuple[str, ...]]:
    task = list(HydraConfig.get().overrides.task)
    overrides = (*(override.removeprefix("++") for override in task), *([user_code.FLAG] if trusted else []))
    config = load(_document(composed, task, trusted=trusted))
    user_code.find(config.document)
    return config, overrides


def _document(composed: DictConfig, task: list[str], *, trusted: bool) -> Any:
    """What was composed; with dir=, that run's own document under what was typed. Raises RefusedError without trust."""
    if composed.get("dir") is None:
        return composed
    saved = layout.RunDir(Path(str(composed.dir))).config
    if not saved.exists():
        raise RefusedError(f"dir={composed.dir}: holds no run; leave dir out to start one, or check the path")
    keys = [override.key_or_group.replace("/", ".") for override in OverridesParser.create().parse_overrides(task)]
    if "experiment" in keys:
        return composed
    document = continued(read(saved), composed, [*keys, "compile_cache"])  # whose programs would be run, unread
    if not trusted:
        typed = OmegaConf.to_container(composed)
        user_code.demand(saved.parent, document, typed, f"add {user_code.FLAG}")  # type: ignore[arg-type]
    return document


def _option(chosen: Any, carry: Carry) -> Local | Slurm | Submitit:
    """How the runs of a sweep are to be worked on. Raises ConfigError where they cannot be so."""
    launcher, sweeper = (chosen.runtime.choices.get(f"hydra/{group}") for group in ("launcher", "sweeper"))
    if launcher != "local" and sweeper != "basic":
        raise ConfigError(
            f"hydra/sweeper={sweeper}: chooses the next runs by the scores of those before, on this machine; "
            "leave hydra/launcher out"
        )
    if launcher in NAMES:
        return Submitit(launcher, chosen.launcher, carry)
    return _slurm(chosen) or _chosen(Local, chosen.launcher)


def _chosen(schema: Any, launcher: DictConfig) -> Any:
    """What is chosen for a launcher."""
    option: Any = OmegaConf.to_container(launcher)
    try:
        return checked(schema, {key: value for key, value in option.items() if key != "_target_"})
    except ConfigError as error:
        raise ConfigError(f"{LAUNCHER}{error}") from None


def _without_hydra(composed: DictConfig) -> DictConfig:
    plain = copy.copy(composed)
    with open_dict(plain):
        del plain["hydra"]
    return plain


def _words(argv: Sequence[str]) -> tuple[str, ...]:
    """What starts the same run here, without a launcher."""
    return tuple(word for word in argv if not word.lstrip("+~").startswith(("hydra/launcher", LAUNCHER)))


def _here(argv: Sequence[str], chosen: Any) -> tuple[str, ...]:
    """What keeps a run where it is started when a YAML chooses its launcher: else each job would submit it again."""
    typed = any(word.lstrip("+~").startswith("hydra/launcher=") for word in argv)
    return () if typed or chosen.runtime.choices.get("hydra/launcher") == "local" else ("hydra/launcher=local",)


def _which(argv: Sequence[str]) -> tuple[str, ...]:
    """The flags that say which configuration is meant: it is that of each run."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    found = ((word, after) if word in WHICH else (word,) for word, after in pairs if word.split("=")[0] in WHICH)
    return tuple(word for words in found for word in words)


def _slurm(chosen: Any) -> Slurm | None:
    """What a job is to ask for, where `hydra/launcher=slurm` was chosen. Raises ConfigError for any but ours."""
    launcher = chosen.runtime.choices.get("hydra/launcher")
    if launcher in NAMES:
        raise ConfigError(f"hydra/launcher={launcher}: is for sweeps; add -m, or use hydra/launcher=slurm")
    if launcher not in ("local", "slurm"):
        raise ConfigError(
            f"hydra/launcher={launcher}: is not supported; leave it out (hydra.launcher.parallel=N: so many runs at "
            f"once), or use one of slurm, {', '.join(NAMES)}"
        )
    return _chosen(Slurm, chosen.launcher) if launcher == "slurm" else None


def _spelled_out(argument: str) -> tuple[str, ...]:
    """`model=my_file:MyModel` is short for `model=external model.target=my_file:MyModel`."""
    group, _, value = argument.partition("=")
    if re.fullmatch(r"[\w.]+:[\w.]+", value) and (CONF / group / "external.yaml").is_file():
        return f"{group}=external", f"{group}.target={value}"
    return (argument,)


def _forced(argument: str) -> str:
    """`key=value` as `++key=value`, unless the key is a group of choices. Raises ConfigError for an unknown flag."""
    if argument.startswith("-") and "=" not in argument:
        if argument not in FLAGS:
            raise ConfigError(f"{argument}: unknown flag; overrides read key=value; --help shows what there is")
        return argument
    key, equals, value = argument.partition("=")
    if key == "init_from":
        return f"++init_from.run={value}"
    if not equals or key[:1] in "+~-" or key.startswith("hydra") or "@" in key or (CONF / key).is_dir():
        return argument
    return f"++{argument}"


def _plain_line(error: HydraException) -> str:
    """One line from a complaint of Hydra's."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options)
        if option in NAMES:
            return f"{group}={option}: needs the extra `submitit`; {INSTALL}"
        return f"{group}: got {option}; expected one of {options}{suggest(option, list(error.options))}"
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        if "=" not in override and not override.startswith("~"):
            return f"{override}: cannot be read; an override reads key=value"
        return f"{override}: cannot be read as key=value ({error.message.splitlines()[0]}); quote special characters"
    text = str(error).strip() or str(error.__cause__)
    first = text.splitlines()[0].replace("'++", "'")
    if first.startswith("Ambiguous value for argument "):
        override = first.removeprefix("Ambiguous value for argument ").strip("'")
        return f"{override}: several values make a sweep; add -m, or write a list as key=[a,b]"
    if isinstance(error, ConfigCompositionException) and first.startswith("Multiple values for "):
        group = first.removeprefix("Multiple values for ").split(".")[0]
        return f"{group}: is chosen already; write {group}=OPTION, without the +"
    if first.startswith("Could not delete from config. "):
        return f"{first.split(chr(39))[1]}: nothing to take away; the configuration has no such key"
    if first.startswith("Could not override "):
        return _unknown(first.split("'")[1])
    return first


def _unknown(key: str) -> str:
    """Hydra judges its own keys; of ours only a launcher's are among them."""
    here, there = ([f.name for f in fields(option)] for option in (Local, Slurm))
    name = key.removeprefix(LAUNCHER)
    if key == name:
        from runner.launch.study import OPTIONS

        return f"{key}: unknown key{suggest(key.removeprefix('hydra.sweeper.'), list(OPTIONS))}"
    if word := next((word for word in sys.argv if word.startswith("hydra/launcher=submitit")), None):
        return f"{key}: unknown key; what there is: python run.py {word} --cfg hydra -p hydra.launcher"
    if name in there:
        return f"{key}: belongs to hydra/launcher=slurm; add that"
    if name in here:
        return f"{key}: belongs to a sweep on this machine; leave hydra/launcher out"
    known = f"; hydra.launcher has: {', '.join(here)}; for slurm: {', '.join(there)}"
    return f"{key}: unknown key{suggest(name, [*here, *there]) or known}"


def _say(error: HoldfastError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code
