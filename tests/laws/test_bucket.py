"""The law of a run in a bucket: its machine vanishes with its disk at any request, and the run ends as if nothing had.

The bucket is a server of S3's protocol on this machine, behind a proxy that counts requests and kills the process at one
of them: before the server hears of it, or before the process hears the answer.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.checkpoint.record import SIDECAR
from runner.remote.checkpoint_copies import download_checkpoint
from runner.remote.objects import Objects, open_objects
from runner.remote.options import Remote
from tests.buckets import BUCKET, Server, serve_bucket
from tests.conftest import HANG_SECONDS, SMALL, Door, assert_same, last_logged
from tests.fault_proxy import Proxy, proxy_before, wait_until

WORDS = (*SMALL, "ckpt.save.periodic.steps=7")
EVERY = 10  # the longest time between two checkpoints, in steps
KILLS_IN_FULL, KILLS_EACH = 26, 4


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve_bucket() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxy_before(server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def reference(make_door: Callable[[str], Door]) -> Door:
    """A run that nothing happens to, and that knows of no bucket."""
    door = make_door("reference-bucket")
    done = door.run(*WORDS)
    assert done.returncode == 0, done.stderr
    return door


class Machines:
    """One machine after the other, each with an empty disk, for a run in a bucket of its own."""

    def __init__(self, door: Door, server: Server, proxy: Proxy, name: str):
        self.door, self.url, self.proxy = door, f"s3://{BUCKET}/{name}", proxy
        self.environment = {**server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        self.words = (*WORDS, f"remote={self.url}")
        self._direct = Remote(url=self.url, endpoint=server.endpoint)
        os.environ.update(server.environment)

    def start(self, *more: str) -> subprocess.Popen[str]:
        return self.door.start(*self.words, *more, **self.environment)

    def run(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self.door.run(*self.words, *more, **self.environment)

    def lose_disk(self) -> None:
        shutil.rmtree(self.door.cwd / "outputs", ignore_errors=True)

    @property
    def objects(self) -> Objects:
        return open_objects(self._direct, self.url)

    def sealed_steps(self) -> list[int]:
        seals = [key.split("/")[-2] for key in self.objects.list_sizes() if key.endswith(f"/{SIDECAR}")]
        return sorted(int(step) for step in seals if step.isdecimal())

    def kill_at_request(self, number: int, *, before: bool) -> bool:
        """Start a machine, kill it at a request, and lose its disk. Return whether the kill landed."""
        self.proxy.forget()
        process: subprocess.Popen[str] | None = None

        def find_victim() -> int:
            assert process is not None
            return process.pid

        self.proxy.kill_at(number, find_victim, before=before)
        process = self.start()
        out, err = process.communicate(timeout=HANG_SECONDS)
        self.proxy.forget()
        assert process.returncode in (0, -signal.SIGKILL), (process.returncode, out, err)
        self.lose_disk()
        return process.returncode != 0


def fetched_step(out: str) -> int:
    """Return the step that a machine has fetched to go on from; 0 where it began anew."""
    found = re.findall(r"restored step (\d+)", out)
    return int(found[0]) if found else 0


def finish_and_compare(machines: Machines, reference: Door) -> None:
    done = machines.run()
    assert done.returncode == 0, done.stderr
    # A machine that finds the run finished fetches no checkpoint.
    last = machines.door.the_run / "checkpoints/60"
    if not last.exists():
        last.parent.mkdir()
        objects = machines.objects.below("/".join(last.parts[-4:-2]))
        sizes = {
            key.removeprefix("checkpoints/60/"): size for key, size in objects.list_sizes("checkpoints/60/").items()
        }
        assert download_checkpoint(objects, 60, sizes, last.parent) is None
    assert_same(machines.door.the_run, reference.the_run, 60)
    # What is on the next machine is what everybody finds there.
    machines.lose_disk()
    again = machines.run()
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    metrics = (machines.door.the_run / "logs/metrics.jsonl").read_bytes()
    assert metrics == (reference.the_run / "logs/metrics.jsonl").read_bytes()


def suffer(machines: Machines, reference: Door, seed: int, kills: int) -> None:
    rng = random.Random(f"bucket {seed}")
    landed = 0
    while landed < kills:
        # A whole run asks for about 90, a start for 15. The first kill always comes in time.
        number = rng.randint(1, 20) if not landed else rng.choice((rng.randint(1, 20), rng.randint(1, 80)))
        before = machines.sealed_steps()
        if not machines.kill_at_request(number, before=rng.random() < 0.5):
            break
        landed += 1
        after = machines.sealed_steps()
        assert max(after, default=0) >= max(before, default=0), "what was there is there"
    # How many there were in all is told where the whole law is run (pytest -s).
    print(f"seed {seed}: {landed} kills landed")
    assert landed, "no kill landed"
    finish_and_compare(machines, reference)


def test_a_machine_vanishes_at_any_request(door: Door, server: Server, proxy: Proxy, reference: Door) -> None:
    machines = Machines(door, server, proxy, "short")
    suffer(machines, reference, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, KILLS_IN_FULL + 1))
def test_machines_vanish_at_any_request(door: Door, server: Server, proxy: Proxy, reference: Door, seed: int) -> None:
    suffer(Machines(door, server, proxy, f"long-{seed}"), reference, seed, KILLS_EACH)


def test_a_stop_is_done_when_it_is_in_the_bucket(door: Door, server: Server, proxy: Proxy, reference: Door) -> None:
    machines = Machines(door, server, proxy, "stopped")
    # Every request takes a while, so that a stop has something to wait for.
    process = machines.start()
    wait_until(lambda: last_logged(door.cwd) >= 15)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, (out, err)
    stopped = int(re.findall(r"at step (\d+) of 60, saved", out)[0])
    assert machines.sealed_steps()[-1] == stopped
    machines.lose_disk()
    done = machines.run()
    assert done.returncode == 0, done.stderr
    assert fetched_step(done.stdout) == stopped
    assert_same(door.the_run, reference.the_run, 60)


CAN_UNSHARE = subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN_UNSHARE, reason="needs namespaces of processes: another one stands for another machine")
def test_a_writer_that_was_asleep_does_no_harm(
    door: Door, server: Server, proxy: Proxy, reference: Door, make_door: Callable[[str], Door]
) -> None:
    """Stopped past the limit in the middle of its run, and woken when another machine has ended it."""
    machines = Machines(door, server, proxy, "asleep")
    patience = ("remote.renew_seconds=0.5", "remote.lost_seconds=2")
    elsewhere = make_door("elsewhere")
    sleeper = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", *elsewhere.start_arguments(*machines.words, *patience)],
        cwd=elsewhere.cwd,
        env={**os.environ, **machines.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: last_logged(elsewhere.cwd) >= 5)
        (inner,) = Path(f"/proc/{sleeper.pid}/task/{sleeper.pid}/children").read_text().split()
        os.kill(int(inner), signal.SIGSTOP)
        at_work = machines.run(*patience)
        assert at_work.returncode == 0, at_work.stderr
        assert "waiting up to 2 s to be sure it is gone" in at_work.stdout
        assert_same(door.the_run, reference.the_run, 60)
        there = {key: size for key, size in machines.objects.list_sizes().items() if "/checkpoints/" in key}
        os.kill(int(inner), signal.SIGCONT)
        out, err = sleeper.communicate(timeout=HANG_SECONDS)
    finally:
        sleeper.kill()
    assert sleeper.returncode == 3, (out, err)
    assert "has taken it over; nothing more is written" in err
    assert {key: size for key, size in machines.objects.list_sizes().items() if "/checkpoints/" in key} == there
    machines.lose_disk()
    again = machines.run(*patience)
    assert again.returncode == 0, again.stderr
    assert (door.the_run / "logs/metrics.jsonl").read_bytes() == (reference.the_run / "logs/metrics.jsonl").read_bytes()


def test_of_two_machines_at_once_one_trains(
    door: Door, server: Server, proxy: Proxy, make_door: Callable[[str], Door]
) -> None:
    machines = Machines(door, server, proxy, "both")
    both = [one.start(*machines.words, **machines.environment) for one in (door, make_door("other"))]
    ended = [(process.communicate(timeout=HANG_SECONDS), process.returncode) for process in both]
    assert sorted(code for _, code in ended) == [0, 3], ended
    ((_, err),) = [said for said, code in ended if code == 3]
    assert "in use by pid" in err


def test_tensorstore_reads_it_where_it_lies(door: Door, server: Server, proxy: Proxy) -> None:
    """The same layout as on disk: no code of ours is needed."""
    import tensorstore as ts

    machines = Machines(door, server, proxy, "plain")
    done = machines.run("train.steps=10")
    assert done.returncode == 0, done.stderr
    kept = {"driver": "s3", "bucket": BUCKET, "endpoint": server.endpoint, "aws_region": "us-east-1"}
    path = f"plain/default/{door.the_run.name}/checkpoints/10/state/"
    there = ts.KvStore.open({"driver": "ocdbt", "base": {**kept, "path": path}}).result()
    here = ts.KvStore.open({"driver": "ocdbt", "base": (door.the_run / "checkpoints/10/state").as_uri() + "/"}).result()
    keys = here.list().result()
    assert sorted(there.list().result()) == sorted(keys)
    assert len(keys) > 10
    assert all(there.read(key).result().value == here.read(key).result().value for key in keys)


def test_no_network_for_a_while(door: Door, server: Server, proxy: Proxy, reference: Door) -> None:
    machines = Machines(door, server, proxy, "offline")
    process = machines.start("remote.renew_seconds=0.2", "remote.lost_seconds=1", "train.steps=60")
    wait_until(lambda: bool(machines.sealed_steps()))
    proxy.is_offline = True
    wait_until(lambda: "finished 60 steps" in read_log(door.cwd))
    # Nothing may have been asked of it by then.
    wait_until(lambda: "cannot be reached" in read_log(door.cwd))
    assert process.poll() is None, "it waits until everything is there"
    assert machines.sealed_steps()[-1] < 60
    proxy.is_offline = False
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, (out, err)
    assert out.count("cannot be reached") == 1, out
    assert out.count("answers again") == 1, out
    assert machines.sealed_steps()[-1] == 60
    assert_same(door.the_run, reference.the_run, 60)


def test_no_network_at_the_end(door: Door, server: Server, proxy: Proxy, reference: Door) -> None:
    machines = Machines(door, server, proxy, "never")
    process = machines.start("remote.patience_seconds=2")
    wait_until(lambda: bool(machines.sealed_steps()))
    proxy.is_offline = True
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 5, (out, err)
    assert "step 60 is on this machine's disk alone" in err
    proxy.is_offline = False
    # The same command on the same machine sends the rest, and trains nothing.
    done = machines.run()
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert machines.sealed_steps()[-1] == 60


def read_log(cwd: Path) -> str:
    return "".join(path.read_text() for path in cwd.glob("outputs/*/*/logs/run.log"))
