"""A `conf/` of the user's own, where the command is typed: what it adds, what it replaces, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import ConfigError
from runner.launch import compose as composing
from runner.launch.compose import compose_run
from runner.launch.conf_folders import list_conf_folders
from tests.conftest import REPO, Door

MINE = "# Mine.\nkind: mlp\nwidth: 24\n"
QUICK = "# @package _global_\n# Quick.\ndefaults: [override /model: mine, override /data: digits]\nname: quick\n"
DIGITS = ("model=mlp", "data=digits")

WriteChoice = Callable[[str, str], Path]


@pytest.fixture
def write_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteChoice:
    """Write a file of conf/ in the working directory, which is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def error_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose_run(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_adds_options_and_experiments(write_choice: WriteChoice) -> None:
    write_choice("model/mine.yaml", MINE)
    write_choice("experiment/quick.yaml", QUICK)
    for argv in (("model=mine", "data=digits"), ("experiment=quick",)):
        assert compose_run(argv).config.document["model"]["width"] == 24
    assert compose_run(["experiment=quick", "model.width=25"]).config.document["model"]["width"] == 25


def test_it_replaces_options_of_the_same_name(write_choice: WriteChoice) -> None:
    assert compose_run(DIGITS).config.document["model"]["width"] == 128
    write_choice("model/mlp.yaml", MINE)
    assert compose_run(DIGITS).config.document["model"]["width"] == 24


def test_a_new_group_is_no_key(write_choice: WriteChoice) -> None:
    write_choice("colour/red.yaml", "shade: dark\n")
    assert error_of("colour=red", *DIGITS) == "colour: unknown key"


def test_the_help_lists_it(door: Door) -> None:
    (door.cwd / "conf/model").mkdir(parents=True)
    (door.cwd / "conf/model/mine.yaml").write_text(MINE)
    shown = door.run("--help").stdout
    assert "\nmodel: cnn, external, gpt, gpt2_124m, gpt_7b, hf, mine, mlp," in shown


def test_errors_name_its_options(write_choice: WriteChoice) -> None:
    write_choice("model/mine.yaml", MINE)
    assert error_of("model=mime").endswith("gpt_7b, hf, mine, mlp, resnet, vae, vit; did you mean mine?")


def test_the_checkout_is_not_its_own_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert list_conf_folders() == [REPO / "conf"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\nb: 2\n", "conf/model/mine.yaml, line 2: did not find expected ',' or ']'; it cannot be read as YAML"),
        ("kind: mlp\nkind: cnn\n", "conf/model/mine.yaml, line 2: found duplicate key kind; it cannot be read as YAML"),
        ("hello\n", "model: has no kind, which says what it is; write model={kind: …}, as the files in conf/ do"),
        ("kind: mlp\nwidht: 3\n", "model.widht: unknown key; did you mean width?"),
    ],
)
def test_a_file_that_is_wrong_is_named(text: str, says: str, write_choice: WriteChoice) -> None:
    write_choice("model/mine.yaml", text)
    assert error_of("model=mine", "data=digits") == says


def test_a_file_in_another_encoding_is_refused(write_choice: WriteChoice) -> None:
    write_choice("model/mine.yaml", "").write_bytes(b"kind: mlp # \xff\n")
    assert error_of("model=mine", "data=digits") == "conf/model/mine.yaml: is not written in UTF-8 (byte 12)"


def test_a_file_that_may_not_be_read_is_named(write_choice: WriteChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_choice("model/mine.yaml", MINE)

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # Not by its mode, which does not bind root.
    monkeypatch.setattr(composing, "drive_hydra", refuse)
    assert error_of("model=mine", "data=digits") == f"{path}: Permission denied"


def test_an_experiment_without_its_package_line_is_explained(write_choice: WriteChoice) -> None:
    write_choice("experiment/quick.yaml", "train: {steps: 3}\n")
    says = error_of("experiment=quick", *DIGITS)
    assert says.startswith("experiment=quick: its file sets a group of that name; begin it with the line `# @package")


def test_a_config_of_another_program_is_named(write_choice: WriteChoice) -> None:
    write_choice("config.yaml", "defaults: [model: resnet50, _self_]\nlr: 0.1\n")
    write_choice("model/resnet50.yaml", "name: resnet50\n")
    assert error_of(*DIGITS) == "data: unknown key (conf/config.yaml is used in place of the product's own)"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda conf: conf.write_text("hello"), "Not a directory"),
        (lambda conf: conf.symlink_to("nowhere"), "No such file or directory"),
    ],
)
def test_what_is_no_folder_is_refused(
    make: Callable[[Path], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "conf")
    assert error_of(*DIGITS).startswith(f"{tmp_path}/conf: {reason}; `conf` of the working directory is where choices")


def test_a_folder_that_may_not_be_read_is_refused(write_choice: WriteChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_choice("model/mine.yaml", MINE).parents[1]
    iterdir = Path.iterdir

    def refuse(path: Path) -> object:
        if path == folder:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert error_of(*DIGITS).startswith(f"{folder}: Permission denied; ")
