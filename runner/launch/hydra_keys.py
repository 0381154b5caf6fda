"""Hydra's own keys, and values that Hydra makes at the moment: what of both has no meaning here, and why.

Hydra composes here and does nothing else. A key of its own that asks for more is refused, where it is typed as well as
where a file of choices sets it; `${…}` that stands for something else at every start is refused because a run is found
again by its values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.errors import ConfigError
from runner.text import shorten

NO_FOLDER = "a run lives in ROOT/NAME/RUN and has its files there (root=…, name=…)"
NO_LOGGING = "what a run says is in its logs/run.log (log=quiet: less on the screen)"
# What to do instead, by the beginning of the key.
WAYS_OUT = {
    "hydra.mode": "say -m for several runs, and nothing for one",
    "hydra.run": NO_FOLDER,
    "hydra.sweep": NO_FOLDER,
    "hydra.output_subdir": NO_FOLDER,
    "hydra.job.chdir": "a run stays in the working directory",
    "hydra.job.name": "name=… is the name of the runs",
    "hydra.job.env_set": "set variables of the environment before the command",
    "hydra.job.env_copy": "set variables of the environment before the command",
    "hydra.verbose": NO_LOGGING,
    "hydra/job_logging": NO_LOGGING,
    "hydra/hydra_logging": NO_LOGGING,
    "hydra.job_logging": NO_LOGGING,
    "hydra.hydra_logging": NO_LOGGING,
    "hydra.callbacks": "no code is called back; a model, data or objective of your own is model=my_file:MyModel",
    "hydra/callbacks": "no code is called back; a model, data or objective of your own is model=my_file:MyModel",
}
DEFAULT_WAY_OUT = "hydra/launcher, hydra/sweeper, hydra.searchpath and what is below the first two may be set"

# What the keys say that nobody has set: in the product's config.yaml, or by Hydra itself.
DATED = "${now:%Y-%m-%d}/${now:%H-%M-%S}"
UNSET: Mapping[str, tuple[Any, ...]] = {
    "run.dir": (".", f"outputs/{DATED}"),
    "sweep.dir": ("${root}/${name}/.sweep", f"multirun/{DATED}"),
    "sweep.subdir": (".", "${hydra.job.num}"),
    "output_subdir": (None, ".hydra"),
    "job.chdir": (None, False),
    "job.name": ("hydra_driver", "???"),
    "job.env_set": ({}, None),
    "job.env_copy": ([], None),
    "verbose": (False, None),
    "callbacks": ({}, None),
}
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
OPTUNA_SWEEPER = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
OUR_SWEEPER, OUR_LAUNCHER = "hydra_plugins.holdfast.HoldfastSearch", "hydra_plugins.holdfast.HoldfastLauncher"
# Options of the Optuna plugin that a search of ours does not have.
SEARCH_WAYS_OUT = {
    "storage": "leave it out; what was suggested is kept in study.json beside the runs, and the same command goes on",
    "study_name": "leave it out; a search is found again by what it searches (name=… names its runs)",
    "search_space": "is the old way to write it; say KEY='interval(a, b)', or below hydra.sweeper.params in a file",
}

# An interpolation that is not escaped: what is called, and the beginning of what it is called with, which is not
# consumed: there may be another one in it.
CALL = re.compile(r"(?<!\\)\$\{\s*([A-Za-z_][\w.]*)\s*:(?=\s*([^,}\s]*))")
REFERENCE = re.compile(r"(?<!\\)\$\{\s*(hydra\.[\w.]+)\s*\}")
# Words in the name of a resolver, of Hydra's or of somebody's own, whose answer is another one at every start.
PASSING = re.compile(
    r"(^|[._])(now|utcnow|today|time|date|datetime|timestamp|rand|random|randint|uuid\d?|ulid|pid|hex|token)([._]|$)"
)
# Of what `${hydra:…}` says: the place in a sweep, and folders that are not made.
PASSING_HYDRA = re.compile(r"(job\.(num|id|name)|runtime\.output_dir|run\.|sweep\.|launcher|output_subdir)")


def refuse_typed_key(key: str) -> ConfigError:
    """Return the refusal of a key of Hydra's that was typed."""
    return ConfigError(f"{shorten(key, 80)}: belongs to Hydra, which only composes here; {_find_way_out(key)}")


def check_hydra_keys(own: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Raise ConfigError where Hydra's own configuration asks for what it does not do here.

    Args:
        own: what is below `hydra`, nothing of it resolved.
        choices: the choice that was made of each group of Hydra's, as `hydra/launcher`.
    """
    for key, unset in UNSET.items():
        value: Any = own
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and value not in unset:
            raise ConfigError(
                f"hydra.{key}={shorten(str(value), 60)}: belongs to Hydra, which only composes here; leave it out: "
                f"{_find_way_out(f'hydra.{key}')}"
            )
    for group in ("hydra/job_logging", "hydra/hydra_logging"):
        logging = own.get(group.removeprefix("hydra/"))
        if choices.get(group) in ("disabled", "none") and isinstance(logging, Mapping) and logging.get("handlers"):
            raise ConfigError(f"{group.replace('/', '.')}: Hydra logs nothing here; leave it out: {NO_LOGGING}")
        if choices.get(group) not in (None, "disabled", "none", "default"):
            raise ConfigError(f"{group}={choices[group]}: Hydra logs nothing here; leave it out: {NO_LOGGING}")
    _check_targets(own)


def _check_targets(own: Mapping[str, Any]) -> None:
    sweeper, launcher = (
        {**own[name]} if isinstance(own.get(name), Mapping) else {} for name in ("sweeper", "launcher")
    )
    target = sweeper.get("_target_", BASIC_SWEEPER)
    if target not in (BASIC_SWEEPER, OPTUNA_SWEEPER, OUR_SWEEPER):
        raise ConfigError(
            f"hydra.sweeper._target_: got {shorten(str(target), 100)}; leave it out, and say hydra/sweeper=optuna for "
            "a search, or nothing for a sweep"
        )
    for name, way_out in SEARCH_WAYS_OUT.items():
        if sweeper.get(name) not in (None, {}):
            raise ConfigError(f"hydra.sweeper.{name}: {way_out}")
    target = str(launcher.get("_target_", OUR_LAUNCHER))
    if target != OUR_LAUNCHER and not target.startswith(("hydra_plugins.", "hydra._internal.")):
        raise ConfigError(
            f"hydra.launcher._target_: got {shorten(target, 100)}; leave it out, and say hydra/launcher=NAME where the "
            "runs are not for this machine"
        )


def refuse_passing_values(document: Mapping[str, Any]) -> None:
    """Raise ConfigError where a value of a run's own document stands for something else at every start.

    `document`: nothing of it resolved, and without what is below `hydra`.
    """
    for key, text in _iter_texts(document, ""):
        for name, first in CALL.findall(text):
            if PASSING.search(name.lower()):
                raise ConfigError(
                    f"{key}: ${{{name}:…}} is another value at every start, and a run is found again by its values "
                    f"when the same command is typed; give it a value that stays, as {_suggest_value(key)}"
                )
            if name == "hydra" and PASSING_HYDRA.match(first):
                raise _refuse_hydra_value(key, f"${{hydra:{first}}}")
        for reference in REFERENCE.findall(text):
            if PASSING_HYDRA.match(reference.removeprefix("hydra.")):
                raise _refuse_hydra_value(key, f"${{{reference}}}")
            raise ConfigError(
                f"{key}: ${{{reference}}} is not among the keys of a run; write "
                f"${{hydra:{reference.removeprefix('hydra.')}}}"
            )


def _refuse_hydra_value(key: str, value: str) -> ConfigError:
    return ConfigError(
        f"{key}: {value} is not known to a run: a run alone and the same one in a sweep are one run, which has no "
        f"number and no folder of Hydra's; give it a value that stays, as {_suggest_value(key)}"
    )


def _suggest_value(key: str) -> str:
    return {"name": "name=my_runs", "seed": "seed=0"}.get(key, f"{key}=…")


def _find_way_out(key: str) -> str:
    found = (text for beginning, text in WAYS_OUT.items() if key == beginning or key.startswith(f"{beginning}."))
    return next(found, DEFAULT_WAY_OUT)


def _iter_texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every value that has an interpolation in it."""
    if isinstance(node, str):
        if "${" in node:
            yield key, node
        return
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in children:
        yield from _iter_texts(value, f"{key}.{name}" if key else str(name))
