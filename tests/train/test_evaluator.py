"""Named evaluations: when they are due, what they measure, the pictures and texts they leave, and evaluating again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from data.sources import Sources, Table
from runner.config.evaluations import (
    MetricsEvaluation,
    ReconstructionsEvaluation,
    SamplesEvaluation,
    TextEvaluation,
    find_cadences,
    find_due_evaluations,
)
from runner.errors import ConfigError
from runner.log.sinks import CutPoint, SinkContext
from runner.log.tensorboard_sink import TensorBoardSink
from runner.train.evaluation_files import encode_mosaic, encode_pairs
from runner.train.evaluator import EvaluationRun, Evaluator
from runner.train.model_content import ModelContent
from tests.conftest import SMALL, Door

pytestmark = pytest.mark.forked


class Echo(nnx.Module):
    """Generates grey pictures, reconstructs the negative, and goes on by counting."""

    def __init__(self) -> None:
        self.shade = nnx.Param(jnp.array(0.5))

    def generate(self, key: jax.Array, count: int) -> jax.Array:
        return jnp.full((count, 8, 8, 1), self.shade[...]) + 0 * jax.random.uniform(key, (count, 8, 8, 1))

    def reconstruct(self, images: jax.Array) -> jax.Array:
        return 1.0 - images

    def sample(self, prompt: jax.Array, key: jax.Array, temperature: jax.Array, num_tokens: int) -> jax.Array:
        return jnp.concatenate([prompt, prompt[-1] + 1 + jnp.arange(num_tokens)])


def evaluator(named: dict[str, Any], model: nnx.Module | None = None) -> Evaluator:
    images = np.linspace(0, 1, 10 * 64, dtype=np.float32).reshape(10, 8, 8, 1)
    tokens = np.arange(10 * 9, dtype=np.uint8).reshape(10, 9)
    sides = [Table({"inputs": images + shift, "tokens": tokens, "n": np.arange(10) + shift}) for shift in (100, 0)]
    sources = Sources(*sides, (8, 8, 1), 10, "", "", decode=lambda tokens: " ".join(map(str, tokens)))

    def build(state: dict[str, Any]) -> nnx.Module:
        made = model or Echo()
        if isinstance(made, Echo):
            made.shade[...] = jnp.array(state["params"])
        return made

    maker = ModelContent(sources, build, model or Echo(), seed=0)
    return Evaluator(named, sources, maker, lambda value: value, batch_size=4, batches=2)


def content(named: dict[str, Any], model: nnx.Module | None = None) -> ModelContent:
    maker = evaluator(named, model).maker
    assert isinstance(maker, ModelContent)
    return maker


def eval_step(state: dict[str, Any], batch: Any, weights: Any) -> dict[str, Any]:
    return {"n": (batch["n"] * weights).sum(), "w": (state["params"] * weights).sum(), "weight": weights.sum()}


STATE = {"params": 0.25, "ema": 0.75}


def done(named: dict[str, Any], run: Path, model: nnx.Module | None = None) -> dict[str, Any]:
    return evaluator(named, model)(list(named), STATE, EvaluationRun(eval_step, run, "media/{}/00000007"))


def test_each_has_its_own_cadence_and_all_come_at_the_end() -> None:
    named = {"eval": MetricsEvaluation(), "rare": MetricsEvaluation(steps=6), "text": TextEvaluation(steps=4)}
    found = {step: find_due_evaluations(named, 3, step, 13) for step in range(1, 14)}
    assert found[3] == ["eval"]
    assert found[4] == ["text"]
    assert found[6] == ["eval", "rare"]
    assert found[12] == found[13] == ["eval", "rare", "text"]
    assert {step for step, names in found.items() if not names} == {1, 2, 5, 7, 10, 11}
    assert find_cadences(named, 3) == {3, 6, 4}


def test_metrics_are_means_over_batches_of_their_split(tmp_path: Path) -> None:
    named = {
        "eval": MetricsEvaluation(),
        "all": MetricsEvaluation(batches=3),
        "mine": MetricsEvaluation(split="train"),
        "ema": MetricsEvaluation(weights="ema"),
    }
    found = done(named, tmp_path)
    assert found["eval"]["n"] == np.mean([0, 1, 2, 3, 5, 6, 7, 8])  # 8 of 10, evenly apart
    assert found["all"]["n"] == np.arange(10).mean()  # the last batch is filled up, and the filling is not counted
    assert found["mine"]["n"] == 100 + found["eval"]["n"]
    assert (found["eval"]["w"], found["ema"]["w"]) == (0.25, 0.75)


def test_a_process_measures_its_own_rows_of_the_same_batches(tmp_path: Path) -> None:
    named = {"all": MetricsEvaluation(batches=3)}

    def look(rows: slice | None) -> list[tuple[list[int], list[float]]]:
        seen = []

        def note(state: dict[str, Any], batch: Any, weights: Any) -> dict[str, Any]:
            seen.append((batch["n"].tolist(), weights.tolist()))
            return eval_step(state, batch, weights)

        replace(evaluator(named), rows=rows)(["all"], STATE, EvaluationRun(note, tmp_path, "x"))
        return seen

    apart = zip(look(slice(0, 3)), look(slice(3, 4)), strict=True)
    assert [(one[0] + other[0], one[1] + other[1]) for one, other in apart] == look(None)


def test_pictures_are_files_of_the_run(tmp_path: Path) -> None:
    named = {
        "samples": SamplesEvaluation(count=4),
        "ema": SamplesEvaluation(count=4, weights="ema"),
        "pairs": ReconstructionsEvaluation(count=3),
    }
    found = done(named, tmp_path)
    assert found["samples"] == {"file": "media/samples/00000007.png"}
    grey, lighter = (np.asarray(Image.open(tmp_path / found[name]["file"])) for name in ("samples", "ema"))
    assert set(np.unique(grey)) == {64, 255}
    assert set(np.unique(lighter)) == {191, 255}
    pairs = np.asarray(Image.open(tmp_path / found["pairs"]["file"])).astype(int)
    held = np.linspace(0, 1, 640, dtype=np.float32).reshape(10, 8, 8)[:3]
    assert pairs[2, 2] == round(held[0, 0, 0] * 255)  # the first picture, and what was made of it below
    assert pairs[2 + 48 + 2, 2] == round((1 - held[0, 0, 0]) * 255)
    before = (tmp_path / found["pairs"]["file"]).read_bytes()
    assert done(named, tmp_path) == found
    assert (tmp_path / found["pairs"]["file"]).read_bytes() == before


def test_a_mosaic_holds_every_picture_whatever_its_size_and_channels() -> None:
    for shape in ((5, 8, 8, 1), (7, 100, 60, 3), (1, 3, 9, 1)):
        images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
        images[0, 0, 0] = np.nan
        sheet = np.asarray(Image.open(io.BytesIO(encode_mosaic(images, 3))))
        assert sheet.ndim == (3 if shape[3] == 3 else 2)
        assert min(sheet.shape[:2]) >= 48
    assert Image.open(io.BytesIO(encode_pairs(images[..., :1], images[..., :1]))).size[1] >= 2 * 48


def test_a_text_goes_on_after_beginnings_that_lie_apart(tmp_path: Path) -> None:
    found = done({"text": TextEvaluation(count=2, prompt_tokens=3, new_tokens=2)}, tmp_path)
    written = (tmp_path / found["text"]["file"]).read_text()
    assert written == "── 1 ── after '0 1 2'\n3 4\n\n── 2 ── after '81 82 83'\n84 85\n"


def test_a_text_may_begin_with_padding() -> None:
    """What is below 0 is no id of an embedding: it is seen as 0, as in training."""
    usual, padding = content({}), Table({"tokens": np.full((4, 9), -100)})
    made = replace(usual, sources=replace(usual.sources, eval=padding))
    assert made.continue_prompts(TextEvaluation(count=1, prompt_tokens=3, new_tokens=2), Echo()) == [("0 0 0", "1 2")]


def test_a_model_that_cannot_is_named() -> None:
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"eval.samples: Linear has no method `generate`; leave eval.samples out"):
        evaluator({"eval": MetricsEvaluation(), "samples": SamplesEvaluation()}, linear).check_content()
    every = {"text": TextEvaluation(), "samples": SamplesEvaluation(), "pairs": ReconstructionsEvaluation()}
    evaluator(every).check_content()
    assert (content({}).can_continue_text(Echo()), content({}).can_continue_text(linear)) == (True, False)


def test_a_stop_between_batches_ends_it_all(tmp_path: Path) -> None:
    calls = []

    def between() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    named = {"samples": SamplesEvaluation(count=1), "eval": MetricsEvaluation(batches=3)}
    with pytest.raises(KeyboardInterrupt):
        evaluator(named)(list(named), STATE, EvaluationRun(eval_step, tmp_path, "media/{}/1", between))


def board_of(run: Path) -> TensorBoardSink:
    """A sink of a run that begins."""
    board = TensorBoardSink(SinkContext(run / "logs/metrics.jsonl", CutPoint(0), 1, {}, "", print))
    board.catch_up()
    return board


def test_tensorboard_has_the_pictures_and_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = done({"samples": SamplesEvaluation(count=4), "text": TextEvaluation(count=1)}, tmp_path)
    (tmp_path / "logs").mkdir()
    board = board_of(tmp_path)
    for split, values in found.items():
        board.log(7, split, values)
    board.close()
    events = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
    (picture,) = events.Images("samples/file")
    assert picture.encoded_image_string == (tmp_path / found["samples"]["file"]).read_bytes()
    assert (picture.step, picture.width) == (7, 2 * 50 + 2)
    (tmp_path / found["samples"]["file"]).unlink()
    board = board_of(tmp_path)
    board.log(7, "samples", found["samples"])  # gone: left out, and no harm
    board.close()
    (text,) = events.Tensors("text/file")
    assert (tmp_path / found["text"]["file"]).read_text() in text.tensor_proto.string_val[0].decode()


EVALUATIONS = ("eval=[metrics,train_set,text]", "eval.text.steps=20", "eval.text.new_tokens=8")


def test_evaluated_again_a_run_says_the_same_and_is_not_changed(door: Door) -> None:
    """Through the verb and as `train.steps=0`: the metrics that were logged, bit for bit; nothing new but eval/."""
    from runner.__main__ import main

    assert door.run(*SMALL, *EVALUATIONS, "train.steps=20").returncode == 0
    run = door.the_run
    logged = {
        line.pop("split"): line
        for line in map(json.loads, (run / "logs/metrics.jsonl").read_text().splitlines())
        if line.pop("step") == 20
    }
    assert set(logged) == {"train", "eval", "train_set", "text"}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = door.run(f"dir={run}", "train.steps=0")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "eval/20/results.json").read_text())["results"]
    assert results["eval"] == logged["eval"]
    assert results["train_set"] == logged["train_set"]
    assert (run / "eval/20/text.txt").read_bytes() == (run / logged["text"]["file"]).read_bytes()
    new = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "eval" not in path.parts}
    assert {path: new[path] for path in before} == before
    assert new.keys() == before.keys()
    assert main(["eval", str(run), "train.steps=3"]) == 2
    assert main(["eval", f"{run}@7"]) == 3
    with (door.cwd / "corpus.txt").open("a") as corpus:
        corpus.write("more\n")
    done = door.run(f"dir={run}", "train.steps=0")
    assert done.returncode == 3
    assert "changed: corpus.txt" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval=[metrics,samples]"], "eval.samples: model=gpt makes no samples (it has: text)"),
        (["eval=text"], "no evaluation named 'eval' measures anything (add it: eval=[metrics,…])"),
        (["+eval.train={kind: metrics}"], "eval.train: this name is taken by training itself"),
        (["score.metric=held/loss"], "no evaluation named 'held' measures anything (there is: eval)"),
        (["train.steps=0"], "train.steps=0 evaluates a run that is there; say which with dir=RUN"),
        (["eval.eval.wieghts=ema"], "eval.eval.wieghts: unknown key; did you mean weights?"),
    ],
)
def test_a_mistake_gets_one_plain_line(words: list[str], said: str, door: Door) -> None:
    done = door.run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (door.cwd / "outputs").exists()


def test_an_evaluation_that_is_owed_takes_all_of_its_lines_along() -> None:
    """A step saved before its evaluations were done keeps what training and saving said of it, and nothing else."""
    held = {
        split for split in ("train", "save", "eval", "train_set", "text") if CutPoint(10, owes=True).holds(10, split)
    }
    assert held == {"train", "save"}
    assert all(CutPoint(10).holds(10, split) for split in ("train", "save", "eval", "text"))
