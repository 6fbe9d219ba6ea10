"""The job that slurm.sh submits, run here by programs that behave as Slurm 22.05 was seen to."""

from __future__ import annotations

import signal

import machines
import pytest

SCRIPT = machines.REPOSITORY / "launch" / "slurm.sh"
PROGRAM = ["--config=a", "--workdir=b (c)"]
# srun reports the highest code of its processes, and answers SIGTERM by killing them.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
"$@" & task=$!
trap 'kill -KILL $task $(cat "$HOME/python.pid"); exit 137' TERM
wait $task
exit $?
"""


@pytest.fixture
def cluster(machine):
    """A machine whose srun runs one process, a `python` that ends with $CODE, or waits for SIGTERM where that is empty."""
    machine.program("sbatch", 'cat >"$HOME/submitted"')
    machine.program("srun", SRUN)
    machine.program("scontrol")
    machine.program("squeue", 'echo "${STATE:-RUNNING}"')
    machine.program("scancel", 'kill -TERM $(cat "$HOME/python.pid")')
    wait = 'trap "echo saved; exit 75" TERM; echo $$ >"$HOME/python.pid"; while :; do sleep 0.02; done'
    machine.program("python", f'echo "distributed:$ROBUST_VIT_DISTRIBUTED"; [[ -z "$CODE" ]] || exit "$CODE"; {wait}')
    return machine


def _submit(cluster: machines.Machine, *options: str) -> str:
    done = cluster.run(SCRIPT, *options, *PROGRAM)
    assert done.returncode == 0, done.stderr
    return (cluster.folder / "submitted").read_text(encoding="utf-8")


def test_the_job_is_what_the_dry_run_shows(cluster):
    options = ["--nodes=2", "--gpus_per_node=4", "--cpus_per_task=8", "--name=mine"]
    job = _submit(cluster, *options)
    assert cluster.run(SCRIPT, "--dry_run", *options, *PROGRAM).stdout == job
    asked = [line.removeprefix("#SBATCH ") for line in job.splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=mine",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--signal=B:TERM@300",
        "--requeue",
        "--open-mode=append",
        "--output=mine-%j.log",
    ]
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=8 bash" in job
    assert "export ROBUST_VIT_DISTRIBUTED=1" in job
    assert "ROBUST_VIT_DISTRIBUTED" not in _submit(cluster)
    assert "ROBUST_VIT_DISTRIBUTED" in _submit(cluster, "--nodes=2")
    assert "ROBUST_VIT_DISTRIBUTED" in _submit(cluster, "--gpus_per_node=2")


@pytest.mark.parametrize(
    ("code", "restarts", "state", "ends_with", "requeued"),
    [
        (0, 0, "RUNNING", 0, False),
        (2, 0, "RUNNING", 2, False),
        (75, 99, "RUNNING", 75, True),
        (75, 0, "COMPLETING", 75, False),  # Cancelled, or preempted: then Slurm itself puts it back.
        (1, 0, "RUNNING", 1, True),
        (134, 2, "RUNNING", 134, True),
        (134, 3, "RUNNING", 134, False),
    ],
)
def test_what_happens_after_each_exit_code(cluster, code, restarts, state, ends_with, requeued):
    _submit(cluster, "--nodes=2", "--retries=3")
    variables = {"SLURM_JOB_ID": "7", "CODE": str(code), "SLURM_RESTART_COUNT": str(restarts), "STATE": state}
    done = cluster.run("bash", cluster.folder / "submitted", **variables)
    assert done.returncode == ends_with, done.stderr
    assert cluster.calls("scontrol") == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert cluster.calls("python") == [["python", "-m", "robust_vit.main", *PROGRAM]]
    assert "distributed:1" in done.stdout


def test_sigterm_reaches_the_program_which_saves_and_goes_back_into_the_queue(cluster):
    _submit(cluster)
    job = cluster.start("bash", cluster.folder / "submitted", SLURM_JOB_ID="7", CODE="")
    machines.until((cluster.folder / "python.pid").exists)
    job.send_signal(signal.SIGTERM)
    done = machines.finish(job)
    assert done.returncode == 75, done.stderr
    assert "saved" in done.stdout
    assert cluster.calls("scancel") == [["scancel", "--signal=TERM", "7"]]
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "7"]]


def test_a_mistake_outranks_every_other_exit_code_of_a_step(cluster):
    job = _submit(cluster)
    step = next(line for line in job.splitlines() if line.startswith("task="))
    code = cluster.run("bash", "-c", f'{step}; bash -c "$task" task bash -c "exit 2"').returncode
    assert code > 128 + 64, "higher than the code of a process that any signal killed"
