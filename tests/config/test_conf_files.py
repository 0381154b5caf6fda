"""Each YAML of conf/ is one named choice: short, and its first line says when to choose it."""

from __future__ import annotations

from tests.conftest import REPO

MAX_LINES = 20


def test_configuration_files_are_short_and_say_when_to_choose_them() -> None:
    paths = sorted((REPO / "conf").rglob("*.yaml"))
    assert len(paths) > 90
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), path
        assert path.name == "config.yaml" or len(lines) <= MAX_LINES, path
        # A merge key hides which keys a choice has.
        assert not [line for line in lines if line.lstrip().startswith("<<")], path


def test_no_module_is_a_drawer_for_what_has_no_room() -> None:
    forbidden = {"utils", "common", "helpers", "misc", "manager", "base"}
    files = [path for folder in ("runner", "models", "data") for path in (REPO / folder).rglob("*.py")]
    assert not [path for path in files if path.stem in forbidden]
