"""Every YAML in conf/ composes, and trains two steps: what a user can choose works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import REPO, SMALL, Door
from tests.places import MADE

CHOICES = sorted(
    f"{path.parent.relative_to(REPO / 'conf')}={path.stem}"
    for path in (REPO / "conf").glob("*/*.yaml")
    if path.parent.name
    not in ("model", "data", "objective", "eval", "experiment", "optim", "schedule")  # test_optim.py has the last
)
TINY = ("model.num_layers=1", "model.width=16", "train.steps=2", "train.eval_steps=1", "train.eval_batches=1")
MODELS_AND_DATA = [
    "model=gpt data=stdlib objective=default",
    "model=gpt data=text data.path=corpus.txt data.seq_len=16",
    "model=gpt data=synthetic",
    "model=mlp data=digits",
    "model=mlp data=synthetic data.gives=features",
    "model=own:Net data=own:line objective=external objective.target=own:squared",
    "model=own:Net data=digits objective=classify",
    "model=external model.target=own:Words data=external data.target=own:words objective=next_token",
    "experiment=stdlib_gpt",
    "experiment=digits_mlp",
]
OWN = """
import numpy as np
from flax import nnx

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, *, rngs):
        self.out = nnx.Linear(int(np.prod(inputs)), num_outputs, rngs=rngs)
    def __call__(self, x): return self.out(x.reshape(len(x), -1))

class Words(nnx.Module):
    takes = ("tokens",)
    def __init__(self, inputs, num_outputs, *, rngs):
        self.embed = nnx.Embed(num_outputs, num_outputs, rngs=rngs)
    def __call__(self, x): return self.embed(x)

def line(): return {"inputs": np.ones((640, 2)), "label": np.ones((640, 1))}
def words(): return {"tokens": np.arange(12800, dtype=np.uint8).reshape(640, 20)}
def squared(model, batch): return {"loss": ((model(batch["inputs"]) - batch["label"]) ** 2).mean(axis=-1)}
"""


def test_no_choice_is_left_out() -> None:
    named = {word for command in MODELS_AND_DATA for word in command.split()}
    named |= {f"data={kind}" for kind in MADE}  # test_sources.py trains on these
    for group in ("model", "data", "objective", "experiment"):
        assert {f"{group}={path.stem}" for path in (REPO / "conf" / group).glob("*.yaml")} <= named


@pytest.mark.parametrize("command", MODELS_AND_DATA)
def test_models_data_and_experiments_train(command: str, door: Door) -> None:
    (door.cwd / "own.py").write_text(OWN)
    tiny = [word for word in TINY if not (word.startswith("model.") and "own:" in command)]
    done = door.run(*command.split(), *tiny, "log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert "finished 2 steps" in done.stdout


@pytest.mark.parametrize("choice", CHOICES)
def test_every_other_choice_trains(choice: str, door: Door) -> None:
    group = choice.split("=")[0]
    overrides = [override for override in SMALL if group != "log" or not override.startswith("log.")]
    steps = () if group == "train" else ("train.steps=2", "train.eval_steps=1")
    done = door.run(choice, *overrides, *steps)
    assert done.returncode == 0, done.stderr
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["state"] == "finished"
    saved = {path.name for path in (door.the_run / "checkpoints").glob("*") if path.name.isdecimal()}
    assert (str(status["step"]) in saved) == (choice != "ckpt=none")


def test_digits_reach_95_percent(door: Door) -> None:
    done = door.run("model=mlp", "data=digits", "log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert json.loads((door.the_run / "status.json").read_text())["last"]["eval/accuracy"] > 0.95


def test_remat_policies_reach_the_same_loss(door: Door) -> None:
    losses = {}
    for remat in ("none", "full", "attention_only", "ffn_only"):
        assert door.run(*SMALL, "train.steps=5", f"remat={remat}").returncode == 0
    for config in Path(door.cwd).glob("outputs/*/*/config.yaml"):
        line = json.loads((config.parent / "logs/metrics.jsonl").read_text().splitlines()[0])
        losses[config.parent.name] = line["loss"]
    assert len(losses) == 4
    assert max(losses.values()) - min(losses.values()) < 1e-6 * max(losses.values())


def test_two_devices_share_the_batch_and_a_run_can_move_between_them(door: Door) -> None:
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    door.kill_at(20, *SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=10")
    done = door.run(f"dir={door.the_run}", "mesh=data", **two)
    assert done.returncode == 0, done.stderr
    assert "changed: mesh.data: 1 → -1" in done.stdout
    attempts = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["hardware"] for attempt in attempts] == ["1 × cpu", "2 × cpu"]
    assert attempts[1]["from_step"] > 0
    losses = [
        line["loss"]
        for line in map(json.loads, (door.the_run / "logs/metrics.jsonl").read_text().splitlines())
        if line["split"] == "train"
    ]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
