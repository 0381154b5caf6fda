"""`model=a:X` and `model=./a.py:X`, alone and in a sweep: what is handed on is `model=external model.target=…`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.errors import ConfigError
from runner.launch.command_line import RunRequest, SearchRequest, SweepRequest
from runner.launch.command_words import quote_target, spell_out
from runner.launch.compose import compose


@pytest.mark.parametrize(
    ("typed", "target"),
    [
        ("model=a:X", "a:X"),
        ("model=pkg.mod:Net.make", "pkg.mod:Net.make"),
        ("model=tower.py:Tower", "tower.py:Tower"),
        ("model=./nets/tower.py:Tower", "./nets/tower.py:Tower"),
        ("model=../nets/tower.py:Tower", "../nets/tower.py:Tower"),
        ("model=/abs/tower.py:Tower", "/abs/tower.py:Tower"),
        ("model=~/nets/tower.py:Tower", "'~/nets/tower.py:Tower'"),
        ("model='my nets/t.py:T'", "'my nets/t.py:T'"),
        ('model="my nets/t.py:T"', "'my nets/t.py:T'"),
        ("model=/a b/t.py:T", "'/a b/t.py:T'"),
        ("model=a=b/t.py:T", "'a=b/t.py:T'"),
        ("model=ü#1/t.py:T", "'ü#1/t.py:T'"),
        ("model='a,b/t.py:T'", "'a,b/t.py:T'"),
        (r"model=a\,b/t.py:T", "'a,b/t.py:T'"),
        ("model=${oc.env:HOME}/t.py:T", "${oc.env:HOME}/t.py:T"),
        ("data=./d.py:plain", "./d.py:plain"),
        ("objective=losses:huber", "losses:huber"),
    ],
)
def test_a_target_is_spelled_out(typed: str, target: str) -> None:
    group = typed.partition("=")[0]
    assert spell_out(typed) == (f"{group}=external", f"{group}.target={target}")


@pytest.mark.parametrize(
    "typed", ["model=mlp", "ckpt=a:X", "optim.lr=a:X", "model={a: b}", "model=[a:X]", "model=mlp,a:X", "a:X", "model="]
)
def test_what_is_no_target_stays(typed: str) -> None:
    assert spell_out(typed) == (typed,)


def test_several_are_quoted_one_by_one() -> None:
    assert spell_out("model=a:X,b:Y") == ("model=a:X,b:Y",)
    assert spell_out("model=~/n/a.py:X,./b.py:Y") == ("model='~/n/a.py:X',./b.py:Y",)
    assert quote_target(r"model=a\:X") == "model=a:X"
    assert quote_target(r"optim.x=a\:X") == r"optim.x=a\:X"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # The folder is put there when a target is looked for.
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("a", "b"):
        Path(f"{name}.py").write_text("class T: ...\ndef plain(): ...\n")
    return tmp_path


def targets_of(*words: str, part: str = "model") -> list[str]:
    request = compose(words)
    assert isinstance(request, SweepRequest)
    parts = [run.config.document[part] for run in request.runs]
    return [each.get("target", each["kind"]) for each in parts]


def test_the_runs_of_a_sweep_have_a_target_each(here: Path) -> None:
    assert targets_of("-m", "model=a:T,b:T", "data=digits") == ["a:T", "b:T"]
    assert targets_of("-m", "data=digits", "model=b:T,a:T", "seed=0,1") == ["b:T", "b:T", "a:T", "a:T"]
    assert targets_of("-m", "data=digits", "model=choice(b:T,a:T)") == ["b:T", "a:T"]
    assert targets_of("-m", "data=digits", "model=mlp,b:T") == ["mlp", "b:T"]
    assert targets_of("-m", "model=mlp", "data=a:plain,b:plain", part="data") == ["a:plain", "b:plain"]
    both = ("-m", "model=mlp", "data=digits", "objective=classify,a:plain")
    assert targets_of(*both, part="objective") == ["classify", "a:plain"]


def test_a_member_is_the_run_that_is_started_alone(here: Path) -> None:
    sweep, alone = compose(["-m", "model=a:T,b:T", "data=digits"]), compose(["model=b:T", "data=digits"])
    assert isinstance(sweep, SweepRequest)
    assert isinstance(alone, RunRequest)
    member = sweep.runs[1]
    assert member.config == alone.config
    assert member.command.overrides == alone.command.overrides
    # What its process is told, which is also what a person reads in the table.
    assert member.command.words == ("model=b:T", "data=digits")


def test_a_search_among_targets(here: Path) -> None:
    request = compose(
        ["-m", "hydra/sweeper=optuna", "data=digits", "model=choice(a:T,b:T)", "hydra.sweeper.n_trials=1"]
    )
    assert isinstance(request, SearchRequest)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=a:T,b:T"], "model=a:T,b:T: several values make a sweep; add -m"),
        (["-m", "model=a:T,mpl"], "model: got mpl; expected one of cnn, external"),
        (["-m", "model=a:T,nope:T"], "model.target: nope:T: there is no module nope"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*words, "data=digits"])
    assert says in str(caught.value)
