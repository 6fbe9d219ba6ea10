"""The benchmark of the input pipeline runs, so that it cannot rot: made images, one turn, no peer."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("workers", ["threads", pytest.param("threads,processes", marks=pytest.mark.slow)])
def test_the_benchmark_runs_at_tiny_size(tmp_path, workers):
    script = pathlib.Path(__file__).with_name("input_pipeline.py")
    output = tmp_path / "table.md"
    flags = ["--tiny", f"--output={output}", f"--workers={workers}"]
    done = subprocess.run(
        ["timeout", "-s", "KILL", "120", sys.executable, str(script), *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    kinds = 1 + len(workers.split(","))
    assert len(rows) == 4 + 5 + kinds + 3 + 10  # Four heads, pipelines, workers, ways to the device, augmentations.
    assert all(line.split("|")[2].strip() not in ("", "-") for line in rows)
