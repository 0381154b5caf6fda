"""The drill: where it kills, what it sees, what it says; and that three planted bugs do not get past it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.__main__ import main
from runner.checkpoint import arrays
from runner.checkpoint.record import Record
from runner.checkpoint.seal import seal_checkpoint
from runner.drill.compare_runs import LineDifference, RunComparison, compare_runs
from runner.drill.diagnosis import DETERMINISTIC, DifferenceFacts, explain_difference, most_telling_array
from runner.drill.kill_plan import MOMENTS, SIGTERM_MOMENTS, STARTING_PHASES, Baseline, PlannedKill, plan_kills
from runner.drill.run_processes import OpenProcesses, list_processes
from runner.rundir.heartbeat import Heartbeat
from runner.rundir.layout import RunDir
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door, plant

pytestmark = pytest.mark.forked

DRILLED = (*SMALL, "ckpt.save.periodic.steps=7")

# Where it kills.

steps = st.integers(1, 400)
pasts = st.builds(
    lambda count, evaluated, saved: Baseline(
        count, [step for step in evaluated if step <= count], [step for step in saved if step <= count]
    ),
    steps,
    st.lists(steps, max_size=8, unique=True).map(sorted),
    st.lists(steps, max_size=8, unique=True).map(sorted),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.integers(1, 40), pasts)
def test_a_plan_has_every_moment_and_exactly_so_many_kills(seed: int, count: int, past: Baseline) -> None:
    aims = plan_kills(seed, count, past)
    assert len(aims) == count
    assert aims == plan_kills(seed, count, past)
    possible = [moment for moment in MOMENTS if past.steps_of(moment)]
    assert {aim.moment for aim in aims} >= set(possible[:count])
    assert all(1 <= aim.step <= past.steps for aim in aims)
    assert all(aim.step in past.steps_of(aim.moment) for aim in aims if aim.moment not in STARTING_PHASES)
    running = [aim.step for aim in aims if aim.moment not in STARTING_PHASES]
    assert running == sorted(running)
    assert aims[0].moment not in STARTING_PHASES  # a process that starts again has something to go on from
    polite = [aim for aim in aims if aim.signal == signal.SIGTERM]
    assert len(polite) <= (count + 2) // 5
    assert all(aim.moment in SIGTERM_MOMENTS and aim.step <= 0.9 * past.steps for aim in polite)


def test_a_plan_is_spread_and_another_seed_kills_elsewhere() -> None:
    past = Baseline(600, range(100, 601, 100), range(100, 601, 100))
    aims = plan_kills(0, 40, past)
    on_steps = [aim.step for aim in aims if aim.moment == "step"]
    assert len(on_steps) >= 5
    assert min(on_steps) <= 100
    assert max(on_steps) >= 500
    assert Counter(aim.signal for aim in aims)[signal.SIGTERM] == 8
    assert [aim.step for aim in plan_kills(1, 40, past)] != [aim.step for aim in aims]
    hard = {aim.moment for aim in aims if aim.signal == signal.SIGKILL}
    assert hard == set(MOMENTS)  # polite ones do not take the place of the only one in a moment


def test_of_several_processes_each_is_killed_and_the_command_as_well() -> None:
    past = Baseline(600, range(100, 601, 100), range(100, 601, 100))
    alone, several = plan_kills(0, 12, past), plan_kills(0, 12, replace(past, processes=3))
    assert Counter(kill.victim for kill in several) == {None: 3, 0: 3, 1: 3, 2: 3}
    # Everything else is as it was.
    assert [replace(kill, victim=None) for kill in several] == alone


STARTER = """
import os, subprocess, sys, time
from runner.hosts.options import LocalHosts
for index in range(3):
    environment = LocalHosts(count=3).describe_place(4711, index) if index < 2 else {}
    subprocess.Popen(["sleep", "600"], env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_the_processes_of_a_command_are_found_and_waited_for() -> None:
    """A process that it has started for something else is none of them."""
    command = subprocess.Popen([sys.executable, "-c", STARTER], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "started\n"
    found = list_processes(command.pid)
    assert sorted(found) == [0, 1]
    others = OpenProcesses()
    others.add(list(found.values()))
    command.kill()
    command.wait()
    assert list_processes(command.pid) == {}
    waiting = threading.Thread(target=others.wait)
    waiting.start()
    os.kill(found[0], signal.SIGKILL)
    waiting.join(0.3)
    assert waiting.is_alive()
    others.kill()
    waiting.join(HANG_SECONDS)
    assert not waiting.is_alive()


def test_nothing_to_evaluate_and_nothing_to_save_leaves_the_other_moments() -> None:
    moments = {aim.moment for aim in plan_kills(0, 20, Baseline(50))}
    assert moments == {"step", *STARTING_PHASES} - {"import"}  # which is starting up


def _beat(phase: str, step: int = 0, writing: str = "") -> Heartbeat:
    return Heartbeat(step, 0.0, 0.0, phase, writing)


PAST = Baseline(100, [50], [50], {"eval": 2.0, "startup": 4.0})


@pytest.mark.parametrize(
    ("aim", "beat", "into", "due"),
    [
        (PlannedKill("eval", 50, 60), _beat("eval", 50), 0.0, True),
        (PlannedKill("eval", 50, 60), _beat("eval", 40), 0.0, False),
        (PlannedKill("eval", 50, 60), _beat("step", 55), 0.0, False),
        (PlannedKill("eval", 50, 60, depth=0.5), _beat("eval", 50), 0.9, False),
        (PlannedKill("eval", 50, 60, depth=0.5), _beat("eval", 50), 1.1, True),
        (PlannedKill("eval", 50, 60), _beat("step", 60), 0.0, True),  # it did not come: at once
        (PlannedKill("eval", 50, 600), _beat("finish", 100), 0.0, True),  # the last chance
        (PlannedKill("eval", 50, 60), _beat("finish", 70), 0.0, False),  # between restoring and training
        (PlannedKill("step", 50, 51), _beat("finish", 50), 0.0, False),
        (PlannedKill("eval", 50, 60), _beat("restore", 0), 0.0, False),
        (PlannedKill("eval", 50, 60), None, 9.0, False),
        (PlannedKill("step", 7, 8), _beat("data", 7), 0.0, True),
        (PlannedKill("step", 7, 8), _beat("step", 6), 0.0, False),
        (PlannedKill("publish", 50, 60), _beat("step", 52, "publish"), 0.0, True),
        (PlannedKill("publish", 50, 60), _beat("step", 52, "seal"), 0.0, False),
        (PlannedKill("startup", 5, 0, depth=0.5), None, 1.9, False),
        (PlannedKill("startup", 5, 0, depth=0.5), None, 2.1, True),
        (PlannedKill("startup", 5, 0, depth=0.5), _beat("restore"), 0.0, True),  # it was over sooner than usual
        (PlannedKill("restore", 5, 0), _beat("startup"), 0.0, False),
        (PlannedKill("restore", 5, 0), _beat("restore"), 0.0, True),
        (PlannedKill("restore", 5, 0), _beat("compile"), 0.0, True),
        (PlannedKill("compile", 5, 0), _beat("restore"), 0.0, False),
    ],
)
def test_it_kills_in_the_moment_or_once_it_has_passed(
    aim: PlannedKill, beat: Heartbeat | None, into: float, due: bool
) -> None:
    assert aim.is_due(beat, into if aim.is_in(beat) else None, PAST) is due


def test_a_polite_request_that_comes_too_late_is_none() -> None:
    aim = PlannedKill("eval", 50, 60, signal.SIGTERM)
    assert aim.avoid_late_sigterm(_beat("eval", 50), PAST) == aim
    assert aim.avoid_late_sigterm(None, PAST) == aim
    assert aim.avoid_late_sigterm(_beat("step", 95), PAST).signal == signal.SIGKILL
    assert aim.avoid_late_sigterm(_beat("finish", 50), PAST).signal == signal.SIGKILL


# What it sees.

LEAVES: dict[str, Any] = {
    "step": np.asarray(6, np.int32),
    "params.kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "opt.0.count": np.asarray(6, np.int32),
    "opt.0.mu.kernel": np.zeros((3, 4), np.float32),
    "rng.dropout.key": np.asarray([1, 2], np.uint32),
    "extra.mean": np.zeros((), np.float32),
}
LINES = [{"step": step, "split": split, "loss": step / 3} for step in (2, 4, 6) for split in ("train", "eval")]
PROGRESS = {"position": {"next_index": 6}, "data": "abc", "best": None}


def _made(path: Path, leaves: Mapping[str, Any] = LEAVES, progress: Any = PROGRESS, log: str | None = None) -> RunDir:
    """A run as it lies on disk, with one checkpoint."""
    run, directory = RunDir(path), path / "checkpoints/6"
    (directory / "state").mkdir(parents=True)
    arrays.write_leaves(
        directory / "state",
        {name: arrays.LeafPieces(np.shape(leaf), np.shape(leaf), [((), leaf)]) for name, leaf in leaves.items()},
    )
    (directory / "progress").mkdir()
    (directory / "progress/metadata").write_text(json.dumps(progress))
    seal_checkpoint(directory, Record(6, "end", {}, 0.0), checksums=True)
    run.logs.mkdir()
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES) if log is None else log)
    run.status.write_text(json.dumps({"state": "finished", "step": 6, "score": 1.5, "best": None}))
    return run


@pytest.fixture
def first(tmp_path: Path) -> RunDir:
    return _made(tmp_path / "first")


def test_two_equal_runs_are_identical(first: RunDir, tmp_path: Path) -> None:
    found = compare_runs(first, _made(tmp_path / "second"))
    assert found.identical
    assert (found.step, found.num_lines, found.num_bytes) == (6, 6, 116)
    assert found.arrays is not None
    assert found.arrays.num_equal == len(LEAVES)


@pytest.mark.parametrize("name", LEAVES)
def test_one_flipped_bit_in_any_array_is_found(first: RunDir, name: str, tmp_path: Path) -> None:
    changed = LEAVES[name].copy()
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    found = compare_runs(first, _made(tmp_path / "second", {**LEAVES, name: changed}))
    assert not found.identical
    assert found.differing == [name]
    assert found.line is None


def test_an_array_that_is_not_there_is_found(first: RunDir, tmp_path: Path) -> None:
    less = {name: leaf for name, leaf in LEAVES.items() if name != "extra.mean"}
    assert compare_runs(first, _made(tmp_path / "second", less)).differing == ["extra.mean"]


def test_another_position_of_the_data_is_found(first: RunDir, tmp_path: Path) -> None:
    found = compare_runs(first, _made(tmp_path / "second", progress={**PROGRESS, "position": {"next_index": 5}}))
    assert not found.identical
    assert list(found.progress) == ["position"]


def test_another_result_is_found(first: RunDir, tmp_path: Path) -> None:
    second = _made(tmp_path / "second")
    second.status.write_text(second.status.read_text().replace("1.5", "1.25"))
    found = compare_runs(first, second)
    assert not found.identical
    assert list(found.result) == ["score"]


TEXT = [json.dumps(line) + "\n" for line in LINES]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            [*TEXT[:2], TEXT[2].replace("1.3333333333333333", "1.3333333333333335"), *TEXT[3:]],
            LineDifference(4, "train", "differs", ("loss",)),
        ),
        ([*TEXT[:2], *TEXT[3:]], LineDifference(4, "train", "is missing")),
        ([*TEXT[:3], TEXT[2], *TEXT[3:]], LineDifference(4, "train", "is there twice")),
        ([*TEXT, TEXT[0].replace("2", "7")], LineDifference(7, "train", "was not expected")),
        ([TEXT[1], TEXT[0], *TEXT[2:]], LineDifference(2, "eval", "was not expected")),
        ([*TEXT[:5], TEXT[5].replace(": ", ":")], LineDifference(6, "eval", "differs")),
    ],
)
def test_one_changed_line_is_found(first: RunDir, log: list[str], line: LineDifference, tmp_path: Path) -> None:
    found = compare_runs(first, _made(tmp_path / "second", log="".join(log)))
    assert not found.identical
    assert found.line == line


# What it says.

EVERYTHING = ("opt.0.mu.kernel", "params.kernel")
LATER = LineDifference(25, "train", "differs", ("loss", "grad_norm"))
SAME = RunComparison(6, None, 0, {}, None, 6, {}, ([6], [6]))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (DifferenceFacts((*EVERYTHING, "rng.dropout.count"), (), LATER, [10, 20]), "random streams are not restored"),
        (DifferenceFacts((*EVERYTHING, "rng.dropout.count"), (), LATER, [10, 20]), "rng.dropout.count"),
        (DifferenceFacts((*EVERYTHING, "rng.dropout.count"), (), LATER, [10, 20]), "after training went on from step 20"),
        (DifferenceFacts(EVERYTHING, ("position",), LATER, [20]), "order of the data: its position is not restored"),
        (DifferenceFacts(EVERYTHING, ("data",), LATER, [20]), "its fingerprint differs"),
        (DifferenceFacts(("rng.a",), ("position",), LATER, [20]), "streams are not restored as they were saved: rng.a differs; and the order"),
        (DifferenceFacts((*EVERYTHING, "opt.0.count"), (), LATER, [20]), "the optimizer's state is not restored"),
        (DifferenceFacts(EVERYTHING, (), LineDifference(25, "train", "differs", ("lr",)), [20]), "learning rate"),
        (DifferenceFacts(("extra.mean",), (), LineDifference(25, "eval", "differs"), [20]), "a variable beside the parameters: extra.mean"),
        (DifferenceFacts(EVERYTHING, (), LATER, [20], agree=[20]), "order of the data, most likely: checkpoint 20"),
        (DifferenceFacts(EVERYTHING, (), LATER, [20]), "the state was not restored bit for bit"),
        (DifferenceFacts((), (), LineDifference(25, "train", "is there twice"), [20]), "the log alone"),
        (DifferenceFacts((), ("best",), None, [20]), "remembered beside the state: best"),
        (DifferenceFacts(("params.kernel",), (), None, [20]), "no logged number does"),
        (DifferenceFacts(EVERYTHING, (), LineDifference(5, "train", "differs"), [10, 20]), "does not always repeat: step 5"),
        (DifferenceFacts(EVERYTHING, (), LATER, [20], again=replace(SAME, line=LineDifference(5, "train", "differs"))), "second uninterrupted run differs"),
        (DifferenceFacts((*EVERYTHING, "rng.a"), (), LATER, [20], again=SAME), "random streams"),
        (DifferenceFacts(EVERYTHING, (), LineDifference(5, "train", "differs"), [10], hardware="8 × NVIDIA H200"), DETERMINISTIC),
    ],
)  # fmt: skip
def test_the_probable_cause(facts: DifferenceFacts, said: str) -> None:
    assert said in explain_difference(facts)
    assert (DETERMINISTIC in explain_difference(facts)) == ("H200" in facts.hardware)


def test_what_tells_most_comes_first() -> None:
    names = ["extra.mean", "opt.0.count", "opt.0.mu", "params.kernel", "rng.dropout.count", "step"]
    assert most_telling_array(names) == "rng.dropout.count"
    assert most_telling_array(["opt.0.count", "opt.0.mu", "params.kernel"]) == "opt.0.count"
    assert most_telling_array(["params.kernel"]) == "params.kernel"
    assert most_telling_array([]) is None


# What it does, on a real run.


def _drill(door: Door, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runner", "drill", *words],
        cwd=door.cwd,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _drilled(door: Door, *words: str, **environment: str) -> tuple[int, str, str]:
    process = _drill(door, *words, **environment)
    out, err = process.communicate(timeout=4 * HANG_SECONDS)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def identical(make_door: Any) -> tuple[Door, str, dict[str, Any]]:
    """A drill of seven kills on a run of a few seconds, kept; what it printed, and its report."""
    door = make_door("drill")
    code, out, err = _drilled(door, "--kills", "7", "--keep", "--to", "place", "--", *DRILLED)
    assert code == 0, out + err
    return door, out, json.loads((door.cwd / "place/report.json").read_text())


def test_a_real_drill_is_identical_and_every_kill_landed(identical: tuple[Door, str, dict[str, Any]]) -> None:
    door, out, report = identical
    assert report["verdict"] == "identical"
    assert "Killed 7 times. Identical, bit for bit." in out
    assert len(report["kills"]) == 7
    assert {kill["aimed"] for kill in report["kills"]} >= {"step", "eval", "write", "restore", "prune", "compile"}
    hit = [kill["moment"] == kill["aimed"] for kill in report["kills"]]
    assert sum(hit) >= 3, report["kills"]  # a short moment may be over before the signal arrives; not every one
    compared = report["compared"]
    assert compared["step"] == 60
    assert compared["arrays"] > 25
    assert compared["bytes"] > 100_000
    assert compared["lines"] == 18
    assert compared["differing"] == []
    assert not list(door.cwd.glob("outputs/*"))  # the user's own runs are somewhere else


def test_the_ledger_tells_the_same_story(identical: tuple[Door, str, dict[str, Any]]) -> None:
    door, _, report = identical
    (path,) = door.cwd.glob("place/interrupted/*/*/attempts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    endings = Counter(line["ending"] for line in lines)
    polite = sum(kill["signal"] == "SIGTERM" for kill in report["kills"])
    assert endings["finished"] == 1
    assert endings["preempted"] == polite
    unborn = sum(kill["moment"] == "startup" for kill in report["kills"])  # killed before they could begin a line
    assert 7 - polite - unborn <= endings["killed"] <= 7 - polite
    assert sum(line["lost_steps"] for line in lines) == sum(kill["lost"] for kill in report["kills"])


def test_the_picture_is_one(identical: tuple[Door, str, dict[str, Any]]) -> None:
    from PIL import Image

    door, _, _ = identical
    with Image.open(door.cwd / "place/drill.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000
        assert picture.height >= 800
        assert len(picture.convert("RGB").getcolors(10**7) or []) > 50  # it is not empty


PLANTS = {
    "rng": """
import runner.train.build as module
original = module.read_train_state
def planted(built, directory, measured=None):
    return {**original(built, directory, measured), "rng": built.init()["rng"]}
module.read_train_state = planted
""",
    "data": """
from data.pipeline import TrainingStream
original = TrainingStream.restore
TrainingStream.restore = lambda self, state: original(self, {**state, "next_index": 0})
""",
    "noise": """
import os
import runner.train.step as module
original = module.make_train_step
def planted(*parts):
    inner, noise = original(*parts), 1e-7 * int.from_bytes(os.urandom(3))
    def noisy(state, batch, lr):
        state, metrics = inner(state, batch, lr)
        return state, {**metrics, "loss": metrics["loss"] + noise}
    return noisy
module.make_train_step = planted
""",
}


@pytest.mark.parametrize(
    ("bug", "cause", "leaf"),
    [
        pytest.param(
            "rng", "the random streams are not restored as they were saved: rng.", "rng.", marks=pytest.mark.slow
        ),
        pytest.param("data", "the order of the data: its position is not restored", "params.", marks=pytest.mark.slow),
        pytest.param("noise", "the computation does not repeat, also without a kill", None, marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_found_and_named(bug: str, cause: str, leaf: str | None, door: Door, tmp_path: Path) -> None:
    words = ("--kills", "2", "--json", "--to", "place", "--", *DRILLED)
    code, out, err = _drilled(door, *words, **plant(tmp_path, PLANTS[bug]))
    assert code == 1, out + err
    report = json.loads(out)
    assert report["verdict"] == "different"
    assert cause in report["why"]
    assert report["compared"]["first_differing_line"] is not None
    first = report["compared"]["first_differing"]
    assert first is None if leaf is None else first.startswith(leaf)
    assert (door.cwd / "place/interrupted").is_dir()  # kept, to be looked at
    assert (door.cwd / "place/drill.png").is_file()


def _processes_of(place: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"root={place}" in words.replace("'", ""):
            found.append(words)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_drill_leaves_no_process_and_no_folder(
    number: signal.Signals, door: Door, request: pytest.FixtureRequest
) -> None:
    process = _drill(door, "--to", "place", "--", *DRILLED, "train.steps=100000")
    request.addfinalizer(process.kill)  # else, where this fails, it trains on
    until = time.monotonic() + HANG_SECONDS
    while not list(door.cwd.glob("place/uninterrupted/*/*/logs/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    assert _processes_of(door.cwd / "place")
    process.send_signal(number)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    assert not _processes_of(door.cwd / "place")
    assert not (door.cwd / "place").exists()


MOVED = (
    *("model=mlp", "data=digits", "data.batch_size=32", "mesh=data", "train.steps=60", "train.eval_steps=20"),
    *("ckpt=combined", "ckpt.save.periodic.steps=10", "log.tensorboard=false"),
)


def test_the_machine_changes_with_each_kill(door: Door) -> None:
    """With train.parts no bit does."""
    asked = ("--kills", "1", "--devices", "1,4", "--keep", "--to", "place")
    code, out, err = _drilled(door, *asked, "--", *MOVED, "train.parts=4")
    assert code == 0, out + err
    assert "Identical, bit for bit" in out
    (path,) = door.cwd.glob("place/interrupted/*/*/attempts.jsonl")
    attempts = [json.loads(line) for line in path.read_text().splitlines()]
    assert attempts[-1]["hardware"] == "4 × cpu"


def test_with_a_bucket_the_disk_is_lost_at_each_kill(door: Door) -> None:
    words = (*MOVED, "mesh=single", f"remote=file://{door.cwd}/bucket")
    code, out, err = _drilled(door, "--kills", "2", "--keep", "--to", "place", "--", *words)
    assert code == 0, out + err
    assert "killed 2 times, its disk lost each time" in out
    assert "Identical, bit for bit" in out
    (untouched,) = door.cwd.glob("place/uninterrupted/*/*/config.yaml")
    assert not (untouched.parent / "remote.json").exists(), "what it is compared with knows of no bucket"
    # What it has put there goes again.
    assert not [path for path in (door.cwd / "bucket").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_of_several_processes_any_is_killed(door: Door) -> None:
    code, out, err = _drilled(door, "--kills", "5", "--", *MOVED, "hosts=local", "train.steps=300")
    assert code == 0, out + err
    assert "Identical, bit for bit" in out
    # The last may come when the run is over.
    assert "  killed    " in out
    assert {"process 0", "process 1", "command"} <= set(re.findall(r"SIG\w+  (process .|command)", out))


@pytest.mark.slow
def test_without_parts_it_is_told_how_far_the_weights_drift(door: Door) -> None:
    code, out, err = _drilled(door, "--kills", "2", "--devices", "1,4,2", "--", *MOVED)
    assert code == 1, out + err
    assert "without train.parts sums are rounded" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kills", "0"], "drill: --kills 0: expected 1 to 1000"),
        (["--", "-m", "seed=1,2"], "drill: -m: a drill is of one configuration; leave it out"),
        (["dir=x"], "drill: dir=x: the drill decides where and how its runs live; leave it out"),
        (["+root=x"], "drill: +root=x: the drill decides where and how its runs live; leave it out"),
        (["hydra/launcher=x"], "drill: hydra/launcher=x: the drill decides"),
        (["step=best"], "drill: step=best: the drill decides"),
        (["--devices", "2,none", "mesh=data"], "drill: --devices 2,none: expected numbers from 1 to 64, as 4,2,1"),
        (["--devices", "2,1", "seed=1"], "drill: --devices: the run uses one device, however many there are; add mesh"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["drill", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_configuration_is_the_runs_own_line(door: Door) -> None:
    before = door.tree()
    code, out, err = _drilled(door, "--", "ckpt=combind")
    assert code == 2
    assert err == door.run("ckpt=combind").stderr
    assert err.startswith("error: ckpt: got combind; expected one of")
    assert out == ""
    assert door.tree() == before


def test_a_folder_with_something_in_it_is_left_alone(door: Door) -> None:
    code, _, err = _drilled(door, "--to", ".", "--", *SMALL)
    assert code == 3
    assert "is there already" in err
    assert (door.cwd / "corpus.txt").exists()


def test_a_run_that_fails_untouched_says_so_with_its_own_code(door: Door) -> None:
    shutil.copy(door.cwd / "corpus.txt", door.cwd / "other.txt")
    code, _, err = _drilled(door, "--to", "place", "--", *SMALL, "optim.lr=1e30", "train.max_rollbacks=0")
    assert code == 4, err
    assert err.startswith("error: drill: also untouched the run ends with exit code 4: ")
    assert not (door.cwd / "place").exists()


SLOW_EVALUATION = """
import time
import data.pipeline as module
original = module.iterate_in_order
def slow(*words, **options):
    for batch in original(*words, **options):
        time.sleep(0.5)
        yield batch
module.iterate_in_order = slow
"""
NO_SAVE = """
import time
from runner.checkpoint.checkpointer import Checkpointer
Checkpointer._write = lambda self, *words: time.sleep(600)
"""


def test_an_evaluation_made_up_for_and_then_killed_is_logged_once(door: Door, tmp_path: Path) -> None:
    """Found by the drill: a stop in an evaluation, and a kill before it was saved that it had been made up for."""
    stopped = door.start(*SMALL, **plant(tmp_path, SLOW_EVALUATION))
    _wait(stopped, lambda: any(b"eval" in path.read_bytes() for path in door.cwd.glob("outputs/*/*/.pulse")))
    stopped.terminate()
    stopped.communicate()
    assert stopped.returncode == 75
    killed = door.start(*SMALL, **plant(tmp_path, NO_SAVE))
    _wait(killed, lambda: '"step": 10, "split": "eval"' in (door.the_run / "logs/metrics.jsonl").read_text())
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert door.run(*SMALL).returncode == 0
    lines = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["split"]) for line in lines]
    assert steps.count((10, "eval")) == 1
    assert len(set(steps)) == len(steps) == 18


def _wait(process: subprocess.Popen[str], for_what: Callable[[], bool]) -> None:
    until = time.monotonic() + HANG_SECONDS
    while not for_what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
