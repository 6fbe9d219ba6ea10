"""Runs robust_vit on TPU slices of a GKE cluster: renders a JobSet and hands it to kubectl.

    python launch/gke_jobset.py --name=vit-b16 --image=us-docker.pkg.dev/my/images/robust_vit \\
        --accelerator=tpu-v6e-slice --topology=4x4 --claim=shared --mount=/mnt/shared \\
        --config=configs/vit_b16.py --workdir=/mnt/shared/vit_b16

The launcher's own options come first; from `--config=` (or from `--`) on, every flag is one of `robust_vit.main`. The
image is built from launch/Dockerfile; the claim is a volume that all pods may write (ReadWriteMany: Filestore, Lustre,
gcsfuse). The cluster needs the JobSet controller.

When a pod fails or is taken away, all are started again and go on from the last checkpoint, up to --max_restarts times;
a user's mistake (exit code 2) ends the JobSet at once. SIGTERM leaves 300 seconds to save (on spot nodes GKE cuts that
to 15-25). The same command runs a job again that has ended, and goes on; a running one is left alone.

Instead of running a job: --status, --logs (of the first pod), --stop (saves and ends it). --dry_run prints everything
and calls nothing. Exit codes: 0, 2 for a mistake, otherwise kubectl's.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

EXIT_USER_ERROR = 2
CONTAINER = "robust-vit"
SLICE = "slice"  # The name of the replicated job: one replica is one TPU slice.
SECONDS_TO_SAVE = 300


def jobset(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) as nested dicts: one job a slice, one pod a machine of the slice."""
    chips = math.prod(int(side) for side in options.topology.split("x"))
    chips_per_pod = min(options.chips_per_node, chips)
    if chips % chips_per_pod:
        raise ValueError(f"--topology={options.topology}: {chips} chips are no multiple of --chips_per_node.")
    pods = chips // chips_per_pod
    pod = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it; the JobSet starts all pods again together.
        "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": options.accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        },
        "containers": [_container(options, arguments, chips_per_pod)],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    pod_metadata: dict[str, Any] = {}
    if options.spot:
        spot = {"cloud.google.com/gke-spot": "true"}
        pod["nodeSelector"] |= spot
        pod["tolerations"] = [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} for key, value in spot.items()
        ]
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.gcsfuse:
        pod_metadata = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}}
    if options.slices > 1:  # Slices talk over the data-centre network, which is faster without the pod network between.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    metadata: dict[str, Any] = {
        "name": options.name,
        # One slice, one node pool: a job never gets machines of two half slices.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if options.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # A pod is never replaced alone: the processes of a job share their fate.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_USER_ERROR]},
                }
            ]
        },
        "template": {**pod_metadata, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # A headless service: the pods find the coordinator by its name before they are ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                # The reason of a job that its podFailurePolicy ended, so exit code 2; everything else restarts.
                "rules": [
                    {"name": "user_mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": SLICE, "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options and the program's arguments; exits with 2 and one line when they are wrong."""
    of_program = [argument == "--" or argument.startswith(("--config=", "--workdir=")) for argument in argv]
    start = of_program.index(True) if True in of_program else len(argv)
    arguments = list(argv[start + 1 :] if argv[start : start + 1] == ["--"] else argv[start:])
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--namespace", help="of Kubernetes (default: kubectl's)")
    add("--image", help="built from launch/Dockerfile")
    add("--accelerator", help="the node label cloud.google.com/gke-tpu-accelerator, for example tpu-v6e-slice")
    add("--topology", help="chips of one slice, for example 4x4")
    add("--chips_per_node", type=int, default=4, help="chips of one machine (default 4)")
    add("--slices", type=int, default=1, help="how many slices (default 1)")
    add("--claim", help="the persistent volume claim that holds --workdir")
    add("--mount", default="/mnt/shared", help="where it is mounted (default /mnt/shared)")
    add("--gcsfuse", action="store_true", help="the claim is a bucket, mounted by the gcsfuse driver")
    add("--spot", action="store_true", help="on spot nodes")
    add("--queue", help="the LocalQueue of Kueue")
    add("--service_account", help="of Kubernetes, with access to the volume")
    add("--max_restarts", type=int, default=50, help="after crashes and preemptions (default 50)")
    add("--dry_run", action="store_true", help="print everything and call nothing")
    instead = parser.add_mutually_exclusive_group()
    for action in ("status", "logs", "stop"):
        instead.add_argument(f"--{action}", action="store_true")
    options = parser.parse_args(argv[:start])
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        parser.error(f"--name={options.name}: expected up to 40 lower-case letters, digits and hyphens.")
    if options.status or options.logs or options.stop:
        return options, arguments
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in arguments}
    for flag in ("--config", "--workdir"):
        if not given.get(flag):
            parser.error(f"{flag}= is missing: what to run, and where its results go.")
    for option in ("image", "accelerator", "topology", "claim"):
        if not getattr(options, option):
            parser.error(f"--{option}= is missing.")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", options.topology):
        parser.error(f"--topology={options.topology}: expected AxB or AxBxC, for example 4x4.")
    for option in ("chips_per_node", "slices"):
        if getattr(options, option) < 1:
            parser.error(f"--{option}={getattr(options, option)}: expected 1 or more.")
    if options.max_restarts < 0:
        parser.error(f"--max_restarts={options.max_restarts}: expected 0 or more.")
    if not given["--workdir"].startswith(options.mount.rstrip("/") + "/"):
        parser.error(
            f"--workdir={given['--workdir']}: expected a folder under --mount={options.mount}, which all pods share."
        )
    try:
        jobset(options, arguments)
    except ValueError as error:
        parser.error(str(error))
    return options, arguments


def main(argv: Sequence[str]) -> int:
    """Does what was asked and returns the exit code."""
    options, arguments = parse(argv)
    kubectl = ["kubectl", *([f"--namespace={options.namespace}"] if options.namespace else [])]
    if options.status:
        pods = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
        return _run([*kubectl, "get", "jobset", options.name], options) or _run(
            [*kubectl, "get", "pods", pods], options
        )
    if options.logs:
        first = f"{options.name}-{SLICE}-0"
        selector = f"--selector=batch.kubernetes.io/job-name={first},batch.kubernetes.io/job-completion-index=0"
        return _run([*kubectl, "logs", "--follow", "--tail=100", f"--container={CONTAINER}", selector], options)
    delete = [*kubectl, "delete", "jobset", options.name, "--ignore-not-found", "--cascade=foreground", "--wait"]
    if options.stop:
        return _run(delete, options)
    look = [
        *kubectl,
        "get",
        "jobset",
        options.name,
        "--ignore-not-found",
        '--output=jsonpath={.metadata.name} {.status.conditions[?(@.status=="True")].type}',
    ]
    text = yaml.safe_dump(jobset(options, arguments), sort_keys=False, width=10_000)
    if options.dry_run:
        print(f"# {shlex.join(look)}\n# when that says Completed or Failed: {shlex.join(delete)}")
        print(f"# {shlex.join([*kubectl, 'apply', '--filename=-'])} <<EOF\n{text}# EOF")
        return 0
    found = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        return found.returncode
    conditions = found.stdout.split()
    if conditions and not {"Completed", "Failed"} & set(conditions[1:]):
        print(f"error: the JobSet {options.name} runs already: --stop ends it, --logs shows it.", file=sys.stderr)
        return EXIT_USER_ERROR
    if conditions and (code := _run(delete, options)):
        return code
    return subprocess.run([*kubectl, "apply", "--filename=-"], input=text, text=True, check=False).returncode


def _container(options: argparse.Namespace, arguments: Sequence[str], chips: int) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "-m", "robust_vit.main", *(_literal(argument) for argument in arguments)],
        "env": [{"name": "ROBUST_VIT_DISTRIBUTED", "value": "1"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        # TPU runtime, JAX's coordinator.
        "ports": [{"containerPort": port} for port in (8471, 8482)],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [
            {"name": "shared", "mountPath": options.mount},
            {"name": "memory", "mountPath": "/dev/shm"},  # Data workers share images through it; the default is 64 MB.
        ],
    }


def _literal(argument: str) -> str:
    """Kubernetes replaces $(NAME) in commands; a doubled dollar is a plain one."""
    return argument.replace("$(", "$$(")


def _run(command: list[str], options: argparse.Namespace) -> int:
    if options.dry_run:
        print(shlex.join(command))
        return 0
    return subprocess.run(command, check=False).returncode


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(EXIT_USER_ERROR, f"error: {message} (--help lists the options)\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
