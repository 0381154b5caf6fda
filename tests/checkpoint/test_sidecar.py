"""A sidecar whose checksum is right is what somebody wrote, and not yet what we write: every value is looked at."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from runner.__main__ import main as verbs
from runner.checkpoint.record import (
    FORMAT,
    SIDECAR,
    NewerFormatError,
    Record,
    Sidecar,
    encode_sidecar,
    is_step_name,
    list_records,
    list_steps,
    locate_checkpoint,
    newest_durable_step,
    read_progress,
    read_saved_position,
    read_sidecar,
)
from runner.checkpoint.seal import WrittenArrays, find_problem, seal_checkpoint
from runner.checkpoint.trouble import find_errno, may_pass, short_reason
from runner.errors import RefusedError, StorageError
from runner.log.sinks import LogDigest

DIGEST = "0" * 32
DEEP = "[" * 100_000 + "]" * 100_000
# For any value of any sidecar.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 1.5, 10**18, 10**19, 10**400, -(10**400), float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "1",
        "../x",
        "/etc/passwd",
        "\0",
        "é" * 300,
        [],
        [1],
        ["a", {}],
        {},
        {"a": 1},
        {"bytes": "x"},
        {"": None},
    ),
)


def sealed(directory: Path, **changes: Any) -> Path:
    """A directory with one file, and a sidecar whose checksum is right whatever is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data").write_text("x")
    seal_checkpoint(directory, Record(int(directory.name), "test", {"eval/loss": 0.5}, 1.5), WrittenArrays({}))
    document = {**json.loads((directory / SIDECAR).read_bytes()), **changes}
    del document["xxh3"]
    write_sidecar(directory, json.dumps({k: v for k, v in document.items() if v != "absent"}, indent=1))
    return directory


def write_sidecar(directory: Path, text: str) -> None:
    body = text.encode().removesuffix(b"\n}")
    end = b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_128(body).hexdigest().encode()
    (directory / SIDECAR).write_bytes(body + end)


def test_what_we_write_is_read(tmp_path: Path) -> None:
    record = Record(3, "because", {"a": float("nan")}, 1.5, mark="error", log=LogDigest(7, DIGEST))
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / SIDECAR).write_bytes(encode_sidecar(Sidecar(record, {}, {"w": "float32[2]"})))
    found = read_sidecar(tmp_path / "3")
    assert (found.record.log, found.record.mark, found.arrays) == (LogDigest(7, DIGEST), "error", {"w": "float32[2]"})
    # A key that a later version adds keeps nobody from reading it.
    assert read_sidecar(sealed(tmp_path / "4", later={"any": 1})).record.step == 4


FIELDS = (
    "step",
    "reason",
    "metrics",
    "saved_unix_seconds",
    "mark",
    "stall_seconds",
    "write_seconds",
    "format",
    "files",
)


@pytest.mark.parametrize("field", [*FIELDS, "arrays", "log"])
def test_no_value_of_any_kind_in_any_field_is_more_than_a_problem(tmp_path: Path, field: str) -> None:
    """It is read, or a ValueError says which field is wrong: no verb and no start meets another error."""
    refused = 0
    for value in (*STRANGE, "absent"):
        directory = sealed(tmp_path / "3", **{field: value})
        try:
            record = read_sidecar(directory).record
        except (ValueError, NewerFormatError):
            refused += 1
            continue
        # What is believed can be used.
        assert record.num_bytes >= 0
        assert str(record.step) == "3"
        assert 0 <= record.saved_unix_seconds < 1e12
        assert all(float(number) is not None for number in record.metrics.values())
    assert refused >= (9 if field == "reason" else 15)


def test_names_of_files_and_facts_about_them_are_looked_at(tmp_path: Path) -> None:
    good = {"bytes": 1, "xxh3": DIGEST}
    for name in ("/etc/passwd", "../3/data", "a/../../x", "..", "", "a\0b", "/"):
        with pytest.raises(ValueError, match="files is not what"):
            read_sidecar(sealed(tmp_path / "3", files={name: good}))
    for facts in ({}, {"bytes": -1}, {"bytes": True}, {"bytes": 1, "xxh3": "0"}, {"bytes": 1, "xxh3": None}, [], 1):
        with pytest.raises(ValueError, match="files is not what"):
            read_sidecar(sealed(tmp_path / "3", files={"data": facts}))
    for log in ({"bytes": 1}, {"xxh3": DIGEST}, {"bytes": 1, "xxh3": DIGEST.upper() + "G"}):
        with pytest.raises(ValueError, match="log is not what"):
            read_sidecar(sealed(tmp_path / "3", log=log))


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "1", DEEP, "{", '{"format": 3', "\ufeff{}", "NaN", "9" * 5000])
def test_no_document_of_any_kind_is_more_than_a_problem(tmp_path: Path, text: str) -> None:
    directory = sealed(tmp_path / "3")
    write_sidecar(directory, text)
    with pytest.raises(ValueError, match="."):
        read_sidecar(directory)
    assert str(find_problem(directory)).startswith("holdfast.json cannot be believed")


# --- formats ---


def test_a_later_format_is_refused_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    sealed(checkpoints / "3")
    newer = sealed(checkpoints / "4", format=FORMAT + 1, files="not a table in that format")
    for look in (read_sidecar, find_problem):
        with pytest.raises(
            NewerFormatError, match=f"in format {FORMAT + 1}, and this one reads formats up to {FORMAT}"
        ):
            look(newer)
    # What is not read is never judged, so retention leaves it alone; nor does it pass for a step that is not there.
    assert [record.step for record in list_records(checkpoints)] == [3]
    for reference in (f"{tmp_path}/run", f"{tmp_path}/run@newest"):
        with pytest.raises(NewerFormatError):
            locate_checkpoint(reference)
    assert locate_checkpoint(f"{tmp_path}/run@3") == checkpoints / "3"
    assert verbs(["verify", f"{tmp_path}/run", "--all"]) == 3
    out = capsys.readouterr()
    assert "not good" in out.out
    assert "later version" in out.out
    assert "Traceback" not in out.out + out.err


def test_a_later_format_that_is_not_what_was_written_is_damage(tmp_path: Path) -> None:
    directory = sealed(tmp_path / "3", format=FORMAT + 1)
    (directory / SIDECAR).write_bytes((directory / SIDECAR).read_bytes().replace(b'"step": 3', b'"step": 2'))
    assert find_problem(directory) == "holdfast.json cannot be believed (holdfast.json is not what was written)"


# --- what else may lie in `checkpoints/` ---


def test_any_content_of_the_folder_is_survived(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    for name in (
        "0",
        "9" * 18,
        "9" * 19,
        "1" * 255,
        "007",
        "1e400",
        "-1",
        "+1",
        "1 ",
        "1\n",
        "٣",
        "½",
        "²",
        "🎉",
        "%31",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "2").write_text("a file")
    (tmp_path / "3").symlink_to("1")
    (tmp_path / "4").symlink_to("4")
    os.mkfifo(tmp_path / "5")
    assert list_steps(tmp_path) == [0, 1, int("9" * 18)]
    assert list_records(tmp_path) == []
    assert newest_durable_step(tmp_path) == 0
    assert list_steps(tmp_path / "not there") == []
    with pytest.raises(StorageError, match=r"2: cannot be listed \(Not a directory\)"):
        list_steps(tmp_path / "2")


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="cannot be listed") as caught:
        newest_durable_step(tmp_path)
    assert may_pass(caught.value)


def test_a_number_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    assert not is_step_name("9" * 5000)
    sealed(tmp_path / "run/checkpoints/3")
    for reference in (f"{tmp_path}/run@{'9' * 5000}", f"{tmp_path}/{'x' * 5000}", "~nobody-of-this-name/run", "a\0b"):
        with pytest.raises(RefusedError):
            locate_checkpoint(reference)


# --- progress ---


def progress_of(directory: Path, content: bytes) -> Path:
    (directory / "progress").mkdir(parents=True, exist_ok=True)
    (directory / "progress/metadata").write_bytes(content)
    return directory


GOOD = {"position": {"next_index": 3}, "data": "d", "best": {"metric": "m", "value": 0.5, "step": 1}}


def test_where_training_is_comes_back(tmp_path: Path) -> None:
    found = read_saved_position(progress_of(tmp_path / "3", json.dumps({**GOOD, "owes_evaluation": True}).encode()))
    assert (found.position, found.data, found.owes_evaluation) == ({"next_index": 3}, "d", True)
    assert read_saved_position(progress_of(tmp_path / "3", json.dumps({**GOOD, "best": None}).encode())).best is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b"null", DEEP.encode(), b'{"position": {}}', b"9" * 5000]
)
def test_bytes_of_any_kind_are_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        read_saved_position(progress_of(tmp_path / "3", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "position", [{}, {"next_index": "/etc/passwd"}, {"next_index": 1e19}, {"next_index": -1}, {"next_index": 1 << 60}]
)
def test_a_position_that_no_run_reaches_is_one_line(tmp_path: Path, position: dict[str, Any]) -> None:
    """It was a traceback once the first batch was asked for."""
    with pytest.raises(RefusedError, match="its progress has no position that this version can go on from"):
        read_saved_position(progress_of(tmp_path / "3", json.dumps({**GOOD, "position": position}).encode()))


def test_values_of_any_kind_are_one_line(tmp_path: Path) -> None:
    for field in ("position", "data", "best", "owes_evaluation"):
        for value in STRANGE:
            directory = progress_of(tmp_path / "3", json.dumps({**GOOD, field: value}).encode())
            with suppress(RefusedError):
                read_saved_position(directory)
    with pytest.raises(RefusedError, match="has no data"):
        read_saved_position(progress_of(tmp_path / "3", b'{"position": {}, "best": null}'))


@pytest.mark.parametrize("seed", range(30))
def test_mutations_of_any_kind_are_a_problem_and_never_an_error(tmp_path: Path, seed: int) -> None:
    """With a right checksum over whatever they have become: what a person who edits it, or an enemy, would do."""
    rng = random.Random(seed)
    directory = sealed(tmp_path / "run/checkpoints/3")
    text = (directory / SIDECAR).read_text().rpartition(',\n "xxh3"')[0]
    for _ in range(20):
        at, count = rng.randrange(len(text)), rng.randrange(1, 9)
        new = rng.choice(
            ["", "9" * 400, "null", "{}", "[", '"', "\\", ",", "-", "NaN", "\0", "é", text[at : at + count] * 2]
        )
        write_sidecar(directory, text[:at] + new + text[at + count :] + "\n}")
        try:
            read_sidecar(directory)
        except (ValueError, NewerFormatError):
            assert list_records(directory.parent) == []
    shutil.rmtree(tmp_path / "run")


# --- trouble ---


def test_the_number_is_found_however_it_is_wrapped() -> None:
    text = (
        "RESOURCE_EXHAUSTED: Failed to open: \"/x/d/1.__lock\": Too many open files [os_error_code='24'] [source l:1]"
    )
    outer = StorageError("x")
    outer.__cause__ = ValueError(text)
    assert (find_errno(outer), may_pass(outer)) == (errno.EMFILE, True)
    assert short_reason(ValueError(text)) == "Too many open files"
    assert may_pass(MemoryError())
    assert may_pass(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 16 bytes."))
    assert may_pass(RuntimeError("can't start new thread"))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENFILE):
        assert may_pass(OSError(number, "x"))
    for number in (
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.EFBIG,
        errno.ELOOP,
    ):
        assert not may_pass(OSError(number, "x"))
    assert not may_pass(TypeError("Unsupported type: <class 'object'>"))
    assert find_errno(OSError("no number")) is None


def test_progress_is_an_object(tmp_path: Path) -> None:
    assert read_progress(progress_of(tmp_path / "3", b'{"next": 1}')) == {"next": 1}
    with pytest.raises(OSError, match="No such file"):
        read_progress(tmp_path / "4")
