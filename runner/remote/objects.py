"""Objects in a bucket, by their keys: the only file that knows obstore.

A store answers in three ways: it does what is asked, it says that something is not so (no such object, or another one
than was expected), or it is in trouble (`RemoteError`): it cannot be reached, does not answer, refuses. Trouble says
nothing about what lies there.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import obstore
import xxhash
from obstore import exceptions

from runner import files
from runner.errors import ConfigError, StorageError
from runner.remote.options import Remote, is_remote_url
from runner.text import shorten

# One request may take so long in all; a client that waits for ever would keep a stop from being in time.
REQUEST_SECONDS, CONNECT_SECONDS = 120, 5
RETRIES = 4
# A file up to this size is one request, which is done or not done. A larger one goes up in parts of this size, so that
# a connection that breaks costs one part.
PART_BYTES = 64 << 20
# What is read at once where the bandwidth is limited, so that the limit is one of seconds and not of minutes.
LIMITED_PART_BYTES = 5 << 20
RANGE_BYTES = 64 << 20  # a larger object comes down in ranges, side by side
CHUNK_BYTES = 4 << 20  # what is written at once of a smaller one
PARALLEL = 8  # requests at once
PARALLEL_PARTS = 4  # of one large object: each is in memory while it goes up
MAX_KEYS = 1000  # that one request may delete
REFUSAL = re.compile(r"NoSuchBucket|ContainerNotFound|InvalidBucketName|status code: (400|401|403)")


class RemoteError(StorageError):
    """Raised where a store is in trouble: it cannot be reached, or does not do what is asked.

    Attributes:
        is_refusal: the store has answered, and takes the command for wrong: no such bucket, no permission.
    """

    def __init__(self, message: str, *, is_refusal: bool = False):
        super().__init__(message)
        self.is_refusal = is_refusal


class CannotCompareError(RemoteError):
    """Raised where a store, or how it was set up, has no way to compare before it writes."""


class NoSuchObjectError(Exception):
    """Raised where there is no object of that key."""


class OtherObjectError(Exception):
    """Raised where another object is there than was expected: one where none was, or one of another content."""


@dataclass(frozen=True)
class Tag:
    """Tell one content of an object from all others, as the store names it."""

    e_tag: str | None
    version: str | None = None


class Objects:
    """The objects below one prefix of one store. From any thread.

    Attributes:
        url: the prefix, for people.
        requests: how many of each kind were made: they cost money.
    """

    def __init__(self, store: Any, url: str, bytes_per_second: int | None = None):
        self._store, self._base, self.url = store, "", url.rstrip("/")
        self._throttle = Throttle(bytes_per_second)
        self.requests: Counter[str] = Counter()
        self._counting = threading.Lock()

    def below(self, prefix: str) -> Self:
        """Return the objects below a prefix of this one; what they ask is counted here as well."""
        found = copy.copy(self)
        vars(found).update(_base=f"{self._base}{prefix}/", url=f"{self.url}/{prefix}")
        return found

    def read(self, key: str) -> bytes:
        """Return the content of an object. Raises NoSuchObjectError, RemoteError."""
        return self.read_with_tag(key)[0]

    def read_with_tag(self, key: str) -> tuple[bytes, Tag]:
        """Return the content of an object, and what tells it from others. Raises NoSuchObjectError, RemoteError."""
        with self._asking("get", key):
            found = obstore.get(self._store, self._base + key)
            return bytes(found.bytes()), _tag_of(found.meta)

    def write(self, key: str, content: bytes) -> None:
        """Make or replace an object. Raises RemoteError."""
        self._throttle.wait_for(len(content))
        with self._asking("put", key):
            obstore.put(self._store, self._base + key, content, use_multipart=False)

    def create(self, key: str, content: bytes) -> Tag:
        """Make an object where there is none. Raises OtherObjectError where there is one, RemoteError."""
        with self._asking("put", key):
            return _tag_of(obstore.put(self._store, self._base + key, content, mode="create"))

    def swap(self, key: str, content: bytes, expected: Tag) -> Tag:
        """Replace an object that is what it was. Raises OtherObjectError where it is not, RemoteError."""
        known: Any = {name: value for name, value in vars(expected).items() if value is not None}
        with self._asking("put", key):
            return _tag_of(obstore.put(self._store, self._base + key, content, mode=known))

    def upload(self, key: str, path: Path, size: int, checksum: str | None = None) -> None:
        """Make an object of the first bytes of a file.

        Raises ValueError where they are not what the checksum (XXH3, 128 bits) is of, OSError of the file, RemoteError.

        What is one request never replaces an object with another content: that is of another process, or of a later
        moment than this request, which may have been on its way for long.
        """
        # Read, and not mapped into memory: a disk in trouble must raise an error, and not kill the process.
        with os.fdopen(files.open_file(path, os.O_RDONLY), "rb", buffering=0) as file:
            part = PART_BYTES if self._throttle.is_open else LIMITED_PART_BYTES
            if size <= part:
                content = read_exactly(file, size)
                _compare(path, checksum, xxhash.xxh3_128(content))
                self._throttle.wait_for(size)
                try:
                    self.create(key, content)
                except OtherObjectError:
                    if self.read(key) != content:
                        raise RemoteError(f"{self.url}/{key}: something else was written there meanwhile") from None
                return
            self._count("put", 2 + -(-size // part))
            with self._asking("put", key, count=0):
                seen, to = xxhash.xxh3_128(), self._base + key
                parts = self._throttle.iter_parts(file, size, part, seen)
                obstore.put(self._store, to, parts, use_multipart=True, chunk_size=part, max_concurrency=PARALLEL_PARTS)
            # It is there by now, and without a seal.
            _compare(path, checksum, seen)

    def download(self, key: str, path: Path, size: int) -> None:
        """Write the content of an object into a new file. Raises NoSuchObjectError, OSError, RemoteError."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if size <= RANGE_BYTES:
                with self._asking("get", key):
                    start = 0
                    for content in obstore.get(self._store, self._base + key).stream(min_chunk_size=CHUNK_BYTES):
                        start += _write_at(handle, memoryview(content), start)
                return
            ranges = [(start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
            with ThreadPoolExecutor(min(PARALLEL, max(len(ranges), 1))) as pool:
                list(pool.map(lambda part: self._download_range(key, handle, *part), ranges))
        finally:
            os.close(handle)

    def _download_range(self, key: str, handle: int, start: int, end: int) -> None:
        with self._asking("get", key):
            content = memoryview(obstore.get_range(self._store, self._base + key, start=start, end=end))
        _write_at(handle, content, start)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no trouble. Raises RemoteError."""
        for first in range(0, len(keys), MAX_KEYS):
            batch = list(keys[first : first + MAX_KEYS])
            with self._asking("delete", batch[0]):
                obstore.delete(self._store, [self._base + key for key in batch])

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the store. Raises NoSuchObjectError, RemoteError."""
        with self._asking("put", key):
            obstore.copy(self._store, self._base + key, self._base + to)

    def find_size(self, key: str) -> int | None:
        """Return the size of an object; None where there is none. Raises RemoteError."""
        try:
            with self._asking("get", key):
                return int(obstore.head(self._store, self._base + key)["size"])
        except NoSuchObjectError:
            return None

    def list_sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the size of every object below a prefix (empty, or one that ends with `/`), by its key.

        Raises RemoteError.
        """
        with self._asking("list", prefix):
            found = obstore.list(self._store, (self._base + prefix).rstrip("/") or None, chunk_size=MAX_KEYS).collect()
        self._count("list", len(found) // MAX_KEYS)
        return {meta["path"].removeprefix(self._base): meta["size"] for meta in found}

    def list_folders(self, prefix: str = "") -> list[str]:
        """Return the last names of what lies directly below a prefix and has something below it. Raises RemoteError."""
        with self._asking("list", prefix):
            found = obstore.list_with_delimiter(self._store, (self._base + prefix).rstrip("/") or None)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def _count(self, kind: str, count: int) -> None:
        with self._counting:
            self.requests[kind] += count

    @contextmanager
    def _asking(self, kind: str, key: str, count: int = 1) -> Iterator[None]:
        """Count a request, and turn what the client raises into one of three answers."""
        self._count(kind, count)
        try:
            yield
        except FileNotFoundError as error:
            # Also said where there is no bucket, which is no answer about the object.
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise self._trouble(error) from None
            raise NoSuchObjectError(key) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise OtherObjectError(key) from None
        except NotImplementedError as error:
            raise CannotCompareError(f"{self.url}: {explain(error)}", is_refusal=True) from None
        except exceptions.BaseError as error:
            raise self._trouble(error) from None
        except OSError as error:
            # The client's own, of a file system that is the store: those of the files of the run have their errno.
            if error.errno is not None:
                raise
            raise self._trouble(error) from None

    def _trouble(self, error: BaseException) -> RemoteError:
        refused = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        refused = refused or REFUSAL.search(str(error)) is not None
        return RemoteError(f"{self.url}: {explain(error)}", is_refusal=refused)


class FolderObjects(Objects):
    """Objects in a folder of this machine, `file://`: durable, and compared before they are replaced.

    The client cannot compare before it writes there, so that is done here, under a lock of the kernel.
    """

    def __init__(self, store: Any, url: str, folder: Path, bytes_per_second: int | None = None):
        super().__init__(store, url, bytes_per_second)
        self._folder = folder

    def read_with_tag(self, key: str) -> tuple[bytes, Tag]:
        """Return the content of an object, and what tells it from others."""
        content, _ = super().read_with_tag(key)
        return content, _tag_content(content)

    def write(self, key: str, content: bytes) -> None:
        """Make or replace an object, durably."""
        super().write(key, content)
        self._sync(key)

    def create(self, key: str, content: bytes) -> Tag:
        """Make an object where there is none, durably."""
        super().create(key, content)
        self._sync(key)
        return _tag_content(content)

    def swap(self, key: str, content: bytes, expected: Tag) -> Tag:
        """Replace an object that is what it was, durably."""
        path = self._folder / self._base / key
        with self._guarding(path):
            if not path.exists() or _tag_content(path.read_bytes()) != expected:
                raise OtherObjectError(key)
            self._count("put", 1)
            files.replace_file(path, content)
        return _tag_content(content)

    def upload(self, key: str, path: Path, size: int, checksum: str | None = None) -> None:
        """Make an object of the first bytes of a file, durably."""
        super().upload(key, path, size, checksum)
        self._sync(key)

    def _sync(self, key: str) -> None:
        path = self._folder / self._base / key
        files.sync_path(path)
        files.sync_path(path.parent)

    @contextmanager
    def _guarding(self, path: Path) -> Iterator[None]:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class Throttle:
    """Let no more than so many bytes a second go up; None: all of them. From any thread."""

    def __init__(self, bytes_per_second: int | None):
        self._rate, self._free_at, self._lock = bytes_per_second, 0.0, threading.Lock()

    @property
    def is_open(self) -> bool:
        """Tell whether there is no limit."""
        return self._rate is None

    def wait_for(self, num_bytes: int) -> None:
        """Wait until so many bytes may go up."""
        if self._rate is None:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + num_bytes / self._rate
        time.sleep(max(begin - time.monotonic(), 0.0))

    def iter_parts(self, file: Any, size: int, part_bytes: int, seen: Any) -> Iterator[bytes]:
        """Yield the first bytes of a file in parts, each as soon as it may go up; `seen`, a hash, takes them in.

        Raises OSError where the file is short.
        """
        left = size
        while left:
            content = read_exactly(file, min(part_bytes, left))
            left -= len(content)
            seen.update(content)
            self.wait_for(len(content))
            yield content


def _compare(path: Path, checksum: str | None, seen: Any) -> None:
    """Raise ValueError where a file is not what was written."""
    if checksum is not None and seen.hexdigest() != checksum:
        raise ValueError(f"{path.name} is not what was written (its checksum differs)")


def read_exactly(file: Any, count: int) -> bytes:
    """Return so many bytes of a file. Raises OSError where it has fewer."""
    content: bytes = file.read(count)
    while len(content) < count:
        more = file.read(count - len(content))
        if not more:
            raise OSError(errno.EIO, "became shorter while it was read")
        content += more
    return content


def open_objects(remote: Remote, url: str, *, patient: bool = True) -> Objects:
    """Return the objects below a URL. No request is made yet.

    Args:
        remote: how to reach the store.
        url: `s3://BUCKET/PREFIX` and the like.
        patient: whether a request that fails is tried again for a while: at the start a person waits for the answer.

    Raises ConfigError where the client does not take it.
    """
    assert is_remote_url(url), url
    parts = urlsplit(url)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        try:
            local = obstore.store.LocalStore(folder, mkdir=True)
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise ConfigError(f"remote.url={url}: {explain(error)}") from None
        return FolderObjects(local, url, folder, remote.bytes_per_second)
    retry: Any = {"max_retries": RETRIES if patient else 1, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)}
    client: Any = {"timeout": f"{REQUEST_SECONDS}s", "connect_timeout": f"{CONNECT_SECONDS}s"}
    endpoint = remote.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if parts.scheme == "s3":
        options = read_aws_profile(os.environ)
        if endpoint is not None:
            options |= {"endpoint": endpoint}
    elif remote.endpoint is not None:
        # Google's client takes another address in the document of a service account alone.
        options = {"endpoint": remote.endpoint} if parts.scheme == "az" else _address_google(remote.endpoint)
    if (endpoint or remote.endpoint or "").startswith("http://"):
        client["allow_http"] = True
    try:
        store = obstore.store.from_url(url, client_options=client, retry_config=retry, **options)
    except (exceptions.BaseError, ValueError, TypeError) as error:
        raise ConfigError(f"remote.url={url}: {explain(error)}") from None
    return Objects(store, url, remote.bytes_per_second)


def _address_google(endpoint: str) -> dict[str, Any]:
    account = {
        "gcs_base_url": endpoint,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    return {"service_account_key": files.format_json(account)}


def read_aws_profile(environ: Any) -> dict[str, Any]:
    """Return what the files of AWS's own tools say: the keys and the region of the profile that is chosen.

    The client reads the environment, the roles of containers and machines, and not these files. Where the environment
    has keys, they count.
    """
    if environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    import configparser

    home, name = Path.home() / ".aws", environ.get("AWS_PROFILE", "default")
    found: dict[str, Any] = {}
    places = (
        (environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials", name),
        (environ.get("AWS_CONFIG_FILE") or home / "config", name if name == "default" else f"profile {name}"),
    )
    for path, section in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            found = {**dict(parser.items(section)), **found}
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    options = {key.removeprefix("aws_"): found[key] for key in known if found.get(key)}
    if "session_token" in options:
        options["token"] = options.pop("session_token")
    if found.get("region") and not environ.get("AWS_REGION") and not environ.get("AWS_DEFAULT_REGION"):
        options["region"] = found["region"]
    return options


def explain(error: BaseException) -> str:
    """Return what a client's error says, in a few words, without its account of every try."""
    text = str(error)
    if code := re.search(r"<Code>(\w+)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL):
        # The answer of the store itself, in words.
        return f"{_split_words(code[1])} ({shorten(code[2] or '', 120)})" if code[2] else _split_words(code[1])
    if status := re.search(r"status code: (\d{3} [A-Za-z ]+)", text):
        return f"the store answered {status[1].strip()}"
    if "error sending request" in text or "HTTP error" in text:
        return "cannot be reached"
    if "Account must be specified" in text:
        return "the name of the storage account is not known; set AZURE_STORAGE_ACCOUNT_NAME"
    line = re.sub(r"^Generic \w+ error: ", "", text.splitlines()[0]) if text else type(error).__name__
    return shorten(line, 160)


def _split_words(code: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", code).lower()


def _write_at(handle: int, content: memoryview, start: int) -> int:
    """Write all of a content into a file from a place on; return how many bytes. Raises OSError."""
    size = len(content)
    while content:
        written = os.pwrite(handle, content, start)
        content, start = content[written:], start + written
    return size


def _tag_of(meta: Any) -> Tag:
    return Tag(meta.get("e_tag"), meta.get("version"))


def _tag_content(content: bytes) -> Tag:
    return Tag(xxhash.xxh3_128(content).hexdigest())


def run_side_by_side(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Do a piece of work for each item, several at once. Raises what one of them raises, when all have ended."""
    with ThreadPoolExecutor(min(PARALLEL, max(len(items), 1))) as pool:
        for future in [pool.submit(work, item) for item in items]:
            future.result()
