"""A document is valid or refused with one plain line; identity depends on values alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from omegaconf import OmegaConf

from runner.config.identity import classify_key, find_drift, hash_config, hash_identity
from runner.config.schema import dump_yaml, merge_typed_keys, read_document, validate_config
from runner.errors import ConfigError, RefusedError
from runner.preempt.preempt_options import NoticeSource
from runner.rundir.layout import slug_from_overrides

DOCUMENT: dict[str, Any] = {
    "model": {"kind": "gpt"},
    "data": {"kind": "stdlib"},
    "optim": {"kind": "adamw"},
    "schedule": {"kind": "cosine"},
    "train": {},
    "ckpt": {"save": {"periodic": {"kind": "steps", "steps": 5}, "best": {"kind": "best"}}},
    "retention": {"last": {"kind": "last"}},
    "remat": {"kind": "none"},
    "mesh": {},
    "preempt": {},
    "log": {},
    "score": {},
}
NOTICES = ", ".join(option.kind for option in get_args(NoticeSource))
GCE_HAS = (
    "preempt.notices.gce.grce: unknown key; preempt.notices.gce has: kind, url, preempted_seconds, "
    "maintenance_seconds, wait_seconds, timeout_seconds, poll_seconds"
)


def changed(**changes: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    for key, value in changes.items():
        node, *path = document, *key.split("__")
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt__zzz": 5}, "ckpt.zzz: unknown key; ckpt has: save, write, last, verify"),
        ({"chkpt": "best"}, "chkpt: unknown key; did you mean ckpt?"),
        ({"train__stps": 3}, "train.stps: unknown key; did you mean steps?"),
        ({"train__steps": "five"}, 'train.steps: got "five"; expected a whole number'),
        ({"train__steps": True}, "train.steps: got true; expected a whole number"),
        ({"train__steps": 1.5}, "train.steps: got 1.5; expected a whole number"),
        ({"train__steps": 0}, "train.steps=0 evaluates a run that is there; say which with dir=RUN, or train.steps=N"),
        ({"optim__lr": -1}, "optim.lr: got -1; expected more than 0"),
        ({"optim__lr": float("nan")}, "optim.lr: got NaN; expected a number that ends"),
        ({"model__dropout": 1.0}, "model.dropout: got 1.0; expected less than 1"),
        ({"data": {"kind": "text"}}, "data.path: a value is needed; say data.path=VALUE"),
        ({"data": {"kind": "text", "path": "/nope"}}, "data.path=/nope does not exist"),
        ({"ckpt__save__best__metrc": "x"}, "ckpt.save.best.metrc: unknown key; did you mean metric?"),
        (
            {"ckpt__save__best__kind": "bst"},
            'ckpt.save.best.kind: got "bst"; expected one of steps, seconds, epochs, first, best, adaptive, unstable, continuous, on_error, external; did you mean best?',
        ),
        ({"retention__last__n": 0}, "retention.last.n: got 0; expected at least 1"),
        ({"preempt__signals": ["KILL"]}, 'preempt.signals.0: got "KILL"; expected one of TERM, INT, USR1, USR2, HUP'),
        ({"preempt__walltime": "3x"}, "preempt.walltime=3x is no duration; write it as 3h55m, 90m, 1d2h or seconds"),
        ({"preempt__notices__gce": {"kind": "gce", "grce": 1}}, GCE_HAS),
        (
            {"preempt__notices__gce": {"kind": "gcp"}},
            f'preempt.notices.gce.kind: got "gcp"; expected one of {NOTICES}; did you mean gce?',
        ),
        (
            {"preempt__notices__x": {"kind": "aws", "url": "https://x"}},
            "preempt.notices.x.url=https://x is no address; write it as http://HOST or http://HOST:PORT",
        ),
        (
            {"preempt__notices__slurm": {"kind": "slurm", "lead_second": 5}},
            "preempt.notices.slurm.lead_second: unknown key; did you mean lead_seconds?",
        ),
        ({"name": "../x"}, "name: got \"../x\"; expected letters, digits, '.', '_' and '-', 64 at most"),
        ({"step": "newest"}, 'step: got "newest"; expected a whole number or best'),
        ({"ckpt__verify": "bite"}, 'ckpt.verify: got "bite"; expected one of bytes, values, off; did you mean bytes?'),
        (
            {"retention": {"x": {"n": 1}}},
            "retention.x: has no kind, which says what it is; write retention.x={kind: …}, as the files in conf/ do",
        ),
        (
            {"init_from": {"partial": True}},
            "init_from.partial=true says how to take weights, but not whose; add init_from=RUN",
        ),
        ({"seed": None}, "seed: got null; expected a whole number"),
    ],
)
def test_a_mistake_gets_one_plain_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(changed(**changes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": {"kind": "digits"}}, "choose data=stdlib|text|synthetic|tokens|chat|preferences or model=mlp|"),
        ({"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "remat": {"kind": "ffn_only"}}, "(it has: block)"),
        ({"model__width": 130}, "must be a multiple of 2 × num_heads=8"),
        ({"overwrite": True}, "say resume=never with it"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_way_out(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=".") as caught:
        validate_config(changed(**changes))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_is_of_values_not_of_spelling() -> None:
    assert hash_config(validate_config(DOCUMENT).document) == hash_config(
        validate_config(changed(optim__lr=0.004, train__steps=600)).document
    )
    assert hash_config(validate_config(DOCUMENT).document) != hash_config(
        validate_config(changed(optim__lr=0.005)).document
    )


def test_where_a_run_lives_and_prints_is_not_identity() -> None:
    elsewhere = validate_config(
        changed(name="other", root="/else", log__console=False, resume="must", preempt__signals=[])
    ).document
    assert hash_config(elsewhere) == hash_config(validate_config(DOCUMENT).document)


def test_a_document_from_before_there_were_notices_listens_to_signals_alone() -> None:
    older = validate_config(changed(preempt={"signals": ["TERM"]})).preempt
    assert (older.signals, older.notices) == (["TERM"], {})
    now = validate_config(changed(preempt={"notices": {"spot": {"kind": "aws", "poll_seconds": 1}}}))
    assert validate_config(now.document) == now
    assert hash_config(now.document) == hash_config(validate_config(DOCUMENT).document)


def test_a_document_comes_back_from_its_file_and_newer_keys_get_their_defaults(tmp_path: Path) -> None:
    document, path = validate_config(changed(optim__lr=1e-5, optim__clip_norm=None)).document, tmp_path / "config.yaml"
    path.write_text(dump_yaml(document))
    assert read_document(path) == document
    older = yaml.safe_load(path.read_text())
    del older["train"]["eval_batches"]
    path.write_text(dump_yaml(older))
    assert read_document(path) == document


@pytest.mark.parametrize(
    "planted",
    [
        "planted: !!python/object/apply:os.system ['touch PLANTED']",
        "[1",
        "7",
    ],
)
def test_reading_a_configuration_runs_nothing_from_it(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(dump_yaml(validate_config(DOCUMENT).document) + planted)
    with pytest.raises(RefusedError, match="not a configuration of this version"):
        read_document(Path("config.yaml"))
    assert not Path("PLANTED").exists()


def test_an_interpolation_in_a_run_is_text_and_its_data_need_not_be_there(tmp_path: Path) -> None:
    document = {**validate_config(DOCUMENT).document, "data": {"kind": "text", "path": "${oc.env:HOME}"}}
    (tmp_path / "config.yaml").write_text(dump_yaml(document))
    assert read_document(tmp_path / "config.yaml")["data"]["path"] == "${oc.env:HOME}"


def test_continuing_changes_what_was_typed_and_nothing_else() -> None:
    saved = validate_config(changed(seed=7, optim__lr=0.1)).document
    composed = OmegaConf.create(changed(optim__lr=0.004, train__steps=9, ckpt__save={"best": {"kind": "best"}}))
    now = merge_typed_keys(saved, composed, ["optim.lr", "train.steps", "ckpt.save.periodic"])
    assert now["optim"]["lr"] == 0.004  # typed, though it is the default
    assert now["train"]["steps"] == 9
    assert now["seed"] == 7
    assert list(now["ckpt"]["save"]) == ["best"]  # ~ckpt.save.periodic
    assert saved["optim"]["lr"] == 0.1


def test_drift_is_classed_by_key() -> None:
    old = validate_config(DOCUMENT).document
    new = validate_config(changed(train__steps=700, optim__lr=1e-3, seed=1, ckpt__write="blocking", name="x")).document
    assert {change.key: change.kind for change in find_drift(old, new)} == {
        "train.steps": "resumable",
        "optim.lr": "resumable",
        "seed": "identity",
        "ckpt.write": "free",
    }
    assert hash_identity(old) != hash_identity(new)
    assert hash_identity(old) == hash_identity(validate_config(changed(train__steps=700)).document)
    assert classify_key("optim.kind") == classify_key("model.width") == classify_key("a.key.of.tomorrow") == "identity"


def test_a_removed_rule_is_a_drift_too() -> None:
    new = copy.deepcopy(DOCUMENT)
    del new["ckpt"]["save"]["best"]
    keys = {change.key for change in find_drift(validate_config(DOCUMENT).document, validate_config(new).document)}
    assert "ckpt.save.best.kind" in keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "default"),
        (["remat=full", "ckpt=combined"], "ckpt_combined-remat_full"),
        (["ckpt=combined", "remat=full"], "ckpt_combined-remat_full"),
        (["root=/x", "log=wandb", "name=a"], "default"),
        (["data.path=../../../etc/passwd"], "path_.._.._.._etc_passwd"),
        (["+ckpt.save.x={kind: steps, steps: 3}"], "x_kind_steps_steps_3"),
        (["a=" + "b" * 300], "a_" + "b" * 58),
    ],
)
def test_the_readable_part_is_a_safe_file_name(overrides: list[str], expected: str) -> None:
    name = slug_from_overrides(overrides, ("root", "log", "name"))
    assert name == expected
    assert "/" not in name
    assert len(name) <= 60
