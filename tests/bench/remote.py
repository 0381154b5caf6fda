"""What a bucket costs: a checkpoint sent ÷ the same bytes by the client alone; a restart from it ÷ download + restart.

    python -m tests.bench.remote [MEGABYTES] [ROUNDS] [FILES]

Against a server of S3's protocol on this machine, which shares its cores. Interleaved; medians.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import obstore
from obstore.store import S3Store

from runner import files
from runner.checkpoint.record import Record, Score, newest_durable_step
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.retention import KeepLast
from runner.checkpoint.seal import seal_checkpoint
from runner.remote.bucket import hold_in_bucket
from runner.remote.objects import PARALLEL
from runner.remote.options import Remote
from runner.remote.other_place import Choices
from runner.rundir.layout import RunDir
from tests.buckets import BUCKET, serve_bucket

KEY = "bench/run"


def main(megabytes: str = "500", rounds: str = "5", files_each: str = "8") -> None:
    """Measure and print."""
    with serve_bucket() as server, tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name:
        os.environ.update(server.environment)
        folder, plain = Path(name), S3Store(BUCKET, endpoint=server.endpoint, client_options={"allow_http": True})
        url = f"s3://{BUCKET}/team"
        choices = Choices(Remote(url=url, endpoint=server.endpoint), {"last": KeepLast(n=1)}, Score())
        made = make_checkpoint(RunDir(folder / "first" / KEY), int(megabytes), int(files_each))
        took: dict[str, list[float]] = {name: [] for name in ("sent", "put", "restart", "get", "local")}
        sent_requests = 0
        for number in range(int(rounds)):
            for path in list(obstore.list(plain).collect()):
                obstore.delete(plain, path["path"])
            took["put"].append(clock(lambda: put_files(plain, made)))
            with hold_in_bucket(choices, KEY, RunDir(folder / "first" / KEY), lambda: None) as bucket:
                took["sent"].append(clock(lambda bucket=bucket: bucket.finish(None)))
                sent_requests = sum(bucket._objects.requests.values())
            took["get"].append(clock(lambda: get_files(plain, folder / "plain")))
            took["local"].append(clock(lambda: restore(RunDir(folder / "first" / KEY))))
            took["restart"].append(clock(lambda: restart(choices, folder / "next")))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        once = {name: median(seconds) for name, seconds in took.items()}
        print(f"checkpoint of {megabytes} MB in {files_each} files; {sent_requests} requests with everything around it")
        print(
            f"in the bucket ÷ put alone: {once['sent']:.2f} s ÷ {once['put']:.2f} s = {once['sent'] / once['put']:.2f}"
        )
        both = once["get"] + once["local"]
        print(
            f"restart ÷ (get alone + restart here): {once['restart']:.2f} s ÷ ({once['get']:.2f} + {once['local']:.2f}) s "
            f"= {once['restart'] / both:.2f}"
        )


def make_checkpoint(run_dir: RunDir, megabytes: int, num_files: int) -> Path:
    """Make a run of one checkpoint of so many bytes in so many files."""
    directory = run_dir.checkpoints / "1"
    files.make_folder(directory / "state/d")
    files.make_folder(run_dir.logs)
    run_dir.config.write_text("seed: 0\n")
    for number in range(num_files):
        (directory / f"state/d/{number}").write_bytes(os.urandom(megabytes * 1_000_000 // num_files))
    seal_checkpoint(directory, Record(1, "bench", {}, 0.0))
    return directory


def put_files(store: S3Store, directory: Path) -> None:
    """Send the files with the client alone, as many at once as the product does."""
    names = [path for path in directory.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda path: obstore.put(store, f"plain/{path.name}", path, use_multipart=False), names))


def get_files(store: S3Store, folder: Path) -> None:
    """Fetch them with the client alone onto the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def get(path: str) -> None:
        (folder / path.rpartition("/")[2]).write_bytes(obstore.get(store, path).bytes())

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(get, [meta["path"] for meta in obstore.list(store, "plain").collect()]))


def restore(run_dir: RunDir) -> None:
    """Read and prove the newest checkpoint of this disk."""
    read = lambda directory: [path.read_bytes() for path in directory.rglob("*") if path.is_file()]  # noqa: E731
    assert restore_newest(run_dir.checkpoints, run_dir.quarantine, read, print) is not None


def restart(choices: Choices, folder: Path) -> None:
    """Go on from the bucket on an empty disk, as far as the restored bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    run_dir = RunDir(folder / KEY)
    files.make_folder(run_dir.logs)
    with hold_in_bucket(choices, KEY, run_dir, lambda: None) as bucket:
        files.make_folder(run_dir.checkpoints)
        assert bucket.bring_newer(newest_durable_step(run_dir.checkpoints))
        restore(run_dir)


def clock(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(*sys.argv[1:])
