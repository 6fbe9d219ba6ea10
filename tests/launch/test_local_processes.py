"""Processes of one machine: they share their fate, leave nothing behind, and their exit codes are judged together."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import sys

import jax
import machines
import pytest

from robust_vit import programs

LAUNCHER = machines.REPOSITORY / "launch" / "local_processes.py"
# A program that does what --config says for its process: `exit:2`, `hang`, `crash`, `stubborn`, a comma between processes.
PROGRAM = """
import os, pathlib, signal, subprocess, sys, time
config, folder = (argument.partition("=")[2] for argument in sys.argv[1:3])
me = int(os.environ["ROBUST_VIT_PROCESS"])
attempts = pathlib.Path(folder) / f"attempts_{me}"
attempt = int(attempts.read_text()) if attempts.exists() else 0
task = config.split(";")[min(attempt, config.count(";"))].split(",")[me]
def saved(*_):
    print("saved", flush=True)
    sys.exit(75)
if task != "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN if task == "stubborn" else saved)
child = subprocess.Popen(["sleep", "300"]) if task == "parent" else None
names = ("COORDINATOR", "PROCESSES", "PROCESS")
print("ready", me, *(os.environ["ROBUST_VIT_" + name] for name in names), os.environ["JAX_NUM_CPU_DEVICES"],
      os.environ["JAX_PLATFORMS"], os.environ["NPROC"], flush=True)
(pathlib.Path(folder) / f"pid_{me}").write_text(f"{os.getpid()} {child.pid if child else ''}")
attempts.write_text(str(attempt + 1))
everybody = [pathlib.Path(folder) / f"attempts_{i}" for i in range(int(os.environ["ROBUST_VIT_PROCESSES"]))]
while not all(path.exists() and path.read_text() == str(attempt + 1) for path in everybody):
    time.sleep(0.01)  # Nobody acts before everybody listens to signals.
if task == "crash":
    print("before the crash", flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
elif task.startswith("exit:"):
    sys.exit(int(task[5:]))
time.sleep(300)
"""


@pytest.fixture
def job(machine, tmp_path):
    """Starts the launcher on the made-up program; `folder` is where it keeps its notes."""
    (tmp_path / "robust_vit").mkdir()
    (tmp_path / "robust_vit" / "__init__.py").touch()
    (tmp_path / "robust_vit" / "main.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "w").mkdir()

    def start(config: str, *options: str):
        processes = config.split(";")[0].count(",") + 1
        given = (
            f"--processes={processes}",
            "--seconds_to_end=0.3",
            *options,
            f"--config={config}",
            f"--workdir={tmp_path}/w",
        )
        return machine.start(sys.executable, LAUNCHER, *given, cwd=tmp_path)

    yield start
    machines.kill(*(tmp_path / "w").glob("pid_*"))


def _pids(folder: pathlib.Path) -> list[int]:
    return machines.processes(*folder.glob("pid_*"))


def _all_end(folder: pathlib.Path) -> None:
    """The launcher has ended: so do all processes, as soon as the kernel has done what it was told."""
    machines.until(lambda: not any(map(machines.lives, _pids(folder / "w"))))


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("exit:0", 0),
        ("exit:0,exit:0", 0),
        ("exit:0,exit:75", 75),
        ("exit:75,exit:1", 1),
        ("exit:1,exit:2", 2),
        ("crash,exit:2", 2),
        ("hang,exit:3", 3),
        ("stubborn,crash", 128 + signal.SIGABRT),
        ("deaf,crash", 128 + signal.SIGABRT),
        ("parent,exit:2,stubborn", 2),
    ],
)
def test_the_job_has_the_worst_meaningful_exit_code(job, tmp_path, config, code):
    done = machines.finish(job(config))
    assert done.returncode == code, done.stderr
    _all_end(tmp_path)


def test_the_memory_of_the_machine_is_shared_out(monkeypatch):
    monkeypatch.syspath_prepend(LAUNCHER.parent)
    import local_processes

    flags = ["--processes=3", "--devices_per_process=2", "--config=a", "--workdir=b"]
    monkeypatch.delenv(programs.LIMIT_VARIABLE, raising=False)
    alone = programs.device_memory() * jax.local_device_count()
    shares = [
        float(variables[programs.LIMIT_VARIABLE]) * 2**30
        for variables in local_processes.plan(local_processes.parse(flags)[0])
    ]
    assert shares == pytest.approx([alone / 6] * 3, rel=1e-3)
    monkeypatch.setenv(programs.LIMIT_VARIABLE, "7")
    for variables in local_processes.plan(local_processes.parse(flags)[0]):
        assert programs.LIMIT_VARIABLE not in variables, "what the user says stays"


def test_the_end_of_the_log_of_the_process_that_crashed_is_shown(job, tmp_path):
    done = machines.finish(job("hang,crash"))
    assert "process 1 ended with 134" in done.stderr
    assert "before the crash" in done.stderr
    assert "before the crash" not in done.stdout
    assert "saved" in (tmp_path / "w.logs" / "process_0.log").read_text(encoding="utf-8")


def test_each_process_is_told_who_it_is_and_gets_its_share_of_the_cores(job, tmp_path):
    done = machines.finish(job("exit:0,exit:0", "--devices_per_process=3", "--show=all"))
    lines = sorted(line for line in done.stdout.splitlines() if "ready" in line)
    address = lines[0].split()[3]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert address.startswith("127.0.0.1:")
    assert lines == [f"[{i}] ready {i} {address} 2 {i} 3 cpu {threads}" for i in range(2)]
    done = machines.finish(job("exit:0,exit:0", "--threads=5"))
    assert done.stdout.splitlines()[0].endswith("cpu 5")
    assert len(done.stdout.splitlines()) == 1, "only process 0 is shown"


@pytest.mark.parametrize(
    ("config", "retries", "code", "attempts"),
    [
        ("exit:75,exit:75;exit:0,exit:0", 1, 0, 2),
        ("hang,crash;exit:75,exit:75;exit:0,exit:0", 5, 0, 3),
        ("exit:3,exit:3", 2, 3, 3),
        ("exit:2,exit:2", 5, 2, 1),
        ("exit:75,exit:75;exit:0,exit:0", 0, 75, 1),
    ],
)
def test_crashes_and_saved_jobs_are_started_again_but_not_mistakes(job, tmp_path, config, retries, code, attempts):
    done = machines.finish(job(config, f"--retries={retries}"))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "w" / "attempts_0").read_text(encoding="utf-8") == str(attempts)
    log = (tmp_path / "w.logs" / "process_1.log").read_text(encoding="utf-8")
    assert log.count("ready 1") == attempts, "every attempt is kept"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_all_processes_save_and_leave(job, tmp_path, number):
    process = job("hang,hang", "--retries=3")
    machines.until(lambda: len(_pids(tmp_path / "w")) == 2)
    process.send_signal(number)
    done = machines.finish(process)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "w" / "attempts_0").read_text(encoding="utf-8") == "1", "who asked to stop wants no new start"
    assert "saved" in done.stdout


def test_a_second_signal_kills(job, tmp_path):
    process = job("stubborn,hang")
    machines.until(lambda: len(_pids(tmp_path / "w")) == 2)
    process.send_signal(signal.SIGINT)
    machines.until(lambda: sum(map(machines.lives, _pids(tmp_path / "w"))) == 1)
    process.send_signal(signal.SIGINT)
    assert machines.finish(process).returncode == 128 + signal.SIGKILL
    _all_end(tmp_path)


def test_who_stays_after_the_others_have_finished_is_killed_and_that_is_a_crash(job, tmp_path):
    done = machines.finish(job("exit:0,stubborn", "--seconds_to_save=0.5"))
    assert done.returncode == 128 + signal.SIGKILL
    _all_end(tmp_path)


def test_a_worker_that_is_killed_ends_the_job(job, tmp_path):
    process = job("stubborn,parent")
    machines.until(lambda: len(_pids(tmp_path / "w")) == 3)
    victim = int((tmp_path / "w" / "pid_1").read_text(encoding="utf-8").split()[0])
    os.kill(victim, signal.SIGKILL)
    assert machines.finish(process).returncode == 128 + signal.SIGKILL
    _all_end(tmp_path)  # The data workers of the dead process, too.


def test_nothing_outlives_a_launcher_that_is_killed(job, tmp_path):
    process = job("stubborn,parent")
    machines.until(lambda: len(_pids(tmp_path / "w")) == 3)
    assert all(map(machines.lives, _pids(tmp_path / "w")))
    os.kill(process.pid, signal.SIGKILL)
    _all_end(tmp_path)
    machines.finish(process)


def test_a_dry_run_prints_one_command_for_each_process_and_starts_none(job, tmp_path):
    done = machines.finish(job("exit:0,exit:0", "--dry_run"))
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    assert lines[1][0] == "env"
    assert {"ROBUST_VIT_PROCESSES=2", "ROBUST_VIT_PROCESS=1", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=1"} <= set(
        lines[1]
    )
    assert lines[1][-4:] == ["-m", "robust_vit.main", "--config=exit:0,exit:0", f"--workdir={tmp_path}/w"]
    assert not (tmp_path / "w.logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--processes"),
        (("--processes=0", "--config=a", "--workdir=b"), "'0': expected 1 or more"),
        (("--processes=two", "--config=a", "--workdir=b"), "'two': expected a whole number"),
        (("--processes=2", "--retries=-1", "--config=a", "--workdir=b"), "expected a whole number"),
        (("--processes=2", "--config=a"), "--workdir=FOLDER"),
        (("--processes=2", "--", "--workdir=a"), "--config=FILE"),
        (("--processes=2", "--show=2", "--config=a", "--workdir=b"), "--show=2"),
        (("--processes=2", "--proces=2", "--config=a", "--workdir=b"), "--proces=2"),
    ],
)
def test_mistakes_are_one_line(machine, tmp_path, arguments, message):
    done = machine.run(sys.executable, LAUNCHER, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
