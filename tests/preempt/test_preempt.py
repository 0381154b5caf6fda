"""What asks for a stop: each source raises one flag, in time, for the right reason; noise never does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preempt import aws, azure, deadline, gce, slurm
from runner.preempt.listen import Listener, listen_to_sources
from runner.preempt.metadata import MetadataClient, parse_time
from runner.preempt.notice import NoAnswer, Notice, Poll
from runner.preempt.preempt_options import (
    AutoDetect,
    Aws,
    Azure,
    Gce,
    NoticeSource,
    Preempt,
    SlurmJobEnd,
    parse_walltime,
)
from runner.preempt.signals import ECHO_SECONDS
from runner.preempt.stop import StopFlag, Stopped
from runner.rundir.layout import RunDir
from runner.rundir.process_age import measure_process_age
from tests.clouds import AWS, AZURE, GCE, MACHINE, NOISE, NOTICES, Clouds, clouds
from tests.conftest import REPO

NOW = 1_800_000_000.0
HANG_SECONDS = 60.0  # what takes longer hangs


def option(kind: str, url: str, timeout_seconds: float = HANG_SECONDS) -> NoticeSource:
    """A source that asks the stand-in."""
    quick = {"timeout_seconds": timeout_seconds, "poll_seconds": 0.01}
    options: dict[str, NoticeSource] = {
        "gce": Gce(url=url, wait_seconds=0.1, **quick),
        "aws": Aws(url=url, **quick),
        "azure": Azure(url=url, first_timeout_seconds=timeout_seconds, **quick),
    }
    return options[kind]


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def event(kind: str = "Preempt", *, at: str | None = None, machines: tuple[str, ...] = (MACHINE,), **other: Any) -> Any:
    at = formatdate(NOW + 60, usegmt=True) if at is None else at
    return {"EventType": kind, "EventStatus": "Scheduled", "Resources": list(machines), "NotBefore": at, **other}


def wait_until(what: Callable[[], object]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not what():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


# The flag


def test_the_first_reason_stays_and_the_nearest_deadline_counts() -> None:
    stop_flag = StopFlag()
    began = time.monotonic()
    stop_flag.request_stop("a", 100.0)
    stop_flag.request_stop("b", 10.0)
    stop_flag.request_stop("c", 50.0)
    stop_flag.request_stop("d")
    assert stop_flag.reason == "a"
    assert stop_flag.deadline is not None
    assert 10.0 <= stop_flag.deadline - began < 50.0


def test_a_wait_ends_with_the_result_or_with_a_stop() -> None:
    stop_flag = StopFlag()
    soon: Future[int] = Future()
    threading.Timer(0.05, soon.set_result, (7,)).start()
    assert stop_flag.wait_for(soon) == 7
    never: Future[int] = Future()
    threading.Timer(0.05, stop_flag.request_stop, ("stop",)).start()
    with pytest.raises(Stopped):
        stop_flag.wait_for(never)
    assert stop_flag.wait_for(soon) == 7, "work that is done is not thrown away"
    failed: Future[int] = Future()
    failed.set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        stop_flag.wait_for(failed)


def test_a_wish_is_granted_once() -> None:
    stop_flag = StopFlag()
    stop_flag.request_save("a hint")
    assert (stop_flag.pop_save_request(), stop_flag.pop_save_request(), stop_flag.reason) == ("a hint", None, None)


# Signals, each in a process of its own

SCRIPT = """
import hashlib, os, signal, sys, time
from runner.preempt.signals import listen_to_signals
from runner.preempt.stop import StopFlag
stop_flag = StopFlag()
"""
CHAINED = """
heard = []
signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
with listen_to_signals(stop_flag, ["USR2"], 30.0):
    os.kill(os.getpid(), signal.SIGUSR2)
    while stop_flag.reason is None: time.sleep(0.01)
    assert heard == [], "it is told when the state is saved, not before"
assert heard == [signal.SIGUSR2]
os.kill(os.getpid(), signal.SIGUSR2)
assert heard == [signal.SIGUSR2] * 2, "and it is back"
print("done")
"""
NOHUP = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with listen_to_signals(stop_flag, ["HUP", "USR1"], 30.0):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
    while stop_flag.reason is None: time.sleep(0.01)
    assert stop_flag.reason == "SIGUSR1"
assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
print("done")
"""
STUCK = """
with listen_to_signals(stop_flag, ["TERM", "HUP"], 30.0):
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize("script", [CHAINED, NOHUP], ids=["chained", "nohup"])
def test_handlers_of_others_are_respected(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script], cwd=REPO, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_second_signal_leaves_while_the_main_thread_is_inside_c() -> None:
    """One call that lasts half an hour and never comes back to the interpreter in between."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + STUCK], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGHUP)
        while "SIGHUP: saving" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(2 * ECHO_SECONDS)  # sooner it would count as the same wish
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM again: leaving at once" in err


# From an answer to a notice: pure


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("3h55m", 14100.0), ("90m", 5400.0), ("1d2h", 93600.0), ("45", 45.0), (7.5, 7.5), ("1d2h3m4s", 93784.0)],
)
def test_durations(said: str | float, seconds: float) -> None:
    assert parse_walltime(said) == seconds


@pytest.mark.parametrize("said", ["", "0", "h", "3x", "-5", "5m3h", "1.5h", "0m"])
def test_what_is_no_duration(said: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write it as"):
        Preempt(walltime=said)


def test_what_google_says() -> None:
    assert gce.parse_preempted("TRUE", NOW, 30.0) == Notice("GCE preemption", NOW + 30)
    assert gce.parse_maintenance("TERMINATE_ON_HOST_MAINTENANCE", NOW, 60.0) == Notice("GCE host maintenance", NOW + 60)
    for value in ("FALSE", "NONE", "MIGRATE_ON_HOST_MAINTENANCE", "", "true", "<html>TRUE</html>", "TRUETRUE"):
        assert gce.parse_preempted(value, NOW, 30.0) is None
        assert gce.parse_maintenance(value, NOW, 30.0) is None


@pytest.mark.parametrize(
    ("what", "at", "ends"),
    [
        ("terminate", NOW + 90, NOW + 90),
        ("stop", NOW + 90, NOW + 90),
        ("stop", NOW + 4000, NOW + 120),  # our clock is slow: no longer than is promised
        ("terminate", NOW - 5, None),  # our clock is fast, or it is overdue: nobody knows how long
        ("hibernate", NOW + 90, None),
    ],
)
def test_what_amazon_says(what: str, at: float, ends: float | None) -> None:
    said = json.dumps({"action": what, "time": iso(at)})
    assert aws.parse_action(said, NOW, 120.0) == Notice(f"EC2 spot {what}", ends)


def test_what_amazon_hints_at_is_not_final() -> None:
    hint = aws.parse_rebalance('{"noticeTime": "2026-10-10T17:02:00Z"}')
    assert hint == Notice("EC2 rebalance recommendation of 2026-10-10T17:02:00Z", is_final=False)


@pytest.mark.parametrize(
    "said",
    [
        '{"action": "terminate"}',
        '{"action": "dance", "time": "2026-10-10T17:02:00Z"}',
        "[]",
        "null",
        "",
        "{",
        "7",
        '{"action": ["stop"], "time": "2026-10-10T17:02:00Z"}',
        '{"action": "stop", "time": 5}',
        "[" * 100000,
    ],
)
def test_what_amazon_does_not_say(said: str) -> None:
    with pytest.raises(NoAnswer):
        aws.parse_action(said, NOW, 120.0)
    with pytest.raises(NoAnswer):
        aws.parse_rebalance(said)


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy"])
@pytest.mark.parametrize("written", ["rfc", "iso"])
def test_what_azure_says(kind: str, written: str) -> None:
    at = formatdate(NOW + 60, usegmt=True) if written == "rfc" else iso(NOW + 60)
    said = json.dumps({"Events": [event(kind, at=at)]})
    assert azure.find_first_end(said, MACHINE.upper(), NOW, 120.0) == Notice(f"Azure {kind}", NOW + 60, NOW - 60)


def test_azure_has_begun_or_comes_in_days() -> None:
    begun = json.dumps({"Events": [event(at="", EventStatus="Started"), event("Reboot")]})
    assert azure.find_first_end(begun, MACHINE, NOW, 120.0) == Notice("Azure Preempt", None, -120.0)
    overdue = json.dumps({"Events": [event(at=iso(NOW - 3))]})
    assert azure.find_first_end(overdue, MACHINE, NOW, 120.0) == Notice("Azure Preempt", None, NOW - 123)
    days = json.dumps({"Events": [event("Redeploy", at=iso(NOW + 7 * 86400)), event("Reboot", at=iso(NOW + 900))]})
    assert azure.find_first_end(days, MACHINE, NOW, 120.0) == Notice("Azure Reboot", NOW + 900, NOW + 780)


@pytest.mark.parametrize(
    "of_others",
    [event("Freeze"), event(machines=("vm-8", "vm")), event(EventStatus="Completed"), {}, 5, None, event(Resources=7)],
    ids=str,
)
def test_what_azure_says_to_others(of_others: Any) -> None:
    assert azure.find_first_end(json.dumps({"Events": [of_others]}), MACHINE, NOW, 120.0) is None


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"Events": {}}', '{"Events": null}', '{"Events": [{]}'])
def test_what_azure_does_not_say(said: str) -> None:
    with pytest.raises(NoAnswer):
        azure.find_first_end(said, MACHINE, NOW, 120.0)
    for at in ("soon", 5, None):
        with pytest.raises(NoAnswer):
            azure.find_first_end(json.dumps({"Events": [{**event(), "NotBefore": at}]}), MACHINE, NOW, 120.0)


def test_what_slurm_says() -> None:
    assert slurm.parse_job_end(f"{NOW + 300:.0f}\n", NOW, 120.0) == Notice(
        "the end of the Slurm job", NOW + 300, NOW + 180
    )
    assert slurm.parse_job_end(f"{NOW - 5:.0f}", NOW, 120.0) == Notice("the end of the Slurm job", None, NOW - 125)
    for said in (
        "N/A",
        "",
        "0",
        "-1",
        "1795254502\n1795254503",
        "2026-11-21T09:37:37",
        "09:48:22",
        "9" * 30,
        "१७९५२५४५०२",
    ):
        assert slurm.parse_job_end(said, NOW, 120.0) is None


def test_a_job_of_an_array_is_not_called_by_a_number_that_may_mean_all() -> None:
    assert slurm.own_job_id({}) is None
    assert slurm.own_job_id({"SLURM_JOB_ID": "7"}) == "7"
    assert slurm.own_job_id({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}) == "7_2"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*event(), "Events", "action", "time"]), inner),
)


@settings(max_examples=60, deadline=None)
@given(ANYTHING | st.builds(lambda inner: {"Events": [inner], "action": "stop", "noticeTime": inner}, ANYTHING))
def test_nothing_that_is_said_breaks_a_thread(said: object) -> None:
    text = json.dumps(said)
    for read in (
        lambda: aws.parse_action(text, NOW, 120.0),
        lambda: aws.parse_rebalance(text),
        lambda: azure.find_first_end(text, MACHINE, NOW, 120.0),
        lambda: gce.parse_preempted(text, NOW, 30.0),
        lambda: slurm.parse_job_end(text, NOW, 120.0),
    ):
        try:
            read()
        except NoAnswer:
            continue


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9]{1,6}-[0-9]{2}-[0-9]{2}T[0-9:.Z+-]{1,12}") | st.none() | st.integers())
def test_no_time_breaks_a_thread(said: object) -> None:
    assert isinstance(parse_time(said), float | None)


# Against the stand-in

HAPPENS = {"preempted": "gce", "maintenance": "gce", "taken": "aws", "hint": "aws", "evicted": "azure"}


def happens(what: str) -> tuple[dict[str, Any], str]:
    """News for the stand-in, and what a run says about them."""
    soon = time.time() + 60
    return {
        "preempted": ({"preempted": "TRUE"}, "GCE preemption"),
        "maintenance": ({"maintenance": "TERMINATE_ON_HOST_MAINTENANCE"}, "GCE host maintenance"),
        "taken": ({"action": {"action": "terminate", "time": iso(soon)}}, "EC2 spot terminate"),
        "hint": ({"rebalance": {"noticeTime": iso(NOW)}}, f"EC2 rebalance recommendation of {iso(NOW)}"),
        "evicted": ({"events": [event(at=formatdate(soon, usegmt=True))]}, "Azure Preempt"),
    }[what]


def heard(source: NoticeSource) -> Iterator[Notice | None]:
    """What each of a source's polls is answered, once."""
    for poll in source.polls():
        yield poll.ask()


@pytest.mark.parametrize("what", HAPPENS)
def test_a_notice_is_heard_and_quiet_is_quiet(what: str) -> None:
    kind, (news, reason) = HAPPENS[what], happens(what)
    with clouds() as world:
        assert list(heard(option(kind, world.url))) in ([None], [None, None])
        world.say(**news)
        notices = [notice for notice in heard(option(kind, world.url)) if notice]
    assert [(notice.reason, notice.is_final) for notice in notices] == [(reason, what != "hint")]
    if what != "hint":
        assert notices[0].ends_at is not None
        assert 0 < notices[0].ends_at - time.time() <= 120


def test_a_live_migration_is_no_notice() -> None:
    with clouds(maintenance="MIGRATE_ON_HOST_MAINTENANCE") as world:
        assert list(heard(option("gce", world.url))) == [None, None]


def is_quiet(ask: Callable[[], Notice | None]) -> bool:
    """Whether the answer came in time, and is that nothing happens."""
    try:
        return ask() is None
    except NoAnswer:
        return False


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("kind", ["gce", "aws", "azure"])
def test_noise_is_never_a_notice(kind: str, noise: str) -> None:
    """From the first request on, and again after things went well: with a token, a name and a version known."""
    with clouds(longest_wait=0.0) as world:
        for warm in (False, True):
            for poll in option(kind, world.url, 0.1).polls():
                if warm:
                    world.say(noise=())
                    wait_until(lambda ask=poll.ask: is_quiet(ask))
                world.say(noise=(noise,), quiet=0)
                for _ in range(3):
                    try:
                        assert poll.ask() is None
                    except NoAnswer:
                        continue
        assert sum(world.made.values()) >= 3
        assert not any(path.startswith("/escaped") for path in world.seen), "a redirect was followed"


def test_the_noise_would_be_a_notice_without_care() -> None:
    """What is in it: else the test above would prove nothing."""
    assert gce.parse_preempted(NOTICES[GCE], NOW, 30.0)
    assert aws.parse_action(NOTICES[AWS], NOW, 120.0)
    assert azure.find_first_end(NOTICES[AZURE], MACHINE, NOW, 120.0)


def test_who_does_not_say_that_he_is_google_is_not_believed() -> None:
    with clouds(preempted="TRUE", maintenance="TERMINATE_ON_HOST_MAINTENANCE", flavor="Vanilla") as world:
        for poll in option("gce", world.url).polls():
            with pytest.raises(NoAnswer):
                poll.ask()


def test_nobody_there_is_no_notice() -> None:
    with clouds() as world:
        gone = world.url
    for kind in ("gce", "aws", "azure"):
        for poll in option(kind, gone).polls():
            with pytest.raises(NoAnswer):
                poll.ask()


def test_a_token_is_renewed_when_it_is_refused() -> None:
    with clouds(token_uses=3) as world:
        (poll,) = option("aws", world.url).polls()
        assert [poll.ask() for _ in range(6)] == [None] * 6
        assert world.seen["/latest/api/token"] == 4, "twelve documents, three with each token"


def test_a_change_is_awaited_and_not_asked_for_again_and_again() -> None:
    with clouds() as world:
        preempted, _ = Gce(url=world.url, wait_seconds=600.0).polls()
        assert preempted.ask() is None
        threading.Timer(0.2, world.say, kwargs={"preempted": "TRUE"}).start()
        notice = preempted.ask()
        assert notice is not None
        assert notice.reason == "GCE preemption"
        assert world.seen[GCE + "preempted"] == 2


def test_the_first_answer_of_azure_may_be_slow() -> None:
    with clouds(seconds=0.8) as world:
        patient = Azure(url=world.url, timeout_seconds=0.3, first_timeout_seconds=HANG_SECONDS)
        (poll,) = patient.polls()
        assert poll.ask() is None
        world.say(seconds=0.8)
        with pytest.raises(NoAnswer):
            poll.ask()


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with clouds() as world, clouds(preempted="TRUE") as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert MetadataClient(world.url, 5.0).request(GCE + "preempted", {"Metadata-Flavor": "Google"}).text == "FALSE"
        assert not proxy.seen


# Slurm, with a squeue of our own


def plant_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A squeue that writes down how it was called."""
    calls, program = folder / "calls", folder / "squeue"
    program.write_text(f'#!/bin/sh\necho "$SLURM_TIME_FORMAT $*" >> {calls}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_squeue_is_asked_for_the_end_of_this_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = int(time.time()) + 1000
    calls = plant_squeue(tmp_path, monkeypatch, f"echo {ends}")
    (notice,) = heard(SlurmJobEnd())
    assert notice == Notice("the end of the Slurm job", float(ends), ends - 120.0)
    assert calls.read_text() == "%s --noheader --jobs=12 --format=%e\n"


@pytest.mark.parametrize(
    "script", ["echo N/A", "echo 12345 >&2; exit 1", "sleep 60", "echo '1795254502 x'", "printf '\\377'"], ids=str
)
def test_a_squeue_that_does_not_know_is_no_notice(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_squeue(tmp_path, monkeypatch, script)
    (poll,) = SlurmJobEnd(timeout_seconds=1.0).polls()
    try:
        assert poll.ask() is None
    except NoAnswer:
        assert script != "echo N/A"
        monkeypatch.setenv("SLURM_JOB_END_TIME", "1795254502")
        notice = poll.ask()
        assert notice is not None
        assert notice.act_at == 1795254502 - 120, "newer Slurms have told it at the beginning"


def test_outside_a_job_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert SlurmJobEnd().polls() == []


# Which machine this is

FIRMWARE: dict[str, dict[str, str]] = {
    "gce": {"sys_vendor": "Google", "product_name": "Google Compute Engine", "bios_vendor": "Google"},
    "aws": {"sys_vendor": "Amazon EC2", "product_name": "g5.xlarge", "board_asset_tag": "i-0123456789abcdef0"},
    "azure": {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77"},
}


def write_firmware(folder: Path, says: Mapping[str, str]) -> Path:
    folder.mkdir()
    for name, value in says.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def kinds_detected(dmi: Path, environment: Mapping[str, str]) -> list[str]:
    return [source.kind for source in AutoDetect(dmi=str(dmi)).detect(environment)]


@pytest.mark.parametrize("kind", FIRMWARE)
def test_the_firmware_tells_which_cloud_it_is(kind: str, tmp_path: Path) -> None:
    assert kinds_detected(write_firmware(tmp_path / "dmi", FIRMWARE[kind]), {}) == [kind]


@pytest.mark.parametrize(
    "says",
    [
        {},
        {"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"},
        {"sys_vendor": "Dell Inc."},
        {"sys_vendor": "Google", "product_name": "Pixelbook"},
    ],
    ids=str,
)
def test_elsewhere_nobody_is_asked(says: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert AutoDetect(dmi=str(write_firmware(tmp_path / "dmi", says))).polls() == []
    assert kinds_detected(tmp_path / "nowhere", {"SLURM_JOB_ID": "5"}) == ["slurm"]


def test_starting_to_listen_imports_nothing_that_asks() -> None:
    code = "import runner.preempt.listen, sys; print(sorted({'http.client', 'email', 'json'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    without = subprocess.run(
        [sys.executable, "-c", code.replace("runner.preempt.listen", "runner.rundir.layout")],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.stdout == without.stdout != "", done.stderr


def test_the_shortest_notice() -> None:
    sigterm = 30.0, "SIGTERM (preempt.notice_seconds)"
    assert Preempt().shortest_notice == sigterm
    assert Preempt(notices={"auto": AutoDetect()}).shortest_notice == sigterm
    assert Preempt(notices={"aws": Aws()}).shortest_notice == sigterm
    assert Preempt(signals=["INT"]).shortest_notice == sigterm
    assert Preempt(signals=["INT"], notices={"auto": AutoDetect()}).shortest_notice == sigterm
    spot = Preempt(notice_seconds=600.0, notices={"aws": Aws(), "slurm": SlurmJobEnd(lead_seconds=300.0)})
    assert spot.shortest_notice == (120.0, "aws (preempt.notices.aws.notice_seconds)")
    assert replace(spot, notices={"gce": Gce()}).shortest_notice[0] == 30.0
    assert Preempt(signals=["INT"], notices={"slurm": SlurmJobEnd()}).shortest_notice[0] == 120.0


# All together


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    place = RunDir(tmp_path / "run")
    place.logs.mkdir(parents=True)
    return place


def listening_to(source: NoticeSource) -> Preempt:
    return Preempt(notices={source.kind: source}, stop_file=False)


@pytest.mark.parametrize("what", HAPPENS)
def test_a_source_raises_the_flag(what: str, run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    kind, (news, reason) = HAPPENS[what], happens(what)
    stop_flag = StopFlag()
    wishes: list[str] = []
    with clouds() as world, listen_to_sources(listening_to(option(kind, world.url)), run, stop_flag, time.time()):
        wait_until(lambda: len(world.seen) > 1)
        assert stop_flag.reason is None
        world.say(**news)
        if what == "hint":
            wait_until(lambda: wishes.extend(filter(None, [stop_flag.pop_save_request()])) or wishes)
            asked = world.seen["/latest/meta-data/events/recommendations/rebalance"]
            wait_until(lambda: world.seen["/latest/meta-data/events/recommendations/rebalance"] > asked + 5)
            assert (stop_flag.pop_save_request(), stop_flag.reason, wishes) == (None, None, [reason]), (
                "once for each hint"
            )
        else:
            wait_until(lambda: stop_flag.reason)
            assert stop_flag.reason == reason
            assert stop_flag.pop_save_request() is None
            assert stop_flag.deadline is not None
            assert 0 < stop_flag.deadline - time.monotonic() <= 120
    assert run.log.read_text().count(reason) == 1
    assert capfd.readouterr().err.count(reason) == 1


def test_what_is_far_off_is_acted_on_when_it_is_due(run: RunDir) -> None:
    stop_flag = StopFlag()
    with clouds(events=[event("Redeploy", at=formatdate(time.time() + 3, usegmt=True))]) as world:
        source = Azure(url=world.url, lead_seconds=1.0, poll_seconds=600.0)
        with listen_to_sources(listening_to(source), run, stop_flag, time.time()):
            wait_until(lambda: world.seen["/metadata/scheduledevents"])
            assert stop_flag.reason is None
            wait_until(lambda: stop_flag.reason)  # though the next poll was ten minutes away
            assert stop_flag.reason == "Azure Redeploy"


def test_the_end_of_a_wait_is_not_waited_for(run: RunDir) -> None:
    """A run that ends leaves no thread behind, though a poll may wait for ten minutes."""
    before = set(threading.enumerate())
    with clouds() as world:
        with listen_to_sources(listening_to(Gce(url=world.url, wait_seconds=600.0)), run, StopFlag(), time.time()):
            wait_until(lambda: world.seen[GCE + "preempted"] == world.seen[GCE + "maintenance-event"] == 2)
            mine = [thread for thread in threading.enumerate() if thread.name == "gce" and thread not in before]
            assert len(mine) == 2
        for thread in mine:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
    assert not run.log.exists(), "and nothing is said about it"


def test_a_service_that_is_silent_is_told_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.preempt.listen.LONGEST_PAUSE", 0.01)
    stop_flag = StopFlag()
    with clouds(noise=("503",), quiet=0) as world:
        with listen_to_sources(listening_to(option("gce", world.url)), run, stop_flag, time.time()):
            wait_until(lambda: sum(world.made.values()) > 60)
            world.say(noise=(), preempted="TRUE")
            wait_until(lambda: stop_flag.reason)  # it went on asking
    lines = run.log.read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("preempt.notices.gce says nothing ('status 503'); it is asked again, quietly")


def test_a_silent_service_is_asked_ever_more_seldom(run: RunDir) -> None:
    with clouds(noise=("503",), quiet=0) as world:
        with listen_to_sources(
            listening_to(replace(option("aws", world.url), poll_seconds=0.05)), run, StopFlag(), time.time()
        ):
            time.sleep(1.0)
        assert 2 <= sum(world.made.values()) <= 6, "0, 0.1, 0.3, 0.7, 1.5 s"


def test_a_stop_file_stops_and_is_taken_away_when_it_has(run: RunDir) -> None:
    stop_flag = StopFlag()
    with listen_to_sources(Preempt(), run, stop_flag, time.time()):
        assert stop_flag.reason is None
        run.stop.touch()
        wait_until(lambda: stop_flag.reason)
        assert stop_flag.reason == "STOP file"
        assert stop_flag.deadline is None
        assert run.stop.exists(), "a kill before the save must not lose the request"
    assert not run.stop.exists()


def test_a_stop_file_that_was_there_before_counts(run: RunDir) -> None:
    run.stop.touch()
    stop_flag = StopFlag()
    with listen_to_sources(Preempt(), run, stop_flag, time.time()):
        wait_until(lambda: stop_flag.reason)
    assert not run.stop.exists()
    run.stop.touch()
    with listen_to_sources(Preempt(stop_file=False), run, StopFlag(), time.time()):
        pass
    assert run.stop.exists(), "not ours where it is not wanted"


def test_a_folder_called_stop_asks_for_nothing(run: RunDir) -> None:
    """It could not be removed afterwards, and every attempt from then on would stop at once."""
    run.stop.mkdir()
    stop_flag = StopFlag()
    with listen_to_sources(Preempt(), run, stop_flag, time.time()):
        time.sleep(0.3)
        assert stop_flag.reason is None
    assert run.stop.is_dir()


def test_walltime_counts_from_the_start_of_the_process(run: RunDir) -> None:
    stop_flag, began = StopFlag(), time.time()
    with listen_to_sources(Preempt(walltime="10"), run, stop_flag, began - 9.5):
        assert stop_flag.reason is None
        wait_until(lambda: stop_flag.reason)
        assert time.time() - began >= 0.5
    assert (stop_flag.reason, stop_flag.deadline) == ("walltime 10", None)


def test_a_clock_that_is_set_back_puts_no_notice_off(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm and Azure say when by the clock: by one of yesterday that would be tomorrow."""
    stop_flag, real = StopFlag(), time.time
    notice = Notice("the end of the job", real() + 30.0, real() + 0.3)
    listener = Listener(stop_flag, run)

    def ask() -> Notice:
        # From the first answer on.
        monkeypatch.setattr(time, "time", lambda: real() - 86400.0) if listener.polls else listener.polls.append(poll)
        return notice

    poll = Poll(ask, 0.01)
    thread = threading.Thread(target=listener._poll, args=("slurm", poll))
    thread.start()
    wait_until(lambda: stop_flag.reason)
    listener.over.set()
    thread.join()
    assert stop_flag.deadline is not None
    assert stop_flag.deadline - time.monotonic() <= 30.0


@pytest.mark.parametrize("passed", [-86400.0 * 3650, 86400.0 * 3650])
def test_walltime_is_no_matter_of_the_clock(passed: float, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was set between the start of the process and now: a day of walltime is neither over nor endless."""
    began, real, over = time.time(), time.time, threading.Event()
    monkeypatch.setattr(time, "time", lambda: real() + passed)
    pauses: list[float] = []
    monkeypatch.setattr(over, "wait", lambda pause: pauses.append(pause) or True)
    listener = Listener(StopFlag(), run, over)
    listener.watch_file_and_clock(Preempt(walltime="1d", stop_file=False), began)
    age = measure_process_age() if passed > 0 else 0.0
    assert 86400.0 - pauses[0] == pytest.approx(age, abs=60.0)
    assert listener.stop_flag.reason is None


def test_time_is_up_also_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(deadline.os, "_exit", codes.append)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    deadline.end_process(75, fail)
    assert codes == [75]
    assert "how the attempt ended could not be written down: OSError" in capsys.readouterr().err


def test_nothing_listens_where_nothing_was_chosen(run: RunDir) -> None:
    before = threading.active_count()
    with listen_to_sources(Preempt(stop_file=False), run, StopFlag(), time.time()):
        assert threading.active_count() == before


@pytest.mark.parametrize("kind", FIRMWARE)
def test_auto_listens_to_the_machine_it_is_on(kind: str, run: RunDir, tmp_path: Path) -> None:
    news, reason = happens({"gce": "preempted", "aws": "taken", "azure": "evicted"}[kind])
    folder, stop_flag = write_firmware(tmp_path / "dmi", FIRMWARE[kind]), StopFlag()
    with clouds(**news) as world:
        with listen_to_sources(listening_to(AutoDetect(dmi=str(folder), url=world.url)), run, stop_flag, time.time()):
            wait_until(lambda: stop_flag.reason)
    assert stop_flag.reason == reason


def test_the_stand_in_is_strict() -> None:
    def status(world: Clouds, path: str, headers: dict[str, str], method: str = "GET") -> int:
        return MetadataClient(world.url, 5.0).request(path, headers, method).status

    token = "X-aws-ec2-metadata-token"
    with clouds() as world:
        assert status(world, GCE + "preempted", {}) == 403
        assert status(world, GCE + "preempted", {"Metadata-Flavor": "Google", "X-Forwarded-For": "1.2.3.4"}) == 403
        assert status(world, "/latest/api/token", {f"{token}-ttl-seconds": "21601"}, "PUT") == 400
        assert status(world, "/latest/api/token", {f"{token}-ttl-seconds": "60"}) == 403
        assert status(world, aws.ACTION, {}) == 401
        assert status(world, aws.ACTION, {token: "guess"}) == 401
        assert status(world, azure.EVENTS, {}) == 400
        assert status(world, azure.EVENTS.partition("?")[0], {"Metadata": "true"}) == 400


def test_a_short_slurm_job_does_not_stop_as_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of a minute and a lead of two: it would be requeued for ever."""
    now = time.time()
    ends = [now + 60, now + 60, now + 25]
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(slurm, "_read_end", lambda name, timeout: f"{ends.pop(0):.0f}\n")
    (poll,) = slurm.poll_slurm(SlurmJobEnd(lead_seconds=120.0))
    notices = [poll.ask() for _ in range(3)]
    assert all(notice is not None for notice in notices)
    assert [round(notice.act_at - now) for notice in notices if notice] == pytest.approx([30, 30, -5], abs=2)


def test_slurm_repeats_itself_and_only_a_person_hurries() -> None:
    code = (
        "import os, signal, time\n"
        "from runner.preempt.signals import ECHO_SECONDS, listen_to_signals\n"
        "from runner.preempt.stop import StopFlag\n"
        "with listen_to_signals(StopFlag(), ['TERM', 'INT'], 30.0):\n"
        "    for number in (signal.SIGTERM, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "        time.sleep(2 * ECHO_SECONDS)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
    )
    for job, number, said in (("17", signal.SIGINT, "still here"), (None, signal.SIGTERM, "")):
        environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
        environment |= {"SLURM_JOB_ID": job} if job else {}
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (128 + number, said), done.stderr


def test_the_death_of_a_parent_is_one_request_however_often_it_is_told() -> None:
    """The kernel tells it once more for each thread of the parent that was gone later."""
    child = (
        "import os, signal, time\n"
        "from runner.preempt.signals import ECHO_SECONDS, listen_to_signals\n"
        "from runner.preempt.stop import StopFlag\n"
        "with listen_to_signals(StopFlag(), ['TERM'], 30.0):\n"
        "    print('listens', flush=True)\n"
        "    parent = os.getppid()\n"
        "    while os.getppid() == parent:\n"
        "        time.sleep(0.01)\n"
        "    for number in (signal.SIGTERM, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "        time.sleep(2 * ECHO_SECONDS)\n"
        "    print('still here', flush=True)\n"
    )
    parent = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nsys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "listens\n"
    process.kill()
    # Its output is the child's as well, and ends with it.
    assert process.stdout.read() == "still here\n"
    process.wait()
    process.stdin.close()
