"""A search: each trial is a run, what was suggested is kept, and a search that is typed again goes on.

What needs Optuna is skipped where it is not installed; `test_what_is_not_installed_is_named` is for that case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from runner.config.schema import validate_config
from runner.errors import ConfigError, RefusedError
from runner.launch import sweep
from runner.launch.command_line import RunRequest
from runner.launch.local_sweep import LocalOptions
from runner.launch.main import main
from runner.launch.study import STUDY_JSON, SearchOptions, Study, choose_direction, read_score
from runner.launch.sweep_members import SweepMember
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from tests.config.test_config import changed
from tests.conftest import Door
from tests.launch.test_sweep import STAND_IN, member, tries

TYPED = ("++optim.lr=interval(1e-4,1e-1)", "model=mlp")


def study_at(tmp_path: Path, **option: Any) -> Study:
    return Study(tmp_path / "study", SearchOptions(**option), "minimize", TYPED)


def command(tmp_path: Path) -> list[str]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return [sys.executable, str(tmp_path / "stand_in.py")]


def test_what_was_suggested_before_wins(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    assert [study.recall_or_record(number, "optim.lr", value) for number, value in enumerate((0.1, 0.2))] == [0.1, 0.2]
    with study.lock:
        study.work_on_batch([member(tmp_path / "a", "ok")], LocalOptions(), command(tmp_path))
    again = study_at(tmp_path)
    assert [again.recall_or_record(number, "optim.lr", 0.3) for number in range(3)] == [0.1, 0.2, 0.3]
    with again.lock:  # the first trial of a new start forgets none of the others
        again.work_on_batch([member(tmp_path / "a", "ok")], LocalOptions(), command(tmp_path))
    kept = json.loads((tmp_path / "study" / STUDY_JSON).read_text())
    assert kept["trials"] == [{"optim.lr": 0.1}, {"optim.lr": 0.2}, {"optim.lr": 0.3}]
    assert kept["search"] == ["optim.lr=interval(1e-4,1e-1)", "model=mlp"]


def test_trials_that_are_one_run_are_run_once(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    with study.lock:
        first = study.work_on_batch([member(tmp_path / "a", "ok")] * 2, LocalOptions(parallel=2), command(tmp_path))
        then = study.work_on_batch([member(tmp_path / name, "ok") for name in "ba"], LocalOptions(), command(tmp_path))
    assert (first, then) == ((0, [0.5, 0.5]), (0, [0.5, 0.5]))
    assert [len(tries(tmp_path, name)) for name in "ab"] == [1, 1]
    rows = json.loads((tmp_path / "study/sweep.json").read_text())["runs"]
    assert [Path(row["directory"]).name for row in rows] == ["a", "b"]


def test_a_failed_trial_has_no_score_and_is_not_tried_with_every_batch(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    with study.lock:
        assert study.work_on_batch([member(tmp_path / "a", "raise")], LocalOptions(retries=0), command(tmp_path)) == (
            1,
            [None],
        )
        batch = [member(tmp_path / "a", "raise"), member(tmp_path / "b", "ok")]
        assert study.work_on_batch(batch, LocalOptions(retries=0), command(tmp_path)) == (0, [None, 0.5])
    assert len(tries(tmp_path, "a")) == 1
    assert [result.state for result in study.results] == ["failed", "finished"]


def test_a_search_that_goes_is_not_begun_twice(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    with lock_run(RunDir(study.folder)), study.lock, pytest.raises(RefusedError, match="in use"):
        study.work_on_batch([member(tmp_path / "a", "ok")], LocalOptions(), command(tmp_path))
    assert not (tmp_path / "a").exists()


def test_a_score_is_a_number_of_a_finished_run(tmp_path: Path) -> None:
    run = member(tmp_path / "a")
    run.run_dir.path.mkdir()
    for state, value, expected in (
        ("finished", 0.5, 0.5),
        ("finished", float("nan"), None),
        ("finished", float("inf"), None),
        ("finished", None, None),
        ("running", 0.5, None),
    ):
        run.run_dir.path.joinpath("status.json").write_text(json.dumps({"state": state, "step": 1, "score": value}))
        assert read_score(run) == expected, (state, value)


def test_the_score_says_which_way_is_better() -> None:
    assert [choose_direction(None, mode) for mode in ("min", "max")] == ["minimize", "maximize"]
    assert choose_direction("maximize", "max") == "maximize"
    with pytest.raises(ConfigError, match="direction: got minimize; expected maximize, as score.mode=max says"):
        choose_direction("minimize", "max")


def test_the_best_is_told_as_the_score_means_it(tmp_path: Path) -> None:
    for way, best in (("minimize", "a"), ("maximize", "b")):
        study = Study(tmp_path / way, SearchOptions(), way, TYPED)
        with study.lock:
            study.work_on_batch([member(tmp_path / name, "ok") for name in "ab"], LocalOptions(), command(tmp_path))
        for name, value in (("a", 0.25), ("b", 0.75)):
            path = tmp_path / name / "status.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "score": value}))
        (line,) = [line for line in study.summary_lines() if line.startswith("best: ")]
        assert line.endswith(f"/{best}")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Plugins.instance()  # has looked for plugins
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "sampler", raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert main(["-m", "hydra/sweeper=optuna", "seed=0,1"]) == 2
    said = capsys.readouterr().err
    assert "error: hydra/sweeper=optuna: needs the extra `search`; pip install" in said
    assert said.count("\n") == 1
    assert main(["hydra/sweeper=optuna"]) == 2
    assert "add -m" in capsys.readouterr().err


@pytest.fixture
def optuna() -> None:
    pytest.importorskip("optuna", reason="needs Optuna, of the extra `search`")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs Optuna, of the extra `search`")


class Searching:
    """`python run.py -m hydra/sweeper=optuna …` in this process; the runs are the stand-in, and do what `script` says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.place, self.script = tmp_path, dict[str, str]()
        monkeypatch.setattr(sys, "argv", [command(tmp_path)[-1]])
        monkeypatch.setattr(sweep, "_admit_members", self._stand_ins)
        monkeypatch.chdir(tmp_path)

    def type(self, *words: str) -> int:
        return main(["-m", "hydra/sweeper=optuna", "hydra.launcher.retries=0", "model=mlp", "data=digits", *words])

    def _stand_ins(self, runs: Sequence[RunRequest]) -> list[SweepMember]:
        batch = []
        for run in runs:
            (own,) = [word for word in run.command.words if word.startswith("optim.lr=")]
            folder = self.place / own
            config = validate_config(changed(train__steps=1, ckpt__last=False))
            batch.append(SweepMember(config, (str(folder), self.script.get(own, "ok")), RunDir(folder), (own,)))
        return batch

    def tried(self) -> dict[str, int]:
        return {path.name: len(tries(self.place, path.name)) for path in self.place.glob("optim.lr=*")}

    @property
    def study(self) -> Path:
        (found,) = self.place.glob("outputs/default/.sweep/*/study.json")
        return found.parent


@pytest.fixture
def searching(optuna: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searching:
    return Searching(tmp_path, monkeypatch)


LR = "optim.lr=tag(log, interval(1e-4, 1e-1))"


def test_trials_are_counted_in_all_and_none_is_run_again(searching: Searching) -> None:
    assert searching.type("hydra.sweeper.n_trials=2", LR) == 0
    assert searching.type("hydra.sweeper.n_trials=4", LR, "hydra.launcher.parallel=2") == 0
    assert list(searching.tried().values()) == [1] * 4
    trials = json.loads((searching.study / "study.json").read_text())["trials"]
    assert {f"optim.lr={trial['optim.lr']}" for trial in trials} == searching.tried().keys()
    assert "best_value: 0.5" in (searching.study / "optimization_results.yaml").read_text()


def test_a_failing_trial_does_not_end_the_search(searching: Searching, capfd: pytest.CaptureFixture[str]) -> None:
    searching.script = {"optim.lr=1.0": "raise"}
    assert searching.type("hydra.sweeper.n_trials=6", "optim.lr=choice(0.1, 1.0)") == 1
    assert searching.tried() == {"optim.lr=0.1": 1, "optim.lr=1.0": 1}
    searching.script = {}
    assert searching.type("hydra.sweeper.n_trials=6", "optim.lr=choice(0.1, 1.0)") == 0
    assert searching.tried() == {"optim.lr=0.1": 1, "optim.lr=1.0": 2}
    assert capfd.readouterr().err == ""


def test_a_search_may_fail_altogether(searching: Searching, capfd: pytest.CaptureFixture[str]) -> None:
    searching.script = {"optim.lr=0.1": "raise", "optim.lr=1.0": "raise"}
    assert searching.type("hydra.sweeper.n_trials=4", "optim.lr=choice(0.1, 1.0)") == 1
    assert set(searching.tried().values()) == {1}
    assert searching.type("hydra.sweeper.n_trials=4", "hydra.sweeper.max_failure_rate=0.5", "optim.lr=0.1,1.0") == 1
    assert (
        capfd.readouterr().err
        == "error: 1 of the last 1 trials failed; hydra.sweeper.max_failure_rate=0.5 allows no more\n"
    )


def test_a_stop_ends_the_search_and_fails_no_trial(searching: Searching) -> None:
    def stop() -> None:
        while not searching.tried():
            time.sleep(0.01)
        time.sleep(0.2)  # the stand-in listens before it writes
        os.kill(os.getpid(), signal.SIGTERM)

    assert searching.type("hydra.sweeper.n_trials=1", LR) == 0
    (first,) = searching.tried()
    (searching.place / first).rename(searching.place / "aside")
    searching.script = {first: "hold"}
    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    assert searching.type("hydra.sweeper.n_trials=4", LR) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert searching.tried() == {first: 1}
    assert len(json.loads((searching.study / "study.json").read_text())["trials"]) == 1


def test_a_wrong_search_is_refused_before_it_begins(searching: Searching, capfd: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("hydra.sweeper.n_trials=0",), "hydra.sweeper.n_trials: got 0; expected at least 1"),
        (("hydra.sweeper.direction=maximize",), "expected minimize, as score.mode=min says"),
        (("hydra/sweeper/sampler=grid",), "hydra/sweeper/sampler: got grid; expected one of cmaes"),
        (("hydra/launcher=basic",), "on this machine; leave hydra/launcher out"),
        (("optim.sl=1",), "optim.sl: unknown key"),
        (("hydra.sweeper.n_trails=3",), "hydra.sweeper.n_trails: unknown key; did you mean n_trials?"),
    ):
        assert searching.type(LR, *words) == 2, words
        error = capfd.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (searching.place / "outputs").exists()


@pytest.mark.slow
def test_a_search_in_pieces_suggests_what_one_piece_does(
    optuna: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the ten trials that the sampler draws before it looks at scores."""
    own_score = '"score": __import__("zlib").crc32(place.name.encode()) / 2**32'
    monkeypatch.setattr(sys.modules[__name__], "STAND_IN", STAND_IN.replace('"score": 0.5', own_score))
    trials = []
    for name, starts in (("whole", (13,)), ("pieces", (4, 11, 13))):
        (tmp_path / name).mkdir()
        searching = Searching(tmp_path / name, monkeypatch)
        for count in starts:
            assert (
                searching.type(f"hydra.sweeper.n_trials={count}", LR, "seed=range(0,5)", "schedule=constant,cosine")
                == 0
            )
        trials.append(json.loads((searching.study / STUDY_JSON).read_text())["trials"])
    assert trials[0] == trials[1]
    assert len(trials[0]) == 13


@pytest.mark.slow
def test_an_experiment_may_say_that_it_is_a_search(searching: Searching) -> None:
    (searching.place / "experiment").mkdir()
    (searching.place / "experiment/rates.yaml").write_text(RATES)
    argv = ["-cd", ".", "-m", "experiment=rates"]
    assert main(argv) == 0
    assert sum(searching.tried().values()) == 3
    document = json.loads((searching.study / "study.json").read_text())
    assert [list(trial) for trial in document["trials"]] == [["optim.lr"]] * 3


RATES = """
# @package _global_
defaults:
  - override /model: mlp
  - override /data: digits
  - override /hydra/sweeper: optuna
hydra:
  sweeper:
    n_trials: 3
    params:
      optim.lr: tag(log, interval(1e-4, 1e-1))
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_to_its_number_of_trials(optuna: None, door: Door) -> None:
    """Eight trials, SIGKILL after three, typed again: what was finished has one attempt and is not touched."""
    words = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", LR, "model=mlp", "data=digits", "train.steps=40")
    process = door.start(*words)
    while len(done := finished(door)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.read_bytes() for path in done}
    ended = door.run(*words)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    assert len(finished(door)) == 8
    assert before == {path: path.read_bytes() for path in before}
    attempts = {path.parent: (path.parent / "attempts.jsonl").read_text().count("\n") for path in finished(door)}
    assert all(attempts[path.parent] == 1 for path in before)
    assert sum(attempts.values()) <= 9
    again = door.run(*words)
    assert (again.returncode, "running" in again.stdout) == (0, False)
    assert again.stdout.splitlines()[-4:] == ended.stdout.splitlines()[-4:]


def finished(door: Door) -> list[Path]:
    paths = door.cwd.glob("outputs/default/*/status.json")
    return [path for path in paths if json.loads(path.read_text())["state"] == "finished"]
