"""How long a run is, in a document that is not validated yet: so many steps, or so many epochs; never both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DEFAULT_STEPS = 600


def fill_in_length(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document with the usual number of steps, where it says in neither way how long to train."""
    train = document.get("train")
    if isinstance(train, dict) and train.get("steps") is None and train.get("epochs") is None:
        return {**document, "train": {**train, "steps": DEFAULT_STEPS}}
    return document


def drop_untyped_length(document: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a document without the length that it has from elsewhere, where the command gives the other one.

    `keys` are those that the command line touched: `train.epochs=3` counts, whatever an experiment, or the run that is
    gone on with, has for train.steps. Where both were typed both stay, to be refused.
    """
    train, typed = document.get("train"), {"train.steps", "train.epochs"}.intersection(keys)
    if not isinstance(train, dict) or len(typed) != 1:
        return document
    (key,) = typed
    if train.get(key.removeprefix("train.")) is None:
        return document
    return {**document, "train": {**train, "epochs" if key == "train.steps" else "steps": None}}
