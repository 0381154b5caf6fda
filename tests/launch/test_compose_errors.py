"""Whatever is typed, and whatever a file of conf/ holds: one line that says where and what, and nothing is written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.errors import ConfigError, HoldfastError, RefusedError
from runner.launch.compose import compose
from runner.launch.hydra_errors import MAX_MESSAGE, cut_message
from tests.config.test_read_yaml import BOMB

REMAT = "attention_core, attention_only, auto, dots, dots_no_batch, every_n, everything_saveable, ffn_only, full"
UNREADABLE = "cannot be read; an override reads key=value"
OF_HYDRA = "belongs to Hydra, which only composes here"

SAYS = [
    # --- groups that are set to no name ---
    (["ckpt=10"], "ckpt: got 10; expected one of adaptive, async, best, combined"),
    (["data=true"], "data: got true; expected one of arrayrecord, arrays"),
    (["remat=null"], f"remat: got null; expected one of {REMAT}"),
    (["retention=[1]"], "retention: got [1]; expected one of all, best_n"),
    (["eval=[metrics,null]"], 'eval: got ["metrics", null]; expected one of ema, metrics'),
    (["model={a: b}"], 'model: got {"a": "b"}; expected one of cnn'),
    (["experiment=1.5"], "experiment: got 1.5; expected one of digits_cnn"),
    (["hydra/launcher=5"], "hydra/launcher: got 5"),
    (["~eval=[[1]]"], "eval: ~eval alone takes it away"),
    (["model=''"], 'model: got ""; expected one of cnn'),
    (["model=../../x"], "model: got ../../x; expected one of cnn"),
    (["model=/etc/passwd"], "model: got /etc/passwd; expected one of cnn"),
    (["hydra/launcher=[a]"], "hydra/launcher: got a; expected one of local, slurm"),
    # --- what stands for something else ---
    (["model.width=${nope}"], "model.width: Interpolation key 'nope' not found"),
    (["optim.lr=${oc.env:NOPE}"], "optim.lr: KeyError raised while resolving interpolation: \"Environment variable 'NOPE'"),
    (["name=${name}"], "name: Recursive interpolation detected"),
    (["name=${root}", "root=${name}"], "Recursive interpolation detected"),
    (["ckpt.save.periodic=${ckpt.save}"], "ckpt.save.periodic: Interpolation to parent node detected"),
    (["seed=${nope:1}"], "seed: Unsupported interpolation type nope"),
    (["seed=${hydra:nope}"], "seed: "),
    (["dir=${nope}"], "configuration: Interpolation key 'nope' not found"),
    (["data.inputs=${oc.decode:'[[['}"], "data.inputs: GrammarParseError raised while resolving interpolation"),
    (["seed=${seed"], "seed=${seed: cannot be read as key=value ("),
    # --- depth, length and size ---
    (["model.width=" + "[" * 20_000], "the command has 20,014 characters, of which 8,000 are read"),
    (["model.width=" + "[" * 500 + "]" * 500], "model.width: brackets are nested deeper than 30"),
    (["x" * 5000], f"{'x' * 79}…: unknown key, of 5,000 characters"),
    (["model." + "a." * 500 + "b=1"], "unknown key, of 1,007 characters"),
    (["seed=" + "9" * 5000], "the command: cannot be composed (ValueError: Exceeds the limit (4300 digits)"),
    (["seed=" + "9" * 400], "seed: got a number of 1,329 bits; expected less than 64"),
    (["optim.lr=inf"], "optim.lr: got Infinity; expected a number that ends"),
    (["train.hang_seconds=1e999"], "train.hang_seconds: got Infinity; expected a number that ends"),
    (["root=" + "x" * 300], f'root: got "{"x" * 59}…"; expected a path, of names of 255 bytes at most and 3,500 in all'),
    (["root=" + "x/" * 2500], "root: got "),
    (["root="], 'root: got ""; expected a path'),
    (["init_from="], 'init_from.run: got ""; expected a path'),
    (["init_from=" + "x" * 300], 'init_from.run: got "xxx'),
    (["data=text", "data.path=" + "x" * 300], "File name too long"),
    # --- flags ---
    (["-cn"], "argument --config-name/-cn: expected one argument; --help shows what there is"),
    (["--preempt=x"], "--preempt: unknown flag; overrides read key=value; --help shows what there is"),
    (["--cfg"], "argument --cfg/-c: expected one argument; --help shows"),
    (["--cfg=x"], "argument --cfg/-c: invalid choice: 'x' (choose from "),
    (["--resolve"], "--resolve: goes with --cfg; leave it out, or add --cfg job"),
    (["--experimental-rerun=x.pickle"], "--experimental-rerun: unknown flag"),
    (["-sc", "install=bash"], "-sc: unknown flag"),
    (["--config-dir=/nope"], "Additional config directory '/nope' not found"),
    (["-m", "--cfg", "job"], "-m and --cfg are not for one command; leave out all but one"),
    # --- keys ---
    (["=5"], f"=5: {UNREADABLE}"),
    (["~"], f"~: {UNREADABLE}"),
    (["model"], f"model: {UNREADABLE}"),
    (["a b=c"], "a b=c: cannot be read as key=value ("),
    (["data.path=mes données"], "has characters that need quotes; write 'data.path="),
    (["eval=[metrics,txt]"], "eval: got txt; expected one of ema, metrics, reconstructions, samples, test, text, train_"),
    (["eval=[metrics,a:b]"], "train_set; your own is added as '+eval.mine={kind: external, target: FILE:NAME}'"),
    (["ckpt=a:b"], "; your own is added as '+ckpt.save.mine={kind: external, target: FILE:NAME}'"),
    (["retention=./a.py:b"], "; your own is added as '+retention.mine={kind: external, target: FILE:NAME}'"),
    (["log=a:b"], "; your own is added as '+log.sinks.mine={kind: external, target: FILE:NAME}'"),
    (["optim=a.b"], "sgd, or your own as optim=FILE:NAME"),
    (["+eval.übung={kind: external}"], "a key is written in the letters a to z, digits and '_'; choose another name"),
    (["+eval.B2={kind: text}"], "eval: got the name \"B2\"; expected small letters, digits and '_', a letter first"),
    (["eval.x=mal:two"], "eval.x: got \"mal:two\"; write 'eval.x={kind: external, target: mal:two}'"),
    (["stop.rules.x=./a.py:two"], "stop.rules.x: got \"./a.py:two\"; write 'stop.rules.x={kind: external, target: ./a"),
    (["+x@y=z"], "Override +x@y=z looks like a config group override, but config group 'x' does not exist."),
    (["model@_global_=x"], "model@_global_: unknown key"),
    (["seed.x=1"], "seed: got {\"x\": 1}; expected a whole number"),
    # --- what Hydra would do beside composing ---
    *(([f"{key}=x"], f"{key}: {OF_HYDRA}") for key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.output_subdir")),
    (["hydra.verbose=${..model}"], f"hydra.verbose: {OF_HYDRA}"),
    (["hydra.mode=MULTIRUN", "seed=1,2"], f"hydra.mode: {OF_HYDRA}"),
    (["hydra/job_logging=default"], f"hydra/job_logging: {OF_HYDRA}"),
    (["+hydra.callbacks.x._target_=os.system"], f"hydra.callbacks.x._target_: {OF_HYDRA}"),
    (["hydra=5"], f"hydra: {OF_HYDRA}"),
    (["hydra.searchpath=x"], "hydra.searchpath must be a list of strings. Got: x"),
    # --- sweeps ---
    (["ckpt=periodic,best"], "ckpt=periodic,best: several values make a sweep; add -m"),
    (["seed=choice(1,2)"], "seed=choice(1,2): several values make a sweep; add -m, or write a list as key=[a,b]"),
    (["-m", "seed=1,2", "optim.lr=range(0,1000000000)"], "a sweep of 2,000,000,000 runs: 10,000 are checked and started at most"),
    (["-m", "seed=shuffle(range(0,1000000000))"], "a sweep of 1,000,000,000 runs: 10,000 are checked and started at most"),
    (["-m", "seed=range(0,5,0)"], "seed=range(0,5,0): a range needs a start, a stop and a step other than 0"),
    (["-m", "optim.lr=range(0,1,0.0)"], "optim.lr=range(0,1,0.0): a range needs a start"),
    (["-m", "optim.lr=range(0,inf)"], "optim.lr=range(0,inf): a range needs a start"),
    (["-m", "seed=range(5,0)"], "seed=range(5,0): stands for no value; name those that you mean"),
    (["-m", "seed=glob(*)"], "seed=glob(*): stands for no value"),
    (["-m", "seed=interval(0,1)"], "seed=interval(0,1): an interval is for a search; add hydra/sweeper=optuna"),
    (["-m", "seed=1", "hydra.sweeper.params={a: 1}"], "hydra.sweeper.params: cannot be composed ("),
    (["-m", "seed=1", "hydra.launcher.parallel=x"], 'hydra.launcher.parallel: got "x"; expected a whole number'),
    # --- data ---
    (["data=text", "data.path=.", "data.pattern=/x"], "data.pattern: Non-relative patterns are unsupported"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, in which nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.name != "conf"] == []


def error_of(words: Sequence[str], kind: type[HoldfastError] = ConfigError) -> str:
    with pytest.raises(kind) as raised:
        compose(words)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) <= MAX_MESSAGE
    return str(raised.value)


@pytest.mark.parametrize(("words", "says"), SAYS, ids=[" ".join(words)[:40] for words, _ in SAYS])
def test_it_is_one_line(words: list[str], says: str, here: Path) -> None:
    assert says in error_of(words)


def test_a_file_without_a_name_is_told_how_to_name_it(here: Path) -> None:
    for group, option in {"program": "softmax", "schedule": "moves"}.items():
        (here / f"{option}.py").write_text("")
        with pytest.raises(ConfigError, match=f", or your own as {group}={option}:NAME$"):
            compose([f"{group}={option}"])
        with pytest.raises(ConfigError, match=r"none$|wsd$"):
            compose([f"{group}=other_{option}"])
        (here / f"{option}.py").unlink()


def test_python_without_asserts_reads_no_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra moves on in its asserts: `{a: b}` would be a crash, or something else."""
    plain = SimpleNamespace(flags=SimpleNamespace(optimize=1), argv=[], stdout=sys.stdout, stderr=sys.stderr)
    monkeypatch.setattr("runner.launch.compose.sys", plain)
    with pytest.raises(ConfigError, match=r"^\+eval\.x=\{kind: text\}: cannot be read without asserts; leave out py"):
        compose(["seed=1", "+eval.x={kind: text}"])
    assert compose(["seed=1"]) is not None


def test_what_is_typed_again_is_what_was_typed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `${oc.env:…}` stands for is in config.yaml, where it is the value, but not in the words of the command."""
    monkeypatch.setenv("MY_NAME", "secret")
    request = compose(["model=mlp", "data=digits", "name=${oc.env:MY_NAME}"])
    assert request.config.name == "secret"  # type: ignore[union-attr]
    assert request.command.overrides[-1] == "name=${oc.env:MY_NAME}"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, "conf/model/mine.yaml, line 5: becomes more than 10,000 values"),
        ("[" * 20_000, "conf/model/mine.yaml, line 1: is nested deeper than 50 levels"),
        ("width: " + "9" * 5000, "conf/model/mine.yaml, line 1: has a number of 5,000 digits"),
        ("#" * (2 << 20), "conf/model/mine.yaml: is larger than 1,048,576 bytes"),
        (
            "kind: !!python/name:os.system",
            "conf/model/mine.yaml, line 1: tag:yaml.org,2002:python/name:os.system is no tag",
        ),
        ("kind: mlp\nwidth: *x", "conf/model/mine.yaml, line 2: found undefined alias"),
        ("kind: mlp\nwidth: ${nope}", "model.width: Interpolation key 'nope' not found"),
        ("kind: mlp\nwidth: 2001-01-01", 'model.width: got "2001-01-01"; expected a whole number'),
        ("kind: mlp\nwidth: .inf", "model.width: got Infinity; expected a whole number"),
        ("kind: mlp\n\0", "conf/model/mine.yaml: control characters are not allowed"),
        ("[1, 2]", "model: got [1, 2]; expected a mapping"),
        ("defaults: 5", "Invalid defaults list in 'model/mine', defaults must be a list (got int)"),
        ("defaults: [{a: {b: c}}]", ""),
    ],
)
def test_a_file_of_conf_is_answered_the_same(content: str, says: str, here: Path) -> None:
    (here / "conf/model").mkdir(parents=True)
    (here / "conf/model/mine.yaml").write_text(content)
    assert says in error_of(["model=mine", "data=digits"])


def test_a_file_that_is_none_is_not_waited_for(here: Path) -> None:
    (here / "conf/model").mkdir(parents=True)
    (here / "conf/model/mine.yaml").symlink_to("/dev/zero")
    assert "mine" in error_of(["model=mine", "data=digits"])


def test_the_configuration_of_another_program_leaves_nothing(here: Path) -> None:
    """Its `hydra:` says where Hydra writes and logs; before it was judged, that was written."""
    (here / "conf").mkdir()
    (here / "conf/config.yaml").write_text(
        "defaults: [_self_]\nlr: 0.1\nhydra: {run: {dir: written}, sweep: {dir: written}, output_subdir: of_hydra, "
        "job_logging: {handlers: {file: {class: logging.FileHandler, filename: a.log}}, root: {handlers: [file]}}}\n"
    )
    for words in ([], ["-m", "lr=1,2"]):
        assert "conf/config.yaml is used in place of the product's own" in error_of(words)


@pytest.mark.parametrize("beside", ["status.json", "attempts.jsonl", "checkpoints"])
@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_conf_of_a_run_is_not_used(
    beside: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came with the run, and may name hosts and code; who types a command there has not chosen it."""
    run, here = tmp_path / "run", tmp_path / "run" / below
    (here / "conf/model").mkdir(parents=True)
    (here / "conf/model/mlp.yaml").write_text("kind: mlp\nwidth: 24\n")
    (run / "config.yaml").touch()
    with contextlib.suppress(IsADirectoryError):
        (run / beside).touch()
    monkeypatch.chdir(here)
    request = compose(["model=mlp", "data=digits"])
    assert request.config.document["model"]["width"] == 128  # type: ignore[union-attr]
    assert capsys.readouterr().err == "conf of this directory is not used: it came with the run in {}\n".format(
        "." if below == "." else tmp_path / "run"
    )
    # A configuration alone makes no run: it is a name that many programs use.
    (run / "config.yaml").unlink()
    request = compose(["model=mlp", "data=digits"])
    assert request.config.document["model"]["width"] == 24  # type: ignore[union-attr]


def test_a_path_that_no_file_can_have_is_no_run(here: Path) -> None:
    for path in ("x" * 300, "a/" * 2000, "nowhere"):
        assert "holds no run; leave dir out to start one" in error_of([f"dir={path}"], RefusedError)


def test_a_long_message_keeps_its_beginning_and_its_way_out() -> None:
    line = cut_message("model.width: got " + "x" * 5000 + "\n; \x1b[31mexpected one of a, b; did you mean a?")
    assert line.startswith("model.width: got xxx")
    assert line.endswith("·[31mexpected one of a, b; did you mean a?")
    assert len(line) <= MAX_MESSAGE
    assert line.isprintable()
