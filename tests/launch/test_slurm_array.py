"""A sweep as one Slurm job array, with a stand-in for Slurm's commands; tests/laws/test_slurm.py has the real one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from runner.errors import ConfigError, RefusedError
from runner.launch import handover, slurm_array, slurm_job
from runner.launch.compose import _launcher_option
from runner.launch.hydra_plugin import SweepJobs
from runner.launch.slurm_job import RECIPE, SlurmOptions
from runner.launch.slurm_queue import SlurmJob, list_queued_runs, run_key
from runner.launch.sweep_members import SweepMember
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door
from tests.launch.test_sweep import member

# The queue is a file, of lines as `squeue -o '%i|%T|%r|%o'` prints them. With HOLD, sbatch waits for a file at its end.
SBATCH = """#!{python}
import os, sys, time
from pathlib import Path
books = Path({books!r})
script = sys.argv[-1]
limit = books / "most-jobs"
if (books / "refuse").exists() or (limit.exists() and len(list(books.glob("job-*"))) >= int(limit.read_text())):
    sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
job = 10 + len(list(books.glob("job-*")))
text = Path(script).read_text()
(books / f"job-{{job}}").write_text(" ".join(sys.argv[1:-1]) + "\\n" + text)
(books / "sbatch.pid").write_text(str(os.getpid()))
while (books / "hold").exists():
    time.sleep(0.01)
tasks = [line.split("=")[1].split("%")[0] for line in text.splitlines() if line.startswith("#SBATCH --array=")]
numbers = []
for part in tasks[0].split(",") if tasks else ():
    first, _, last = part.partition("-")
    numbers += range(int(first), int(last or first) + 1)
with (books / "queue").open("a") as queue:
    for name in [f"{{job}}_{{number}}" for number in numbers] or [str(job)]:
        queue.write(f"{{name}}|PENDING|Priority|{{script}}\\n")
print(job)
"""
SQUEUE = """#!/bin/sh
case " $* " in
    *" -r "*) cat {books}/queue ;;
    *) sed 's/_\\([0-9]*\\)|PENDING/_[\\1]|PENDING/' {books}/queue ;;  # tasks that wait share a line
esac
"""
SCONTROL = """#!/bin/sh
echo "Configuration data as of 2026-11-21T18:00:00"
echo "MaxArraySize            = $(cat {books}/most 2>/dev/null || echo 1001)"
"""


@dataclass(frozen=True)
class Books:
    """What the stand-in knows, and may be told."""

    folder: Path

    @property
    def queue(self) -> list[str]:
        return (self.folder / "queue").read_text().splitlines()

    def submitted(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("job-*"))]

    def becomes(self, name: str, state: str | None) -> None:
        """A job begins, or (with None) has left the queue."""
        lines = [line.split("|", 3) for line in self.queue]
        kept = [[line[0], state or line[1], "None", line[3]] if line[0] == name else line for line in lines]
        self.write("|".join(line) for line in kept if state or line[0] != name)

    def write(self, lines: object) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))  # type: ignore[attr-defined]


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Books:
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "queue").touch()
    for name, source in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (folder / name).write_text(source.format(python=sys.executable, books=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Books(folder)


def sweep_of(parent: Path, *names: str) -> list[SweepMember]:
    return [member(parent / name) for name in names]


def finish(place: RunDir) -> None:
    place.path.mkdir(parents=True, exist_ok=True)
    place.status.write_text(json.dumps({"state": "finished", "step": 1}))


def states(sweep: Sequence[SweepMember], place: Path, options: SlurmOptions | None = None) -> list[tuple[str, str]]:
    results, _ = slurm_array.submit_array(sweep, place, options or SlurmOptions())
    return [(result.state, result.job) for result in results]


def test_what_is_left_is_one_array_and_typed_again_nothing_is_submitted(tmp_path: Path, books: Books) -> None:
    parent = tmp_path / "n"
    sweep, place = sweep_of(parent, "a", "b", "c", "d", "e"), parent / ".sweep/1234"
    finish(sweep[1].run_dir)
    with run_lock.lock_run(sweep[3].run_dir):
        assert states(sweep, place, SlurmOptions(parallel=2)) == [
            ("queued", "10_0 submitted"),
            ("finished", ""),
            ("queued", "10_2 submitted"),
            ("in use", ""),
            ("queued", "10_4 submitted"),
        ]
    (text,) = books.submitted()
    assert "#SBATCH --array=0,2,4%2" in text
    assert [line.split("|")[0] for line in books.queue] == ["10_0", "10_2", "10_4"]
    rows = json.loads((place / "sweep.json").read_text())["runs"]
    assert [(row["state"], row["job"]) for row in rows][2:4] == [("queued", "10_2 submitted"), ("in use", "")]

    books.becomes("10_2", "RUNNING")
    books.becomes("10_4", None)
    finish(sweep[4].run_dir)
    finish(sweep[3].run_dir)
    assert states(sweep, place) == [
        ("queued", "10_0 pending (Priority)"),
        ("finished", ""),
        ("running", "10_2 running"),
        ("finished", ""),
        ("finished", ""),
    ]
    assert len(books.submitted()) == 1

    books.becomes("10_0", None)  # it failed: only this one is left
    assert states(sweep, place)[0] == ("queued", "11_0 submitted")
    assert "#SBATCH --array=0\n" in books.submitted()[1]
    assert sorted(slurm_array.submit_array(sweep, place, SlurmOptions())[1]) == ["10", "11"]


def test_a_run_is_known_again_in_another_array_and_as_a_single_job(
    tmp_path: Path, books: Books, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "n"
    one, two, three = (f"seed_{n}-{n}{n}abcdef" for n in range(3))
    slurm_job.submit_job(RunDir(parent / one), ("seed=0",), SlurmOptions())
    assert states(sweep_of(parent, two), parent / ".sweep/1111") == [("queued", "11_0 submitted")]
    # Before a run exists its name says what was typed, which may be another thing for the same run.
    other = two.replace("seed_1", "default")
    assert run_key(parent / other) == run_key(parent / two) != run_key(parent / one)
    sweep = sweep_of(parent, one, three, other)
    results, jobs = slurm_array.submit_array(sweep, parent / ".sweep/2222", SlurmOptions())
    assert [result.job for result in results] == ["10 pending (Priority)", "12_1 submitted", "11_0 pending (Priority)"]
    assert sorted(jobs) == ["10", "11_0", "12"]  # the other sweep's array has runs that are none of this one's
    capsys.readouterr()
    slurm_job.submit_job(RunDir(parent / three), ("seed=2",), SlurmOptions())
    said = capsys.readouterr().out
    assert "job 12_1 has it already: pending (Priority); nothing was submitted" in said
    assert f"{parent}/.sweep/2222/slurm/12_1.out" in said
    assert len(books.submitted()) == 3


def test_jobs_that_are_not_ours_are_passed_over(tmp_path: Path, books: Books) -> None:
    sweep = sweep_of(tmp_path / "n", "a")
    gone = tmp_path / "n/.sweep/1/slurm/x.sbatch"
    books.write(["3|RUNNING|None|(null)", "4_1|PENDING|a|b|c.sh", f"5_0|RUNNING|None|{gone}", "6|RUNNING|None|"])
    assert states(sweep, tmp_path / "n/.sweep/2222") == [("queued", "10_0 submitted")]


def test_an_array_is_the_recipe_and_each_task_its_own_command(tmp_path: Path) -> None:
    parent = tmp_path / "na me"
    tasks = {number: member(parent / f"r{number}", f"+a={{b: '{number}'}}", "$HOME") for number in (0, 1, 2, 5)}
    text = slurm_array.render_array(tasks, parent / ".sweep/50%1", SlurmOptions(time=60, setup=["module load x"]))
    assert "#SBATCH --array=0-2,5\n" in text
    assert "/.sweep/50%%1/slurm/%A_%a.out" in text
    for asked in ("--requeue --open-mode=append", "--signal=B:USR1@120", "--time=60", "--job-name='na me'"):
        assert f"#SBATCH {asked}\n" in text
    tail = RECIPE.read_text().partition("\nrun=(")[2].partition("\n")[2]
    assert text.endswith(tail)
    assert "job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" in tail  # requeues itself alone
    assert text.index("module load x") < text.index("case $SLURM_ARRAY_TASK_ID")
    choice = text[text.index("case $SLURM") : text.index(tail)] + 'printf "%s\\n" "${run[@]}"'
    for number, each in tasks.items():
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        said = subprocess.run(["bash", "-c", choice], env=environment, capture_output=True, text=True, check=True)
        checked = f"{handover.CHECKED}={handover.describe_checked(each.config, each.run_dir)[handover.CHECKED]}"
        said_words = said.stdout.splitlines()
        assert said_words[:2] == ["env", checked]
        assert said_words[4:] == list(each.words)


def test_what_slurm_refuses_leaves_nothing(tmp_path: Path, books: Books) -> None:
    (books.folder / "refuse").touch()
    parent = tmp_path / "n"
    sweep = sweep_of(parent, "a", "b")
    with pytest.raises(RefusedError, match="Invalid partition name specified; nothing was submitted"):
        slurm_array.submit_array(sweep, parent / ".sweep/1234", SlurmOptions())
    assert not parent.exists()
    (books.folder / "refuse").unlink()
    finish(sweep[0].run_dir)
    assert states(sweep, parent / ".sweep/1234")[1] == ("queued", "10_1 submitted")
    finish(sweep[1].run_dir)
    (books.folder / "squeue").unlink()
    (books.folder / "sbatch").unlink()
    assert states(sweep, parent / ".sweep/1234") == [("finished", "")] * 2  # nothing to ask


def test_more_runs_than_an_array_may_have_are_several_arrays(tmp_path: Path, books: Books) -> None:
    (books.folder / "most").write_text("2")
    parent = tmp_path / "n"
    sweep, place = sweep_of(parent, "a", "b", "c", "d", "e"), parent / ".sweep/1234"
    finish(sweep[2].run_dir)
    (books.folder / "most-jobs").write_text("2")
    assert states(sweep, place, SlurmOptions(parallel=1)) == [
        ("queued", "10_0 submitted"),
        ("queued", "10_1 submitted"),
        ("finished", ""),
        ("queued", "11_1 submitted"),
        ("waiting", ""),
    ]
    (_, why) = [row["why"] for row in json.loads((place / "sweep.json").read_text())["runs"]][-2:]
    assert why.startswith("Batch job submission failed")
    assert "nothing was submitted" not in why
    first, second = books.submitted()
    assert ("--dependency" in first, "--dependency=afterany:10" in second) == (False, True)  # never two at once
    assert ("#SBATCH --array=0-1%1" in first, "#SBATCH --array=1%1" in second) == (True, True)

    (books.folder / "most-jobs").unlink()
    results, jobs = slurm_array.submit_array(sweep, place, SlurmOptions())
    assert [result.state for result in results] == ["queued", "queued", "finished", "queued", "queued"]
    assert (results[-1].job, jobs) == ("12_0 submitted", ["10", "11", "12"])
    assert [known.name for known in jobs_of(sweep)] == ["10_0", "10_1", "11_1", "12_0"]
    assert "--dependency" not in books.submitted()[2]


def jobs_of(sweep: Sequence[SweepMember]) -> list[SlurmJob]:
    known = list_queued_runs()
    return [known[run_key(each.run_dir.path)] for each in sweep if run_key(each.run_dir.path) in known]


def test_a_client_killed_while_it_submits_submits_once(door: Door, books: Books) -> None:
    """sbatch lives on and keeps the lock: typed again meanwhile nothing is done, and later the job is found."""
    command = ("-m", *SMALL, "hydra/launcher=slurm", "hydra.launcher.parallel=1", "seed=0,1")
    (books.folder / "hold").touch()
    client = door.start(*command)
    wait_for(books.folder / "sbatch.pid", client)
    client.kill()
    assert client.wait() == -signal.SIGKILL
    meanwhile = door.run(*command)
    assert (meanwhile.returncode, meanwhile.stdout) == (3, "")
    assert "outputs/default/.slurm: in use by pid" in meanwhile.stderr
    (books.folder / "hold").unlink()
    pid = int((books.folder / "sbatch.pid").read_text())
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    again = door.run(*command)
    assert again.returncode == 0, again.stderr
    assert re.findall(r"seed=\d  queued +0/60 +\S+ pending \(Priority\)", again.stdout) == [
        f"seed={n}  queued  0/60  10_{n} pending (Priority)" for n in (0, 1)
    ]
    assert "look: squeue -r -j 10  save and stop for good: scancel 10\n" in again.stdout
    (text,) = books.submitted()
    assert "#SBATCH --array=0-1%1" in text
    (line,) = [line for line in text.splitlines() if line.startswith("    1) run=(")]
    assert line.endswith(" seed=1) ;;")
    assert "launcher" not in line
    assert not list(door.cwd.glob("outputs/default/*/config.yaml"))  # nothing runs here


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_file_of_the_launcher_says_every_option_and_its_default() -> None:
    with hydra.initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        config = hydra.compose("config", ["hydra/launcher=slurm"], return_hydra_config=True)
    chosen = {str(key): value for key, value in config.hydra.launcher.items()}
    assert chosen.pop("_target_") == "hydra_plugins.holdfast.HoldfastLauncher"
    assert chosen.keys() == {field.name for field in fields(SlurmOptions)}
    assert SlurmOptions(**chosen) == SlurmOptions()


def test_a_sweep_is_checked_whole_before_any_of_it_is_submitted(door: Door, books: Books) -> None:
    for words, said in (
        (("seed=0,1", "optim.lr=1e-3,-1"), "optim.lr: got -1; expected more than 0"),
        (("seed=0,1", "resume=never"), "resume=never: a sweep goes on with its runs"),
        (("seed=0,1", "hydra.launcher.retries=1"), "hydra.launcher.retries: belongs to a sweep on this machine"),
    ):
        done = door.run("-m", *SMALL, "hydra/launcher=slurm", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (words, done.stderr)
        assert said in done.stderr
    assert not books.submitted()
    assert not {path for path in door.tree() if path.endswith((".sbatch", "sweep.json", ".slurm"))}


def never(*_: object) -> list[object]:
    raise AssertionError


def test_a_search_needs_scores_and_is_refused() -> None:
    chosen = {
        "launcher": {"parallel": 3},
        "runtime": {"choices": {"hydra/launcher": "slurm", "hydra/sweeper": "optuna"}},
    }
    with pytest.raises(ConfigError, match="hydra/sweeper=optuna: chooses .* by the scores"):
        _launcher_option(OmegaConf.create(chosen), SweepJobs([], None, never))
    chosen["runtime"]["choices"]["hydra/sweeper"] = "basic"
    assert _launcher_option(OmegaConf.create(chosen), SweepJobs([], None, never)) == SlurmOptions(parallel=3)
