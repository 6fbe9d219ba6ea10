"""Programs that stand in for clouds and clusters: they write down how they were called, and do what a test tells them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
LIMIT = 30  # Seconds after which a launcher is killed: no test waits forever.


class Machine:
    """A machine with made-up programs on its PATH. `folder` is its home."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.environment = {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "CALLS": str(folder / "calls"),
        }

    def program(self, name: str, body: str = "") -> None:
        """Adds a program: it notes its arguments, then does what the shell script `body` says."""
        path = self.programs / name
        note = f'printf "%q " {name} "$@" >>"$CALLS"; echo >>"$CALLS"'
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n", encoding="utf-8")
        path.chmod(0o755)

    def calls(self, *words: str) -> list[list[str]]:
        """Every call so far of the program `words[0]` with all other `words` among its arguments, in order."""
        path = self.folder / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        calls = [shlex.split(line) for line in lines]
        return [call for call in calls if call[:1] == list(words[:1]) or not words if set(words) <= set(call)]

    def start(self, *command: object, cwd: pathlib.Path = REPOSITORY, **variables: str) -> subprocess.Popen:
        """Starts a command in a process group of its own."""
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={**self.environment, **variables},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *command: object, **options: object) -> subprocess.CompletedProcess:
        """Runs a command to its end; kills its whole group where that takes longer than `LIMIT`."""
        process = self.start(*command, **options)
        return finish(process)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Waits for a process that `Machine.start` returned."""
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"killed after {LIMIT} s\n{output}\n{errors}")
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def until(condition: Callable[[], object]) -> None:
    """Waits until `condition()` is true, and fails after `LIMIT` seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def processes(*files: pathlib.Path) -> list[int]:
    """The process ids that a made-up program has written to files."""
    return [int(pid) for path in files if path.exists() for pid in path.read_text(encoding="utf-8").split()]


def lives(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def kill(*files: pathlib.Path) -> None:
    """Kills whatever a failed test has left behind: the processes that are named in `files`."""
    for pid in processes(*files):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
