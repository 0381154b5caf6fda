"""Many runs: which are started, beside each other, again and not again; what a signal and a dead parent do to them.

A stand-in for `run.py` ends as it is told and leaves what a run leaves; the laws at the end use the real one.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runner.config.schema import read_document, validate_config
from runner.errors import ConfigError
from runner.launch import local_sweep, status_table, sweep_members
from runner.launch.command_line import RunRequest, SweepRequest
from runner.launch.compose import compose
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.sweep_members import MemberResult, SweepMember
from runner.rundir.layout import RunDir
from runner.text import keep_end
from tests.config.test_config import changed
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door, assert_same, last_logged, write_corpus

STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

place, *script = sys.argv[1:]
place = Path(place)
place.mkdir(parents=True, exist_ok=True)
note = {"cores": sorted(os.sched_getaffinity(0)), "pid": os.getpid(), "began": time.time()}
count = len(list(place.glob("try-*")))
tell = place / f"try-{count}"
lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    tell.write_text(json.dumps(note))
    sys.exit(print("error: in use by somebody", file=sys.stderr) or 3)

def status(state, **more):
    (place / ".s").write_text(json.dumps({"state": state, "step": 1, "score": 0.5, **more}))
    (place / ".s").rename(place / "status.json")

def stopped(*_):
    status("preempted", why="SIGTERM")
    (place / "saved").write_text("")
    os._exit(75)

signal.signal(signal.SIGTERM, stopped)
status("running")
tell.write_text(json.dumps(note))
what, _, more = script[min(count, len(script) - 1)].partition(":")
time.sleep(float(os.environ.get("SECONDS", "0.05")))
if what == "ok":
    status("finished", best={"metric": "eval/loss", "value": 0.5, "step": 1})
elif what == "raise":
    raise RuntimeError("planted")
elif what == "wrong":
    sys.exit(print("error: something: is wrong", file=sys.stderr) or 2)
elif what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "notice":
    status("preempted", why=more)
    sys.exit(75)
elif what == "died":  # one of its processes did, as hosts=local tells it
    sys.exit(print("[0] died of SIGKILL (out of memory?)", file=sys.stderr) or 137)
elif what == "lost":
    attempt = {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "lost_process": True}
    status("preempted", why="process 1 is gone", attempt=attempt)
    sys.exit(75)
elif what == "hold":
    status("running")
    time.sleep(600)
note["ended"] = time.time()
tell.write_text(json.dumps(note))
"""


class Watching:
    """A board that remembers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def show_change(self, number: int, result: MemberResult) -> None:
        self.told.append((number, result.state))

    def show(self, results: Sequence[MemberResult]) -> None:
        return None


def member(folder: Path, *script: str) -> SweepMember:
    """A run that does this at its first try, at its second, …"""
    config = validate_config(changed(train__steps=1, ckpt__last=False))
    return SweepMember(config, (str(folder), *script), RunDir(folder), (f"run={folder.name}",))


def swept(
    tmp_path: Path, scripts: dict[str, tuple[str, ...]], **option: Any
) -> tuple[list[MemberResult], int, Watching]:
    stand_in, board = tmp_path / "stand_in.py", Watching()
    stand_in.write_text(STAND_IN)
    sweep = [member(tmp_path / name, *script) for name, script in scripts.items()]
    command = [sys.executable, str(stand_in)]
    results, code = local_sweep.run_members(sweep, LocalOptions(**option), command, tmp_path / "output", board)
    return results, code, board


def tries(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("try-*"))]


def states(results: Sequence[MemberResult]) -> list[str]:
    return [result.state for result in results]


def test_a_failing_run_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    scripts = {"a": ("raise",), "b": ("ok",), "c": ("kill", "ok"), "d": ("wrong",), "e": ("ok",)}
    results, code, _ = swept(tmp_path, scripts)
    assert states(results) == ["failed", "finished", "finished", "failed", "finished"]
    assert code == 1
    assert [result.tries for result in results] == [2, 1, 2, 1, 1]  # a wrong configuration stays wrong
    assert results[0].why == "RuntimeError: planted"
    assert results[3].why == "something: is wrong"


def test_a_run_that_lost_one_of_its_processes_is_tried_again_and_stops_no_other(tmp_path: Path) -> None:
    results, code, _ = swept(tmp_path, {"a": ("lost", "ok"), "b": ("lost",), "c": ("ok",), "d": ("died",)})
    assert (code, states(results)) == (1, ["finished", "failed", "finished", "failed"])
    assert [result.tries for result in results] == [2, 2, 1, 2]
    assert [results[number].why for number in (1, 3)] == ["process 1 is gone", "[0] died of SIGKILL (out of memory?)"]


def test_a_reason_is_what_the_run_wrote_down(tmp_path: Path) -> None:
    """The last line of a traceback may be jax's."""
    broken = member(tmp_path / "a")
    broken.run_dir.path.mkdir()
    broken.run_dir.status.write_text(json.dumps({"state": "failed", "why": "RuntimeError: planted"}))
    assert sweep_members.classify_exit(broken, 1, "RuntimeError: planted\nFor simplicity, …") == (
        "failed",
        "RuntimeError: planted",
    )
    assert sweep_members.classify_exit(broken, -signal.SIGKILL, "step 3") == ("failed", "died of SIGKILL")
    assert sweep_members.classify_exit(broken, 2, "error: optim.lr: got -1") == ("failed", "optim.lr: got -1")


def test_what_is_finished_is_not_started_again(tmp_path: Path) -> None:
    scripts = {"a": ("ok",), "b": ("raise",)}
    assert swept(tmp_path, scripts, retries=0)[1] == 1
    results, code, board = swept(tmp_path, {"a": ("ok",), "b": ("raise", "ok"), "c": ("ok",)}, retries=0)
    assert code == 0
    assert states(results) == ["finished"] * 3
    assert [len(tries(tmp_path, name)) for name in "abc"] == [1, 2, 1]
    assert {number for number, _ in board.told} == {1, 2}


def test_finished_is_what_has_all_its_steps_and_its_last_checkpoint(tmp_path: Path) -> None:
    swept(tmp_path, {"a": ("ok",)})
    short = member(tmp_path / "a")
    assert short.is_finished
    longer = validate_config(changed(train__steps=2, ckpt__last=False))
    saved = validate_config(changed(train__steps=1))
    for config in (longer, saved):
        assert not SweepMember(config, short.words, short.run_dir, ()).is_finished
    (tmp_path / "a/checkpoints/1").mkdir(parents=True)
    assert SweepMember(saved, short.words, short.run_dir, ()).is_finished


def test_runs_beside_each_other_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDS", "0.6")
    results, code, _ = swept(tmp_path, {name: ("ok",) for name in "abcd"}, parallel=2)
    assert (states(results), code) == (["finished"] * 4, 0)
    spans = [tries(tmp_path, name)[0] for name in "abcd"]
    beside = [
        sum(other["began"] < span["ended"] and span["began"] < other["ended"] for other in spans) for span in spans
    ]
    assert max(beside) >= 2
    moments = sorted(span["began"] for span in spans)
    assert all(sum(span["began"] <= at < span["ended"] for span in spans) <= 2 for at in moments)
    if len(os.sched_getaffinity(0)) >= 2:
        used = {frozenset(span["cores"]) for span in spans}
        assert len(used) == 2
        assert not frozenset.intersection(*used)
        assert frozenset.union(*used) == os.sched_getaffinity(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_run_and_starts_no_other(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def when_both_go() -> None:
        while not all((tmp_path / name / "try-0").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    stand_in = STAND_IN.replace("signal.SIGTERM, stopped", f"{number}, stopped")
    monkeypatch.setattr(sys.modules[__name__], "STAND_IN", stand_in)
    before = signal.getsignal(number)
    threading.Thread(target=when_both_go).start()
    results, code, _ = swept(tmp_path, {"a": ("hold",), "b": ("hold",), "c": ("ok",)}, parallel=2)
    assert (states(results), code) == (["stopped", "stopped", "waiting"], 75)
    assert all((tmp_path / name / "saved").exists() for name in "ab")
    assert signal.getsignal(number) == before


def test_a_notice_to_one_run_is_one_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDS", "0.3")
    results, code, _ = swept(tmp_path, {"a": ("notice:SIGUSR1",), "b": ("hold",), "c": ("ok",)}, parallel=2)
    assert (states(results), code) == (["stopped", "stopped", "waiting"], 75)


def test_the_file_stop_rests_one_run_only(tmp_path: Path) -> None:
    results, code, _ = swept(tmp_path, {"a": (f"notice:{local_sweep.STOP_FILE}",), "b": ("ok",)})
    assert (states(results), code) == (["stopped", "finished"], 75)


def test_a_run_in_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has it may be a run whose sweep was killed: it saves, and lets go."""
    monkeypatch.setattr(local_sweep, "IN_USE_SECONDS", 0.05)
    monkeypatch.setattr(local_sweep, "IN_USE_TRIES", 1000)
    holder = subprocess.Popen(
        [sys.executable, "-c", STAND_IN, str(tmp_path / "a"), "hold"], env={**os.environ, "SECONDS": "0"}
    )
    while not (tmp_path / "a/try-0").exists():
        time.sleep(0.01)
    threading.Timer(1.0, holder.terminate).start()
    results, code, _ = swept(tmp_path, {"a": ("ok",), "b": ("ok",)})
    holder.wait()
    assert (states(results), code) == (["finished", "finished"], 0)
    assert results[0].tries > 1


def test_a_run_that_was_in_use_is_so_although_it_was_let_go_since(tmp_path: Path) -> None:
    told = f"error: {tmp_path}/a: in use by pid 3 on host h; wait for it or stop it\n"
    assert sweep_members.classify_exit(member(tmp_path / "a"), 3, told)[0] == "in use"
    assert sweep_members.classify_exit(member(tmp_path / "a"), 3, "error: resume=must: nothing is there")[0] == "failed"


def test_a_killed_sweep_leaves_nobody_behind(tmp_path: Path) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    code = (
        "import sys; from pathlib import Path; import tests.launch.test_sweep as t\n"
        f"t.swept(Path({str(tmp_path)!r}), {{'a': ('hold',), 'b': ('hold',)}}, parallel=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    while not all((tmp_path / name / "try-0").exists() for name in "ab"):
        assert parent.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # the stand-in listens before it writes
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    pids = [tries(tmp_path, name)[0]["pid"] for name in "ab"]
    deadline = time.monotonic() + HANG_SECONDS
    while any(Path(f"/proc/{pid}").exists() and "zombie" not in _state(pid) for pid in pids):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)
    assert all((tmp_path / name / "saved").exists() for name in "ab")


def _state(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return "zombie"


def test_what_differs_names_a_run() -> None:
    jobs = [("model=mlp", "seed=0", "ckpt=best"), ("model=mlp", "seed=1", "ckpt=best")]
    assert sweep_members.find_distinguishing_overrides(jobs) == [("seed=0",), ("seed=1",)]
    assert sweep_members.find_distinguishing_overrides([("seed=0",)]) == [()]


def test_two_jobs_with_one_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/a and .*/a are one run, .*/a; leave one of them out"):
        sweep_members.refuse_duplicates([member(tmp_path / "a"), member(tmp_path / "b"), member(tmp_path / "a")])


def test_shares_are_equal_and_disjoint() -> None:
    assert local_sweep.deal_equally([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]]
    assert local_sweep.deal_equally(["0"], 2) == [[], []]
    assert local_sweep.list_gpus("3, 5", Path("/nowhere")) == ["3", "5"]
    assert local_sweep.list_gpus("", Path("/nowhere")) == []
    assert local_sweep.list_gpus(None, Path("/nowhere")) == []


def test_gpus_are_divided_and_none_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(local_sweep.VISIBLE_DEVICES, "4,5,6")
    assert [each.environment for each in local_sweep.share_machine(2)] == [
        {local_sweep.VISIBLE_DEVICES: "4"},
        {local_sweep.VISIBLE_DEVICES: "5"},
    ]
    assert local_sweep.share_machine(1) == [local_sweep.MachineShare()]
    with pytest.raises(ConfigError, match="parallel=4: this machine has 3 GPU"):
        local_sweep.share_machine(4)
    with monkeypatch.context() as on_cpu:
        on_cpu.setenv("JAX_PLATFORMS", "cpu")
        assert len(local_sweep.share_machine(4)) == 4
    monkeypatch.delenv(local_sweep.VISIBLE_DEVICES)
    for name in ("a", "b"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr(local_sweep, "NVIDIA_GPUS", tmp_path / "gpus")
    assert [each.environment for each in local_sweep.share_machine(2)] == [
        {local_sweep.VISIBLE_DEVICES: "0"},
        {local_sweep.VISIBLE_DEVICES: "1"},
    ]


def test_what_is_left_behind_can_be_read_as_a_table(tmp_path: Path) -> None:
    results, _, _ = swept(tmp_path, {"a": ("ok",), "b": ("raise",)}, retries=0)
    sweep = [member(tmp_path / name) for name in "ab"]
    place = sweep_members.sweep_folder(sweep)
    assert place == sweep_members.sweep_folder(sweep[::-1])
    assert place != sweep_members.sweep_folder(sweep[:1])
    sweep_members.write_results(place, sweep, results)
    rows = list(csv.DictReader((place / "results.csv").open()))
    assert [(row["directory"], row["state"], row["score"], row["why"]) for row in rows] == [
        (str(tmp_path / "a"), "finished", "0.5", ""),
        (str(tmp_path / "b"), "failed", "0.5", "RuntimeError: planted"),
    ]
    assert json.loads((place / "sweep.json").read_text())["runs"][1]["code"] == 1
    drawn = status_table.format_status_table(sweep, results)
    assert drawn[-1] == "2 runs: 1 failed, 1 finished"
    assert "1/1  0.5000" in drawn[1]


def test_a_sweep_is_checked_whole_before_any_of_it_starts(door: Door) -> None:
    before = door.tree()
    assert "seed=0 and seed=0 are one run" in door.run("seed=0,0", "-m").stderr  # wherever it stands
    for words, code, said in (
        (("seed=0,1", "optim.lr=1e-3,-1"), 2, "optim.lr: got -1; expected more than 0 (in the run seed=0 optim.lr=-1)"),
        (("seed=0,0",), 2, "seed=0 and seed=0 are one run"),
        (("seed=0,1", "hydra.launcher.paralel=2"), 2, "hydra.launcher.paralel: unknown key; did you mean parallel?"),
        (("seed=0,1", "hydra.launcher.parallel=0"), 2, "hydra.launcher.parallel: got 0; expected at least 1"),
        (("seed=0,1", "dir=outputs/x"), 3, "holds no run"),
        (("seed=0,1", "resume=never"), 2, "resume=never: a sweep goes on with its runs"),
        (("seed=0,1", "ckpt=best,bst"), 2, "ckpt: got bst"),
        (
            ("seed=0,1", "hydra.sweeper.max_batch_size=1"),
            2,
            "hydra.sweeper.max_batch_size: all runs are checked before",
        ),
        (("seed=0,1", "--cfg", "job"), 2, "-m and --cfg are not for one command"),
    ):
        done = door.run("-m", *words)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), (words, done.stderr)
        assert said in done.stderr
        assert door.tree() == before


def test_the_runs_are_of_the_configuration_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where that submits what it is asked for, each of its jobs does not."""
    text = (REPO / "conf/config.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(
        text.replace("experiment: null\n", "experiment: null\n  - override hydra/launcher: slurm\n")
    )
    monkeypatch.setattr(sys, "argv", ["run.py"])
    named = ("-cd", str(tmp_path), "-cn", "mine")
    sweep = compose((*named, "-m", "seed=0,1", "--trust"))
    assert isinstance(sweep, SweepRequest)
    assert isinstance(sweep.launcher, SlurmOptions)
    typed = [run.command.words for run in sweep.runs]
    assert typed == [(*named, "hydra/launcher=local", f"seed={seed}", "--trust") for seed in (0, 1)]
    run = compose((*named, "seed=2"))
    assert isinstance(run, RunRequest)
    assert run.job is not None
    assert run.command.words == (*named, "seed=2", "hydra/launcher=local")


def test_a_killed_sweep_goes_on_and_each_run_is_what_it_is_alone(door: Door, tmp_path: Path) -> None:
    command = ("-m", *SMALL, "seed=0,1")
    process = door.start(*command)
    while last_logged(door.cwd) < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = door.run(*command)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.rstrip().endswith("python -m runner report outputs/default")
    places = sorted(path.parent for path in door.cwd.glob("outputs/default/*/config.yaml"))
    assert len(places) == 2
    again = door.run(*command)
    assert (again.returncode, again.stdout.count("already"), "running" in again.stdout) == (0, 0, False)
    alone = Door(tmp_path / "alone")
    alone.cwd.mkdir()
    write_corpus(alone.cwd)
    (interrupted,) = [place for place in places if len((place / "attempts.jsonl").read_text().splitlines()) == 2]
    seed = read_document(interrupted / "config.yaml")["seed"]
    assert alone.run(*SMALL, f"seed={seed}").returncode == 0
    assert alone.the_run.name == interrupted.name
    assert_same(interrupted, alone.the_run, 60)


def test_a_long_name_of_a_run_is_cut_where_it_tells_least() -> None:
    """Members of a sweep over a long key differ in what comes last."""
    assert keep_end("+objective.options.factor=2", 12) == "…ns.factor=2"
    assert keep_end("seed=1", 12) == "seed=1"
