"""The README shows what is: its commands run, its tables name every choice, its two lines are what CI runs."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time

import pytest

from tests.conftest import REPO, Door
from tests.laws.faults import Forks

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
SHORT = ("train.steps=2", "train.eval_steps=1", "train.eval_batches=1", "log.tensorboard=false")
TINY_GPT = ("model.num_layers=1", "model.width=16", "model.hidden=16", "data.seq_len=16")


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
    return [
        line
        for line in lines
        if line.startswith("python run.py ") and not re.search("dir=outputs|launcher=slurm|sweeper=optuna|waves:", line)
    ]


def test_there_are_commands_to_run() -> None:
    assert len(commands()) >= 6
    assert any(
        line == "pip install -c constraints.txt -e . && python run.py"
        for block in BLOCKS
        for line in block.splitlines()
    )
    assert any("&& pytest" in line for block in BLOCKS for line in block.splitlines())


@pytest.mark.parametrize("command", commands())
def test_its_commands_run(command: str, served: Forks, door: Door) -> None:
    words = shlex.split(command.replace("FOLDER", "."))[2:]
    if "-m" in words:  # one run of each sweep: tests/launch/test_sweep.py has more
        words = [word.split(",")[0] for word in words]
    if "--help" in words:
        shown = door.run(*words)
        assert shown.returncode == 0
        assert (
            "retention: all, best_n, disk_budget, every_k, last_and_best, last_n, pinned, spaced, time" in shown.stdout
        )
        return
    if "RUN" in command:
        assert served.run(door.cwd, "train.steps=2", *SHORT[1:], *TINY_GPT).returncode == 0
        words = [word.replace("RUN", str(door.the_run)).replace("step=400", "step=1") for word in words]
    typed = {word.split("=")[0] for word in words} | {"train.steps"}
    small = () if "model=mlp" in words or any(word.startswith("dir=") for word in words) else TINY_GPT
    words = [word for word in words if not word.startswith("train.steps=")]
    extra = [word for word in (*SHORT, *small) if word.split("=")[0] not in typed]
    done = served.run(door.cwd, *words, "train.steps=2", *extra)
    assert done.returncode == 0, done.stdout


def test_its_tables_name_every_choice() -> None:
    groups = (
        "model",
        "data",
        "objective",
        "optim",
        "schedule",
        "ckpt",
        "retention",
        "remat",
        "mesh",
        "eval",
        "preempt",
        "log",
        "experiment",
        "hydra/launcher",
    )
    for group in groups:
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
        assert set(re.findall(r"`([\w/]+)`", row)[1:]) == {path.stem for path in (REPO / "conf" / group).glob("*.yaml")}


def write_example(door: Door) -> None:
    """The file of the section about one's own model, as it stands there."""
    (code,) = re.findall(r"```python\n(# waves.py.*?)```", README, re.S)
    assert len(code.splitlines()) < 40
    (door.cwd / "waves.py").write_text(code)


def kill_once_saved(door: Door, *words: str) -> None:
    """Start a run, and SIGKILL it as soon as it has a checkpoint."""
    process = door.start(*words)
    while not [*door.cwd.glob("outputs/*/*/checkpoints/[1-9]*/holdfast.json")]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("at", [0, 1])
def test_its_example_of_ones_own_runs_as_written(at: int, door: Door) -> None:
    """The first command is killed once; typed again it ends near the best possible, -1.21 nats."""
    write_example(door)
    lines = [line for block in BLOCKS for line in block.splitlines() if "waves:" in line]
    assert len(lines) == 2
    words = shlex.split(lines[at])[2:]
    if at == 0:
        kill_once_saved(door, *words)
        done = door.run(*words)
        assert re.search(r"restored step [1-9]\d\d ", done.stdout)
    else:
        done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "finished 600 steps" in done.stdout
    assert json.loads((door.the_run / "status.json").read_text())["last"]["eval/loss"] < -1.1


def test_its_errors_are_what_is_said(door: Door) -> None:
    write_example(door)
    for command, said in re.findall(r"\$ python run\.py (.*)\n(error: .*)\n", README):
        assert door.run(*command.split()).stderr.strip() == said


def test_every_verb_is_shown() -> None:
    from runner.__main__ import VERBS

    assert VERBS
    assert [verb for verb in VERBS if f"$ python -m runner {verb} " not in README] == []
