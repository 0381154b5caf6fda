"""The law: what asks a real run to stop stops it in time and for good reason; noise never does.

A cloud is tests/clouds.py on a port of this machine; the run is the one that others start too, only that its steps take
longer, so that what happens surely falls into them.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from tests.clouds import AWS, AZURE, GCE, MACHINE, NOISE, Clouds, clouds
from tests.conftest import SMALL, Door, assert_same, last_logged, plant
from tests.preempt.test_preempt import FIRMWARE, write_firmware

pytestmark = pytest.mark.forked

RUN = (*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=7")
SLOW_STEPS = """
import time
import runner.train.loop as module
original = module.PendingSteps.add
def slow(self, step, metrics):
    original(self, step, metrics)
    time.sleep(0.05)
module.PendingSteps.add = slow
"""
HELD = """
import os, time
import runner.train.loop as module
original = module.PendingSteps.add
def held(self, step, metrics):
    original(self, step, metrics)
    while step == 30 and not os.path.exists("{gate}"):
        time.sleep(0.01)
module.PendingSteps.add = held
"""
IN_A_DAY = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86400))


def soon(kind: str, resources: str = MACHINE) -> dict[str, Any]:
    at = formatdate(time.time() + 60, usegmt=True)
    return {"EventType": kind, "EventStatus": "Scheduled", "Resources": [resources], "NotBefore": at}


def spot(action: str) -> dict[str, str]:
    return {"action": action, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 100))}


@pytest.fixture(scope="session")
def reference(untouched: Callable[..., Door]) -> Door:
    return untouched(*RUN)


def asking(kind: str, world: Clouds, **settings: float) -> list[str]:
    """A run that listens to this stand-in."""
    values = {"url": world.url, "poll_seconds": 0.01, **settings}
    return [f"preempt=[signals,{kind}]", *(f"preempt.notices.{kind}.{name}={value}" for name, value in values.items())]


def until_step(process: subprocess.Popen[str], door: Door, step: int) -> None:
    while last_logged(door.cwd) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def stopped(process: subprocess.Popen[str], door: Door, reason: str) -> str:
    """Assert that the run ends, saved, for this reason; what it said."""
    out, err = process.communicate()
    assert process.returncode == 75, (process.returncode, out, err)
    assert f"stopped by {reason} at step" in out
    status = json.loads((door.the_run / "status.json").read_text())
    assert (status["state"], status["why"]) == ("preempted", reason)
    line = json.loads((door.the_run / "attempts.jsonl").read_text().splitlines()[-1])
    assert (line["ending"], line["lost_steps"], line["to_step"]) == ("preempted", 0, status["step"])
    assert not status["step"] or (door.the_run / "checkpoints" / str(status["step"])).is_dir()
    return err


NOT_YET = [soon("Freeze"), soon("Preempt", "vm-8"), {**soon("Redeploy"), "NotBefore": IN_A_DAY}]
HAPPENS: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
    "preempted": ("gce", lambda: {"preempted": "TRUE"}, "GCE preemption"),
    "spot action": ("aws", lambda: {"action": spot("stop")}, "EC2 spot stop"),
    "scheduled event": ("azure", lambda: {"events": [*NOT_YET, soon("Preempt")]}, "Azure Preempt"),
}


@pytest.mark.parametrize(
    "what", ["preempted", *(pytest.param(each, marks=pytest.mark.slow) for each in HAPPENS if each != "preempted")]
)
def test_a_notice_saves_stops_and_loses_nothing(what: str, door: Door, reference: Door, tmp_path: Path) -> None:
    kind, news, reason = HAPPENS[what]
    with clouds(events=NOT_YET) as world:
        process = door.start(*RUN, *asking(kind, world), **plant(tmp_path, SLOW_STEPS))
        until_step(process, door, 15)
        world.say(**news())
        err = stopped(process, door, reason)
        assert f"{reason}: saving at the next step boundary, then stopping; " in err
        assert " s are left" in err
        step = json.loads((door.the_run / "status.json").read_text())["step"]
        assert 15 <= step < 60
        world.say(preempted="FALSE", action=None, events=[])
        done = door.run(*RUN, *asking(kind, world))
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, reference.the_run, 60)


def test_a_run_full_of_noise_ends_as_if_it_were_quiet(door: Door, reference: Door, tmp_path: Path) -> None:
    """Three clouds at once, each wrong in every way there is, during one run."""
    everyone = {(room, fault) for room in (GCE, AWS, AZURE) for fault in NOISE}
    with clouds(noise=NOISE, longest_wait=0.02) as world:
        patience = {"timeout_seconds": 0.1}
        settings = [setting for kind in ("gce", "aws", "azure") for setting in asking(kind, world, **patience)[1:]]
        settings += ["preempt=[signals,gce,aws,azure]", "preempt.notices.azure.first_timeout_seconds=0.1"]
        process = door.start(*RUN, *settings, **plant(tmp_path, HELD.format(gate=tmp_path / "gate")))
        while everyone - set(world.made):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        (tmp_path / "gate").touch()
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "stopped by" not in out
    log = (door.the_run / "logs/run.log").read_text()
    assert "saving at the next step boundary" not in log
    assert "Traceback" not in log
    assert log.count("says nothing") <= 3, "once for each"
    assert_same(door.the_run, reference.the_run, 60)


def test_a_hint_saves_and_training_goes_on(door: Door, reference: Door, tmp_path: Path) -> None:
    with clouds() as world:
        process = door.start(
            *RUN, "retention=all", "preempt=[signals,aws]", *asking("aws", world)[1:], **plant(tmp_path, SLOW_STEPS)
        )
        until_step(process, door, 15)
        world.say(rebalance={"noticeTime": "2026-10-10T17:02:00Z"})
        out, err = process.communicate()
    assert process.returncode == 0, (out, err)
    reason = "EC2 rebalance recommendation of 2026-10-10T17:02:00Z"
    assert err.count(f"{reason}: saving at the next step boundary, then going on") == 1
    sidecars = sorted((door.the_run / "checkpoints").glob("[0-9]*/holdfast.json"))
    hinted = [path for path in sidecars if json.loads(path.read_text())["reason"] == reason]
    assert len(hinted) == 1
    assert_same(door.the_run, reference.the_run, 60)


def test_a_stop_file_stops_once(door: Door, reference: Door, tmp_path: Path) -> None:
    process = door.start(*RUN, **plant(tmp_path, SLOW_STEPS))
    until_step(process, door, 15)
    stop = door.the_run / "STOP"
    stop.touch()
    stopped(process, door, "STOP file")
    assert not stop.exists()
    stop.touch()  # while nothing runs: it is to rest
    with lock_run(RunDir(door.the_run)):
        assert door.run(*RUN).returncode == 3
    assert stop.exists(), "a process that has not the run leaves it alone"
    stopped(door.start(*RUN), door, "STOP file")
    assert not stop.exists()
    done = door.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, reference.the_run, 60)


def test_walltime_stops_in_time(door: Door, reference: Door, tmp_path: Path) -> None:
    planted = SLOW_STEPS.replace("0.05", "0.2")
    began = time.time()
    process = door.start(*RUN, "preempt.walltime=5s", **plant(tmp_path, planted))
    stopped(process, door, "walltime 5s")
    assert time.time() - began >= 5
    done = door.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, reference.the_run, 60)


def test_auto_finds_its_cloud(door: Door, tmp_path: Path) -> None:
    dmi = write_firmware(tmp_path / "dmi", FIRMWARE["gce"])
    with clouds() as world:
        process = door.start(
            *RUN,
            "preempt=auto",
            *(f"preempt.notices.auto.url={world.url}", f"preempt.notices.auto.dmi={dmi}"),
            **plant(tmp_path, SLOW_STEPS),
        )
        until_step(process, door, 5)
        world.say(maintenance="TERMINATE_ON_HOST_MAINTENANCE")
        stopped(process, door, "GCE host maintenance")


def test_the_end_of_a_slurm_job_stops_before_it(door: Door, tmp_path: Path) -> None:
    """The end moves as it does when another job takes the place: from far off to near."""
    ends, program = tmp_path / "ends", tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {ends}\n")
    program.chmod(0o755)
    ends.write_text(f"{time.time() + 3600:.0f}")
    process = door.start(
        *RUN,
        *("preempt=[signals,slurm]", "preempt.notices.slurm.poll_seconds=0.05"),
        PATH=f"{program.parent}:/usr/bin:/bin",
        SLURM_JOB_ID="17",
        **plant(tmp_path, SLOW_STEPS),
    )
    until_step(process, door, 15)
    replacement = tmp_path / "fresh"
    replacement.write_text(f"{time.time() + 60:.0f}")
    replacement.replace(ends)
    stopped(process, door, "the end of the Slurm job")
