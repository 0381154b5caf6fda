"""`supervise`: what it makes of each ending, what reaches the command, and that a supervised run loses nothing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.__main__ import main
from runner.errors import CRASHED, STOPPED, ConfigError, DivergedError, RefusedError, StorageError
from runner.launch.child_process import FORWARDED_SIGNALS
from runner.launch.restart_policy import (
    FRUITLESS_SECONDS,
    MAX_IN_USE_TRIES,
    MAX_WAIT_SECONDS,
    Exit,
    FailureStreak,
    ProcessEnding,
    Restart,
    backoff_seconds,
    decide_restart,
)
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door, assert_same, last_logged

SUPERVISE = (sys.executable, "-m", "runner", "supervise", "--wait", "0.1")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


def moves(*endings: ProcessEnding, budget: int = 3, wait: float = 5.0) -> list[Restart | Exit]:
    """What is done after each of these endings, one after the other; waits without their random part."""
    streak, answers = FailureStreak(), []
    for ending in endings:
        streak = streak.after(ending)
        answers.append(decide_restart(ending, streak, budget, wait, 0.0))
    return answers


def waits(*endings: ProcessEnding, **limits: float) -> list[float | int]:
    """Seconds before each rerun; the exit code where it ends."""
    return [move.wait if isinstance(move, Restart) else -move.code for move in moves(*endings, **limits)]


# --- the policy ---


@pytest.mark.parametrize(
    "code", [0, *(error.exit_code for error in (ConfigError, RefusedError, DivergedError, StorageError)), 7, 127, 255]
)
def test_what_running_again_would_not_change_ends_it_with_the_same_code(code: int) -> None:
    assert waits(ProcessEnding(code)) == [-code]


@pytest.mark.parametrize("code", [CRASHED, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT, 137, 139, 134])
def test_crashes_are_forgiven_within_the_budget_and_each_wait_is_twice_the_last(code: int) -> None:
    left = 128 - code if code < 0 else code
    assert waits(*[ProcessEnding(code)] * 4) == [5.0, 10.0, 20.0, -left]
    assert waits(ProcessEnding(code), budget=0) == [-left]


def test_a_newer_checkpoint_makes_a_crash_the_first_again() -> None:
    crash, later = ProcessEnding(CRASHED), ProcessEnding(CRASHED, saved_more=True)
    assert waits(crash, crash, later, crash, crash, crash) == [5.0, 10.0, 5.0, 10.0, 20.0, -CRASHED]
    assert waits(*[later] * 50) == [5.0] * 50


def test_a_stop_that_saved_nothing_new_does_not_forgive_the_crashes_before_it() -> None:
    crash, stop = ProcessEnding(CRASHED), ProcessEnding(STOPPED, seconds=1.0)
    assert waits(crash, stop, crash, stop, crash, stop, crash)[-1] == -CRASHED


def test_a_stop_is_run_again_at_once_and_for_ever() -> None:
    saved, long = (
        ProcessEnding(STOPPED, seconds=1.0, saved_more=True),
        ProcessEnding(STOPPED, seconds=FRUITLESS_SECONDS),
    )
    assert waits(*[saved] * 100) == [0.0] * 100
    assert waits(*[long] * 100) == [0.0] * 100


def test_stops_that_come_to_nothing_are_run_again_ever_more_slowly() -> None:
    nothing = ProcessEnding(STOPPED, seconds=1.0)
    assert waits(*[nothing] * 9) == [0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, MAX_WAIT_SECONDS, MAX_WAIT_SECONDS]
    assert "3 times in a row with nothing new saved" in moves(*[nothing] * 3)[-1].why
    assert waits(nothing, nothing, ProcessEnding(STOPPED, seconds=1.0, saved_more=True), nothing) == [
        0.0,
        5.0,
        0.0,
        0.0,
    ]


def test_a_run_in_use_is_tried_a_few_times_and_any_other_refusal_is_not() -> None:
    in_use, code = ProcessEnding(RefusedError.exit_code, in_use=True), RefusedError.exit_code
    assert waits(*[in_use] * 6) == [5.0, 10.0, 20.0, 40.0, 80.0, -code]
    assert len([move for move in moves(*[in_use] * 6) if isinstance(move, Restart)]) == MAX_IN_USE_TRIES
    assert waits(ProcessEnding(code)) == [-code]


def test_a_lost_process_is_a_crash_and_no_stop_that_may_go_on_for_ever() -> None:
    lost = ProcessEnding(STOPPED, seconds=1.0, lost=True)
    assert waits(*[lost] * 4) == [5.0, 10.0, 20.0, -STOPPED]
    assert waits(lost, ProcessEnding(CRASHED), ProcessEnding(STOPPED), lost, lost)[-1] == -STOPPED
    later = ProcessEnding(STOPPED, saved_more=True, lost=True)
    assert waits(lost, lost, later, lost) == [5.0, 10.0, 5.0, 10.0]
    assert waits(*[later] * 50) == [5.0] * 50
    assert moves(lost)[0].why == "lost one of its processes, crash 1 of 3 in a row without a newer checkpoint"
    assert waits(ProcessEnding(STOPPED, lost=True, asked=signal.SIGTERM)) == [-STOPPED]


def test_a_run_that_gave_up_is_not_run_again() -> None:
    assert waits(ProcessEnding(CRASHED, gave_up=True)) == [-CRASHED]


@pytest.mark.parametrize("number", FORWARDED_SIGNALS)
def test_after_a_signal_was_handed_on_it_leaves_with_the_code_of_the_command(number: int) -> None:
    for code in (0, CRASHED, STOPPED, StorageError.exit_code, 128 + number):
        assert waits(ProcessEnding(code, saved_more=True, asked=number)) == [-code]
    assert waits(ProcessEnding(-signal.SIGKILL, asked=number)) == [-(128 + signal.SIGKILL)]
    assert waits(ProcessEnding(-number, asked=number)) == [-STOPPED], "it was not listening yet: nothing was lost"


def test_ctrl_c_at_the_command_itself_is_no_crash() -> None:
    assert waits(ProcessEnding(-signal.SIGINT)) == waits(ProcessEnding(130)) == [-130]


def test_a_wait_is_between_half_and_all_of_its_length_and_never_longer_than_the_longest() -> None:
    assert [backoff_seconds(count, 5.0, 0.0) for count in (0, 1, 2, 3)] == [0.0, 5.0, 10.0, 20.0]
    assert backoff_seconds(2, 5.0, 0.5) == 7.5
    assert 5.0 < backoff_seconds(2, 5.0, 0.999999) < 5.01
    assert backoff_seconds(10**9, 5.0, 0.0) == MAX_WAIT_SECONDS
    assert backoff_seconds(3, 0.0, 0.0) == 0.0


# --- with a command that does as it is told ---

SCRIPTED = """
import json, os, shutil, signal, sys, time
from pathlib import Path
from runner import files
from runner.checkpoint.record import Record
from runner.checkpoint.seal import seal_checkpoint
from runner.errors import RefusedError
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run

plan, done = json.loads(Path("plan.json").read_text()), Path("done")
with done.open("a") as out:
    out.write(".")
act = plan[len(done.read_text()) - 1]
if "early" in act:  # before it came to its run
    sys.exit(act["early"])
run = RunDir(Path("run").resolve())
try:
    with lock_run(run):
        if step := act.get("drop"):
            shutil.rmtree(run.checkpoints / str(step))
        if step := act.get("save"):
            folder = run.checkpoints / str(step)
            folder.mkdir(parents=True, exist_ok=True)
            seal_checkpoint(folder, Record(step, "by hand", {}, 0.0, mark=act.get("mark", "")))
        if act.get("stop"):
            run.status.write_text(json.dumps({**run.read_status(), "why": "STOP file"}))
        if "lost" in act:
            attempt = {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "lost_process": act["lost"]}
            files.replace_file(run.status, json.dumps({"attempt": attempt}))
        if "gave_up" in act:
            files.replace_file(run.status, json.dumps({"gave_up": act["gave_up"]}))
        if act.get("worker") and os.fork() == 0:
            time.sleep(600)
        if number := act.get("die"):
            os.kill(os.getpid(), number)
            time.sleep(600)
except RefusedError as error:
    sys.exit(error.exit_code)
sys.exit(act.get("exit", 0))
"""

Scripted = Callable[..., tuple[int, int, str]]


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Scripted:
    """The exit code of `supervise`, how often the command ran, and what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    (tmp_path / "scripted.py").write_text(SCRIPTED)

    def scripted(*plan: dict[str, Any], crashes: int = 3) -> tuple[int, int, str]:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        command = (sys.executable, "scripted.py")
        code = main(["supervise", "--wait", "0", "--crashes", str(crashes), "--", *command])
        return code, len((tmp_path / "done").read_text()), capfd.readouterr().err

    return scripted


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5])
def test_a_command_that_is_done_is_run_once(code: int, scripted: Scripted) -> None:
    assert scripted({"exit": code})[:2] == (code, 1)


def test_crashes_of_every_kind_are_run_again_until_the_budget_is_used_up(scripted: Scripted) -> None:
    code, times, said = scripted({"exit": 1}, {"die": signal.SIGSEGV}, {"die": signal.SIGKILL}, crashes=2)
    assert (code, times) == (137, 3)
    assert "supervise: attempt 1 crashed, crash 1 of 2 in a row without a newer checkpoint; again at once\n" in said
    assert "attempt 2 died of SIGSEGV" in said
    assert "attempt 3 died of SIGKILL (out of memory?), crash 3 in a row" in said
    assert "leaving with exit code 137" in said


def test_each_newer_checkpoint_gives_the_budget_back(scripted: Scripted) -> None:
    crashes = [{"save": step, "exit": 1} for step in (10, 20, 30, 40)]
    assert scripted(*crashes, {"exit": 0}, crashes=1)[:2] == (0, 5)


@pytest.mark.parametrize(
    "again",
    [{"save": 20}, {"save": 10}, {"save": 21, "mark": "error"}],
    ids=["the same step", "an older step", "a checkpoint left for people to look at"],
)
def test_what_is_no_progress_does_not_give_the_budget_back(again: dict[str, Any], scripted: Scripted) -> None:
    crashes = [{"save": 20, "exit": 1}, {**again, "exit": 1}, {"exit": 0}]
    assert scripted(*crashes, crashes=1)[:2] == (1, 2)


def test_going_back_and_forth_is_no_progress(scripted: Scripted) -> None:
    """A run that steps back one checkpoint and comes to the same crash again."""
    back = {"drop": 20, "save": 10, "exit": 1}
    assert scripted({"save": 20, "exit": 1}, back, {"save": 20, "exit": 1}, {"exit": 0}, crashes=2)[:2] == (1, 3)


def test_stops_are_run_again(scripted: Scripted) -> None:
    code, times, said = scripted(*[{"exit": STOPPED}] * 5, {"exit": 0}, crashes=0)
    assert (code, times) == (0, 6)
    assert "supervise: attempt 1 stopped with its state saved; again at once\n" in said
    assert said.endswith("supervise: attempt 6 finished\n")


def test_whoever_stops_a_run_by_its_file_means_it(scripted: Scripted) -> None:
    code, times, said = scripted({"exit": STOPPED, "stop": True}, {"exit": 0})
    assert (code, times) == (STOPPED, 1)
    assert "stopped with its state saved by the file STOP: somebody wants the run to rest" in said


def test_a_run_that_says_that_it_gave_up_is_believed(scripted: Scripted) -> None:
    assert scripted({"exit": 1, "gave_up": True}, {"exit": 0})[:2] == (1, 1)


def test_a_run_that_lost_a_process_is_run_again_as_often_as_one_that_crashed(scripted: Scripted) -> None:
    lost = {"exit": STOPPED, "lost": True}
    code, times, said = scripted(lost, {**lost, "save": 10}, lost, lost, crashes=2)
    assert (code, times) == (STOPPED, 4)
    assert "attempt 2 lost one of its processes, crash 1 of 2 in a row" in said
    assert "attempt 4 lost one of its processes, crash 3 in a row" in said


def test_a_stop_of_a_run_that_had_lost_a_process_is_a_stop(scripted: Scripted) -> None:
    stops = [{"exit": STOPPED, "lost": False}] * 3
    assert scripted({"exit": STOPPED, "lost": True}, *stops, {"exit": 0}, crashes=1)[:2] == (0, 5)


def test_what_an_earlier_attempt_said_is_no_reason_to_give_up(scripted: Scripted) -> None:
    crashes = [{"die": signal.SIGSEGV}, {"early": 1}]  # neither came to write how it ended
    assert scripted({"exit": 75, "gave_up": True}, *crashes, {"exit": 0})[:2] == (0, 4)


def test_a_run_in_use_is_waited_for_but_not_for_ever(scripted: Scripted, tmp_path: Path) -> None:
    with run_lock.lock_run(RunDir(tmp_path / "run")):
        code, times, said = scripted(*[{}] * 20)
    assert (code, times) == (3, 1 + MAX_IN_USE_TRIES)
    assert "the run is in use (try 1 of 5)" in said
    (tmp_path / "done").unlink()

    def hold() -> None:
        with run_lock.lock_run(RunDir(tmp_path / "run")):
            held.set()
            while not (tmp_path / "done").exists() or len((tmp_path / "done").read_text()) < 2:
                time.sleep(0.002)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(HANG_SECONDS)
    code, times, _ = scripted(*[{}] * 20)
    holder.join()
    assert code == 0
    assert times >= 2  # the second may get it while it tries for a moment


def test_what_a_crashed_command_left_running_does_not_keep_the_run(scripted: Scripted) -> None:
    """A forked worker holds the lock of the process that was killed."""
    code, _, said = scripted({"worker": True, "die": signal.SIGKILL}, *[{}] * 20)
    assert code == 0, said


def test_a_command_that_cannot_run_is_one_plain_line(scripted: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "--", "no-such-program", "-m", "--json"]) == 2
    assert capfd.readouterr().err == (
        "error: supervise: no-such-program: No such file or directory; the command follows the --\n"
    )
    for words in ([], ["--crashes", "-1", "--", "true"], ["--wait", "nan", "--", "true"]):
        assert main(["supervise", *words]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1


def test_as_data(scripted: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    command = (sys.executable, "-c", "import sys; print('said'); sys.exit(4)")
    assert main(["supervise", "--json", "--", *command]) == 4
    said, _, document = capfd.readouterr().out.partition("\n")
    assert said == "said"
    assert json.loads(document) == {"exit_code": 4, "attempts": [4]}


# --- signals ---

COUNTING = """
import os, signal, sys, time
heard = []
for name in ("TERM", "INT", "USR1", "USR2", "HUP"):
    signal.signal(getattr(signal, f"SIG{name}"), lambda number, frame: heard.append(number))
print("ready", flush=True)
end = None
while end is None or time.monotonic() < end:
    time.sleep(0.01)
    if heard and end is None:
        end = time.monotonic() + float(sys.argv[1])
print("heard", heard, os.isatty(0), flush=True)
sys.exit(75)
"""


def start(*command: str, **more: Any) -> subprocess.Popen[str]:
    """A supervisor in a session of its own, as a terminal would start it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    words = [*SUPERVISE, "--", *command]
    return subprocess.Popen(words, text=True, start_new_session=True, **{"env": ENVIRONMENT, **pipes})


def counting(linger: float) -> tuple[str, ...]:
    return sys.executable, "-c", COUNTING, str(linger)


@pytest.mark.parametrize("number", FORWARDED_SIGNALS)
def test_a_signal_is_handed_on_once_and_ends_it_with_75(number: int) -> None:
    process = start(*counting(0.3))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)  # all of its group, as a shell or `timeout` does
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert out == f"heard [{int(number)}] False\n"
    assert process.returncode == STOPPED
    assert err == (
        f"supervise: attempt 1 stopped with its state saved after {signal.Signals(number).name}; "
        "leaving with exit code 75\n"
    )


def test_a_second_signal_is_handed_on_as_well() -> None:
    process = start(*counting(1.5))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert out == f"heard [{int(signal.SIGUSR1)}, {int(signal.SIGTERM)}] False\n"


def test_a_hang_up_that_is_ignored_is_not_handed_on() -> None:
    process = start(*counting(0.3), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=HANG_SECONDS)[0] == f"heard [{int(signal.SIGTERM)}] False\n"


def test_ctrl_c_in_a_terminal_reaches_the_command_once() -> None:
    controller, terminal = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(*counting(0.3), stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=take_terminal)
    os.close(terminal)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(controller, 4096)
    os.write(controller, b"\x03")
    assert process.wait(HANG_SECONDS) == STOPPED
    while b"leaving" not in shown:
        shown += os.read(controller, 4096)
    os.close(controller)
    assert f"heard [{int(signal.SIGINT)}] False" in shown.decode(), "once, and it may not read the terminal"
    assert shown.count(b"ready") == 1, "not run again"
    assert b"\r\x1b[2K\x1b[?25hsupervise: " in shown, "on a line of its own, with the cursor that a bar had hidden"


def test_a_signal_before_the_command_listens_loses_nothing() -> None:
    process = start(sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)")
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(HANG_SECONDS) == STOPPED
    process.communicate()


def test_a_signal_while_it_waits_ends_it() -> None:
    words = [*SUPERVISE[:-1], "300", "--", sys.executable, "-c", "print('ran', flush=True); raise SystemExit(1)"]
    process = subprocess.Popen(words, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert "again in" in process.stderr.readline()
    process.terminate()
    out, err = process.communicate(timeout=120)  # it would wait for 150 seconds at least
    assert out == "ran\n"
    assert err == "supervise: SIGTERM: leaving; the same command goes on from what is saved\n"
    assert process.returncode == STOPPED


# --- supervised runs ---

STEPS = 150  # enough that nothing is over before a kill has landed
TRAINS = (sys.executable, str(REPO / "run.py"), *SMALL, f"train.steps={STEPS}")


@pytest.fixture(scope="module")
def reference(untouched: Callable[..., Door]) -> Path:
    """The run as it is without any interruption."""
    return untouched(*TRAINS[2:]).the_run


def until_logged(door: Door, step: int, process: subprocess.Popen[str], *, after: int = 0) -> int:
    """Wait until a process other than `after` has trained up to this step. Gives its id."""
    while True:
        assert process.poll() is None, process.communicate()
        if last_logged(door.cwd) >= step:
            trainer = int(json.loads(door.the_run.joinpath(".lock").read_text())["pid"])
            if trainer != after:
                return trainer
        time.sleep(0.002)


def endings(run: Path) -> list[str]:
    return [json.loads(line)["ending"] for line in (run / "attempts.jsonl").read_text().splitlines()]


def test_a_run_killed_twice_ends_as_if_it_had_not_been(door: Door, reference: Path) -> None:
    process, trainer = start(*TRAINS, cwd=door.cwd), 0
    for step in (15, 35):
        trainer = until_logged(door, step, process, after=trainer)
        os.kill(trainer, signal.SIGKILL)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert err.count("died of SIGKILL") == 2, err
    assert endings(door.the_run) == ["killed", "killed", "finished"]
    assert_same(door.the_run, reference, STEPS)


ABORTS = """
import json, os, runpy, sys, threading, time
from pathlib import Path
from tests.conftest import last_logged

def abort():
    while last_logged(Path(".")) < 25:
        time.sleep(0.002)
    Path("aborted").touch()
    os.abort()

if not Path("aborted").exists():
    threading.Thread(target=abort, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_native_abort_is_run_again(door: Door, reference: Path) -> None:
    process = start(sys.executable, "-c", ABORTS, *TRAINS[1:], cwd=door.cwd)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert (door.cwd / "aborted").exists()
    assert "attempt 1 died of SIGABRT" in err
    assert endings(door.the_run) == ["killed", "finished"]
    assert_same(door.the_run, reference, STEPS)


def test_a_terminated_supervisor_leaves_a_saved_run_and_nobody_behind(door: Door, reference: Path) -> None:
    process = start(*TRAINS, cwd=door.cwd)
    trainer = until_logged(door, 20, process)
    process.terminate()
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == STOPPED, err
    assert not Path(f"/proc/{trainer}").exists()
    assert not run_lock.is_in_use(RunDir(door.the_run))
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (door.the_run / "checkpoints" / str(status["step"])).is_dir()
    again = start(*TRAINS, cwd=door.cwd)
    again.communicate(timeout=HANG_SECONDS)
    assert again.returncode == 0
    assert_same(door.the_run, reference, STEPS)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_killed_supervisor_takes_the_run_along_with_its_state_saved(
    door: Door, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Killed, it leaves its own folder behind.
    scratch = tmp_path_factory.mktemp("scratch")
    process = start(*TRAINS, cwd=door.cwd, env={**ENVIRONMENT, "TMPDIR": str(scratch)})
    until_logged(door, 20, process)
    process.kill()
    assert process.wait(HANG_SECONDS) == -signal.SIGKILL
    end = time.monotonic() + HANG_SECONDS
    while run_lock.is_in_use(RunDir(door.the_run)):
        assert time.monotonic() < end, "still training, supervised by nobody"
        time.sleep(0.01)
    process.communicate()
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert "SIGTERM" in status["why"]
    assert (door.the_run / "checkpoints" / str(status["step"])).is_dir()
    again = start(*TRAINS, cwd=door.cwd)
    again.communicate(timeout=HANG_SECONDS)
    assert again.returncode == 0
    assert_same(door.the_run, reference, STEPS)
