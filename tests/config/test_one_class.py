"""Labels that are all of one class teach nothing: said before training, where the labels are what is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.config.user_code import choose_objective
from runner.errors import ConfigError
from runner.train.dataset import read_sources
from tests.conftest import composed


def write(root: Path, label: np.ndarray) -> list[str]:
    np.savez(root / "x.npz", inputs=np.ones((len(label), 8, 8, 1), np.float32), label=label)
    return ["data=arrays", f"data.path={root}/x.npz", "data.batch_size=2"]


@pytest.mark.parametrize(
    ("label", "named"),
    [(np.zeros(9, np.int64), ""), (np.array(["good"] * 9), r" \(good\)")],
)
def test_one_class_alone_is_refused(label: np.ndarray, named: str, tmp_path: Path) -> None:
    config = composed("model=mlp", *write(tmp_path, label))
    sources = read_sources(config.data)
    with pytest.raises(ConfigError, match=f"there is one class alone{named}, so its loss is 0 whatever is learnt"):
        choose_objective(config, sources)


# True and false are two classes, also where only one of them is there.
@pytest.mark.parametrize("label", [np.arange(9) % 2, np.zeros(9, bool)])
def test_two_classes_are_enough(label: np.ndarray, tmp_path: Path) -> None:
    config = composed("model=mlp", *write(tmp_path, label))
    assert choose_objective(config, read_sources(config.data)) == "classify"


def test_a_model_that_reads_no_label_may_have_one_class(tmp_path: Path) -> None:
    words = write(tmp_path, np.zeros(9, np.int64))
    config = composed("model=vae", *words)
    assert choose_objective(config, read_sources(config.data)) == "elbo"
