"""TPU VMs with a made-up gcloud: workers are folders of this machine, and a queue goes through the states of a list."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import subprocess

import machines
import pytest

LAUNCH = machines.REPOSITORY / "launch"
PROGRAM = ["--config=a", "--workdir=/mnt/shared/it's (new)"]
TPU = ["--name=my-tpu", "--zone=us-east1-d"]
# Stands in for the Python of a worker: ends with the next of the codes in ~/codes, or waits for SIGTERM where that is `wait`.
PYTHON = """
echo $$ >"$HOME/program"
echo "process of $HOME: $ROBUST_VIT_DISTRIBUTED $*"
printf '%q ' "$@" >>"$HOME/arguments"; echo >>"$HOME/arguments"
code=$(head -n 1 "$HOME/codes"); sed -i 1d "$HOME/codes"
[[ "$code" == wait ]] || exit "$code"
sleep 300 & echo $! >"$HOME/child"
trap 'echo saved; exit 75' TERM
touch "$HOME/waits"
while :; do sleep 0.02; done
"""
# Runs what ssh is told on each worker, a folder; objects of gs://b are files in $BUCKET.
GCLOUD = """
case "$*" in
  *tpu-vm\\ scp*) for worker in "$HOME"/worker_*; do cp "$5" "$worker/"; done ;;
  *tpu-vm\\ ssh*)
    for argument in "$@"; do
      case "$argument" in
        --worker=all) workers=("$HOME"/worker_*) ;;
        --worker=*) workers=("$HOME/worker_${argument#*=}") ;;
        --command=*) command=${argument#*=} ;;
      esac
    done
    result=0
    for worker in "${workers[@]}"; do (cd "$worker" && HOME=$worker bash -c "$command") || result=$?; done
    exit "$result"
    ;;
  "storage cp - "*) cat >"$BUCKET/${4##*/}" ;;
  "storage cp "*) cp "$3" "$BUCKET/${4##*/}" ;;
  "storage ls "*) for object in "$BUCKET"/*; do echo "$3${object##*/}"; done ;;
  "storage cat "*) cat "$BUCKET/${3##*/}" ;;
  "storage rm "*) rm "$BUCKET/${3##*/}" ;;
  *describe*|*create*|*delete*) source "$HOME/queue.sh" ;;
  *) exit 99 ;;
esac
"""


@pytest.fixture
def cloud(machine):
    """A machine with gcloud, two workers and a bucket; whatever still runs on the workers is ended afterwards."""
    bucket = machine.folder / "bucket"
    bucket.mkdir()
    machine.environment["BUCKET"] = str(bucket)
    machine.program("gcloud", GCLOUD)
    machine.program("curl", 'echo "${WORKER:-0}"')
    workers = [_worker(machine.folder / f"worker_{index}") for index in range(2)]
    yield machine
    for home in workers:
        machines.kill(*(home / name for name in ("robust_vit_job/pid", "program", "child")))


def _worker(home: pathlib.Path) -> pathlib.Path:
    """The home of a worker on which the packages are installed already."""
    programs = home / "robust_vit_job" / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f"#!/usr/bin/env bash\n{PYTHON}", encoding="utf-8")
    (programs / "python").chmod(0o755)
    setup = (machines.REPOSITORY / "setup.py").read_bytes()
    checksum = subprocess.run(["cksum"], input=setup, capture_output=True, check=True).stdout.decode().strip()
    (home / "robust_vit_job" / "venv" / "installed").write_text(f"jax[tpu] {checksum}", encoding="utf-8")
    (home / "codes").write_text("0\n", encoding="utf-8")
    return home


def _codes(cloud: machines.Machine, *codes: object, worker: int = 0) -> None:
    text = "".join(f"{code}\n" for code in codes)
    (cloud.folder / f"worker_{worker}" / "codes").write_text(text, encoding="utf-8")


def _runs(cloud: machines.Machine, worker: int = 0) -> list[list[str]]:
    """The arguments of every start of the program on a worker."""
    path = cloud.folder / f"worker_{worker}" / "arguments"
    return [shlex.split(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _job(cloud: machines.Machine, *options: str, worker: int = 0) -> subprocess.Popen:
    """Runs the job of one worker in the foreground, as a startup script does."""
    home = cloud.folder / f"worker_{worker}"
    code = home / "robust_vit_job" / "code.new"
    code.mkdir()
    subprocess.run(["cp", "-r", LAUNCH, machines.REPOSITORY / "setup.py", code], check=True)
    log = (home / "robust_vit_job" / "log").open("wb")
    return subprocess.Popen(
        ["bash", code / "launch" / "tpu_worker.sh", "run", "--pause=0", *options, "--", *PROGRAM],
        env={**cloud.environment, "HOME": str(home), "WORKER": str(worker)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("codes", "retries", "ends_with", "marker"),
    [
        ((0,), 3, 0, "finished"),
        ((2, 0), 3, 2, "mistake"),
        ((75, 75, 0), 0, 0, "finished"),
        ((1, 134, 0), 2, 0, "finished"),
        ((1, 75, 134, 0), 1, 134, "crashed"),
    ],
)
def test_a_worker_repeats_what_may_be_repeated_and_writes_how_it_ended(cloud, codes, retries, ends_with, marker):
    _codes(cloud, *codes)
    job = _job(cloud, f"--retries={retries}", "--markers=gs://b/jobs/my-tpu")
    assert job.wait(machines.LIMIT) == ends_with
    assert len(_runs(cloud)) == (len(codes) if ends_with == 0 else codes.index(ends_with) + 1)
    assert set(map(tuple, _runs(cloud))) == {("-m", "robust_vit.main", *PROGRAM)}
    bucket = cloud.folder / "bucket"
    assert [path.name for path in bucket.iterdir()] == [marker]
    assert f"exit code {ends_with}" in (bucket / marker).read_text(encoding="utf-8")
    job = cloud.folder / "worker_0" / "robust_vit_job"
    assert (job / "exit_code").read_text(encoding="utf-8") == f"{ends_with}\n"


def test_only_worker_0_says_that_the_job_is_finished(cloud):
    assert _job(cloud, "--markers=gs://b/jobs/my-tpu", worker=1).wait(machines.LIMIT) == 0
    assert list((cloud.folder / "bucket").iterdir()) == []


def test_the_setup_command_runs_first_and_its_failure_is_a_crash(cloud):
    assert _job(cloud, "--setup=touch $HOME/mounted").wait(machines.LIMIT) == 0
    assert (cloud.folder / "worker_0" / "mounted").exists()
    assert _job(cloud, "--retries=1", "--setup=exit 2", worker=1).wait(machines.LIMIT) == 1
    assert _runs(cloud, 1) == []


def test_sigterm_lets_the_program_of_a_worker_save_and_leaves_nothing(cloud):
    _codes(cloud, "wait")
    home = cloud.folder / "worker_0"
    job = _job(cloud, "--markers=gs://b/jobs/my-tpu")
    machines.until((home / "waits").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(machines.LIMIT) == 75
    assert "saved" in (home / "robust_vit_job" / "log").read_text(encoding="utf-8")
    assert list((cloud.folder / "bucket").iterdir()) == [], "a job that was stopped is not over"
    pids = machines.processes(home / "child", home / "program", home / "robust_vit_job" / "pid")
    machines.until(lambda: not any(map(machines.lives, pids)))
    machines.until(lambda: str(home) not in _commands())  # Neither stays the watchdog that would have killed it.


def _commands() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_job_runs_on_all_workers_and_its_exit_code_comes_back(cloud):
    _codes(cloud, 3, worker=0)
    _codes(cloud, 3, worker=1)
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, "--retries=0", *PROGRAM)
    assert done.returncode == 3, done.stderr
    assert "worker_0: 1 -m robust_vit.main --config=a" in done.stdout
    assert "worker_1" not in done.stdout.replace("started", ""), "only worker 0's log is shown"
    for worker in range(2):
        machines.until(lambda worker=worker: _runs(cloud, worker))
        assert _runs(cloud, worker) == [["-m", "robust_vit.main", *PROGRAM]]
        code = cloud.folder / f"worker_{worker}" / "robust_vit_job" / "code"
        assert (code / "robust_vit" / "main.py").exists()
    for worker in range(2):
        _codes(cloud, 0, worker=worker)
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, *PROGRAM)
    assert done.returncode == 0, "the same command starts the job again"


def test_a_running_job_is_seen_kept_and_stopped(cloud):
    for worker in range(2):
        _codes(cloud, "wait", worker=worker)
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, "--no_follow", *PROGRAM)
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        machines.until((cloud.folder / f"worker_{worker}" / "waits").exists)
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, "--status")
    assert done.stdout.count(": running: process of") == 2
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, "--no_follow", *PROGRAM)
    assert done.returncode == 2
    assert "runs here already" in done.stderr
    assert len(_runs(cloud)) == 1
    follower = cloud.start(LAUNCH / "tpu_vm.sh", *TPU, "--logs")
    done = cloud.run(LAUNCH / "tpu_vm.sh", *TPU, "--stop")
    assert done.stdout.count("ended with 75") == 2, done.stdout
    assert machines.finish(follower).returncode == 75


QUEUED = [*TPU, "--accelerator=v6e-16", "--runtime=v2-alpha-tpuv6e", "--bucket=gs://b/jobs", "--spot", "--poll=0"]
# Each look takes a line of ~/states: `STATE [NODE]`, and once `!` stands before it, the worker has written that marker.
QUEUE = """
lost() { echo "ERROR: (gcloud) NOT_FOUND: it was not found" >&2; exit 1; }
case "$*" in
  *queued-resources*create*) echo "QUEUED" >"$HOME/exists"; exit "${CREATE:-0}" ;;
  *queued-resources*delete*) rm "$HOME/exists" ;;
  *queued-resources*yaml*) echo "state: why" ;;
  *queued-resources*describe*)
    [[ -e "$HOME/unreachable" ]] && { echo "ERROR: no network" >&2; exit 1; }
    [[ -e "$HOME/exists" ]] || lost
    read -r state node <"$HOME/states"
    sed -i 1d "$HOME/states"
    [[ "$node" != !* ]] || { echo "the end of the log" >"$BUCKET/${node#!}"; node=READY; }
    echo "$node" >"$HOME/node"
    echo "$state"
    ;;
  *tpu-vm*describe*) [[ "$(cat "$HOME/node")" != gone ]] || lost; cat "$HOME/node" ;;
esac
"""


@pytest.fixture
def queue(cloud):
    """Sets the states that the queue goes through."""
    (cloud.folder / "queue.sh").write_text(QUEUE, encoding="utf-8")

    def states(*lines: str, exists: bool = False) -> machines.Machine:
        (cloud.folder / "states").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if exists:
            (cloud.folder / "exists").touch()
        return cloud

    return states


def _verbs(cloud: machines.Machine) -> list[str]:
    """What was done to the queued resource, in order."""
    return [call[4] for call in cloud.calls("gcloud", "queued-resources") if call[4] in ("create", "delete")]


def test_tpus_that_are_taken_away_are_asked_for_again_until_the_job_is_finished(queue):
    waits = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE READY")
    cloud = queue(
        *waits,
        *("SUSPENDING", "SUSPENDED"),
        *(*waits, "FAILED"),
        *(*waits, "ACTIVE PREEMPTED"),
        *(*waits, "ACTIVE gone"),
        *(*waits, "ACTIVE READY", "ACTIVE !finished"),
    )
    (cloud.folder / "bucket" / "finished").write_text("of an earlier job", encoding="utf-8")
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, "--setup=mount a:/b /mnt", *PROGRAM)
    assert done.returncode == 0, done.stderr
    assert _verbs(cloud) == ["create", "delete"] * 5
    create = cloud.calls("gcloud", "create")[0]
    assert {"--node-id=my-tpu", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"} <= set(
        create
    )
    assert (cloud.folder / "bucket" / "code.tar.gz").stat().st_size > 10_000
    assert "--force" in cloud.calls("gcloud", "delete")[0]
    assert not (cloud.folder / "exists").exists()
    for state in ("WAITING_FOR_RESOURCES", "SUSPENDED", "FAILED", "LOST", "finished"):
        assert state in done.stderr


@pytest.mark.parametrize(("marker", "code"), [("mistake", 2), ("crashed", 1)])
def test_a_job_that_cannot_go_on_gives_its_tpus_back_and_says_why(queue, marker, code):
    cloud = queue("ACTIVE READY", f"ACTIVE !{marker}")
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, *PROGRAM)
    assert done.returncode == code
    assert "the end of the log" in done.stderr
    assert _verbs(cloud) == ["create", "delete"]


def test_what_exists_is_watched_over_and_may_be_kept(queue):
    cloud = queue("ACTIVE READY", "ACTIVE !finished", exists=True)
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, "--keep", *PROGRAM)
    assert done.returncode == 0, done.stderr
    assert _verbs(cloud) == []
    assert "watches over it" in done.stderr
    assert not (cloud.folder / "bucket" / "code.tar.gz").exists(), "a running job keeps its code"
    cloud = queue("ACTIVE READY", exists=True)
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, *PROGRAM)
    assert _verbs(cloud) == ["delete"], "it was finished while nobody watched"


def test_a_job_that_is_called_finished_is_not_taken_for_one(queue):
    cloud = queue("ACTIVE READY", "ACTIVE READY", "ACTIVE !mistake")
    names = ["--name=finished-job" if argument == "--name=my-tpu" else argument for argument in QUEUED]
    assert cloud.run(LAUNCH / "tpu_queued.sh", *names, *PROGRAM).returncode == 2


def test_it_gives_up_after_the_given_number_of_recreations(queue):
    cloud = queue(*["FAILED"] * 3)
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, "--recreations=2", *PROGRAM)
    assert done.returncode == 1
    assert _verbs(cloud) == ["create", "delete"] * 3
    assert "given up" in done.stderr


def test_an_unreachable_cloud_is_a_mistake_at_first_and_endured_later(queue):
    cloud = queue("ACTIVE READY")
    (cloud.folder / "unreachable").touch()
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, *PROGRAM)
    assert done.returncode == 2
    assert "no network" in done.stderr
    (cloud.folder / "unreachable").unlink()
    babysitter = cloud.start(LAUNCH / "tpu_queued.sh", *QUEUED[:-1], "--poll=1", *PROGRAM)
    machines.until(lambda: _verbs(cloud))
    (cloud.folder / "unreachable").touch()
    looks = len(cloud.calls("gcloud", "describe"))
    machines.until(lambda: len(cloud.calls("gcloud", "describe")) > looks)
    os.killpg(babysitter.pid, signal.SIGINT)
    done = machines.finish(babysitter)
    assert done.returncode == 130
    assert "the job goes on" in done.stderr
    assert _verbs(cloud) == ["create"]


def test_the_startup_script_fetches_the_code_and_runs_the_job(queue):
    cloud = queue()
    done = cloud.run(LAUNCH / "tpu_queued.sh", *QUEUED, "--setup=mount a:/b /mnt", "--dry_run", *PROGRAM)
    script = done.stdout.partition("# startup.sh:\n")[2].partition("# whenever")[0]
    assert cloud.run("bash", "-n", "-c", script).returncode == 0
    line = next(line for line in script.splitlines() if line.startswith("exec"))
    words = shlex.split(line.removesuffix(" >>log 2>&1"))
    assert words[1:6] == [
        "bash",
        "code.new/launch/tpu_worker.sh",
        "run",
        "--markers=gs://b/jobs/my-tpu",
        "--setup=mount a:/b /mnt",
    ]
    assert words[6:] == ["--", *PROGRAM]
