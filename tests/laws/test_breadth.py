"""The law in its breadth: with every model and from every source, killed is uninterrupted, bit for bit.

One run of thirty steps for each model on one source and each source with one model: untouched with the batches made in
the training process, and again killed by SIGKILL between two saves, and finished, with the batches made as the case
says. So it also holds that worker processes and threads change nothing. The sources are small: the kill and the end lie
in different epochs.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO, Door, assert_same
from tests.laws.faults import Forks
from tests.places import MADE, command

LAST, KILLED_AT = 30, 13
SHORT = (
    *(f"train.steps={LAST}", "train.log_steps=1", "train.eval_steps=10", "train.eval_batches=2", "ckpt=combined"),
    *("ckpt.save.periodic.steps=5", "log.tensorboard=false"),
)
OWN = """
import jax
import numpy as np
from flax import nnx

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, *, rngs):
        self.out = nnx.Linear(*inputs, num_outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(num_outputs, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x): return self.norm(self.out(self.drop(x)))

def line(size=90):
    x = np.random.default_rng(0).uniform(-1, 1, (size, 3))
    return {"inputs": x, "label": x.sum(axis=1, keepdims=True)}

def squared(model, batch): return {"loss": ((model(batch["inputs"]) - batch["label"]) ** 2).mean(axis=-1)}

class Walk:
    def init(self, key, example): return {"params": jax.random.normal(key, (3,)), "steps": 0}
    def step(self, state, batch, key):
        moved = state["params"] + 0.1 * jax.random.normal(key, (3,))
        return {"params": moved, "steps": state["steps"] + 1}, {"loss": moved.sum() ** 2}
    def evaluate(self, state, batch): return {"loss": state["params"] ** 2}
"""


@dataclass(frozen=True)
class Case:
    """A model on a source. What is not `quick` is run with `slow`."""

    model: str
    data: str
    words: tuple[str, ...]
    workers: int = 0
    prefetch: int = 0
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.model} on {self.data}"

    def command(self, folder: Path) -> tuple[str, ...]:
        """What is typed, but for how the batches are made."""
        trained = f"{'program' if self.model == PROGRAM else 'model'}={self.model}"
        return (trained, *self.words, *_data(self.data, folder), *SHORT)


# In the place of a model.
PROGRAM = "own:Walk"
GPT = ("model.num_layers=2", "model.num_heads=2", "model.width=16", "model.hidden=32", "model.dropout=0.2")
LOOKED = ("eval=[metrics,text,train_set,ema]", "eval.text.new_tokens=4", "eval.text.steps=15")
FEW = ("data.eval_fraction=0.95",)
MLP = ("model.num_layers=1", "model.width=8", "model.dropout=0.2")
CASES = (
    Case("gpt", "tokens", (*GPT, "train.microbatches=2", "train.precision=bf16", "optim.ema=0.9", *LOOKED)),
    Case("cnn", "digits", ("model.widths=[4,8]", "model.hidden=16", *FEW)),
    Case("resnet", "images", ("model.stages=[1,1]", "model.width=4"), workers=2),
    Case(
        "vit",
        "digits",
        ("model.num_layers=2", "model.num_heads=2", "model.width=8", "model.hidden=16", "model.dropout=0.2", *FEW),
    ),
    Case("vae", "digits", ("model.widths=[4,8]", "model.latent=4", "eval=[metrics,samples,reconstructions]", *FEW)),
    Case("mlp", "digits", (*MLP, *FEW), prefetch=2),
    Case("gpt", "stdlib", GPT, prefetch=2),
    Case("gpt", "text", GPT, workers=2),
    Case("gpt", "chat", GPT, workers=2),
    Case("gpt", "preferences", (*GPT, "tune=freeze", "tune.train=[norm,blocks.1.*]"), workers=2),
    Case("mlp", "synthetic", MLP),
    Case("mlp", "arrays", MLP, prefetch=4),
    Case("mlp", "parquet", MLP, prefetch=2),
    Case("mlp", "csv", MLP),
    Case("mlp", "arrayrecord", MLP, workers=2),
    Case("mlp", "hub", MLP, prefetch=4),
    Case(PROGRAM, "none", (), quick=True),
    Case("external", "external", ("model.target=own:Net", "objective=own:squared"), workers=2, quick=True),
)


def _data(kind: str, folder: Path) -> list[str]:
    if kind == "external":
        return ["data=own:line", "data.batch_size=8"]
    if kind == "none":
        return ["data=none"]
    option = MADE[kind](folder)
    varied = vars(option.augment) if hasattr(option, "augment") else {}
    words = [word for word in command(option) if not word.startswith("model=")]
    return [*words, *(f"data.augment.{key}={value}".lower() for key, value in varied.items())]


def test_no_model_and_no_source_is_left_out() -> None:
    for group, named in (("model", [case.model for case in CASES]), ("data", [case.data for case in CASES])):
        # Two shapes of gpt, and what a folder says: tests/session/test_hf_start.py kills that one.
        others = {"gpt2_124m", "gpt_7b", "hf"} if group == "model" else set()
        assert {path.stem for path in (REPO / "conf" / group).glob("*.yaml")} - others == {*named} - {PROGRAM}


def _media(door: Door) -> dict[str, bytes]:
    """The pictures and texts that evaluations left: those that the log names."""
    lines = map(json.loads, (door.the_run / "logs/metrics.jsonl").read_text().splitlines())
    return {line["file"]: (door.the_run / line["file"]).read_bytes() for line in lines if "file" in line}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case.quick else pytest.mark.slow) for case in CASES], ids=str
)
def test_killed_is_uninterrupted(case: Case, served: Forks, tmp_path: Path) -> None:
    words = case.command(tmp_path)
    untouched, struck = Door(tmp_path / "untouched"), Door(tmp_path / "struck")
    for door in (untouched, struck):
        door.cwd.mkdir()
        (door.cwd / "own.py").write_text(OWN)
    here = () if case.data == "none" else ("data.workers=0", "data.prefetch=0")
    done = served.run(untouched.cwd, *words, *here)
    assert done.returncode == 0, done.stdout
    ahead = () if case.data == "none" else (f"data.workers={case.workers}", f"data.prefetch={case.prefetch}")
    killed = served.run(struck.cwd, *words, *ahead, kill_at=KILLED_AT)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    finished = served.run(struck.cwd, *words, *ahead)
    assert finished.returncode == 0, finished.stdout
    assert_same(struck.the_run, untouched.the_run, LAST)
    assert _media(struck) == _media(untouched)
    assert bool(_media(untouched)) == any(word.startswith("eval=") for word in case.words)
    endings = [json.loads(line) for line in (struck.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [(line["ending"], line["from_step"]) for line in endings] == [("killed", 0), ("finished", 10)]
    assert endings[0]["to_step"] == KILLED_AT
