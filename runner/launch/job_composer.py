"""Compose the jobs of a sweep: what they have in common once, and what differs for each.

Hydra reads thirty files and builds the list of defaults anew for each job, a tenth of a second. Most jobs differ in
plain values alone, which Hydra sets when all else is composed: so a job that makes the same choices as one before is a
copy of that one's composition, with its own values set in it.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


class JobComposer:
    """Compose jobs of one sweep, whose own configuration is `master`."""

    def __init__(self, loader: ConfigLoader, master: DictConfig):
        self._loader, self._master = loader, master
        # What was composed of choices alone, by these.
        self._composed: dict[tuple[str, ...], bytes] = {}
        self._groups: dict[str, bool] = {}

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return what Hydra composes of the words of a job. Raises what Hydra raises."""
        overrides = [parse_override(word) for word in words]
        values = [override for override in overrides if _is_plain_value(override)]
        choices = [override for override in overrides if not _is_plain_value(override)]
        # What is taken away, or is Hydra's own, is for Hydra: its place among the others may count.
        if not all(map(self._is_choice, choices)):
            return self._loader.load_sweep_config(self._master, list(words))
        key = tuple(str(override.input_line) for override in choices)
        if key not in self._composed:
            self._composed[key] = pickle.dumps(self._loader.load_sweep_config(self._master, list(key)))
        # A sixth of the time of a deep copy.
        composed: DictConfig = pickle.loads(self._composed[key])
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)  # noqa: SLF001
        job = composed.hydra.job
        composed.hydra.overrides.task = [override.input_line for override in overrides]
        job.override_dirname = get_overrides_dirname(
            overrides=overrides,
            kv_sep=job.config.override_dirname.kv_sep,
            item_sep=job.config.override_dirname.item_sep,
            exclude_keys=job.config.override_dirname.exclude_keys,
        )
        return composed

    def _is_choice(self, override: Override) -> bool:
        """Tell whether an override chooses an option of a group that is known by its name."""
        if override.is_delete() or override.is_hydra_override():
            return False
        group = override.key_or_group
        if group not in self._groups:
            self._groups[group] = bool(self._loader.get_group_options(group))
        return self._groups[group]


# Jobs have most of their words in common.
@functools.lru_cache(maxsize=1024)
def parse_override(word: str) -> Override:
    """Return what a word means to Hydra; nobody may change it. Raises what Hydra raises."""
    return OverridesParser.create().parse_overrides([word])[0]


def _is_plain_value(override: Override) -> bool:
    """Tell whether an override sets a value, in a way in which the key need not be there."""
    return override.is_force_add() and override.package is None and not override.is_hydra_override()
