"""YAML of somebody else's: data, of a bounded size, or one line that says what it is instead."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import yaml

from runner.config import read_yaml
from runner.config.read_yaml import MAX_DEPTH, MAX_VALUES, check_yaml, decode_text, parse_yaml, read_bounded_text
from runner.config.schema import dump_yaml, read_document, validate_config
from runner.errors import RefusedError, StorageError
from tests.config.test_config import DOCUMENT

LEAVES = ", ".join("x" * 9)
BOMB = f"a0: &a0 [{LEAVES}]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(30))
HOSTILE = {
    "bomb": (BOMB, "line 5: becomes more than 10,000 values"),
    "merges": (MERGES, "becomes more than 10,000 values"),
    "itself": ("a: &a [*a]", "line 1: *a stands for itself"),
    "around": ("a: &a {b: {c: *a}}", "line 1: *a stands for itself"),
    "brackets": ("[" * 20_000, "line 1: is nested deeper than 50 levels"),
    "braces": ("{a: " * 20_000, "line 1: is nested deeper than 50 levels"),
    "indents": ("".join(f"{' ' * n}a:\n" for n in range(1000)), "line 51: is nested deeper than 50 levels"),
    "dashes": ("- " * 2000, "is nested deeper than 50 levels"),
    "many": ("[" + "x," * 200_000 + "]", "becomes more than 10,000 values"),
    "anchors": ("".join(f"a{n}: &a{n} x\n" for n in range(9000)), "becomes more than 10,000 values"),
    "digits": (f"a: {'9' * 5000}", "line 1: has a number of 5,000 digits"),
    "hex": (f"a: 0x{'f' * 5000}", "line 1: has a number of 5,002 digits"),
    "sexagesimal": (f"a: {'1:' * 5000}1", "line 1: has a number of 10,001 digits"),
    "python": ("!!python/object/apply:os.system [touch SPRUNG]", "is no tag of plain data"),
    "own tag": ("a: !evil x", "line 1: !evil is no tag of plain data"),
    "bytes": ("a: !!binary ZQ==", "is no tag of plain data"),
    "no int": ("a: !!int five", "a value is not what its tag says"),
    "no bool": ("a: !!bool 7", "a value is not what its tag says"),
    "twice": ("a: 1\na: 2", "line 2: found duplicate key a; it cannot be read as YAML"),
    "nul": ("a: \0", "it cannot be read as YAML"),
    "tab": ("a:\n\t- b", "it cannot be read as YAML"),
    "two": ("a: 1\n---\nb: 2", "line 2: "),
    "nothing of that name": ("a: *b", "line 1: found undefined alias"),
    "list as key": ("? [1]\n: 2", "line 1: found unhashable key"),
    "cut": ("a: [1", "it cannot be read as YAML"),
}


@pytest.mark.parametrize("loader", [yaml.SafeLoader, yaml.CSafeLoader])
@pytest.mark.parametrize("name", list(HOSTILE))
def test_it_is_refused_in_one_line(name: str, loader: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where PyYAML comes without libyaml: 20,000 brackets take its own parser a quarter of a second."""
    monkeypatch.setattr(read_yaml, "PARSER", loader)
    text, says = HOSTILE[name]
    with pytest.raises(ValueError, match=".") as raised:
        parse_yaml(text)
    said = str(raised.value)
    # Its own words for what is no YAML differ from those of libyaml.
    assert says in said or (loader is yaml.SafeLoader and "it cannot be read as YAML" in said), said
    assert "\n" not in said
    assert len(said) < 200


def test_a_bomb_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="becomes more than"):
        parse_yaml(BOMB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_what_a_configuration_has_is_read_as_it_was_written() -> None:
    document = validate_config(DOCUMENT).document
    assert parse_yaml(dump_yaml(document)) == document
    values = {"a": {"text": "2001-02-31", "n": -7, "x": 1e-05, "no": None, "yes": True, "ü": ["", "'", "😀", "\x1b"]}}
    assert parse_yaml(dump_yaml(values)) == values
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: &y {k: 1}\nd: {<<: *y, l: 2}") == {
        **{"a": [1, 2], "b": [1, 2], "c": {"k": 1}, "d": {"k": 1, "l": 2}}
    }
    # A date is the text that stands there, as Hydra reads it.
    assert parse_yaml("a: 2001-02-28") == {"a": "2001-02-28"}
    assert parse_yaml("\n") is None


def test_the_limits_are_no_nearer_than_they_say() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_yaml(deep) is not None
    check_yaml("[" + ", ".join("x" * (MAX_VALUES - 1)) + "]")


def test_a_file_is_read_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_bounded_text(path) == "a: 1"
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ValueError, match=r"is larger than 1,048,576 bytes"):
        read_bounded_text(path)
    with pytest.raises(ValueError, match="is no file"):
        read_bounded_text(Path("/dev/zero"))
    with pytest.raises(ValueError, match=r"is not written in UTF-8 \(byte 3\)"):
        decode_text(b"a: \xff")


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_run_with_such_a_configuration_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(HOSTILE[name][0])
    with pytest.raises(RefusedError, match="not a configuration of this version") as raised:
        read_document(tmp_path / "config.yaml")
    assert "\n" not in str(raised.value)


def test_what_the_machine_cannot_read_is_not_the_documents_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").symlink_to("/etc/hostname")
    with pytest.raises(RefusedError):
        read_document(tmp_path / "config.yaml")

    def fail(path: Path, limit: int = 0) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("runner.config.schema.read_file", fail)
    with pytest.raises(StorageError, match="Input/output error; run the same command again"):
        read_document(tmp_path / "config.yaml")
