"""The door as a new user meets it: wrong commands, resuming, continuing, two at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from tests.conftest import REPO, SMALL, Door, fail_loudly, last_logged

pytestmark = pytest.mark.forked

WRONG = [
    "ckpt.evry=5",
    "ckpt=combind",
    "chkpt=best",
    "train.steps=five",
    "train.steps=0",
    "remat=attention_onyl",
    "optim.lr=-1",
    "model=gpt data=digits",
    "data=text",
    "data=text data.path=/nowhere/at/all",
    "--foo",
    "ckpt=periodic,best",
    "seed=0,1",
    "foo",
    "optim.lr=[1",
    "~nothing",
    "+ckpt=best",
    "model=mlp data=digits remat=attention_only",
    "overwrite=true",
]


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_gets_plain_lines_and_leaves_nothing(command: str, door: Door) -> None:
    before = door.tree()
    done = door.run(*command.split())
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert door.tree() == before


def test_the_closest_option_is_named(door: Door) -> None:
    assert "did you mean combined?" in door.run("ckpt=combind").stderr
    assert "did you mean attention_only?" in door.run("remat=attention_onyl").stderr
    assert "add -m" in door.run("ckpt=periodic,best").stderr


def test_a_batch_that_the_machine_cannot_divide_leaves_nothing(door: Door) -> None:
    """Found only after jax has started, and still nothing was written."""
    before = door.tree()
    done = door.run(*SMALL, "mesh=data", "data.batch_size=9", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert (done.returncode, done.stderr) == (
        2,
        "error: data.batch_size: got 9; it must divide evenly among mesh.data=2 devices\n",
    )
    assert door.tree() == before


@pytest.mark.forked(quick=True)
def test_the_life_of_a_run(door: Door) -> None:
    """New, finished, typed again in another order, continued with more steps, refused as another run, set aside."""
    first = door.run(*SMALL, "train.steps=20", "optim.lr=1e-2")
    assert first.returncode == 0, first.stderr
    run = door.the_run
    for name in ("README.md", "config.yaml", "status.json", "attempts.jsonl", "checkpoints/20", "logs/metrics.jsonl"):
        assert (run / name).exists(), name
    assert (run / "logs/timing.jsonl").exists()
    assert (run / "logs/run.log").exists()
    assert (run / "checkpoints/best").resolve().parent == run / "checkpoints"
    snapshot = (run / "config.yaml").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}

    again = door.run("optim.lr=0.01", *reversed(SMALL), "train.steps=20")
    assert again.returncode == 0
    assert "is finished: 20 steps" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}

    relative = str(run.relative_to(door.cwd))
    more = door.run(f"dir={relative}", "train.steps=40", "ckpt=combined")
    assert more.returncode == 0, more.stderr
    assert "warning: changed: train.steps: 20 → 40" in more.stdout
    assert "restored step 20" in more.stdout
    assert (run / "config.yaml").read_bytes() == snapshot
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [(line["from_step"], line["to_step"]) for line in lines] == [(0, 20), (20, 40)]
    assert any(change.startswith("train.steps: 20") for change in lines[1]["drift"])

    other = door.run(f"dir={relative}", "seed=1", "model.width=64")
    assert other.returncode == 3
    assert "model.width: 32 → 64" in other.stderr
    assert "seed: 0 → 1" in other.stderr
    assert len(other.stderr.splitlines()) <= 2

    assert door.run(*SMALL, "train.steps=20", "optim.lr=1e-2", "resume=never").returncode == 3
    anew = door.run(*SMALL, "train.steps=20", "optim.lr=1e-2", "resume=never", "overwrite=true")
    assert anew.returncode == 0, anew.stderr
    (aside,) = (run.parent / ".overwritten").iterdir()
    assert (aside / "checkpoints/40").is_dir()
    assert not (run / "checkpoints/40").exists()

    longer = door.run(*SMALL, "train.steps=40", "optim.lr=1e-2")  # of this length a step is compiled
    assert f"differs from {relative} only in train.steps: 20 → 40; to continue that one: add dir=" in longer.stdout


def test_resume_must_have_something_to_resume(door: Door) -> None:
    before = door.tree()
    done = door.run(*SMALL, "resume=must")
    assert done.returncode == 3
    assert "nothing is at outputs/default/" in done.stderr
    assert door.run("dir=outputs/no/where").returncode == 3
    assert door.tree() == before


# In the short form tests/laws/test_two_writers.py has two of them.
@pytest.mark.slow
def test_two_processes_never_write_one_run(door: Door) -> None:
    command = (*SMALL, "train.steps=100000", "train.eval_steps=100000", "ckpt=periodic")
    holder = door.start(*command)
    while last_logged(door.cwd) < 5:
        assert holder.poll() is None, holder.communicate()
        time.sleep(0.01)
    second = door.run(*command)
    assert second.returncode == 3
    assert f"in use by pid {holder.pid} on host {socket.gethostname()}" in second.stderr
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    third = door.start(*command)  # the lock of a killed holder is gone with it
    while not (door.the_run / "attempts.jsonl").exists():
        assert third.poll() is None, third.communicate()
        time.sleep(0.01)
    third.send_signal(signal.SIGTERM)
    third.communicate()
    assert third.returncode == 75


@pytest.mark.forked(quick=True)
def test_a_bug_is_told_in_full_and_recorded(door: Door) -> None:
    """Here: a data file that vanishes between validation and reading."""
    (door.cwd / "sitecustomize.py").write_text(
        fail_loudly(
            "import data.text_files\ndef text(*_): raise RuntimeError('planted')\ndata.text_files.read_text = text\n"
        )
    )
    (door.cwd / "sitecustomize.py").rename(door.cwd / "later.py")
    door.kill_at(20, *SMALL)
    (door.cwd / "later.py").rename(door.cwd / "sitecustomize.py")
    done = door.run(*SMALL, PYTHONPATH=f"{door.cwd}{os.pathsep}{REPO}")
    assert done.returncode == 1
    endings = [json.loads(line)["ending"] for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert endings == ["killed", "failed"]  # the killed one gets its line all the same
    assert "RuntimeError: planted" in done.stderr
    assert "RuntimeError: planted" in (door.the_run / "logs/run.log").read_text()
    status = json.loads((door.the_run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("failed", "RuntimeError: planted")


@pytest.mark.forked(quick=True)
def test_a_diverging_run_stops_and_keeps_its_last_good_state(door: Door) -> None:
    done = door.run(
        *SMALL, "optim.lr=1e30", "optim.clip_norm=null", "schedule.warmup_steps=0", "ckpt.save.periodic.steps=1"
    )
    assert done.returncode == 4, done.stderr
    assert "is nan" in done.stderr or "is inf" in done.stderr
    assert json.loads((door.the_run / "status.json").read_text())["state"] == "diverged"


# In the short form tests/train/test_compile_cache.py has a restart that finds its programs.
@pytest.mark.slow
def test_a_resumed_run_compiles_its_step_from_the_cache(door: Door) -> None:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(door.cwd / "compiled")}

    def programs() -> set[str]:
        return {path.name for path in (door.cwd / "compiled").glob("jit_train_step-*.program")}

    process = door.start(*SMALL, **cache)
    while last_logged(door.cwd) < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    first = programs()
    assert len(first) == 1
    assert door.run(*SMALL, **cache).returncode == 0
    assert programs() == first


@pytest.mark.slow
def test_a_stopped_sweep_exits_75_and_the_same_command_finishes_it(door: Door) -> None:
    command = ("-m", *SMALL, "ckpt=periodic,best")
    door.kill_at(20, *command, number=signal.SIGTERM)
    assert len(list(door.cwd.glob("outputs/*/*/config.yaml"))) == 1
    assert door.run(*command).returncode == 0
    states = [json.loads(path.read_text())["state"] for path in door.cwd.glob("outputs/*/*/status.json")]
    assert states == ["finished", "finished"]


def test_without_checkpoints_a_stopped_run_says_that_it_starts_over(door: Door) -> None:
    said = door.kill_at(20, *SMALL, "ckpt=none", number=signal.SIGTERM)
    assert "nothing is saved, " in said
    assert "steps are lost (ckpt.last=false); the same command starts over" in said
    done = door.run(*SMALL, "ckpt=none")
    assert done.returncode == 0
    assert "finished 60 steps" in done.stdout
    steps = [json.loads(line)["step"] for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[0] == 5


@pytest.mark.forked(quick=True)
def test_changed_data_is_refused_and_the_run_left_as_it_was(door: Door) -> None:
    assert door.run(*SMALL, "train.steps=10").returncode == 0
    before = {path: path.read_bytes() for path in door.the_run.rglob("*") if path.is_file()}
    with (door.cwd / "corpus.txt").open("a") as corpus:
        corpus.write("one more line\n")
    done = door.run(f"dir={door.the_run}", "train.steps=20")
    assert done.returncode == 3
    assert "the data is not what this run was trained on" in done.stderr
    after = {path: path.read_bytes() for path in door.the_run.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {".lock", ".pulse", "run.log", "README.md"}


@pytest.mark.forked(quick=True)
def test_what_is_not_durable_at_the_end_is_exit_5(door: Door) -> None:
    """A limit on the size of files: every write beyond it fails in the kernel (a full disk: test_full_disk.py)."""
    (door.cwd / "sitecustomize.py").write_text(
        fail_loudly(
            "import resource, signal\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        )
    )
    done = door.run(*SMALL, "train.steps=10", PYTHONPATH=str(door.cwd), JAX_COMPILATION_CACHE_DIR="")
    assert done.returncode == 5, (done.stdout, done.stderr)
    assert "step 10 cannot be saved: File too large" in done.stderr
    assert json.loads((door.the_run / "status.json").read_text())["state"] == "failed"
    (door.cwd / "sitecustomize.py").unlink()
    assert door.run(*SMALL, "train.steps=10").returncode == 0


@pytest.mark.forked(quick=True)
def test_what_can_never_be_saved_ends_the_run_at_its_first_save(door: Door) -> None:
    """Planted: background saves see arrays that the next step has donated away. It would be so at each of them."""
    (door.cwd / "sitecustomize.py").write_text(
        fail_loudly(
            "import runner.checkpoint.store as store\nstore.copy_to_host = lambda state: state\n"
            "store.wait_for_copy = lambda held: False\n"
        )
    )
    process = door.start(*SMALL, "train.steps=25", PYTHONPATH=f"{door.cwd}{os.pathsep}{REPO}")
    _, err = process.communicate(timeout=300)  # it would wait for twenty minutes
    assert process.returncode == 5, err
    assert "cannot be saved: " in err
    assert "no later step could be, so training ends here" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_does_not_end_a_run(door: Door) -> None:
    process = door.start(*SMALL)
    assert process.stdout is not None
    assert process.stderr is not None
    assert "(new run)" in process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert "finished 60 steps" in (door.the_run / "logs/run.log").read_text()


@pytest.mark.forked(quick=True)
def test_a_refused_command_moves_and_removes_nothing(door: Door) -> None:
    """Weights to begin with that are not there: with overwrite=true, and for a run that has lost its configuration."""
    assert door.run(*SMALL, "train.steps=10").returncode == 0
    run, wrong = door.the_run, "init_from=outputs/default/nothing"
    kept = {path for path in door.tree() if "/checkpoints/" in path}
    assert kept
    done = door.run(f"dir={run}", "resume=never", "overwrite=true", wrong)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "set aside" not in done.stdout
    assert kept <= door.tree()
    assert not (run.parent / ".overwritten").exists()
    new = door.run(*SMALL, "train.steps=10", wrong, "name=other")
    assert new.returncode == 3, new.stderr
    assert not (door.cwd / "outputs/other").exists()
    # The directory that the command with the wrong weights has, with checkpoints and without its configuration.
    started = door.run(*SMALL, "train.steps=10", f"init_from={run}", "name=lost")
    assert started.returncode == 0, started.stderr
    (lost,) = (path.parent for path in door.cwd.glob("outputs/lost/*/config.yaml"))
    (lost / "config.yaml").unlink()
    run.rename(run.with_name("elsewhere"))
    assert door.run(*SMALL, "train.steps=10", f"init_from={run}", "name=lost").returncode == 3
    assert [*lost.glob("checkpoints/10/holdfast.json")]
