"""The command line as a user meets it: the quickstart, SIGTERM, and every mistake in one line with exit code 2."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from robust_vit import checkpoints, command_line, errors, main

REPOSITORY = pathlib.Path(__file__).parents[1]
SMOKE = "--config=configs/quickstart.py:smoke"
LIMIT = 280  # Seconds after which a process is killed: no test waits forever.


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    """A user's cache folder: data set and compiled programs are made once."""
    return tmp_path_factory.mktemp("home")


def _start(home: pathlib.Path, *arguments: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        # Most of the time is compilation. `.ci/run` runs the same command with every optimisation.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-m", "robust_vit.main", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, text = process.communicate(timeout=LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
    return process.returncode, text


def _run(home: pathlib.Path, *arguments: str) -> tuple[int, str]:
    return _finish(_start(home, *arguments))


def _results(workdir: pathlib.Path) -> dict[str, bytes]:
    """What has to be equal between a run that was killed and one that was not."""
    kept = {}
    for run in ("vit", "resnet"):
        for path in sorted((workdir / run / "studies").rglob("*")):
            if path.name in ("examples.npz", "result.json"):
                kept[str(path.relative_to(workdir))] = path.read_bytes()
        kept[f"{run}/metrics.jsonl"] = (workdir / run / "metrics.jsonl").read_bytes()
        # An extra checkpoint may be left from where a run was stopped; the last one is what training came to.
        for step in checkpoints.steps(workdir / run / "checkpoints")[-1:]:
            raw = checkpoints.read_raw(workdir / run / "checkpoints", step)
            kept[f"{run}/checkpoints/{step}"] = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(raw))
    return kept


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> pathlib.Path:
    """The workdir of a quickstart that was never interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, text = _run(home, SMOKE, f"--workdir={workdir}")
    assert code == 0, text[-3000:]
    assert text.rstrip().endswith(f"The report: {workdir}/report/index.html")
    return workdir


@pytest.mark.slow
def test_the_quickstart_writes_everything_it_promises(whole):
    html = (whole / "report" / "index.html").read_text(encoding="utf-8")
    for word in ("resnet", "vit", "Accuracy", "Calibration", "Adversarial robustness", "Hessian spectrum"):
        assert word in html
    assert (whole / "config.json").is_file()
    for run in ("vit", "resnet"):
        assert len(list((whole / run / "studies").glob("*/step_*/result.json"))) == 4


@pytest.mark.slow
def test_finished_work_is_not_done_again(home, whole):
    before = _results(whole)
    code, text = _run(home, SMOKE, f"--workdir={whole}")
    assert code == 0
    assert text.count("training is finished") == 2
    assert _results(whole) == before


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_requeued(home, whole, tmp_path):
    workdir = tmp_path / "run"
    process = _start(home, SMOKE, f"--workdir={workdir}")
    deadline = time.monotonic() + LIMIT
    while not (workdir / "resnet" / "training.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, text = _finish(process)
    assert code == errors.EXIT_REQUEUE, text[-3000:]
    assert "Run the same command again to go on" in text
    code, text = _run(home, SMOKE, f"--workdir={workdir}")
    assert code == 0, text[-3000:]
    assert _results(workdir) == _results(whole)


@pytest.mark.slow
def test_killed_at_twenty_random_instants_ends_with_the_same_bytes(home, whole, tmp_path):
    draw, kills, finished = random.Random(0), 0, 0
    workdir = tmp_path / "0"
    while kills < 20:
        process = _start(home, SMOKE, f"--workdir={workdir}")
        try:
            _, text = process.communicate(timeout=draw.uniform(3.0, 20.0))
        except subprocess.TimeoutExpired:
            kills += 1
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            # It got to its end between two kills: compare, and begin anew.
            assert process.returncode == 0, text[-3000:]
            assert _results(workdir) == _results(whole)
            finished += 1
            workdir = tmp_path / str(finished)
    code, text = _run(home, SMOKE, f"--workdir={workdir}")
    assert code == 0, text[-3000:]
    assert _results(workdir) == _results(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=configs/quickstart.py:smok", "--workdir=x"), "did you mean 'smoke'"),
        pytest.param(("--config=configs/nothing.py", "--workdir=x"), "configs/nothing.py", marks=pytest.mark.slow),
        ((SMOKE, "--workdir=x", "--config.trian.steps=3"), "trian"),
        pytest.param((SMOKE, "--workdir=x", "--config.train.steps=many"), "many", marks=pytest.mark.slow),
        pytest.param((SMOKE,), "workdir", marks=pytest.mark.slow),
        ((SMOKE, "--workdir=x", "--workdirr=y"), "workdirr"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(home, tmp_path, arguments, message):
    arguments = tuple(argument.replace("--workdir=x", f"--workdir={tmp_path}/x") for argument in arguments)
    code, text = _run(home, *arguments)
    assert code == errors.EXIT_USER_ERROR, text
    assert message in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_debug_shows_the_traceback(home, tmp_path):
    code, text = _run(home, "--config=configs/quickstart.py:smok", f"--workdir={tmp_path}/x", "--debug")
    assert code != 0
    assert "Traceback" in text


@pytest.mark.slow
def test_a_plan_writes_nothing(home, tmp_path):
    code, text = _run(home, SMOKE, f"--workdir={tmp_path}/x", "--plan")
    assert code == 0, text[-3000:]
    assert not (tmp_path / "x").exists()


def test_a_topology_without_its_compiler_is_one_line(tmp_path, monkeypatch, capsys):
    """In this process, where libtpu can be hidden: what a user's process prints and ends with."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    monkeypatch.setattr(command_line, "configure_jax", lambda: None)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["main", SMOKE, f"--workdir={tmp_path}/x", "--topology=v5e-64"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == errors.EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --topology compiles with libtpu, which is not installed: pip install libtpu")
    assert not (tmp_path / "x").exists()
