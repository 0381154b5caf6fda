"""A store in trouble, over the wire: it answers with errors, not at all, slowly, in part, or with what was true before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.errors import ConfigError, StorageError
from runner.remote import objects
from runner.remote.contact import contact_store
from runner.remote.leftover_parts import abort_leftover_parts
from runner.remote.objects import Objects, RemoteError, Tag, Throttle, open_objects, read_aws_profile
from runner.remote.options import Remote
from tests.buckets import BUCKET, Server, name_ended_process, serve_bucket
from tests.fault_proxy import Handler, Proxy, Request, proxy_before
from tests.remote.simulation import choose, find_lie, work


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve_bucket() as server:
        yield server


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, to which every URL leads; trouble is tried again at once."""
    with proxy_before(server.endpoint) as proxy:
        for key, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(key, value)
        real = open_objects
        url = f"s3://{BUCKET}/{random.randbytes(8).hex()}"
        monkeypatch.setattr("runner.remote.bucket.open_objects", lambda remote, _: real(remote, url))
        monkeypatch.setattr("runner.remote.uploader.RETRY_SECONDS", (0.05,))
        monkeypatch.setattr("runner.remote.remote_lock.identify_process", name_ended_process)
        yield proxy


def sometimes(rng: random.Random, what: Callable[[Request, Handler], bool]) -> Callable[[Request, Handler], bool]:
    """Let it happen to every sixth request, in no order."""
    return lambda request, handler: rng.random() < 1 / 6 and what(request, handler)


def wait_and_go_on(request: Request, handler: Handler) -> bool:
    time.sleep(0.1)
    return False


def answer_in_part(request: Request, handler: Handler) -> bool:
    """Promise more than comes, as where a connection breaks in the middle of an answer.

    To a request that writes that is a yes, though nothing was written: a store that loses what it has taken.
    """
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.send_header("ETag", '"0"')
    handler.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
    handler.end_headers()
    handler.wfile.write(b"<Li")
    handler.wfile.flush()
    return handler.hang_up()


KINDS: dict[str, Callable[[Request, Handler], bool]] = {
    "503": lambda request, handler: handler.answer(503),
    "429": lambda request, handler: handler.answer(429),
    "500": lambda request, handler: handler.answer(500, "InternalError"),
    "closed": lambda request, handler: handler.hang_up(),
    "slow": wait_and_go_on,
    "in part": answer_in_part,
}


@pytest.mark.parametrize("kind", KINDS)
def test_trouble_that_passes_is_waited_out(proxy: Proxy, tmp_path: Path, kind: str) -> None:
    work(tmp_path / "a", 20)
    proxy.trouble = sometimes(random.Random(kind), KINDS[kind])
    proxy.after = sometimes(random.Random(f"after {kind}"), KINDS[kind]) if kind in ("closed", "503") else proxy.after
    for _ in range(5):
        try:
            work(tmp_path / "a", 50)
            break
        # At the start a command ends with a line, and is typed again.
        except StorageError:
            continue
    proxy.forget()
    work(tmp_path / "a", 50)
    assert find_lie(tmp_path / "look") is None


def test_a_list_of_before_hides_nothing_for_good(proxy: Proxy, tmp_path: Path) -> None:
    """Some stores list for a while what was there before. Then steps are done again, and what is there stays whole."""
    work(tmp_path / "a", 20)
    stale: dict[str, bytes] = {}

    def list_before(request: Request, handler: Handler) -> bool:
        if request.method != "GET" or "list-type=2" not in request.path:
            return False
        content = stale.setdefault(request.path, fetch(proxy, request.path))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        return True

    proxy.trouble = list_before
    work(tmp_path / "b", 40)
    proxy.trouble = lambda request, handler: False
    proxy.forget()
    work(tmp_path / "c", 50)
    assert find_lie(tmp_path / "look") is None


def fetch(proxy: Proxy, path: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(f"{proxy.upstream}{path}") as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("status", [401, 403, 400])
def test_what_the_store_refuses_is_the_command(proxy: Proxy, status: int) -> None:
    proxy.trouble = lambda request, handler: handler.answer(status, "InvalidAccessKeyId")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"invalid access key id .*credentials"):
        contact_store(Remote(url=f"s3://{BUCKET}/x", endpoint=proxy.endpoint))
    assert len(proxy.seen) <= 2
    assert time.monotonic() - began < 60


def test_a_bucket_that_is_none(proxy: Proxy) -> None:
    with pytest.raises(ConfigError, match="no such bucket"):
        contact_store(Remote(url="s3://nowhere/x", endpoint=proxy.endpoint))


def test_a_store_that_cannot_be_reached(proxy: Proxy) -> None:
    proxy.is_offline = True
    with pytest.raises(StorageError, match="cannot be reached; nothing was begun"):
        contact_store(Remote(url=f"s3://{BUCKET}/x", endpoint=proxy.endpoint))


def test_a_bucket_that_vanishes_is_trouble_and_no_missing_object(proxy: Proxy) -> None:
    url = f"s3://{BUCKET}/x"
    proxy.trouble = lambda request, handler: handler.answer(404, "NoSuchBucket")
    with pytest.raises(RemoteError, match="no such bucket"):
        open_objects(Remote(url=url, endpoint=proxy.endpoint), url).read("LOCK")


def test_a_large_file_goes_up_in_parts_and_comes_back(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(objects, "RANGE_BYTES", 3 << 20)
    content, url = random.Random(0).randbytes((11 << 20) + 7), f"s3://{BUCKET}/large"
    (tmp_path / "up").write_bytes(content)
    there = open_objects(Remote(url=url, endpoint=proxy.endpoint), url)
    there.upload("data", tmp_path / "up", len(content))
    assert there.requests["put"] == 5
    there.download("data", tmp_path / "down", len(content))
    assert (tmp_path / "down").read_bytes() == content
    with pytest.raises(OSError, match="became shorter"):
        there.upload("short", tmp_path / "up", len(content) + 1)
    assert "short" not in there.list_sizes()


def test_parts_that_a_kill_has_left_are_aborted(proxy: Proxy) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=proxy.endpoint)
    for key in ("mine/mlp/run/checkpoints/1/data", "mine/mlp/run-of-others/checkpoints/1/data"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    assert abort_leftover_parts(f"s3://{BUCKET}/mine/mlp/run", proxy.endpoint) == 1
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]]
    assert left == ["mine/mlp/run-of-others/checkpoints/1/data"]
    proxy.is_offline = True
    assert abort_leftover_parts(f"s3://{BUCKET}/mine/mlp/run", proxy.endpoint) == 0
    assert abort_leftover_parts("gs://mine/mlp/run", None) == 0


def test_no_more_goes_up_in_a_second_than_was_said(tmp_path: Path) -> None:
    """What two threads send together: 10 pieces of 100 kB at 2 MB a second."""
    throttle, began = Throttle(2_000_000), time.monotonic()
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(throttle.wait_for, [100_000] * 10))
    assert time.monotonic() - began >= 0.45


def test_google_and_azure_are_asked_to_compare(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Their services are not at hand: this is what is asked of them."""
    asked: list[tuple[str, str, dict[str, str]]] = []

    def keep(request: Request, handler: Handler) -> bool:
        asked.append((request.method, request.path, {name.lower(): value for name, value in handler.headers.items()}))
        handler.send_response(200)
        for name, value in (("ETag", '"1"'), ("x-goog-generation", "7"), ("Content-Length", "0")):
            handler.send_header(name, value)
        handler.end_headers()
        return True

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    with proxy_before(server.endpoint) as proxy:
        proxy.trouble = keep
        for url in ("gs://mine/runs", "az://mine/runs"):
            there = open_objects(Remote(url=url, endpoint=proxy.endpoint), url).below("mlp/run")
            there.swap("LOCK", b"2", there.create("LOCK", b"1"))
    (first, made, created), (_, _, swapped), (_, path, made_there), (_, _, swapped_there) = asked
    assert (first, made, path) == ("PUT", "/mine/runs%2Fmlp%2Frun%2FLOCK", "/mine/runs/mlp/run/LOCK")
    assert created["x-goog-if-generation-match"] == "0"
    assert swapped["x-goog-if-generation-match"] == "7"
    assert made_there["if-none-match"] == "*"
    assert swapped_there["if-match"] == '"1"'


def test_keys_come_from_the_files_of_the_clouds_own_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = two\n[lab]\naws_access_key_id = three\n"
        "aws_secret_access_key = four\naws_session_token = five\n"
    )
    (tmp_path / ".aws/config").write_text("[profile lab]\nregion = eu-west-1\n")
    assert read_aws_profile({}) == {"access_key_id": "one", "secret_access_key": "two"}
    lab = {"access_key_id": "three", "secret_access_key": "four", "token": "five", "region": "eu-west-1"}
    assert read_aws_profile({"AWS_PROFILE": "lab"}) == lab
    assert read_aws_profile({"AWS_PROFILE": "lab", "AWS_ACCESS_KEY_ID": "mine"}) == {}
    assert read_aws_profile({"AWS_PROFILE": "nobody"}) == {}


def test_what_is_chosen_is_what_is_used() -> None:
    assert isinstance(open_objects(Remote(url="s3://b/p"), "s3://b/p"), Objects)
    assert choose().remote.lost_seconds == 0.2
    assert Tag(None) != Tag("1")
