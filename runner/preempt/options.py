"""Requests to stop. Every source only raises one flag; the loop acts on it at a step boundary.

The options are here, free of anything heavy; what listens is beside: signals.py, and sources.py with a file for each
machine that gives notice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

if TYPE_CHECKING:
    from runner.preempt.metadata import Poll

Signal = Literal["TERM", "INT", "USR1", "USR2", "HUP"]
Seconds = Annotated[float, Gt(0.0)]
STOP_FILE = "STOP file"  # the reason of a stop that somebody asked for by `touch RUN/STOP`
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
SERVICE = "http://169.254.169.254"  # where a machine in a cloud asks about itself; each of the three answers there


def parse_duration(duration: str | float) -> float:
    """Seconds of `3h55m`, `90m`, `1d2h` or a plain number. Raises ValueError, with what is expected."""
    text = str(duration).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return float(text)
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    total = (
        sum(int(count) * UNITS[unit] for count, unit in zip(parts.groups(), "dhms", strict=True) if count)
        if parts
        else 0
    )
    if not total:
        raise ValueError(f"walltime={text} is no duration; write it as 3h55m, 90m, 1d2h or seconds")
    return float(total)


def _check_url(url: str) -> None:
    address = re.fullmatch(r"http://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?(/\S*)?", url)
    if not address or int(address[2] or 80) > 65535:
        raise ValueError(f"url={url} is no address; write it as http://HOST or http://HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class Gce:
    """On Google Compute Engine: spot machines are preempted 30 s after the notice, or taken down for maintenance.

    `preempted_seconds`: 120 more where the machine was made with a preemption notice duration. `maintenance_seconds`:
    3600 on machines with GPUs. The service is asked once and answers when something changes, after `wait_seconds` at
    the latest.
    """

    kind: Literal["gce"] = "gce"
    url: str = SERVICE
    preempted_seconds: Seconds = 30.0
    maintenance_seconds: Seconds = 60.0
    wait_seconds: Seconds = 60.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 1.0

    def __post_init__(self) -> None:
        _check_url(self.url)

    @property
    def shortest_notice(self) -> tuple[float, str] | None:
        return min((self.preempted_seconds, "preempted_seconds"), (self.maintenance_seconds, "maintenance_seconds"))

    def polls(self) -> list[Poll]:
        from runner.preempt import gce

        return gce.poll_gce(self)


@dataclass(frozen=True, kw_only=True)
class Aws:
    """On Amazon EC2: spot machines are told two minutes ahead; at a hint (rebalance) the run saves and goes on."""

    kind: Literal["aws"] = "aws"
    url: str = SERVICE
    notice_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 5.0

    def __post_init__(self) -> None:
        _check_url(self.url)

    @property
    def shortest_notice(self) -> tuple[float, str] | None:
        return self.notice_seconds, "notice_seconds"

    def polls(self) -> list[Poll]:
        from runner.preempt import aws

        return aws.poll_aws(self)


@dataclass(frozen=True, kw_only=True)
class Azure:
    """On Microsoft Azure: spot machines are told at least 30 s ahead, others up to days: the run goes on until
    `lead_seconds` before.

    `machine`: the name of the machine as events call it, if not what the service says. The first answer may take two
    minutes: `first_timeout_seconds`.
    """

    kind: Literal["azure"] = "azure"
    url: str = SERVICE
    machine: str | None = None
    notice_seconds: Seconds = 30.0
    lead_seconds: Seconds = 120.0
    first_timeout_seconds: Seconds = 150.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 5.0

    def __post_init__(self) -> None:
        _check_url(self.url)

    @property
    def shortest_notice(self) -> tuple[float, str] | None:
        return min((self.notice_seconds, "notice_seconds"), (self.lead_seconds, "lead_seconds"))

    def polls(self) -> list[Poll]:
        from runner.preempt import azure

        return azure.poll_azure(self)


@dataclass(frozen=True, kw_only=True)
class SlurmJobEnd:
    """In a Slurm job: stop `lead_seconds` before its end, be that its time limit or a preemption with GraceTime.

    Outside a job it does nothing. The end is read again every `poll_seconds`; no faster, since the answer comes from
    the one controller of a whole cluster. A GraceTime that is shorter than that may be missed.
    """

    kind: Literal["slurm"] = "slurm"
    lead_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 20.0
    poll_seconds: Seconds = 30.0

    @property
    def shortest_notice(self) -> tuple[float, str] | None:
        return self.lead_seconds, "lead_seconds"

    def polls(self) -> list[Poll]:
        from runner.preempt import slurm

        return slurm.poll_slurm(self)


@dataclass(frozen=True, kw_only=True)
class AutoDetect:
    """Anywhere: finds out which of the others apply, from the firmware and the environment; elsewhere asks nobody.

    `dmi`: where the firmware's names are; `url`: where the machine's service is, if not at the usual address.
    """

    kind: Literal["auto"] = "auto"
    dmi: str = "/sys/class/dmi/id"
    url: str = SERVICE

    def __post_init__(self) -> None:
        _check_url(self.url)

    @property
    def shortest_notice(self) -> tuple[float, str] | None:
        return None  # not known before the machine is

    def polls(self) -> list[Poll]:
        from runner.preempt import machine

        every = (Gce(url=self.url), Aws(url=self.url), Azure(url=self.url), SlurmJobEnd())
        here = machine.here(self.dmi)
        return [poll for source in every if source.kind in here for poll in source.polls()]


NoticeSource = Gce | Aws | Azure | SlurmJobEnd | AutoDetect


@dataclass(frozen=True, kw_only=True)
class Preempt:
    """What asks the run to save and stop: signals, the file RUN/STOP, a time limit, and notices of the machine.

    `notice_seconds` is how long the machine leaves between SIGTERM and SIGKILL; `walltime` counts from the start of
    the process.
    """

    signals: list[Signal] = field(default_factory=lambda: ["TERM", "INT", "USR1", "USR2", "HUP"])
    notice_seconds: Seconds = 30.0
    stop_file: bool = True
    walltime: str | Seconds | None = None
    notices: Mapping[str, NoticeSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.walltime is not None:
            parse_duration(self.walltime)

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """The fewest seconds that any source leaves, and its name."""
        notices = [(name, source.shortest_notice) for name, source in self.notices.items()]
        known = [(said[0], f"{name} (preempt.notices.{name}.{said[1]})") for name, said in notices if said]
        if "TERM" in self.signals or not known:
            known.append((self.notice_seconds, "SIGTERM (preempt.notice_seconds)"))
        return min(known)
