"""The JobSet that gke_jobset.py renders, and how a made-up kubectl is told about it."""

from __future__ import annotations

import sys

import machines
import pytest
import yaml

SCRIPT = machines.REPOSITORY / "launch" / "gke_jobset.py"
GIVEN = ["--name=vit", "--image=i", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--claim=shared"]
PROGRAM = ["--config=a", "--workdir=/mnt/shared/it's (new)", "--config.x=$(HOME)"]
KUBECTL = """
case "$*" in
  *"get jobset"*) printf '%s' "$FOUND" ;;
  *apply*) cat >"$HOME/applied" ;;
esac
"""


def _rendered(machine: machines.Machine, *options: str) -> dict:
    done = machine.run(sys.executable, SCRIPT, *GIVEN, *options, "--dry_run", *PROGRAM)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if not line.startswith("#")))


def _job(jobset: dict) -> dict:
    [replicated] = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_a_mistake_fails_the_jobset_and_everything_else_starts_all_pods_again(machine):
    jobset = _rendered(machine)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = _job(jobset)
    [container] = job["template"]["spec"]["containers"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 50
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize(
    ("topology", "chips_per_node", "pods", "chips"),
    [("4x4", 4, 4, 4), ("2x4", 8, 1, 8), ("1x1", 4, 1, 1), ("2x2x2", 4, 2, 4), ("16x16", 4, 64, 4)],
)
def test_every_machine_of_a_slice_gets_one_pod_with_all_its_chips(machine, topology, chips_per_node, pods, chips):
    job = _job(_rendered(machine, f"--topology={topology}", f"--chips_per_node={chips_per_node}"))
    assert job["parallelism"] == job["completions"] == pods
    assert job["completionMode"] == "Indexed"
    resources = job["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    selector = job["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"


def test_the_program_gets_its_arguments_the_shared_folder_and_its_environment(machine):
    pod = _job(_rendered(machine, "--mount=/mnt"))["template"]["spec"]
    [container] = pod["containers"]
    literal = [argument.replace("$(", "$$(") for argument in PROGRAM]  # Kubernetes would expand $(HOME).
    assert container["command"] == ["python", "-m", "robust_vit.main", *literal]
    assert {"name": "ROBUST_VIT_DISTRIBUTED", "value": "1"} in container["env"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts == {"shared": "/mnt", "memory": "/dev/shm"}
    assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "shared"}


def test_options_reach_their_fields(machine):
    options = ["--slices=2", "--spot", "--gcsfuse", "--queue=line", "--service_account=me", "--max_restarts=7"]
    jobset = _rendered(machine, *options)
    template = _job(jobset)["template"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert template["spec"]["hostNetwork"] is True
    assert template["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "line"}
    assert template["spec"]["serviceAccountName"] == "me"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7


@pytest.mark.parametrize(
    ("found", "code", "verbs"),
    [
        ("", 0, ["get", "apply"]),
        ("vit Completed", 0, ["get", "delete", "apply"]),
        ("vit StartupPolicyCompleted Failed", 0, ["get", "delete", "apply"]),
        ("vit ", 2, ["get"]),
        ("vit Suspended", 2, ["get"]),
    ],
)
def test_a_job_that_has_ended_is_run_again_and_a_running_one_is_left_alone(machine, found, code, verbs):
    machine.program("kubectl", KUBECTL)
    done = machine.run(sys.executable, SCRIPT, *GIVEN, "--namespace=mine", *PROGRAM, FOUND=found)
    assert done.returncode == code, done.stderr
    assert [call[2] for call in machine.calls("kubectl", "--namespace=mine")] == verbs
    if code == 0:
        applied = (machine.folder / "applied").read_text(encoding="utf-8")
        assert yaml.safe_load(applied) == _rendered(machine)


def test_a_cluster_that_cannot_be_reached_ends_it(machine):
    done = machine.run(sys.executable, SCRIPT, *GIVEN, *PROGRAM)
    assert done.returncode == 99
    assert len(machine.calls("kubectl")) == 1


@pytest.mark.parametrize(
    ("action", "words"), [("status", ["get"]), ("logs", ["logs", "--follow"]), ("stop", ["delete"])]
)
def test_status_logs_and_stop_need_no_more_than_the_name(machine, action, words):
    machine.program("kubectl")
    assert machine.run(sys.executable, SCRIPT, "--name=vit", f"--{action}").returncode == 0
    assert machine.calls("kubectl", *words)
    assert machine.run(sys.executable, SCRIPT, f"--{action}").returncode == 2
