"""`train.parts` on devices of several processes: the bits of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.train_in_parts import MODELS, OWN, run_in_parts


def test_two_processes_have_the_bits_of_one(tmp_path: Path) -> None:
    """Of a state with dropout, batch statistics, an average, whole numbers and a key, and of an evaluation with F1."""
    one, two = (run_in_parts(layout, tmp_path, 3, (OWN,)) for layout in ((1, 1), (2, 1)))
    assert one == two
    assert one[0].measured["eval"].keys() == {"loss", "f1"}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_has_the_bits_of_one_device(model: str, tmp_path: Path) -> None:
    """Also with bfloat16, with recomputation, and with labels that are left out."""
    one = run_in_parts((1, 1), tmp_path, 20, (model,))
    for layout in ((2, 1), (2, 2), (4, 1)):
        assert run_in_parts(layout, tmp_path, 20, (model,)) == one, layout
