"""A real Slurm of two emulated nodes that lives as long as a test session: `with cluster() as slurm: …`.

It has a munge key and socket, ports and a slurm.conf of its own, and only what is given `slurm.environment` sees it: a
Slurm that is installed on this machine for other purposes is neither asked nor changed. Needs root and Debian's
packages; installs nothing. Where the session is SIGKILLed its daemons end as well, but jobs that run stay.
By hand: `python -m tests.slurm` opens a shell in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # jobs find this very python
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")  # others pass; SIGNALING within milliseconds
HANG_SECONDS = 300  # what takes longer hangs: not a limit on speed

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job begins when its old credential has expired: after 120 s, or what is said here (5 at least).
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
# Nothing that needs cgroups, systemd or a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
MinJobAge=3600
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=batch  Nodes=ALL Default=YES PriorityTier=1  PreemptMode=REQUEUE GraceTime=20 MaxTime=60 State=UP
PartitionName=hasty  Nodes=ALL Default=NO  PriorityTier=1  PreemptMode=REQUEUE GraceTime=0  MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL Default=NO  PriorityTier=10 PreemptMode=OFF                  MaxTime=60 State=UP
"""


def lacking() -> str | None:
    """Why there can be no Slurm here, with the way out; None where there can be one."""
    if os.geteuid() != 0:
        return "needs Slurm, and root to bring one up"
    if absent := [program for program in PROGRAMS if not shutil.which(program, path=PATH)]:
        return f"needs Slurm ({', '.join(absent)} not found): {INSTALL}"
    return None


@dataclass(frozen=True)
class Slurm:
    """A running cluster. Jobs are known by the text that sbatch prints: `7`, or `7_1` for a member of an array."""

    folder: Path
    environment: dict[str, str] = field(repr=False)

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """What a Slurm command prints. Raises CalledProcessError with its complaint on stderr."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path) -> str:
        """The id of a new job."""
        return self.ask("sbatch", "--parsable", *arguments, cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of it: JobState, Restarts, ExitCode, PreemptTime …"""
        words = self.ask("scontrol", "-o", "show", "job", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def jobs(self) -> list[str]:
        """Every job that waits, runs or is ending."""
        return self.ask("squeue", "-h", "-r", "-o", "%i").split()

    def ended(self, job: str) -> dict[str, str]:
        """Wait until a job is over for good; what Slurm knows of it then."""
        wait(lambda: self.job(job)["JobState"] in ENDED)
        return self.job(job)

    def clear(self) -> None:
        """End every job. One that asks to be requeued as it ends comes back, hence again and again."""
        wait(lambda: not [self.ask("scancel", job) for job in self.jobs()])


def wait(happened: Callable[[], bool], every: float = 0.1) -> None:
    """Look every so many seconds until it has happened. Raises TimeoutError where it hangs."""
    end = time.monotonic() + HANG_SECONDS
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(every)


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Bring one up, and end everything that was started, however the block is left."""
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        configuration = _configure(folder)
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        slurm = Slurm(folder, {**outside, "PATH": PATH, "SLURM_CONF": str(configuration)})
        undo.callback(_end_steps, configuration)
        for name, command in _daemons(folder, configuration).items():
            undo.callback(_end, _started(slurm, name, command))
        wait(partial(_idle, slurm))
        undo.callback(slurm.clear)
        yield slurm


def _configure(folder: Path) -> Path:
    for name in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.touch(0o400)
    key.write_bytes(secrets.token_bytes(1024))
    host, (port, *ports) = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=2000"
        for node, port in zip(NODES, ports, strict=True)
    )
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, port=port, nodes=nodes))
    return configuration


def _daemons(folder: Path, configuration: Path) -> dict[str, list[str]]:
    """Name → command, in the order of starting. Each stays in the foreground: a child of ours."""
    munge = [f"--key-file={folder}/munge/key", f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid"]
    munge += [f"--seed-file={folder}/munge/seed", f"--log-file={folder}/log/munged"]
    nodes = {node: ["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in NODES}
    return {
        "munged": ["munged", "--foreground", "--force", *munge],
        "slurmctld": ["slurmctld", "-D", "-i", "-f", str(configuration)],
        **nodes,
    }


def _started(slurm: Slurm, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    """A daemon, which ends with us even where we are killed."""
    with (slurm.folder / "log" / name).open("ab") as log:
        # A session of its own: Ctrl-C at the tests is no request to it.
        dying_with_us = ["setpriv", "--pdeathsig", "TERM", "--", *command]
        process = subprocess.Popen(
            dying_with_us,
            env=slurm.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    if name == "munged":
        wait((slurm.folder / "munge" / "socket").exists)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_steps(configuration: Path) -> None:
    """Kill what slurmd leaves running when it ends: jobs that would not go and their shepherds, known by our slurm.conf."""
    mine = f"SLURM_CONF={configuration}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mine in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                os.kill(int(process.name), 9)
        except OSError:
            continue


def _idle(slurm: Slurm) -> bool:
    try:
        return slurm.ask("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D") == str(len(NODES))
    except subprocess.CalledProcessError:  # the controller does not listen yet
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
