"""What is typed, of runs that live in a bucket: a folder beside the disk stands for one here."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import HANG_SECONDS, Door

pytestmark = pytest.mark.forked(quick=True)
WORDS = ("model=mlp", "data=digits", "train.steps=20", "train.eval_steps=10", "log.tensorboard=false")


@pytest.fixture
def remote(tmp_path: Path) -> str:
    return f"remote=file://{tmp_path}/bucket"


def lose_disk(door: Door) -> None:
    shutil.rmtree(door.cwd / "outputs")


def test_the_same_command_on_an_empty_machine(door: Door, remote: str) -> None:
    first = door.run(*WORDS, remote)
    assert first.returncode == 0, first.stderr
    assert "step 20 and every log" in first.stdout
    run = door.the_run
    metrics, name = (run / "logs/metrics.jsonl").read_bytes(), run.name
    lose_disk(door)
    again = door.run(*WORDS, remote)
    assert again.returncode == 0, again.stderr
    assert "is finished: 20 steps" in again.stdout
    assert door.the_run.name == name
    assert (door.the_run / "logs/metrics.jsonl").read_bytes() == metrics
    # Nothing is fetched for a run of which nothing is left to do.
    assert not list((door.the_run).glob("checkpoints/*/state"))
    lose_disk(door)
    more = door.run(f"dir=outputs/default/{name}", "train.steps=30", remote)
    assert more.returncode == 0, more.stderr
    assert "fetched step 20" in more.stdout
    assert "finished 30 steps" in more.stdout
    assert (door.the_run / "logs/metrics.jsonl").read_bytes().startswith(metrics)
    # Back to a step that is there alone.
    lose_disk(door)
    back = door.run(f"dir=outputs/default/{name}", "train.steps=30", "step=20", remote)
    assert back.returncode == 0, back.stderr
    assert "restored step 20" in back.stdout
    lines = (door.the_run / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2, 3]


def test_a_sweep_on_an_empty_machine_does_what_is_left(door: Door, remote: str) -> None:
    first = door.run("-m", "seed=0,1", *WORDS, remote)
    assert first.returncode == 0, first.stdout + first.stderr
    lose_disk(door)
    again = door.run("-m", "seed=0,1,2", *WORDS, remote)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 runs: 3 finished" in again.stdout
    attempts = {
        path.parent.name: len(path.read_text().splitlines()) for path in door.cwd.glob("outputs/*/*/attempts.jsonl")
    }
    assert sorted(attempts.values()) == [1, 1, 1]


def test_resume_looks_into_the_bucket(door: Door, remote: str) -> None:
    assert door.run(*WORDS, remote, "resume=must").returncode == 3
    assert not (door.cwd / "outputs").exists()
    assert door.run(*WORDS, remote).returncode == 0
    lose_disk(door)
    never = door.run(*WORDS, remote, "resume=never")
    assert never.returncode == 3
    assert "exists" in never.stderr
    assert not (door.cwd / "outputs").exists()
    assert door.run(*WORDS, remote, "resume=must").returncode == 0
    lose_disk(door)
    afresh = door.run(*WORDS, remote, "resume=never", "overwrite=true")
    assert afresh.returncode == 0, afresh.stderr
    assert "was set aside as" in afresh.stdout
    assert "(new run)" in afresh.stdout
    (aside,) = (door.cwd / "bucket/default/.overwritten").iterdir()
    assert (aside / "checkpoints/20/holdfast.json").exists()
    assert (aside / "config.yaml").exists()


def test_other_rules_for_the_bucket(door: Door, remote: str) -> None:
    saves = (
        "ckpt.save.periodic.steps=5",
        "ckpt=periodic",
        "ckpt.write=blocking",
        "retention=last_n",
        "retention.last.n=1",
    )
    done = door.run(*WORDS, *saves, remote, "retention.remote=all")
    assert done.returncode == 0, done.stderr
    (run,) = (door.cwd / "bucket/default").glob("*-*")
    there = sorted(int(path.parent.name) for path in run.glob("checkpoints/*/holdfast.json"))
    here = sorted(int(path.name) for path in (door.the_run / "checkpoints").iterdir() if path.name.isdecimal())
    # Of steps this short the uploader may have passed over some that were gone before it came to them.
    assert set(here) < set(there), (here, there)
    assert there[-1] == 20


def test_a_stop_while_it_waits_for_the_holder_before(door: Door, remote: str) -> None:
    assert door.run(*WORDS, remote).returncode == 0
    lose_disk(door)
    (lock,) = door.cwd.glob("bucket/default/*/LOCK")
    elsewhere = {"host": "elsewhere", "machine": "another boot", "pid": 7, "born": 7, "held": True}
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **elsewhere}))
    process = door.start(*WORDS, remote)
    assert process.stdout is not None
    assert "was held by pid 7 on host elsewhere" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM while it waited for the run; nothing was begun" in err
    assert not list(door.cwd.glob("outputs/**/config.yaml"))
    assert json.loads(lock.read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("place", ["outputs", "outputs/default/x/..", "."])
def test_its_own_directory_is_no_other_place(door: Door, place: str) -> None:
    root = "root=outputs" if place != "." else "root=."
    done = door.run(*WORDS, f"remote=file://{door.cwd}/{'outputs' if '..' in place else place}", root)
    assert done.returncode == 2, done.stdout
    assert "is where the run lives already" in done.stderr
    assert not list(door.cwd.glob("**/config.yaml"))


@pytest.mark.parametrize("name", ["a b", "ü", "x/y/"])
def test_a_prefix_of_any_name(door: Door, tmp_path: Path, name: str) -> None:
    word = f"remote='file://{tmp_path}/bucket/{name}'"
    assert door.run(*WORDS, word).returncode == 0
    lose_disk(door)
    again = door.run(*WORDS, word)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout


def test_a_file_of_choices_names_it_as_it_is_typed(door: Door, remote: str) -> None:
    (door.cwd / "conf/experiment").mkdir(parents=True)
    choices = f"# @package _global_\nremote: {remote.partition('=')[2]}\ntrain: {{steps: 20}}\n"
    (door.cwd / "conf/experiment/mine.yaml").write_text(choices)
    done = door.run("experiment=mine", *(word for word in WORDS if "steps=20" not in word))
    assert done.returncode == 0, done.stderr
    assert list((door.cwd / "bucket/default").glob("*/checkpoints/20/holdfast.json"))


def test_the_environment_names_it_as_well(door: Door, tmp_path: Path) -> None:
    done = door.run(*WORDS, HOLDFAST_REMOTE=f"file://{tmp_path}/bucket")
    assert done.returncode == 0, done.stderr
    assert list((door.cwd / "bucket/default").glob("*/checkpoints/20/holdfast.json"))
    # Where a run lives is no part of what it is.
    assert "is finished" in door.run(*WORDS).stdout


@pytest.mark.parametrize(
    ("word", "said", "code"),
    [
        ("remote=s4://runs/x", "expected s3://BUCKET/PREFIX", 2),
        ("remote=s3://", "expected s3://BUCKET/PREFIX", 2),
        ("remote=runs/x", "expected s3://BUCKET/PREFIX", 2),
        ("remote=file://runs/x", "with three /", 2),
        ("remote='file:///tmp/a#b'", "has more in it than a bucket and a prefix", 2),
        ("remote=s3://key:secret@runs/x", "credentials come from the environment", 2),
        ("remote=file:///proc/nothing/x", "No such file", 2),
        ("remote.lost_seconds=5", "must be at least 3 ×", 2),
        ("remote.endpoint=localhost:9000", "expected https://HOST", 2),
        ("remote.lock=of", "on", 2),
        ("retention.remote=lots", "retention", 2),
    ],
)
def test_a_wrong_word_is_one_line(door: Door, word: str, said: str, code: int) -> None:
    done = door.run(*WORDS, word)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (door.cwd / "outputs").exists()


def test_nothing_of_it_is_imported_without_a_bucket(door: Door) -> None:
    import subprocess
    import sys

    code = "import sys; import runner.launch.main, runner.session.experiment; print('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
