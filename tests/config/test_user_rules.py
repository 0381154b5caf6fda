"""Rules and loggers of the user's own in a configuration: found, checked, trusted, and imported by who trains alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.config.code_origins import find_origins
from runner.config.identity import classify_key, find_drift, hash_config
from runner.config.schema import dump_yaml, validate_config
from runner.config.trust import require_trust
from runner.config.user_code import check_targets_exist, find_targets, import_targets
from runner.errors import ConfigError, RefusedError
from runner.inspect.lookup import read_retention_settings
from runner.launch.compose import compose, compose_run
from runner.launch.sweep_members import is_finished
from runner.rundir.layout import RunDir
from tests.config.test_config import DOCUMENT, changed

RULES = """open("imported", "w")
def when(info, history, every=1): return False
def keep(records): return []
def enough(history, least=1): return None
class Sink:
    def __init__(self, size=1): pass
    def log(self, step, split, metrics): pass
"""
PLACES = {"ckpt.save": "when", "retention": "keep", "stop.rules": "enough", "log.sinks": "Sink"}


def with_rule(place: str, target: str, **options: Any) -> dict[str, Any]:
    rule = {"mine": {"kind": "external", "target": target, "options": options}}
    document = validate_config(DOCUMENT).document
    before = document["retention"] if place == "retention" else document[place.partition(".")[0]]
    if place != "retention":
        before = before[place.partition(".")[2]]
    return changed(**{place.replace(".", "__"): {**before, **rule}})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path


@pytest.mark.parametrize("place", list(PLACES))
def test_it_is_found_and_imported_by_who_trains_alone(place: str, here: Path) -> None:
    target = f"{here}/rules.py:{PLACES[place]}"
    config = validate_config(with_rule(place, target))
    assert find_targets(config.document) == {f"{place}.mine.target": target}
    check_targets_exist(config.document)
    assert [(origin.key, origin.file) for origin in find_origins(config.document)] == [
        (f"{place}.mine.target", here / "rules.py")
    ]
    # As a verb does that looks at a model.
    import_targets(config)
    assert not (here / "imported").exists()
    import_targets(config, for_training=True)
    assert (here / "imported").exists()


@pytest.mark.parametrize("place", list(PLACES))
def test_who_looks_at_a_run_needs_none_of_its_files(place: str) -> None:
    """Also `train.steps=0`, which evaluates."""
    word = f"+{place}.mine={{kind: external, target: gone.py:rule}}"
    with pytest.raises(ConfigError, match=f"^{place}.mine.target: gone.py:rule: there is no file"):
        compose([word])
    (Path("run") / "checkpoints").mkdir(parents=True)
    document = compose_run([word]).config.document
    Path("run/config.yaml").write_text(dump_yaml(document))
    assert compose(["dir=run", "train.steps=0"]) is not None
    with pytest.raises(ConfigError, match=f"^{place}.mine.target: gone.py:rule: there is no file"):
        compose(["dir=run", "--trust"])


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize(
    ("file", "name", "options", "line"),
    [
        ("none.py", "when", {}, "{place}.mine.target: {target}: there is no file {file}"),
        ("rules.py", "gone", {}, "{place}.mine.target: {target}: {file} has no 'gone'"),
        ("rules.py", "", {"evry": 2}, "{place}.mine.options.evry: {target} has no such option"),
        ("rules.py", "print", {}, "{place}.mine.target: {target}"),
    ],
)
def test_what_cannot_be_called_is_refused_in_a_line(
    place: str, file: str, name: str, options: dict[str, Any], line: str, here: Path
) -> None:
    target = f"{here}/{file}:{name or PLACES[place]}"
    config = validate_config(with_rule(place, target, **options))
    with pytest.raises(ConfigError) as raised:
        import_targets(config, for_training=True)
    assert str(raised.value).startswith(line.format(place=place, target=target, file=file))
    assert "\n" not in str(raised.value)


def test_a_function_that_takes_other_arguments_is_refused(here: Path) -> None:
    config = validate_config(with_rule("ckpt.save", f"{here}/rules.py:keep"))
    with pytest.raises(
        ConfigError, match=r"keep\(records\) cannot be called as \(info, history\): too many positional"
    ):
        import_targets(config, for_training=True)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_run_that_brings_one_needs_trust_to_be_gone_on_with_and_not_to_be_looked_at(place: str, here: Path) -> None:
    config = validate_config(with_rule(place, f"rules:{PLACES[place]}"))
    asks = rf"asks for code of its own: {place}.mine.target=rules:{PLACES[place]}; if you trust it add --trust"
    with pytest.raises(RefusedError, match=asks):
        require_trust(here, config, {}, "add --trust")
    require_trust(here, config, {}, "add --trust", ("code", "data"))
    run = here / "foreign"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(config.document))
    with pytest.raises(RefusedError, match=asks):
        compose(["dir=foreign", "train.steps=9"])
    # What lists and deletes checkpoints imports nothing of it, nor does who asks whether a run is finished.
    read_retention_settings(RunDir(run))
    is_finished(config, RunDir(run), {"state": "finished", "step": 3, "stopped_early": True})
    assert not (here / "imported").exists()


def test_what_is_in_the_hash() -> None:
    """A rule as what it is a rule of; a logger, as all logs, is not; where there is none, a run has its old hash."""
    plain = validate_config(DOCUMENT).document
    for place, name in PLACES.items():
        document = validate_config(with_rule(place, f"rules:{name}")).document
        assert (hash_config(document) == hash_config(plain)) == (place == "log.sinks")
    document = validate_config(with_rule("stop.rules", "rules:enough", least=2)).document
    assert classify_key("stop.rules.mine.options.least") == "resumable"
    keys = {drift.key for drift in find_drift(plain, document)}
    assert {"stop.rules.mine.target", "stop.rules.mine.options.least"} <= keys
    # An early end by a metric alone is what it was before there were rules.
    metric = validate_config(changed(stop={"metric": "eval/loss"})).document
    older = {**metric, "stop": {key: value for key, value in metric["stop"].items() if key != "rules"}}
    assert hash_config(older) == hash_config(metric) != hash_config(plain)
    assert find_drift(older, metric) == []


def test_a_rule_of_stopping_says_what_it_is() -> None:
    assert validate_config(changed(stop={"rules": {"mine": {"target": "a:b"}}})).document["stop"]["rules"] == {
        "mine": {"kind": "external", "target": "a:b", "options": {}}
    }
    with pytest.raises(ConfigError, match=r"stop.rules.mine.opts: unknown key; did you mean options"):
        validate_config(changed(stop={"rules": {"mine": {"target": "a:b", "opts": {}}}}))
