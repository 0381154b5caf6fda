"""`hosts=local`: what each process is given, who hears of what, and how the group ends.

A stand-in for `run.py` is parent and child in one, as the real one is: what each process does is told by its words.
Where the parent is asked nothing, it is this process.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import STOPPED, ConfigError, HoldfastError
from runner.hosts.options import LocalHosts
from runner.launch import local_group, local_sweep
from runner.launch.parent_report import ParentReport
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from runner.hosts.options import LocalHosts

plan = json.loads(sys.argv[1])
hosts = LocalHosts(count=len(plan))
place = hosts.find_place(os.environ)
if place is None:
    from runner.launch import local_group
    from runner.launch.parent_report import take_report
    sys.exit(local_group.run_group(hosts, sys.argv[1:], take_report()))

act, heard = plan[place.index], []
if not act.get("deaf"):
    for name in ("TERM", "INT", "USR1", "USR2", "HUP"):
        signal.signal(getattr(signal, f"SIG{name}"), lambda number, frame: heard.append(int(number)))
if act.get("ignores"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note = Path(f"note-{place.index}")
def tell(**more):
    names = [name for name in os.environ if name.startswith("HOLDFAST_")]
    told = {"pid": os.getpid(), "ppid": os.getppid(), "words": sys.argv[1:], "port": place.port, "heard": heard,
            "count": place.count, "variables": {name: os.environ[name] for name in names}, **more}
    note.with_suffix(".new").write_text(json.dumps(told))
    note.with_suffix(".new").rename(note)
for line in act.get("says", []):
    print(line)
for line in act.get("complains", []):
    os.write(2, f"{line}\\n".encode())
if act.get("reads"):
    print("read", repr(sys.stdin.read()), os.isatty(0), os.isatty(1), flush=True)
tell()
time.sleep(act.get("begins", 0))
if act.get("leads"):
    from runner.errors import HoldfastError
    from runner.hosts.group import Lead
    try:
        Lead(place, hosts, {}).wait_for_all(print, lambda: None)
    except HoldfastError as error:
        print(error)
        sys.exit(error.exit_code)
while other := act.get("after"):  # until that process has come so far
    if Path(other).exists():
        break
    time.sleep(0.01)
end = time.monotonic() + act.get("lingers", 600)
while act.get("waits") and len(heard) < act["waits"] and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(act.get("longer", 0))
tell()
if number := act.get("dies"):
    os.kill(os.getpid(), number)
    time.sleep(600)
sys.exit(act.get("code", 0))
"""


class Desk:
    """A folder with the stand-in, and what its processes noted there."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]):
        self.folder, self.capture = folder, capture
        (folder / "stand_in.py").write_text(STAND_IN)

    def start(self, *plan: dict[str, Any], **more: Any) -> Any:
        words = [sys.executable, "stand_in.py", json.dumps(plan)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=self.folder, start_new_session=True, **{**pipes, **more})

    def run(self, *plan: dict[str, Any], report: Path | None = None) -> tuple[int, str, str]:
        hosts = LocalHosts(count=len(plan))
        code = local_group.run_group(hosts, [json.dumps(plan)], ParentReport(report))
        return code, *self.capture.readouterr()

    def note(self, index: int) -> dict[str, Any]:
        return json.loads((self.folder / f"note-{index}").read_text())

    def wait_for_notes(self, count: int) -> None:
        wait_until(lambda: all((self.folder / f"note-{index}").exists() for index in range(count)))


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setattr(local_group, "find_typed_program", lambda: ("stand_in.py",))
    return Desk(tmp_path, capfd)


# --- what each is given ---


def test_each_has_its_place_and_the_first_alone_speaks_for_the_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier command left in the environment is not taken for a place of theirs."""
    own = {"HOLDFAST_CHECKED": "12345678 /run", "HOLDFAST_SUPERVISOR": str(desk.folder / "s")}
    stale = {"HOLDFAST_HOSTS": "n9:1,2,1", "HOLDFAST_HOSTS_FROM": "1 n9:1,2,1"}
    # What a run in this process of the tests has left.
    monkeypatch.delenv("HOLDFAST_NPROC", raising=False)
    for name, value in {**own, **stale}.items():
        monkeypatch.setenv(name, value)
    code, _, err = desk.run({}, {}, {}, report=desk.folder / "report")
    assert code == 0, err
    notes = [desk.note(index) for index in range(3)]
    assert len({note["port"] for note in notes}) == 1
    assert notes[0]["port"] < 32768, "no port that the kernel gives away"
    for index, note in enumerate(notes):
        variables, parent = note["variables"], note["ppid"]
        word = f"127.0.0.1:{note['port']},3,{index}"
        assert variables.pop("HOLDFAST_HOSTS") == word
        assert variables.pop("HOLDFAST_HOSTS_FROM") == f"{parent} {word}"
        expected = {**own, "HOLDFAST_REPORT": f"{parent} {desk.folder}/report"} if index == 0 else {}
        assert variables == expected
        assert note["words"] == notes[0]["words"]


def test_what_the_others_print_has_their_number(desk: Desk) -> None:
    first = {"says": ["plain"], "complains": ["too"], "after": "done"}
    said = desk.start(first, {"says": ["a", "", "b\tc", "x" * 70000], "complains": ["Traceback"]}, {"says": ["é"]})
    wait_until(lambda: (desk.folder / "note-2").exists() and (desk.folder / "note-1").exists())
    time.sleep(0.3)
    (desk.folder / "done").touch()
    out, err = said.communicate(timeout=HANG_SECONDS)
    assert (said.returncode, out) == (0, "plain\n")
    lines = err.splitlines()
    assert sorted(line for line in lines if len(line) < 100) == ["[1] Traceback", "[1] a", "[1] b\tc", "[2] é", "too"]
    assert "".join(line.removeprefix("[1] ") for line in lines if len(line) > 100) == "x" * 70000


def test_the_first_alone_reads_what_is_typed(desk: Desk) -> None:
    process = desk.start({"reads": True}, {"reads": True}, stdin=subprocess.PIPE)
    out, err = process.communicate("typed", timeout=HANG_SECONDS)
    assert out == "read 'typed' False False\n"
    assert err == "[1] read '' False False\n"


def test_a_terminal_is_drawn_on_and_not_read(desk: Desk) -> None:
    """To read from it would stop a process that is not of its group for ever."""
    main, end = pty.openpty()
    process = desk.start({"reads": True}, {}, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while b"\n" not in shown:
        shown += os.read(main, 100)
    assert process.wait(HANG_SECONDS) == 0
    os.close(main)
    assert shown == b"read '' False True\r\n"


def test_gpus_are_dealt_and_cores_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(local_sweep.VISIBLE_DEVICES, "4,5,7")
    shares = local_sweep.share_gpus(3, "hosts.count")
    assert shares == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    report = ParentReport(None)
    with pytest.raises(ConfigError, match=r"hosts.count=4: this machine has 3 GPU\(s\).*; say hosts.count=3"):
        local_group.run_group(LocalHosts(count=4), (), report)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local_sweep.share_gpus(4, "hosts.count") == [{}] * 4


# --- how it ends ---


@pytest.mark.parametrize("code", [0, 3, STOPPED])
def test_its_exit_code_is_that_of_the_first(code: int, desk: Desk) -> None:
    """It ends when all have ended."""
    assert desk.run({"code": code}, {"code": 7, "longer": 0.1})[::2] == (code, "")
    assert desk.note(1)["heard"] == []


def test_a_first_one_that_was_killed_is_told_as_a_shell_does(desk: Desk) -> None:
    code, _, err = desk.run({"dies": signal.SIGKILL}, {"code": STOPPED, "longer": 0.1})
    assert (code, err) == (128 + signal.SIGKILL, "[0] died of SIGKILL (out of memory?)\n")
    assert desk.run({"dies": signal.SIGSEGV}, {})[0] == 128 + signal.SIGSEGV


def test_another_one_that_was_killed_is_named_and_the_first_says_what_follows(desk: Desk) -> None:
    code, _, err = desk.run({"code": STOPPED, "after": "note-1", "longer": 0.3}, {"dies": signal.SIGKILL})
    assert (code, err) == (STOPPED, "[1] died of SIGKILL (out of memory?)\n")


def test_who_stays_when_the_first_has_gone_is_killed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_group, "LEFTOVER_SECONDS", 0.3)
    before = time.monotonic()
    code, _, err = desk.run({"code": STOPPED, "after": "note-1"}, {"ignores": True, "longer": 600})
    assert (code, err) == (STOPPED, "")
    assert time.monotonic() - before < 60
    assert not Path(f"/proc/{desk.note(1)['pid']}").exists()


def test_one_that_cannot_be_started_stops_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spawned: list[subprocess.Popen[bytes]] = []

    def spawn(words: Any, environment: Any, **more: Any) -> subprocess.Popen[bytes]:
        if spawned:
            raise OSError(11, "Resource temporarily unavailable")
        spawned.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0))
        return spawned[0]

    monkeypatch.setattr(local_group, "spawn_child", spawn)
    with pytest.raises(HoldfastError, match="hosts=local: process 1 cannot be started: Resource temporarily"):
        local_group.run_group(LocalHosts(count=3), (), ParentReport(None))
    assert spawned[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        ({"dies": signal.SIGKILL}, STOPPED, "process 1 died of SIGKILL before it had joined the run"),
        ({"complains": ["error: optim: got x"], "code": 2}, 2, "process 1: optim: got x"),
        ({"complains": ["", "MemoryError"], "code": 1}, 1, "process 1: MemoryError"),
        ({"code": STOPPED}, STOPPED, "process 1 left with exit code 75 before it had joined the run"),
        ({}, STOPPED, "process 1 left with exit code 0 before it had joined the run"),
    ],
)
def test_nobody_waits_for_one_that_has_ended_before_it_came(
    act: dict[str, Any], code: int, said: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third one that is still on its way ends with them."""
    monkeypatch.setattr(local_group, "LEFTOVER_SECONDS", 0.3)
    ended, out, _ = desk.run({"leads": True}, act, {"ignores": True, "longer": 600})
    assert (ended, out.split(";")[0].rstrip()) == (code, said)


def test_one_that_ends_before_the_first_listens_is_told_later(desk: Desk) -> None:
    code, out, err = desk.run({"leads": True, "begins": 0.5}, {"dies": signal.SIGKILL})
    assert (code, err) == (STOPPED, "[1] died of SIGKILL (out of memory?)\n")
    assert "process 1 died of SIGKILL" in out


def test_where_there_can_be_no_thread_the_others_are_stopped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(local_group.threading.Thread, "start", refuse)
    with pytest.raises(HoldfastError, match="hosts=local: process 1 cannot be started: Resource temporarily"):
        desk.run({"longer": 600, "deaf": True}, {})


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_each_once(number: int, desk: Desk) -> None:
    act = {"waits": 1, "longer": 0.3, "code": STOPPED}
    process = desk.start(act, act)
    desk.wait_for_notes(2)
    os.killpg(process.pid, number)  # all of its group, as a shell or `timeout` does
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, err) == (STOPPED, "")
    assert [desk.note(index)["heard"] for index in (0, 1)] == [[int(number)]] * 2


def test_a_second_signal_reaches_each_as_well(desk: Desk) -> None:
    act = {"waits": 2, "code": STOPPED}
    process = desk.start(act, act)
    desk.wait_for_notes(2)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_SECONDS) == STOPPED
    assert [desk.note(index)["heard"] for index in (0, 1)] == [[int(signal.SIGUSR1), int(signal.SIGTERM)]] * 2


def test_killed_by_a_signal_that_was_handed_on_it_was_not_listening_yet(desk: Desk) -> None:
    act = {"deaf": True, "longer": 600}
    process = desk.start(act, act)
    desk.wait_for_notes(2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, err) == (STOPPED, "")


def test_killed_itself_it_has_all_of_them_stopped(desk: Desk) -> None:
    """Each hears it once, or once more for the thread that read its lines: a run takes both for one request."""
    act = {"waits": 1}
    process = desk.start(act, act)
    desk.wait_for_notes(2)
    process.kill()
    process.communicate(timeout=HANG_SECONDS)
    wait_until(lambda: all(desk.note(index)["heard"] for index in (0, 1)))
    assert {number for index in (0, 1) for number in desk.note(index)["heard"]} == {signal.SIGTERM}


# --- from the command line, and from Python ---


@pytest.mark.slow
def test_a_call_from_python_is_told_by_the_first_how_its_run_ended(door: Door) -> None:
    words = ("hosts=local", "hosts.count=2", "mesh=data", "model=mlp", "data=digits", "log.tensorboard=false")
    call = f"import holdfast; print(repr(holdfast.run({[*words, 'train.steps=20', 'train.eval_steps=10']!r})))"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", call], cwd=door.cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished, step=20" in done.stdout.splitlines()[-1]
    assert done.stdout.count("finished 20 steps") == 1
    assert len((door.the_run / "attempts.jsonl").read_text().splitlines()) == 1


def test_one_that_is_killed_as_it_starts_ends_the_run(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after `hosts.join_seconds`: and the same command goes on."""
    (door.cwd / "site").mkdir()
    killed = "import os\nif os.environ.get('HOLDFAST_HOSTS', '').endswith(',1'):\n    os.kill(os.getpid(), 9)\n"
    (door.cwd / "site" / "sitecustomize.py").write_text(killed)
    monkeypatch.setenv("PYTHONPATH", str(door.cwd / "site"))
    done = door.run(*SMALL, "hosts=local", "mesh=data", "hosts.join_seconds=100000")
    assert done.returncode == STOPPED, done.stderr
    assert (
        "error: process 1 died of SIGKILL before it had joined the run; the same command tries again"
        in (done.stdout + done.stderr).splitlines()
    )
    (attempt,) = map(json.loads, (door.the_run / "attempts.jsonl").read_text().splitlines())
    assert (attempt["ending"], attempt["lost_process"]) == ("failed", True)
    assert (door.the_run / "config.yaml").exists()


def test_a_wrong_configuration_is_one_line_of_one_process(door: Door) -> None:
    before = door.tree()
    for words, said in (
        (("hosts.count=2", "train.stepps=3"), "train.stepps: unknown key; did you mean steps?"),
        (("hosts.count=0",), "hosts.count: got 0"),
    ):
        done = door.run(*SMALL, "hosts=local", *words)
        assert done.stderr.startswith(f"error: {said}"), done.stderr
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert door.tree() == before
