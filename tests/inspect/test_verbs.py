"""`python -m runner VERB` on one real run: what each verb says, the same as data, and what it must not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from runner import text
from runner.__main__ import VERBS, main
from runner.checkpoint import record, seal
from runner.errors import ConfigError
from runner.inspect.lookup import apply_drift
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from tests.conftest import REPO, Door
from tests.laws.faults import Forks

STEPS = [15, 20, 30, 40, 45, 60]
RUN_WORDS = (
    *("model=mlp", "model.width=16", "model.dropout=0.3", "data=digits", "optim.lr=0.02", "retention=all"),
    *("train.steps=60", "train.eval_steps=20", "ckpt=combined", "ckpt.save.periodic.steps=15", "log.tensorboard=false"),
)
LOOKING = ("ls", "show", "why", "pin", "unpin", "verify", "digest", "prune --dry-run")

Asked = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def made(make_door: Callable[..., Door], served: Forks) -> Path:
    """One finished run that kept every checkpoint. Tests that change it work on a copy."""
    door = make_door("tools", served)
    done = door.run(*RUN_WORDS)
    assert done.returncode == 0, done.stderr
    assert record.list_steps(door.the_run / "checkpoints") == STEPS
    return door.the_run


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "outputs" / "default" / "run", symlinks=True))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The exit code, stdout and stderr of a verb, on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def ask(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture
def data(ask: Asked) -> Callable[..., Any]:
    """What a verb says with --json, which must be JSON in the strict sense and nothing else."""

    def data(*words: Any, code: int = 0) -> Any:
        got, out, err = ask(*words, "--json")
        assert (got, err) == (code, "")
        return json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    return data


def content(folder: Path) -> dict[str, bytes | str]:
    """Everything below a directory."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    } | {f"{path.relative_to(folder)}/": "" for path in folder.rglob("*/")}


def flip(run: Path, step: int) -> str:
    """Change one bit in the largest file of a checkpoint; gives the file's name."""
    directory = run / "checkpoints" / str(step)
    victim = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    changed_bytes = bytearray(victim.read_bytes())
    changed_bytes[len(changed_bytes) // 2] ^= 1
    victim.write_bytes(changed_bytes)
    return victim.relative_to(directory).as_posix()


def reseal(run: Path, step: int, **changes: Any) -> None:
    """Write another sidecar for a checkpoint."""
    directory = run / "checkpoints" / str(step)
    seal.seal_checkpoint(directory, replace(record.read_sidecar(directory)[0], **changes))


def keep(run: Path, rules: str) -> None:
    """Write other retention rules into config.yaml."""
    config = run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("retention:\n  all:\n    kind: all\n", f"retention: {rules}\n"))
    assert config.read_text() != before


def tiny(folder: Path, step: int, state: dict[str, Any], progress: Any = None) -> str:
    """A checkpoint of a few arrays, as the store writes it; gives its name."""
    import jax.numpy as jnp

    from runner.checkpoint import store

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {kind: mlp}\nretention: {all: {kind: all}}\n")
    directory = folder / "checkpoints" / str(step)
    tree = {part: {name: jnp.asarray(value) for name, value in leaves.items()} for part, leaves in state.items()}
    store.write_checkpoint(directory, tree, progress or {"position": {"next_index": step}, "data": "d", "best": None})
    seal.seal_checkpoint(directory, record.Record(step, "by hand", {}, 0.0))
    return f"{folder}@{step}"


# --- the door ---


def test_the_overview_names_every_verb_and_each_has_a_module_that_says_what_it_takes(ask: Asked) -> None:
    code, out, _ = ask("--help")
    assert code == 0
    assert all(f"\n  {verb} " in out for verb in VERBS)
    for verb, (_, what) in VERBS.items():
        assert ask(verb, "--help")[0] == 0, what
    assert ask()[0] == 2


def test_mistakes_are_one_plain_line_with_the_exit_code_of_the_contract(made: Path, ask: Asked) -> None:
    for words, code, said in (
        (["lss"], 2, "unknown verb 'lss'; did you mean ls?"),
        (["ls", made, "--verfy"], 2, "unrecognized arguments: --verfy"),
        (["diff", made], 2, "required: RUN@B"),
        (["ls", "nowhere"], 3, "nowhere: there is no such directory"),
        (["why", made.parent], 3, "no run is there"),
        (["show", f"{made}@7"], 3, "no checkpoint '7'; it has 15, 20, 30, 40, 45, 60"),
        (["pin", f"{made}@newset"], 3, "no checkpoint 'newset'"),
        (["digest", "nowhere@best"], 3, "nowhere"),
    ):
        got, out, err = ask(*words)
        assert (got, out) == (code, ""), words
        assert err.startswith("error: "), err
        assert said in err, err
        assert err.count("\n") == 1, err


def test_storage_that_refuses_is_one_plain_line(copy: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "pinned")

    monkeypatch.setattr("runner.inspect.pin_checkpoint.open_file", full)
    assert ask("pin", f"{copy}@20") == (5, "", "error: pinned: No space left on device\n")


def test_a_reader_that_goes_away_is_no_error(made: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "runner", "show", str(made)]
    done = subprocess.run(command, cwd=REPO, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_names_from_disk_cannot_command_a_terminal(copy: Path, ask: Asked) -> None:
    (copy / "checkpoints" / "\x1b[2Jx").mkdir()
    out = ask("ls", copy)[1]
    assert "·[2Jx" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("verb", LOOKING)
def test_looking_waits_for_nothing_heavy(verb: str, copy: Path) -> None:
    code = (
        "import sys; from runner.__main__ import main; code = main(sys.argv[1:]); "
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    name, *options = verb.split()
    command = [sys.executable, "-c", code, name, str(copy), *options]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "orbax", "optax", "grain"}
    heavy |= {"omegaconf", "hydra"}
    # These read arrays, or prove that all of them are there.
    if name not in ("show", "digest", "verify", "why", "prune"):
        heavy |= {"numpy", "tensorstore"}
    assert "runner" in done.stderr.split()
    assert not heavy & set(done.stderr.split())


# --- ls ---


def test_ages_are_short() -> None:
    assert [text.format_age(seconds) for seconds in (-5, 0.4, 7, 200, 7300, 200_000)] == [
        *("now", "now", "7s ago", "3m ago", "2h ago", "2d ago")
    ]


def test_ls_has_a_row_for_each_checkpoint_oldest_first(made: Path, ask: Asked, data: Callable[..., Any]) -> None:
    code, out, _ = ask("ls", made)
    head, *rows, last = out.splitlines()
    assert code == 0
    assert head.split()[:2] == ["step", "age"]
    assert "eval/loss" in head
    assert [int(row.split()[0]) for row in rows] == STEPS
    assert "every 15 steps" in rows[0]
    assert "sizes ok" in rows[0]
    assert "newest, all" in rows[-1]
    assert rows[-1].rstrip().endswith("newest")
    assert last.startswith("6 checkpoints, ")
    assert last.endswith("finished at step 60 of 60")
    assert max(map(len, out.splitlines())) <= 100

    found = data("ls", made)
    on_disk = {entry.step: entry for entry in record.list_records(made / "checkpoints")}
    assert found["score"] == {"metric": "eval/loss", "mode": "min"}
    for entry in found["checkpoints"]:
        known = on_disk[entry["step"]]
        assert entry["reason"] == known.reason
        assert entry["metrics"] == known.metrics
        assert entry["bytes"] == known.num_bytes
        assert entry["saved_unix_seconds"] == known.saved_unix_seconds
    marks = {entry["step"]: entry["marks"] for entry in found["checkpoints"] if entry["marks"]}
    best = min((entry for entry in on_disk.values() if entry.metrics), key=lambda entry: entry.metrics["eval/loss"])
    assert {step for step, marked in marks.items() if "best" in marked} == {best.step}
    assert {step for step, marked in marks.items() if "newest" in marked} == {60}


def test_ls_looks_at_bytes_where_asked(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    name = flip(copy, 30)
    assert "not good" not in ask("ls", copy)[1]
    assert f"30 is not good: {name} is not what was written" in ask("ls", copy, "--verify")[1]
    found = {entry["step"]: entry for entry in data("ls", copy, "--verify")["checkpoints"]}
    assert found[30]["verified"] == "not good"
    assert name in found[30]["problem"]
    assert {entry["verified"] for step, entry in found.items() if step != 30} == {"ok"}


def test_ls_says_so_where_no_checksum_was_ever_taken(copy: Path, data: Callable[..., Any]) -> None:
    directory = copy / "checkpoints" / "60"
    seal.seal_checkpoint(directory, record.read_sidecar(directory)[0], checksums=False)
    assert [entry["verified"] for entry in data("ls", copy, "--verify")["checkpoints"]] == ["ok"] * 5 + ["sizes ok"]


def test_ls_tells_of_strangers_quarantine_and_misleading_links(
    copy: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    (copy / "checkpoints" / "60 (copy)").mkdir()
    (copy / "checkpoints" / "99999").mkdir()
    (copy / "quarantine" / "50-1").mkdir(parents=True)
    (copy / "quarantine" / "50-1" / "reason.txt").write_text("a bit was flipped\n")
    (copy / "checkpoints" / "best").unlink()
    out = ask("ls", copy)[1]
    assert "99999 is not good: no holdfast.json" in out
    assert "ignored (not a directory named like a step): 60 (copy)" in out
    assert "in quarantine: 50-1: a bit was flipped" in out
    assert "@best is nothing, but the best is " in out
    found = data("ls", copy)
    assert found["ignored"] == ["60 (copy)"]
    assert found["quarantine"] == [{"name": "50-1", "reason": "a bit was flipped"}]


def test_ls_keeps_its_shape_whatever_a_reason_says(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    reason = "because " * 40
    reseal(copy, 60, reason=reason, metrics={"eval/loss": float("nan")}, mark="error")
    out = ask("ls", copy)[1]
    assert max(map(len, out.splitlines())) <= 100
    assert "because b" in out
    assert "…  the last" in out
    entry = data("ls", copy)["checkpoints"][-1]
    assert entry["reason"] == reason
    assert entry["metrics"] == {"eval/loss": "NaN"}
    assert entry["marks"] == ["error"]
    assert entry["kept"] == "the last that an error left"
    assert data("show", f"{copy}@60")["reason"] == reason


def test_ls_of_checkpoints_without_a_configuration_says_what_it_does_not_know(copy: Path, ask: Asked) -> None:
    (copy / "config.yaml").unlink()
    code, out, _ = ask("ls", copy)
    assert code == 0
    assert "every 15 steps" in out
    assert "not known which stay: " in out


def test_ls_lists_runs(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    (copy.parent / ".overwritten" / "old").mkdir(parents=True)
    (copy.parent / ".overwritten" / "old" / "config.yaml").touch()
    for folder in (copy.parent, copy.parent.parent):
        head, row = ask("ls", folder)[1].splitlines()
        assert head.split() == ["state", "step", "best", "saved", "touched", "run"]
        assert row.startswith("finished  60/60  eval/loss 0.")
        assert row.endswith(str(RunDir(copy)))
    (entry,) = data("ls", copy.parent)["runs"]
    assert (entry["state"], entry["step"], entry["checkpoints"]) == ("finished", 60, STEPS)
    assert entry["best"]["metric"] == "eval/loss"


# --- show ---


def test_show_tells_all_of_one_checkpoint(made: Path, ask: Asked, data: Callable[..., Any]) -> None:
    code, out, _ = ask("show", f"{made}@40")
    known = record.read_sidecar(made / "checkpoints" / "40")[0]
    assert code == 0
    assert out.startswith(f"{RunDir(made)}@40\n")
    for said in (
        known.reason,
        "eval/accuracy",
        '{"next_index": 40}',
        "attempt 1",
        "orbax-checkpoint 0.",
        f"format {record.FORMAT}",
    ):
        assert said in out
    assert "params.hidden.0.linear.kernel      64 × 16" in out
    found = data("show", f"{made}@40")
    assert found["metrics"] == known.metrics
    assert found["bytes"] == known.num_bytes
    assert found["progress"]["position"] == {"next_index": 40}
    assert found["attempt"]["packages"]["numpy"] == np.__version__
    leaf = found["leaves"]["params.hidden.0.linear.kernel"]
    assert leaf == {"shape": [64, 16], "dtype": "float32", "bytes": 64 * 16 * 4, "generator": None}
    assert found["leaves"]["rng.hidden.0.dropout.rngs.key"]["generator"] == "threefry2x32"
    assert found["state_bytes"] == sum(leaf["bytes"] for leaf in found["leaves"].values())
    assert out.splitlines()[-1].startswith(f"{len(found['leaves'])} arrays, ")


def test_show_names_the_attempt_that_made_it(copy: Path, data: Callable[..., Any]) -> None:
    """Also one that was killed before status.json said how far it was; never one that did not get to training."""
    line = json.loads((copy / "attempts.jsonl").read_text())
    lines = [{**line, "to_step": 20}, {**line, "attempt": 2, "from_step": 30}]
    failed = {key: value for key, value in line.items() if key != "from_step"}
    lines.append({**failed, "attempt": 3, "to_step": 60, "ending": "failed"})
    (copy / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "status.json").unlink()
    assert [data("show", f"{copy}@{step}")["attempt"]["attempt"] for step in (20, 30, 40)] == [1, 1, 2]


def test_show_refuses_what_is_no_checkpoint(copy: Path, ask: Asked) -> None:
    (copy / "checkpoints" / "99999").mkdir()
    code, _, err = ask("show", f"{copy}@99999")
    assert code == 3
    assert "no holdfast.json" in err


# --- diff ---


def test_diff_of_a_checkpoint_with_itself_is_nothing(made: Path, ask: Asked, data: Callable[..., Any]) -> None:
    code, out, _ = ask("diff", f"{made}@60", made)
    assert code == 0
    assert out.splitlines()[0] == "configuration: same run"
    assert "bit for bit" in out
    assert "progress: equal" in out
    found = data("diff", f"{made}@60", f"{made}@newest")
    assert found["equal"] is True
    assert found["arrays"]["num_equal"] == len(data("show", made)["leaves"])


def test_diff_of_two_steps(made: Path, ask: Asked, data: Callable[..., Any]) -> None:
    code, out, _ = ask("diff", f"{made}@40", f"{made}@60")
    assert code == 1
    assert '  position: {"next_index": 40} → {"next_index": 60}' in out
    assert "  largest integer difference: 20 in opt." in out
    found = data("diff", f"{made}@40", f"{made}@60", code=1)
    assert found["arrays"]["first_differing"].startswith("opt.")
    assert found["progress"]["position"] == {"a": {"next_index": 40}, "b": {"next_index": 60}}


def test_diff_measures_bits(tmp_path: Path, ask: Asked, data: Callable[..., Any]) -> None:
    numbers = np.array([1.5, np.nan, -0.0], np.float32)
    same = {"n": numbers, "half": np.array([1, 2], ml_dtypes.bfloat16), "gone": np.zeros(2), "grown": np.zeros(2)}
    a = tiny(tmp_path / "a", 1, {"params": {**same, "w": numbers, "count": np.array([2**32 - 1, 5], np.uint32)}})
    other = {**same, "w": numbers + np.array([0.25, 0, 0], np.float32), "count": np.array([0, 5], np.uint32)}
    other |= {"half": np.array([1, 2.5], ml_dtypes.bfloat16), "grown": np.zeros(3), "new": np.zeros(1)}
    b = tiny(tmp_path / "b", 1, {"params": {name: value for name, value in other.items() if name != "gone"}})
    arrays = data("diff", a, b, code=1)["arrays"]
    assert arrays["only_in_a"] == ["params.gone"]
    assert arrays["only_in_b"] == ["params.new"]
    assert arrays["changed"] == {"params.grown": {"a": "float32[2]", "b": "float32[3]"}}
    assert arrays["differing"] == ["params.count", "params.half", "params.w"]  # n holds a NaN, and is equal
    assert arrays["largest"]["integer"] == {"name": "params.count", "difference": 2**32 - 1}
    assert arrays["largest"]["float"] == {"name": "params.half", "difference": 0.5}
    out = ask("diff", a, b)[1]
    assert "arrays: 3 differ, 1 are equal" in out
    assert "  the first: params.count" in out
    assert "  only in A: 1\n    params.gone\n" in out

    progress = {"position": {"next_index": 7}, "data": "d", "best": None}
    late = tiny(tmp_path / "late", 1, {"params": {"w": numbers}}, progress)
    early = tiny(tmp_path / "early", 1, {"params": {"w": numbers}})
    assert data("diff", late, early, code=1)["arrays"]["num_differing"] == 0

    import jax

    keys = [tiny(tmp_path / f"key{seed}", 1, {"rng": {"k": jax.random.key(seed)}}) for seed in (0, 1)]
    found = data("diff", *keys, code=1)["arrays"]
    assert (found["differing"], found["largest"]) == (["rng.k"], {})  # keys have no distance

    lost = tiny(tmp_path / "c", 1, {"params": {**same, "w": np.array([np.nan, np.nan, -0.0], np.float32)}})
    assert data("diff", a, lost, code=1)["arrays"]["largest"]["float"]["difference"] == "Infinity"


def test_diff_tells_configurations_apart_but_compares_checkpoints(
    made: Path, copy: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    keep(copy, "{last: {kind: last, n: 3}}")
    code, out, _ = ask("diff", made, copy)
    assert code == 0
    assert '  retention.all.kind: "all" → null\n' in out
    changes = {change["key"]: change["b"] for change in data("diff", made, copy)["configuration"]}
    assert changes == {"retention.all.kind": None, "retention.last.kind": "last", "retention.last.n": 3}


def test_diff_warns_of_bytes_that_are_not_what_was_written(copy: Path, made: Path, ask: Asked) -> None:
    flip(copy, 60)
    assert f"warning: {RunDir(copy)}@60 is not good: " in ask("diff", made, copy)[1]


# --- verify, why ---


def test_verify_finds_a_flipped_bit_and_changes_nothing(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    assert ask("verify", copy)[:2][0] == 0
    assert data("verify", copy, "--all")["good"] is True
    name = flip(copy, 40)
    before = content(copy)
    assert ask("verify", copy)[0] == 0
    code, out, _ = ask("verify", f"{copy}@40")
    assert (code, out) == (3, f"step     40  not good: {name} is not what was written (its checksum differs)\n")
    code, out, _ = ask("verify", copy, "--all")
    assert code == 3
    assert [line.split()[:3:2] for line in out.splitlines()[:-1]] == [
        ["step", "not" if step == 40 else "ok,"] for step in STEPS
    ]
    found = data("verify", copy, "--all", code=3)
    assert [entry["step"] for entry in found["checkpoints"] if entry["problem"]] == [40]
    assert content(copy) == before


def test_verify_of_a_run_looks_at_its_newest_directory_good_or_not(copy: Path, ask: Asked) -> None:
    (copy / "checkpoints" / "99999").mkdir()
    code, out, _ = ask("verify", copy)
    assert code == 3
    assert out.startswith("step  99999  not good: no holdfast.json")


def test_why_names_the_step_and_what_speaks_against_newer_ones(
    copy: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    assert ask("why", copy)[:2][0] == 0
    assert ask("why", copy)[1].startswith("a restart goes on from step 60 (saved: ")
    (copy / "checkpoints" / "99999").mkdir()
    (copy / "checkpoints" / "tmp").mkdir()
    name = flip(copy, 60)
    reseal(copy, 45, mark="error", reason="error after step 45: ValueError")
    before = content(copy)
    code, out, _ = ask("why", copy)
    assert code == 0
    assert "not 99999: no holdfast.json" in out
    assert f"not 60: {name} is not what was written" in out
    assert "not 45: marked error (error after step 45: ValueError); only step=45 restores it" in out
    assert "ignored (not a directory named like a step): tmp" in out
    assert "a restart goes on from step 40 (saved: " in out
    found = data("why", copy)
    assert (found["step"], [entry["step"] for entry in found["passed"]]) == (40, [99999, 60, 45])
    assert content(copy) == before


def test_why_finds_nothing(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    for step in STEPS:
        flip(copy, step)
    code, out, _ = ask("why", copy)
    assert code == 3
    assert "nothing to restore: a restart is refused" in out
    assert data("why", copy, code=3)["step"] is None
    shutil.rmtree(copy / "checkpoints")
    assert ask("why", copy)[:2] == (
        3,
        "nothing to restore: a restart begins at step 0\n",
    )


def test_why_proves_no_more_than_the_run_would(copy: Path, data: Callable[..., Any]) -> None:
    flip(copy, 60)
    assert data("why", copy)["step"] == 45
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("verify: bytes", "verify: 'off'"))
    assert data("why", copy)["step"] == 60


# --- pin, prune ---


def test_pin_and_unpin_say_what_they_did(copy: Path, ask: Asked, data: Callable[..., Any]) -> None:
    pinned = copy / "checkpoints" / "20" / "pinned"
    assert "pinned: retention keeps it" in ask("pin", f"{copy}@20")[1]
    assert pinned.read_bytes() == b""
    assert "was pinned already" in ask("pin", f"{copy}@20")[1]
    assert data("verify", f"{copy}@20")["good"] is True
    assert "pinned" in data("ls", copy)["checkpoints"][1]["marks"]
    expected = {"run": str(RunDir(copy)), "step": 20, "pinned": False}
    assert data("unpin", f"{copy}@20") == {**expected, "changed": True}
    assert not pinned.exists()
    assert data("unpin", f"{copy}@20") == {**expected, "changed": False}
    best = os.readlink(copy / "checkpoints" / "best")
    ask("pin", f"{copy}@best")
    assert (copy / "checkpoints" / best / "pinned").exists()


def test_what_is_pinned_survives_a_run_that_keeps_only_the_last(
    copy: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    ask("pin", f"{copy}@20")
    done = Door(copy.parent).run("dir=run", "retention=last_n", "retention.last.n=1", "train.steps=75")
    assert done.returncode == 0, done.stderr
    left = {entry["step"]: entry["kept"] for entry in data("ls", copy)["checkpoints"]}
    assert {20, 75} <= left.keys()
    assert not {15, 30} & left.keys()
    assert left[20] == "pinned"  # the rules in force are those the last attempt changed, not those of config.yaml
    assert left[75] == "newest, last 1"
    assert "later: `train.steps: 60 → 75`" in exported_card(ask, copy)


def exported_card(ask: Asked, run: Path) -> str:
    assert ask("export", run, "--to", "npz", run.parent / "exported")[0] == 0
    return (run.parent / "exported" / "README.md").read_text()


def test_changes_of_an_attempt_are_applied_as_they_were_recorded() -> None:
    document = {"retention": {"last": {"kind": "last", "n": 2}}, "score": {"metric": "a: b", "mode": "min"}}
    drift = ['score.metric: "a: b" → "x \\u2192 y"', 'retention.last.kind: "last" → null', "retention.last.n: 2 → null"]
    assert apply_drift(document, [*drift, 'retention.all.kind: null → "all"']) == {
        "retention": {"all": {"kind": "all"}},
        "score": {"metric": "x → y", "mode": "min"},
    }
    assert document["retention"] == {"last": {"kind": "last", "n": 2}}


def test_prune_dry_run_says_what_prune_would_do_and_changes_nothing(
    copy: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    keep(copy, "{last: {kind: last, n: 2}}")
    best = int(os.readlink(copy / "checkpoints" / "best"))
    stay = {45, 60, best}
    before = content(copy)
    code, out, _ = ask("prune", copy, "--dry-run")
    assert code == 0
    assert "step     15  would be deleted, " in out
    assert "step     60  stays: newest, last 2" in out
    promised = data("prune", copy, "--dry-run")
    assert content(copy) == before
    assert promised["deleted"] == [step for step in STEPS if step not in stay]

    with run_lock.lock_run(RunDir(copy)):
        code, _, err = ask("prune", copy)
        assert code == 3
        assert f"in use by pid {os.getpid()}" in err
        assert record.list_steps(copy / "checkpoints") == STEPS

    (copy / "checkpoints" / "best").unlink()
    done = data("prune", copy)
    assert int(os.readlink(copy / "checkpoints" / "best")) == best
    assert done == {**promised, "dry_run": False}
    assert record.list_steps(copy / "checkpoints") == sorted(stay)
    assert not any((copy / "checkpoints" / record.TRASH).iterdir())
    assert "nothing to delete" in ask("prune", copy)[1]


def test_prune_deletes_nothing_where_the_newest_is_not_proven(copy: Path, ask: Asked) -> None:
    keep(copy, "{last: {kind: last, n: 1}}")
    name = flip(copy, 60)
    code, _, err = ask("prune", copy)
    assert code == 3
    assert f"the newest checkpoint is not good: {name} is not what was written" in err
    assert record.list_steps(copy / "checkpoints") == STEPS


@pytest.mark.parametrize("rules", ["{last: {kind: lats}}", "{last: {kind: last, n: 0}}", "[]", "{a: {n: 1}}"])
def test_prune_deletes_nothing_by_rules_it_does_not_understand(rules: str, copy: Path, ask: Asked) -> None:
    keep(copy, rules if rules != "[]" else "[last]")
    code, _, err = ask("prune", copy)
    assert code == 3
    assert "config.yaml" in err
    assert record.list_steps(copy / "checkpoints") == STEPS


# --- digest, export, load ---


def test_digest_is_of_what_a_checkpoint_means(copy: Path, made: Path, ask: Asked, data: Callable[..., Any]) -> None:
    reseal(copy, 60, reason="another reason")
    of = {step: data("digest", f"{copy}@{step}")["digest"] for step in (45, 60)}
    assert len(set(of.values())) == 2
    assert ask("digest", made)[1] == f"{of[60]}  {RunDir(made)}@60\n"
    assert of[60].startswith("sha256:")
    assert len(of[60]) == len("sha256:") + 64
    flip(copy, 60)
    code, out, err = ask("digest", copy)
    assert (code, out) == (3, "")
    assert "is not good" in err


def test_export_round_trips_through_plain_readers(
    made: Path, tmp_path: Path, ask: Asked, data: Callable[..., Any]
) -> None:
    from safetensors.numpy import load_file

    from runner.checkpoint import arrays

    saved = arrays.read_leaves(made / "checkpoints" / "60" / "state")
    weights = {name: value for name, value in saved.items() if name.startswith(("params.", "extra."))}
    assert len(weights) == 6
    assert ask("export", made, tmp_path / "st")[0] == 0  # safetensors, unless said otherwise
    (tmp_path / "np").mkdir()  # an empty directory is as good as none
    said = data("export", made, "--to", "npz", tmp_path / "np")
    assert said["bytes"] == (tmp_path / "np" / "model.npz").stat().st_size
    for read in (load_file(tmp_path / "st" / "model.safetensors"), dict(np.load(tmp_path / "np" / "model.npz"))):
        assert read.keys() == weights.keys()
        for name, value in weights.items():
            assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
            assert read[name].tobytes() == value.tobytes()
    for folder in (tmp_path / "st", tmp_path / "np"):
        assert (folder / "config.yaml").read_bytes() == (made / "config.yaml").read_bytes()
        modes = {path.stat().st_mode for path in folder.iterdir()}
        assert len(modes) == 1  # who may read the page may read the weights
    assert {path.name for path in tmp_path.iterdir()} == {"st", "np"}  # nothing half-written is left


def test_the_card_says_where_weights_come_from_and_how_to_load_them(
    made: Path, tmp_path: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch, data: Callable[..., Any]
) -> None:
    ask("export", f"{made}@best", "--to", "safetensors", tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    best = record.read_sidecar((made / "checkpoints" / "best").resolve())[0]
    count = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    progress = record.read_progress(made / "checkpoints" / str(best.step))
    for said in (
        *(f"{count:,} parameters", f"- eval/loss: {best.metrics['eval/loss']:.6g}", "- `model.dropout=0.3`"),
        *(data("digest", f"{made}@best")["digest"], progress["data"], f"numpy {np.__version__}", f"@{best.step}"),
    ):
        assert said in page, said
    monkeypatch.chdir(tmp_path / "out")
    namespace: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    assert len(namespace["weights"]) == 6


def test_export_keeps_bfloat16_where_it_can_and_says_so_where_not(tmp_path: Path, ask: Asked) -> None:
    from safetensors.numpy import load_file

    half = np.array([1.5, -3.0e38, np.nan], ml_dtypes.bfloat16)
    checkpoint = tiny(tmp_path / "run", 1, {"params": {"w": half}, "extra": {"n": np.int32(3)}, "opt": {"m": half}})
    ask("export", checkpoint, "--to", "safetensors", tmp_path / "st")
    read = load_file(tmp_path / "st" / "model.safetensors")
    assert read.keys() == {"params.w", "extra.n"}
    assert read["params.w"].tobytes() == half.tobytes()
    assert "import ml_dtypes" in (tmp_path / "st" / "README.md").read_text()
    ask("export", checkpoint, "--to", "npz", tmp_path / "np")
    widened = np.load(tmp_path / "np" / "model.npz")["params.w"]
    assert widened.dtype == np.float32
    assert widened.astype(ml_dtypes.bfloat16).tobytes() == half.tobytes()
    assert "bfloat16 arrays; here they are float32" in (tmp_path / "np" / "README.md").read_text()
    small = tiny(tmp_path / "eight", 1, {"params": {"w": np.ones(2, ml_dtypes.float8_e4m3fn)}})
    code, _, err = ask("export", small, "--to", "safetensors", tmp_path / "f8")
    assert code == 2
    assert "use --to npz" in err
    assert not list(tmp_path.glob("*f8*"))


def test_export_gives_the_average_the_names_of_the_weights(tmp_path: Path, ask: Asked) -> None:
    live, average = np.array([1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)
    state = {"params": {"w": live}, "extra": {"n": np.int32(3)}, "ema": {"w": average}}
    checkpoint = tiny(tmp_path / "run", 1, state)
    for weights, expected in (("params", live), ("ema", average)):
        assert ask("export", checkpoint, "--weights", weights, "--to", "npz", tmp_path / weights)[0] == 0
        arrays = np.load(tmp_path / weights / "model.npz")
        assert set(arrays) == {"params.w", "extra.n"}
        assert arrays["params.w"].tobytes() == expected.tobytes()
    page = (tmp_path / "ema" / "README.md").read_text()
    assert "The average of the weights (`optim.ema`) of `model=mlp`" in page
    assert f'load("{checkpoint}", weights="ema")' in page
    code, _, err = ask("export", tiny(tmp_path / "no", 1, {"params": {"w": live}}), "--weights", "ema", tmp_path / "x")
    assert (code, (tmp_path / "x").exists()) == (2, False)
    assert "keeps no average; train with optim.ema=0.999, or export params" in err


def test_export_overwrites_nothing_and_trusts_no_flipped_bit(copy: Path, tmp_path: Path, ask: Asked) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    code, _, err = ask("export", copy, tmp_path / "mine")
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    flip(copy, 60)
    assert ask("export", copy, tmp_path / "new")[0] == 3
    assert not (tmp_path / "new").exists()


def test_weights_of_another_name_are_no_average() -> None:
    """Before anything is looked at: `load("best")` of a result means a step, and would get the newest average."""
    from runner.inspect.load_model import load_model

    with pytest.raises(ConfigError, match=r"^weights=best: expected one of params, ema; a checkpoint is named as RUN"):
        load_model("nowhere", "best")  # type: ignore[arg-type]


def test_load_gives_the_model_that_was_measured(copy: Path) -> None:
    """On one device, in evaluation mode (the run has dropout), from a run that had more devices than are here."""
    import jax.numpy as jnp

    from models.objectives import OBJECTIVES
    from runner import load

    config_file = copy / "config.yaml"
    config_file.write_text(config_file.read_text().replace("mesh:\n  data: 1", "mesh:\n  data: 64"))
    for step in (20, 60):
        model, config = load(f"{copy}@{step}")
        assert (config.mesh.data, config.model.width, config.train.steps) == (1, 16, 60)
        examples = config.data.sources().eval
        batch = {name: jnp.asarray(value) for name, value in examples.take(np.arange(len(examples))).items()}
        losses = OBJECTIVES[config.model.objective](model, batch)
        measured = record.read_sidecar(copy / "checkpoints" / str(step))[0].metrics
        for name in ("loss", "accuracy"):
            assert float(losses[name].mean()) == pytest.approx(measured[f"eval/{name}"], rel=1e-6)


def test_load_proves_first_and_the_package_stays_light(copy: Path) -> None:
    import runner
    from runner.errors import RefusedError

    flip(copy, 60)
    with pytest.raises(RefusedError, match="is not good"):
        runner.load(str(copy))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        runner.laod  # noqa: B018
    code = "import sys, runner; print(len([name for name in sys.modules if name.startswith('runner')]))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPO, text=True) == "1\n"
