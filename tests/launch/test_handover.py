"""What was checked is what runs: the same words in another environment, and the run's own word of how it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runner.errors import RefusedError
from runner.launch import sweep_members
from runner.launch.command_line import RunRequest
from runner.launch.compose import compose
from runner.launch.handover import CHECKED, describe_checked, take_checked_run
from runner.launch.sweep_members import SweepMember
from runner.rundir.layout import RunDir
from runner.session.standing import find_run
from tests.conftest import Door

WORDS = ("model=mlp", "data=digits", "train.steps=2", "train.eval_steps=1", "log.tensorboard=false")


def request_of(*words: str) -> RunRequest:
    request = compose([*WORDS, *words])
    assert isinstance(request, RunRequest)
    return request


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CHECKED, raising=False)


@pytest.mark.parametrize("word", ["name=n-${oc.env:WHO}", "root=${oc.env:WHO}", "seed=${oc.decode:${oc.env:WHO}}"])
def test_another_environment_is_refused(word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHO", "1")
    word = word.replace("=", "='", 1) + "'"
    for name, value in describe_checked(request_of(word).config, RunDir(tmp_path / "r")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WHO", "2")
    with pytest.raises(RefusedError, match="this configuration is not the one that was checked"):
        take_checked_run(request_of(word).config)


def test_a_file_of_conf_that_changed_in_between_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    mine = tmp_path / "conf/experiment/mine.yaml"
    mine.write_text("# @package _global_\noptim: {lr: 0.1}\n")
    monkeypatch.setenv(CHECKED, describe_checked(request_of("experiment=mine").config, RunDir(tmp_path))[CHECKED])
    mine.write_text("# @package _global_\noptim: {lr: 0.2}\n")
    with pytest.raises(RefusedError, match="a file of conf/ is different here"):
        take_checked_run(request_of("experiment=mine").config)


def test_the_same_is_taken_once_with_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a space in it. What the process starts itself is for other runs."""
    config, run = request_of("seed=1").config, RunDir(tmp_path / "a b" / "run")
    monkeypatch.setenv(CHECKED, describe_checked(config, run)[CHECKED])
    taken = take_checked_run(config)
    assert taken == run
    assert CHECKED not in os.environ
    assert take_checked_run(config) is None
    assert find_run(config, (), taken) == run


def test_data_at_another_place_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job has its data in a folder of its own."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text " * 100)
    words = ["data=text", "model=gpt", "train.steps=2"]
    here, there = (compose([*words, f"data.path={name}.txt"]) for name in "ab")
    assert isinstance(here, RunRequest)
    assert isinstance(there, RunRequest)
    monkeypatch.setenv(CHECKED, describe_checked(here.config, RunDir(tmp_path / "r"))[CHECKED])
    assert take_checked_run(there.config) == RunDir(tmp_path / "r")


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"state": "finished", "step": 2}, "finished"),
        ({"state": "finished", "step": 1}, "failed"),
        ({"state": "running", "step": 2}, "failed"),
        (None, "failed"),
    ],
)
def test_finished_is_the_run_s_own_word(status: dict[str, object] | None, state: str, tmp_path: Path) -> None:
    config = request_of("ckpt=none").config
    member = SweepMember(config, (), RunDir(tmp_path / "run"), ())
    if status is not None:
        (tmp_path / "run/checkpoints/2").mkdir(parents=True)
        (tmp_path / "run/status.json").write_text(json.dumps(status))
    said, why = sweep_members.classify_exit(member, 0, "")
    assert said == state
    assert ("its process ended well, but" in why) == (state == "failed")


def test_a_sweep_named_by_the_environment_finds_its_runs(door: Door) -> None:
    done = door.run("-m", *WORDS, "name=n-${oc.env:WHO}", "seed=0,1", WHO="me")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "2 runs: 2 finished" in done.stdout
    assert "seed=1  finished   2/2" in done.stdout
    runs = [path.parent for path in door.cwd.glob("outputs/n-me/*/config.yaml")]
    assert len(runs) == 2
    # As it was typed: what a variable held may be a secret.
    commands = [json.loads((run / "attempts.jsonl").read_text().splitlines()[0])["command"] for run in runs]
    assert all("WHO" in " ".join(command) and "n-me" not in " ".join(command) for command in commands)
    # It is the run that is started alone: nothing of the sweep is in its configuration.
    assert all("\ndir: null\n" in (run / "config.yaml").read_text() for run in runs)
