"""Which process of a run this is: what each launcher says in the environment, and each way to say it wrong."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from runner.config.schema import validate_options
from runner.errors import ConfigError
from runner.hosts import options
from runner.hosts.options import (
    DEFAULT_PORT,
    NUM_SLURM_PORTS,
    SLURM_PORT,
    AutoHosts,
    LocalHosts,
    NamedHosts,
    NoHosts,
    Place,
    first_node,
)

# As `srun` of Slurm 22.05 sets them for task 1 of `-N2 --ntasks-per-node=1`.
SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
    **{"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"},
}
OPEN_MPI_4 = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc,t-2.svc", "TPU_WORKER_ID": "2"}


def without(environ: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def found(environ: Mapping[str, str], address: str | None = None) -> Place | None:
    return AutoHosts(address=address).find_place(environ)


def test_nobody_has_started_several() -> None:
    assert found({}) is None
    assert found({"HOLDFAST_HOSTS": " "}) is None
    assert found({"HOLDFAST_HOSTS": "n1:4,1,0"}) is None, "the only process of a run has nobody to wait for"


# --- Slurm ---


def test_a_task_of_a_step_of_several() -> None:
    assert found(SLURM) == Place("n1", SLURM_PORT + 7, 2, 1, 0)
    assert found(without(SLURM, "SLURM_LOCALID")) == Place("n1", SLURM_PORT + 7, 2, 1)
    assert found(without(SLURM, "SLURM_STEP_NUM_TASKS")) == found(SLURM), "older ones say it for the job alone"


def test_tasks_on_one_node_need_no_name_of_it() -> None:
    place = found({**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n2"})
    assert place is not None
    assert place.host == "127.0.0.1"


def test_jobs_and_steps_that_share_a_machine_have_ports_of_their_own() -> None:
    def port(job: int, step: int) -> int:
        place = found({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        assert place is not None
        return place.port

    assert len({port(job, step) for job in range(100, 120) for step in range(3)}) == 60
    assert all(SLURM_PORT <= port(job, 3) < SLURM_PORT + NUM_SLURM_PORTS <= 65536 for job in (1, 4095, 10**8))


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, id="a step of one task"),
        pytest.param(
            without(SLURM, "SLURM_PROCID", "SLURM_STEP_NODELIST"), id="the shell of salloc, where it is typed"
        ),
        pytest.param({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, id="the shell of salloc, on a node"),
        pytest.param(
            {**without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID": "0"}, id="a batch script"
        ),
    ],
)
def test_one_process_in_a_job_is_alone(environ: dict[str, str]) -> None:
    assert found(environ) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[003-007,9],m1", "n003"),
        ("n[4,7-9]", "n4"),
        ("m1,n[1-2]", "m1"),
        ("gpu-a[01-02].cluster", "gpu-a01.cluster"),
        ("r[1-2]n[3-4],x", "r1n3"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


# --- Open MPI, TPU ---


def test_open_mpi_4_says_where_it_was_started() -> None:
    assert found(OPEN_MPI_4) == Place("10.96.0.1", DEFAULT_PORT, 4, 3, 1)


def test_open_mpi_5_does_not_and_needs_an_address_unless_all_are_here() -> None:
    version_5 = without(OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri")
    with pytest.raises(ConfigError, match="add hosts.address=HOST"):
        found(version_5)
    assert found(version_5, "n1") == Place("n1", DEFAULT_PORT, 4, 3, 1)
    here = {**version_5, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert found(here) == Place("127.0.0.1", DEFAULT_PORT, 4, 3, 1)
    assert found({**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


def test_a_tpu_slice_of_several_machines() -> None:
    assert found(TPU) == Place("t-0.svc", DEFAULT_PORT, 3, 2)
    assert found({**TPU, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert found(without(TPU, "TPU_WORKER_ID")) is None


# --- said by hand ---


def test_the_variable_comes_before_what_a_scheduler_says() -> None:
    assert found({**SLURM, "HOLDFAST_HOSTS": "n9:4711, 3, 2"}) == Place("n9", 4711, 3, 2)
    assert found({"HOLDFAST_HOSTS": "n9,3,0"}) == Place("n9", DEFAULT_PORT, 3, 0)
    assert found({"HOLDFAST_HOSTS": "[fe80::1]:5,2,1"}) == Place("fe80::1", 5, 2, 1)


def test_an_address_of_ones_own_replaces_what_a_scheduler_says() -> None:
    assert found(SLURM, "10.0.0.7") == Place("10.0.0.7", SLURM_PORT + 7, 2, 1, 0)
    assert found(SLURM, "10.0.0.7:99") == Place("10.0.0.7", 99, 2, 1, 0)
    assert found({}, "10.0.0.7:99") is None


def test_each_process_is_told_its_place() -> None:
    named = validate_options(NamedHosts, {"kind": "env", "address": "n1", "count": 2, "index": 1})
    assert named.find_place(SLURM) == Place("n1", DEFAULT_PORT, 2, 1)
    assert NamedHosts(address="n1", count=1, index=0).find_place({}) is None


def test_none_is_one_process_whatever_anybody_says() -> None:
    assert NoHosts().find_place({**SLURM, "HOLDFAST_HOSTS": "nonsense"}) is None


def test_a_place_on_this_machine_is_taken_from_the_process_that_started_this_one_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = LocalHosts(count=3)
    given = hosts.describe_place(4711, 2)
    assert hosts.find_place(given) is None, "this process has set it, for another"
    assert found(given) is None, "nor is it for a run that a process of this one starts in its turn"
    by_hand = Place("n1", 5, 2, 1)
    assert found({**given, "HOLDFAST_HOSTS": "n1:5,2,1"}) == by_hand
    monkeypatch.setattr(options, "PARENT", int(given["HOLDFAST_HOSTS_FROM"].split()[0]))
    place = Place("127.0.0.1", 4711, 3, 2)
    assert hosts.find_place(given) == found(given) == place
    assert hosts.find_place(without(given, "HOLDFAST_HOSTS_FROM")) is None
    assert hosts.find_place({**given, "HOLDFAST_HOSTS": "n1:5,2,1"}) is None
    assert hosts.find_place({**SLURM}) is None, "in a job each task would start some; then hosts=auto is meant"


# --- each way to say it wrong is one line ---


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HOLDFAST_HOSTS": "n1"}, "HOLDFAST_HOSTS: got 'n1'; expected ADDRESS:PORT,COUNT,INDEX"),
        ({"HOLDFAST_HOSTS": "n1:1,2"}, "HOLDFAST_HOSTS: got"),
        ({"HOLDFAST_HOSTS": "n1:1,two,0"}, "HOLDFAST_HOSTS: got"),
        ({"HOLDFAST_HOSTS": "n1:1,2,-1"}, "HOLDFAST_HOSTS: got"),
        ({"HOLDFAST_HOSTS": "n1:1,2,2"}, "HOLDFAST_HOSTS: process 2 of 2: the first has index 0, the last 1"),
        ({"HOLDFAST_HOSTS": "n1:0,2,1"}, "hosts: got the address 'n1:0'; expected HOST or HOST:PORT"),
        ({"HOLDFAST_HOSTS": "n1:70000,2,1"}, "hosts: got the address"),
        ({"HOLDFAST_HOSTS": "fe80::1,2,1"}, "hosts: got the address"),
        ({"HOLDFAST_HOSTS": "n\n1:1,2,1"}, "hosts: got the address"),
        ({"HOLDFAST_HOSTS": "x" * 9999}, "HOLDFAST_HOSTS: got"),
        (
            {**SLURM, "SLURM_STEP_NUM_TASKS": "2(x3)"},
            "SLURM_STEP_NUM_TASKS: got '2(x3)'; expected a number; hosts=none",
        ),
        ({**SLURM, "SLURM_PROCID": "x\ny"}, "SLURM_PROCID: got"),
        ({**OPEN_MPI_4, "OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK: got '-1'"),
        ({**TPU, "TPU_WORKER_ID": "3"}, "TPU_WORKER_ID: got 3; expected less than 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        found(environ)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("address", ["", "n1:", "n1:x", "n1:0", "a b", "[::1", "::1", "http://n1"])
def test_an_address_that_is_none(address: str) -> None:
    for hosts in (AutoHosts(address=address), NamedHosts(address=address, count=2, index=0)):
        with pytest.raises(ConfigError, match="hosts: got the address .*; expected HOST or HOST:PORT"):
            hosts.find_place(SLURM)


@pytest.mark.parametrize(
    ("schema", "document", "said"),
    [
        (NamedHosts, {"address": "n1", "count": 2, "index": 2}, "index=2 must be below count=2"),
        (NamedHosts, {"address": "n1", "count": 0, "index": 0}, "count: got 0"),
        (LocalHosts, {"count": 0}, "count: got 0"),
        (AutoHosts, {"lost_seconds": 1}, "lost_seconds: got 1"),
        (AutoHosts, {"join_seconds": 0}, "join_seconds: got 0"),
    ],
)
def test_a_number_that_cannot_be(schema: type, document: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate_options(schema, document)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
