"""The law, on a real Slurm: preempted, out of time or requeued by hand, a run loses no step and ends bit for bit.

In the short form a run is frozen in the middle, so that whatever Slurm sends finds it there, however fast the machine
is; Slurm itself lets it go on (it sends SIGCONT with SIGTERM). In the full form nothing is frozen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from runner.launch.slurm_job import RECIPE
from tests.conftest import HANG_SECONDS, REPO, SMALL, Door, assert_same, last_logged
from tests.slurm import Slurm, wait

STEPS = 200
RUN = (*SMALL, f"train.steps={STEPS}")
LONG = (*SMALL, "train.steps=1500", "model.width=128", "data.seq_len=64")  # about half a minute
SRUN = "step=(srun --kill-on-bad-exit=1)"
PREEMPTED = ("SIGTERM", "the end of the Slurm job")  # told by the signal or by the books, whichever comes first
FORMS = {"srun": SRUN, "plain": "step=()"}


@pytest.fixture(scope="session")
def reference(make_door: Callable[[str], Door]) -> Iterator[Callable[[], Path]]:
    """The same run, uninterrupted and outside Slurm. It trains beside the first job, and is waited for when compared."""
    door = make_door("reference")
    with door.start(*RUN) as process:

        @functools.cache
        def finished() -> Path:
            _, err = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 0, err
            return door.the_run

        yield finished
        process.kill()


@pytest.fixture
def desk(door: Door, slurm: Slurm) -> Iterator[Door]:
    """A directory to submit from, with the recipe in both forms. What is left in the queue goes with it."""
    recipe = RECIPE.read_text()
    assert recipe.count(SRUN) == 1
    for form, line in FORMS.items():
        (door.cwd / f"{form}.sbatch").write_text(recipe.replace(SRUN, line))
    (door.cwd / "run.py").symlink_to(REPO / "run.py")
    yield door
    slurm.clear()


def fake_run(desk: Door, source: str) -> None:
    """In the place of run.py: a process that only ends, and says how often Slurm has started it again."""
    (desk.cwd / "run.py").unlink()
    head = "import os, signal, sys, time\nrestarts = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
    (desk.cwd / "run.py").write_text(head + source)


def freeze(run: Callable[[], Path], step: int) -> int:
    """Stop the process of a run as soon as it has logged `step`, in the middle of its work. Gives its pid."""
    wait(lambda: _logged(run) >= step, every=0.002)
    pid = json.loads((run() / "status.json").read_text())["attempt"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert _logged(run) < STEPS, "was over before it could be frozen"
    return pid


def _logged(run: Callable[[], Path]) -> int:
    try:
        return last_logged(run().parent.parent.parent, run().name)
    except ValueError:  # there is no run yet
        return 0


def preempt(slurm: Slurm, desk: Door, nodes: int) -> None:
    """A job that is more important, wants so many whole nodes, and is over at once."""
    options = ("--partition=urgent", f"--nodes={nodes}", "--exclusive", "--time=1", "--output=/dev/null")
    slurm.submit(*options, "--wrap=sleep 1", cwd=desk.cwd)


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def assert_went_on(run: Path, *why: str) -> None:
    """One attempt was stopped in the middle, with everything saved; the next one, of the same job, finished."""
    first, second = attempts(run)
    assert (first["ending"], second["ending"]) == ("preempted", "finished")
    assert first["why"].startswith(why), first["why"]
    assert 20 <= first["to_step"] == second["from_step"] < STEPS
    assert first["lost_steps"] == second["lost_steps"] == 0
    assert first["slurm"]["job_id"] == second["slurm"]["job_id"]
    assert (first["slurm"]["restart_count"], second["slurm"]["restart_count"]) == (0, 1)


@pytest.mark.slow
def test_an_array_goes_on_where_one_member_was_preempted(
    desk: Door, slurm: Slurm, reference: Callable[[], Path]
) -> None:
    """With srun, in a partition of long grace: the run is told at once, leaves early and is requeued by the recipe."""
    array = slurm.submit("--array=0-1", "--time=10", "--partition=batch", "srun.sbatch", *RUN, cwd=desk.cwd)
    jobs = [f"{array}_{member}" for member in (0, 1)]
    pids = {member: freeze(lambda member=member: run_of_seed(desk, member), 20) for member in (0, 1)}
    preempt(slurm, desk, nodes=1)
    wait(lambda: "1" in [slurm.job(job)["Restarts"] for job in jobs])
    for pid in pids.values():
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)
    ends = [slurm.ended(job) for job in jobs]
    assert [end["JobState"] for end in ends] == ["COMPLETED", "COMPLETED"]
    assert sorted(end["Restarts"] for end in ends) == ["0", "1"]  # one was preempted, and one only
    hit = [end["Restarts"] for end in ends].index("1")
    assert_went_on(run_of_seed(desk, hit), *PREEMPTED)
    assert attempts(run_of_seed(desk, hit))[0]["slurm"]["array_task_id"] == hit
    assert [line["ending"] for line in attempts(run_of_seed(desk, 1 - hit))] == ["finished"]
    assert_same(run_of_seed(desk, 0), reference(), STEPS)
    if hit == 1:
        uninterrupted = desk.run(*RUN, "seed=1", "root=alone")
        assert uninterrupted.returncode == 0, uninterrupted.stderr
        (config,) = desk.cwd.glob("alone/*/*/config.yaml")
        assert_same(run_of_seed(desk, 1), config.parent, STEPS)


def run_of_seed(desk: Door, seed: int) -> Path:
    """Raises ValueError where it is not there yet."""
    configs = list(desk.cwd.glob("outputs/*/*/config.yaml"))
    (found,) = [path.parent for path in configs if f"\nseed: {seed}\n" in path.read_text()]
    return found


@pytest.mark.parametrize("partition", ["hasty", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_plain_batch_job_is_preempted(
    partition: str, desk: Door, slurm: Slurm, reference: Callable[[], Path]
) -> None:
    """Without srun SIGTERM comes at the end of the grace (in `hasty` there is none); then Slurm requeues by itself."""
    job = slurm.submit("--time=10", f"--partition={partition}", "plain.sbatch", *RUN, cwd=desk.cwd)
    freeze(lambda: run_of_seed(desk, 0), 20)
    preempt(slurm, desk, nodes=2)
    end = slurm.ended(job)
    output = (desk.cwd / f"holdfast-{job}.out").read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output
    assert "DUE TO PREEMPTION" in output
    assert_went_on(desk.the_run, *PREEMPTED)
    assert_same(desk.the_run, reference(), STEPS)


@pytest.mark.slow
def test_the_launcher_submits_once_and_its_job_outlives_its_time_limit(
    desk: Door, slurm: Slurm, reference: Callable[[], Path]
) -> None:
    launcher = ("hydra/launcher=slurm", "hydra.launcher.time=10", "hydra.launcher.signal_seconds=80")
    wrong = desk.run(*RUN, *launcher, "train.stepps=3", **slurm.environment)
    assert (wrong.returncode, slurm.jobs()) == (2, []), wrong.stderr
    assert "did you mean steps?" in wrong.stderr
    submitted = desk.run(*RUN, *launcher, **slurm.environment)
    assert submitted.returncode == 0, submitted.stderr
    (job,) = slurm.jobs()
    assert f"job {job} submitted" in submitted.stdout
    again = desk.run(*RUN, *launcher, **slurm.environment)
    assert (again.returncode, slurm.jobs()) == (0, [job]), again.stderr
    assert f"job {job} has it already" in again.stdout

    pid = freeze(lambda: run_of_seed(desk, 0), 20)
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # the end comes near: no minutes of waiting for it
    wait(lambda: is_pending(pid, signal.SIGUSR1))
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    os.kill(pid, signal.SIGCONT)
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert_went_on(desk.the_run, "SIGUSR1")
    assert_same(desk.the_run, reference(), STEPS)
    said = next(line for line in submitted.stdout.splitlines() if line.startswith("its output: "))
    assert "finished 200 steps" in (desk.cwd / said.removeprefix("its output: ")).read_text()
    finished = desk.run(*RUN, *launcher, **slurm.environment)
    assert (finished.returncode, slurm.jobs()) == (0, [])
    assert "is finished: 200 steps" in finished.stdout


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to a stopped process: it stands in its mask until it goes on."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (number - 1) & 1)


# It submits, and does not say so while a file is there.
SLOW_SBATCH = """#!/bin/sh
{sbatch} "$@" > {folder}/said; code=$?
while [ -e {folder}/hold ]; do sleep 0.05; done
cat {folder}/said; exit $code
"""


def submit_and_die(desk: Door, slurm: Slurm, sweep: tuple[str, ...], tasks: int) -> None:
    """The client is killed when its array is in the queue, and it does not know that yet."""
    slow = desk.cwd / "slow"
    slow.mkdir()
    (slow / "hold").touch()
    sbatch = shutil.which("sbatch", path=slurm.environment["PATH"])
    (slow / "sbatch").write_text(SLOW_SBATCH.format(sbatch=sbatch, folder=slow))
    (slow / "sbatch").chmod(0o755)
    client = desk.start(*sweep, **slurm.environment | {"PATH": f"{slow}:{slurm.environment['PATH']}"})
    wait(lambda: client.poll() is not None or len(slurm.jobs()) == tasks)
    client.kill()
    assert client.wait() == -signal.SIGKILL
    (slow / "hold").unlink()


# In the place of Python: it ends when it may. Task 1 asks at first to be run again.
FAKE_PYTHON = """#!/bin/sh
while [ ! -e {folder}/go ] && [ ! -e {folder}/go-$SLURM_ARRAY_TASK_ID ]; do sleep 0.1; done
[ "$SLURM_ARRAY_TASK_ID-${{SLURM_RESTART_COUNT:-0}}" = 1-0 ] && exit 75
exit 0
"""


def test_a_sweep_is_one_array_which_outlives_its_client(desk: Door, slurm: Slurm) -> None:
    python = desk.cwd / "fake_python"
    python.write_text(FAKE_PYTHON.format(folder=desk.cwd))
    python.chmod(0o755)
    launcher = ("hydra/launcher=slurm", "hydra.launcher.time=10", f"hydra.launcher.python={python}")
    sweep = ("-m", *RUN, *launcher, "hydra.launcher.parallel=2", "seed=0,1,2,3")
    submit_and_die(desk, slurm, sweep, 4)
    array = slurm.jobs()[0].partition("_")[0]
    tasks = [f"{array}_{number}" for number in range(4)]
    wait(lambda: [slurm.job(task)["JobState"] for task in tasks] == ["RUNNING", "RUNNING", "PENDING", "PENDING"])
    attached = desk.run(*sweep, **slurm.environment)
    assert (attached.returncode, sorted(slurm.jobs())) == (0, tasks), attached.stderr
    assert all(f"{task} running" in attached.stdout for task in tasks[:2]), attached.stdout
    assert all(f"{task} pending (JobArrayTaskLimit)" in attached.stdout for task in tasks[2:]), attached.stdout
    (desk.cwd / "go-1").touch()
    wait(lambda: slurm.job(tasks[1])["Restarts"] == "1")
    (desk.cwd / "go").touch()
    ends = [slurm.ended(task) for task in tasks]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),  # 75: this task alone was requeued
        ("COMPLETED", "0"),
        ("COMPLETED", "0"),
    ]
    assert len(list(desk.cwd.glob(f"outputs/default/.sweep/*/slurm/{array}_*.out"))) == 4


@pytest.mark.slow
def test_a_sweep_with_a_killed_client_and_a_preemption(desk: Door, slurm: Slurm, reference: Callable[[], Path]) -> None:
    """Six runs, one array: the client dies in the middle of submitting it, then both nodes are taken away."""
    sweep = ("-m", *RUN, "hydra/launcher=slurm", "hydra.launcher.time=10", "hydra.launcher.parallel=2", "seed=range(6)")
    submit_and_die(desk, slurm, sweep, 6)
    pids = [freeze(lambda seed=seed: run_of_seed(desk, seed), 20) for seed in (0, 1)]
    attached = desk.run(*sweep, **slurm.environment)
    assert (attached.returncode, len(slurm.jobs())) == (0, 6), attached.stderr
    array = slurm.jobs()[0].partition("_")[0]
    tasks = [f"{array}_{number}" for number in range(6)]
    assert all(f"{task} running" in attached.stdout for task in tasks[:2]), attached.stdout
    assert all(f"{task} pending (" in attached.stdout for task in tasks[2:]), attached.stdout

    preempt(slurm, desk, nodes=2)
    wait(lambda: [slurm.job(task)["Restarts"] for task in tasks[:2]] == ["1", "1"])
    again = desk.run(*sweep, **slurm.environment)  # what is requeued is in the queue, and is left alone
    assert (again.returncode, again.stdout.count("submitted")) == (0, 0), again.stdout
    assert [slurm.ended(task)["JobState"] for task in tasks] == ["COMPLETED"] * 6
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    for seed in range(6):
        lines = attempts(run_of_seed(desk, seed))
        assert [line["ending"] for line in lines] == (["preempted", "finished"] if seed < 2 else ["finished"])
        assert {(line["slurm"]["array_job_id"], line["slurm"]["array_task_id"]) for line in lines} == {
            (int(array), seed)
        }
        assert all(first["ended"] < second["started"] for first, second in pairwise(lines))  # no two at one time
        assert sum(line["lost_steps"] for line in lines) == 0
    assert_same(run_of_seed(desk, 0), reference(), STEPS)
    alone = desk.run(*RUN, "seed=5", "root=alone")
    assert alone.returncode == 0, alone.stderr
    (config,) = desk.cwd.glob("alone/*/*/config.yaml")
    assert_same(run_of_seed(desk, 5), config.parent, STEPS)
    over = desk.run(*sweep, **slurm.environment)
    assert (over.returncode, slurm.jobs()) == (0, []), over.stderr
    assert "6 runs: 6 finished" in over.stdout


def test_every_ending_of_the_recipe(desk: Door, slurm: Slurm) -> None:
    """The exit code of the run is the job's; 75 and a signal before it could listen are requeued, nothing else is."""
    fake_run(desk, "code = int(sys.argv[1])\nsys.exit(code if not restarts else 0)\n")
    jobs = {
        code: slurm.submit("--time=5", "srun.sbatch", str(code), cwd=desk.cwd) for code in (75, 143, 0, 1, 2, 3, 4, 5)
    }
    never = slurm.submit("--time=5", "--no-requeue", "plain.sbatch", "75", cwd=desk.cwd)
    (desk.cwd / "scontrol").write_text('#!/bin/sh\n[ "$1" = requeue ] && exit 1\necho JobState=RUNNING\n')
    (desk.cwd / "scontrol").chmod(0o755)
    path = f"--export=ALL,PATH={desk.cwd}:{slurm.environment['PATH']}"
    deaf = slurm.submit("--time=5", path, "plain.sbatch", "75", cwd=desk.cwd)

    for code, job in jobs.items():
        end = slurm.ended(job)
        requeued = code in (75, 143)
        assert end["Restarts"] == ("1" if requeued else "0"), code
        assert end["ExitCode"] == (f"{code}:0" if not requeued else "0:0")
        assert end["JobState"] == ("COMPLETED" if requeued or code == 0 else "FAILED")
    for job, said in (
        (never, "was submitted with --no-requeue; submit it again"),
        (deaf, "could not be requeued; submit"),
    ):
        end = slurm.ended(job)
        assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "75:0")
        assert said in (desk.cwd / f"holdfast-{job}.out").read_text()


# In the place of a run of two processes: what each does is told for each start, `9` being killed by that signal.
TWO_TASKS = """
sys.path.insert(0, {repo!r})
from runner.hosts.exit_code import tell_exit_code
from runner.hosts.options import AutoHosts
place = AutoHosts(address="127.0.0.1").find_place(os.environ)
assert (place.count, place.index) == (2, int(os.environ["SLURM_PROCID"]))
act = sys.argv[1 + restarts].split(",")[place.index]
if act == "signal":  # the shell of the job hands it on, and one that hears it is enough
    signal.signal(signal.SIGUSR1, lambda *_: (tell_exit_code(75), os._exit(75)))
    open("listens", "a").write(act)
    time.sleep(60)
if act == "killed":
    os.kill(os.getpid(), 9)
time.sleep(0.5)
tell_exit_code(int(act))
sys.exit(int(act))
"""
TWO_NODES = ("--time=5", "--nodes=2", "--ntasks-per-node=1")


def test_of_two_tasks_the_first_says_how_the_run_ended(desk: Door, slurm: Slurm) -> None:
    """srun says 137 in each of the first two cases."""
    fake_run(desk, TWO_TASKS.format(repo=str(REPO)))
    for starts, restarts, ending in (
        (("75,killed", "0,0"), "1", ("COMPLETED", "0:0")),
        (("killed,75",), "0", ("FAILED", "137:0")),
        (("3,3",), "0", ("FAILED", "3:0")),
    ):
        job = slurm.submit(*TWO_NODES, "srun.sbatch", *starts, cwd=desk.cwd)
        end = slurm.ended(job)
        assert (end["JobState"], end["ExitCode"]) == ending, (desk.cwd / f"holdfast-{job}.out").read_text()
        assert end["Restarts"] == restarts, starts
    job = slurm.submit(*TWO_NODES, "srun.sbatch", "signal,signal", "0,0", cwd=desk.cwd)
    wait(lambda: (desk.cwd / "listens").exists() and len((desk.cwd / "listens").read_text()) == 2 * len("signal"))
    slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")


def submit_to_two_nodes(desk: Door, slurm: Slurm) -> str:
    """The names of emulated nodes lead nowhere: the address is said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"hosts.address=127.0.0.1:{probe.getsockname()[1]}"
    return slurm.submit("--time=10", *TWO_NODES[1:], "srun.sbatch", *RUN, "mesh=data", address, cwd=desk.cwd)


def pid_of_task(job: str, task: int) -> int:
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={task}".encode(), b"SLURM_STEP_NUM_TASKS=2"}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            runs = b"run.py" in (process / "cmdline").read_bytes()
            if runs and wanted <= set((process / "environ").read_bytes().split(b"\0")):
                return int(process.name)
    raise AssertionError(f"task {task} of job {job} is not there")


@pytest.mark.slow
def test_a_run_on_two_nodes_that_loses_a_process_is_requeued(desk: Door, slurm: Slurm) -> None:
    """srun says 137; the run says 75."""
    job = submit_to_two_nodes(desk, slurm)
    wait(lambda: last_logged(desk.cwd) >= 20)
    os.kill(pid_of_task(job, 1), signal.SIGKILL)
    end = slurm.ended(job)
    output = (desk.cwd / f"holdfast-{job}.out").read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output
    first, second = attempts(desk.the_run)
    assert (first["lost_process"], second["ending"]) == (True, "finished")
    assert "process 1 (" in first["why"]


@pytest.mark.slow
def test_a_run_on_two_nodes_is_preempted_and_goes_on(desk: Door, slurm: Slurm) -> None:
    job = submit_to_two_nodes(desk, slurm)
    freeze(lambda: run_of_seed(desk, 0), 20)
    preempt(slurm, desk, nodes=2)
    end = slurm.ended(job)
    output = (desk.cwd / f"holdfast-{job}.out").read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), output
    assert_went_on(desk.the_run, *PREEMPTED)
    assert output.count("finished 200 steps") == 1, "process 0 alone says so"


def test_a_cancelled_job_saves_and_does_not_come_back(desk: Door, slurm: Slurm) -> None:
    job = slurm.submit("--time=10", "srun.sbatch", *RUN, cwd=desk.cwd)
    freeze(lambda: run_of_seed(desk, 0), 20)
    slurm.ask("scancel", job)
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    wait(lambda: len(attempts(desk.the_run)) == 1 if (desk.the_run / "attempts.jsonl").exists() else False)
    (line,) = attempts(desk.the_run)
    assert (line["ending"], line["lost_steps"]) == ("preempted", 0)
    assert line["why"].startswith(PREEMPTED)


@pytest.fixture(scope="session")
def long_reference(make_door: Callable[[str], Door]) -> Path:
    door = make_door("long-reference")
    done = door.run(*LONG)
    assert done.returncode == 0, done.stderr
    return door.the_run


@pytest.mark.slow
@pytest.mark.parametrize(("form", "partition"), [("srun", "batch"), ("srun", "hasty"), ("plain", "hasty")])
def test_preempted_twice_at_full_speed(
    form: str, partition: str, desk: Door, slurm: Slurm, long_reference: Path
) -> None:
    """While it trains: Slurm preempts a run that nothing holds still."""
    job = slurm.submit("--time=10", f"--partition={partition}", f"{form}.sbatch", *LONG, cwd=desk.cwd)
    for restarts, step in (("1", 100), ("2", 500)):
        wait(lambda step=step: last_logged(desk.cwd) >= step)
        preempt(slurm, desk, nodes=2)
        wait(lambda restarts=restarts: restarts == slurm.job(job)["Restarts"] or not slurm.jobs())
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "2")
    lines = attempts(desk.the_run)
    assert [line["ending"] for line in lines] == ["preempted", "preempted", "finished"]
    assert [line["lost_steps"] for line in lines] == [0, 0, 0]
    assert_same(desk.the_run, long_reference, 1500)


SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
for word; do case $word in [0-9]*) scontrol -o show job "$word" ;; esac; done |
    sed -nE 's/^JobId=([0-9]+) (ArrayJobId=([0-9]+) ArrayTaskId=([0-9]+) )?.*JobState=([A-Z]+) .*/\\3_\\4 \\1|\\5|/; s/^_ //; s/ [0-9]+\\|/|/; p'
"""
SUBMITIT = ("-m", *RUN, "hydra/launcher=submitit_slurm", "hydra.launcher.partition=batch")


@pytest.fixture
def accounting(desk: Door, slurm: Slurm) -> dict[str, str]:
    """An environment with submitit, and an sacct that knows what scontrol does: accounting would need a database."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs submitit, of the extra `submitit`")
    (desk.cwd / "bin").mkdir()
    (desk.cwd / "bin/sacct").write_text(SACCT)
    (desk.cwd / "bin/sacct").chmod(0o755)
    return slurm.environment | {"PATH": f"{desk.cwd}/bin:{slurm.environment['PATH']}"}


@pytest.mark.slow
def test_submitit_requeues_what_was_preempted(
    desk: Door, slurm: Slurm, reference: Callable[[], Path], accounting: dict[str, str]
) -> None:
    client = desk.start(*SUBMITIT, "hydra.launcher.timeout_min=30", "seed=0,1", **accounting)
    pids = [freeze(lambda seed=seed: run_of_seed(desk, seed), 20) for seed in (0, 1)]
    array = slurm.jobs()[0].partition("_")[0]
    preempt(slurm, desk, nodes=2)
    ends = [slurm.ended(f"{array}_{task}") for task in (0, 1)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [("COMPLETED", "1")] * 2
    out, err = client.communicate(timeout=HANG_SECONDS)
    assert (client.returncode, "2 runs: 2 finished" in out) == (0, True), out + err
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for seed in (0, 1):
        assert_went_on(run_of_seed(desk, seed), *PREEMPTED)
        assert attempts(run_of_seed(desk, seed))[0]["slurm"]["array_task_id"] == seed
    assert_same(run_of_seed(desk, 0), reference(), STEPS)
    assert desk.run(*SUBMITIT, "seed=0,1", **accounting).returncode == 0
    assert slurm.jobs() == []


@pytest.mark.slow
def test_submitit_counts_timeouts_and_a_cancelled_job_stays_away(
    desk: Door, slurm: Slurm, reference: Callable[[], Path], accounting: dict[str, str]
) -> None:
    """To submitit every USR2 is a timeout where a job has ten minutes or less; here it may have one."""
    options = ("hydra.launcher.timeout_min=8", "hydra.launcher.max_num_timeout=1", "seed=0")
    for step, command in ((20, "--signal=USR2"), (40, "--signal=USR2"), (60, "--full")):
        if step != 40:  # the second time it is the same job
            client = desk.start(*SUBMITIT, *options, **accounting)
        pid = freeze(lambda: run_of_seed(desk, 0), step)
        (job,) = slurm.jobs()
        slurm.ask("scancel", command, job)
        os.kill(pid, signal.SIGCONT)
        if step == 20:
            wait(lambda job=job: slurm.job(job)["Restarts"] == "1")
            continue
        out, err = client.communicate(timeout=HANG_SECONDS)
        assert (client.returncode, "1 runs: 1 stopped" in out) == (75, True), out + err
        (sweep,) = desk.cwd.glob("outputs/*/.sweep/*/sweep.json")
        (row,) = json.loads(sweep.read_text())["runs"]
        assert row["why"] == (f"job {job} is cancelled, with no result" if step == 60 else "SIGUSR2")
        assert slurm.ended(job)["JobState"] == ("COMPLETED" if step == 40 else "CANCELLED")
    assert [line["lost_steps"] for line in attempts(desk.the_run)] == [0, 0, 0]
    last = desk.run(*SUBMITIT, *options, **accounting)
    assert last.returncode == 0, last.stdout + last.stderr
    assert_same(desk.the_run, reference(), STEPS)
