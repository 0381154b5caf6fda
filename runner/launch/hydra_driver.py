"""Have Hydra parse a command and compose it, and do nothing else: no directory, no log, no callback, no job.

`hydra.main` would do these by itself, from the inside of Hydra; so that inside is what is driven here. Every file of
choices is measured before Hydra reads it.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import hydra as hydra_inside
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config.read_yaml import check_yaml, read_bounded_text
from runner.errors import ConfigError
from runner.launch.hydra_keys import check_hydra_keys, refuse_passing_values
from runner.text import display_path

# The words of one command, together: Hydra's parser takes about a second for so many characters.
MAX_COMMAND_LENGTH = 8_000
MAX_DEPTH = 30
# Of the groups below `hydra`.
OWN_DEFAULTS = {"launcher": "local", "job_logging": "disabled", "hydra_logging": "disabled"}
# Has Hydra raise its errors instead of printing them; a user says it to see whole tracebacks.
FULL_ERROR = "HYDRA_FULL_ERROR"

KeepConfig = Callable[[DictConfig, DictConfig], None]


class BoundedFileSource(FileConfigSource):
    """Hydra's reader of the files of conf/, which reads none that is too large, too deep, or too many values."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file says. Raises ConfigError where it cannot be read."""
        path = Path(self.path, self._normalize_file_name(config_path))
        try:
            check_yaml(read_bounded_text(path))
        except ValueError as error:
            # The line of a file reads as in what compilers say: `conf/model/mine.yaml, line 2: …`.
            separator = ", " if str(error).startswith("line ") else ": "
            raise ConfigError(f"{display_path(path)}{separator}{error}") from None
        return super().load_config(config_path)


class ComposingHydra(Hydra):
    """Hydra, of which a run is nothing but its configuration.

    Attributes:
        keep_run: what the configuration of a run, and Hydra's own, are handed to.
    """

    keep_run: KeepConfig

    def get_mode(self, config_name: str | None, overrides: list[str]) -> None:
        """Leave it to `-m` whether there are several runs: Hydra would compose everything to see what a file says."""

    def compose_config(self, *args: Any, **options: Any) -> DictConfig:
        """Compose, and leave logging as it is: what a file says of it may name files to write.

        Raises ConfigError where Hydra's own keys ask for what it does not do here, and for values of the moment.
        """
        options |= dict(zip(("config_name", "overrides", "run_mode"), args, strict=False))
        # Not what a flag has added: `hydra.mode` says what a file wants.
        options["overrides"] = [word for word in options["overrides"] if not word.startswith("hydra.mode=")]
        config = super().compose_config(**{**options, "with_log_configuration": False})
        plain: Any = OmegaConf.to_container(config, resolve=False)
        own = plain.pop("hydra")
        check_hydra_keys(own, own["runtime"]["choices"])
        refuse_passing_values(plain)
        return config

    def run(
        self,
        config_name: str | None,
        task_function: TaskFunction,
        overrides: list[str],
        with_log_configuration: bool = True,  # noqa: FBT001, FBT002
    ) -> JobReturn:
        """Compose a run, and hand it on."""
        config = self.compose_config(config_name=config_name, overrides=overrides, run_mode=RunMode.RUN)
        HydraConfig.instance().set_config(config)
        plain = copy.deepcopy(config)
        with read_write(plain), open_dict(plain):
            del plain["hydra"]
        type(self).keep_run(plain, copy.deepcopy(HydraConfig.instance().cfg))  # type: ignore[arg-type]
        return JobReturn()


def drive_hydra(words: Sequence[str], conf: Path, search_path: type[SearchPathPlugin], keep_run: KeepConfig) -> None:
    """Let Hydra parse and compose; it hands a single run to `keep_run`, and the runs of a sweep to our sweeper.

    Args:
        words: flags and overrides, as Hydra takes them.
        conf: the folder of the choices that come last.
        search_path: says which folders come before.
        keep_run: takes the configuration, and Hydra's own.

    Raises:
        ConfigError: the flags are wrong, or a file of conf/ cannot be read.
        SystemExit: Hydra has printed its help.
        Exception: anything of Hydra's and OmegaConf's own; hydra_errors.py says what they mean.
    """
    check_length(words)
    ComposingHydra.keep_run = staticmethod(keep_run)
    Plugins.instance().register(search_path)
    parser = get_args_parser()
    parser.error = _refuse_flags  # type: ignore[method-assign]
    # Hydra 1.3 warns where version_base is missing, 1.4 where it is there; nothing a user could do about either.
    warnings.filterwarnings("ignore", message="The version_base parameter is deprecated")
    # Sets the base of the version, and nothing else.
    hydra.main(config_path=None, config_name=None, version_base="1.3")
    with _composing_only():
        arguments = parser.parse_args(list(words))
        if arguments.resolve and arguments.cfg is None:
            raise ConfigError("--resolve: goes with --cfg; leave it out, or add --cfg job")
        _run_hydra(arguments, parser, _task, str(conf), "config")


def check_length(words: Sequence[str]) -> None:
    """Raise ConfigError where a command is longer, or has deeper brackets, than Hydra's parser is made for."""
    if (length := sum(map(len, words))) > MAX_COMMAND_LENGTH:
        raise ConfigError(
            f"the command has {length:,} characters, of which {MAX_COMMAND_LENGTH:,} are read; put long values into a "
            "file of conf/"
        )
    for word in words:
        depth = 0
        for char in word:
            depth += (char in "[{(") - (char in ")}]")
            if depth > MAX_DEPTH:
                raise ConfigError(f"{word.partition('=')[0].lstrip('+~')}: brackets are nested deeper than {MAX_DEPTH}")


def _task(config: DictConfig) -> NoReturn:
    """Stand for the program that Hydra would start; its file says where Hydra believes to be."""
    raise AssertionError("Hydra composes, and starts nothing")


def _refuse_flags(message: str) -> NoReturn:
    """Raise ConfigError where argparse would print its usage, of eight lines."""
    raise ConfigError(f"{message}; --help shows what there is")


def _set_own_defaults() -> None:
    """Have the choices of Hydra's own groups be ours where nobody makes another one.

    Said in config.yaml, with `override`, they would win over what an experiment says in the same way.
    """
    node: Any = ConfigStore.instance().repo["hydra"]["config.yaml"].node
    with read_write(node), open_dict(node):
        for entry in node["defaults"]:
            for group in set(entry) & set(OWN_DEFAULTS):
                entry[group] = OWN_DEFAULTS[group]


@contextmanager
def _composing_only() -> Iterator[None]:
    """Have Hydra be a ComposingHydra with a BoundedFileSource, which raises its errors instead of printing them."""
    own = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    # `--info` is printed by a logger, which would print a traceback where nobody reads it any more.
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    _set_own_defaults()
    sources = SourcesRegistry.instance().types
    hydra_inside.Hydra, sources["file"] = ComposingHydra, BoundedFileSource  # type: ignore[misc]
    try:
        yield
    finally:
        # What is pickled for a worker has Hydra's own again: another class of that name is an error there.
        hydra_inside.Hydra, sources["file"] = Hydra, FileConfigSource  # type: ignore[misc]
        logging.raiseExceptions = raises
        # What runs and processes that we start are told is what the user has said.
        del os.environ[FULL_ERROR]
        if own is not None:
            os.environ[FULL_ERROR] = own
