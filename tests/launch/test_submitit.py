"""hydra-submitit-launcher carries our runs, and its handlers are called; other launchers are refused.

What needs submitit is skipped where it is not installed. tests/laws/test_slurm.py has it on a real Slurm.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from runner.config.schema import validate_config
from runner.errors import ConfigError
from runner.launch import submitit_sweep
from runner.launch.command_line import SweepRequest
from runner.launch.compose import compose
from runner.launch.hydra_errors import in_one_line
from runner.launch.main import main
from runner.launch.submitit_sweep import SubmititOptions, WorkerTask
from runner.launch.sweep_members import SweepMember
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from tests.config.test_config import changed
from tests.launch.test_sweep import STAND_IN, member

# A run that has the signal sent to its worker which is named by its first word, and then ends as the second says.
RUN = """
import os, signal, sys
signal.alarm(60)  # a signal that never comes
first, number, code = (int(word) for word in sys.argv[1:4])
signal.signal(first, lambda *_: os._exit(code)) if code != 143 else None
os.kill(os.getppid(), number) if number else os._exit(code)
signal.pause()
"""


class Requeued(BaseException):
    """What submitit's handler raises: SystemExit, told apart from ours."""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Does an errand in this process, where a handler of submitit's is: it listens to SIGUSR2, and ignores SIGTERM."""

    def requeue(*_: Any) -> None:
        raise Requeued

    (tmp_path / "run.py").write_text(RUN)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def do(number: int, code: int) -> int:
        words = ["++" + str(word) for word in (int(number or signal.SIGTERM), int(number), code)]
        job = {"job": {"name": "a-1"}, "overrides": {"task": words}}
        HydraConfig.instance().cfg = OmegaConf.create({"hydra": job})  # type: ignore[assignment]
        return WorkerTask((str(tmp_path / "run.py"),), (), tmp_path / "output")(None)

    yield do
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_that_ends_by_itself_is_not_requeued(worker: Callable[..., int]) -> None:
    assert [worker(0, code) for code in (0, 1, 4)] == [0, 1, 4]


def test_submitits_handler_hears_of_its_signal_when_the_run_has_saved(worker: Callable[..., int]) -> None:
    with pytest.raises(Requeued):
        worker(signal.SIGUSR2, 75)
    assert worker(signal.SIGTERM, 75) == 75  # outside Slurm: somebody wants it to stop
    assert worker(signal.SIGUSR2, 0) == 0  # it finished meanwhile
    signal.signal(signal.SIGUSR2, lambda *_: (_ for _ in ()).throw(RuntimeError("timed-out too many times")))
    assert worker(signal.SIGUSR2, 75) == 75


def test_in_a_slurm_job_every_stop_is_requeued_unless_slurm_ends_it(
    worker: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho JobId=7 JobState=RUNNING Restarts=0\n")
    scontrol.chmod(0o755)
    for number, code in ((signal.SIGTERM, 75), (0, 75), (signal.SIGTERM, 143)):
        with pytest.raises(Requeued):
            worker(number, code)
    scontrol.write_text("#!/bin/sh\necho JobId=7 JobState=COMPLETING Restarts=0\n")
    with pytest.raises(SystemExit) as ended:
        worker(signal.SIGTERM, 75)
    assert ended.value.code == 75


def test_what_is_finished_or_in_use_is_not_handed_on(tmp_path: Path) -> None:
    handed: list[Any] = []

    def carry(errand: WorkerTask, names: Any) -> list[Any]:
        handed.extend(names.values())
        return [2]

    sweep = [member(tmp_path / name, "ok") for name in ("a", "b", "c")]
    sweep[0].run_dir.path.mkdir()
    sweep[0].run_dir.status.write_text('{"state": "finished", "step": 1}')
    with lock_run(sweep[1].run_dir):
        results, code = submitit_sweep.run_members_on_workers(
            sweep, SubmititOptions("submitit_local", {}, carry), WorkerTask((), (), tmp_path / "output")
        )
    assert (handed, code) == (["c"], 1)
    assert [(result.state, result.code) for result in results] == [("finished", None), ("in use", None), ("failed", 2)]


def test_what_cannot_be_is_onein_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    for words in (["hydra/launcher=basic"], ["-m", "hydra/launcher=basic", "seed=0,1"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: hydra/launcher=basic: is not supported; leave it out ")
        assert error.count("\n") == 1
    absent = MissingConfigException("", "hydra/launcher/submitit_slurm", ["basic", "local", "slurm"])
    assert in_one_line(absent).startswith("hydra/launcher=submitit_slurm: needs the extra `submitit`; pip install ")
    with pytest.raises(ConfigError, match=r"^hydra.launcher.nodes: got 2; with submitit a run is one process; say 1$"):
        SubmititOptions("submitit_slurm", {"nodes": 2}, lambda *_: [])


# What the stand-in of a sweep does: one asks its worker once to be requeued, as it does at a time limit.
PLANTED = STAND_IN.replace(
    "place, *script = sys.argv[1:]",
    """place = Path(__file__).parent / sys.argv[-1]
script = {"seed=0": ["ok"], "seed=1": ["again", "ok"], "seed=2": ["wrong"]}[sys.argv[-1]]""",
).replace(
    'elif what == "raise":',
    """elif what == "again":
    signal.signal(signal.SIGUSR2, stopped)
    os.kill(os.getppid(), signal.SIGUSR2)
    signal.pause()
elif what == "raise":""",
)


def test_a_sweep_by_submitit_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All is valid before any is handed on; one is requeued by submitit; each is known by its own exit code."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs submitit, of the extra `submitit`")
    (tmp_path / "run.py").write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    words = ("-m", "hydra/launcher=submitit_local", "model=mlp", "data=digits")
    with pytest.raises(ConfigError, match=r"^seed: got -1"):
        compose([*words, "seed=0,-1"])
    request = compose([*words, "seed=0,1,2"])
    assert isinstance(request, SweepRequest)
    assert isinstance(request.launcher, SubmititOptions)
    config, names = validate_config(changed(train__steps=1, ckpt__last=False)), ("seed=0", "seed=1", "seed=2")
    assert [run.command.words[-1] for run in request.runs] == [*names]
    sweep = [SweepMember(config, (name,), RunDir(tmp_path / name), (name,)) for name in names]
    results, code = submitit_sweep.run_members_on_workers(
        sweep, request.launcher, WorkerTask(("run.py",), (), tmp_path / "output")
    )
    found = [
        (result.state, len(list(each.run_dir.path.glob("try-*"))), result.code)
        for each, result in zip(sweep, results, strict=True)
    ]
    assert code == 1
    assert found == [("finished", 1, 0), ("finished", 2, 0), ("failed", 1, 2)]
    assert "something: is wrong" in (tmp_path / "output/seed_2.txt").read_text()
    assert {path.name for path in tmp_path.glob("outputs/default/.sweep/*")} == {".submitit"}
