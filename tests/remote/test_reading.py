"""Runs in a bucket as verbs read them, and where each checkpoint lies: what is said, and what is never read or written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.__main__ import main
from runner.checkpoint import record, seal
from runner.errors import RefusedError
from runner.inspect.load_model import load_model
from runner.remote import reading
from runner.remote.local_note import read_note, write_note
from runner.rundir.layout import RunDir
from runner.rundir.readme import render_readme
from runner.rundir.run_lock import lock_run
from tests.conftest import REPO, Door
from tests.laws.faults import Forks

WORDS = (
    *("model=mlp", "model.width=16", "data=digits", "optim.lr=0.02", "retention=all", "train.eval_steps=10"),
    *("ckpt.save.periodic.steps=10", "log.tensorboard=false"),
)
Asked = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Kept:
    """A finished run of 30 steps, on a disk and in a bucket that is a folder."""

    path: Path
    bucket: Path
    said: str = ""

    @property
    def there(self) -> Path:
        return self.bucket / "default" / self.path.name

    @property
    def url(self) -> str:
        return f"file://{self.there}"


@pytest.fixture(scope="session")
def made(make_door: Callable[..., Door], served: Forks) -> Kept:
    door = make_door("bucket", served)
    bucket = door.cwd / "bucket"
    begun = door.run(*WORDS, "train.steps=20", f"remote=file://{bucket}")
    assert begun.returncode == 0, begun.stderr
    done = door.run(f"dir={door.the_run}", "train.steps=30", f"remote=file://{bucket}")
    assert done.returncode == 0, done.stderr
    return Kept(door.the_run, bucket, done.stdout)


@pytest.fixture
def copy(made: Kept, tmp_path: Path) -> Kept:
    """What a test may change: both places."""
    run = shutil.copytree(made.path, tmp_path / "outputs" / "default" / made.path.name, symlinks=True)
    return Kept(Path(run), Path(shutil.copytree(made.bucket, tmp_path / "bucket")))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The exit code, stdout and stderr of a verb."""
    monkeypatch.setenv("COLUMNS", "160")

    def ask(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture(autouse=True)
def _forget_copies() -> Iterator[None]:
    yield
    for path in list(reading._RUNS):
        reading.forget_run(path)


def documents(ask: Asked, kept: Kept, *words: str) -> list[Any]:
    """What a verb says of the disk and of the bucket as data, with the one name for both; `RUN` stands for it."""
    found = []
    for name in (str(kept.path), kept.url):
        code, out, err = ask(*(word.replace("RUN", name) for word in words), "--json")
        assert not err, err
        # The other name is in what was typed for the run.
        out = out.replace(kept.url, "RUN").replace(str(kept.path), "RUN")
        found.append((code, json.loads(out, object_hook=without_places)))
    return found


def without_places(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("where", "remote")}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(checkpoint: Path) -> None:
    """Change one bit in the largest file of a checkpoint."""
    victim = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    changed = bytearray(victim.read_bytes())
    changed[len(changed) // 2] ^= 1
    victim.write_bytes(changed)


def drop_checksums(checkpoint: Path) -> None:
    """Seal a checkpoint as with ckpt.verify=off."""
    known = record.read_sidecar(checkpoint)
    (checkpoint / record.SIDECAR).unlink()
    seal.seal_checkpoint(checkpoint, known.record, checksums=False)


def test_training_tells_what_is_remote(made: Kept) -> None:
    assert "saved 20, remote 20, 10 at risk" in made.said


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "RUN"),
        ("ls", "RUN", "--verify"),
        ("show", "RUN@best"),
        ("show", "RUN"),
        ("verify", "RUN"),
        ("verify", "RUN@20"),
        ("verify", "RUN", "--all"),
        ("why", "RUN"),
        ("goodput", "RUN"),
        ("digest", "RUN@10"),
        ("diff", "RUN@10", "RUN@20"),
        ("diff", "RUN@10", "RUN@10"),
    ],
    ids=" ".join,
)
def test_a_verb_says_the_same_of_both_places(made: Kept, ask: Asked, words: tuple[str, ...]) -> None:
    before = content(made.bucket)
    here, there = documents(ask, made, *words)
    assert here == there
    assert content(made.bucket) == before


def test_no_message_names_the_folder_of_this_process(made: Kept, ask: Asked, tmp_path: Path) -> None:
    for words in (
        *(("ls", made.url), ("show", f"{made.url}@best"), ("why", made.url), ("verify", made.url, "--all")),
        *(("show", f"{made.url}@5"), ("digest", made.url), ("goodput", made.url, "--json")),
        ("report", made.url, "--to", tmp_path / "page.html", "--json"),
        ("export", f"{made.url}@best", tmp_path / "weights"),
    ):
        _, out, err = ask(*words)
        assert "/holdfast-" not in out + err, out + err
    assert all(b"/holdfast-" not in (tmp_path / name).read_bytes() for name in ("page.html", "weights/README.md"))
    assert f'href="{made.url}/"' in (tmp_path / "page.html").read_text()


def test_a_prefix_lists_its_runs_the_last_one_at_the_end(copy: Kept, ask: Asked) -> None:
    second = copy.there.parent / "another"
    shutil.copytree(copy.there, second)
    status = json.loads((second / "status.json").read_text())
    (second / "status.json").write_text(json.dumps({**status, "updated": "2999-01-01T00:00:00+00:00"}))
    # Nothing of a run, and what was put away.
    shutil.copytree(copy.there, copy.there.parent / ".overwritten" / "old")
    (copy.bucket / "note.txt").write_text("hello")
    names = [copy.url, f"file://{second}"]
    for prefix in (copy.bucket, copy.bucket.parent / "bucket/", copy.bucket / "default"):
        runs = json.loads(ask("ls", f"file://{prefix}", "--json")[1])["runs"]
        assert [run["run"] for run in runs] == names
        assert all(run["checkpoints"] == [10, 20, 30] and run["state"] == "finished" for run in runs)
    for verb in ("goodput", "report"):
        more = ("--to", copy.bucket.parent / "page.html") if verb == "report" else ()
        runs = json.loads(ask(verb, f"file://{copy.bucket}", copy.url, *more, "--json")[1])["runs"]
        assert {run["run"] for run in runs} == set(names)


def test_an_outline_has_sizes_and_no_bytes(made: Kept) -> None:
    run = reading.mirror_run(made.url)
    outlines = [path for path in (run / "checkpoints/20").rglob("*") if path.is_file() and path.name != record.SIDECAR]
    assert outlines
    for path in outlines:
        same = made.path / path.relative_to(run)
        assert (path.stat().st_size, path.stat().st_blocks, path.stat().st_mode & 0o777) == (same.stat().st_size, 0, 0)
    reading.bring_bytes(run / "checkpoints/20")
    assert content(run / "checkpoints/20") == content(made.path / "checkpoints/20")


@pytest.mark.parametrize("verb", ["show", "digest", "diff", "verify"])
def test_no_outline_is_taken_for_bytes(copy: Kept, ask: Asked, verb: str) -> None:
    """Without checksums nothing but the reader's own care tells them apart."""
    for place in (copy.path, copy.there):
        drop_checksums(place / "checkpoints/20")
    words = (verb, "RUN@20", *(["RUN@10"] if verb == "diff" else []))
    here, there = documents(ask, copy, *words)
    assert here == there
    code, out, _ = ask("diff", f"{copy.path}@20", f"{copy.url}@20")
    assert code == 0, out


def test_damage_there_is_noticed_by_whoever_reads(copy: Kept, ask: Asked) -> None:
    flip(copy.there / "checkpoints/30")
    code, out, _ = ask("verify", copy.url)
    assert code == 3
    assert "checksum differs" in out
    for words in (("digest", copy.url), ("export", copy.url, copy.bucket.parent / "weights")):
        code, _, err = ask(*words)
        assert (code, err.startswith(f"error: {copy.url}@30: is not good")) == (3, True), err
    with pytest.raises(RefusedError, match="is not good"):
        load_model(copy.url)
    # Only names and sizes are here for it, and it says so.
    code, out, _ = ask("why", copy.url)
    assert code == 0
    assert "verify reads every byte" in out
    (copy.there / "checkpoints/30/progress/metadata").write_bytes(b"")
    code, out, _ = ask("why", copy.url)
    assert (code, "not 30: " in out, "from step 20" in out) == (0, True, True)


def test_a_step_without_its_seal_is_none(copy: Kept, ask: Asked) -> None:
    (copy.there / "checkpoints/30" / record.SIDECAR).unlink()
    assert [one["step"] for one in json.loads(ask("ls", copy.url, "--json")[1])["checkpoints"]] == [10, 20]
    assert "from step 20" in ask("why", copy.url)[1]


def test_best_is_what_the_bucket_names(copy: Kept, ask: Asked) -> None:
    best = copy.there / "checkpoints/best"
    for said, named in (('{"step": 10}', 10), ('{"step": 99}', None), ('{"step": true}', None), ("[", None)):
        best.write_text(said)
        code, out, err = ask("digest", f"{copy.url}@best")
        assert (code, f"{copy.url}@{named}" in out) == ((0, True) if named else (3, False)), err


def test_what_was_set_aside_there_is_listed(copy: Kept, ask: Asked) -> None:
    aside = copy.there / "quarantine/15-1"
    aside.mkdir(parents=True)
    (aside / record.REASON).write_text("state/x is not what was written")
    assert "in quarantine: 15-1: state/x is not what was written" in ask("ls", copy.url)[1]


def test_a_run_that_somebody_has_is_held(copy: Kept, ask: Asked) -> None:
    status = json.loads((copy.there / "status.json").read_text())
    (copy.there / "status.json").write_text(json.dumps({**status, "state": "running"}))
    lock = json.loads((copy.there / "LOCK").read_text())
    for held, state in ((True, "held"), (False, "killed")):
        (copy.there / "LOCK").write_text(json.dumps({**lock, "held": held}))
        assert json.loads(ask("ls", f"file://{copy.bucket}", "--json")[1])["runs"][0]["state"] == state


@pytest.mark.parametrize("verb", ["pin", "unpin", "prune", "restore"])
def test_a_verb_that_changes_a_run_refuses_a_bucket(made: Kept, ask: Asked, verb: str) -> None:
    reference = made.url if verb == "prune" else f"{made.url}@10"
    code, out, err = ask(verb, reference)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {verb}: {reference} is in a bucket")
    assert err.count("\n") == 1


def test_load_gives_the_same_model_and_leaves_nothing(made: Kept) -> None:
    from flax import nnx

    here, there = (nnx.state(load_model(f"{name}@20")[0], nnx.Param) for name in (made.path, made.url))
    for a, b in zip(*(nnx.to_flat_state(state).leaves for state in (here, there)), strict=True):
        np.testing.assert_array_equal(a[...], b[...])
    assert not reading._RUNS
    assert not reading._ROOT


def test_init_from_a_bucket(made: Kept, make_door: Callable[..., Door], served: Forks, tmp_path: Path) -> None:
    door, words = make_door("from", served), ("model=mlp", "model.width=16", "data=digits", "log.tensorboard=false")
    done = door.run(*words, "train.steps=1", f"init_from={made.url}@best", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("holdfast-*"))
    best = os.readlink(made.path / "checkpoints/best")
    assert f"weights from {made.url}/checkpoints/{best}: " in done.stdout
    refused = door.run(*words, "train.steps=2", f"init_from={made.url}@25")
    assert (refused.returncode, "has no checkpoint '25'; it has 10, 20, 30" in refused.stderr) == (3, True)


def test_evaluations_go_to_a_folder_of_this_machine(
    made: Kept, ask: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = content(made.bucket)
    code, out, err = ask("eval", f"{made.url}@20", "--json")
    assert code == 0, err
    (results,) = tmp_path.glob("outputs/.eval/*/results.json")
    found = json.loads(out)
    assert found["run"] == made.url
    assert found["results"] == json.loads(results.read_text())["results"]
    assert content(made.bucket) == before


def run_alone(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *words],
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_left_on_this_disk(made: Kept, tmp_path: Path) -> None:
    done = run_alone("verify", made.url, TMPDIR=str(tmp_path))
    assert (done.returncode, list(tmp_path.iterdir())) == (0, []), done.stderr


def test_who_names_no_bucket_waits_for_no_client(made: Kept) -> None:
    code = "import sys; from runner.__main__ import main; main(['ls', sys.argv[1]]); print('obstore' in sys.modules)"
    for name, loads in ((str(made.path), "False"), (made.url, "True")):
        done = subprocess.run([sys.executable, "-c", code, name], cwd=REPO, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == loads


@pytest.fixture(scope="module")
def store(made: Kept) -> Iterator[str]:
    """The same run in an S3 that answers on this machine; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = shutil.which("moto_server")
    if server is None:
        pytest.skip("needs moto_server")
    process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=-3)
    try:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            with socket.socket() as knocking:
                if not knocking.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        import boto3

        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=address, **keys)
        client.create_bucket(Bucket="runs")
        for name, body in content(made.bucket).items():
            client.put_object(Bucket="runs", Key=f"team/{name}", Body=body)
        yield address
    finally:
        process.kill()
        process.wait()


def test_an_s3_store(made: Kept, store: str, ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    url = f"s3://runs/team/default/{made.path.name}"
    code, out, _ = ask("ls", "s3://runs/team")
    assert code == 0
    assert out.rstrip().endswith(url)
    here, there = (ask("digest", f"{name}@best")[1].split()[0] for name in (made.path, url))
    assert here == there
    for named, status, said in (
        ("s3://nothing/team", 2, "no such bucket"),
        ("s3://runs/nothing", 3, "no run is there"),
        ("s3://user:password@runs/team", 2, "credentials come from the environment"),
    ):
        began = time.monotonic()
        code, _, err = ask("ls", named)
        assert (code, said in err, err.count("\n")) == (status, True, 1), err
        assert "password" not in err
        assert time.monotonic() - began < 2.0
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, _, err = ask("show", f"{url}@best")
    assert (code, "cannot be reached" in err, err.count("\n")) == (5, True, 1), err


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, ask: Asked) -> None:
    assert ask("ls", f"file://{tmp_path}/nothing")[0] == 3
    assert not list(tmp_path.iterdir())


def test_three_states_of_a_run_on_this_disk(copy: Kept, ask: Asked) -> None:
    run_dir = RunDir(copy.path)
    note = read_note(run_dir)
    assert note is not None
    assert note.steps == (10, 20, 30)
    write_note(run_dir, replace(note, steps=(10,), uploading=20, requests={"put": 300}, hours=2.0), durable=False)
    for at_work, second in ((True, "uploading"), (False, "local")):
        with lock_run(run_dir) if at_work else nullcontext():
            listed = json.loads(ask("ls", copy.path, "--json")[1])
            assert [one["where"] for one in listed["checkpoints"]] == ["remote", second, "local"]
            assert json.loads(ask("show", f"{copy.path}@20", "--json")[1])["where"] == second
            assert f"  where        {second}: " in ask("show", f"{copy.path}@20")[1]
    assert listed["remote"]["newest"] == 10
    assert f"lives in {note.url} as well: newest there is step 10" in ask("ls", copy.path)[1]
    head, row = ask("ls", copy.path.parent)[1].splitlines()
    assert head.split() == ["state", "step", "best", "saved", "remote", "touched", "run"]
    assert row.split()[6:8] == ["3", "10"]
    assert f"on an empty machine it goes on from step 10 of {note.url}" in ask("why", copy.path)[1]
    assert "newest there is step 10; 300 requests in the last attempt, 150 an hour" in ask("goodput", copy.path)[1]
    page = copy.path.parent / "page.html"
    facts = json.loads(ask("report", copy.path, "--to", page, "--json")[1])["runs"][0]["remote"]
    assert (facts["url"], facts["newest"], facts["requests_per_hour"]) == (note.url, 10, 150.0)
    assert ">step 10<" in page.read_text()
    assert f"in `{note.url}` as well" in render_readme(run_dir)


def test_a_run_without_a_bucket_says_nothing_of_one(copy: Kept, ask: Asked) -> None:
    RunDir(copy.path).remote_note.unlink()
    for words in (("ls", copy.path), ("ls", copy.path.parent), ("show", copy.path), ("why", copy.path)):
        out = ask(*words)[1]
        assert not [word for word in ("remote", "where", "empty machine") if word in out]
    assert "lives in" not in ask("goodput", copy.path)[1]
    assert "as well" not in render_readme(RunDir(copy.path))


def test_a_marked_step_is_no_place_to_go_on_from(copy: Kept, ask: Asked) -> None:
    newest = copy.path / "checkpoints/30"
    seal.seal_checkpoint(newest, replace(record.read_sidecar(newest).record, mark="error"))
    assert "on an empty machine it goes on from step 20 of" in ask("why", copy.path)[1]
