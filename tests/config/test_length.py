"""How long a run is: so many steps, or so many passes over data that is read first."""

from __future__ import annotations

from typing import Any

import pytest

from runner.config.identity import classify_key, hash_config
from runner.config.run_length import drop_untyped_length
from runner.config.schema import Config, Train, merge_typed_keys, validate_config, validate_options
from runner.errors import ConfigError
from tests.conftest import composed

MLP = ("model=mlp", "data=digits")


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [
        (1.0, 100, 10, 10),
        (1.0, 101, 10, 11),  # the last examples are trained on as well
        (3.0, 1437, 64, 68),
        (0.5, 100, 10, 5),
        (0.001, 100, 10, 1),
        (1.1, 1000, 100, 11),  # not 12: 1.1 × 1,000 ÷ 100 is a little more than 11 in floating point
        (2.0, 7, 64, 1),
    ],
)
def test_so_many_epochs_are_so_many_steps(epochs: float, examples: int, batch: int, steps: int) -> None:
    assert Train(steps=None, epochs=epochs).count_steps(examples, batch) == steps


def test_epochs_take_the_place_of_the_usual_number_of_steps() -> None:
    config = composed(*MLP, "train.epochs=2", "data.batch_size=32")
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    known = config.with_known_steps(1437)
    assert (known.train.steps, known.train.num_steps) == (90, 90)
    assert known.with_known_steps(7) is known
    assert composed(*MLP).train.steps == 600


@pytest.mark.parametrize(
    "words",
    [("train.steps=300", "train.epochs=2"), ("train.steps=0", "train.epochs=2"), ("train.epochs=0.5", "train.steps=1")],
)
def test_both_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^train.epochs=.* and train.steps=.* both say how long to train; leave one"):
        composed(*MLP, *words)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.epochs=0", "train.epochs: got 0; expected more than 0"),
        ("train.epochs=-1", "train.epochs: got -1; expected more than 0"),
        ("train.epochs=many", 'train.epochs: got "many"; expected a number'),
        ("train.epochs=.inf", "train.epochs: got"),
    ],
)
def test_what_is_no_number_of_epochs(word: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        composed(*MLP, word)


@pytest.mark.parametrize(
    ("typed", "length"),
    [
        (["train.epochs"], (None, 3.0)),
        (["train.steps"], (200, None)),
        (["optim.lr"], None),
        (["train.steps", "train.epochs"], None),
    ],
)
def test_what_is_typed_counts_more_than_what_an_experiment_has(typed: list[str], length: Any) -> None:
    """A file says 200 steps and the command 3 epochs, or the other way round; both typed, or both in files: refused."""
    document = {**composed(*MLP).document}
    document["train"] = {**document["train"], "steps": 200, "epochs": 3.0}
    chosen = drop_untyped_length(document, typed)
    assert document["train"]["steps"] == 200, "the caller's own"
    if length is None:
        with pytest.raises(ConfigError, match="both say how long"):
            validate_config(chosen)
    else:
        train = validate_config(chosen).train
        assert (train.steps, train.epochs) == length


def test_a_run_goes_on_with_another_length_whichever_it_was_begun_with() -> None:
    from omegaconf import OmegaConf

    begun = composed(*MLP, "train.epochs=2").document
    more = merge_typed_keys(begun, OmegaConf.create({"train": {"steps": 900, "epochs": None}}), ["train.steps"])
    assert (more["train"]["steps"], more["train"]["epochs"]) == (900, None)
    begun = composed(*MLP, "train.steps=300").document
    more = merge_typed_keys(begun, OmegaConf.create({"train": {"steps": None, "epochs": 4}}), ["train.epochs"])
    assert validate_options(Config, more).train == Train(**{**begun["train"], "steps": None, "epochs": 4.0})
    assert classify_key("train.epochs") == classify_key("train.steps") == "resumable"


def test_a_document_of_before_has_its_directory_still() -> None:
    now = composed(*MLP).document
    before = {**now, "train": {key: value for key, value in now["train"].items() if key != "epochs"}}
    del before["stop"]
    assert validate_options(Config, before).document == now
    assert hash_config(before) == hash_config(now) != hash_config(composed(*MLP, "train.epochs=2").document)
