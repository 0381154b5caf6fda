"""A user's own model, data and objective: found, checked and trained; and never run because a run directory says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data.data_errors import UnreadableError
from runner.__main__ import VERBS, main
from runner.config.code_origins import describe_origins, find_origins, list_changed_files
from runner.config.schema import validate_config
from runner.config.trust import NEEDS_TRUST, require_trust
from runner.config.user_code import (
    check_targets_exist,
    find_targets,
)
from runner.errors import ConfigError, RefusedError
from tests.config.test_config import DOCUMENT
from tests.conftest import REPO, Door
from tests.laws.faults import Forks

MINE = """
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models.scopes import scope, tag

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, *, rngs, width=8):
        self.hidden = nnx.Linear(inputs[-1], width, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(width, num_outputs, rngs=rngs)

    @scope("block")
    def __call__(self, x):
        return self.out(self.drop(nnx.tanh(self.hidden(x))))

class OfImages(Net):
    takes = ("images",)

class Plain(Net):
    def __call__(self, x): return self.out(nnx.tanh(self.hidden(x)))

class Aside(Plain):
    @scope("block")
    def encode(self, x): return self.hidden(x)

class Tagged(Net):
    @scope("block")
    def __call__(self, x): return self.out(tag(nnx.gelu(tag(self.hidden(x), "pre")), "act"))

def make(inputs, num_outputs, rngs, **options): return Net(inputs, num_outputs, rngs=rngs, **options)
def line(size=64):
    x = np.random.default_rng(0).uniform(-1, 1, (size, 2))
    return {"inputs": x, "label": x.sum(axis=1, keepdims=True)}
def squared(model, batch, factor=1.0):
    return {"loss": factor * ((model(batch["inputs"]) - batch["label"]) ** 2).mean(axis=-1)}

def three(inputs, num_outputs, rngs): return 3
def nothing(): return {}
def ends(): raise SystemExit(3)
def lacks_file(): return {"inputs": np.load("none.npy")}
def lacks_key(): return {"inputs": {}["x"]}
def unnamed(): return {"x": np.zeros(3)}
def uneven(): return {"inputs": np.zeros((10, 2)), "label": np.zeros(9)}
def flat(): return {"inputs": np.zeros(10), "label": np.zeros(10)}
def words(): return {"inputs": [["a"]] * 10}
def bare(): return {"inputs": np.zeros((10, 2))}
def mean(model, batch): return {"loss": model(batch["inputs"]).mean()}
def alone(model, batch): return model(batch["inputs"]).mean(axis=-1)
def misnamed(model, batch): return {"los": model(batch["inputs"]).mean(axis=-1)}
number = 3
"""
OWN = (
    *("model=external", "model.target=mine:Net", "data=external", "data.target=mine:line"),
    *("objective=external", "objective.target=mine:squared"),
)
SHORT = ("data.batch_size=8", "train.steps=40", "train.log_steps=5", "train.eval_steps=10", "log.tensorboard=false")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a user's file in it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import os\nimport not_there\n")
    (tmp_path / "garbled.py").write_text("def f(:\n")
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--what'])\n")
    (tmp_path / "reads.py").write_text("import json\nsettings = json.load(open('none.json'))\n")
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    yield tmp_path
    sys.path[:] = before
    for name in ("mine", "broken", "garbled", "script", "reads", "evil"):
        sys.modules.pop(name, None)


def own(**changes: Any) -> dict[str, Any]:
    """A document in which model, data and objective are the user's; `model="mine:make"` names another target."""
    parts = {"model": "mine:Net", "data": "mine:line", "objective": "mine:squared"}
    document = {key: {"kind": "external", "target": target} for key, target in parts.items()}
    for key, value in changes.items():
        part, _, rest = key.partition("__")
        if rest:
            document[part][rest] = value
        else:
            document[part] = value if isinstance(value, dict) else {"kind": "external", "target": value}
    return {**DOCUMENT, **document}


def built(document: dict[str, Any]) -> Any:
    """Built, and its train step traced."""
    from runner.train.build import build
    from runner.train.compile import compile_step

    config = validate_config(document)
    made = build(config)
    compile_step(made, config)
    return made


WRONG = [
    ({"model": "mine.Net"}, "model.target: got mine.Net; expected module:attribute; did you mean mine:Net?"),
    ({"model": "mien.py:Net"}, "model.target: mien.py:Net: there is no file mien.py; did you mean mine.py?"),
    ({"model": "mine.py"}, "model.target: got mine.py; expected module:attribute, such as mine.py:MyModel"),
    ({"model": "Net"}, "model.target: got Net; expected module:attribute, such as my_file:MyModel"),
    ({"model": "mien:Net"}, r"model.target: mien:Net: there is no module mien in .*, nor .*; did you mean mine\?"),
    ({"model": "mine.deeper:Net"}, "model.target: mine.deeper:Net: there is no module mine.deeper"),
    ({"model": "mine:Nett"}, "model.target: mine:Nett: mine.py has no 'Nett'; did you mean Net?"),
    ({"model": "mine:number"}, "model.target: mine:number is of type int; expected a class or a function"),
    ({"model": "broken:f"}, "cannot be imported: No module named 'not_there' (broken.py, line 2)"),
    ({"model": "garbled:f"}, "model.target: garbled:f: cannot be imported: invalid syntax (garbled.py, line 1)"),
    ({"model": "script:f"}, "script:f: cannot be imported: it ends Python (SystemExit: 2); put what it does as a"),
    ({"model": "reads:f"}, "cannot be imported: FileNotFoundError: [Errno 2] No such file or directory: 'none.json' ("),
    ({"data": "mine:ends"}, "data.target: mine:ends: it ends Python (SystemExit: 3); return or raise"),
    ({"data": "mine:lacks_file"}, "data.target: mine:lacks_file: FileNotFoundError: [Errno 2] No such file"),
    ({"data": "mine:lacks_key"}, "data.target: mine:lacks_key: KeyError: 'x' (mine.py, line"),
    ({"model": "mine:three"}, "model.target: mine:three: made int; expected a flax.nnx.Module"),
    ({"model": "mine:line"}, "model.target: mine:line: made a dict with inputs, label; expected a flax.nnx.Module"),
    ({"model__options": {"widht": 3}}, "model.options.widht: mine:Net has no such option; did you mean width?"),
    ({"model": "mine:OfImages"}, "model=mine:OfImages takes images, but data=mine:line gives features"),
    ({"model": {"kind": "gpt"}}, "model=gpt takes tokens, but data=mine:line gives features"),
    (
        {"remat": {"kind": "attention_only"}},
        "remat=attention_only: the model declares no scope 'attention' (it has: block)",
    ),
    (
        {"remat": {"kind": "every_n"}},
        "remat=every_n: the model has one block, or stacks its blocks itself; iterate over",
    ),
    (
        {"remat": {"kind": "full", "block": "Net"}},
        "the model says itself what its blocks are; leave remat.block=Net out",
    ),
    ({"model": "mine:Plain", "remat": {"kind": "attention_only"}}, "declares no scope 'attention' (it has: none)"),
    ({"model": "mine:Plain", "remat": {"kind": "full"}}, "no module of its own is repeated in a list; mark one with"),
    ({"model": "mine:Plain", "remat": {"kind": "dots"}}, "or name its class: remat.block=NAME (Dropout, Linear, Plain"),
    (
        {"model": "mine:Plain", "remat": {"kind": "full", "block": "Plane"}},
        "remat.block=Plane: the model has no module of that class (it has: Dropout, Linear, Plain",
    ),
    ({"model": "mine:Aside", "remat": {"kind": "full"}}, "model=external never entered the scope 'block', so nothing"),
    ({"remat": {"kind": "names", "save": ["pre"]}}, "remat=names: the model tags no value 'pre' (it has: none)"),
    (
        {"model": "mine:Tagged", "remat": {"kind": "names", "save": ["pee"]}},
        "the model tags no value 'pee' (it has: act, pre)",
    ),
    (
        {"model": "mine:Tagged", "remat": {"kind": "names", "save": ["act"]}},
        "remat=names: to store 'act' spares no product; leave it out (these would: pre)",
    ),
    (
        {"model": "mine:Tagged", "remat": {"kind": "names", "save": ["act", "pre"]}},
        "remat=names: to store 'act' spares no product beside pre; leave it out (no other tag would either)",
    ),
    (
        {"model": "mine:Tagged", "remat": {"kind": "offload", "offload": ["pre"]}},
        "on a CPU nothing is offloaded, for its memory is the host's; choose remat=names remat.save=[pre]",
    ),
    ({"remat": {"kind": "names"}}, "remat.save: no value is named; name at least one (those your model tags)"),
    ({"data": "mine:number"}, "data.target: mine:number is of type int"),
    ({"data__options": {"sise": 3}}, "data.options.sise: mine:line has no such option; did you mean size?"),
    ({"data": "mine:nothing"}, 'data.target: mine:nothing: returned nothing; expected "inputs"'),
    ({"data": "mine:unnamed"}, 'data.target: mine:unnamed: returned x; expected "inputs"'),
    ({"data": "mine:uneven"}, "the arrays are not of the same examples: inputs has 10, label has 9 rows"),
    ({"data": "mine:flat"}, "an example is a single number (shape (10,)); expected a row per example"),
    ({"data": "mine:words"}, "\"inputs\" is text (such as 'a'); expected an array of numbers"),
    ({"data": "mine:bare", "objective": {"kind": "default"}}, "objective=classify reads label, which data=mine:bare"),
    ({"objective": {"kind": "next_token"}}, "objective=next_token reads tokens, which data=mine:line does not give"),
    ({"objective": "mine:mean"}, 'mine:mean: "loss" is an array of shape (); expected one value per example'),
    ({"objective": "mine:alone"}, 'mine:alone: gave an array of shape (64,); expected a dict with "loss"'),
    ({"objective": "mine:misnamed"}, 'mine:misnamed: gave a dict with los; expected a dict with "loss"'),
    ({"objective__options": {"facto": 2.0}}, "objective.options.facto: mine:squared has no such option; did you mean"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_what_is_wrong_is_told_in_one_line(changes: dict[str, Any], message: str, here: Path) -> None:
    document = own(**{"data__eval_fraction": 0.5, **changes} if "data" not in changes else changes)
    with pytest.raises(ConfigError) as raised:
        built(document)
    said = str(raised.value)
    assert "\n" not in said
    if "*" in message:
        import re

        assert re.search(message, said), said
    else:
        assert message in said, said


def test_a_class_and_a_function_make_the_same_model(here: Path) -> None:
    import jax

    trees = [built(own(model=target, data__eval_fraction=0.5)).init()["params"] for target in ("mine:Net", "mine:make")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *trees))
    wide = built(own(model__options={"width": 16})).init()["params"]
    assert wide["out"]["kernel"].shape == (16, 1)


def test_its_scope_is_recomputed(here: Path) -> None:
    assert built(own(remat={"kind": "full"})).plan.scopes == {"block"}


def test_named_objectives_and_those_of_our_models(here: Path) -> None:
    (here / "mine.py").write_text(
        MINE + "def tags(): return {'inputs': np.ones((40, 2)), 'label': np.arange(40) % 3}\n"
    )
    sources = built(own(data="mine:tags", objective={"kind": "classify"})).sources
    assert (sources.inputs, sources.num_outputs, len(sources.train), len(sources.eval)) == ((2,), 3, 36, 4)
    with pytest.raises(ConfigError, match="objective=classify does not train model=gpt, which is made for next_token"):
        validate_config({**DOCUMENT, "objective": {"kind": "classify"}})


@pytest.mark.parametrize(
    ("columns", "inputs", "num_outputs", "gives"),
    [
        ({"inputs": np.zeros((9, 4)), "label": np.arange(9)}, (4,), 9, "features"),
        ({"inputs": np.zeros((9, 4)), "label": np.zeros(9)}, (4,), 1, "features"),
        ({"inputs": np.zeros((9, 4)), "label": np.zeros((9, 5))}, (4,), 5, "features"),
        ({"inputs": np.zeros((9, 8, 8, 3))}, (8, 8, 3), 0, "images"),
        ({"tokens": np.zeros((9, 17), np.uint8)}, (16,), 256, "tokens"),
        ({"tokens": np.full((9, 17), 999)}, (16,), 1000, "tokens"),
    ],
)
def test_what_arrays_say_about_a_model(
    columns: dict[str, np.ndarray], inputs: tuple[int, ...], num_outputs: int, gives: str
) -> None:
    from data.user_data import _split_examples, classify_source

    sources = _split_examples(columns, 0.5)
    assert (sources.inputs, sources.num_outputs, classify_source(sources.train)[0]) == (inputs, num_outputs, gives)
    assert len(sources.train) == 4


def test_a_wrong_label_in_the_sources_of_the_user_is_told_when_it_comes(here: Path) -> None:
    """Nobody could look at all of them beforehand; as the last class, it would be trained on without a word."""
    (here / "mine.py").write_text(
        MINE
        + """
from data.sources import Sources

class Rows:
    def __len__(self): return 100
    def take(self, indices):
        return {"inputs": np.zeros((len(indices), 2)), "label": np.where(indices == 77, -1, indices % 3)}

def rows(): return Sources(Rows(), Rows(), (2,), 3, "f", "rows")
"""
    )
    document = own(data="mine:rows", objective={"kind": "default"}, model__options={"width": 4})
    document["data"]["batch_size"] = 10
    stream = built(document).stream
    with pytest.raises(UnreadableError, match="77 has the label -1; expected 0 or more, and less than 3"):
        [next(stream) for _ in range(10)]


def test_data_is_told_apart_by_its_values() -> None:
    from data.user_data import _split_examples

    values, others = np.zeros((9, 4)), np.ones((9, 4))
    prints = {
        _split_examples(columns, 0.5).fingerprint
        for columns in ({"inputs": values}, {"inputs": others}, {"inputs": values.reshape(9, 2, 2)}, {"tokens": values})
    }
    assert len(prints) == 4


def test_all_targets_are_seen() -> None:
    """Whatever option has a target is `external`, which is how a document is searched for code."""
    from dataclasses import fields, is_dataclass

    from runner.config.schema import Config
    from runner.config.validation import _find_dataclasses

    named = [option for option in _find_dataclasses(Config) if any(field.name == "target" for field in fields(option))]
    assert {f"{option.__name__}.target" for option in named} == {key for key in NEEDS_TRUST if key.endswith(".target")}
    assert all(is_dataclass(option) and option.kind == "external" for option in named)
    nested = {"a": {"b": {"kind": "external", "target": "x:y"}}, "model": {"kind": "external", "target": "z:w"}}
    assert find_targets(nested) == {"a.b.target": "x:y", "model.target": "z:w"}


def test_who_may_name_code(tmp_path: Path) -> None:
    theirs = validate_config({**DOCUMENT, "model": {"kind": "external", "target": "evil:Net"}})
    for typed in ({}, {"model": {"kind": "gpt"}}, {"model": {"target": "mine:Net"}}, {"data": {"target": "evil:Net"}}):
        with pytest.raises(RefusedError, match=r"asks for code of its own: model.target=evil:Net; if you trust it add"):
            require_trust(tmp_path, theirs, typed, "add --trust")
    require_trust(tmp_path, theirs, {"model": {"target": "evil:Net"}}, "add --trust")
    require_trust(tmp_path, validate_config(DOCUMENT), {}, "add --trust")


def test_a_changed_file_is_told_and_starts_a_new_count(here: Path) -> None:
    from runner.rundir.provenance import hash_code

    document = own()
    check_targets_exist(document)
    before = find_origins(document)
    assert [origin.file for origin in before] == [here / "mine.py"] * 3
    first, first_code = describe_origins(before), hash_code(before[0].files)
    (here / "mine.py").write_text(MINE + "# another\n")
    now = describe_origins(find_origins(document))
    (line,) = list_changed_files(first, now)
    assert line.startswith("mine.py has changed since then (")
    assert list_changed_files(now, now) == []
    assert hash_code(before[0].files) != first_code != hash_code()


def test_of_a_package_every_file_counts(here: Path) -> None:
    inner = here / "theirs" / "inner"
    inner.mkdir(parents=True)
    for name in ("theirs/__init__.py", "theirs/inner/__init__.py", "theirs/inner/nets.py", "theirs/layers.py"):
        (here / name).write_text("")
    (origin,) = find_origins({"model": {"kind": "external", "target": "theirs.inner.nets:Net"}})
    assert origin.file == inner / "nets.py"
    before = origin.hash
    (here / "theirs/layers.py").write_text("width = 3")
    assert find_origins({"model": {"kind": "external", "target": "theirs.inner.nets:Net"}})[0].hash != before


def test_a_wrong_target_leaves_nothing(door: Door) -> None:
    (door.cwd / "mine.py").write_text(MINE)
    before = door.tree()
    for words, hash_code in ((("model.target=mine:Nett",), 2), (("model.target=nowhere:Net",), 2)):
        done = door.run(*OWN, *words, PYTHONDONTWRITEBYTECODE="1")
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (hash_code, 1), done.stderr
    assert door.tree() == before


@pytest.fixture(scope="module")
def own_run(make_door: Callable[..., Door], served: Forks) -> Door:
    """A finished run of a model, data and objective of the user's."""
    door = make_door("own", served)
    (door.cwd / "mine.py").write_text(MINE)
    done = door.run(*OWN, *SHORT, "ckpt.save.periodic.steps=7")
    assert done.returncode == 0, done.stderr
    return door


def test_a_run_says_where_its_code_came_from(own_run: Door) -> None:
    """That it resumes bit for bit is in laws/test_breadth.py."""
    (line,) = [json.loads(line) for line in (own_run.the_run / "attempts.jsonl").read_text().splitlines()]
    assert line["external"]["model.target"]["file"] == str(own_run.cwd / "mine.py")
    assert "- model.target: `mine:Net` from " in (own_run.the_run / "README.md").read_text()
    assert "train.steps=N --trust " in (own_run.the_run / "README.md").read_text()


def test_data_that_is_never_the_same_is_not_gone_on_with(here: Path, own_run: Door) -> None:
    """Typed again, in a copy of the directory whose file makes other examples now."""
    shutil.copytree(own_run.cwd / "outputs", here / "outputs", symlinks=True)
    (here / "mine.py").write_text(MINE.replace("default_rng(0)", "default_rng()"))
    door = Door(here, own_run.forks)
    done = door.run(*OWN, *SHORT, "ckpt.save.periodic.steps=7", "train.steps=50", f"dir={door.the_run}")
    assert done.returncode == 3, done.stderr
    assert "is not what this run was trained on: 2 changed: inputs (still " in done.stderr


EVIL = 'open("SPRUNG", "w").close()\n' + MINE
VERB_WORDS: dict[str, tuple[str, ...]] = {
    "diff": ("RUN", "RUN"),
    "export": ("RUN", "weights"),
    "recipe": ("vm",),
    "supervise": ("--", sys.executable, str(REPO / "run.py"), "dir=RUN", "train.steps=41"),
    "drill": ("--", "dir=RUN"),
    "model": ("dir=RUN",),
    "remat": ("dir=RUN",),
    "restore": ("RUN@7",),
    "tokenize": ("RUN", "--to", "tokens"),
}
# These train, evaluate or build, and are refused; of `restore` there is nothing to take back.
AT_THE_DOOR = ("supervise", "drill", "eval", "model", "remat", "restore")


@pytest.fixture
def trap(here: Path, own_run: Door) -> Path:
    """A foreign run, whose configuration names code that springs a trap when it is imported; found from here, too."""
    run = here / "foreign"
    shutil.copytree(own_run.the_run, run, symlinks=True)
    for folder in (here, run):
        (folder / "evil.py").write_text(EVIL)
    document = yaml.safe_load((run / "config.yaml").read_text())
    for part in ("model", "data", "objective"):
        document[part]["target"] = document[part]["target"].replace("mine:", "evil:")
    document["compile_cache"] = str(run / "programs")  # programs are code as well
    (run / "config.yaml").write_text(yaml.safe_dump(document))
    return run


@pytest.mark.parametrize("verb", list(VERBS))
def test_no_verb_runs_code_of_a_run(verb: str, trap: Path, here: Path) -> None:
    words = [verb, *(word.replace("RUN", str(trap)) for word in VERB_WORDS.get(verb, ("RUN",)))]
    if verb in AT_THE_DOOR:
        assert asked(here, *words).returncode in (2, 3)
    else:
        assert main(words) == 0
    assert "evil" not in sys.modules
    assert not [*here.rglob("SPRUNG")]


def asked(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m runner …` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, "-m", "runner", *words], cwd=here, env=environment, capture_output=True, text=True
    )


def test_load_runs_code_of_a_run_only_when_told_to(trap: Path, here: Path) -> None:
    from runner import load as load_run

    with pytest.raises(RefusedError, match="foreign asks for code of its own: model.target=evil:Net, .* trust=True"):
        load_run(str(trap))
    assert not [*here.rglob("SPRUNG")]
    model, config = load_run(str(trap), trust=True)
    assert type(model).__name__ == "Net"
    assert config.model.kind == "external"
    assert (here / "SPRUNG").exists()  # the trap works


def test_going_on_with_a_foreign_run_asks_for_trust(trap: Path, here: Path) -> None:
    door = Door(here)
    for words in ((), ("train.steps=42",), ("model.target=mine:Net",), ("data=external", "data.target=evil:line")):
        done = door.run(f"dir={trap}", *words)
        assert done.returncode == 3, (words, done.stderr)
        assert "error: foreign asks for code of its own: " in done.stderr
        assert done.stderr.strip().endswith("; if you trust it add --trust")
        assert not [*here.rglob("SPRUNG")]
    done = door.run(f"dir={trap}", "train.steps=42", "--trust")
    assert done.returncode == 0, done.stderr
    assert (here / "SPRUNG").exists()
    assert not (trap / "programs").exists()
    last = json.loads((trap / "attempts.jsonl").read_text().splitlines()[-1])
    assert last["command"][-2:] == ["train.steps=42", "--trust"]


def test_a_trusted_run_is_evaluated(trap: Path, here: Path) -> None:
    done = asked(here, "eval", str(trap), "--trust")
    assert done.returncode == 0, done.stderr
    assert (here / "SPRUNG").exists()


def test_what_is_typed_is_trusted_and_a_changed_file_is_told(trap: Path, here: Path) -> None:
    typed = [word.replace("mine:", "evil:") for word in OWN]
    done = Door(here).run(f"dir={trap}", "train.steps=42", "data.batch_size=8", *typed)
    assert done.returncode == 0, done.stderr
    assert (here / "SPRUNG").exists()
    assert "warning: evil.py has changed since then (" in done.stdout


@pytest.mark.parametrize("part", ["model", "data"])
def test_trouble_of_the_machine_is_no_mistake_in_the_code(part: str, here: Path) -> None:
    """A supervisor runs the same command again, which is no use where the code is wrong."""
    (here / "mine.py").write_text(MINE + "def full(*args, **options): raise OSError(28, 'No space left on device')\n")
    with pytest.raises(OSError, match="No space left on device"):
        built(own(**{part: "mine:full"}))


@pytest.mark.parametrize("part", ["model", "objective", "data"])
def test_an_error_in_a_users_code_is_a_line_with_its_place(
    part: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (MINE + "def bug(*args, **options): raise ValueError('my own')\n").splitlines()
    (here / "mine.py").write_text("\n".join(lines) + "\n")
    line = len(lines)
    with pytest.raises(
        ConfigError, match=rf"^{part}.target: mine:bug: ValueError: my own \(mine.py, line {line}\); HYDRA"
    ):
        built(own(**{part: "mine:bug"}))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"^my own"):
        built(own(**{part: "mine:bug"}))


def test_what_is_short_for_what() -> None:
    from runner.launch.command_words import spell_out

    assert spell_out("model=my.file:Net") == ("model=external", "model.target=my.file:Net")
    assert spell_out("objective=file:loss") == ("objective=external", "objective.target=file:loss")
    for other in (
        "model=gpt",
        "mesh=file:Net",
        "name=a:b",
        "data.path=a:b",
        "model=a:B,b:C",
        "-m",
        "+model.options.at=a:b",
    ):
        assert spell_out(other) == (other,)
