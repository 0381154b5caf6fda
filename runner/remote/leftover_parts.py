"""Large uploads that a kill has left half done: S3 keeps their parts, unseen, and they cost money.

The client that everything else goes through cannot list them, so this needs boto3 (`pip install holdfast[s3]`). Without
it, and for other clouds, a rule of the bucket does the same: docs/remote.md names it.
"""

from __future__ import annotations

import importlib.util
from urllib.parse import urlsplit


def abort_leftover_parts(url: str, endpoint: str | None) -> int:
    """Abort the uploads below a URL that were begun and not ended; return how many there were.

    Nothing else may be uploading there. Returns 0 where it cannot be done; what is in the way is no trouble of the run.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3" or importlib.util.find_spec("boto3") is None:
        return 0
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    found = 0
    try:
        # A start does not wait long for what only saves money.
        brief = Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 1})
        client = boto3.client("s3", endpoint_url=endpoint, config=brief)
        place = {"Bucket": parts.netloc, "Prefix": f"{parts.path.strip('/')}/"}
        for page in client.get_paginator("list_multipart_uploads").paginate(**place):
            for upload in page.get("Uploads", ()):
                client.abort_multipart_upload(Bucket=parts.netloc, Key=upload["Key"], UploadId=upload["UploadId"])
                found += 1
    except (BotoCoreError, ClientError):
        return found
    return found
