"""What may ask a run to stop, as options. Every source only sets one flag; the loop acts on it at a step boundary.

The options are free of anything heavy. What listens is beside them: signals.py, and listen.py with a module for each
machine that gives notice. To add such a source: its module with a function that returns its polls, its option here
(also in the union `NoticeSource`), a YAML in conf/preempt/, and a test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from annotated_types import Gt

from runner.preempt.machine import Machine

if TYPE_CHECKING:
    from runner.preempt.notice import Poll

Signal = Literal["TERM", "INT", "USR1", "USR2", "HUP"]
Seconds = Annotated[float, Gt(0.0)]
# The reason of a stop that somebody asked for by `touch RUN/STOP`.
STOP_FILE = "STOP file"
SECONDS_OF_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
# The link-local address at which a machine in any of the three clouds asks about itself.
METADATA_URL = "http://169.254.169.254"
# Of every machine on Azure. The vendor alone may be a Hyper-V at home.
AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"


def parse_walltime(walltime: str | float) -> float:
    """Return the seconds of `3h55m`, `90m`, `1d2h` or a plain number. Raises ValueError, with what is expected."""
    text = str(walltime).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return float(text)
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    counts = zip(SECONDS_OF_UNIT.values(), parts.groups(), strict=True) if parts else ()
    total = sum(seconds * int(count) for seconds, count in counts if count)
    # Without any part the pattern matches the empty text, and `0m` is no time limit either.
    if not total:
        raise ValueError(f"walltime={text} is no duration; write it as 3h55m, 90m, 1d2h or seconds")
    return float(total)


@dataclass(frozen=True, kw_only=True)
class MetadataSource:
    """A source that is asked over HTTP: the metadata service of a machine in a cloud.

    Attributes:
        url: where the service is.
    """

    kind: str
    url: str = METADATA_URL

    def __post_init__(self) -> None:
        address = re.fullmatch(r"http://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?(/\S*)?", self.url)
        if not address or int(address[2] or 80) > 65535:
            raise ValueError(f"url={self.url} is no address; write it as http://HOST or http://HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class Gce(MetadataSource):
    """On Google Compute Engine: spot machines are preempted 30 s after the notice, or taken down for maintenance.

    The service is asked once and answers when something changes, after `wait_seconds` at the latest.

    Attributes:
        preempted_seconds: what a preemption leaves: 120 more where the machine was made with a preemption notice
            duration.
        maintenance_seconds: what maintenance leaves: 3600 on machines with GPUs.
        wait_seconds: so long the service may take to say that nothing has changed.
        timeout_seconds: it is given so long beyond that to answer.
        poll_seconds: so long after one question comes the next.
    """

    kind: Literal["gce"] = "gce"
    preempted_seconds: Seconds = 30.0
    maintenance_seconds: Seconds = 60.0
    wait_seconds: Seconds = 60.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 1.0

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """Return the fewest seconds that a notice leaves, and the field that says so."""
        return min((self.preempted_seconds, "preempted_seconds"), (self.maintenance_seconds, "maintenance_seconds"))

    def applies_to(self, machine: Machine) -> bool:
        """Return whether the machine is one of Google Compute Engine."""
        return machine.read_firmware("product_name") == "Google Compute Engine"

    def polls(self) -> list[Poll]:
        """Return what to ask, each in a thread of its own."""
        from runner.preempt.gce import poll_gce

        return poll_gce(self)


@dataclass(frozen=True, kw_only=True)
class Aws(MetadataSource):
    """On Amazon EC2: spot machines are told two minutes ahead; at a hint (rebalance) the run saves and goes on.

    Attributes:
        notice_seconds: what a notice leaves.
        timeout_seconds: the service is given so long to answer.
        poll_seconds: so long after one question comes the next.
    """

    kind: Literal["aws"] = "aws"
    notice_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 5.0

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """Return the fewest seconds that a notice leaves, and the field that says so."""
        return self.notice_seconds, "notice_seconds"

    def applies_to(self, machine: Machine) -> bool:
        """Return whether the machine is one of Amazon EC2."""
        # Machines of older types, on Xen, name Amazon in the version of the BIOS alone.
        return machine.read_firmware("sys_vendor") == "Amazon EC2" or "amazon" in machine.read_firmware("bios_version")

    def polls(self) -> list[Poll]:
        """Return what to ask, each in a thread of its own."""
        from runner.preempt.aws import poll_aws

        return poll_aws(self)


@dataclass(frozen=True, kw_only=True)
class Azure(MetadataSource):
    """On Microsoft Azure: spot machines are told at least 30 s ahead, others up to days.

    Attributes:
        machine: the name of the machine as events call it, if not what the service says.
        notice_seconds: what a notice leaves at least.
        lead_seconds: with more time than this the run goes on until so long before the end.
        first_timeout_seconds: the first answer is given so long, for it may take two minutes.
        timeout_seconds: each further answer is given so long.
        poll_seconds: so long after one question comes the next.
    """

    kind: Literal["azure"] = "azure"
    machine: str | None = None
    notice_seconds: Seconds = 30.0
    lead_seconds: Seconds = 120.0
    first_timeout_seconds: Seconds = 150.0
    timeout_seconds: Seconds = 5.0
    poll_seconds: Seconds = 5.0

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """Return the fewest seconds that a notice leaves, and the field that says so."""
        return min((self.notice_seconds, "notice_seconds"), (self.lead_seconds, "lead_seconds"))

    def applies_to(self, machine: Machine) -> bool:
        """Return whether the machine is one of Microsoft Azure."""
        return machine.read_firmware("chassis_asset_tag") == AZURE_CHASSIS

    def polls(self) -> list[Poll]:
        """Return what to ask, each in a thread of its own."""
        from runner.preempt.azure import poll_azure

        return poll_azure(self)


@dataclass(frozen=True, kw_only=True)
class SlurmJobEnd:
    """In a Slurm job: stop before its end, be that its time limit or a preemption with GraceTime.

    Outside a job it does nothing. A GraceTime that is shorter than `poll_seconds` may be missed.

    Attributes:
        lead_seconds: so long before the end the run stops.
        timeout_seconds: Slurm is given so long to answer.
        poll_seconds: so often the end is read again; not faster, since the answer comes from the one controller of a
            whole cluster.
    """

    kind: Literal["slurm"] = "slurm"
    lead_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 20.0
    poll_seconds: Seconds = 30.0

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """Return the fewest seconds that a notice leaves, and the field that says so."""
        return self.lead_seconds, "lead_seconds"

    def applies_to(self, machine: Machine) -> bool:
        """Return whether this process is in a Slurm job."""
        return bool(machine.environment.get("SLURM_JOB_ID"))

    def polls(self) -> list[Poll]:
        """Return what to ask, each in a thread of its own; nothing outside a job."""
        from runner.preempt.slurm import poll_slurm

        return poll_slurm(self)


@dataclass(frozen=True, kw_only=True)
class AutoDetect:
    """Anywhere: finds out which of the others apply, from the firmware and the environment; elsewhere asks nobody.

    Attributes:
        dmi: where the firmware's names are.
        url: where the machine's service is, if not at the usual address.
    """

    kind: Literal["auto"] = "auto"
    dmi: str = "/sys/class/dmi/id"
    url: str = METADATA_URL

    def __post_init__(self) -> None:
        # Refused here, before anything is written, and not in a thread that begins later.
        MetadataSource(kind=self.kind, url=self.url)

    @property
    def shortest_notice(self) -> None:
        """Return None: the fewest seconds are not known before the machine is."""
        return None

    def detect(self, environment: Mapping[str, str]) -> list[NoticeSource]:
        """Return the other sources, with their defaults, that apply to the machine that this process is on."""
        machine = Machine(Path(self.dmi), environment)
        found = []
        for option in get_args(NoticeSource):
            if option is not AutoDetect:
                source = option(url=self.url) if issubclass(option, MetadataSource) else option()
                if source.applies_to(machine):
                    found.append(source)
        return found

    def polls(self) -> list[Poll]:
        """Return what to ask of all sources that apply, each in a thread of its own."""
        return [poll for source in self.detect(os.environ) for poll in source.polls()]


NoticeSource = Gce | Aws | Azure | SlurmJobEnd | AutoDetect


@dataclass(frozen=True, kw_only=True)
class Preempt:
    """What asks the run to save and stop: signals, the file RUN/STOP, a time limit, and notices of the machine.

    Attributes:
        signals: those that ask; a second one ends the process at once.
        notice_seconds: how long the machine leaves between SIGTERM and SIGKILL.
        stop_file: look for a file `STOP` in the run's directory.
        walltime: stop in time for this limit, counted from the start of the process: `3h55m`, `90m` or seconds.
        notices: sources of notices, each under a name of its own.
    """

    signals: list[Signal] = field(default_factory=lambda: ["TERM", "INT", "USR1", "USR2", "HUP"])
    notice_seconds: Seconds = 30.0
    stop_file: bool = True
    walltime: str | Seconds | None = None
    notices: Mapping[str, NoticeSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.walltime is not None:
            parse_walltime(self.walltime)

    @property
    def shortest_notice(self) -> tuple[float, str]:
        """Return the fewest seconds that any source leaves before the end, and a name for it with its key."""
        known = []
        for name, source in self.notices.items():
            if source.shortest_notice is not None:
                seconds, key = source.shortest_notice
                known.append((seconds, f"{name} (preempt.notices.{name}.{key})"))
        # Without a signal to tell it, the time before SIGKILL is still the best guess there is.
        if "TERM" in self.signals or not known:
            known.append((self.notice_seconds, "SIGTERM (preempt.notice_seconds)"))
        return min(known)
