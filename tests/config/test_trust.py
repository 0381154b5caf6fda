"""What the document of a run may decide: every option that takes text is in one table or the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from runner.config.schema import Config, RemoteByKind, dump_yaml, validate_config
from runner.config.trust import (
    KEYS_OF_THE_COMMAND,
    MAY_BE_NAMED,
    NEEDS_TRUST,
    require_trust,
    trust_flag,
)
from runner.config.validation import _find_dataclasses
from runner.errors import RefusedError
from runner.hosts.options import AutoHosts
from runner.launch.compose import compose, compose_run
from tests.config.test_config import changed


def takes_text(annotation: Any) -> bool:
    """Whether a value may be text of one's own; options in options are looked at for themselves."""
    if get_origin(annotation) is Literal or is_dataclass(annotation):
        return False
    if get_args(annotation):
        # The names that rules have in a mapping are labels.
        values = get_args(annotation)[1:] if get_origin(annotation) in (dict, Mapping) else get_args(annotation)
        return any(map(takes_text, values))
    return annotation in (str, Any, Path, bytes, object)


def options() -> Iterator[tuple[str, Any]]:
    for option in dict.fromkeys(_find_dataclasses(Config)):
        # What a policy says to a model is made by us, and typed by nobody.
        if option.__name__ != "RematPlan":
            yield from ((f"{option.__name__}.{field.name}", hint) for field, hint in hinted(option))


def hinted(option: Any) -> Iterator[tuple[Any, Any]]:
    hints = get_type_hints(option)
    return ((field, hints[field.name]) for field in fields(option))


def test_every_option_that_takes_text_is_classed() -> None:
    """An option of tomorrow whose author has not asked himself the question fails here."""
    command = {f"Config.{key}" for key in KEYS_OF_THE_COMMAND}
    known = {*NEEDS_TRUST, *MAY_BE_NAMED, *command}
    assert not [name for name, hint in options() if takes_text(hint) and name not in known]
    # No name in the tables that is none any more, and none that is in two.
    assert known <= {name for name, _ in options()}
    assert len(known) == len(NEEDS_TRUST) + len(MAY_BE_NAMED) + len(command)


def test_what_logs_elsewhere_or_listens_is_classed() -> None:
    """A sink that is no text says that measurements are sent, and a target that code is imported."""
    from runner.log.options import LogOptions

    sinks = {
        f"LogOptions.{field.name}" for field, hint in hinted(LogOptions) if is_dataclass((*get_args(hint), hint)[0])
    }
    assert sinks <= NEEDS_TRUST.keys()
    reaches_out = {name for name, _ in options() if name.endswith((".url", ".target", ".host"))}
    # Where a run lives as well is said by the command alone.
    assert reaches_out - {"RemoteByKind.url"} <= NEEDS_TRUST.keys()
    assert "remote" in KEYS_OF_THE_COMMAND


REACHES = {
    "notice": ({"preempt__notices": {"x": {"kind": "gce", "url": "http://evil:80"}}}, "preempt.notices.x.url=http://evil:80"),
    "detected": ({"preempt__notices": {"x": {"kind": "auto", "url": "http://evil"}}}, "preempt.notices.x.url=http://evil"),
    "firmware": ({"preempt__notices": {"x": {"kind": "auto", "dmi": "/tmp"}}}, "preempt.notices.x.dmi=/tmp"),
    "wandb": ({"log__wandb": {"project": "theirs"}}, "log.wandb={project: theirs, mode: auto}"),
    "wandb of that name": ({"log__wandb": {}}, "log.wandb={project: holdfast, mode: auto}"),
    "hub": ({"data": {"kind": "hub", "path": "evil/set", "gives": "tokens"}}, "data.path=evil/set"),
}  # fmt: skip
HARMLESS = (
    {},
    {"preempt__notices": {"x": {"kind": "gce"}, "y": {"kind": "auto"}, "z": {"kind": "slurm"}}},
    {"data": {"kind": "text", "path": "/etc"}, "init_from": {"run": "other"}, "name": "mine", "root": "/elsewhere"},
)


def write_run(folder: Path, **changes: Any) -> Path:
    """The directory of a run that somebody else has made."""
    run = folder / "foreign"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(validate_config(changed(**changes)).document))
    return run


@pytest.mark.parametrize("name", list(REACHES))
def test_a_document_connects_to_nothing_of_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, key = REACHES[name]
    write_run(tmp_path, **changes)
    says = f"foreign says where to connect to: {key}; type that yourself, or, if you trust the run, add --trust"
    for words in (["dir=foreign", "train.steps=9"], ["-m", "dir=foreign", "train.steps=9,10"]):
        with pytest.raises(RefusedError) as raised:
            compose(words)
        assert says in str(raised.value)
    request: Any = compose(["dir=foreign", "train.steps=9", "--trust"])
    assert trust_flag(request.config) == " --trust"


@pytest.mark.parametrize("changes", HARMLESS)
def test_a_document_without_any_needs_no_trust(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, **changes)
    request: Any = compose(["dir=foreign", "train.steps=9"])
    assert trust_flag(request.config) == ""


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("wandb of that name", ("log=wandb",)),
        ("wandb", ("log=wandb", "log.wandb.project=theirs")),
        ("wandb", ("log=default",)),
        ("wandb", ("log.wandb=null",)),
        ("notice", ("preempt.notices.x.url=http://evil:80",)),
        ("notice", ("preempt=none",)),
        ("hub", ("data=stdlib",)),
        ("hub", ("data=hub", "data.path=evil/set", "data.gives=tokens")),
    ],
)
def test_what_is_typed_is_trusted(
    name: str, typed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, **REACHES[name][0])
    compose(["dir=foreign", "train.steps=9", *typed])


def test_what_is_typed_counts_for_its_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, **REACHES["wandb"][0], **REACHES["notice"][0])
    with pytest.raises(RefusedError, match=r"connect to: preempt.notices.x.url=http://evil:80;"):
        compose(["dir=foreign", "log=wandb", "log.wandb.project=theirs"])
    # What was typed says whether, and the document where to.
    with pytest.raises(RefusedError, match=r"connect to: log.wandb={project: theirs, mode: online};"):
        compose(["dir=foreign", "log.wandb.mode=online", "preempt=none"])


def test_who_only_looks_is_told_nothing_of_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation neither logs elsewhere nor listens for a notice; its data is read."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, **REACHES["wandb"][0], **REACHES["notice"][0])
    compose_run([f"dir={run}"])
    compose(["dir=foreign", "train.steps=0"])
    document = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**document, **changed(**REACHES["hub"][0])}))
    with pytest.raises(RefusedError, match=r"foreign says where to connect to: data.path=evil/set;"):
        compose_run([f"dir={run}"])


def test_loading_asks_only_for_what_it_reads(tmp_path: Path) -> None:
    config = validate_config(changed(**REACHES["hub"][0], **REACHES["wandb"][0]))
    require_trust(tmp_path, config, {}, "say trust=True", ("code",))
    with pytest.raises(
        RefusedError, match=r"data.path=evil/set; type that yourself, or, if you trust the run, say trust"
    ):
        require_trust(tmp_path, config, {}, "say trust=True", ("code", "data"))


def test_what_one_command_is_to_do_is_never_the_documents_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun with resume=never overwrite=true was set aside when it was continued."""
    monkeypatch.chdir(tmp_path)
    theirs = {"resume": "never", "overwrite": True, "step": 3, "dir": "/other", "compile_cache": "/cache", "root": "/r"}
    theirs["remote"] = {"url": "s3://theirs/runs", "endpoint": "https://theirs"}
    write_run(tmp_path, **theirs, hosts={"kind": "env", "address": "elsewhere", "count": 2, "index": 1})
    for words in (["dir=foreign"], ["dir=foreign", "--trust"]):
        config = compose(words).config  # type: ignore[union-attr]
        said = {key: getattr(config, key) for key in KEYS_OF_THE_COMMAND}
        assert said == {
            **{"dir": "foreign", "root": "outputs", "step": None, "resume": "auto", "overwrite": False},
            **{"compile_cache": "auto", "hosts": AutoHosts(), "remote": RemoteByKind()},
        }


def test_the_line_is_short_and_names_no_more_than_a_person_reads(tmp_path: Path) -> None:
    notices = {f"n{number}": {"kind": "gce", "url": f"http://{'evil' * 30}/{number}"} for number in range(20)}
    config = validate_config(changed(preempt__notices=notices, model={"kind": "external", "target": "evil:Net"}))
    with pytest.raises(RefusedError) as raised:
        require_trust(tmp_path, config, {}, "add --trust")
    said = str(raised.value)
    assert (
        "asks for code of its own (model.target=evil:Net) and says where to connect to: preempt.notices.n0.url=" in said
    )
    assert " and 17 more; " in said
    assert len(said) < 600
