"""docs/reference.md is what tests/docs/reference.py makes of the code and of conf/ as they are, and it leaves nothing out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from runner.__main__ import VERBS
from runner.launch.compose import compose_run
from tests.conftest import REPO
from tests.docs.reference import PAGE, render_page

TEXT = PAGE.read_text()
KEYS = set(re.findall(r"^\| `([\w.]+)` \|", TEXT, re.MULTILINE))


def leaves(document: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a document; a rule's name is NAME, and its kind is told by the section it is in."""
    for key, value in document.items():
        named = prefix in ("ckpt.save.", "retention.", "eval.", "preempt.notices.")
        key = f"{prefix}{'NAME' if named else key}"
        if isinstance(value, dict) and not key.endswith(".options"):
            yield from leaves(value, f"{key}.")
        elif not key.endswith(".kind"):
            yield key


def test_it_is_up_to_date() -> None:
    """Where this fails: python -m tests.docs.reference --write."""
    assert render_page() == TEXT


def test_every_choice_is_on_it() -> None:
    choices = [path.relative_to(REPO / "conf").with_suffix("") for path in (REPO / "conf").glob("*/**/*.yaml")]
    assert len(choices) > 90
    for choice in choices:
        part = TEXT.partition(f"\n## `{choice.parent}`")[2].partition("\n## ")[0]
        assert f"\n| `{choice.name}` | " in part, choice


def test_every_verb_is_on_it() -> None:
    part = TEXT.partition("\n## Verbs\n")[2]
    assert re.findall(r"^### `(\w+)`$", part, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model=vit", "data=digits", "remat=every_n", "retention=time", "ckpt=adaptive", "log=wandb"),
        ("model=resnet", "data=images", "data.path=.", "optim=muon", "schedule=wsd", "preempt=[signals,gce,slurm]"),
        ("model=vae", "data=digits", "eval=[metrics,samples,reconstructions]", "remat=auto", "retention=disk_budget"),
    ],
)
def test_every_key_of_a_run_is_on_it(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.image_folders.find_image_layout", lambda path, eval_path: None)
    assert [key for key in leaves(compose_run(words).config.document) if key not in KEYS] == []


def test_every_key_has_a_meaning() -> None:
    rows = re.findall(r"^\| `[\w.]+` \|.*\|$", TEXT, re.MULTILINE)
    assert len(rows) > 250
    assert [row for row in rows if row.endswith("|  |") and row.count("|") > 4] == []


def test_the_class_of_a_key_is_told() -> None:
    for key, kind in (
        ("train.steps", "resumable"),
        ("model.width", "identity"),
        ("ckpt.write", "free"),
        ("root", "free ·"),
    ):
        assert re.search(rf"^\| `{key}` \| [^|]+ \| [^|]+ \| {kind} \|", TEXT, re.MULTILINE), key
