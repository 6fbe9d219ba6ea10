"""What all launchers have in common: help, one-line errors, dry runs that touch nothing, quoting, shellcheck."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import sys

import machines
import pytest

LAUNCH = machines.REPOSITORY / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Arguments that a shell would take apart.
AWKWARD = ["--config=configs/a.py:b", "--workdir=/mnt/shared/it's (new)", "--config.x=(1, 2)", "--config.y=$HOME;*"]
TPU = ["--name=my-tpu", "--zone=us-east1-d"]
QUEUED = [*TPU, "--accelerator=v6e-16", "--runtime=v2-alpha-tpuv6e", "--bucket=gs://b/jobs"]
GKE = ["--name=vit", "--image=i", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--claim=shared"]
COMPLETE = {"slurm.sh": [], "tpu_vm.sh": TPU, "tpu_queued.sh": QUEUED, "gke_jobset.py": GKE}
PROGRAM = ["--config=a", "--workdir=/mnt/shared/b"]


def _command(name: str) -> list[object]:
    return [sys.executable, LAUNCH / name] if name.endswith(".py") else [LAUNCH / name]


def test_every_script_passes_shellcheck(machine):
    beside = pathlib.Path(sys.executable).parent
    found = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert found, "shellcheck is missing: pip install 'robust_vit[test]'"
    assert len(SCRIPTS) >= 5
    done = machine.run(found, "--external-sources", *SCRIPTS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [*COMPLETE, "local_processes.py", "tpu_worker.sh"])
def test_help_shows_the_command_to_copy(machine, name):
    done = machine.run(*_command(name), "--help")
    assert done.returncode == 0
    assert f"launch/{name} --" in done.stdout or name == "tpu_worker.sh"
    assert "--config=" in done.stdout or name == "tpu_worker.sh"
    assert "set -euo" not in done.stdout
    assert os.access(LAUNCH / name, os.X_OK) or name.endswith(".py")


@pytest.mark.parametrize("name", COMPLETE)
def test_a_dry_run_shows_the_program_as_it_was_asked_for_and_calls_nothing(machine, name):
    done = machine.run(*_command(name), *COMPLETE[name], "--dry_run", *AWKWARD)
    assert done.returncode == 0, done.stderr
    assert machine.calls() == []
    if name == "gke_jobset.py":
        return  # Its YAML is read in test_gke.py.
    [line] = [line for line in done.stdout.splitlines() if "configs/a.py:b" in line]
    words = shlex.split(line.removesuffix(" &").removesuffix(" >>log 2>&1"))
    if name == "tpu_vm.sh":  # Here the program is part of a command that ssh hands to another shell.
        [command] = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
        words = shlex.split(command)
    assert words[-len(AWKWARD) :] == AWKWARD


@pytest.mark.parametrize("name", COMPLETE)
def test_two_dashes_may_stand_before_the_program(machine, name):
    plain = machine.run(*_command(name), *COMPLETE[name], "--dry_run", *PROGRAM)
    dashed = machine.run(*_command(name), *COMPLETE[name], "--dry_run", "--", *PROGRAM)
    assert plain.stdout == dashed.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, [*given, "--workdir=/mnt/shared/b"], "--config=") for name, given in COMPLETE.items()),
        *((name, [*given, "--config=a"], "--workdir=") for name, given in COMPLETE.items()),
        *((name, [*given, "--nonsense=1", *PROGRAM], "--nonsense=1") for name, given in COMPLETE.items()),
        *((name, [*given, "--config=a", "--workdir=gs://b"], "gs://b") for name, given in COMPLETE.items()),
        ("slurm.sh", ["--nodes=0", *PROGRAM], "--nodes=0"),
        ("slurm.sh", ["--nodes=", *PROGRAM], "--nodes="),
        ("slurm.sh", ["--gpus_per_node=four", *PROGRAM], "--gpus_per_node=four"),
        ("slurm.sh", ["--name=a;b", *PROGRAM], "--name=a;b"),
        ("tpu_vm.sh", ["--zone=us-east1-d", *PROGRAM], "--name="),
        ("tpu_vm.sh", ["--name=my-tpu", *PROGRAM], "--zone="),
        ("tpu_vm.sh", ["--name=my_tpu", "--zone=us-east1-d", *PROGRAM], "--name=my_tpu"),
        ("tpu_vm.sh", [*TPU, "--retries=many", *PROGRAM], "--retries=many"),
        ("tpu_vm.sh", [*TPU, "--config=a", "--workdir=runs/b"], "absolute"),
        ("tpu_queued.sh", [*QUEUED[:2], *QUEUED[3:], *PROGRAM], "--accelerator="),
        ("tpu_queued.sh", [*QUEUED[:3], *QUEUED[4:], *PROGRAM], "--runtime="),
        ("tpu_queued.sh", [*QUEUED[:-1], "--bucket=/local", *PROGRAM], "--bucket=/local"),
        ("tpu_queued.sh", [*QUEUED, "--poll=soon", *PROGRAM], "--poll=soon"),
        ("gke_jobset.py", [*GKE[:1], *GKE[2:], *PROGRAM], "--image="),
        ("gke_jobset.py", [*GKE, "--topology=16", *PROGRAM], "--topology=16"),
        ("gke_jobset.py", [*GKE, "--topology=3x3", *PROGRAM], "9 chips"),
        ("gke_jobset.py", [*GKE, "--slices=0", *PROGRAM], "--slices=0"),
        ("gke_jobset.py", [*GKE, "--name=a_b", *PROGRAM], "--name=a_b"),
        ("gke_jobset.py", [*GKE, "--config=a", "--workdir=/home/b"], "--mount=/mnt/shared"),
        ("gke_jobset.py", [*GKE, "--slices=many", *PROGRAM], "--slices"),
    ],
)
def test_mistakes_are_one_line_and_call_nothing(machine, name, arguments, message):
    done = machine.run(*_command(name), *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert machine.calls() == []
