"""Where a run lives beside this machine's disk: what can be chosen. No client is imported here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt

from runner.text import shorten

SCHEMES = ("s3", "gs", "az", "file")
URL_PATTERN = re.compile(r"^(s3|gs|az|file)://")
# A holder that renews its lock so often is seen to be there, and one that is late once or twice is not taken for dead.
RENEWALS_UNTIL_LOST = 3


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Keep the run in a bucket as well: an empty machine goes on from there. `remote=URL` is short for `remote.url`.

    Attributes:
        url: `s3://BUCKET/PREFIX`, `gs://…`, `az://CONTAINER/PREFIX`, or `file:///FOLDER` for a second disk; null: the
            run lives on this machine's disk alone. Also the variable HOLDFAST_REMOTE.
        endpoint: of a store that is not the cloud's own, as `https://HOST:PORT`.
        lock: `on` holds the run in the bucket for one process; `off` trusts that nobody else works on it, for stores
            that cannot compare before they write.
        renew_seconds: so often the lock is renewed, for one request each.
        lost_seconds: a lock that another machine has not renewed for so long belongs to nobody.
        sync_seconds: so often logs and status go up between checkpoints.
        patience_seconds: at the end, the bucket is tried for so long before the command fails (exit 5).
        bytes_per_second: upload no faster; null: as fast as it goes.
    """

    url: str | None = None
    endpoint: str | None = None
    lock: Literal["on", "off"] = "on"
    renew_seconds: Annotated[float, Gt(0.0)] = 15.0
    lost_seconds: Annotated[float, Gt(0.0)] = 60.0
    sync_seconds: Annotated[float, Gt(0.0)] = 60.0
    patience_seconds: Annotated[float, Ge(0.0)] = 600.0
    bytes_per_second: Annotated[int, Ge(1024)] | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            check_url(self.url)
        if self.endpoint is not None and not re.match(r"^https?://[^/@\s]+", self.endpoint):
            raise ValueError(f"endpoint: got '{shorten(self.endpoint, 80)}'; expected https://HOST[:PORT]")
        if self.lost_seconds < RENEWALS_UNTIL_LOST * self.renew_seconds:
            raise ValueError(
                f"lost_seconds={self.lost_seconds:g} must be at least {RENEWALS_UNTIL_LOST} × "
                f"renew_seconds={self.renew_seconds:g}: a machine that is slow once is not gone"
            )


def is_remote_url(text: str) -> bool:
    """Tell whether a text names something in a bucket, and no path."""
    return URL_PATTERN.match(text) is not None


def check_url(url: str) -> None:
    """Raise ValueError where a text is no place that a run can live in."""
    try:
        parts = urlsplit(url)
        place = parts.netloc if parts.scheme != "file" else parts.path.strip("/")
    except ValueError as error:
        raise ValueError(f"url: got '{shorten(url, 80)}' ({error}); expected s3://BUCKET/PREFIX") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not the text itself: it may be a password.
        raise ValueError(
            "url: has more in it than a bucket and a prefix; credentials come from the environment, as the cloud's own "
            "tools read them, and an endpoint is remote.endpoint=URL"
        )
    if parts.scheme not in SCHEMES or not place or ".." in parts.path.split("/"):
        raise ValueError(
            f"url: got '{shorten(url, 80)}'; expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or "
            "file:///FOLDER"
        )
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(f"url: got '{shorten(url, 80)}'; a folder of this machine is file:///FOLDER, with three /")


def join_url(url: str, *names: str) -> str:
    """Return the place of a name below a URL."""
    return "/".join([url.rstrip("/"), *names])
