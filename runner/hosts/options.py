"""Which processes work on a run together: what can be chosen, and what a scheduler says in the environment. No jax."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt

from runner.errors import ConfigError

# The variable by which anybody says it: `HOLDFAST_HOSTS=ADDRESS:PORT,COUNT,INDEX`.
HOSTS_VARIABLE = "HOLDFAST_HOSTS"
# Beside it, where `hosts=local` has set it: by which process, and to what. It is meant for the children of that process
# and not for what they start in their turn, which inherits it.
STARTER_VARIABLE = "HOLDFAST_HOSTS_FROM"
# Asked once: a process whose parent has died since is still one of those that it started.
PARENT = os.getppid()
# Where process 0 listens, where nobody says another port. Slurm's jobs have ports of their own, from 61440 on, for two
# of them may share a machine.
DEFAULT_PORT, SLURM_PORT, NUM_SLURM_PORTS = 12321, 61440, 4096
THIS_MACHINE = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Say which of the processes of a run this one is.

    Attributes:
        host: the machine of process 0, as the others reach it.
        port: where it listens there.
        count: how many processes there are.
        index: the number of this one, from 0; process 0 leads.
        local_index: its number among those on its machine, where that is known.
    """

    host: str
    port: int
    count: int
    index: int
    local_index: int | None = None


@dataclass(frozen=True, kw_only=True)
class HostsPatience:
    """Say how long the processes of a run wait for each other.

    Attributes:
        join_seconds: so long they wait at the start until all are there.
        lost_seconds: without a word from one of them for so long, it counts as gone, and the others end.
    """

    join_seconds: Annotated[float, Gt(0.0)] = 300.0
    lost_seconds: Annotated[float, Ge(2.0)] = 30.0


@dataclass(frozen=True, kw_only=True)
class AutoHosts(HostsPatience):
    """One process, unless Slurm, Open MPI, a TPU slice or the variable HOLDFAST_HOSTS has started several.

    Attributes:
        address: of process 0, as HOST or HOST:PORT, where what the scheduler says is no use.
    """

    kind: Literal["auto"] = "auto"
    address: str | None = None

    def find_place(self, environ: Mapping[str, str]) -> Place | None:
        """Return which process this is; None where it is the only one. Raises ConfigError."""
        found = read_variable(environ) or _find_slurm(environ) or _find_open_mpi(environ) or _find_tpu_slice(environ)
        if found is None or (self.address is None and found.host):
            return found
        if self.address is None:
            raise ConfigError(
                "hosts: mpirun does not say where process 0 is; add hosts.address=HOST, or hosts=none for one process"
            )
        host, port = parse_address(self.address, found.port)
        return Place(host, port, found.count, found.index, found.local_index)


@dataclass(frozen=True, kw_only=True)
class NoHosts(HostsPatience):
    """One process, whatever the environment says."""

    kind: Literal["none"] = "none"

    def find_place(self, environ: Mapping[str, str]) -> Place | None:
        """Return None: there is no other process."""
        return None


@dataclass(frozen=True, kw_only=True)
class LocalHosts(HostsPatience):
    """This command starts so many processes on this machine.

    Attributes:
        count: how many.
    """

    kind: Literal["local"] = "local"
    count: Annotated[int, Ge(1)] = 2

    def find_place(self, environ: Mapping[str, str]) -> Place | None:
        """Return which of these processes this is; None in the one that is to start them."""
        return read_variable(environ) if _find_starter(environ) == str(PARENT) else None

    def describe_place(self, port: int, index: int) -> dict[str, str]:
        """Return the variables by which a process that this one starts knows its place."""
        word = f"{THIS_MACHINE}:{port},{self.count},{index}"
        return {HOSTS_VARIABLE: word, STARTER_VARIABLE: f"{os.getpid()} {word}"}


@dataclass(frozen=True, kw_only=True)
class NamedHosts(HostsPatience):
    """Several processes, each of which is told its place by hand.

    Attributes:
        address: of process 0, as HOST or HOST:PORT.
        count: how many there are.
        index: the number of this one, from 0.
    """

    kind: Literal["env"] = "env"
    address: str
    count: Annotated[int, Ge(1)]
    index: Annotated[int, Ge(0)]

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise ValueError(f"index={self.index} must be below count={self.count}: the first process has index 0")

    def find_place(self, environ: Mapping[str, str]) -> Place | None:
        """Return which process this is. Raises ConfigError where the address is none."""
        if self.count == 1:
            return None
        return Place(*parse_address(self.address, DEFAULT_PORT), self.count, self.index)


Hosts: TypeAlias = AutoHosts | NoHosts | LocalHosts | NamedHosts


def parse_address(address: str, port: int) -> tuple[str, int]:
    """Return host and port of `HOST`, `HOST:PORT` or `[IPV6]:PORT`; `port` where none is said. Raises ConfigError."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", address)
    if match is None or not 0 < int(match[3] or port) < 65536:
        raise ConfigError(f"hosts: got the address {address[:80]!r}; expected HOST or HOST:PORT")
    return match[1] or match[2], int(match[3] or port)


def read_variable(environ: Mapping[str, str]) -> Place | None:
    """Return the place that HOLDFAST_HOSTS names; None where it is not set, or meant for another process.

    Raises ConfigError where it is wrong.
    """
    word = environ.get(HOSTS_VARIABLE, "").strip()
    if not word or _find_starter(environ) not in ("", str(PARENT)):
        return None
    address, *numbers = word.split(",")
    if len(numbers) != 2 or not all(re.fullmatch("[0-9]{1,6}", number.strip()) for number in numbers):
        raise ConfigError(
            f"{HOSTS_VARIABLE}: got {word[:80]!r}; expected ADDRESS:PORT,COUNT,INDEX, as in n1:{DEFAULT_PORT},2,0"
        )
    count, index = (int(number) for number in numbers)
    if index >= count:
        raise ConfigError(f"{HOSTS_VARIABLE}: process {index} of {count}: the first has index 0, the last {count - 1}")
    return Place(*parse_address(address.strip(), DEFAULT_PORT), count, index) if count > 1 else None


def _find_starter(environ: Mapping[str, str]) -> str:
    """Return the process whose `hosts=local` has set HOLDFAST_HOSTS; empty where somebody else has."""
    starter, _, word = environ.get(STARTER_VARIABLE, "").partition(" ")
    return starter if word == environ.get(HOSTS_VARIABLE) else ""


def _find_slurm(environ: Mapping[str, str]) -> Place | None:
    """Return the place of a task of a Slurm step of several tasks."""
    # In a job of one task, and in the shell of `salloc`, some of these are there as well.
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
    if any(name not in environ for name in names):
        return None
    # Of the step: the shell that `salloc` opens on a node is a step of one task in a job of several.
    counted = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if _read_number(environ, counted) < 2:
        return None
    job, step = (_read_number(environ, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = environ["SLURM_STEP_NODELIST"]
    host = THIS_MACHINE if environ.get("SLURM_STEP_NUM_NODES") == "1" else first_node(nodes)
    return Place(
        host,
        SLURM_PORT + (job + 131 * step) % NUM_SLURM_PORTS,
        _read_number(environ, counted),
        _read_number(environ, "SLURM_PROCID"),
        _read_number(environ, "SLURM_LOCALID") if "SLURM_LOCALID" in environ else None,
    )


def first_node(nodes: str) -> str:
    """Return the first name of a node list as Slurm writes it: `n1`, `n1,n2`, `n[003-007,9],m1`."""
    first = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _find_open_mpi(environ: Mapping[str, str]) -> Place | None:
    """Return the place of a process that `mpirun` of Open MPI has started with others."""
    if "OMPI_COMM_WORLD_RANK" not in environ or _read_number(environ, "OMPI_COMM_WORLD_SIZE") < 2:
        return None
    launcher = re.search(r"tcp://([0-9.]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    count, index = (_read_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    local = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(count)
    # Open MPI 5 no longer says where it was started; then `hosts.address` must.
    host = THIS_MACHINE if local else launcher[1] if launcher else ""
    return Place(host, DEFAULT_PORT, count, index, _read_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"))


def _find_tpu_slice(environ: Mapping[str, str]) -> Place | None:
    """Return the place of a machine of a TPU slice of several, as Google Kubernetes Engine tells each."""
    names = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(names) < 2 or "TPU_WORKER_ID" not in environ:
        return None
    index = _read_number(environ, "TPU_WORKER_ID")
    if index >= len(names):
        raise ConfigError(
            f"TPU_WORKER_ID: got {index}; expected less than {len(names)}, for so many machines are in "
            "TPU_WORKER_HOSTNAMES; hosts=none ignores both"
        )
    return Place(names[0], DEFAULT_PORT, len(names), index)


def _read_number(environ: Mapping[str, str], name: str) -> int:
    word = environ.get(name, "0").strip()
    if not re.fullmatch("[0-9]{1,12}", word):
        raise ConfigError(f"{name}: got {word[:40]!r}; expected a number; hosts=none ignores what a scheduler says")
    return int(word)
