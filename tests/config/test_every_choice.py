"""Every YAML in conf/ composes, and trains two steps: what a user can choose works."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data import Text
from tests.conftest import QUICK_RUN, REPO, SMALL, Door, composed
from tests.hf_folders import write_llama
from tests.laws.faults import Forks
from tests.places import MADE, a_chat, a_preferences, a_tokens

ELSEWHERE = (
    "hosts",  # tests/hosts, tests/launch, and the law of several processes
    "model",
    "data",
    "objective",
    "eval",
    "program",
    "experiment",
    "optim",
    "schedule",
    "remat",
)  # here; test_optim.py has schedules
CHOICES = sorted(
    f"{path.parent.relative_to(REPO / 'conf')}={path.stem}"
    for path in (REPO / "conf").glob("*/*.yaml")
    if path.parent.name not in ELSEWHERE
)
SHORT = ("train.steps=2", "train.eval_steps=1", "train.eval_batches=1", "log.tensorboard=false")
GPT = "model.num_layers=1 model.num_heads=2 model.width=16 model.hidden=16 data.seq_len=16 data.batch_size=16"
MLP = "model.num_layers=1 model.width=16"
CNN = "model.widths=[4] model.hidden=8"
RESNET = "model.stages=[1,1] model.width=4"
VIT = "model.num_layers=1 model.num_heads=2 model.width=8 model.hidden=16"
VAE = "model.widths=[4] model.latent=2"
MODELS_AND_DATA = [
    f"model=gpt data=stdlib objective=default {GPT}",
    f"model=gpt data=text data.path=corpus.txt eval=[metrics,text] {GPT} eval.text.new_tokens=4",
    f"model=gpt data=preferences data.path=pairs.jsonl objective=dpo {GPT.replace('seq_len=16', 'seq_len=64')}",
    f"model=gpt data=chat data.path=chat.jsonl objective=sft {GPT.replace('seq_len=16', 'seq_len=64')}",
    f"model=gpt data=synthetic eval=[metrics,ema] optim.ema=0.9 {GPT}",
    f"model=gpt_7b data=tokens data.path=tokens {GPT}",
    "model=hf init_from=hf:llama data=text data.path=corpus.txt data.tokenizer=bytes data.seq_len=16",
    f"model=mlp data=digits eval=[metrics,train_set] {MLP}",
    f"model=mlp data=synthetic data.gives=features {MLP}",
    f"model=cnn data=digits {CNN}",
    f"model=resnet data=digits {RESNET}",
    f"model=vit data=digits {VIT}",
    f"model=vae data=digits objective=elbo eval=[metrics,samples,reconstructions] {VAE}",
    "model=own:Net data=own:line objective=external objective.target=own:squared",
    "model=own:Net data=digits objective=classify",
    f"model=mlp data=own:line objective=regress {MLP}",
    "model=own:Words data=stdlib data.seq_len=16 eval.eval.batches=1",  # its own, on text: it has no sample to show
    "model=external model.target=own:Words data=external data.target=own:words objective=next_token",
    "program=own:Walk data=none",
    "program=external program.target=own:Walk data=none",
]
RECIPES = {
    "stdlib_gpt": GPT,
    "text_gpt": f"data.path=corpus.txt {GPT}",
    "gpt2_124m": f"data.path=tokens train.microbatches=2 {GPT}",
    "gpt_7b": f"data.path=tokens {GPT}",
    "digits_mlp": MLP,
    "digits_cnn": CNN,
    "digits_resnet": RESNET,
    "digits_vit": VIT,
    "digits_vae": VAE,
}
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

class Walk:
    def init(self, key, example): return {"params": 0.0}
    def step(self, state, batch, key): return {"params": state["params"] + 1.0}, {"loss": -state["params"]}
    def evaluate(self, state, batch): return {"loss": -state["params"]}

def line(): return {"inputs": np.ones((640, 2)), "label": np.ones((640, 1))}
def words(): return {"tokens": np.arange(12800, dtype=np.uint8).reshape(640, 20)}
def squared(model, batch): return {"loss": ((model(batch["inputs"]) - batch["label"]) ** 2).mean(axis=-1)}
"""


def test_no_choice_is_left_out() -> None:
    named = {word for command in MODELS_AND_DATA for word in command.split()}
    named.add("objective=distill")  # of a run that is there: tests/train/test_teacher.py
    named |= {f"data={kind}" for kind in MADE}  # test_sources.py trains on these
    named |= {f"model={kind}" for kind in ("gpt2_124m",)}  # its recipe does
    named.add("program=none")  # all the others
    for group in ("model", "data", "objective", "program"):
        assert {f"{group}={path.stem}" for path in (REPO / "conf" / group).glob("*.yaml")} <= named
    looked_at = {name for word in named if word.startswith("eval=") for name in word[6:-1].split(",")}
    looked_at.add("test")  # of data that holds such a set out: tests/session/test_held_out.py
    assert {path.stem for path in (REPO / "conf/eval").glob("*.yaml")} == looked_at
    assert {path.stem for path in (REPO / "conf/experiment").glob("*.yaml")} == RECIPES.keys()


def _trains(served: Forks, door: Door, *words: str) -> Path:
    (door.cwd / "own.py").write_text(OWN)
    if "model=hf" in words:
        write_llama(door.cwd / "llama")
    if "data.path=tokens" in words:
        a_tokens(door.cwd)
    a_chat(door.cwd)
    a_preferences(door.cwd)
    done = served.run(door.cwd, *words, *SHORT, **QUICK_RUN)
    assert done.returncode == 0, done.stdout
    assert "finished 2 steps" in done.stdout
    return door.the_run


@pytest.mark.parametrize("command", MODELS_AND_DATA)
def test_models_and_data_train(command: str, served: Forks, door: Door) -> None:
    run = _trains(served, door, *command.split())
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    asked = command.partition("eval=[metrics,")[2].partition("]")[0]
    splits = [name for name in asked.split(",") if name]
    assert {line["split"] for line in lines} == {"train", "eval", *splits}
    for file in (line["file"] for line in lines if "file" in line):
        assert (run / file).stat().st_size > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train_in_a_short_form(recipe: str, served: Forks, door: Door) -> None:
    _trains(served, door, f"experiment={recipe}", *RECIPES[recipe].split())
    header = [line for line in (REPO / f"conf/experiment/{recipe}.yaml").read_text().splitlines() if line[0] == "#"]
    assert any(line.startswith(f"# python run.py experiment={recipe}") for line in header)
    assert any("Expected" in line or "Not run" in line for line in header)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_other_choice_trains(choice: str, served: Forks, door: Door) -> None:
    group = choice.split("=")[0]
    overrides = [override for override in SMALL if group != "log" or not override.startswith("log.")]
    steps = () if group == "train" else ("train.steps=2", "train.eval_steps=1")
    steps += ("remat.budget_bytes=1GB",) if choice == "remat=auto" else ()  # a CPU does not tell what it has
    steps += ("tune.train=[norm]",) if choice == "tune=freeze" else ()
    done = served.run(door.cwd, choice, *overrides, *steps, **QUICK_RUN)
    assert done.returncode == 0, done.stdout
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["state"] == "finished"
    saved = {path.name for path in (door.the_run / "checkpoints").glob("*") if path.name.isdecimal()}
    assert (str(status["step"]) in saved) == (choice != "ckpt=none")


@pytest.mark.forked
def test_digits_reach_95_percent(door: Door) -> None:
    done = door.run("model=mlp", "data=digits", "log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert json.loads((door.the_run / "status.json").read_text())["last"]["eval/accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits_cnn", "digits_resnet", "digits_vit"])
def test_recipes_reach_what_they_say(recipe: str, door: Door) -> None:
    done = door.run(f"experiment={recipe}", "log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    reached = json.loads((door.the_run / "status.json").read_text())["last"]["eval/accuracy"]
    assert reached > (0.95 if recipe == "digits_vit" else 0.97)


@pytest.mark.slow
def test_a_text_falls_below_its_bigram_entropy(door: Door) -> None:
    """What is held out could not be told so well from each byte's predecessor, even by its own counts."""
    texts = Path(sysconfig.get_paths()["stdlib"])
    words = (f"data.path={texts}", "data.pattern=*.py", "train.steps=300", "log.tensorboard=false")
    done = door.run("experiment=text_gpt", *words)
    assert done.returncode == 0, done.stderr
    held_out = Text(path=str(texts), pattern="*.py").sources().eval.corpus.astype(np.int64)  # type: ignore[attr-defined]
    pairs = np.bincount(held_out[:-1] * 256 + held_out[1:], minlength=256 * 256).reshape(256, 256) / (len(held_out) - 1)
    seen = pairs > 0
    entropy = -(pairs * np.log2(np.where(seen, pairs, 1.0) / np.maximum(pairs.sum(axis=1, keepdims=True), 1e-12)))
    reached = json.loads((door.the_run / "status.json").read_text())["last"]["eval/bits_per_byte"]
    assert reached < entropy[seen].sum()


REMAT = {"full": (), "attention_core": (), "every_n": (), "names": ("remat.save=[qkv,ffn_pre]",)}
TRACED = ("attention_only", "ffn_only", "dots", "dots_no_batch", "nothing_saveable", "everything_saveable")
NOT_HERE = {"none", "offload", "auto"}  # the run begins with it; not on a CPU; with a budget, in test_remat_auto.py


TWO_BLOCKS = f"model=vit data=digits {VIT} model.num_layers=2 model.dropout=0.2"


@pytest.mark.parametrize("kind", TRACED)
def test_other_remat_policies_are_composed_and_traced(kind: str) -> None:
    """tests/remat/test_remat.py has what they do."""
    from runner.trace.remat_trace import find_scopes_and_tags
    from runner.train.build import build
    from runner.train.compile import trace_step

    config = composed(*TWO_BLOCKS.split(), f"remat={kind}")
    built = build(config)
    assert config.remat.kind == kind
    assert find_scopes_and_tags(trace_step(built, config).jaxpr.jaxpr).scopes.keys() == built.plan.scopes != set()


# In the short form tests/remat shows that a policy changes no bit.
@pytest.mark.slow
def test_a_run_goes_on_under_other_remat_policies(served: Forks, door: Door) -> None:
    """A step under each: accepted, said, recorded; the losses are those of a run that never changed."""
    assert {path.stem for path in (REPO / "conf/remat").glob("*.yaml")} == {*REMAT, *TRACED, *NOT_HERE}
    words = [*TWO_BLOCKS.split(), *SHORT, "schedule=constant", "schedule.warmup_steps=0", "train.log_steps=1"]
    assert served.run(door.cwd, *words, "train.steps=1", "name=changing", **QUICK_RUN).returncode == 0
    run = door.the_run
    for step, (kind, values) in enumerate(REMAT.items(), 2):
        done = served.run(door.cwd, f"dir={run}", f"remat={kind}", *values, f"train.steps={step}", **QUICK_RUN)
        assert done.returncode == 0, done.stdout
        assert f'\nchanged: remat.kind: "none" → "{kind}"\n' in done.stdout  # said; no warning
    assert served.run(door.cwd, *words, f"train.steps={1 + len(REMAT)}", "name=same", **QUICK_RUN).returncode == 0
    (same,) = door.cwd.glob("outputs/same/*/logs/metrics.jsonl")
    curves = [
        [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if line["split"] == "train"]
        for path in (run / "logs/metrics.jsonl", same)
    ]
    assert len(curves[0]) == 1 + len(REMAT)
    np.testing.assert_allclose(*curves, rtol=1e-5)
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["from_step"] for attempt in attempts] == list(range(len(attempts)))
    for attempt, kind in zip(attempts[1:], REMAT, strict=True):
        assert f'remat.kind: "none" → "{kind}"' in attempt["drift"]


def test_nothing_is_offloaded_on_a_cpu(served: Forks, door: Door) -> None:
    before = door.tree()
    done = served.run(door.cwd, *SMALL, "remat=offload", "remat.offload=[qkv,ffn_pre]")
    assert done.returncode == 2
    assert "choose remat=names remat.save=[qkv,ffn_pre]" in done.stdout.splitlines()[-1]
    assert door.tree() - before <= {"outputs", "said.txt"}


# In the short form tests/test_mesh.py has a run that moves.
@pytest.mark.slow
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
