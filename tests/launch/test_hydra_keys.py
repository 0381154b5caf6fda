"""Hydra's own keys and the files of people who use them: each does what it says, or one line says what to do instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import ConfigError
from runner.launch.command_line import RunRequest, SearchRequest, SweepRequest
from runner.launch.compose import compose
from runner.launch.study import read_search_options
from tests.conftest import REPO

DIGITS = ("model=mlp", "data=digits")
# In the shape of a file that a widely used template of Hydra projects has, with keys of ours.
SEARCH = """# @package _global_
defaults:
  - override /hydra/sweeper: optuna
score: {metric: eval/accuracy, mode: max}
hydra:
  mode: "MULTIRUN" # set hydra to multirun by default if this config is attached
  sweeper:
    _target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper
    storage: null
    study_name: null
    n_jobs: 1
    direction: maximize
    n_trials: 20
    sampler:
      _target_: optuna.samplers.TPESampler
      seed: 1234
      n_startup_trials: 10
    params:
      optim.lr: interval(0.0001, 0.1)
      data.batch_size: choice(32, 64)
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/hparams_search").mkdir()
    return tmp_path / "conf"


def experiment(conf: Path, hydra: str) -> str:
    """Write a file that sets something of Hydra's, and return the word that chooses it."""
    (conf / "experiment/mine.yaml").write_text(
        f"# @package _global_\ndefaults: [override /model: mlp, override /data: digits]\nhydra:\n  {hydra}\n"
    )
    return "experiment=mine"


def error_of(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        compose(words)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert not text.endswith(":")
    return text


# --- several runs ---


def test_a_file_that_makes_a_sweep_makes_one_without_m(conf: Path) -> None:
    word = experiment(conf, "mode: MULTIRUN\n  sweeper: {params: {seed: '0,1'}}")
    for words in ([word], ["-m", word], [word, "--multirun"]):
        request = compose(words)
        assert isinstance(request, SweepRequest)
        assert [run.config.seed for run in request.runs] == [0, 1]
        # Its process composes the same file, and must not make a sweep of it again.
        for run in request.runs:
            alone = compose(run.command.words)
            assert isinstance(alone, RunRequest)
            assert alone.config == run.config
    assert isinstance(compose(["--run", word]), RunRequest)


def test_a_search_as_people_have_it(conf: Path) -> None:
    (conf / "hparams_search/mine.yaml").write_text(SEARCH)
    for words in (["+hparams_search=mine"], ["-m", "+hparams_search=mine"]):
        assert isinstance(compose([*words, *DIGITS]), SearchRequest)
    # As one of its trials is started.
    assert isinstance(compose(["--run", "+hparams_search=mine", *DIGITS]), RunRequest)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mode: \"MULTIRUN\"", "verbose: false", "hydra/sweeper=optuna: a search is many runs; add -m"),
        ("storage: null", "storage: sqlite:///a.db", "hydra.sweeper.storage: leave it out; what was suggested is kept in"),
        ("study_name: null", "study_name: a", "hydra.sweeper.study_name: leave it out; a search is found again by what"),
        ("n_jobs: 1", "search_space: {seed: {type: int}}", "hydra.sweeper.search_space: is the old way to write it"),
        ("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper", "my.Sweeper", "hydra.sweeper._target_: got my.S"),
        ("optuna.samplers.TPESampler", "optuna.samplers.Nope", "Nope"),
        ("n_startup_trials", "n_startup_trails", "n_startup_trails"),
    ],
)  # fmt: skip
def test_what_such_a_file_may_not_say(old: str, new: str, says: str, conf: Path) -> None:
    (conf / "hparams_search/mine.yaml").write_text(SEARCH.replace(old, new))
    assert says in error_of("+hparams_search=mine", *DIGITS)


def test_directions(conf: Path) -> None:
    assert read_search_options({"direction": ["maximize"]}).direction == "maximize"
    for options in ({"direction": ["minimize", "maximize"]}, {"direction": "up"}):
        with pytest.raises(ConfigError, match=r"hydra\.sweeper\.direction: got "):
            read_search_options(options)


def test_a_key_of_another_program_says_what_is_ours(conf: Path) -> None:
    (conf / "hparams_search/mine.yaml").write_text(f"{SEARCH}\noptimized_metric: val/acc\n")
    says = error_of("--run", "+hparams_search=mine", *DIGITS)
    assert says == "optimized_metric: unknown key; say score.metric=eval/accuracy score.mode=max"
    assert error_of(*DIGITS, "ckpt_path=x").startswith("ckpt_path: unknown key; the same command goes on by itself")


# --- what Hydra would do beside composing ---


@pytest.mark.parametrize(
    ("hydra", "says"),
    [
        ("run: {dir: 'logs/${now:%Y}'}", "hydra.run.dir=logs/${now:%Y}: belongs to Hydra"),
        ("sweep: {dir: there}", "a run lives in ROOT/NAME/RUN"),
        ("sweep: {subdir: '${hydra.job.override_dirname}'}", "hydra.sweep.subdir="),
        ("output_subdir: .here", "hydra.output_subdir=.here"),
        ("job: {chdir: true}", "a run stays in the working directory"),
        ("job: {name: mine}", "name=… is the name of the runs"),
        ("job: {env_set: {A: b}}", "set variables of the environment before the command"),
        ("verbose: true", "what a run says is in its logs/run.log"),
        ("verbose: [a, b]", "hydra.verbose="),
        ("callbacks: {x: {_target_: os.system}}", "no code is called back"),
        ("launcher: {_target_: os.system}", "hydra.launcher._target_: got os.system; leave it out"),
        ("sweeper: {_target_: os.system}", "hydra.sweeper._target_: got os.system; leave it out"),
    ],
)
def test_a_file_s_key_of_hydra_is_refused_with_the_way_out(hydra: str, says: str, conf: Path) -> None:
    word = experiment(conf, hydra)
    assert says in error_of(word)
    assert says in error_of("-m", word, "seed=0,1")
    assert [path.name for path in conf.parent.iterdir()] == ["conf"]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("hydra.run.dir=/x", "a run lives in ROOT/NAME/RUN"),
        ("hydra.sweep.subdir=x", "a run lives in ROOT/NAME/RUN"),
        ("hydra.mode=MULTIRUN", "say -m for several runs"),
        ("hydra.job.chdir=true", "a run stays in the working directory"),
        ("hydra.job.num=3", "hydra/launcher, hydra/sweeper, hydra.searchpath"),
        ("hydra.verbose=true", "logs/run.log"),
        ("hydra/job_logging=colorlog", "logs/run.log"),
        ("+hydra.callbacks.x._target_=a.b", "no code is called back"),
    ],
)
def test_a_typed_key_of_hydra_is_refused_with_the_way_out(typed: str, says: str, conf: Path) -> None:
    message = error_of(*DIGITS, typed)
    assert "belongs to Hydra, which only composes here; " in message
    assert says in message


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (
            "/hydra/job_logging: colorlog",
            "hydra/job_logging=colorlog: Hydra only composes here; leave it out: what a run",
        ),
        ("/hydra/hydra_logging: default", ""),
        ("/hydra/job_logging: stdout", "hydra/job_logging=stdout: Hydra logs nothing here; leave it out: what a run"),
        ("/hydra/callbacks: mine", "hydra/callbacks=mine: Hydra only composes here; leave it out: no code is called"),
        ("/hydra/launcher: joblib", "hydra/launcher: got joblib; expected one of basic, local, slurm"),
        ("/hydra/sweeper: ax", "hydra/sweeper: got ax; expected one of basic, optuna"),
    ],
)
def test_a_choice_of_a_file_is_not_passed_over(choice: str, says: str, conf: Path) -> None:
    """What the product's own config.yaml chose would have won over an experiment, without a word."""
    (conf / "experiment/mine.yaml").write_text(
        f"# @package _global_\ndefaults: [override /model: mlp, override /data: digits, override {choice}]\n"
    )
    if says:
        assert says in error_of("experiment=mine")
    else:
        assert isinstance(compose(["experiment=mine"]), RunRequest)


def test_an_experiment_may_choose_its_launcher(conf: Path) -> None:
    (conf / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: mlp, override /data: digits, override /hydra/launcher: slurm]\n"
        "hydra: {launcher: {time: 60}}\n"
    )
    request = compose(["experiment=mine"])
    assert isinstance(request, RunRequest)
    assert request.job is not None
    assert request.job.time == 60
    # The job composes the same file, and works on the run.
    there = compose(request.command.words)
    assert isinstance(there, RunRequest)
    assert there.job is None


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_trials: belongs to a search; add hydra/sweeper=optuna and -m"),
        (
            "hydra.sweeper.params.seed=1,2",
            "hydra.sweeper.params.seed=1,2: Hydra's own keys have one value; say seed=1,2",
        ),
    ],
)
def test_options_of_a_sweeper(word: str, says: str, conf: Path) -> None:
    assert says in error_of("-m", *DIGITS, word)


# --- values of the moment ---

PASSING = "is another value at every start, and a run is found again by its values"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("name=n-${now:%H%M%S}", f"name: ${{now:…}} {PASSING}"),
        ("seed='${oc.decode:${now:%S}}'", f"seed: ${{now:…}} {PASSING}"),
        ("name='${oc.env:NOPE,${now:%S}}'", f"name: ${{now:…}} {PASSING}"),
        ("root=${random_name:}", f"root: ${{random_name:…}} {PASSING}"),
        ("seed=${randint:0,9}", f"seed: ${{randint:…}} {PASSING}"),
        ("name=${uuid:}", f"name: ${{uuid:…}} {PASSING}"),
        ("log.wandb={kind: x, y: ['${my.time:}']}", f"log.wandb.y.0: ${{my.time:…}} {PASSING}"),
        ("name=j${hydra:job.num}", "name: ${hydra:job.num} is not known to a run"),
        ("name=j${hydra.job.num}", "name: ${hydra.job.num} is not known to a run"),
        ("name=${hydra:job.name}", "name: ${hydra:job.name} is not known to a run"),
        ("root=${hydra:runtime.output_dir}", "root: ${hydra:runtime.output_dir} is not known to a run"),
        ("root=${hydra:sweep.dir}", "root: ${hydra:sweep.dir} is not known to a run"),
        ("root=${hydra.runtime.cwd}", "root: ${hydra.runtime.cwd} is not among the keys of a run; write ${hydra:runtime.cwd}"),
    ],
)  # fmt: skip
def test_a_value_of_the_moment_is_refused(word: str, says: str, conf: Path) -> None:
    assert says in error_of(*DIGITS, word)
    assert says in error_of("-m", *DIGITS, word, "data.batch_size=8,16")


def test_a_swept_value_of_the_moment_is_refused(conf: Path) -> None:
    assert f"name: ${{now:…}} {PASSING}" in error_of("-m", *DIGITS, "name=a,b-${now:%S}")
    (conf / "experiment/later.yaml").write_text("# @package _global_\nname: x-${now:%S}\n")
    assert f"name: ${{now:…}} {PASSING}" in error_of("-m", *DIGITS, "experiment=later,digits_mlp")


def test_values_that_stay_are_what_they_stand_for(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    for word, value in (
        ("name=${oc.env:WHO}", "me"),
        ("name=${oc.env:NOPE,you}", "you"),
        ("name=${hydra:runtime.choices.model}", "mlp"),
        ("name=s${seed}", "s0"),
        ("name=update-time", "update-time"),
    ):
        request = compose([*DIGITS, word])
        assert isinstance(request, RunRequest)
        assert request.config.name == value
    request = compose([*DIGITS, "root=${hydra:runtime.cwd}/o"])
    assert isinstance(request, RunRequest)
    assert request.config.root == f"{conf.parent}/o"
    # Escaped it is a text, which is no name.
    assert 'name: got "${now:x}"; expected letters' in error_of(*DIGITS, r"name=\${now:x}")


# --- a reader who leaves ---


@pytest.mark.parametrize("reader", ["head -1", "true"])
@pytest.mark.parametrize(
    "words",
    [
        *(
            f"run.py {flags}"
            for flags in ("--help", "--hydra-help", "--cfg job", "--cfg all", "--info all", "--version")
        ),
        *(f"-m runner {words}" for words in ("", "--help", "ls --help", "recipe", "recipe slurm --json")),
    ],
)
def test_a_reader_who_leaves_sees_no_traceback(words: str, reader: str, tmp_path: Path) -> None:
    command = f'"{sys.executable}" {words.replace("run.py", f"{REPO}/run.py")} | {reader}; exit ${{PIPESTATUS[0]}}'
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.stderr == ""
    # What was wanted was read, or nobody was there to read it; `python -m runner` alone asks for a verb.
    assert done.returncode in (0, 141, *([2] if words == "-m runner " else []))


@pytest.mark.parametrize("own", ["1", None])
def test_what_the_user_wants_to_see_of_errors_stays(
    own: str | None, conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra is told to raise its errors by the variable that people set to see whole tracebacks."""
    if own is None:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    else:
        monkeypatch.setenv("HYDRA_FULL_ERROR", own)
    compose(DIGITS)
    assert os.environ.get("HYDRA_FULL_ERROR") == own
