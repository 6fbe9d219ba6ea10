"""Two processes of one device each: the same training and studies as one process, whatever happens on the way."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from robust_vit import errors, processes, progress

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 240  # Seconds after which whatever still runs is killed; nothing here takes a quarter of it.
# How XLA says that another process is gone, and how the exchange between CPUs does, in the words of whichever call met it.
ALONE = ("another task died", "heartbeat timeout")
ALONE += ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
CONFIG = '''
"""A ViT that trains for seconds."""

from robust_vit import settings


def get_config():
    config = settings.default()
    config.data.update({"name": "textured_shapes/grey", "batch": 16, "eval_batch": 32, "train_limit": 96, "test_limit": 40})
    with config.unlocked():
        config.model = settings.model("vit", width=64, depth=1, heads=2, mlp_width=256, patch=8, stochastic_depth=0.1)
        config.studies = {
            "accuracy": settings.study("accuracy", batch=16),
            "attack_curve": settings.study(
                "attack_curve", attacks=("fgsm",), multiples=(0.25, 1.0), examples=24, batch=8, unbounded=False
            ),
        }
    config.threat = "textured_shapes/linf-8"
    config.train.steps = 36
    config.checkpoint.every_steps = 5
    config.log_every = 1
    return config
'''


def _environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ROBUST_VIT_CO", "ROBUST_VIT_PRO"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), **more}


def _main(config: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "robust_vit.main", f"--config={config}", f"--workdir={workdir}", *flags]


class _Job:
    """A program that is killed with all its children at the end of the block."""

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path, cwd: pathlib.Path = ROOT):
        self._command, self._environment, self._log, self._cwd = command, environment, log, cwd

    def __enter__(self):
        self._file = open(self._log, "w", encoding="utf-8")
        self._popen = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._cwd,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_):
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._file.close()

    def wait(self) -> tuple[int, str]:
        """The exit code and what was printed."""
        code = self._popen.wait(timeout=LIMIT)
        return code, self._log.read_text(encoding="utf-8")

    def running(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        os.killpg(self._popen.pid, signal.SIGKILL)


def _pair(
    tmp_path: pathlib.Path, commands: list[list[str]], roots: tuple[pathlib.Path, ...] = (ROOT, ROOT)
) -> list[_Job]:
    """Two processes of one job, as they are started by hand on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = []
    for number, (command, root) in enumerate(zip(commands, roots, strict=True)):
        environment = _environment(
            tmp_path / "cache",
            PYTHONPATH=str(root),
            ROBUST_VIT_COORDINATOR=f"127.0.0.1:{port}",
            ROBUST_VIT_PROCESSES="2",
            ROBUST_VIT_PROCESS=str(number),
        )
        jobs.append(_Job(command, environment, tmp_path / f"{number}.log", cwd=root))
    return jobs


def _worker(workdir: pathlib.Path, number: int) -> int:
    """The process id of a worker, found by its environment."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
            found = f"ROBUST_VIT_PROCESS={number}" in (path / "environ").read_text().split("\0")
        except OSError:
            continue
        if found and f"--workdir={workdir}" in command and "robust_vit.main" in command:
            return int(path.name)
    raise AssertionError(f"worker {number} is not running")


def _until_step(job: _Job, workdir: pathlib.Path, step: int) -> None:
    path, deadline = workdir / "main" / "metrics.jsonl", time.monotonic() + LIMIT
    while not any(line["step"] >= step for line in progress.read(path)):
        assert job.running(), job.wait()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="finds the workers by /proc")
def test_two_processes_stopped_and_killed_end_where_one_does(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    one, two = tmp_path / "one", tmp_path / "two"
    environment = _environment(tmp_path / "cache")
    with _Job(_main(config, one), environment, tmp_path / "one.log") as job:
        code, text = job.wait()
        assert code == 0, text[-3000:]

    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "--processes=2"]
    flags = _main(config, two, "--config.sharding=fsdp")[3:]
    with _Job([*launcher, *flags], environment, tmp_path / "stopped.log") as job:
        _until_step(job, two, 6)
        os.kill(_worker(two, 1), signal.SIGTERM)  # One is told to leave; all save the same step and leave.
        code, text = job.wait()
        assert code == errors.EXIT_REQUEUE, text[-3000:]
        assert "it is saved" in text
    saved = max(line["step"] for line in progress.read(two / "main" / "metrics.jsonl"))
    assert 6 <= saved < 36

    with _Job([*launcher, "--retries=1", *flags], environment, tmp_path / "killed.log") as job:
        _until_step(job, two, saved + 6)
        os.kill(_worker(two, 1), signal.SIGKILL)  # The other cannot go on: the job ends, and is started once more.
        code, text = job.wait()
        assert code == 0, text[-3000:]
        assert text.count("going on from step") == 2
        assert f"going on from step {saved}" in text

    assert (two / "report" / "index.html").stat().st_size > 10_000
    left, right = (progress.read(folder / "main" / "metrics.jsonl") for folder in (one, two))
    assert len(left) == len(right) > 36
    for wanted, found in zip(left, right, strict=True):
        for key in wanted:
            # Sums over the batch in another order, amplified over 36 steps: 4e-6 measured over 40 steps of a larger model.
            np.testing.assert_allclose(found[key], wanted[key], rtol=2e-4, err_msg=f"{key} at step {wanted['step']}")
    compared = 0
    for path in sorted(one.rglob("examples.npz")):
        wanted, found = np.load(path), np.load(two / path.relative_to(one))
        assert set(wanted.files) == set(found.files)
        for name in wanted.files:
            if wanted[name].dtype.kind in "iubU":
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{path.parent.parent.name}/{name}")
                compared += 1
    assert compared > 15


@pytest.mark.parametrize("what", ["configuration or workdir", "version of the code"])
def test_processes_that_differ_are_refused_by_all(tmp_path, what):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    seeds, roots = [0, 0], [ROOT, ROOT]
    if what == "version of the code":
        roots[1] = tmp_path / "edited"
        shutil.copytree(ROOT / "robust_vit", roots[1] / "robust_vit")
        with open(roots[1] / "robust_vit" / "losses.py", "a", encoding="utf-8") as file:
            file.write("# An edit that one machine has not got.\n")
    else:
        seeds[1] = 1
    commands = [_main(config, tmp_path / "work", f"--config.seed={seed}") for seed in seeds]
    first, second = _pair(tmp_path, commands, tuple(roots))
    with first, second:
        for job in (first, second):
            code, text = job.wait()
            assert code == errors.EXIT_USER_ERROR
            assert f"error: process 1 was started with another {what} than process 0" in text
            assert "Traceback" not in text
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_mistake_that_only_process_0_meets_ends_all_alike(tmp_path):
    """Process 0 alone writes: were the others to die of that, launchers would take it for a crash and start again."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    (tmp_path / "file").touch()
    first, second = _pair(tmp_path, [_main(config, tmp_path / "file" / "work")] * 2)
    with first, second:
        for job in (first, second):
            code, text = job.wait()
            assert code == errors.EXIT_USER_ERROR, text[-3000:]
            assert f"error: cannot write {tmp_path}/file/work/config.json: Not a directory" in text
            assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_left_alone_ends_within_a_minute_and_says_why(tmp_path, victim):
    """Without a launcher that would end it: the other machine is gone, and nobody here is told."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    jobs = _pair(tmp_path, [_main(config, tmp_path / "work", "--config.train.steps=100000")] * 2)
    with jobs[0], jobs[1]:
        _until_step(jobs[0], tmp_path / "work", 6)
        jobs[victim].kill()
        killed = time.monotonic()
        code, text = jobs[1 - victim].wait()
        assert time.monotonic() - killed < 60
    assert code not in (0, errors.EXIT_USER_ERROR, errors.EXIT_REQUEUE)  # What launchers answer with a new start.
    assert any(sign in text for sign in ALONE), text[-3000:]


@pytest.mark.parametrize("told", ["by flags", pytest.param("by Slurm", marks=pytest.mark.slow)])
def test_a_coordinator_that_does_not_answer_is_named(tmp_path, told):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # Bound and not listening: connections are refused.
        port = nobody.getsockname()[1]
        address = f"127.0.0.1:{port}"
        flags, variables = ("--start_timeout=2",), {}
        if told == "by flags":
            flags += (f"--coordinator={address}", "--processes=2", "--process=1")
        else:
            variables = {name: "1" for name in ("SLURM_PROCID", "SLURM_LOCALID")}
            variables |= {name: "2" for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")}
            variables |= {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "127.0.0.1,other",
                "JAX_COORDINATOR_PORT": str(port),
            }
        environment = _environment(tmp_path / "cache", **variables)
        with _Job(_main(config, tmp_path / "work", *flags), environment, tmp_path / "log") as job:
            code, text = job.wait()
    assert code == 1  # Launchers try again: machines of a pod may start minutes apart.
    assert f"error: process 1 of 2 waited 2 s for the others at {address}" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "10.0.0.1:8476"}, "give all three"),
        ({"coordinator": "10.0.0.1", "processes": 2, "process": 0}, "expected host:port"),
        ({"coordinator": "10.0.0.1:1", "processes": 2, "process": 2}, "expected 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_together(given, message):
    with pytest.raises(errors.UserError, match=message):
        processes.start(**given)


def test_one_process_is_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.start()
    assert processes.is_first()
    assert not processes.several()
    processes.barrier("nobody")
    assert processes.from_first(np.int32(3)) == 3
    assert processes.first_does(lambda: "done") == "done"
    assert processes.least(5) == 5
    np.testing.assert_array_equal(processes.everywhere(np.asarray([1, 2])), [[1, 2]])
    processes.check_same({"configuration": json.dumps({"a": 1})})
    processes.check_shared(tmp_path)
    processes.finish()


def test_what_several_processes_decide_alike(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "everywhere", lambda value: np.stack([value, value // 3]))
    monkeypatch.setattr(processes, "from_first", np.asarray)
    assert processes.least(192 * 2**30) == 64 * 2**30
    assert processes.first_does(lambda: "done") == "done"

    def mistake():
        raise errors.UserError("no space left while writing ümlaut")

    with pytest.raises(errors.UserError, match="no space left while writing ümlaut"):
        processes.first_does(mistake)


def test_a_variable_that_is_no_number(monkeypatch):
    monkeypatch.setenv("ROBUST_VIT_PROCESSES", "two")
    with pytest.raises(errors.UserError, match="ROBUST_VIT_PROCESSES='two'"):
        processes.start()


def test_sigterm_to_a_single_process_is_seen_at_the_next_poll():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = processes.Stop()
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_version_of_the_code_is_stable():
    assert processes.code_version() == processes.code_version()
    assert len(processes.code_version()) == 64
