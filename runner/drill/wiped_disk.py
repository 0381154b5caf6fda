"""A drill of a run that lives in a bucket: the disk goes with the machine at every kill, and the bucket has the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoint.record import SIDECAR, is_step_name
from runner.errors import ConfigError
from runner.remote.options import Remote, join_url

if TYPE_CHECKING:
    from runner.remote.objects import Objects

# What keeps the run that is not killed out of the bucket: it is what the other one is compared with.
NO_BUCKET = ("remote.url=null",)


@dataclass(frozen=True)
class WipedDisk:
    """Say where the run that is killed lives in the meantime.

    Attributes:
        remote: a prefix of the drill's own in the bucket that was named.
    """

    remote: Remote

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the words that make a run live there."""
        return (f"remote.url={self.remote.url}",)

    def find_newest_step(self) -> int:
        """Return the newest checkpoint that is whole there; 0 for none. Raises StorageError."""
        seals = (key.split("/")[-2] for key in self._open().list_sizes() if key.endswith(f"/{SIDECAR}"))
        return max((int(step) for step in seals if is_step_name(step)), default=0)

    def delete_all(self) -> None:
        """Delete what the drill has put into the bucket. Raises StorageError."""
        objects = self._open()
        objects.delete(list(objects.list_sizes()))

    def _open(self) -> Objects:
        from runner.remote.objects import open_objects

        assert self.remote.url is not None, "it has one"
        return open_objects(self.remote, self.remote.url)


def find_wiped_disk(words: Sequence[str], environ: Mapping[str, str], folder: Path) -> WipedDisk | None:
    """Return where the killed run of a drill lives; None where no bucket is named, in the command or environment.

    What a file of choices says is not read here. Raises ConfigError where a bucket is none.
    """
    url, endpoint = environ.get("HOLDFAST_REMOTE"), None
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key in ("remote", "remote.url"):
            url = None if value == "null" else value
        if key == "remote.endpoint":
            endpoint = value
    if url is None:
        return None
    try:
        return WipedDisk(Remote(url=join_url(url, ".drill", folder.name), endpoint=endpoint))
    except ValueError as error:
        raise ConfigError(f"remote.{error}") from None
