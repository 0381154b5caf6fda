"""Say Hydra's complaints in one line each: where, what was got, the way out."""

from __future__ import annotations

import sys
from dataclasses import fields

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException

from runner.config.explain import suggest_word
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.submitit_sweep import INSTALL_SUBMITIT, SUBMITIT_LAUNCHERS

LAUNCHER = "hydra.launcher."


def in_one_line(error: HydraException) -> str:
    """Return what an exception of Hydra's means, for a person who knows the command line and not Hydra."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        override = error.override.removeprefix("++")
        if "=" not in override and not override.startswith("~"):
            return f"{override}: cannot be read; an override reads key=value"
        return f"{override}: cannot be read as key=value ({error.message.splitlines()[0]}); quote special characters"
    text = str(error).strip() or str(error.__cause__)
    # Every plain override was handed to Hydra with `++` before it.
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
        return _unknown_key(first.split("'")[1])
    return first


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if option in SUBMITIT_LAUNCHERS:
        return f"{group}={option}: needs the extra `submitit`; {INSTALL_SUBMITIT}"
    options = list(error.options or ())
    return f"{group}: got {option}; expected one of {', '.join(options)}{suggest_word(option, options)}"


def _unknown_key(key: str) -> str:
    """Explain a key that Hydra itself does not know: of ours, only a launcher's or a search's are among those."""
    here, there = ([f.name for f in fields(option)] for option in (LocalOptions, SlurmOptions))
    name = key.removeprefix(LAUNCHER)
    if key == name:
        from runner.launch.study import OPTIONS

        return f"{key}: unknown key{suggest_word(key.removeprefix('hydra.sweeper.'), list(OPTIONS))}"
    if word := next((word for word in sys.argv if word.startswith("hydra/launcher=submitit")), None):
        return f"{key}: unknown key; what there is: python run.py {word} --cfg hydra -p hydra.launcher"
    if name in there:
        return f"{key}: belongs to hydra/launcher=slurm; add that"
    if name in here:
        return f"{key}: belongs to a sweep on this machine; leave hydra/launcher out"
    known = f"; hydra.launcher has: {', '.join(here)}; for slurm: {', '.join(there)}"
    return f"{key}: unknown key{suggest_word(name, [*here, *there]) or known}"
