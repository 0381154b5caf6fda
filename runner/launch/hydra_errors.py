"""Say Hydra's complaints in one line each: where, what was got, the way out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from runner.config.explain import suggest_word
from runner.errors import ConfigError, HoldfastError
from runner.launch.conf_folders import is_group, list_options
from runner.launch.hydra_keys import SEARCH_WAYS_OUT, WAYS_OUT
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.submitit_sweep import INSTALL_SUBMITIT, SUBMITIT_LAUNCHERS
from runner.text import display_path, mask_unprintable, quote_override, shorten

LAUNCHER = "hydra.launcher."
# What a message says of a value or a word of the user's, and how long it may become as a whole.
MAX_WORD, MAX_MESSAGE = 100, 500


@contextmanager
def in_plain_words(words: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever Hydra and OmegaConf complain of into ConfigError, of one line.

    Around Hydra alone, and nothing of ours: it checks its input by halves, so that an error of any type may come of a
    word that it does not expect. `words` are what it was given.
    """
    try:
        yield
    except (HoldfastError, BrokenPipeError):
        raise
    except HydraException as error:
        raise ConfigError(_find_wrong_choice(words) or in_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(explain_interpolation(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{display_path(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem}; it cannot be read as YAML") from None
    except OSError as error:
        # What Hydra prints went wrong, not what it reads: that is nobody's configuration.
        if error.filename is None:
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    except Exception as error:
        if wrong := _find_wrong_choice(words):
            raise ConfigError(wrong) from None
        first = shorten(str(error).strip().partition("\n")[0], MAX_WORD)
        # OmegaConf adds it to errors of any type.
        key = re.search(r"^\s*full_key: (\S+)", str(error), re.MULTILINE)
        where = key[1] if key else "the command"
        raise ConfigError(f"{where}: cannot be composed ({type(error).__name__}: {first})") from None


@contextmanager
def cut_errors() -> Iterator[None]:
    """Cut what an error of ours says to a line that a person can read: values in it may be long, or foreign."""
    try:
        yield
    except HoldfastError as error:
        if (line := cut_message(str(error))) == str(error):
            raise
        raise type(error)(line) from None


def cut_message(message: str) -> str:
    """Return a message as one printable line that a terminal can show, without the middle where it is long."""
    line = mask_unprintable(" ".join(message.splitlines()))
    if len(line) <= MAX_MESSAGE:
        return line
    # The end says the way out.
    return f"{line[: MAX_MESSAGE - 160].rstrip()} … {line[-150:].lstrip()}"


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """Return what is wrong with a value that OmegaConf cannot resolve, as `${nope}`."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{error.full_key or 'configuration'}: {text}"


# Where parts of the user's own go that stand beside those of a group, and not in their place.
PLACES_OF_OWN = {"eval": "eval", "ckpt": "ckpt.save", "retention": "retention", "log": "log.sinks"}


def in_one_line(error: HydraException) -> str:
    """Return what an exception of Hydra's means, for a person who knows the command line and not Hydra."""
    # Of several choices in a list Hydra says which one is missing, and not what there is.
    group = str(getattr(error, "missing_cfg_file", "")).partition("/")[0]
    if isinstance(error, MissingConfigException) and (error.options is not None or is_group(group)):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        override = shorten(error.override.removeprefix("++"), MAX_WORD)
        if "=" not in override and not override.startswith("~"):
            return f"{override}: cannot be read; an override reads key=value"
        problem = shorten(error.message.splitlines()[0], MAX_WORD)
        key, _, value = override.partition("=")
        if re.fullmatch(r"[+~]*[\w./@]+", key) and not key.isascii():
            return f"{override}: a key is written in the letters a to z, digits and '_'; choose another name"
        if problem.startswith("LexerNoViableAltException") and re.fullmatch(r"[+~]*[\w./@]+", key):
            return f"{override}: has characters that need quotes; write {quote_override(key, value)}"
        return f"{override}: cannot be read as key=value ({problem}); quote special characters"
    text = str(error).strip() or str(error.__cause__)
    # Every plain override was handed to Hydra with `++` before it.
    lines = text.splitlines()
    first = lines[0].replace("'++", "'")
    if first.startswith("Ambiguous value for argument ") or re.match("Sweep parameters .* requires --multirun", first):
        override = first.removeprefix("Ambiguous value for argument ").removeprefix("Sweep parameters ")
        override = shorten(override.removesuffix(" requires --multirun").strip("'"), MAX_WORD)
        return f"{override}: several values make a sweep; add -m, or write a list as key=[a,b]"
    if isinstance(error, ConfigCompositionException) and first.startswith("Multiple values for "):
        group = first.removeprefix("Multiple values for ").split(".")[0]
        return f"{group}: is chosen already; write {group}=OPTION, without the +"
    if first.startswith("Could not delete from config. "):
        return f"{first.split(chr(39))[1]}: nothing to take away; the configuration has no such key"
    if first.startswith("Sweeping over Hydra's configuration is not supported"):
        override = first.rpartition(" : '")[2].removesuffix("'")
        typed = override.removeprefix("hydra.sweeper.params.")
        return f"{override}: Hydra's own keys have one value; say {typed if typed != override else 'one'}"
    if first.startswith("Could not override "):
        return _unknown_key(first.split("'")[1])
    if isinstance(error, InstantiationException):
        # The reason stands below what was called, and the key below that.
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "hydra")
        return f"{key}: {' '.join(line for line in lines if not line.startswith('full_key: '))}"
    # A line that ends like this is no reason yet.
    return " ".join(lines).replace("'++", "'") if first.rstrip().endswith((":", ",", "\t")) else first


def _find_wrong_choice(words: Sequence[str]) -> str | None:
    """Return what is wrong with a group that is set to something other than names of choices; None where none is."""
    overrides = [word for word in words if not word.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (HydraException, ValueError):
        # A number with more digits than Python reads.
        return None
    for override in parsed:
        group = override.key_or_group
        if override.is_sweep_override() or not (is_group(group) or group.startswith("hydra/")):
            continue
        value = override.value()
        names = value if isinstance(value, list) else [value]
        if all(isinstance(name, str) for name in names) and not (override.is_delete() and isinstance(value, list)):
            continue
        if override.is_delete():
            return f"{group}: ~{group} alone takes it away"
        options = f"; expected one of {', '.join(list_options(group))}" if is_group(group) else ""
        return f"{group}: got {shorten(json.dumps(value, default=str), MAX_WORD)}{options}"
    return None


def _unknown_option(error: MissingConfigException) -> str:
    file = str(error.missing_cfg_file)
    group, _, option = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
    if option in SUBMITIT_LAUNCHERS:
        return f"{group}={option}: needs the extra `submitit`; {INSTALL_SUBMITIT}"
    options = list(list_options(group) if error.options is None else error.options)
    if group in WAYS_OUT:
        return f"{group}={shorten(option, MAX_WORD)}: Hydra only composes here; leave it out: {WAYS_OUT[group]}"
    got = shorten(option, MAX_WORD) or '""'
    return f"{group}: got {got}; expected one of {', '.join(options)}{_suggest_own(group, option, options)}"


def _suggest_own(group: str, option: str, options: list[str]) -> str:
    """Return how code of the user's own is named where that was meant, or the choice that is meant; else nothing."""
    # A dot or a colon is in the name of no choice of ours.
    is_target = re.search(r"[.:]", option)
    if "external" in options and is_target:
        return f", or your own as {group}=FILE:NAME"
    # A file that lies here and is not called as a choice of ours nearly is.
    near = suggest_word(option, options)
    if "external" in options and not near and option.isidentifier() and Path(f"{option}.py").is_file():
        return f", or your own as {group}={option}:NAME"
    if group in PLACES_OF_OWN and is_target:
        return f"; your own is added as '+{PLACES_OF_OWN[group]}.mine={{kind: external, target: FILE:NAME}}'"
    return near


def _unknown_key(key: str) -> str:
    """Explain a key that Hydra itself does not know: of ours, only a launcher's or a search's are among those."""
    here, there = ([f.name for f in fields(option)] for option in (LocalOptions, SlurmOptions))
    name = key.removeprefix(LAUNCHER)
    if key == name:
        from runner.launch.study import OPTIONS

        option = key.removeprefix("hydra.sweeper.")
        if option in OPTIONS:
            return f"{key}: belongs to a search; add hydra/sweeper=optuna and -m"
        if option in SEARCH_WAYS_OUT:
            return f"{key}: {SEARCH_WAYS_OUT[option]}"
        return f"{key}: unknown key{suggest_word(option, list(OPTIONS))}"
    if word := next((word for word in sys.argv if word.startswith("hydra/launcher=submitit")), None):
        return f"{key}: unknown key; what there is: python run.py {word} --cfg hydra -p hydra.launcher"
    if name in there:
        return f"{key}: belongs to hydra/launcher=slurm; add that"
    if name in here:
        return f"{key}: belongs to a sweep on this machine; leave hydra/launcher out"
    known = f"; hydra.launcher has: {', '.join(here)}; for slurm: {', '.join(there)}"
    return f"{key}: unknown key{suggest_word(name, [*here, *there]) or known}"
