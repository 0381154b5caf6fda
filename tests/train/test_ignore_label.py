"""From the command to the loss: with `data.ignore_label` it is that of the other labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.errors import ConfigError
from runner.launch.compose import compose
from runner.train.build import build
from runner.train.built import Built
from tests.data.test_text_formats import nanogpt

RNG = np.random.default_rng(3)
INPUTS = RNG.standard_normal((24, 4)).astype(np.float32)
LABEL = np.arange(24, dtype=np.uint8) % 3
HIDDEN = np.arange(24) % 4 == 1


def built_of(*words: str) -> Built:
    request: Any = compose([*words, "data.batch_size=4", "log=quiet", "mesh=single"])
    return build(request.config)


def measure(built: Built) -> dict[str, float]:
    """Return the sums of an evaluation of all that is held out."""
    batch = built.put(built.sources.eval.take(np.arange(len(built.sources.eval))))
    state = built.init()
    sums = built.eval_step(state, batch, jnp.ones(len(built.sources.eval)))
    return {name: float(value) for name, value in sums.items()}


def arrays(root: Path, name: str, rows: np.ndarray, label: np.ndarray) -> str:
    """Write an archive to train on, and to evaluate on; return the words that name it."""
    sides = {"x_train": INPUTS[rows], "y_train": label[rows], "x_val": INPUTS[rows], "y_val": label[rows]}
    np.savez(root / f"{name}.npz", **sides)
    return f"data.path={root / name}.npz"


WORDS = ("data=arrays", "data.gives=features", "model=mlp", "model.width=8", "model.num_layers=1")


@pytest.mark.parametrize("value", [255, 77])
def test_the_loss_is_that_of_the_rest_alone(value: int, tmp_path: Path) -> None:
    masked = np.where(HIDDEN, value, LABEL).astype(np.uint8)
    whole = built_of(*WORDS, arrays(tmp_path, "whole", np.arange(24), masked), f"data.ignore_label={value}")
    alone = built_of(*WORDS, arrays(tmp_path, "alone", np.flatnonzero(~HIDDEN), masked))
    assert whole.sources.num_outputs == alone.sources.num_outputs == 3
    seen, expected = measure(whole), measure(alone)
    assert seen["weight"] == expected["weight"] == 18
    assert seen == pytest.approx(expected, rel=1e-5)
    # The model has an output for each class, and none for the value.
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(whole.abstract["params"])} == {8, 3}


def test_where_nothing_is_left_out_the_program_is_the_same(tmp_path: Path) -> None:
    path = arrays(tmp_path, "all", np.arange(24), LABEL)
    programs = []
    for words in ((), ("data.ignore_label=255",)):
        built = built_of(*WORDS, path, *words)
        batch = built.put(built.sources.eval.take(np.arange(4)))
        programs.append(built.eval_step.lower(built.abstract, batch, jnp.ones(4)).as_text())
    assert programs[0] == programs[1]


@pytest.mark.parametrize("pad", [0, 7])
def test_a_token_is_left_out_of_what_is_foretold(pad: int, tmp_path: Path) -> None:
    tokens = RNG.integers(0, 8, 200)
    folder = nanogpt(tmp_path / "t", train=tokens, val=tokens)
    words = ("data=tokens", f"data.path={folder}", "data.seq_len=8", "model=gpt")
    small = ("model.width=16", "model.num_layers=1", "model.num_heads=2")
    seen = measure(built_of(*words, *small, f"data.ignore_label={pad}"))
    assert seen["weight"] == (tokens[1 : (199 // 8) * 8 + 1] != pad).sum()
    assert 0.5 < seen["loss"] / seen["weight"] / np.log(8) < 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data.ignore_label=x",), "ignore_label"),
        (("data.ignore_label=1.5",), "ignore_label"),
        (("data.ignore_label=3000000000",), "ignore_label"),
        (("data.ignored_label=3",), "did you mean ignore_label"),
    ],
)
def test_a_value_that_is_none_is_told(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*WORDS, arrays(tmp_path, "a", np.arange(24), LABEL), *words])
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_what_cannot_be_left_out_is_told_before_a_run_begins(tmp_path: Path) -> None:
    path = arrays(tmp_path, "a", np.arange(24), LABEL / np.float32(2))
    with pytest.raises(ConfigError, match="data=arrays: ignore_label=255 is the number of a class, but label is float"):
        built_of(*WORDS, path, "data.ignore_label=255")
