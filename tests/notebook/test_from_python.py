"""A call from Python is the command in a process of its own: what it returns, raises, shows, and what an interrupt does."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import holdfast
import runner
from holdfast import RunError, RunResult, run, sweep
from runner.errors import ConfigError, RefusedError
from runner.launch import parent_report
from runner.launch.parent_report import REPORT, ParentReport, describe_report, take_report
from runner.notebook import from_python
from runner.rundir.layout import RunDir
from runner.rundir.numerics import SET_BY_RUN, THREADS
from runner.values import Outcome
from tests.conftest import REPO, SMALL, Door, assert_same, last_logged

QUICK = (
    "model=mlp",
    "data=digits",
    "train.steps=4",
    "train.log_steps=1",
    "train.eval_steps=2",
    "log.tensorboard=false",
)
SAVING = (*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=10")
OWN_MODEL = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, rngs):
        self.out = nnx.Linear(64, num_outputs, rngs=rngs)

    def __call__(self, x):
        return self.out(x.reshape(len(x), -1))
"""


@pytest.fixture
def fake_program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a call start this code in place of a run."""

    def plant(code: str) -> None:
        monkeypatch.setattr(from_python, "find_run_program", lambda: ("-c", code))

    return plant


def report(**run: object) -> str:
    """Code of a program that reports one run."""
    entry = {
        "directory": "/gone",
        "name": "",
        "ending": None,
        "step": None,
        "score": None,
        "exit_code": None,
        "why": "",
    }
    document = json.dumps({"runs": [entry | run], "error": ""})
    return f"import os; open(os.environ[{REPORT!r}].split(' ', 1)[1], 'w').write({document!r})\n"


FINISHED = report(ending="finished", step=3, score=0.5, exit_code=0)


@contextmanager
def once_logged(cwd: Path, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something from another thread as soon as the run has logged a step."""
    done = threading.Event()

    def watch() -> None:
        while last_logged(cwd) < step and not done.is_set():
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill_children(number: int = signal.SIGKILL) -> None:
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            if b"run.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), number)


# --- what it returns ---


def test_a_run_that_finishes(door: Door, capfd: pytest.CaptureFixture[str]) -> None:
    """Its lines are shown through sys.stdout; its measurements are arrays; called again, it is finished at once."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        result = run(QUICK, cwd=door.cwd)
    assert capfd.readouterr().out == ""
    assert "finished 4 steps" in shown.getvalue()
    assert result == RunResult(door.the_run, "finished", 4, result.score, 0)
    assert list(result.metrics["eval/loss"].steps) == [2, 4]
    assert result.metrics["eval/loss"].values.dtype == np.float64
    assert result.score == min(result.metrics["eval/loss"].values)
    assert len(result.metrics["train/loss"].steps) == 4
    assert "finished, step=4" in repr(result)
    again = run(" ".join(QUICK), cwd=str(door.cwd), show=False)
    assert again == result
    assert capfd.readouterr().out == ""
    import jax.numpy as jnp

    model, config = again.load()
    assert config.name == "default"
    assert model(jnp.zeros((1, 8, 8))).shape == (1, 10)
    evaluated = run([*QUICK, "train.steps=0", f"dir={door.the_run}"], cwd=door.cwd, show=False)
    assert evaluated.ending == "evaluated"
    assert evaluated.score == pytest.approx(result.metrics["eval/loss"].values[-1], rel=1e-5)


def test_a_model_of_ones_own_where_it_is_called(door: Door) -> None:
    (door.cwd / "my_net.py").write_text(OWN_MODEL)
    result = run([*QUICK, "model=my_net:Net"], cwd=door.cwd, show=False)
    assert result.ending == "finished"
    with pytest.raises(runner.RunError, match="my_net"):
        run([*QUICK, "model=my_net:Nett"], cwd=door.cwd, show=False)


def test_a_model_whose_file_was_edited_is_not_loaded_by_the_old_code(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor refused any more when it was reloaded."""
    monkeypatch.chdir(door.cwd)
    monkeypatch.syspath_prepend(door.cwd)
    file = door.cwd / "edited_net.py"
    file.write_text(OWN_MODEL)
    result = run([*QUICK, "model=edited_net:Net"], show=False)
    with pytest.raises(RefusedError, match="trust=True"):
        result.load()
    result.load(trust=True)
    result.load(trust=True)
    file.write_text(OWN_MODEL.replace("self.out(", "-self.out("))
    with pytest.raises(RefusedError, match=r"edited_net.py: has changed since this process imported it"):
        result.load(trust=True)
    importlib.reload(sys.modules["edited_net"])
    model, _ = result.load(trust=True)
    assert "edited_net" in type(model).__module__


def test_files_that_evaluations_made_are_media(tmp_path: Path) -> None:
    """Not among the numbers; a number that is none is one, and a line that is torn is passed over."""
    (tmp_path / "logs").mkdir()
    lines = [
        '{"step":1,"split":"eval","loss":"NaN","text":"samples/1.txt"}',
        '{"step":2,"split":"eval","loss":2}',
        '{"st',
    ]
    (tmp_path / "logs/metrics.jsonl").write_text("\n".join(lines))
    result = RunResult(tmp_path, "finished", 2, None, 0)
    steps, values = result.metrics["eval/loss"]
    assert steps.tolist() == [1, 2]
    assert np.isnan(values[0])
    assert set(result.metrics) == {"eval/loss"}
    assert result.media == {"eval/text": {1: tmp_path / "samples/1.txt"}}


def test_a_sweep_in_its_order(door: Door) -> None:
    results = sweep([*QUICK, "seed=1,0"], cwd=door.cwd, show=False)
    seeds = [
        next(line for line in (r.directory / "config.yaml").read_text().splitlines() if "seed:" in line)
        for r in results
    ]
    assert seeds == ["seed: 1", "seed: 0"]
    assert [result.ending for result in results] == ["finished", "finished"]
    assert results[0].score == min(results[0].metrics["eval/loss"].values)


def test_a_sweep_of_which_one_fails(door: Door) -> None:
    """The others are worked on all the same, and are in the error."""
    with pytest.raises(RunError, match=r"1 of 2 runs failed: optim.lr=1e\+?30: step 2: loss is nan") as raised:
        sweep([*QUICK, "optim.lr=1e30,0.001"], cwd=door.cwd, show=False)
    assert [result.ending for result in raised.value.results] == ["diverged", "finished"]
    assert raised.value.directory == raised.value.results[0].directory
    assert raised.value.exit_code == 1


BESIDE_FOLDERS = """
import sys
sys.path.insert(0, "")
{first}
from holdfast import run
result = run({words!r}, show=False)
from runner.errors import ConfigError
try:
    result.load()
    from holdfast import load
    from data.mine import x
    print(x, sys.path[0] == "")
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("init", "first", "said"),
    [
        (False, "", "5 True"),
        # In the short form the case below has a package, and the one above what is found in a folder.
        pytest.param(True, "", "5 True", marks=pytest.mark.slow),
        (True, "import data", "data: this process has imported another"),
    ],
)
def test_beside_folders_that_are_called_as_ours(init: bool, first: str, said: str, door: Door) -> None:
    """A folder `data` lies beside most notebooks: ours is loaded all the same, and what is in theirs is found."""
    for name in ("data", "models"):
        (door.cwd / name).mkdir()
        (door.cwd / name / "mine.py").write_text("x = 5")
        if init:
            (door.cwd / name / "__init__.py").touch()
    (door.cwd / "program.py").write_text(BESIDE_FOLDERS.format(first=first, words=QUICK))
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=door.cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(said), done.stderr


# --- what it raises ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=nope"], "model: got nope; expected one of"),
        (["model=__main__:Net"], r"a run works in a process of its own.*%%writefile"),
        (["hydra/launcher=slurm"], "a job is only submitted"),
        (["--help"], "only printed something"),
    ],
)
def test_what_is_refused_is_one_line(words: list[str], message: str, door: Door) -> None:
    before = door.tree()
    with pytest.raises(RunError, match=message) as raised:
        run(words, cwd=door.cwd, show=False)
    assert raised.value.exit_code == (0 if words == ["--help"] else 2)
    assert "\n" not in raised.value.message
    assert not raised.value.message.startswith("error")
    assert raised.value.directory is None
    assert door.tree() == before


@pytest.mark.parametrize("words", [["a\0b"], "a 'b", [3], ["-m"], ["seed=0", "--multirun"]])
def test_what_no_command_could_have_starts_nothing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(RunError) as raised:
        run(words)
    assert raised.value.exit_code == 2


def test_a_crash_tells_the_end_of_its_traceback(door: Door) -> None:
    (door.cwd / "my_net.py").write_text(
        OWN_MODEL.replace("return self", "raise ArithmeticError('too much')\n        return self")
    )
    environment = {"HYDRA_FULL_ERROR": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(RunError) as raised:
            run([*QUICK, "model=my_net:Net"], cwd=door.cwd, show=False)
    assert raised.value.exit_code == 1
    assert "ArithmeticError: too much" in raised.value.message
    assert len(raised.value.message.splitlines()) <= 21


def test_divergence_has_what_was_measured_before(door: Door) -> None:
    with pytest.raises(RunError, match="loss is nan") as raised:
        run([*QUICK, "optim.lr=1e30"], cwd=door.cwd, show=False)
    assert raised.value.exit_code == 4
    (result,) = raised.value.results
    assert result.ending == "diverged"
    assert raised.value.directory == result.directory == door.the_run
    assert len(result.metrics["train/loss"].steps) >= 1


def test_killed_it_says_where_and_goes_on_when_called_again(door: Door, untouched: Callable[..., Door]) -> None:
    reference = untouched(*SAVING)
    with once_logged(door.cwd, 30, kill_children), pytest.raises(RunError, match="killed by SIGKILL.*again") as raised:
        run(SAVING, cwd=door.cwd, show=False)
    assert raised.value.exit_code == -9
    assert raised.value.directory == door.the_run
    assert run(SAVING, cwd=door.cwd, show=False).ending == "finished"
    assert_same(door.the_run, reference.the_run, 60)


def test_an_error_can_be_pickled() -> None:
    error = RunError("why", 4, Path("a"), [RunResult(Path("a"), "diverged", 1, None, 4)])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.exit_code, copy.directory, copy.results) == ("why", 4, Path("a"), error.results)


# --- interrupts ---


def test_an_interrupt_saves_and_a_second_call_finishes(door: Door, untouched: Callable[..., Door]) -> None:
    reference = untouched(*SAVING)
    shown = io.StringIO()
    with redirect_stdout(shown), once_logged(door.cwd, 20, interrupt):
        result = run(SAVING, cwd=door.cwd)
    assert result.ending == "preempted"
    assert result.exit_code == 75
    assert 20 <= result.step < 60
    assert "SIGINT: saving at the next step boundary" in shown.getvalue()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(SAVING, cwd=door.cwd, show=False).step == 60
    assert_same(door.the_run, reference.the_run, 60)


def test_a_second_interrupt_leaves(fake_program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the process hears nothing; two that come at once are one."""
    monkeypatch.setattr(from_python, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(from_python, "ECHO_SECONDS", 0.1)
    fake_program(
        "import signal, time; signal.signal(2, lambda *_: print('heard')); print('begun'); [time.sleep(9) for _ in 'abc']"
    )

    def press() -> None:
        time.sleep(1)
        interrupt()
        time.sleep(0.03)
        interrupt()
        time.sleep(0.5)
        interrupt()

    shown, thread = io.StringIO(), threading.Thread(target=press)
    thread.start()
    with redirect_stdout(shown), pytest.raises(KeyboardInterrupt):
        run([])
    thread.join()
    assert shown.getvalue().splitlines() == ["begun", "heard"]


def test_an_interrupt_before_anything_was_saved_is_an_interrupt(fake_program: Callable[[str], None]) -> None:
    fake_program(
        "import os, signal, sys\ntry:\n    os.kill(os.getppid(), 2); signal.pause()\nexcept KeyboardInterrupt:\n    sys.exit(130)"
    )
    with pytest.raises(KeyboardInterrupt):
        run([])


def test_the_run_stops_when_its_caller_dies(door: Door, tmp_path_factory: pytest.TempPathFactory) -> None:
    code = f"import holdfast; holdfast.run({[*SAVING, 'train.steps=100000']!r})"
    # Killed, it leaves its own folder behind.
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path_factory.mktemp("scratch"))}
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=door.cwd, env=environment)
    while last_logged(door.cwd) < 10:
        assert caller.poll() is None
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 60
    while json.loads((door.the_run / "status.json").read_text())["state"] != "preempted":
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- where it is called ---


def test_it_is_called_in_threads_beside_jax_and_in_an_event_loop(door: Door) -> None:
    import jax

    jax.numpy.ones(3).sum().block_until_ready()
    found: dict[int, RunResult] = {}

    def work(seed: int) -> None:
        found[seed] = run([*QUICK, f"seed={seed}"], cwd=door.cwd, show=False)

    async def call() -> None:
        await asyncio.gather(asyncio.to_thread(work, 0), asyncio.to_thread(work, 1))
        work(0)

    asyncio.run(call())
    assert {result.ending for result in found.values()} == {"finished"}
    assert found[0].directory != found[1].directory


def test_unicode_words_and_directories(tmp_path: Path) -> None:
    cwd = tmp_path / "Ünïcode 目录"
    cwd.mkdir()
    result = run([*QUICK, "train.steps=1", "root='öt put'"], cwd=cwd, show=False)
    assert result.directory.parent.parent == cwd / "öt put"


def test_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(RunError, match=r"cwd='.*gone': .*No such file") as raised:
        run([], cwd=gone)
    assert raised.value.exit_code == 2
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "failed" in repr(RunResult(tmp_path, "failed", 0, None, 1))
    with pytest.raises(RunError) as raised:
        run(QUICK, show=False)
    assert raised.value.exit_code in (2, 3, 5)
    assert "\n" not in raised.value.message


def test_what_its_process_inherits(fake_program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a run in this process chose for XLA, nor a notebook's way to draw; what the user wants, yes."""
    fake_program(FINISHED + f"print([os.environ.get(k) for k in ('{THREADS}', '{SET_BY_RUN}', 'MPLBACKEND', 'MINE')])")
    for name, value in {
        SET_BY_RUN: "8",
        THREADS: "8",
        "MPLBACKEND": "module://matplotlib_inline.x",
        "MINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    shown = io.StringIO()
    with redirect_stdout(shown):
        run([])
        monkeypatch.setenv(THREADS, "3")
        run([])
    assert shown.getvalue().splitlines() == ["[None, None, None, '1']", "['3', None, None, '1']"]


def test_lines_come_in_order_and_as_they_are_printed(
    fake_program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progress bar's too; half a line at the end is shown as well, and no byte is lost for being none of UTF-8."""
    code = "import sys, time\nfor i in range(3): print(i); print(-i, file=sys.stderr); time.sleep(0.3)\n"
    fake_program(FINISHED + code + "os.write(1, b'1%\\r2%\\r\\xff half')")

    class Screen(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, text: str) -> int:
            self.times.append(time.monotonic())
            return super().write(text)

    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    shown = Screen()
    with redirect_stdout(shown):
        run([])
    assert shown.getvalue() == "0\n0\n1\n-1\n2\n-2\n1%\r2%\r\N{REPLACEMENT CHARACTER} half"
    assert shown.times[-1] - shown.times[0] > 0.5


def test_a_screen_that_fails_ends_no_run(fake_program: Callable[[str], None]) -> None:
    fake_program(FINISHED + "print('line')")
    closed = io.StringIO()
    closed.close()
    with redirect_stdout(closed):
        assert run([]).ending == "finished"


def test_who_holds_the_pipe_still_is_not_waited_for(fake_program: Callable[[str], None]) -> None:
    fake_program(
        FINISHED + "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])"
    )
    began = time.monotonic()
    assert run([], show=False).ending == "finished"
    assert time.monotonic() - began < 10


def test_a_run_called_while_an_error_is_handled(fake_program: Callable[[str], None]) -> None:
    fake_program(FINISHED + "os.close(1); os.close(2); import time; time.sleep(0.5)")
    try:
        raise ValueError
    except ValueError:
        assert run([]).exit_code == 0


# --- the report ---


def test_the_report_is_taken_once_and_ends_an_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process starts itself reports to nobody; where its caller is gone already it does not begin."""
    asked: list[int] = []
    monkeypatch.setattr(parent_report, "_stop_with_caller", asked.append)
    file = tmp_path / "a b.json"
    monkeypatch.setenv(REPORT, describe_report(file)[REPORT])
    report = take_report()
    assert asked == [os.getpid()]
    assert REPORT not in os.environ
    assert not take_report().is_wanted
    report.tell_run(RunDir(tmp_path / "run"))
    assert json.loads(file.read_text())["runs"][0]["ending"] is None
    report.tell_outcome(Outcome("finished", 3, float("nan"), 0))
    (entry,) = json.loads(file.read_text())["runs"]
    assert (entry["directory"], entry["ending"], entry["step"], entry["score"]) == (
        str(tmp_path / "run"),
        "finished",
        3,
        "NaN",
    )
    with pytest.raises(ConfigError):
        report.refuse_jobs("hydra/launcher=slurm")
    ParentReport(None).refuse_jobs("hydra/launcher=slurm")
    orphan = [sys.executable, "-c", "from runner.launch import parent_report as p; p.take_report(); print('began')"]
    done = subprocess.run(
        orphan, env={**os.environ, REPORT: "1 /x", "PYTHONPATH": str(REPO)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (143, b"")


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    report = ParentReport(tmp_path / "no folder" / "report.json")
    report.tell_run(RunDir(tmp_path))
    report.tell_error("x")


def test_without_a_report_nothing_is_made_up(fake_program: Callable[[str], None]) -> None:
    fake_program("pass")
    for call in (run, sweep):
        with pytest.raises(RunError, match="said nothing"):
            call([])


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, holdfast; assert not [m for m in sys.modules if m.startswith('runner')]\n"
        "from holdfast import run, sweep, RunError; import runner; assert runner.run is run\n"
        "assert not {'jax', 'hydra', 'pydantic', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
    assert {*holdfast.__all__} <= {*dir(holdfast)}
    with pytest.raises(AttributeError):
        holdfast.nothing  # noqa: B018


def test_the_module_is_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", "model=nope"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: got nope")
