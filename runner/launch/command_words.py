"""The words of a command as people type them, and as Hydra takes them. Which flags there are is decided here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from runner.config.trust import TRUST_FLAG
from runner.errors import ConfigError
from runner.launch.conf_folders import is_group, list_conf_folders
from runner.launch.hydra_keys import refuse_typed_key
from runner.text import format_override, shorten

MULTIRUN = ("-m", "--multirun")
# Of these flags of Hydra's a command has one at most.
EXCLUSIVE = ("--run", "-r", *MULTIRUN, "--cfg", "-c", "--info", "-i")
# These say which configuration is meant, and take a value.
WHICH_CONFIG = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
# Not Hydra's `--experimental-rerun`, which unpickles a file, nor its completion, which does not know our words.
OTHER_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--package", "-p")
FLAGS = (*EXCLUSIVE, *WHICH_CONFIG, *OTHER_FLAGS, TRUST_FLAG)

# What of Hydra's own configuration may be set. The rest says where it writes and what it logs; it does neither here.
HYDRA_KEYS = r"hydra/(launcher|sweeper|sweeper/\w+)|hydra\.(launcher|sweeper)\.[\w.]+|hydra\.searchpath"
MAX_SHOWN, MAX_KEY = 80, 200


def spell_for_hydra(argv: Sequence[str]) -> list[str]:
    """Return the words of a command as Hydra takes them. Raises ConfigError where one is no flag and no override."""
    if len(asked := [word for word in argv if word in EXCLUSIVE]) > 1:
        raise ConfigError(f"{' and '.join(asked)} are not for one command; leave out all but one")
    words: list[str] = []
    before = ""
    for argument in argv:
        # What follows a flag that takes a value is that value.
        if before in (*WHICH_CONFIG, "--package", "-p"):
            words.append(argument)
        elif argument != TRUST_FLAG:
            words += [_force(word) for word in spell_out(argument)]
        before = argument
    # argparse wants -m before what is positional.
    return sorted(words, key=lambda word: word not in MULTIRUN)


def spell_out(argument: str) -> tuple[str, ...]:
    """Spell `model=my_file:MyModel` or `model=./my_file.py:MyModel` out as `model=external model.target=…`.

    Of several targets, `model=a:X,b:Y`, the runs of a sweep have one each; they are spelled out run by run.
    """
    group, value = _split_at_group(argument)
    if group is None:
        return (argument,)
    if (target := _read_target(value)) is not None:
        # An interpolation is Hydra's to read: quoted it would be text.
        return f"{group}=external", f"{group}.target={value if '${' in value else _write_target(target)}"
    targets = [_read_target(part) for part in value.split(",")]
    if len(targets) > 1 and None not in targets and "${" not in value:
        return (f"{group}={','.join(_write_target(target) for target in targets if target)}",)
    return (argument,)


def quote_target(argument: str) -> str:
    r"""Return `model=a:X` for `model=a\:X`, as Hydra's sweepers hand on a target; any other word as it is."""
    group, value = _split_at_group(argument)
    target = _read_target(value) if group and "${" not in value else None
    return argument if target is None else f"{group}={_write_target(target)}"


def _split_at_group(argument: str) -> tuple[str | None, str]:
    """Return the group and the value of a word that may choose a target; None where its key is no such group."""
    key, _, value = argument.partition("=")
    group = key.removeprefix("++")
    # Not `Path.is_file`, which raises where a name is too long.
    is_one = re.fullmatch(r"\w+", group) and os.path.isfile(list_conf_folders()[-1] / group / "external.yaml")
    return group if is_one else None, value


def _write_target(target: str) -> str:
    """Return a target as a value of an override, quoted where Hydra would read something else."""
    return target if re.fullmatch(r"[A-Za-z0-9_./:-]+", target) else format_override("", target).removeprefix("=")


def _read_target(value: str) -> str | None:
    """Return the target that a value of an override names, without quotes and escapes; None where it names none."""
    if quoted := re.fullmatch(r"(['\"])(.*)\1", value):
        value = quoted[2]
    elif re.search(r"[,()\[\]]|\{(?<!\$\{)", value.replace("\\,", "")):
        # Several values, a list or a function of Hydra's.
        return None
    text = re.sub(r"\\(.)", r"\1", value)
    return text if re.fullmatch(r"[\w.]+:[\w.]+|.*[^/]\.py:[\w.]+", text) else None


def drop_launcher(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the words that start the same run here."""
    return tuple(word for word in argv if not word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher.")))


def list_config_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """Return the flags that say which configuration is meant, each with its value: every run of a sweep needs them."""
    flags: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word in WHICH_CONFIG:
            flags += [word, following]
        elif word.split("=")[0] in WHICH_CONFIG:
            flags.append(word)
    return tuple(flags)


def _force(argument: str) -> str:
    """Write `key=value` as `++key=value`, unless the key is a group of choices. Refuses what is no flag, and no key."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-"):
        if key not in FLAGS or (equals and not key.startswith("--")):
            raise ConfigError(
                f"{shorten(key, MAX_SHOWN)}: unknown flag; overrides read key=value; --help shows what there is"
            )
        return argument
    name = key.lstrip("+~")
    if not name:
        raise ConfigError(f"{shorten(argument, MAX_SHOWN)}: cannot be read; an override reads key=value")
    if len(name) > MAX_KEY:
        raise ConfigError(f"{shorten(name, MAX_SHOWN)}: unknown key, of {len(name):,} characters")
    if re.match(r"hydra($|[/.@])", name) and not re.fullmatch(HYDRA_KEYS, name):
        raise refuse_typed_key(name)
    if key == "init_from":
        return f"++init_from.run={value}"
    if key == "remote":
        return f"++remote.url={value}"
    if key == "retention.remote" and not value.startswith("{"):
        return f"+retention@remote.retention={value}"
    if not equals or key[0] in "+~" or name.startswith("hydra") or "@" in key or is_group(key):
        return argument
    return f"++{argument}"
