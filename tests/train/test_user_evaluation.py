"""Evaluations of the user's own: what they are given, what becomes of what they return, and what they cannot break."""

from __future__ import annotations

import io
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from data.data_errors import UndecodableError
from data.sources import Sources, Table
from runner.config.evaluations import ExternalEvaluation, check_evaluations
from runner.config.metric_names import ChosenMetric, check_metric_names
from runner.config.user_code import import_targets
from runner.errors import ConfigError
from runner.log.sinks import CutPoint, SinkContext
from runner.log.tensorboard_sink import TensorBoardSink
from runner.preempt.stop import Stopped
from runner.train.build import build
from runner.train.evaluator import EvaluationRun, Evaluator
from runner.train.user_evaluation import apart_from_training
from tests.conftest import Door, composed

pytestmark = pytest.mark.forked

HERE = "tests.train.test_user_evaluation"
gives: dict[str, Any] = {}  # what `look` returns, or the function that it calls


def look(subject: Any, batches: Any, step: int, key: Any, decode: Any, classes: Any, options: Any = None) -> Any:
    asked = {"batches": batches, "step": step, "key": key, "decode": decode, "classes": classes, "options": options}
    returned = gives["returned"]
    return returned(subject, asked) if callable(returned) else returned


def plain(model, bins=10):
    return 1


def other_names(net, /, *, step, key=None):
    return step


def grows(subject, seen, names):
    seen.append(1)
    return {"seen": len(seen), "sum": sum(names)}


def keyed(subject, step):
    return step


def anything(subject, **options):
    return len(options)


def lacks(model, threshold):
    return 1


class Klass:
    def __init__(self, model):
        self.model = model


class Subjects:
    """What is trained, where it is a plain value."""

    def check_evaluation(self, name: str, option: Any) -> None:
        pass

    def make_content(self, option: Any, state: Any) -> bytes:
        raise NotImplementedError

    def sample_text(self, state: Any) -> None:
        return None

    def subject(self, state: Any) -> Any:
        return state["params"]


def evaluator(
    source: Any = None, target: str = "look", chosen: tuple[ChosenMetric, ...] = (), **option: Any
) -> Evaluator:
    table = source or Table({"n": np.arange(10)})
    sources = Sources(table, table, (1,), 3, "", "", decode=str, classes=("a", "b", "c"))
    named = {"mine": ExternalEvaluation(target=f"{HERE}:{target}", **option)}
    return Evaluator(named, sources, Subjects(), lambda value: value, 4, 2, seed=7, chosen=chosen)


def done(returned: Any, run: Path, made: Evaluator | None = None, step: int = 5, **how: Any) -> dict[str, Any]:
    gives["returned"] = returned
    about = EvaluationRun(lambda *_: {}, run, f"media/{{}}/{step:08}", step=step, **how)
    return (made or evaluator())(["mine"], {"params": 0.25, "ema": 0.75}, about).get("mine", {})


def told(returned: Any, run: Path, made: Evaluator | None = None) -> list[str]:
    lines: list[str] = []
    done(returned, run, made, say=lines.append, goes_on=True)
    return lines


def test_it_is_given_what_it_asks_for_by_name(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    def remember(subject: Any, asked: Any) -> int:
        seen.append((subject, {**asked, "batches": [batch["n"].tolist() for batch in asked["batches"]]}))
        return 1

    for step in (5, 5, 6):
        done(remember, tmp_path, evaluator(weights="ema"), step)
    (subject, asked), (_, again), (_, later) = seen
    assert subject == 0.75
    # In order, every example once; the last batch is not filled up.
    assert asked["batches"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (asked["step"], asked["decode"], asked["classes"], asked["options"]) == (5, str, ("a", "b", "c"), None)
    assert asked["key"] == again["key"]
    assert asked["key"] != later["key"]
    assert done(None, tmp_path, evaluator(target="other_names"), 9) == {"value": 9.0}
    assert done(None, tmp_path, evaluator(target="anything", options={"a": 1, "b": 2})) == {"value": 2.0}
    # The same each time, whatever is done to them; a whole number is a key again, which is text in a document.
    made = evaluator(target="grows", options={"seen": [], "names": {"3": "a", "4": "b"}})
    assert [done(None, tmp_path, made) for _ in range(2)] == [{"seen": 1.0, "sum": 7.0}] * 2
    # What is typed as an option counts more than what is there to be asked for.
    assert done(None, tmp_path, evaluator(target="keyed", options={"step": 3})) == {"value": 3.0}


def test_numbers_of_every_kind_are_floats_in_the_log(tmp_path: Path) -> None:
    numbers = {
        **{"python": 1, "true": True, "numpy": np.float32(0.5), "flag": np.bool_(1), "array": np.array(2)},
        **{"jax": jnp.float32(0.25), "half": jnp.bfloat16(1.5), "nan": float("nan"), "name with spaces": np.int64(3)},
    }
    found = done(numbers, tmp_path)
    assert list(found) == list(numbers)
    assert all(type(value) is float for value in found.values())
    assert math.isnan(found.pop("nan"))
    assert list(found.values()) == [1.0, 1.0, 0.5, 1.0, 2.0, 0.25, 1.5, 3.0]
    assert done(jnp.array(4), tmp_path) == {"value": 4.0}
    assert done({}, tmp_path) == {}
    assert not (tmp_path / "media").exists()


def picture(file: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file.read_bytes())))


def test_texts_and_pictures_are_files(tmp_path: Path) -> None:
    red = np.zeros((50, 60, 3), np.float64)
    red[..., 0] = 1.0
    clear = np.concatenate([red, np.zeros((50, 60, 1))], axis=-1)
    values = {
        **{"grey": np.full((50, 60), 0.5), "red": jnp.asarray(red), "bytes": (red * 255).astype(np.uint8)},
        **{"clear": clear, "many": np.zeros((5, 50, 60, 1)), "mask": np.ones((50, 60), bool), "note": "wörds\n"},
        **{"small": np.zeros((2, 3)), "loss": 1.0, "pil": Image.fromarray((red * 255).astype(np.uint8))},
    }
    found = done(values, tmp_path)
    assert found["loss"] == 1.0
    assert found["red"] == "media/mine/00000005-red.png"
    assert (tmp_path / "media/mine/00000005-note.txt").read_text() == "wörds\n"
    shown = {name: picture(tmp_path / file) for name, file in found.items() if str(file).endswith(".png")}
    assert (shown["grey"] == 128).all()
    assert shown["grey"].shape == (50, 60)
    for name in ("red", "bytes", "pil"):
        assert (shown[name] == [255, 0, 0]).all()
    # Where nothing is to be seen there is white; and pictures of a few pixels are enlarged by whole factors.
    assert (shown["clear"] == 255).all()
    assert (shown["mask"] == 255).all()
    assert shown["small"].shape == (48, 72)
    assert shown["many"].shape == (2 * 52 + 2, 3 * 62 + 2)
    assert done("alone", tmp_path) == {"file": "media/mine/00000005.txt"}
    assert done(red, tmp_path) == {"file": "media/mine/00000005.png"}


def test_a_figure_has_the_same_bytes_each_time_and_is_closed(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    def draw(*_: Any) -> Any:
        figure, axes = plt.subplots()
        axes.plot([1, 3, 2])
        return {"figure": figure, "axes": axes}

    found = done(draw, tmp_path)
    first = [(tmp_path / found[name]).read_bytes() for name in ("figure", "axes")]
    assert plt.get_fignums() == []
    done(draw, tmp_path)
    assert [(tmp_path / found[name]).read_bytes() for name in ("figure", "axes")] == first
    assert first[0].startswith(b"\x89PNG")
    assert b"Matplotlib" not in first[0]
    assert plt.get_backend().lower() == "agg"


def test_sinks_show_the_files(tmp_path: Path) -> None:
    found = done({"note": "wörds", "grey": np.zeros((50, 60))}, tmp_path)
    logs = tmp_path / "logs"
    logs.mkdir()
    context = SinkContext(logs / "metrics.jsonl", CutPoint(0), 1, {}, "", print)
    assert context.read_media(found["note"]) == "wörds".encode()
    sink = TensorBoardSink(context)
    sink.catch_up()
    sink.log(5, "mine", found)
    sink.close()
    content = b"".join(path.read_bytes() for path in logs.rglob("*tfevents*"))
    assert "wörds".encode() in content
    assert (tmp_path / found["grey"]).read_bytes() in content


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (None, "gave NoneType; expected a number, a text, a picture"),
        ({"a": [1, 2]}, "gave 'a' as a list of int, int; expected a number"),
        ({"a": {"b": 1}}, "gave 'a' as a dict with b; expected"),
        ({"a": np.zeros(3)}, r"gave 'a' as an array of float64\[3\]; expected"),
        ({"a": np.zeros((4, 5), int)}, r"gave 'a' as an array of int64\[4, 5\]; expected"),
        ({"a": np.zeros((4, 5, 2))}, r"gave 'a' as an array of float64\[4, 5, 2\]"),
        ({"a": np.zeros((0, 5))}, r"gave 'a' as an array of float64\[0, 5\]"),
        ({"a": 1j}, "gave 'a' as complex"),
        ({"a": jax.random.key(0)}, r"gave 'a' as an array of key<fry>\[\]"),
        ({3: 1.0}, "gave a value named 3, which is int; expected text"),
        ({"step": 1.0}, "gave a value named 'step'; expected another name"),
        ({"a/b": 1.0}, "gave a value named 'a/b'"),
        ({" ": 1.0}, "gave a value named ' '"),
        ({"../a b": "text"}, "gave a value named"),
        ({"a b": "text"}, "gave a file named 'a b'; expected letters"),
        ({"a": "\ud800"}, "UnicodeEncodeError"),
    ],
)
def test_what_is_none_of_these_is_one_line_with_its_name(returned: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^eval.mine.target: {HERE}:look: {line}") as caught:
        done(returned, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "media").exists()


def raise_key_error(*_: Any) -> None:
    raise KeyError("nope")


def test_training_goes_on_and_is_told_once(tmp_path: Path) -> None:
    made = evaluator()
    (line,) = told(raise_key_error, tmp_path, made)
    number = raise_key_error.__code__.co_firstlineno + 1
    assert line.startswith(f"warning: eval.mine.target: {HERE}:look: KeyError: 'nope' (")
    assert f"test_user_evaluation.py, line {number})" in line
    assert "eval.mine logs nothing at this step" in line
    assert told([1], tmp_path, made) == []
    # What comes later is logged as if nothing had happened.
    assert done(3, tmp_path, made, goes_on=True) == {"value": 3.0}


@pytest.mark.parametrize(
    "raises", [lambda *_: sys.exit(3), lambda *_: [][1], lambda *_: json.loads("{"), lambda *_: np.zeros(10**15)]
)
def test_no_error_ends_training(raises: Callable[..., Any], tmp_path: Path) -> None:
    (line,) = told(raises, tmp_path)
    assert line.startswith(f"warning: eval.mine.target: {HERE}:look: ")
    with pytest.raises(ConfigError):
        done(raises, tmp_path)


def test_the_whole_traceback_is_there_for_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert len(told(raise_key_error, tmp_path)) == 1
    assert "Traceback" in capsys.readouterr().err


def swallow(_: Any, asked: Any) -> int:
    try:
        return sum(len(batch["n"]) for batch in asked["batches"])
    except Exception:
        return 0


def test_a_stop_and_broken_data_are_no_mistakes_of_its_own(tmp_path: Path) -> None:
    class Broken(Table):
        def take(self, indices: Any) -> Any:
            raise UndecodableError("cat.png: cut off")

    def stop() -> None:
        stop.calls += 1  # type: ignore[attr-defined]
        if stop.calls == 3:  # type: ignore[attr-defined]
            raise Stopped

    for returned in (swallow, lambda _, asked: list(asked["batches"])):
        with pytest.raises(UndecodableError):
            done(returned, tmp_path, evaluator(Broken({"n": np.arange(4)})), goes_on=True)
        stop.calls = 0  # type: ignore[attr-defined]
        with pytest.raises(Stopped):
            done(returned, tmp_path, between_batches=stop, goes_on=True)


def test_a_stop_while_nothing_is_read_leaves_no_file(tmp_path: Path) -> None:
    asked_for: list[int] = []

    def between() -> None:
        if asked_for:
            raise Stopped

    with pytest.raises(Stopped):
        done(lambda *_: asked_for.append(1) or "text", tmp_path, between_batches=between, goes_on=True)
    assert not (tmp_path / "media").exists()


def test_batches_are_read_once_and_while_it_is_called(tmp_path: Path) -> None:
    kept: list[Any] = []

    def twice(_: Any, asked: Any) -> int:
        batches = asked["batches"]
        assert len(batches) == 3
        kept.append(batches)
        assert next(batches)["n"].tolist() == [0, 1, 2, 3]
        assert len(list(batches)) == 2
        return len(list(batches))

    (line,) = told(twice, tmp_path)
    assert "batches: they were read to their end; keep what is needed twice" in line
    done(lambda _, asked: kept.append(asked["batches"]) or 1, tmp_path)
    with pytest.raises(ValueError, match="the evaluation has ended"):
        next(kept[-1])


def test_global_random_numbers_are_its_own(tmp_path: Path) -> None:
    def draw(*_: Any) -> dict[str, float]:
        return {"numpy": np.random.rand(), "python": random.random()}

    before = np.random.get_state()[1].tobytes()
    first, again, later = (done(draw, tmp_path, step=step) for step in (5, 5, 6))
    assert first == again
    assert first["numpy"] != later["numpy"]
    assert first["python"] != later["python"]
    told(lambda *_: [np.random.rand(), random.random()], tmp_path)
    assert np.random.get_state()[1].tobytes() == before
    # Of Python's, whose numbers the checks of types in these tests draw as well.
    state = random.getstate()
    with pytest.raises(KeyError), apart_from_training(7, 5):
        raise KeyError(random.random())
    assert random.getstate() == state


def test_a_picture_in_another_range_is_told(tmp_path: Path) -> None:
    made = evaluator()
    (line,) = told({"a": np.linspace(-1, 1, 12).reshape(3, 4)}, tmp_path, made)
    assert "'a' is a picture with values from -1 to 1; expected 0 to 1: what is outside is cut" in line
    assert told({"a": np.full((3, 4), 7.0)}, tmp_path, made) == []
    assert len(told(np.full((3, 4), np.nan), tmp_path)) == 1
    assert told({"a": np.full((3, 4), 1.0 + 1e-6)}, tmp_path) == []


def test_a_number_to_choose_by_that_never_comes_is_told(tmp_path: Path) -> None:
    chosen = (ChosenMetric("score.metric", "mine/fdi", "min"), ChosenMetric("stop.metric", "eval/loss", "min"))
    made = evaluator(chosen=chosen)
    (line,) = told({"fid": 1.0, "fdi": "text"}, tmp_path, made)
    assert line.startswith("warning: score.metric=mine/fdi: nothing is chosen, for eval.mine gives no such number")
    assert "did you mean fid?" in line
    assert told({"fid": 1.0}, tmp_path, made) == []
    assert told({"fid": 1.0, "fdi": 2.0}, tmp_path, evaluator(chosen=chosen)) == []


MINE = ("model=mlp", "data=digits", f"+eval.mine={{kind: external, target: '{HERE}:plain'}}")


def test_names_are_known_when_it_has_been_called() -> None:
    config = composed(*MINE, "score.metric=mine/fid", "stop.metric=mine/any name")
    check_metric_names(config, {"eval": ["loss"]})
    for words, line in (
        (("score.metric=mine",), "score.metric=mine: expected the name of a number that it gives as well: mine/NAME"),
        (
            ("stop.metric=mine/fid", "+eval.mine.steps=last"),
            "stop.metric=mine/fid: eval.mine.steps=last: is measured once",
        ),
        (("score.metric=mien/fid",), r"no evaluation named 'mien' measures anything \(there is: eval, mine\)$"),
        (("+eval.mine.weights=ema",), "eval.mine.weights=ema: no average is kept"),
    ):
        with pytest.raises(ConfigError, match=line):
            composed(*MINE, *words)
    check_evaluations(config.eval, replace(config.model), has_ema=False)


@pytest.mark.parametrize(
    ("target", "options", "line"),
    [
        ("plain", {"bins": 3}, None),
        ("other_names", {}, None),
        ("keyed", {"step": 3}, None),
        ("anything", {"x": 3}, None),
        ("look", {"options": 3}, None),
        ("plain", {"bin": 3}, "eval.mine.options.bin: .*:plain has no such option; did you mean bins"),
        ("look", {"x": 3}, "eval.mine.options.x: .*:look has no such option; it has: options$"),
        ("lacks", {}, r"lacks\(model, threshold\) cannot be called as \(subject\): missing .* 'threshold'"),
        ("nothing", {}, "has no 'nothing'"),
    ],
)
def test_whether_it_can_be_called_is_known_at_the_start(target: str, options: Any, line: str | None) -> None:
    config = composed(*MINE)
    config = replace(config, eval={"mine": ExternalEvaluation(target=f"{HERE}:{target}", options=options)})
    if line is None:
        import_targets(config)
        return
    with pytest.raises(ConfigError, match=line):
        import_targets(config)


def test_a_class_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(ConfigError, match="eval.mine.target: .*:Klass is a class; expected a function"):
        evaluator(target="Klass").check_content()


def test_the_model_has_arrays_of_its_own(tmp_path: Path) -> None:
    """A function may change the model, keep it, and give its arrays away: the state is as it was."""
    config = composed("model=mlp", "data=digits", f"+eval.mine={{kind: external, target: '{HERE}:look'}}")
    built = build(config)
    state = built.init()
    before = jax.tree.map(np.array, state["params"])
    kept: list[Any] = []

    def spoil(model: Any, asked: Any) -> float:
        assert isinstance(model, nnx.Module)
        logits = model(jnp.asarray(next(asked["batches"])["inputs"]))
        params = nnx.state(model, nnx.Param)
        kept.append(jax.tree.map(np.asarray, nnx.to_pure_dict(params)))
        jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(nnx.to_pure_dict(params))
        nnx.update(model, jax.tree.map(jnp.zeros_like, params))
        return float(logits.std())

    gives["returned"] = spoil
    found = built.evaluator(["mine"], state, EvaluationRun(lambda *_: {}, tmp_path, "media/{}/1"))
    assert found["mine"]["value"] > 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, state["params"]))
    # What was kept stays what it was when the state is given to the next step.
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(kept[0])))


LOOK = """
import pathlib, time
import jax, numpy as np
from flax import nnx

predict = nnx.jit(lambda model, x: model(x).argmax(-1))

def look(model, batches, step, key):
    if step == 20 and not pathlib.Path("seen").exists():
        pathlib.Path("seen").touch()
        time.sleep(600)
    if step == 30:
        raise KeyError("unlucky")
    table = np.zeros((10, 10))
    for batch in batches:
        np.add.at(table, (batch["label"], np.asarray(predict(model, batch["inputs"]))), 1)
    random = float(jax.random.uniform(key)) + np.random.rand()
    return {"accuracy": np.trace(table) / table.sum(), "random": random, "table": table / table.max(), "note": str(step)}
"""
WORDS = (
    *("model=mlp", "data=digits", "model.dropout=0.2", "train.steps=60", "train.eval_steps=10", "train.log_steps=5"),
    *("ckpt.save.periodic.steps=5", "log.tensorboard=false"),
)
WITH = (*WORDS, "+eval.mine={kind: external, target: look:look}", "score.metric=mine/accuracy", "score.mode=max")


def test_stopped_within_and_killed_it_leaves_the_same_bytes(door: Door, tmp_path: Path) -> None:
    (door.cwd / "look.py").write_text(LOOK)
    process = door.start(*WITH)
    while not (door.cwd / "seen").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    # It sleeps for ten minutes: a stop waits for no function.
    process.communicate(timeout=60)
    assert process.returncode == 75
    door.kill_at(45, *WITH)
    done = door.run(*WITH)
    assert done.returncode == 0, done.stderr
    run = door.the_run

    other = Door(tmp_path / "other", door.forks)
    other.cwd.mkdir()
    (other.cwd / "look.py").write_text(LOOK)
    (other.cwd / "seen").touch()
    reference = other.run(*WITH)
    assert reference.returncode == 0, reference.stderr
    assert (reference.stdout + reference.stderr).count("KeyError: 'unlucky' (look.py, line 13)") == 1
    assert "best mine/accuracy" in reference.stdout
    lines = (run / "logs/metrics.jsonl").read_bytes()
    assert lines == (other.the_run / "logs/metrics.jsonl").read_bytes()
    mine = [json.loads(line) for line in lines.splitlines() if b'"mine"' in line]
    assert [line["step"] for line in mine] == [10, 20, 40, 50, 60]
    media = [
        {file.name: file.read_bytes() for file in (each / "media/mine").iterdir()} for each in (run, other.the_run)
    ]
    assert media[0] == media[1]
    assert len(media[0]) == 10

    # As an evaluation alone it is no warning: the step that cannot be evaluated is an error.
    (door.cwd / "look.py").write_text(LOOK.replace("step == 30", "step == 60"))
    evaluated = door.run(f"dir={run}", "train.steps=0", "--trust")
    assert evaluated.returncode == 2
    assert "error: eval.mine.target: look:look: KeyError: 'unlucky' (look.py, line 13)" in evaluated.stderr

    # Nothing of training is different for it.
    bare = other.run(*WORDS, "name=bare")
    assert bare.returncode == 0
    (path,) = other.cwd.glob("outputs/bare/*/logs/metrics.jsonl")
    assert path.read_bytes().splitlines() == [line for line in lines.splitlines() if b'"mine"' not in line]


def test_where_there_is_no_room_for_a_model_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Subjects, "subject", fail)
    (line,) = told(1, tmp_path)
    assert "RESOURCE_EXHAUSTED: Out of memory" in line
