"""The first look at a store: whether it is there and takes the command, and which runs it has.

No client is imported before a store is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runner.errors import ConfigError, StorageError
from runner.remote.options import Remote

if TYPE_CHECKING:
    from runner.remote.objects import Objects


def contact_store(remote: Remote) -> Objects:
    """Return the objects below the URL of a remote, after one look that it is there.

    Raises ConfigError where the store takes the command for wrong, StorageError where it cannot be reached.
    """
    # Imported here: a run without a bucket does not wait for its client.
    from runner.remote.objects import open_objects

    assert remote.url is not None, "only where there is one"
    objects = open_objects(remote, remote.url, patient=False)
    with as_wrong_command():
        objects.list_folders()
    return open_objects(remote, remote.url)


@contextmanager
def as_wrong_command() -> Iterator[None]:
    """Raise ConfigError where a store takes the command for wrong, before anything was trained."""
    from runner.remote.objects import RemoteError

    try:
        yield
    except RemoteError as error:
        if error.is_refusal:
            raise ConfigError(
                f"remote.url={error}; check the bucket's name, its region (AWS_REGION) and the credentials in the "
                "environment"
            ) from None
        raise StorageError(
            f"remote.url={error}; nothing was begun; check the network (or remote.endpoint), then run the same command"
        ) from None


def find_remote_name(objects: Objects, name: str, digest: str) -> str | None:
    """Return the name of the directory that a run of this digest has in a bucket; None where there is none."""
    with as_wrong_command():
        found = [folder for folder in objects.list_folders(f"{name}/") if folder.endswith(f"-{digest}")]
    return found[0] if found else None


def read_remote_config(remote: Remote, name: str) -> bytes | None:
    """Return config.yaml of a run in a bucket, `NAME/RUN`; None where it is not there, or no bucket is named.

    Raises ConfigError, StorageError.
    """
    if remote.url is None:
        return None
    from runner.remote.objects import NoSuchObjectError

    objects = contact_store(remote)
    with as_wrong_command():
        try:
            return objects.read(f"{name}/config.yaml")
        except NoSuchObjectError:
            return None


def holds_run(objects: Objects, name: str) -> bool:
    """Tell whether a run of this name, `NAME/RUN`, is in a store. Raises ConfigError, StorageError."""
    with as_wrong_command():
        return f"{name}/config.yaml" in objects.list_sizes(f"{name}/")
