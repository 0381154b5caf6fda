"""docs/recipes.md, followed literally on copies of the repository: files are written, changes made, commands typed."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import HANG_SECONDS, REPO
from tests.docs.pages import PAGES, RECIPES, Block, find_blocks, shell_lines, split_sections

SECTIONS = {title: part for title, part in split_sections(PAGES[RECIPES]).items() if title.startswith("Add ")}
REFERENCE = "docs/reference.md"  # written by a program, for all recipes in the last test
COPIED = ("conf", "data", "docs", "models", "runner", "tests", "run.py", "README.md", "pyproject.toml")


def copy_repository(target: Path) -> Path:
    """Copy what the recipes change and what their commands need."""
    target.mkdir()
    for name in COPIED:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, target / name, ignore=shutil.ignore_patterns("*.pyc", "images", ".*"))
        else:
            shutil.copy2(REPO / name, target / name)
    return target


def apply_block(block: Block, root: Path) -> None:
    """Write the file of a block, or change it where the block is a diff: what it replaces must be there just once."""
    path = root / block.file
    if block.language != "diff":
        assert not path.exists(), f"{block.file} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return
    lines = block.text.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text()
    assert f"\n{text}".count(f"\n{before}") == 1, f"{block.file} has not, or not once:\n{before}"
    path.write_text(f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:])


def follow(title: str, root: Path) -> list[Block]:
    """Apply every block of a recipe that names a file, and return all of its blocks."""
    blocks = find_blocks(SECTIONS[title])
    for block in blocks:
        if block.file:
            apply_block(block, root)
    return blocks


def type_command(line: str, root: Path) -> str:
    """Type a line in the copy and return what it says. It must end well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(root)}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    return done.stdout


def the_run(root: Path) -> Path:
    (config,) = root.glob("outputs/*/*/config.yaml")
    return config.parent


def last_status(root: Path) -> dict:
    return json.loads((the_run(root) / "status.json").read_text())


def a_model_trains_and_is_recomputed(root: Path, said: list[str]) -> None:
    assert last_status(root)["state"] == "finished"
    config = yaml.safe_load((the_run(root) / "config.yaml").read_text())
    assert config["remat"]["kind"] == "full"  # refused where no block is marked
    assert "residual_mlp, " in said[1]


def a_dataset_is_learned(root: Path, said: list[str]) -> None:
    assert last_status(root)["last"]["eval/accuracy"] > 0.9  # a straight line reaches a half


def a_retention_rule_keeps(root: Path, said: list[str]) -> None:
    steps = {int(path.name) for path in (the_run(root) / "checkpoints").iterdir() if path.name.isdecimal()}
    assert {10, 20, 30} <= steps
    assert 40 not in steps
    assert "first 3" in said[1]


def a_logger_has_every_value(root: Path, said: list[str]) -> None:
    lines = map(json.loads, (the_run(root) / "logs/metrics.jsonl").read_text().splitlines())
    values = [
        [str(line["step"]), line["split"], name, str(value)]
        for line in lines
        for name, value in line.items()
        if name not in ("step", "split")
    ]
    rows = [*csv.reader((the_run(root) / "logs/metrics.csv").open())]
    assert rows == [["step", "split", "name", "value"], *values]
    assert rows[-1][0] == "40"


def a_notice_stops_the_run(root: Path, said: list[str]) -> None:
    status = last_status(root)
    assert status["state"] == "preempted"
    assert "drain file" in (the_run(root) / "logs/run.log").read_text()


def a_verb_says_what_was_measured(root: Path, said: list[str]) -> None:
    rows = dict(line.split()[:2] for line in said[1].splitlines())
    assert float(rows["eval/loss"]) == pytest.approx(last_status(root)["last"]["eval/loss"], rel=1e-4)


# What each recipe has to show, from the copy and from what its commands said.
SHOWS: dict[str, Callable[[Path, list[str]], None]] = {
    "Add a model": a_model_trains_and_is_recomputed,
    "Add a dataset": a_dataset_is_learned,
    "Add a retention rule": a_retention_rule_keeps,
    "Add a preemption source": a_notice_stops_the_run,
    "Add a logger": a_logger_has_every_value,
    "Add a verb": a_verb_says_what_was_measured,
}


def test_each_recipe_is_followed() -> None:
    assert SECTIONS.keys() == SHOWS.keys()


# Each recipe trains something on a copy of its own. Two of them always; all with `pytest -m slow tests/docs`.
ALWAYS = ("Add a retention rule", "Add a verb")


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=() if title in ALWAYS else pytest.mark.slow) for title in SHOWS]
)
def test_a_recipe_works_as_written(title: str, tmp_path: Path) -> None:
    root = copy_repository(tmp_path / "copy")
    blocks = follow(title, root)
    listed = set(re.findall(r"^\| `([^`]+)` \|", SECTIONS[title], re.MULTILINE))
    assert REFERENCE in listed
    changed = {block.file for block in blocks if block.file}
    assert listed == {*changed, REFERENCE}, "the list of files is not what the blocks change"
    said = []
    for line in shell_lines(blocks):
        said.append(type_command(line.replace("RUN", str(the_run(root))) if "RUN" in line else line, root))
    SHOWS[title](root, said)


def test_the_repository_agrees_with_all_of_them(tmp_path: Path) -> None:
    """With every recipe followed at once: the linter, the order of the rooms, and the tests that know every choice."""
    root = copy_repository(tmp_path / "copy")
    shutil.copytree(REPO / "docs" / "images", root / "docs" / "images")
    for title in SHOWS:
        follow(title, root)
    checked = [block.file for title in SHOWS for block in find_blocks(SECTIONS[title]) if block.file.endswith(".py")]
    type_command(f"ruff check --no-cache {' '.join(checked)}", root)
    type_command(f"ruff format --no-cache --check {' '.join(checked)}", root)
    type_command("python -m tests.docs.reference --write", root)
    tests = [
        "tests/docs/test_reference.py",
        "tests/config/test_every_choice.py::test_no_choice_is_left_out",
        "tests/laws/test_breadth.py::test_no_model_and_no_source_is_left_out",
        "tests/docs/test_pages.py::test_its_tables_name_every_choice",
        "tests/docs/test_pages.py::test_every_verb_is_shown",
        "tests/docs/test_pages.py::test_its_verbs_take_what_is_typed",
    ]
    type_command(f"pytest -p no:cacheprovider {' '.join(tests)}", root)
