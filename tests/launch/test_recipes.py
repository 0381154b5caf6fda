"""Recipes: their form, as far as it can be checked without the service, and what they do after each exit code."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.__main__ import main
from runner.errors import CRASHED, STOPPED, ConfigError, DivergedError, RefusedError, StorageError
from runner.hosts.options import AutoHosts, Place
from runner.remote.options import check_url
from tests.conftest import REPO, Door

RECIPES = REPO / "runner" / "recipes"
LOOK = {error.exit_code for error in (ConfigError, RefusedError, DivergedError)}  # trying again changes nothing
OUT_OF_MEMORY = 137


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / name).read_text()))


# --- the verb ---


def test_the_verb_prints_each_recipe_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert {"jobset", "kubernetes", "skypilot", "vm"} <= names.keys()
    assert len(names) == len(list(RECIPES.iterdir()))
    assert main(["recipe"]) == 0
    assert [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()] == list(names)
    for path in RECIPES.iterdir():
        assert main(["recipe", path.stem]) == 0
        assert capsys.readouterr().out == path.read_text()
        assert names[path.stem] in path.read_text().splitlines()[1 if path.suffix == ".sbatch" else 0]
    assert main(["recipe", "kubernets"]) == 2
    assert "did you mean kubernetes?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jobset.yaml", "kubernetes.yaml", "skypilot.yaml", "vm.service"])
def test_each_says_how_it_is_used_and_that_it_was_not_run_there(name: str) -> None:
    head = "\n".join(line for line in (RECIPES / name).read_text().split("\n\n")[0].splitlines())
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"python -m runner recipe {name.split('.')[0]} > " in head
    assert "form is checked" in head
    assert "was not run" in head


def test_the_command_in_them_is_one_that_the_door_takes(door: Door) -> None:
    """`root=` is where the volume is mounted that several pods share."""
    words = {
        *documents("skypilot.yaml")[0]["run"].splitlines()[-1].split(),
        *container(documents("kubernetes.yaml")[0]["spec"])["command"],
        *container(hosts()["template"]["spec"])["command"][2].split()[4:],
    }
    assert words == {"python", "run.py", "root=/outputs", "mesh=data", "compile_cache=/outputs/.compile"}
    shown = door.run("root=/outputs", "mesh=data", "compile_cache=/outputs/.compile", "--cfg", "job")
    assert shown.returncode == 0, shown.stderr
    assert "root: /outputs" in shown.stdout


def test_a_machine_without_a_disk_that_stays_has_its_run_in_a_bucket() -> None:
    """A variable that the configuration reads, with an address that it takes once the bucket is filled in."""
    (variable,) = container(documents("kubernetes.yaml")[0]["spec"])["env"]
    unit = (RECIPES / "vm.service").read_text()
    (of_vm,) = re.findall(r"^Environment=HOLDFAST_REMOTE=(\S+)$", unit, re.MULTILINE)
    for name, url in (
        *documents("skypilot.yaml")[0]["envs"].items(),
        (variable["name"], variable["value"]),
        ("HOLDFAST_REMOTE", of_vm),
    ):
        assert f"oc.env:{name}," in (REPO / "conf" / "config.yaml").read_text()
        check_url(url.replace("BUCKET", "mine"))


# --- Kubernetes and JobSet ---

# The fields that the API documents, as far as a recipe uses them: a type, the words allowed, [what a list holds], or the
# fields of an object, those with ! required. Any other field is a mistake.
Form = Any
EXIT_CODES: Form = {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]}
CONDITIONS: Form = {"type!": {"DisruptionTarget", "ConfigIssue"}, "status!": {"True", "False", "Unknown"}}
POD_RULE: Form = {
    "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": EXIT_CODES,
    "onPodConditions": [CONDITIONS],
}
CONTAINER: Form = {
    **{"name!": str, "image!": str, "workingDir": str, "command": [str], "args": [str]},
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "env": [{"name!": str, "value!": str}],
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
POD: Form = {
    "restartPolicy!": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "containers!": [CONTAINER],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}}],
}
JOB_SPEC: Form = {
    **{"completions": int, "parallelism": int, "backoffLimit": int},
    "completionMode": {"NonIndexed", "Indexed"},
    "podReplacementPolicy": {"TerminatingOrFailed", "Failed"},
    "podFailurePolicy": {"rules!": [POD_RULE]},
    "template!": {"spec!": POD},
}
JOB: Form = {"apiVersion!": {"batch/v1"}, "kind!": {"Job"}, "metadata!": {"name!": str}, "spec!": JOB_SPEC}
CLAIM: Form = {
    **{"apiVersion!": {"v1"}, "kind!": {"PersistentVolumeClaim"}, "metadata!": {"name!": str}},
    "spec!": {
        "accessModes!": [{"ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod", "ReadOnlyMany"}],
        "resources!": {"requests!": {"storage!": str}},
    },
}
RESTARTS = {"RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"}
JOBSET: Form = {
    **{"apiVersion!": {"jobset.x-k8s.io/v1alpha2"}, "kind!": {"JobSet"}, "metadata!": {"name!": str}},
    "spec!": {
        "network": {"enableDNSHostnames": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
            "rules": [
                {
                    **{"name!": str, "action!": {"FailJobSet", *RESTARTS}},
                    "onJobFailureReasons": [
                        {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}
                    ],
                    "onJobFailureMessagePatterns": [str],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB_SPEC}}],
    },
}


def misfits(value: Any, form: Form, where: str = "") -> list[str]:
    """Where a document is not of this form."""
    if isinstance(form, dict) and isinstance(value, dict):
        fields = {name.rstrip("!"): inner for name, inner in form.items()}
        missing = [name for name in form if name.endswith("!") and name.rstrip("!") not in value]
        wrong = [f"{where}.{name}: unknown" for name in value.keys() - fields.keys()]
        wrong += [f"{where}.{name.rstrip('!')}: missing" for name in missing]
        inner = [misfits(value[name], fields[name], f"{where}.{name}") for name in value.keys() & fields.keys()]
        return wrong + [line for lines in inner for line in lines]
    if isinstance(form, list) and isinstance(value, list) and value:
        return [line for number, item in enumerate(value) for line in misfits(item, form[0], f"{where}[{number}]")]
    if isinstance(form, set):
        return [] if value in form else [f"{where}: {value!r} is none of {form}"]
    return [] if isinstance(form, type) and type(value) is form else [f"{where}: {value!r} does not fit"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["template"]["spec"]["containers"]
    return only


def hosts() -> dict[str, Any]:
    _, jobset = documents("jobset.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated


def test_the_check_of_forms_finds_mistakes() -> None:
    good = {"name": "x", "image": "y"}
    assert misfits(good, CONTAINER) == []
    for bad in (
        {"name": "x"},
        {**good, "comand": ["python"]},
        {**good, "command": "python run.py"},
        {**good, "name": 1},
    ):
        assert len(misfits(bad, CONTAINER)) == 1, bad
    assert misfits({"type": "DisruptionTarget", "status": True}, CONDITIONS), 'YAML reads True, the API wants "True"'


def test_the_kubernetes_recipe_has_the_documented_form() -> None:
    (job,) = documents("kubernetes.yaml")
    assert misfits(job, JOB) == []
    assert_sound(job["spec"])


def test_the_jobset_recipe_has_the_documented_form() -> None:
    claim, jobset = documents("jobset.yaml")
    assert misfits(claim, CLAIM) == []
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "every host writes"
    assert misfits(jobset, JOBSET) == []
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    job = hosts()["template"]["spec"]
    assert_sound(job)
    volume = job["template"]["spec"]["volumes"][0]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def run_in_shell(script: str, folder: Path, **environment: str) -> list[str]:
    """What a `python` in this shell was given: HOLDFAST_HOSTS, then its words; it is the shell's own process."""
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\necho $$ "$HOLDFAST_HOSTS" "$@"\n')
    stand_in.chmod(0o755)
    words = ["sh", "-c", script]
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(words, env=path | environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()
    assert process.returncode == 0
    pid, *said = out.split()
    return [str(int(pid) == process.pid), *said]


@pytest.mark.parametrize("index", [0, 1])
def test_each_host_of_the_jobset_is_told_its_place(index: int, tmp_path: Path) -> None:
    _, jobset = documents("jobset.yaml")
    job = hosts()["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == 2
    name = f"{jobset['metadata']['name']}-{hosts()['name']}-0-0.{jobset['metadata']['name']}"
    shell, option, script = container(job)["command"]
    assert (shell, option) == ("sh", "-c")
    is_first, variable, *words = run_in_shell(script, tmp_path, JOB_COMPLETION_INDEX=str(index))
    assert is_first == "True", "the first process of the pod gets the SIGTERM"
    assert words[:2] == ["run.py", "mesh=data"]
    assert AutoHosts().find_place({"HOLDFAST_HOSTS": variable}) == Place(name, 12321, 2, index)


def assert_sound(job: dict[str, Any]) -> None:
    """What the API demands beyond the form, and what a run needs."""
    pod, train = job["template"]["spec"], container(job)
    assert pod["restartPolicy"] == "Never", "a policy for failed pods allows no other"
    assert job["podReplacementPolicy"] == "Failed", "the same"
    assert pod["terminationGracePeriodSeconds"] >= 30
    shell = train["command"][:2] == ["sh", "-c"]
    assert train["command"][0] == "python" or (shell and train["command"][2].startswith("exec env ")), (
        "no shell between the system and the process that saves"
    )
    mounts, volumes = train.get("volumeMounts", ()), pod.get("volumes", ())
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            values = rule["onExitCodes"]["values"]
            assert values == sorted(set(values))
            assert 0 not in values
            assert rule["onExitCodes"]["containerName"] == train["name"]


def pod_rule(job: dict[str, Any], code: int, *, disrupted: bool = False) -> str | None:
    """The action of the first rule that fits a failed pod; None where it counts towards the limit."""
    for rule in job["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()) or ("onPodConditions" in rule and disrupted):
            return rule["action"]
    return None


def test_kubernetes_runs_again_what_was_stopped_and_shows_people_what_they_have_to_look_at() -> None:
    job = documents("kubernetes.yaml")[0]["spec"]
    assert pod_rule(job, STOPPED) == pod_rule(job, STOPPED, disrupted=True) == "Ignore"
    assert pod_rule(job, OUT_OF_MEMORY, disrupted=True) == "Ignore"
    assert {pod_rule(job, code) for code in LOOK} == {"FailJob"}
    assert [pod_rule(job, code) for code in (CRASHED, OUT_OF_MEMORY, StorageError.exit_code)] == [None] * 3
    assert job["backoffLimit"] > 0


def jobset_rule(code: int, *, disrupted: bool = False) -> str:
    """What the set does when a pod of one of its Jobs ends like this, by the message that Kubernetes gives."""
    _, jobset = documents("jobset.yaml")
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if pod_rule(hosts()["template"]["spec"], code, disrupted=disrupted) == "FailJob":
        reason, message = (
            "PodFailurePolicy",
            f"Container train for pod ns/p-2 failed with exit code {code} matching FailJob rule at index 0",
        )
        if disrupted:
            message = "Pod ns/p-2 has condition DisruptionTarget matching FailJob rule at index 1"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_a_jobset_restarts_all_hosts_after_a_stop_and_shows_people_what_they_have_to_look_at() -> None:
    assert jobset_rule(STOPPED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_rule(OUT_OF_MEMORY, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {jobset_rule(code) for code in LOOK} == {"FailJobSet"}
    assert {jobset_rule(code) for code in (CRASHED, OUT_OF_MEMORY, StorageError.exit_code)} == {"RestartJobSet"}
    assert documents("jobset.yaml")[1]["spec"]["failurePolicy"]["maxRestarts"] > 0


# --- SkyPilot ---

SKYPILOT: Form = {
    **{"name": str, "workdir": str, "num_nodes": int, "setup": str, "run!": str},
    "envs!": {"HOLDFAST_REMOTE!": str},
    "resources!": {
        **{"infra": str, "accelerators": str, "use_spot": bool},
        "job_recovery!": {
            "strategy": {"EAGER_NEXT_REGION", "FAILOVER"},
            "max_restarts_on_errors": int,
            "recover_on_exit_codes!": [int],
        },
    },
}


def test_the_skypilot_recipe_has_the_documented_form_and_runs_again_what_was_stopped() -> None:
    (task,) = documents("skypilot.yaml")
    assert misfits(task, SKYPILOT) == []
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [STOPPED]
    assert recovery["max_restarts_on_errors"] > 0


@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_each_node_of_skypilot_is_told_its_place(nodes: int, rank: int, tmp_path: Path) -> None:
    (task,) = documents("skypilot.yaml")
    addresses = "10.0.0.7\n10.0.0.8"[: None if nodes == 2 else 8]
    given = {"SKYPILOT_NODE_IPS": addresses, "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(rank)}
    _, variable, *words = run_in_shell(task["run"], tmp_path, **given)
    assert words[:2] == ["run.py", "mesh=data"]
    expected = Place("10.0.0.7", 12321, 2, rank) if nodes == 2 else None
    assert AutoHosts().find_place({"HOLDFAST_HOSTS": variable}) == expected


def test_what_a_shell_runs_is_sound() -> None:
    (task,) = documents("skypilot.yaml")
    for script in (task["setup"], task["run"]):
        subprocess.run(["sh", "-n", "-c", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-s", "sh", "-"], input=script, text=True, check=True)


# --- systemd ---


def test_the_service_runs_again_what_was_stopped_and_shows_people_what_they_have_to_look_at() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(RECIPES / "vm.service")
    service = unit["Service"]
    codes = {name: {int(code) for code in service[name].split()} for name in service if name.endswith("ExitStatus")}
    assert codes == {
        "SuccessExitStatus": {STOPPED},
        "RestartForceExitStatus": {STOPPED},
        "RestartPreventExitStatus": {*LOOK, StorageError.exit_code},
    }
    assert service["Restart"] == "on-failure"
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed"), "a second SIGTERM would not save"
    assert int(service["TimeoutStopSec"]) >= 30
    assert int(unit["Unit"]["StartLimitBurst"]) > 1


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_takes_the_service(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    text = (RECIPES / "vm.service").read_text().replace("=FOLDER", f"={tmp_path}").replace("=USER", "=root")
    text = text.replace("BUCKET", "mine")
    assert "FOLDER" not in text.split("[Unit]")[1]

    def verdict(text: str) -> str:
        (tmp_path / "holdfast.service").write_text(text)
        words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "holdfast.service")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "holdfast.service" not in verdict(text)
    assert "holdfast.service" in verdict(text.replace("KillMode=mixed", "KillMode=mixd")), "it looks at the file"
