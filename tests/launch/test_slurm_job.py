"""`hydra/launcher=slurm` without a Slurm: what is refused, what the job says, and what an attempt records of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from runner.errors import ConfigError
from runner.hosts import exit_code
from runner.launch.slurm_job import RECIPE, SlurmOptions, render_job
from runner.rundir.layout import RunDir
from tests.conftest import SMALL, Door

LAUNCHER = "hydra/launcher=slurm"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([LAUNCHER, "hydra.launcher.partion=gpu"], "hydra.launcher.partion: unknown key; did you mean partition?"),
        (["hydra.launcher.time=60"], "hydra.launcher.time: belongs to hydra/launcher=slurm; add that"),
        ([LAUNCHER, "hydra.launcher.time=1h"], 'hydra.launcher.time: got "1h"; expected a whole number'),
        ([LAUNCHER, "hydra.launcher.time=2"], "hydra.launcher.signal_seconds: got 120; expected less than the job's"),
        ([LAUNCHER, "hydra.launcher.qos='a b'"], "hydra.launcher.qos: got 'a b'; expected one word"),
        ([LAUNCHER, "hydra.launcher.sbatch=['--output=x']"], "hydra.launcher.sbatch: --output is set by the launcher"),
        ([LAUNCHER, "hydra.launcher.nodes=0"], "hydra.launcher.nodes: got 0; expected at least 1"),
        (
            [LAUNCHER, "hydra.launcher.sbatch=['--ntasks-per-node=2']"],
            "hydra.launcher.sbatch: --ntasks-per-node is set by the launcher",
        ),
        (
            [LAUNCHER, "hydra.launcher.nodes=2", "hosts=local"],
            "hydra.launcher.nodes=2 hydra.launcher.tasks_per_node=1: with hosts=local they would not be one run",
        ),
        (
            ["-m", LAUNCHER, "hydra.launcher.tasks_per_node=2", "hosts=none", "seed=0,1"],
            "hydra.launcher.nodes=1 hydra.launcher.tasks_per_node=2: with hosts=none they would not be one run",
        ),
        ([LAUNCHER, "hydra.launcher.sbatch=[now]"], "hydra.launcher.sbatch: got 'now'; expected a long option"),
        ([LAUNCHER, "train.stepps=3"], "train.stepps: unknown key; did you mean steps?"),
        ([LAUNCHER, "resume=never"], "resume=never: a requeued job goes on with its run"),
        (
            ["hydra/launcher=slurmm"],
            "hydra/launcher: got slurmm; expected one of basic, local, slurm",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(words: list[str], said: str, door: Door) -> None:
    before = door.tree()
    done = door.run(*SMALL, *words)
    assert done.stderr.startswith(f"error: {said}")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert door.tree() == before


def test_no_sbatch_is_one_plain_line(door: Door) -> None:
    before = door.tree()
    done = door.run(*SMALL, LAUNCHER, PATH=str(door.cwd))
    assert (done.returncode, door.tree()) == (3, before)
    assert done.stderr.startswith("error: hydra/launcher=slurm: there is no sbatch here; ")


def test_the_job_is_the_recipe_with_the_command_filled_in(tmp_path: Path) -> None:
    options = SlurmOptions(
        partition="gpu", time=90, cpus=4, gpus="h100:1", sbatch=["--constraint=a|b"], setup=["module load x"]
    )
    run, desk = RunDir(tmp_path / "n" / "it s-1"), RunDir(tmp_path / "n" / ".slurm" / "it s-1")
    text = render_job(run, desk, ("+a={kind: x}", "name=$HOME"), options)
    lines = text.splitlines()
    for asked in (
        "partition=gpu",
        "time=90",
        "cpus-per-task=4",
        "gres=gpu:h100:1",
        "constraint=a|b",
        "signal=B:USR1@120",
    ):
        assert f"#SBATCH --{asked}" in lines
    assert lines.index("module load x") < next(n for n, line in enumerate(lines) if line.startswith("run=("))
    tail = RECIPE.read_text().partition("\nrun=(")[2].partition("\n")[2]
    assert text.endswith(tail)
    assert "scontrol requeue" in tail
    words = shlex.split(next(line for line in lines if line.startswith("run=("))[len("run=(") : -1])
    assert words[-2:] == ["+a={kind: x}", "name=$HOME"]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_job_of_several_nodes_is_one_step_whose_exit_code_process_0_tells(tmp_path: Path) -> None:
    run, desk = RunDir(tmp_path / "n/run"), RunDir(tmp_path / "n/.slurm/run")
    several = render_job(run, desk, (), SlurmOptions(nodes=2, tasks_per_node=4))
    assert "#SBATCH --nodes=2 --ntasks=8 --ntasks-per-node=4" in several.splitlines()
    assert "#SBATCH --nodes=1 --ntasks=1 --ntasks-per-node=1" in render_job(run, desk, (), SlurmOptions()).splitlines()
    chosen = several.partition("step=")[2].partition("# Since")[0]
    for tasks, step in (("8", "--kill-on-bad-exit=0"), ("1", "--kill-on-bad-exit=1"), (None, "--kill-on-bad-exit=1")):
        environment = {"PATH": os.environ["PATH"]} | ({"SLURM_NTASKS": tasks} if tasks else {})
        ask = f'step={chosen}\necho "${{step[@]}}" "$HOLDFAST_EXIT_CODE_FILE"; rm -f "$told"'
        said = subprocess.run(["bash", "-c", ask], env=environment, capture_output=True, text=True, check=True)
        assert step in said.stdout
        assert ("/tmp" in said.stdout) == (tasks == "8")
    for script in (several, RECIPE.read_text()):
        assert "HOLDFAST_EXIT_CODE_FILE" == exit_code.EXIT_CODE_FILE in script
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-s", "bash", "-"], input=script, text=True, check=True)


def test_process_0_alone_tells_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    exit_code.tell_exit_code(1)
    monkeypatch.setenv(exit_code.EXIT_CODE_FILE, str(told))
    monkeypatch.setenv("SLURM_PROCID", "1")
    exit_code.tell_exit_code(1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_PROCID", "0")
    exit_code.tell_exit_code(75)
    assert told.read_text() == "75\n"
    monkeypatch.setenv(exit_code.EXIT_CODE_FILE, str(tmp_path))
    exit_code.tell_exit_code(75)  # a file that cannot be written changes nothing


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], [LAUNCHER], ["-m", LAUNCHER, "seed=0,1"]])
def test_what_starts_other_processes_is_started_by_one(words: list[str], door: Door) -> None:
    before = door.tree()
    several = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
    done = door.run(*SMALL, *words, **several)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "this is process 1 of 2, and a " in done.stderr
    assert "is started by one; type it outside of srun and mpirun" in done.stderr
    assert door.tree() == before


def test_a_word_that_would_be_another_line_of_the_script_is_refused() -> None:
    from runner.config.schema import validate_options

    for options in ({"account": "a\n#SBATCH --uid=0"}, {"sbatch": ["--x\ny"]}, {"setup": ["a\nb"]}):
        with pytest.raises(ConfigError):
            validate_options(SlurmOptions, options)


def test_a_folder_that_would_be_another_line_of_the_script_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, desk = RunDir(tmp_path / "n/run"), RunDir(tmp_path / "n/.slurm/run")
    odd = tmp_path / "x\ntouch planted"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(ConfigError, match="more than one line of the script"):
        render_job(run, desk, (), SlurmOptions())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="more than one line of the script"):
        render_job(RunDir(odd / "run"), desk, (), SlurmOptions())


def test_an_attempt_records_its_job(door: Door) -> None:
    from tests.laws.test_slurm import attempts

    task = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert door.run(*SMALL, "train.steps=2", **task).returncode == 0
    (line,) = attempts(door.the_run)
    assert line["slurm"] == {"job_id": 12, "array_job_id": 11, "array_task_id": 3, "restart_count": 2}
